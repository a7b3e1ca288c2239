import os

import numpy as np
import pytest

from robust_keras import storage
from robust_keras.evaluation import saved_state

BYTES = np.array([100, 128, 129, 140, 250], np.uint8)


def make_images(values=BYTES):
    return np.broadcast_to(np.asarray(values)[:, None, None, None], (len(values), 2, 2, 3)).astype(np.uint8).copy()


def proposed(values):
    """Images of bytes, as floats."""
    return np.float32(np.broadcast_to(np.array(values)[:, None, None, None], (len(values), 2, 2, 3)) / 255)


def fill(found):
    """Two attacks: the first breaks 1 and 3, the second 3 (also in bytes) and 4."""
    images = [proposed([90 + k] * 5) for k in range(3)]
    found.add(np.array([1, 2]), images[0][:2], np.array([True, False]), np.array([False, True]))
    found.add(np.array([3]), images[1][:1], np.array([True]), np.array([True]))
    found.position = 1
    found.add(np.array([4, 3, 0]), images[2][:3], np.array([True, True, False]), np.array([False, True, False]))


def assert_filled(found):
    np.testing.assert_array_equal(found.broken, [[0, 1, 0, 1, 0], [0, 0, 0, 1, 1]])
    np.testing.assert_array_equal(found.broken_uint8, [[0, 0, 1, 1, 0], [0, 0, 0, 1, 0]])
    clean = make_images() / np.float32(255)
    for broken_by, values in (
        ([-1, 0, -1, 0, 1], [100, 90, 129, 91, 92]),
        ([-1, 0, -1, 1, 1], [100, 90, 129, 92, 92]),
        ([-1, -1, -1, -1, -1], BYTES),
    ):
        adversarial = found.adversarial(make_images(), np.array(broken_by))
        assert adversarial.dtype == np.float32
        np.testing.assert_array_equal(adversarial, proposed(values))
    np.testing.assert_array_equal(make_images() / np.float32(255), clean)


def test_the_image_of_the_attack_that_counts():
    found = saved_state.Verdicts(2, 5)
    fill(found)
    assert_filled(found)
    found.save({"nowhere": np.zeros(3)})  # Nothing to save to.
    assert saved_state.Verdicts(2, 5).restore() is None


def test_round_trip(tmp_path):
    directory = str(tmp_path / "state")
    found = saved_state.Verdicts(2, 5, directory)
    assert found.restore() is None
    found.seconds[0], found.attacked[:] = 1.25, [5, 4]
    found.notes["diagnosis"] = {"zero_gradients": 0.5}
    fill(found)
    work = {"steps": np.arange(4), "progress/000": np.float32([0.1, np.nan, np.inf]), "flag": np.array([True, False])}
    found.save(work)

    again = saved_state.Verdicts(2, 5, directory)
    restored = again.restore()
    assert restored.keys() == work.keys()
    for name, array in work.items():
        assert restored[name].dtype == array.dtype
        np.testing.assert_array_equal(restored[name], array)
    assert again.position == 1 and again.notes == found.notes
    np.testing.assert_array_equal(again.seconds, [1.25, 0.0])
    np.testing.assert_array_equal(again.attacked, [5, 4])
    assert again.attacked.dtype == np.int64 and again.broken.dtype == bool
    assert_filled(again)
    # It goes on: what restore returns can be filled and saved in turn.
    again.add(np.array([0]), proposed([97]), np.array([True]), np.array([False]))
    again.save({})
    third = saved_state.Verdicts(2, 5, directory)
    assert third.restore() == {}
    np.testing.assert_array_equal(third.broken[1], [1, 0, 0, 1, 1])
    adversarial = third.adversarial(make_images(), np.array([1, 0, -1, 0, 1]))
    np.testing.assert_array_equal(adversarial, proposed([97, 90, 129, 91, 92]))


def test_pieces_are_written_once(tmp_path):
    found = saved_state.Verdicts(2, 5, str(tmp_path))
    fill(found)
    found.save({})
    pieces = sorted(name for name in os.listdir(tmp_path) if name.startswith("adversarial"))
    assert len(pieces) == 3
    before = [os.stat(tmp_path / name).st_mtime_ns for name in pieces]
    found.add(np.array([0]), proposed([95]), np.array([True]), np.array([True]))
    found.add(np.array([2]), proposed([95]), np.array([False]), np.array([False]))  # Nothing to keep.
    found.save({})
    assert [os.stat(tmp_path / name).st_mtime_ns for name in pieces] == before
    assert len([name for name in os.listdir(tmp_path) if name.startswith("adversarial")]) == 4


