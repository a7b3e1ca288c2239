import hashlib
import io
import json
import os

import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging

from robust_keras import storage

pytestmark = pytest.mark.oldest


def arrays_of(step):
    return {"weights/kernel": np.full((2, 3), step, np.float32), "step": np.int64(step)}


def write_three(directory, keep=5):
    for step in (1, 2, 3):
        storage.write(directory, step, arrays_of(step), {"at": step}, keep=keep)


def data_path(directory, step):
    return f"{directory}/step-{step:08d}.npz"


def marker_path(directory, step):
    return f"{directory}/step-{step:08d}.json"


def damage(path, change):
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(change(content))


def flip_a_bit(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


@pytest.fixture
def warned(monkeypatch):
    """The warnings that were logged, as text."""
    messages = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *args: messages.append(message % args))
    return messages


def test_round_trip(tmp_path, warned):
    arrays = {
        "step": np.array(2**40 + 1, np.int64),
        "weights/layer.0/kernel": np.random.default_rng(0).normal(size=(3, 3, 2, 4)).astype(np.float32),
        "bytes": np.arange(256, dtype=np.uint8),
        "half": np.array([1.5, np.nan, np.inf], np.float16),
        "flag": np.array([True, False]),
        "empty": np.zeros((0, 3), np.int32),
        "best/a b": np.array(-0.0, np.float64),
    }
    info = {"rows": [{"step": 1, "loss": 0.1 + 0.2}], "best": None, "text": 'é "quoted"'}
    storage.write(tmp_path, 600, arrays, info)
    assert sorted(os.listdir(tmp_path)) == ["step-00000600.json", "step-00000600.npz"]
    for snapshot in (storage.read_newest(tmp_path), storage.read(tmp_path, 600)):
        assert snapshot.step == 600 and snapshot.info == info
        assert snapshot.arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            read = snapshot.arrays[name]
            assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), name
    assert warned == []


def test_marker_holds_the_sha256_of_the_file_as_it_is_stored(tmp_path):
    storage.write(tmp_path, 7, arrays_of(7), {"at": 7})
    with open(marker_path(tmp_path, 7)) as file:
        marker = json.load(file)
    with open(data_path(tmp_path, 7), "rb") as file:
        content = file.read()
    assert marker == {"sha256": hashlib.sha256(content).hexdigest(), "info": {"at": 7}}
    # Any program that reads npz files can read it.
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        np.testing.assert_array_equal(stored["weights/kernel"], np.full((2, 3), 7))


@pytest.mark.parametrize("compressed", [False, True])
def test_write_arrays(tmp_path, compressed):
    path = str(tmp_path / "examples.npz")
    digest = storage.write_arrays(path, {"zeros": np.zeros(10000, np.float32)}, compressed=compressed)
    with open(path, "rb") as file:
        assert digest == hashlib.sha256(file.read()).hexdigest()
    assert (os.path.getsize(path) < 1000) == compressed
    with np.load(path) as stored:
        np.testing.assert_array_equal(stored["zeros"], np.zeros(10000))


def test_nothing_there(tmp_path, warned):
    for directory in (tmp_path, tmp_path / "missing"):
        assert storage.steps(directory) == []
        assert storage.read_newest(directory) is None
    with pytest.raises(ValueError, match="step-00000005.npz"):
        storage.read(tmp_path, 5)
    assert warned == []


@pytest.mark.parametrize("keep, kept", [(1, [50]), (2, [40, 50]), (3, [30, 40, 50])])
def test_keeps_the_newest(tmp_path, keep, kept):
    for step in (10, 20, 30, 40, 50):
        storage.write(tmp_path, step, arrays_of(step), {}, keep=keep)
        assert storage.steps(tmp_path)[-1] == step
    assert storage.steps(tmp_path) == kept
    expected = [path(tmp_path, step) for step in kept for path in (data_path, marker_path)]
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(path) for path in expected)


def test_two_are_kept_by_default(tmp_path):
    for step in (1, 2, 3):
        storage.write(tmp_path, step, arrays_of(step), {})
    assert storage.steps(tmp_path) == [2, 3]


def test_order_is_by_number(tmp_path):
    for step in (9, 10, 99999999):
        storage.write(tmp_path, step, arrays_of(step), {}, keep=3)
    assert storage.steps(tmp_path) == [9, 10, 99999999]
    assert storage.read_newest(tmp_path).step == 99999999


