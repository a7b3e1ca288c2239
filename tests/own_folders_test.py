"""Folders of runs that somebody else made: what they link to is neither written to nor emptied."""

import functools
import os

import numpy as np
import pytest

from robust_keras import failures, own_folders, ownership, storage
from robust_keras.evaluation import folder as evaluations
from robust_keras.evaluation import saved_state
from robust_keras.pseudo_labelling import chunks, record_sets
from robust_keras.training import checkpoints, metrics_log

ARRAYS = {"a": np.arange(3)}


def failing(workdir):
    with failures.running(workdir):
        failures.work_begins()
        raise RuntimeError("in the middle of a run")


def rows(workdir, *, more=False):
    log = metrics_log.MetricsLog(workdir, lambda step: 0.1, 8)
    if not more:
        log.begin([])
    with log.events():
        log.add(1, {"loss": 1.0}, {}, 0.0)


def finish(workdir):
    of = evaluations.Folder(workdir)
    evaluations.finish(of, {"num_examples": 1}, ARRAYS)


def state(workdir):
    verdicts = saved_state.Verdicts(1, 2, evaluations.Folder(workdir).state)
    verdicts.save({})


def snapshot(workdir, *, best=False):
    snapshots = checkpoints.Snapshots(workdir, {}, 2)
    if best:
        snapshots.write_best({"step": 3, "metrics": {}}, ARRAYS)
    else:
        snapshots._write(3, ARRAYS, {"best": None}, {})


def records(workdir):
    chosen = record_sets.Chosen(*(np.zeros(1, kind) for kind in (np.int64, np.uint32, np.int64, np.float32)))
    path = os.path.join(workdir, "part-00000-of-00001.tfrecord")
    record_sets._write_records(path, np.zeros((1, 2, 2, 3), np.uint8), chosen)


def locked(workdir, part=""):
    with ownership.lock(workdir, what="another thing", part=part):
        pass


# What is a link in the folder, and what a command does that writes it, or removes it.
WRITES = {
    "config.gin": lambda of: ownership.claim(f"{of}/config.gin", {"a": 1}, what="this run", is_begun=False),
    "results.json": finish,
    "examples.npz": finish,
    "state": state,
    "state/step-00000001.npz": state,
    "state/step-00000001.json": state,
    "state/adversarial-000000.npz": lambda of: storage.write_arrays(f"{of}/state/adversarial-000000.npz", ARRAYS),
    "checkpoints": snapshot,
    "checkpoints/step-00000003.npz": snapshot,
    "checkpoints/step-00000003.json": snapshot,
    "best": functools.partial(snapshot, best=True),
    "best/step-00000003.json": functools.partial(snapshot, best=True),
    "metrics.csv": rows,
    "metrics.csv, appended": functools.partial(rows, more=True),
    "events": functools.partial(rows, more=True),
    "error.txt": failing,
    "report.md": lambda of: storage.write_text(f"{of}/report.md", "report"),
    "in_use.json": locked,
    "in_use-worker-0.json": functools.partial(locked, part="worker-0"),
    "scores/identity.json": lambda of: ownership.claim(f"{of}/scores/identity.json", {}, what="x", is_begun=False),
    "scores/chunk-00000000.npz": lambda of: chunks.write(f"{of}/scores", 0, ARRAYS, images_sha256=""),
    "part-00000-of-00001.tfrecord": records,
    "inner": lambda of: locked(f"{of}/inner"),
}