@pytest.mark.parametrize("damage", ["truncated", "altered", "no marker", "half a marker"])
def test_a_damaged_save_falls_back_to_the_one_before_it(tmp_path, damage):
    directory = str(tmp_path)
    found = saved_state.Verdicts(2, 5, directory)
    fill(found)
    found.save({"steps": np.array(1)})
    found.add(np.array([0]), proposed([93]), np.array([True]), np.array([True]))
    found.save({"steps": np.array(2)})
    assert saved_state.Verdicts(2, 5, directory).restore()["steps"] == 2
    data, marker = (tmp_path / sorted(tmp_path.glob(f"step-*{end}"))[-1] for end in (".npz", ".json"))
    content = data.read_bytes()
    if damage == "truncated":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        data.write_bytes(content[:-30] + bytes([content[-30] ^ 1]) + content[-29:])
    elif damage == "no marker":
        marker.unlink()
    else:
        marker.write_text(marker.read_text()[:20])
    again = saved_state.Verdicts(2, 5, directory)
    assert again.restore()["steps"] == 1
    assert_filled(again)
    # The image that the lost save had is found again, another one at that.
    again.add(np.array([0]), proposed([94]), np.array([True]), np.array([True]))
    again.save({"steps": np.array(2)})
    third = saved_state.Verdicts(2, 5, directory)
    assert third.restore()["steps"] == 2
    np.testing.assert_array_equal(
        third.adversarial(make_images(), np.array([1, -1, -1, -1, -1])), proposed([94, 128, 129, 140, 250])
    )


def test_only_damaged_saves(tmp_path):
    found = saved_state.Verdicts(1, 5, str(tmp_path))
    found.save({})
    (data,) = tmp_path.glob("step-*.npz")
    data.write_bytes(b"")
    again = saved_state.Verdicts(1, 5, str(tmp_path))
    assert again.restore() is None
    assert not again.broken.any() and again.position == 0


@pytest.mark.parametrize("damage", ["missing", "truncated", "other names", "other examples", "text"])
def test_a_damaged_file_of_images_is_named(tmp_path, damage):
    found = saved_state.Verdicts(2, 5, str(tmp_path))
    fill(found)
    found.save({})
    path = tmp_path / "adversarial-000001.npz"
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "other names":
        np.savez(path, position=0)
    elif damage == "other examples":
        np.savez(path, position=0, indices=[5], images=proposed([1]))
    else:
        path.write_text("position")
    with pytest.raises(ValueError, match=f"images that were found so far in {path}. Received: [^\n]*$"):
        saved_state.Verdicts(2, 5, str(tmp_path)).restore()


@pytest.mark.parametrize("info", [{}, {"position": 0}, {"position": "x", "num_pieces": 0, "notes": {}}])
def test_a_snapshot_of_something_else_is_named(tmp_path, info):
    storage.write(str(tmp_path), 1, {"broken": np.zeros((2, 5))}, info)
    with pytest.raises(
        ValueError, match=f"state of an evaluation. Received: {tmp_path}/step-00000001.json, something else$"
    ):
        saved_state.Verdicts(2, 5, str(tmp_path)).restore()


def test_identities(tmp_path):
    identity = {"images": "a", "attacks": [["pgd", {"num_steps": (3, 4)}]]}
    saved_state.Verdicts(2, 5, str(tmp_path), identity).save({})
    for same in (identity, {}, {"images": "a", "model": "m"}, {"attacks": [["pgd", {}]]}):
        assert saved_state.Verdicts(2, 5, str(tmp_path), same).restore() == {}
    for other in ({"images": "b"}, {"attacks": []}, {"attacks": [["pgd", {"num_steps": [3, 5]}]]}):
        with pytest.raises(ValueError, match=f"that of other {next(iter(other))}$"):
            saved_state.Verdicts(2, 5, str(tmp_path), other).restore()
