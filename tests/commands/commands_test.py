"""Training, export and report as a user types them: bad input, the files that a run leaves, and going on."""

import json
import os
import re
import shutil
import signal
import time

import keras
import numpy as np
import pytest
from absl import logging
from command_line import arguments, call, failed, params, refused, rows, start

from robust_keras import ownership, storage
from robust_keras.commands import evaluate, export, report, train

WIDE = {"train.model": "@wide_resnet()", "DEPTH": "10", "WIDTH": "1"}


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
        ({**WIDE, "DEPTH": "12"}, "6n + 4"),
        ({**WIDE, "ACTIVATION": "'swash'"}, "swash"),
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

    released = [f"--workdir={finished}", f"--evaluation={tmp_path}/eval", f"--output={tmp_path}/released"]
    refusal = refused(monkeypatch, capsys, export, *released, "--weights=last")
    assert "Expected an evaluation of the weights that are exported." in refusal
    call(monkeypatch, export, *released, "--licence=CC BY 4.0", "--class_names=a,b,c,d", "--gradient")
    card = json.loads((tmp_path / "released" / "model_card.json").read_text())
    assert card["evaluation"]["robust_accuracy"] == results["robust_accuracy"]
    assert card["licence"] == "CC BY 4.0" and card["class_names"] == list("abcd") and "gradient" in card["inputs"]
    assert card["threat_model"] == {"norm": "Linf", "epsilon": 8 / 255, "epsilon_fraction": "8/255"}
    as_file = [f"--workdir={finished}", "--licence=MIT", "--format=onnx", f"--output={tmp_path}/model"]
    assert "Expected --licence with a SavedModel alone" in refused(monkeypatch, capsys, export, *as_file)


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
    ("signal_sent", "code"),
    [
        (signal.SIGTERM, 75),
        # As `launcher_test` and `recorder_test` have it in one process, and `layouts_test` with two.
        pytest.param(signal.SIGINT, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_to_the_same_result(monkeypatch, images, finished, tmp_path, signal_sent, code):
    log = tmp_path / "log.txt"
    process = start(train, *arguments(images, tmp_path), log=log)
    deadline = time.monotonic() + 240
    while not storage.steps(tmp_path / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal_sent)
    assert process.wait(timeout=240) == code and "Traceback" not in log.read_text(), log.read_text()
    call(monkeypatch, train, *arguments(images, tmp_path))
    assert_same_run(tmp_path, finished)


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


def test_two_trainings_in_one_folder(monkeypatch, capsys, images, finished, tmp_path):
    before = (finished / "metrics.csv").read_text()
    with ownership.lock(finished, what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, train, *arguments(images, finished))
    assert (finished / "metrics.csv").read_text() == before
    with ownership.lock(tmp_path / "new", what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, train, *arguments(images, tmp_path / "new", SEED=4))
        assert not (tmp_path / "new" / "config.gin").exists()


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
    if not kind:
        call(monkeypatch, train, *arguments(images, tmp_path))
        assert not (tmp_path / "error.txt").exists()
        assert_same_run(tmp_path, finished)


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
        (finished, WIDE, "Expected weights of this network. Received:"),
    ):
        started = arguments(images, tmp_path / "other", **{**no_steps, **changes})
        assert message in refused(monkeypatch, capsys, train, *started, f"--init_from={path}")
