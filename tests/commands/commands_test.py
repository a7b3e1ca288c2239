"""The commands as a user types them: bad input, the files that a run leaves, and going on after an interruption."""

import csv
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from absl import logging

from robust_keras import ownership, storage
from robust_keras.commands import evaluate, export, launcher, report, train
from robust_keras.evaluation import batching
from robust_keras.saved_models import export as exporting

ROOT = pathlib.Path(__file__).parents[2]
TINY = {
    "DEPTH": "10",
    "WIDTH": "1",
    "ACTIVATION": "'silu'",
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "4",
    "TRAIN_STEPS": "6",
    "TAU": "0.9",
    "training_data.num_validation": "8",
    "training/pgd.num_steps": "2",
    "train.validate_every": "3",
    "train.checkpoint_every": "1",
    "train.num_checkpoints": "4",
    "train.log_every": "1",
    "train.validation_batch_size": "8",
    "train.progress": "False",
    "pgd40/pgd.num_steps": "2",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An npz file of 64 small images in 4 classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    random = np.random.RandomState(0)
    image, label = random.randint(0, 256, (64, 8, 8, 3)).astype(np.uint8), np.arange(64) % 4
    np.savez(path, image=image, label=label)
    return path


def params(**changes):
    return [f"--gin_param={name} = {value}" for name, value in {**TINY, **changes}.items()]


def arguments(images, workdir, **changes):
    return [
        "--gin_file=gin/at.gin",
        f"--workdir={workdir}",
        *params(DATASET=f"'npz:{images}'", **changes),
    ]


def call(monkeypatch, script, *args):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
    script.command()


def refused(monkeypatch, capsys, script, *args):
    """Runs a command that must refuse its input: the one line that it says."""
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, script, *args)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    # Commands that fetch missing data follow the line, one on a line.
    line, _, commands = said[said.index("error: ") :].partition("\n")
    assert not commands or "Fetch it with" in line
    return line + commands


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The workdir of a finished tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "at"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, train, *arguments(images, workdir))
    return workdir


def rows(workdir):
    with open(workdir / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"EPSLON": "'1/255'"}, "EPSLON"),
        ({"trainig/pgd.num_steps": "3"}, "trainig/pgd.num_steps"),
        ({"pgd.numsteps": "3"}, "numsteps"),
        ({"no_such.thing": "3"}, "no_such"),
        ({"train.objective": "@adversarial_training"}, "@adversarial_training()"),
        ({"DATASET": "'cifar11'"}, "cifar11"),
        ({"DATASET": "'npz:nowhere.npz'"}, "nowhere.npz"),
        ({"DEPTH": "12"}, "6n + 4"),
        ({"ACTIVATION": "'swash'"}, "swash"),
        ({"EPSILON": "'-8/255'"}, "-8/255"),
        ({"NORM": "'L7'"}, "L7"),
        ({"TAU": "1.5"}, "1.5"),
        ({"training/pgd.num_steps": "0"}, "num_steps"),
        ({"train.attack_batch_norm": "'eval'"}, "eval"),
        ({"train.attack_target": "'nothing'"}, "nothing"),
        ({"BATCH_SIZE": "6"}, "group"),
        ({"train.strategy": "'gpus'"}, "gpus"),
        ({"train.checkpoint_every": "0"}, "checkpoint_every"),
        ({"training_data.num_validation": "64"}, "64"),
        ({"training_data.num_validation": "0"}, "held out"),
    ],
)
def test_bad_bindings_are_refused(monkeypatch, capsys, images, tmp_path, changes, message):
    values = {"DATASET": f"'npz:{images}'", **changes}
    line = refused(monkeypatch, capsys, train, "--gin_file=gin/at.gin", f"--workdir={tmp_path}", *params(**values))
    assert message in line
    assert not (tmp_path / "checkpoints").exists()