def kept(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", WRITES)
def test_a_link_in_a_folder_of_a_run_is_not_followed_by_what_writes(tmp_path, name):
    workdir, outside = tmp_path / "workdir", tmp_path / "outside"
    outside.mkdir()
    for each in ("private", "step-00000003.json", "step-00000003.npz", "step-00000009.json"):
        (outside / each).write_text("private")
    linked = workdir / name.partition(",")[0]
    linked.parent.mkdir(parents=True)
    linked.symlink_to(outside if "." not in linked.name else outside / "private")
    before = kept(outside)
    act = WRITES[name]
    with pytest.raises((ValueError, RuntimeError), match="a symbolic link|in the middle of a run"):
        if linked.name.startswith("in_use"):
            act(str(workdir))
        else:
            with ownership.lock(workdir, what="a run"):
                act(str(workdir))
    assert kept(outside) == before
    assert linked.is_symlink()


@pytest.mark.parametrize("name", ["config.gin", "in_use.json", "metrics.csv"])
def test_a_pipe_in_a_folder_of_a_run_stops_nobody(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"Received: .*{name}, a pipe"):
        WRITES[name](str(tmp_path))


def test_removal_stays_in_the_folder(tmp_path):
    workdir, outside = tmp_path / "workdir", tmp_path / "outside"
    outside.mkdir()
    (outside / "private").write_text("private")
    state = workdir / "state"
    state.mkdir(parents=True)
    (state / "more").symlink_to(outside)
    evaluations.finish(evaluations.Folder(str(workdir)), {}, ARRAYS)
    assert not state.exists() and kept(outside) == {"private": b"private"}
    state.symlink_to(outside)
    with pytest.raises(ValueError, match="state, a symbolic link"):
        evaluations.finish(evaluations.Folder(str(workdir)), {}, ARRAYS)
    assert kept(outside) == {"private": b"private"}


@pytest.mark.parametrize("name", ["checkpoints", "best"])
def test_a_link_shows_before_a_run_begins(tmp_path, name):
    (tmp_path / name).symlink_to(tmp_path)
    with ownership.lock(tmp_path, what="a run"), pytest.raises(ValueError, match=f"{name}, a symbolic link"):
        checkpoints.Snapshots(tmp_path, {}, 2).newest()


def test_the_folder_that_is_typed_may_be_a_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "typed").symlink_to(tmp_path / "there")
    workdir = str(tmp_path / "typed")
    with ownership.lock(workdir, what="a run"):
        rows(workdir)
        storage.write(os.path.join(workdir, "checkpoints"), 1, ARRAYS, {})
    storage.write(workdir, 1, ARRAYS, {})  # As a call with a folder of its own does, which nothing has locked.
    assert storage.read_newest(workdir).step == 1
    with pytest.raises(RuntimeError):
        failing(workdir)
    names = {path.name for path in (tmp_path / "there").iterdir()}
    assert names == {"checkpoints", "error.txt", "events", "metrics.csv", "step-00000001.json", "step-00000001.npz"}


@pytest.mark.parametrize("name", ["step-00000001.json", "step-00000001.npz"])
@pytest.mark.parametrize("kind", ["pipe", "device", "link"])
def test_a_snapshot_that_is_no_file_is_damaged_and_stops_nobody(tmp_path, name, kind):
    storage.write(tmp_path, 1, ARRAYS, {})
    (tmp_path / name).rename(tmp_path / "elsewhere")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero" if kind == "device" else tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"Received: .*{name}, a "):
        storage.read(tmp_path, 1)
    assert storage.read_newest(tmp_path) is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "nonsense", "\x00", "9" * 5000])
def test_json_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(ValueError, match="in .*some.json. Received: ") as error:
        storage.read_object(tmp_path / "some.json")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 400


@pytest.mark.parametrize("depth", [600, 100_000])
def test_an_identity_of_many_levels_is_one_line(tmp_path, depth):
    path = tmp_path / "identity.json"
    path.write_text('{"a":' * depth + "1" + "}" * depth)
    with pytest.raises(ValueError, match="Received: ") as error:
        ownership.claim(path, {"a": 1}, what="this run")
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "in_use.json").write_text(path.read_text())
    locked(tmp_path)  # Nobody holds it.


def test_text_of_a_file_stays_as_it_is(tmp_path):
    storage.write_text(tmp_path / "text", "a\r\nb\n\N{GREEK SMALL LETTER EPSILON}")
    assert storage.read_text(tmp_path / "text") == "a\r\nb\n\N{GREEK SMALL LETTER EPSILON}"
    assert storage.read_text(tmp_path / "text" / "inner") == ""


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_path_by_its_other_name_is_the_same_path(tmp_path, scheme):
    (tmp_path / "private").write_text("private")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").symlink_to(tmp_path / "private")
    for function in (own_folders.open_file, own_folders.remove, own_folders.check):
        with pytest.raises(ValueError, match="a symbolic link"):
            function(f"{scheme}{tmp_path}/run/file")
    own_folders.remove_folder(f"{scheme}{tmp_path}/run")
    assert not (tmp_path / "run").exists() and (tmp_path / "private").read_text() == "private"
