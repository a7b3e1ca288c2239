"""Snapshots of a run, evaluated by a second process while the first trains."""

import csv
import json
import shutil

import numpy as np
import pytest
from command_line import arguments, call, refused, start
from commands_test import assert_same_run

from robust_keras import ownership, storage
from robust_keras.commands import evaluate, evaluate_checkpoints, export, train
from robust_keras.evaluation import batching
from robust_keras.training import following

QUICK = ["pgd40/pgd.num_steps = 2", "evaluate.batch_size = 4", "evaluate.diagnose = False", "evaluate.progress = False"]
QUICK += ["evaluate.save_every = 0"]
ATTACKS = ["--gin_file=gin/eval/pgd40.gin", *[f"--gin_param={binding}" for binding in QUICK]]


def following_of(run, *extra):
    return [f"--run={run}", *ATTACKS, "--num_examples=20", "--timeout=0", *extra]


def table(run, name="pgd40-averaged"):
    with open(run / "evaluations" / name / "accuracies.csv") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def steps_of(rows):
    return [row["step"] for row in rows]


def state_of(run):
    """Everything in a run's folder but its evaluations."""
    paths = [path for path in run.rglob("*") if "evaluations" not in path.parts and path.is_file()]
    return {str(path.relative_to(run)): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def copy(finished, path):
    return shutil.copytree(finished, path, ignore=shutil.ignore_patterns("step-0000000[45].*"))


@pytest.fixture
def copied(finished, tmp_path):
    """A finished run of 6 steps, of which the snapshots of steps 3 and 6 are there."""
    return copy(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def evaluated(finished, tmp_path_factory):
    """The same with the evaluations of both."""
    run = copy(finished, tmp_path_factory.mktemp("evaluated") / "run")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, evaluate_checkpoints, *following_of(run))
    return run


@pytest.mark.slow
def test_two_processes(monkeypatch, images, finished, tmp_path):
    """One trains, and keeps no more than its newest snapshot; the other evaluates what it meets, up to the last step."""
    run, log = tmp_path / "run", tmp_path / "log.txt"
    flags = [f"--run={run}", *ATTACKS, "--num_examples=20"]
    second = start(evaluate_checkpoints, *flags, log=log)
    first = start(train, *arguments(images, run, **{"train.num_checkpoints": "1"}), log=tmp_path / "train.txt")
    assert first.wait(timeout=240) == 0, (tmp_path / "train.txt").read_text()
    assert second.wait(timeout=240) == 0, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said and f"Waiting for a run in {run}" in said
    assert_same_run(run, finished)
    assert storage.steps(run / "checkpoints") == [6] and not (run / "in_use.json").exists()
    measured = table(run)
    assert steps_of(measured)[-1] == 6 and steps_of(measured) == sorted(set(steps_of(measured)))
    # What was measured is what the export of these weights has.
    model = tmp_path / "last.keras"
    call(monkeypatch, export, f"--workdir={run}", "--weights=last_averaged", f"--output={model}")
    flags = [f"--saved_model={model}", f"--dataset=npz:{images}", "--num_examples=20", f"--workdir={tmp_path}/eval"]
    call(monkeypatch, evaluate, *flags, *ATTACKS)
    ours, theirs = run / "evaluations" / "pgd40-averaged" / "step-00000006", tmp_path / "eval"
    with np.load(ours / "examples.npz") as one, np.load(theirs / "examples.npz") as other:
        for name in other:
            np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_every_snapshot_has_an_evaluation_and_a_row(evaluated, finished, images):
    folder = evaluated / "evaluations" / "pgd40-averaged"
    names = ["accuracies.csv", "config.gin", "run.json", "step-00000003", "step-00000006"]
    assert sorted(path.name for path in folder.iterdir()) == names
    for row in table(evaluated):
        results = json.loads((folder / f"step-0000000{int(row['step'])}" / "results.json").read_text())
        assert [row[name] for name in ("num_examples", "clean_accuracy", "robust_accuracy")] == [
            results[name] for name in ("num_examples", "clean_accuracy", "robust_accuracy")
        ]
        assert [row["interval_low"], row["interval_high"]] == results["confidence_interval_95"]
        assert results["dataset"]["name"] == f"npz:{images}" and results["dataset"]["num_examples"] == 20
        assert results["model"]["path"].endswith(f"checkpoints/step-0000000{int(row['step'])}.npz")
        assert results["model"]["weights"] == "averaged" and results["model"]["step"] == row["step"]
    digests = {json.loads(path.read_text())["model"]["sha256"] for path in folder.glob("*/results.json")}
    assert len(digests) == 2
    assert {name: each[0] for name, each in state_of(evaluated).items()}.items() <= {
        name: each[0] for name, each in state_of(finished).items()
    }.items()


def test_what_is_evaluated_is_not_evaluated_again(monkeypatch, capsys, evaluated):
    before = {path: path.read_bytes() for path in (evaluated / "evaluations").rglob("*") if path.is_file()}
    state, table_before = state_of(evaluated), table(evaluated)
    call(monkeypatch, evaluate_checkpoints, *following_of(evaluated))
    said = capsys.readouterr().out
    assert "Step 6, averaged" not in said and said.count("| 6 ") == 1 and "accuracies.csv" in said
    assert {path: path.read_bytes() for path in before} == before and table(evaluated) == table_before
    assert state_of(evaluated) == state


def test_an_evaluation_goes_on_after_its_snapshot_is_gone(monkeypatch, capsys, evaluated, copied):
    left = [2]
    with monkeypatch.context() as patch:
        for kind in (batching.Packing, batching.Batchwise):

            def advance(self, whole=kind.advance):
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                return whole(self)

            patch.setattr(kind, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            call(patch, evaluate_checkpoints, *following_of(copied))
    interrupted = storage.steps(copied / "evaluations" / "pgd40-averaged" / "weights")
    assert interrupted == [3]
    subject = copied / "evaluations" / "pgd40-averaged" / "step-00000003" / "state" / "subject.json"
    begun = json.loads(subject.read_text())
    older = {name: value for name, value in begun["model"].items() if name not in ("weights", "step")}
    subject.write_text(json.dumps({**begun, "model": older}))
    line = refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(copied))
    assert "model.step = (nothing), not 3; model.weights = (nothing), not averaged" in line
    assert str(subject.parent) in line
    subject.write_text(json.dumps(begun))
    for path in (copied / "checkpoints").glob("step-00000003.*"):
        path.unlink()
    call(monkeypatch, evaluate_checkpoints, *following_of(copied))
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out
    assert table(copied) == table(evaluated)
    assert not (copied / "evaluations" / "pgd40-averaged" / "weights").exists()


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--num_examples=10"], "dataset.num_examples = 20, not 10"),
        (["--split=held_out", "--num_examples=8"], "dataset.held_out = (nothing), not 8"),
        (["--gin_param=EPSILON = '4/255'"], "EPSILON = 8/255, not 4/255"),
        (["--weights=raw", "--workdir=WORKDIR"], "weights = averaged, not raw"),
    ],
)
def test_another_evaluation_in_the_folder_is_refused(monkeypatch, capsys, evaluated, extra, message):
    extra = [each.replace("WORKDIR", f"{evaluated}/evaluations/pgd40-averaged") for each in extra]
    assert message in refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(evaluated, *extra))


