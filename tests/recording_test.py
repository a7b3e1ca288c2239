"""What a run keeps when it is stopped, cannot write, or is set up wrongly."""

import csv
import functools
import os
import signal

import numpy as np
import pytest
from absl import logging

from robust_keras import evaluation, recording, snapshots
from tests.training_test import NUM_STEPS, tiny_run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    tiny_run(workdir)
    return workdir


def rows(workdir):
    """Of metrics.csv, without the speed."""
    with open(workdir / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k != "examples_per_second"} for row in csv.DictReader(file)]


def assert_same_run(ours, theirs):
    assert rows(ours) == rows(theirs)
    ours, theirs = (snapshots.read(run / "checkpoints", NUM_STEPS).arrays for run in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("step", [3, NUM_STEPS])
def test_sigterm_stops_a_validation_which_is_caught_up_on(monkeypatch, capsys, undisturbed, tmp_path, step):
    validate, calls = recording.RunRecorder._validate_now, []

    def disturbed(recorder, at):
        calls.append(at)
        if at == step and calls.count(step) <= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(recorder, at)

    monkeypatch.setattr(recording.RunRecorder, "_validate_now", disturbed)
    for _ in range(2):  # While it is caught up on, too.
        with pytest.raises(recording.Terminated, match=f"saved at step {step}"):
            tiny_run(tmp_path)
        assert snapshots.read_newest(tmp_path / "checkpoints").step == step
        assert [row["step"] for row in rows(tmp_path)] == [str(k) for k in range(1, step)]
    tiny_run(tmp_path)
    assert calls.count(step) == 3
    assert f"Resuming from step {step}\n" in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)


def test_where_a_snapshot_cannot_be_written_the_next_step_is_saved(monkeypatch, undisturbed, tmp_path):
    write, warnings, steps = snapshots.write, [], []

    def fails_once(directory, step, *args, **kwargs):
        steps.append(step)
        if len(steps) == 1:
            raise OSError("No space left on device")
        write(directory, step, *args, **kwargs)

    monkeypatch.setattr(snapshots, "write", fails_once)
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    tiny_run(tmp_path)
    assert steps[0] == 3 and steps[1] in (4, 5)
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert snapshots.steps(tmp_path / "checkpoints") == [steps[1], NUM_STEPS]
    assert_same_run(tmp_path, undisturbed)


def test_where_nothing_can_be_written_the_run_ends(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(snapshots, "write", fails)
    with pytest.raises(OSError, match="No space left"):
        tiny_run(tmp_path, train_steps=1)


def test_snapshots_of_which_none_is_intact_are_no_new_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000003.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected an intact snapshot.*or an empty folder.*of steps 3"):
        tiny_run(tmp_path)


def test_a_finished_run_adds_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "events").iterdir()}
    tiny_run(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "events").iterdir()} == before


def bad_attack(*args, **kwargs):
    raise ValueError("Expected a better attack. Received: this one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": functools.partial(evaluation.correct_under_attack, attack=bad_attack)}, "a better attack"),
        ({"validation_batch_size": 0}, "Expected validation_batch_size as an integer >= 1"),
        ({"dtype_policy": "mixed_float16"}, "out of float32, mixed_bfloat16. Received: 'mixed_float16'"),
        ({"accumulation_steps": 3}, "accumulation_steps=3 parts of whole groups of 4 images.*a batch of 8"),
        ({"accumulation_steps": 4}, "accumulation_steps=4 parts of whole groups of 4 images.*a batch of 8"),
    ],
)
def test_what_does_not_fit_shows_before_the_first_step(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **changes)
    assert not (tmp_path / "metrics.csv").exists() or not rows(tmp_path)