def test_bad_paths_are_refused(monkeypatch, capsys, images, tmp_path):
    assert "no_such.gin" in refused(monkeypatch, capsys, train, "--gin_file=gin/no_such.gin")
    missing = tmp_path / "missing"
    line = refused(
        monkeypatch, capsys, train, "--gin_file=gin/at.gin", f"--data_dir={missing}", f"--workdir={tmp_path}"
    )
    assert str(missing) in line
    line = refused(
        monkeypatch, capsys, train, "--gin_file=gin/at_80mti.gin", f"--data_dir={tmp_path}", *params(),
        f"--gin_param=DATASET = 'npz:{images}'", f"--workdir={tmp_path}/x",
    )  # fmt: skip
    assert "ti_500K_pseudo_labeled.pickle" in line and "cifar10_ddpm.npz" in line
    assert "gin_fil" in refused(monkeypatch, capsys, train, "--gin_fil=gin/at.gin")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"label": np.zeros(9, int)}, "image"),
        ({"image": np.full((9, 8, 8, 3), 1.5, np.float32), "label": np.zeros(9, int)}, "1.5"),
        ({"image": np.zeros((9, 8, 8, 3), np.uint8), "label": np.full(9, -1)}, "-1"),
    ],
)
def test_bad_npz_files_are_refused(monkeypatch, capsys, tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    line = refused(monkeypatch, capsys, train, *arguments(tmp_path / "bad.npz", tmp_path / "run"))
    assert message in line


def test_labels_outside_the_models_classes_are_refused(monkeypatch, capsys, finished, images, tmp_path):
    with np.load(images) as arrays:
        np.savez(tmp_path / "more.npz", image=arrays["image"], label=np.arange(64) % 7)
    line = refused(
        monkeypatch, capsys, evaluate, f"--saved_model={finished}/saved_model", f"--dataset=npz:{tmp_path}/more.npz",
        "--gin_file=gin/eval/pgd40.gin", f"--workdir={tmp_path}/eval",
    )  # fmt: skip
    assert "4 classes" in line


@pytest.mark.oldest
def test_a_run_leaves_its_files(finished):
    columns = "step loss learning_rate examples_per_second labelled_fraction val_clean val_robust"
    assert list(rows(finished)[0]) == [*columns.split(), "val_clean_averaged", "val_robust_averaged"]
    assert [int(row["step"]) for row in rows(finished)] == [1, 2, 3, 4, 5, 6]
    assert [float(row["learning_rate"]) for row in rows(finished)] == pytest.approx([0.1] * 3 + [0.01, 0.01, 0.001])
    assert [bool(row["val_robust_averaged"]) for row in rows(finished)] == [False, False, True] * 2
    assert storage.steps(finished / "checkpoints") == [3, 4, 5, 6]
    assert storage.steps(finished / "best")[0] in (3, 6)
    assert "threat.epsilon" in (finished / "config.gin").read_text()
    card = json.loads((finished / "saved_model" / "model_card.json").read_text())
    assert card["num_classes"] == 4 and card["weights"] == "averaged"
    assert card["validation"]["last"]["step"] == 6
    assert any(name.startswith("events") for name in os.listdir(finished / "events"))


def test_best_weights_are_the_averaged_ones_of_the_best_validation(finished):
    best = storage.read_newest(finished / "best")
    accuracies = {int(row["step"]): float(row["val_robust_averaged"]) for row in rows(finished) if row["val_robust"]}
    assert best.step == max(accuracies, key=lambda step: (accuracies[step], -step))
    then = storage.read(finished / "checkpoints", best.step).arrays
    assert best.arrays
    for name, array in best.arrays.items():
        np.testing.assert_array_equal(array, then[f"averages/{name}"])


def test_a_finished_run_is_not_trained_again(monkeypatch, capsys, images, finished):
    before = (finished / "metrics.csv").read_text()
    call(monkeypatch, train, *arguments(images, finished))
    assert capsys.readouterr().out.splitlines()[0] == "Resuming from step 6"
    assert (finished / "metrics.csv").read_text() == before


def test_a_workdir_of_another_run_is_refused(monkeypatch, capsys, images, finished):
    before = (finished / "config.gin").read_text()
    line = refused(monkeypatch, capsys, train, *arguments(images, finished, EPSILON="'4/255'", SEED="3"))
    assert "EPSILON" in line and "8/255" in line and "4/255" in line and "SEED" in line
    assert "TAU" not in line
    assert (finished / "config.gin").read_text() == before


def test_cadences_may_change_between_restarts(monkeypatch, images, finished):
    call(monkeypatch, train, *arguments(images, finished, **{"train.log_every": "5"}))


@pytest.mark.oldest
def test_evaluate_export_and_report(monkeypatch, capsys, images, finished, tmp_path):
    flags = [
        f"--dataset=npz:{images}",
        "--gin_file=gin/eval/pgd40.gin",
        "--gin_param=pgd40/pgd.num_steps = 2",
        "--num_examples=20",
        f"--workdir={tmp_path}/eval",
    ]
    call(monkeypatch, evaluate, f"--saved_model={finished}/saved_model", *flags)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["num_examples"] == 20 and results["epsilon_fraction"] == "8/255"
    assert results["attacks"][0]["name"] == "pgd"
    with np.load(tmp_path / "eval" / "examples.npz") as examples:
        assert examples["adversarial"].shape == (20, 8, 8, 3)
        assert examples["robust"].mean() == results["robust_accuracy"]
    call(monkeypatch, evaluate, f"--saved_model={finished}/saved_model", *flags)
    assert "Already finished" in capsys.readouterr().out
    flags[3] = "--num_examples=10"
    assert "another" in refused(monkeypatch, capsys, evaluate, f"--saved_model={finished}/saved_model", *flags)

    call(monkeypatch, report, f"--workdir={tmp_path}/eval")
    assert "8/255" in capsys.readouterr().out

    call(monkeypatch, export, f"--workdir={finished}", "--weights=last", f"--output={tmp_path}/last.keras")
    last = storage.read_newest(finished / "checkpoints").arrays
    network = keras.models.load_model(tmp_path / "last.keras")
    for weight in network.weights:
        np.testing.assert_array_equal(weight.numpy(), last[f"weights/{weight.path}"])
    export_again = [f"--workdir={finished}", "--weights=last", f"--output={tmp_path}/last.keras"]
    assert "last.keras" in refused(monkeypatch, capsys, export, *export_again)


def test_without_averaging_the_raw_weights_are_the_best(monkeypatch, images, tmp_path):
    changes = {"TAU": "None", "TRAIN_STEPS": "2", "train.attack_batch_norm": "'moving'"}
    call(monkeypatch, train, *arguments(images, tmp_path, **changes))
    assert [row["val_robust_averaged"] for row in rows(tmp_path)] == ["", ""]
    best, last = storage.read_newest(tmp_path / "best"), storage.read_newest(tmp_path / "checkpoints")
    for name, array in best.arrays.items():
        np.testing.assert_array_equal(array, last.arrays[f"weights/{name}"])


@pytest.mark.parametrize("changes", [{"train.checkpoint_every": "1"}, {"train.checkpoint_every": "6"}])
def test_a_non_finite_loss_stops_and_is_never_saved(monkeypatch, capsys, images, tmp_path, changes):
    # The first step's loss is finite, and its update is not: neither the snapshot after it nor the next loss may pass.
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, train, *arguments(images, tmp_path, **{"multistep.base": "1e39", **changes}))
    assert exit.value.code == 3
    assert re.search("Expected (finite weights|a finite loss)", capsys.readouterr().err)
    assert storage.steps(tmp_path / "checkpoints") == storage.steps(tmp_path / "best") == []