def test_an_earlier_step_removes_later_ones(tmp_path):
    write_three(tmp_path)
    storage.write(tmp_path, 2, {"weights/kernel": np.zeros(1)}, {"at": "again"}, keep=5)
    assert storage.steps(tmp_path) == [1, 2]
    assert sorted(os.listdir(tmp_path)) == [f"step-0000000{step}.{kind}" for step in (1, 2) for kind in ("json", "npz")]
    newest = storage.read_newest(tmp_path)
    assert newest.info == {"at": "again"} and newest.arrays.keys() == {"weights/kernel"}


def test_rewriting_a_step_withdraws_its_marker_first(tmp_path, monkeypatch, warned):
    write_three(tmp_path)

    def interrupted(path, arrays):
        assert not os.path.exists(marker_path(tmp_path, 3))
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "write_arrays", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write(tmp_path, 3, arrays_of(3), {})
    assert storage.read_newest(tmp_path).step == 2


def test_an_interrupted_write_leaves_the_older_ones(tmp_path, monkeypatch):
    write_three(tmp_path)

    class Interrupted(storage._HashingStream):
        def write(self, data):
            super().write(data)
            raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_HashingStream", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write(tmp_path, 4, arrays_of(4), {}, keep=1)
    assert os.path.exists(data_path(tmp_path, 4))
    assert storage.steps(tmp_path) == [1, 2, 3]
    assert storage.read_newest(tmp_path).info == {"at": 3}


def assert_passed_over(directory, warned):
    """The newest is damaged, the one before is not."""
    with pytest.raises(ValueError, match=r"Expected an intact snapshot at .*step-00000003\.npz. Received: "):
        storage.read(directory, 3)
    assert warned == []
    newest = storage.read_newest(directory)
    assert (newest.step, newest.info) == (2, {"at": 2})
    np.testing.assert_array_equal(newest.arrays["weights/kernel"], arrays_of(2)["weights/kernel"])
    assert len(warned) == 1 and data_path(directory, 3) in warned[0]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: flip_a_bit(content, content.index(np.float32(3).tobytes())),
        lambda content: flip_a_bit(content, len(content) - 5),
    ],
    ids=["empty", "half", "one byte short", "one byte more", "bit of a value", "bit of the directory"],
)
def test_damaged_data_is_passed_over(tmp_path, warned, change):
    write_three(tmp_path)
    damage(data_path(tmp_path, 3), change)
    assert_passed_over(tmp_path, warned)


def test_missing_data_is_passed_over(tmp_path, warned):
    write_three(tmp_path)
    os.remove(data_path(tmp_path, 3))
    assert_passed_over(tmp_path, warned)


@pytest.mark.parametrize(
    "marker",
    [
        b"",
        b"garbage",
        b'{"step": 3',
        b"{}",
        b'{"step": 3, "info": {}}',
        b"\xff\xfe\x00",
        b"null",
        b"[]",
        b"17",
        b'{"sha256": [], "info": {}}',
    ],
)
def test_garbage_marker_is_passed_over(tmp_path, warned, marker):
    write_three(tmp_path)
    damage(marker_path(tmp_path, 3), lambda _: marker)
    assert_passed_over(tmp_path, warned)


def test_marker_without_info_is_passed_over(tmp_path, warned):
    write_three(tmp_path)
    with open(marker_path(tmp_path, 3)) as file:
        marker = json.load(file)
    del marker["info"]
    damage(marker_path(tmp_path, 3), lambda _: json.dumps(marker).encode())
    assert_passed_over(tmp_path, warned)


def test_another_snapshots_marker_does_not_do(tmp_path, warned):
    write_three(tmp_path)
    with open(marker_path(tmp_path, 2), "rb") as file:
        other = file.read()
    damage(marker_path(tmp_path, 3), lambda _: other)
    assert_passed_over(tmp_path, warned)


def test_without_a_marker_there_is_no_snapshot(tmp_path, warned):
    write_three(tmp_path)
    os.remove(marker_path(tmp_path, 3))
    assert storage.steps(tmp_path) == [1, 2]
    assert storage.read_newest(tmp_path).step == 2
    assert warned == []