def test_a_folder_of_another_run_is_refused(monkeypatch, capsys, evaluated, copied):
    snapshot = storage.read(copied / "checkpoints", 6)
    arrays = {name: array + 1 for name, array in snapshot.arrays.items()}
    storage.write(copied / "checkpoints", 6, arrays, snapshot.info)
    workdir = evaluated / "evaluations" / "pgd40-averaged"
    line = refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(copied, f"--workdir={workdir}"))
    assert f"Received: {workdir}, with other weights at step 6" in line


def test_a_second_command_in_the_folder_is_refused(monkeypatch, capsys, evaluated):
    with ownership.lock(evaluated / "evaluations" / "pgd40-averaged", what="another command"):
        assert "in use by process" in refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(evaluated))
    with ownership.lock(evaluated, what="a training run"):  # Which is no obstacle.
        call(monkeypatch, evaluate_checkpoints, *following_of(evaluated))


def test_raw_weights_on_the_images_held_out(monkeypatch, evaluated, copied):
    flags = [each for each in following_of(copied) if "num_examples" not in each]
    call(monkeypatch, evaluate_checkpoints, *flags, "--weights=raw", "--split=held_out")
    rows = table(copied, "pgd40-raw")
    assert steps_of(rows) == [3, 6] and {row["num_examples"] for row in rows} == {8}
    with open(copied / "metrics.csv") as file:
        metrics = {float(row["step"]): row for row in csv.DictReader(file)}
    for row in rows:
        # The very images by which the run chose.
        assert row["clean_accuracy"] == pytest.approx(float(metrics[row["step"]]["val_clean"]))
    raw = json.loads((copied / "evaluations" / "pgd40-raw" / "step-00000006" / "results.json").read_text())
    theirs = evaluated / "evaluations" / "pgd40-averaged" / "step-00000006" / "results.json"
    assert raw["model"]["sha256"] != json.loads(theirs.read_text())["model"]["sha256"]
    assert raw["dataset"]["held_out"] == 8 and raw["dataset"]["split"] == "train"


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--run=RUN/nothing"], "Expected the folder of a training run. Received: RUN/nothing, without one"),
        (["--gin_file=gin/eval/no_such.gin"], "no_such.gin"),
        (["--dataset=npz:nowhere.npz"], "nowhere.npz"),
        (["--num_examples=1000"], "num_examples from 1 to 64"),
        (["--dataset=digits", "--split=held_out"], "--split=held_out"),
        (["--weights=best"], "weights"),
        (["--timeout=-1"], "timeout"),
        (["--strategy=gpus"], "gpus"),
    ],
)
def test_bad_input_is_refused(monkeypatch, capsys, copied, extra, message):
    extra = [each.replace("RUN", str(copied)) for each in extra]
    state = state_of(copied)
    line = refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(copied), *extra)
    assert message.replace("RUN", str(copied)) in line
    assert state_of(copied) == state and not (copied / "evaluations").exists()