def assert_same_run(ours, theirs):
    """Two finished runs have the same rows and the same last variables, bit for bit."""
    for column in ("step", "loss", "val_robust", "val_robust_averaged"):
        assert [row[column] for row in rows(ours)] == [row[column] for row in rows(theirs)]
    ours, theirs = (storage.read(run / "checkpoints", 6).arrays for run in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("signal_sent", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGINT, 75)]
)
def test_a_killed_run_continues_to_the_same_result(monkeypatch, images, finished, tmp_path, signal_sent, code):
    command = [sys.executable, "-u", ROOT / "scripts" / "train.py", *arguments(images, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not storage.steps(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal_sent)
    output = process.communicate(timeout=240)
    assert process.returncode == code and "Traceback" not in output[1], output
    call(monkeypatch, train, *arguments(images, tmp_path))
    assert_same_run(tmp_path, finished)


@pytest.mark.oldest
@pytest.mark.parametrize("size", [0, 5000])
def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(
    monkeypatch, capsys, images, finished, tmp_path, size
):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(finished / "config.gin", tmp_path)
    *_, before, newest = storage.steps(tmp_path / "checkpoints")
    damaged = tmp_path / "checkpoints" / f"step-{newest:08d}.npz"
    os.truncate(damaged, size)
    call(monkeypatch, train, *arguments(images, tmp_path))
    assert f"Resuming from step {before}\n" in capsys.readouterr().out
    assert any("damaged" in warning and str(damaged) in warning for warning in warnings)
    assert_same_run(tmp_path, finished)


def test_a_lost_process_is_one_line(monkeypatch, capsys):
    import tensorflow as tf

    def lost(values):
        raise tf.errors.UnavailableError(None, None, "Connection reset\nby peer")

    monkeypatch.setattr(sys, "argv", ["train"])
    monkeypatch.setenv("TF_CONFIG", "{}")
    with pytest.raises(SystemExit) as exit:
        launcher.launch(lost, lambda values: None, "")
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith("error: Expected all processes to answer. Received: Connection reset;")
    monkeypatch.delenv("TF_CONFIG")
    with pytest.raises(tf.errors.UnavailableError):
        launcher.launch(lost, lambda values: None, "")


def test_two_trainings_in_one_folder(monkeypatch, capsys, images, finished, tmp_path):
    before = (finished / "metrics.csv").read_text()
    with ownership.lock(finished, what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, train, *arguments(images, finished))
    assert (finished / "metrics.csv").read_text() == before
    with ownership.lock(tmp_path / "new", what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, train, *arguments(images, tmp_path / "new", SEED=4))
        assert not (tmp_path / "new" / "config.gin").exists()


def failed(monkeypatch, capsys, script, *args):
    """Runs a command that fails in the middle of its work: the one line that it says."""
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, script, *args)
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("error: ") == 1 and "Traceback" not in said
    return said[said.index("error: ") :].rstrip("\n")


@pytest.mark.parametrize("error", [ValueError("it broke\nin two"), TypeError("it broke in two")])
def test_an_error_in_the_middle_of_a_run_keeps_its_traceback(monkeypatch, capsys, images, finished, tmp_path, error):
    def break_down(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", break_down)  # At the first snapshot.
        line = failed(patch, capsys, train, *arguments(images, tmp_path))
    kind = "TypeError: " if isinstance(error, TypeError) else ""
    assert line == f"error: {kind}it broke in two; the traceback is in {tmp_path}/error.txt"
    text = (tmp_path / "error.txt").read_text()
    assert text.startswith("Traceback") and "break_down" in text
    call(monkeypatch, train, *arguments(images, tmp_path))
    assert not (tmp_path / "error.txt").exists()
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_every_command_stops_on_a_signal(monkeypatch, capsys, number):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def main(values):
        signal.raise_signal(number)
        raise AssertionError

    monkeypatch.setattr(sys, "argv", ["any"])
    with pytest.raises(SystemExit) as exit:
        launcher.launch(main, lambda values: None, "")
    assert exit.value.code == 75
    line = f"error: Stopped by {number.name}; what was finished is kept\n"
    assert capsys.readouterr().err == line
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_weights_to_start_from(monkeypatch, capsys, images, finished, tmp_path):
    best = storage.read_newest(finished / "best").arrays
    no_steps = {"multistep.base": "0.0", "TRAIN_STEPS": "1", "TAU": "None"}
    call(monkeypatch, export, f"--workdir={finished}", f"--output={tmp_path / 'best.keras'}")
    for name, path in {"run": finished, "file": tmp_path / "best.keras"}.items():
        call(monkeypatch, train, *arguments(images, tmp_path / name, **no_steps), f"--init_from={path}")
        arrays = storage.read(tmp_path / name / "checkpoints", 1).arrays
        trained = [name for name in best if not name.rsplit("/")[-1].startswith(("moving", "num_updates"))]
        assert trained
        for weight in trained:
            np.testing.assert_array_equal(arrays[f"weights/{weight}"], best[weight], err_msg=weight)
    # The weights are needed for the start alone.
    (tmp_path / "best.keras").rename(tmp_path / "elsewhere.keras")
    call(monkeypatch, train, *arguments(images, tmp_path / "file", **no_steps), f"--init_from={path}")
    again = arguments(images, tmp_path / "run", **no_steps)
    assert "load_weights.path" in refused(monkeypatch, capsys, train, *again)
    for path, changes, message in (
        (tmp_path, {}, "Expected the folder of a run that has best weights, or a .keras file"),
        (finished, {"WIDTH": "2"}, "Expected weights of this network. Received:"),
    ):
        started = arguments(images, tmp_path / "other", **{**no_steps, **changes})
        assert message in refused(monkeypatch, capsys, train, *started, f"--init_from={path}")


# Evaluation alone, of a tiny network.

FEW = {
    "evaluate.attacks": "[@pgd40/pgd(), @apgd(), @square()]",
    "apgd.threat": "@threat()",
    "square.threat": "@threat()",
    "pgd40/pgd.num_steps": "2",
    "apgd.num_steps": "15",
    "apgd.num_restarts": "2",
    "square.num_queries": "1000",
    "evaluate.batch_size": "4",
    "evaluate.diagnose": "False",
    "evaluate.progress": "False",
    "evaluate.save_every": "0",
    "EPSILON": "'2/255'",
}


@pytest.fixture(scope="module")
def network(make_tiny_model, tmp_path_factory):
    """A SavedModel, and an npz file of 12 images with its predictions on them, of which two are made wrong."""
    folder = tmp_path_factory.mktemp("network")
    model = make_tiny_model()
    exporting.export(model, folder / "saved_model", card={})
    image = np.random.RandomState(1).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    label = np.argmax(model(image / np.float32(255), training=False), axis=-1)
    label[[3, 8]] = (label[[3, 8]] + 1) % 4
    np.savez(folder / "images.npz", image=image, label=label)
    return folder


def evaluation_of(network, workdir, *extra, **changes):
    return [
        f"--saved_model={network}/saved_model",
        f"--dataset=npz:{network}/images.npz",
        "--gin_file=gin/eval/pgd40.gin",
        f"--workdir={workdir}",
        *[f"--gin_param={name} = {value}" for name, value in {**FEW, **changes}.items()],
        *extra,
    ]


ONLY_PGD = {name: value for name, value in FEW.items() if not name.startswith(("apgd", "square", "evaluate.attacks"))}


def quick_evaluation_of(network, workdir, *extra):
    arguments = evaluation_of(network, workdir, *extra)
    others = tuple(f"--gin_param={name} " for name in FEW if name not in ONLY_PGD)
    return [argument for argument in arguments if not argument.startswith(others)]


def measured(workdir):
    """Results without seconds, and the arrays of examples.npz."""
    results = json.loads((workdir / "results.json").read_text())
    for record in results["attacks"]:
        del record["seconds"]
    with np.load(workdir / "examples.npz") as arrays:
        return results, dict(arrays)


def assert_measured_alike(one, other):
    (results, examples), (other_results, other_examples) = measured(one), measured(other)
    assert results == other_results
    assert examples.keys() == other_examples.keys()
    for name, array in other_examples.items():
        np.testing.assert_array_equal(examples[name], array, err_msg=name)


def interrupt(monkeypatch, network_arguments, num_calls):
    """An evaluation that breaks off after so many looks."""
    left = [num_calls]
    with monkeypatch.context() as patch:
        for kind in (batching.Packing, batching.Batchwise):

            def advance(self, whole=kind.advance):
                if left[0] == 0:
                    raise KeyboardInterrupt
                left[0] -= 1
                return whole(self)

            patch.setattr(kind, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            call(patch, evaluate, *network_arguments)


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_result(monkeypatch, capsys, network, tmp_path):
    arguments = evaluation_of(network, tmp_path / "killed")
    process = subprocess.Popen(
        [sys.executable, "-u", ROOT / "scripts" / "evaluate.py", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    # Anywhere in one of the three attacks.
    num_saves = int(np.random.default_rng().integers(1, 18))
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if max(storage.steps(tmp_path / "killed" / "state"), default=0) >= num_saves:
            break
        time.sleep(0.002)
    process.kill()
    output = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, (num_saves, output)
    assert not (tmp_path / "killed" / "results.json").exists()
    capsys.readouterr()
    call(monkeypatch, evaluate, *arguments)
    assert capsys.readouterr().out.startswith("Resuming from attack"), num_saves
    call(monkeypatch, evaluate, *evaluation_of(network, tmp_path / "whole"))
    assert_measured_alike(tmp_path / "killed", tmp_path / "whole")
    results, _ = measured(tmp_path / "whole")
    assert 0 < results["robust_accuracy"] < results["clean_accuracy"]
    assert sorted(os.listdir(tmp_path / "killed")) == ["config.gin", "examples.npz", "results.json"]


def test_individual_evaluation(monkeypatch, network, tmp_path):
    call(monkeypatch, evaluate, *evaluation_of(network, tmp_path, "--individual"))
    results, examples = measured(tmp_path)
    assert results["individual"] is True
    assert [record["examples_attacked"] for record in results["attacks"]] == [10] * 3
    assert results["clean_accuracy"] == 10 / 12
    assert results["robust_accuracy"] == examples["robust"].mean()


def test_another_subject_in_a_begun_workdir_is_refused(monkeypatch, capsys, network, tmp_path):
    workdir = tmp_path / "run"
    interrupt(monkeypatch, quick_evaluation_of(network, workdir), 2)
    capsys.readouterr()
    for extra, named in (
        (["--num_examples=5"], ["with dataset.num_examples = None, not 5"]),
        (["--individual"], ["with individual = False, not True"]),
        (["--input_range=0,255"], ["with model.input_range = [0.0, 1.0], not [0.0, 255.0]"]),
        (["--outputs=probabilities"], ["with model.outputs = logits, not probabilities"]),
        (["--gin_param=EPSILON = '3/255'"], ["2/255", "3/255"]),
    ):
        line = refused(monkeypatch, capsys, evaluate, *quick_evaluation_of(network, workdir, *extra))
        assert "another" in line
        for text in named:
            assert text in line
    # Nor did any of them do harm.
    call(monkeypatch, evaluate, *quick_evaluation_of(network, workdir, "--gin_param=evaluate.save_every = 5"))
    assert capsys.readouterr().out.startswith("Resuming from attack 1 of 1")
    assert measured(workdir)[0]["num_examples"] == 12
    line = refused(monkeypatch, capsys, evaluate, *quick_evaluation_of(network, workdir, "--individual"))
    assert "individual = False, not True" in line


@pytest.mark.parametrize("name", ["state/subject.json", "config.gin", "results.json"])
def test_an_evaluation_killed_while_it_wrote_a_file_goes_on(monkeypatch, capsys, network, tmp_path, name):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 2)
    (tmp_path / name).write_text("")  # Opened, and not written yet.
    call(monkeypatch, evaluate, *arguments)
    assert measured(tmp_path)[0]["num_examples"] == 12


def test_a_finished_evaluation_is_of_the_model_wherever_it_is(monkeypatch, capsys, network, tmp_path):
    shutil.copytree(network, tmp_path / "network")
    call(monkeypatch, evaluate, *quick_evaluation_of(tmp_path / "network", tmp_path / "run"))
    (tmp_path / "network").rename(tmp_path / "moved")
    for path in (f"{network}/saved_model/", tmp_path / "moved" / "saved_model"):
        arguments = quick_evaluation_of(network, tmp_path / "run", f"--saved_model={path}")
        arguments = [each.replace(f"{network}/images.npz", f"{tmp_path}/network/images.npz") for each in arguments]
        capsys.readouterr()
        call(monkeypatch, evaluate, *arguments)
        assert capsys.readouterr().out.startswith("Already finished")


def test_an_interrupted_evaluation_goes_on_with_the_model_wherever_it_is(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path / "run")
    interrupt(monkeypatch, arguments, 2)
    shutil.copytree(network / "saved_model", tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "renamed")
    call(monkeypatch, evaluate, *arguments, f"--saved_model={tmp_path}/moved/", f"--workdir={tmp_path}/renamed/")
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out
    assert measured(tmp_path / "renamed")[0]["num_examples"] == 12


def test_an_evaluation_of_an_older_version_goes_on(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 2)
    subject = json.loads((tmp_path / "state" / "subject.json").read_text())
    (tmp_path / "state" / "subject.json").write_text(json.dumps(subject))  # On one line.
    call(monkeypatch, evaluate, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["config.gin", "examples.npz", "results.json"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {name: results[name] for name in subject} == subject
    named = {"path", "sha256", "input_range", "input_layout", "outputs", "logits_output"}
    assert results["model"].keys() == named


def test_two_evaluations_in_one_folder(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)
    with ownership.lock(tmp_path, what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, evaluate, *arguments)
        assert os.listdir(tmp_path) == ["in_use.json"]


@pytest.mark.parametrize("name", ["state/subject.json", "config.gin", "results.json"])
@pytest.mark.parametrize("text", ["no json", '{"model": 3}', "[1]", "\udcff"])
def test_a_malformed_file_of_an_evaluation_is_one_line_that_names_it(
    monkeypatch, capsys, network, tmp_path, name, text
):
    arguments = quick_evaluation_of(network, tmp_path)
    interrupt(monkeypatch, arguments, 1)
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert f"{tmp_path}/{name}" in refused(monkeypatch, capsys, evaluate, *arguments)


def test_an_error_in_the_middle_of_an_evaluation_keeps_its_traceback(monkeypatch, capsys, network, tmp_path):
    arguments = quick_evaluation_of(network, tmp_path)

    def break_down(*args, **kwargs):
        raise ValueError("it broke")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", break_down)  # At the first save.
        line = failed(patch, capsys, evaluate, *arguments)
    assert line == f"error: it broke; the traceback is in {tmp_path}/error.txt"
    call(monkeypatch, evaluate, *arguments)
    assert sorted(os.listdir(tmp_path)) == ["config.gin", "examples.npz", "results.json"]


@pytest.mark.parametrize(
    "gin_file, changes, message",
    [
        ("autoattack", {"autoattack.version": "'custom'", "autoattack.attacks": "['apgd-ce', 'foo']"}, "foo"),
        ("autoattack", {"autoattack.version": "'custom'", "autoattack.attacks": "'square'"}, "'square'"),
        ("autoattack", {"autoattack.version": "'custom'"}, "None"),
        ("autoattack", {"autoattack.version": "'foo'"}, "foo"),
        ("autoattack", {"autoattack.attacks": "['square']"}, "custom"),
        ("autoattack", {"EPSILON": "'foo'"}, "foo"),
        ("pgd40", {"EPSILON": "'foo'"}, "foo"),
        ("aa_mt", {"EPSILON": "'-1/255'"}, "-1/255"),
        ("aa_mt", {"NORM": "'L3'"}, "L3"),
        ("autoattack", {"apgd.num_steps": "3"}, "apgd.num_steps"),
    ],
)
def test_bad_attacks_are_refused(monkeypatch, capsys, network, tmp_path, gin_file, changes, message):
    line = refused(
        monkeypatch, capsys, evaluate, f"--saved_model={network}/saved_model", f"--dataset=npz:{network}/images.npz",
        f"--gin_file=gin/eval/{gin_file}.gin", f"--workdir={tmp_path}/eval",
        *[f"--gin_param={name} = {value}" for name, value in changes.items()],
    )  # fmt: skip
    assert message in line
    assert not (tmp_path / "eval").exists()