def test_several_damaged_ones_are_passed_over_and_named(tmp_path, warned):
    write_three(tmp_path)
    for step in (2, 3):
        damage(data_path(tmp_path, step), lambda content: content[:100])
    assert storage.read_newest(tmp_path).step == 1
    assert [path in message for path, message in zip((data_path(tmp_path, 3), data_path(tmp_path, 2)), warned)] == [
        True,
        True,
    ]
    damage(data_path(tmp_path, 1), lambda content: content[:100])
    assert storage.read_newest(tmp_path) is None


def test_what_interrupted_writes_left_behind_goes_with_the_next(tmp_path):
    write_three(tmp_path)
    for step in (1, 7, 12):
        (tmp_path / f"step-{step:08d}.npz").write_bytes(b"half")
        (tmp_path / f"step-{step:08d}.json").unlink(missing_ok=True)
    storage.write(tmp_path, 4, {"a": np.zeros(1)}, {}, keep=3)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == [f"step-{k:08d}.npz" for k in (2, 3, 4)]


def test_a_file_system_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    write_three(tmp_path)

    def unavailable(*args):
        raise tf.errors.UnavailableError(None, None, "try again")

    with monkeypatch.context() as patched, pytest.raises(tf.errors.UnavailableError):
        patched.setattr(storage, "sha256", unavailable)
        storage.read_newest(tmp_path)
    with monkeypatch.context() as patched, pytest.raises(tf.errors.UnavailableError):
        patched.setattr(storage.gfile, "listdir", unavailable)
        storage.steps(tmp_path)
    assert storage.read_newest(tmp_path).step == 3


def test_other_files_are_left_alone(tmp_path):
    others = ["step-1.json", "step-00000001.json.bak", "notes.txt", "xstep-00000009.json"]
    for name in others:
        (tmp_path / name).write_text("{}")
    write_three(tmp_path, keep=1)
    assert storage.steps(tmp_path) == [3]
    assert set(others) < set(os.listdir(tmp_path))


class Unpickled:
    """Leaves a trace where it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_refused_even_with_a_right_marker(tmp_path, warned):
    write_three(tmp_path)
    with open(data_path(tmp_path, 3), "wb") as file:
        np.savez(file, **{"weights/kernel": np.array([Unpickled()], object)})
    with open(data_path(tmp_path, 3), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    damage(marker_path(tmp_path, 3), lambda _: json.dumps({"step": 3, "sha256": digest, "info": {}}).encode())
    assert_passed_over(tmp_path, warned)
    assert "weights/kernel.npy holds objects" in warned[0]


def test_nothing_is_pickled_when_writing(tmp_path):
    with pytest.raises(ValueError):
        storage.write(tmp_path, 1, {"weights/kernel": np.array([{}], object)}, {})


def test_in_memory_file_system(warned):
    directory = "ram://snapshots_test/run/checkpoints"
    write_three(directory, keep=2)
    assert storage.steps(directory) == [2, 3]
    newest = storage.read_newest(directory)
    assert (newest.step, newest.info) == (3, {"at": 3})
    np.testing.assert_array_equal(newest.arrays["weights/kernel"], arrays_of(3)["weights/kernel"])
    assert newest.arrays["step"].shape == () and newest.arrays["step"].dtype == np.int64
    with tf.io.gfile.GFile(data_path(directory, 3), "wb") as file:
        file.write(b"PK")
    assert_passed_over(directory, warned)
    storage.write(directory, 1, arrays_of(1), {"at": 1})
    assert sorted(tf.io.gfile.listdir(directory)) == ["step-00000001.json", "step-00000001.npz"]


@pytest.mark.parametrize("text", ["[]", "17", "null", '"a"', '[1, "%s"]' % ("x" * 100)])
def test_an_object_is_all_that_our_json_files_hold(tmp_path, text):
    path = tmp_path / "results.json"
    path.write_text(text)
    if text == "null":
        assert storage.read_object(path) is None
        return
    with pytest.raises(ValueError) as error:
        storage.read_object(path)
    assert str(error.value) == f"Expected a JSON object, {{...}}, in {path}. Received: {text[:40]}"
    storage.write_json(path, {"a": 1})
    assert storage.read_object(path) == {"a": 1} and storage.read_object(tmp_path / "none") is None
    assert not storage.is_committed(tmp_path / "results")