@pytest.mark.parametrize("name", ["", "/step-00000006"])
def test_the_folder_of_an_evaluation_is_no_run(monkeypatch, capsys, evaluated, name):
    folder = f"{evaluated}/evaluations/pgd40-averaged{name}"
    line = refused(monkeypatch, capsys, evaluate_checkpoints, f"--run={folder}", *ATTACKS)
    assert f"Expected the folder of a training run. Received: {folder}, with" in line


def test_a_run_that_is_not_there_is_waited_for_aloud(monkeypatch, capsys, tmp_path):
    def sleep(seconds):
        raise ValueError("asleep")

    monkeypatch.setattr(evaluate_checkpoints.time, "sleep", sleep)
    for folder, told in ((tmp_path, ""), (tmp_path / "typo", " (there is no such folder yet)")):
        with pytest.raises(ValueError, match="asleep"):
            evaluate_checkpoints.run(run=str(folder), gin_files=["gin/eval/pgd40.gin"])
        assert f"Waiting for a run in {folder}{told}\n" in capsys.readouterr().out


def test_a_network_at_chance_is_evaluated_as_any_other(monkeypatch, images, copied):
    """As those of the first steps are."""
    for snapshot in [storage.read(copied / "checkpoints", step) for step in (3, 6)]:
        arrays = {name: array * 0 if "logits" in name else array for name, array in snapshot.arrays.items()}
        storage.write(copied / "checkpoints", snapshot.step, arrays, snapshot.info, keep=9)
    call(monkeypatch, evaluate_checkpoints, *following_of(copied, "--num_examples=64"))
    assert [row["clean_accuracy"] for row in table(copied)] == [0.25, 0.25]


def test_a_run_without_averages(monkeypatch, capsys, images, copied):
    config = (copied / "config.gin").read_text()
    (copied / "config.gin").write_text(config.replace("TAU = 0.9", "TAU = None"))
    workdir = evaluate_checkpoints._default_workdir(
        evaluate_checkpoints._described(str(copied), (copied / "config.gin").read_text(), None, {"name": None, "split": "test"}),
        ["gin/eval/pgd40.gin"],
    )  # fmt: skip
    assert workdir == f"{copied}/evaluations/pgd40-raw"
    newest = storage.read(copied / "checkpoints", 6)
    arrays = {name: array for name, array in newest.arrays.items() if not name.startswith("averages/")}
    storage.write(copied / "checkpoints", 6, arrays, newest.info, keep=1)
    line = refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(copied, "--weights=averaged"))
    assert "Expected a run that has averaged weights. Received: none at step 6" in line


def test_a_run_that_was_started_from_python(monkeypatch, capsys, images, copied):
    (copied / "config.gin").unlink()
    assert "--dataset" in refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(copied))
    flags = following_of(copied, f"--dataset=npz:{images}")
    monkeypatch.setattr(following, "EVERY", 0.0)
    call(monkeypatch, evaluate_checkpoints, *flags)
    assert steps_of(table(copied, "pgd40-raw")) == [3, 6]


def test_a_table_of_somebody_elses_holds_numbers_alone(monkeypatch, capsys, evaluated, tmp_path):
    run = shutil.copytree(evaluated, tmp_path / "run")
    path = run / "evaluations" / "pgd40-averaged" / "step-00000003" / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clean_accuracy": "=1+1"}))
    assert str(path) in refused(monkeypatch, capsys, evaluate_checkpoints, *following_of(run))
