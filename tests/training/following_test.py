"""Snapshots as another process finds them while a run goes on: each once, whatever is removed or written meanwhile."""

import numpy as np
import pytest
from absl import logging

from robust_keras import storage
from robust_keras.training import following


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Where a run's snapshots are; nobody waits."""
    monkeypatch.setattr(following, "EVERY", 0.0)
    return tmp_path / "checkpoints"


def write(checkpoints, *steps, keep=9):
    for step in steps:
        storage.write(checkpoints, step, {"weights/a": np.full(3, step)}, {}, keep=keep)


def follow(checkpoints, *, seen=(), last_step=None, timeout=0.0):
    return following.follow(checkpoints.parent, seen=seen, last_step=last_step, timeout=timeout)


def test_each_snapshot_once_and_the_oldest_first(checkpoints):
    assert list(follow(checkpoints)) == []
    write(checkpoints, 2, 4)
    found = []
    for snapshot in follow(checkpoints, last_step=10, timeout=None):
        found.append(snapshot.step)
        np.testing.assert_array_equal(snapshot.arrays["weights/a"], np.full(3, snapshot.step))
        if (newest := max(storage.steps(checkpoints))) < 10:
            write(checkpoints, newest + 2)
    assert found == [2, 4, 6, 8, 10]
    assert [snapshot.step for snapshot in follow(checkpoints, seen=[2, 6])] == [4, 8, 10]
    assert list(follow(checkpoints, seen=[2, 4, 6, 8, 10], last_step=10, timeout=None)) == []


def test_the_snapshots_are_left_alone(checkpoints):
    write(checkpoints, 2, 4)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoints.iterdir()}
    assert len(list(follow(checkpoints))) == 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkpoints.iterdir()} == before


@pytest.mark.parametrize("how", ["before", "between"])
def test_a_snapshot_that_goes_while_it_is_read(checkpoints, monkeypatch, how):
    write(checkpoints, 2, 4)
    read = {"before": storage.read, "between": storage.sha256}[how]

    def late(*args):
        """The run is faster: it writes another one, and removes this one, marker first."""
        found = read(*args) if how == "between" else None
        if 2 in storage.steps(checkpoints):
            write(checkpoints, 6, keep=2)
        return found or read(*args)

    monkeypatch.setattr(storage, read.__name__, late)
    monkeypatch.setattr(logging, "warning", None)
    assert [snapshot.step for snapshot in follow(checkpoints)] == [4, 6]


def test_a_snapshot_that_is_written_again_while_it_is_read(checkpoints, monkeypatch):
    write(checkpoints, 2)
    read, left = storage.read, [1]

    def late(directory, step):
        if left.pop() if left else False:
            storage.withdraw(storage.stem_of(directory, step))
            try:
                return read(directory, step)
            finally:
                write(checkpoints, 2)
        return read(directory, step)

    monkeypatch.setattr(storage, "read", late)
    assert [snapshot.step for snapshot in follow(checkpoints)] == [2]


def test_a_damaged_snapshot_is_passed_over_with_a_warning(checkpoints, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda message, *args: warnings.append(message % args))
    write(checkpoints, 2, 4)
    (checkpoints / "step-00000002.npz").write_bytes(b"half")
    assert [snapshot.step for snapshot in follow(checkpoints)] == [4]
    (line,) = warnings
    assert "damaged" in line and "step-00000002.npz" in line


def test_a_snapshot_that_cannot_be_read_now_is_an_error(checkpoints, monkeypatch):
    write(checkpoints, 2)

    def fails(*args):
        raise PermissionError("not yours")

    monkeypatch.setattr(storage, "read", fails)
    with pytest.raises(PermissionError):
        list(follow(checkpoints))
