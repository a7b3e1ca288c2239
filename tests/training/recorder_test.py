"""What a run keeps when it is stopped, cannot write, or is set up wrongly."""

import csv
import functools
import os
import shutil
import signal
import threading

import numpy as np
import pytest
from absl import logging

from robust_keras import storage
from robust_keras.evaluation import evaluate
from robust_keras.training import checkpoints, termination
from robust_keras.training import recorder as recording
from tests.training.train_test import NUM_STEPS, tiny_run


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
    ours, theirs = (storage.read(run / "checkpoints", NUM_STEPS).arrays for run in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("step", [3, pytest.param(NUM_STEPS, marks=pytest.mark.slow)])
def test_sigterm_stops_a_validation_which_is_caught_up_on(monkeypatch, capsys, undisturbed, tmp_path, step):
    validate, calls = recording.RunRecorder._validate_now, []

    def disturbed(recorder, at):
        calls.append(at)
        if at == step and calls.count(step) <= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(recorder, at)

    monkeypatch.setattr(recording.RunRecorder, "_validate_now", disturbed)
    for _ in range(2):  # While it is caught up on, too.
        with pytest.raises(termination.Terminated, match=f"saved at step {step}"):
            tiny_run(tmp_path)
        assert storage.read_newest(tmp_path / "checkpoints").step == step
        assert [row["step"] for row in rows(tmp_path)] == [str(k) for k in range(1, step)]
    tiny_run(tmp_path)
    assert calls.count(step) == 3
    assert f"Resuming from step {step}\n" in capsys.readouterr().out
    assert_same_run(tmp_path, undisturbed)


def test_sigint_saves_and_stops_too(monkeypatch, undisturbed, tmp_path):
    should_stop, calls = recording.RunRecorder._should_stop, []

    def at_step_2(recorder):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return should_stop(recorder)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(recording.RunRecorder, "_should_stop", at_step_2)
    with pytest.raises(termination.Terminated, match="Stopped by SIGINT; saved at step 2"):
        tiny_run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before
    assert storage.read_newest(tmp_path / "checkpoints").step == 2
    monkeypatch.undo()
    tiny_run(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_a_second_sigint_does_not_wait():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background would ignore it.
    asked = termination.Termination()
    with pytest.raises(KeyboardInterrupt), asked.heard():
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.is_asked()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_signals_are_heard_by_the_main_thread_alone():
    before = signal.getsignal(signal.SIGTERM)

    def in_a_thread():
        with termination.Termination().heard():
            found.append(signal.getsignal(signal.SIGTERM))

    found = []
    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert found == [before]


def test_what_was_saved_stays_while_a_validation_is_caught_up_on(monkeypatch, undisturbed, tmp_path):
    """SIGKILL right after it: with one snapshot, and none to fall back to."""
    validate, write = recording.RunRecorder._validate_now, checkpoints.Snapshots._write

    class Killed(BaseException):
        pass

    def disturbed(recorder, at):
        if at == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(recorder, at)

    def killed(written, step, *args):
        if step != 3:
            raise Killed
        write(written, step, *args)

    monkeypatch.setattr(recording.RunRecorder, "_validate_now", disturbed)
    with pytest.raises(termination.Terminated, match="saved at step 3"):
        tiny_run(tmp_path, checkpoint_every=100)
    monkeypatch.setattr(recording.RunRecorder, "_validate_now", validate)
    written = (tmp_path / "checkpoints" / "step-00000003.npz").stat().st_mtime_ns
    monkeypatch.setattr(checkpoints.Snapshots, "_write", killed)
    with pytest.raises(Killed):
        tiny_run(tmp_path, checkpoint_every=100)
    assert (tmp_path / "checkpoints" / "step-00000003.npz").stat().st_mtime_ns == written
    assert storage.read_newest(tmp_path / "checkpoints").step == 3
    monkeypatch.setattr(checkpoints.Snapshots, "_write", write)
    tiny_run(tmp_path, checkpoint_every=100)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.slow), True])
def test_sigterm_waits_for_the_snapshot_under_way_and_writes_no_other(monkeypatch, undisturbed, tmp_path, fails):
    write, should_stop, steps = storage.write, recording.RunRecorder._should_stop, []
    go_on = threading.Event()

    def slow(directory, step, *args, **kwargs):
        if str(directory).endswith("checkpoints"):
            steps.append(step)
            if len(steps) == 1:
                assert go_on.wait(60)
                if fails:
                    raise OSError("No space left on device")
        write(directory, step, *args, **kwargs)

    def at_step_4(recorder):
        if recorder._snapshots.under_way() == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.5, go_on.set).start()
        return should_stop(recorder)

    monkeypatch.setattr(storage, "write", slow)
    monkeypatch.setattr(recording.RunRecorder, "_should_stop", at_step_4)
    with pytest.raises(termination.Terminated, match=f"saved at step {4 if fails else 3}"):
        tiny_run(tmp_path)
    assert steps == ([3, 4] if fails else [3])
    monkeypatch.undo()
    tiny_run(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_damaged_best_weights_come_from_the_snapshot_again(undisturbed, tmp_path, ending):
    shutil.copytree(undisturbed, tmp_path / "run")
    best = storage.read_newest(tmp_path / "run" / "best")
    os.truncate(tmp_path / "run" / "best" / f"step-{best.step:08d}.{ending}", 0 if ending == "json" else 100)
    tiny_run(tmp_path / "run")
    again = storage.read_newest(tmp_path / "run" / "best")
    assert again.step == best.step and again.info == best.info
    for name, array in best.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array)


def test_where_a_snapshot_cannot_be_written_the_next_step_is_saved(monkeypatch, undisturbed, tmp_path):
    write, warnings, steps = storage.write, [], []

    def fails_once(directory, step, *args, **kwargs):
        steps.append(step)
        if len(steps) == 1:
            raise OSError("No space left on device")
        write(directory, step, *args, **kwargs)

    monkeypatch.setattr(storage, "write", fails_once)
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    tiny_run(tmp_path)
    assert steps[0] == 3 and steps[1] in (4, 5)
    assert len(warnings) == 1 and "No space left on device" in warnings[0]
    assert storage.steps(tmp_path / "checkpoints") == [steps[1], NUM_STEPS]
    assert_same_run(tmp_path, undisturbed)


def test_where_nothing_can_be_written_the_run_ends(monkeypatch, tmp_path):
    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(storage, "write", fails)
    with pytest.raises(OSError, match="No space left"):
        tiny_run(tmp_path, train_steps=1)


def test_snapshots_of_which_none_is_intact_are_no_new_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000003.json").write_text("{}")
    with pytest.raises(ValueError, match="Expected an intact snapshot.*or an empty folder.*of steps 3"):
        tiny_run(tmp_path)


@pytest.mark.oldest
def test_a_finished_run_adds_nothing(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "events").iterdir()}
    tiny_run(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "events").iterdir()} == before


def bad_attack(*args, **kwargs):
    raise ValueError("Expected a better attack. Received: this one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation": functools.partial(evaluate.correct_under_attack, attack=bad_attack)}, "a better attack"),
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
