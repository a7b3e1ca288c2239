import functools
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import tensorflow as tf

from robust_keras import ownership
from tests import warm_processes

IDENTITY = {"model": {"sha256": "ab", "range": [0, 1]}, "seed": 3, "rate": 0.1, "radius": "8/255"}


def claim(folder, identity=IDENTITY, **options):
    ownership.claim(f"{folder}/identity.json", identity, what="this run", **options)


def refused(folder, identity, **options):
    """The one line that refuses a folder."""
    before = (folder / "identity.json").read_bytes()
    with pytest.raises(ValueError) as error:
        claim(folder, identity, **options)
    assert (folder / "identity.json").read_bytes() == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_is_of_what_claimed_it_first(tmp_path):
    claim(tmp_path / "new")
    assert json.loads((tmp_path / "new" / "identity.json").read_text()) == IDENTITY
    claim(tmp_path / "new")
    claim(f"{tmp_path}/new/")
    (tmp_path / "new").rename(tmp_path / "moved")
    claim(tmp_path / "moved")
    other = {**IDENTITY, "model": {"sha256": "cd", "range": [0, 1]}, "seed": 4, "extra": True}
    line = refused(tmp_path / "moved", other)
    assert line.startswith(f"Expected a folder of this run, or a new one. Received: {tmp_path}/moved of another, with ")
    assert line.endswith("extra = (nothing), not True; model.sha256 = ab, not cd; seed = 3, not 4")


def test_a_refusal_names_a_few_of_many_differences(tmp_path):
    path = tmp_path / "subject.json"
    ownership.claim(path, dict.fromkeys("abcdef", 1), what="this run", writes=True)
    with pytest.raises(ValueError, match=r"with a = 1, not 2; b = 1, not 2; c = 1, not 2; and 3 more$"):
        ownership.claim(path, dict.fromkeys("abcdef", 2), what="this run", writes=True)


def test_values_are_compared_not_how_they_are_written(tmp_path):
    claim(tmp_path)
    claim(tmp_path, {**dict(reversed(IDENTITY.items())), "model": {"range": (0.0, 1.0), "sha256": "ab"}, "rate": 1e-1})
    assert "rate = 0.1, not 0.2" in refused(tmp_path, {**IDENTITY, "rate": 0.2})


def test_defaults_are_filled_in_on_both_sides(tmp_path):
    def complete(identity):
        return {"option": 5, "gone": None, **identity}

    compare = functools.partial(ownership.differences, complete=complete)
    claim(tmp_path)  # By a release without the option.
    assert "option = (nothing), not 5" in refused(tmp_path, {**IDENTITY, "option": 5})
    assert "option = 5, not 6" in refused(tmp_path, {**IDENTITY, "option": 6}, compare=compare)
    claim(tmp_path, {**IDENTITY, "option": 5}, compare=compare)
    claim(tmp_path, IDENTITY, compare=compare)  # By the release before again.
    claim(tmp_path, {**IDENTITY, "gone": None})


def test_what_a_kill_left_of_the_file_is_no_claim(tmp_path):
    claim(tmp_path)
    text = (tmp_path / "identity.json").read_text()
    for size in (0, 20, len(text) - 1):
        (tmp_path / "identity.json").write_text(text[:size])
        claim(tmp_path)
        assert (tmp_path / "identity.json").read_text() == text


@pytest.mark.parametrize("text", ["no json", "[1, 2]", "[]", "17", "null", '"a"', '{"seed": 4, "ra', "\udce9"])
def test_a_malformed_file_is_named(tmp_path, text):
    (tmp_path / "identity.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    line = refused(tmp_path, IDENTITY)
    assert f"{tmp_path}/identity.json" in line and "Error" not in line
    if text in ("[]", "17", "null"):
        assert line.endswith(f"Expected a JSON object, {{...}}, in {tmp_path}/identity.json. Received: {text}")


@pytest.mark.parametrize("text", ["{}", '{"model": 3}', '{"model": {}}'])
def test_an_identity_of_another_kind_is_named(tmp_path, text):
    (tmp_path / "identity.json").write_text(text)

    def parse(text):
        return {"sha256": json.loads(text)["model"]["sha256"]}

    line = refused(tmp_path, IDENTITY, parse=parse)
    assert f"{tmp_path}/identity.json" in line and "Error" not in line and "'" not in line


def test_a_folder_without_anything_to_lose_may_change_hands(tmp_path):
    claim(tmp_path)
    claim(tmp_path, {"seed": 4}, is_begun=False)
    assert "seed = 4, not 3" in refused(tmp_path, {"seed": 3})


def test_of_several_processes_one_writes(tmp_path):
    claim(tmp_path / "run", writes=False)
    assert not (tmp_path / "run").exists()
    claim(tmp_path / "run")
    refused(tmp_path / "run", {}, writes=False)


def test_other_texts_than_json(tmp_path):
    def parse(text):
        return dict(line.split("=") for line in text.split())

    claim(tmp_path, {"a": "1"}, parse=parse, text="a=1\n")
    claim(tmp_path, {"a": "1"}, parse=parse, text="\na=1\n")
    assert (tmp_path / "identity.json").read_text() == "\na=1\n"
    assert "a = 1, not 2" in refused(tmp_path, {"a": "2"}, parse=parse, text="a=2\n")


def assert_refused(folder, **options):
    with pytest.raises(ownership.FolderInUse) as error, ownership.lock(folder, what="another run", **options):
        pass
    assert str(error.value).startswith("Expected a folder in which no other command is at work. Received: ")
    assert "\n" not in str(error.value)
    return str(error.value)


def hold(path):
    with ownership.lock(path, what="a training run"):
        print("held", flush=True)
        time.sleep(600)


def test_another_process_is_kept_out_until_the_first_one_is_killed(tmp_path):
    log = tmp_path / "log.txt"
    process = warm_processes.Popen(hold, log=log, path=str(tmp_path / "run"))
    try:
        warm_processes.wait_for("held\n", process, log)
        line = assert_refused(tmp_path / "run")
        assert f"{tmp_path}/run, in use by process {process.pid} on " in line and "since 20" in line
        assert line.endswith(", a training run")
    finally:
        process.kill()
        process.wait()
    with ownership.lock(tmp_path / "run", what="another run"):
        holder = json.loads((tmp_path / "run" / ownership.lock_name()).read_text())
        assert holder["pid"] == os.getpid()
    assert not (tmp_path / "run" / ownership.lock_name()).exists()


@pytest.mark.parametrize("scheme", ["", "ram://"])
def test_another_call_in_the_same_process_is_kept_out(tmp_path, scheme):
    folder = f"{scheme}{tmp_path}/run"
    said = []

    def other():
        said.append(assert_refused(folder))

    with ownership.lock(folder, what="a training run"):
        threads = [threading.Thread(target=other) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(said) == 2 and f"process {os.getpid()} on " in said[0]
        assert_refused(folder + "/")
        # What a command calls belongs to it.
        with ownership.lock(folder, what="a training run"):
            assert_refused(folder)
        assert_refused(folder)
    with ownership.lock(folder, what="another run"):
        pass


def test_a_folder_by_another_name_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    with ownership.lock("run/", what="a training run"):
        for name in ("run", tmp_path / "run", "./run/../run", "link"):
            assert_refused(name)


def test_a_lock_leaves_nothing(tmp_path):
    with ownership.lock(tmp_path / "a" / "run", what="a run"):
        pass
    assert not (tmp_path / "a" / "run").exists()
    with pytest.raises(KeyError), ownership.lock(tmp_path / "run", what="a run"):
        (tmp_path / "run" / "file").write_text("")
        raise KeyError
    assert os.listdir(tmp_path / "run") == ["file"]


def test_what_a_killed_process_left_is_no_lock(tmp_path):
    for text in ("", "{", json.dumps({"pid": 1})):
        (tmp_path / ownership.lock_name()).write_text(text)
        with ownership.lock(tmp_path, what="a run"):
            pass


def test_parts_of_a_shared_folder(tmp_path):
    with ownership.lock(tmp_path, what="a worker", part="worker-0"):
        assert_refused(tmp_path, part="worker-0")
        with ownership.lock(tmp_path, what="a worker", part="worker-1"):
            assert sorted(os.listdir(tmp_path)) == ["in_use-worker-0.json", "in_use-worker-1.json"]


def test_other_processes_of_a_run_do_not_take_it(tmp_path):
    with ownership.lock(tmp_path, what="a run"), ownership.lock(tmp_path, what="other", writes=False):
        pass
    with ownership.lock(tmp_path, what="a run", writes=False), ownership.lock(tmp_path, what="other"):
        pass


@pytest.mark.skipif(ownership.fcntl is None, reason="Windows removes no open file")
def test_a_lock_on_a_file_that_its_holder_removed_meanwhile_counts_for_nothing(tmp_path, monkeypatch):
    path = tmp_path / ownership.lock_name()
    path.write_text("")
    taken = []

    def flock(file, operation, whole=ownership.fcntl.flock):
        if not taken:
            path.unlink()  # Between the opening and the lock.
        taken.append(whole(file, operation))

    monkeypatch.setattr(ownership.fcntl, "flock", flock)
    with ownership.lock(tmp_path, what="a run"):
        assert len(taken) == 2 and path.exists()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system that has none, and signs of life every 20 ms."""
    monkeypatch.setattr(ownership, "_try_to_lock", lambda file: None)
    monkeypatch.setattr(ownership, "BEAT", 0.02)


def other_holder(**changes):
    fields = {"what": "a run", "pid": 7, "host": "elsewhere", "machine": "elsewhere/1", "since": "2026", "token": "t"}
    return json.dumps({**fields, **changes})


def test_without_locks_signs_of_life_keep_others_out(tmp_path, no_locks):
    path = tmp_path / ownership.lock_name()
    path.write_text(other_holder())
    ended = threading.Event()

    def live():
        count = 0
        while not ended.wait(0.02):
            count += 1
            path.write_text(other_holder() + " " * (count % 2))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        assert "process 7 on elsewhere since 2026, a run" in assert_refused(tmp_path, patience=5.0)
        assert_refused(tmp_path, patience=0)
    finally:
        ended.set()
        thread.join()


def test_without_locks_silence_says_that_a_process_was_killed(tmp_path, no_locks, capsys):
    path = tmp_path / ownership.lock_name()
    path.write_text(other_holder())
    assert_refused(tmp_path, patience=0)
    started = time.monotonic()
    with ownership.lock(tmp_path, what="a run", patience=0.3):
        assert time.monotonic() - started > 0.3
        first = beat = path.read_text()
        deadline = time.monotonic() + 5
        while beat in (first, "") and time.monotonic() < deadline:
            time.sleep(0.01)
            beat = path.read_text()
        assert beat != first and json.loads(beat)["pid"] == os.getpid()
    assert "may be in use" in capsys.readouterr().out
    assert not path.exists()


def test_without_locks_a_process_of_this_machine_is_asked_for(tmp_path, no_locks, capsys):
    machine = ownership._myself("").machine
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for pid in (ended.pid, os.getpid()):  # This process holds what it knows of, and nothing else.
        (tmp_path / ownership.lock_name()).write_text(other_holder(machine=machine, pid=pid))
        with ownership.lock(tmp_path, what="a run", patience=60):
            pass
    assert capsys.readouterr().out == ""
    (tmp_path / ownership.lock_name()).write_text(other_holder(machine=machine, pid=os.getppid()))
    assert_refused(tmp_path, patience=0)


def test_without_locks_of_two_that_come_at_once_one_wins(tmp_path, no_locks, monkeypatch):
    monkeypatch.setattr(ownership, "BEAT", 1.0)

    def later(seconds, whole=time.sleep):
        (tmp_path / ownership.lock_name()).write_text(other_holder())
        whole(0)

    monkeypatch.setattr(ownership.time, "sleep", later)
    assert_refused(tmp_path)
    assert json.loads((tmp_path / ownership.lock_name()).read_text())["pid"] == 7


def test_a_folder_of_memory_is_held_by_this_process(tmp_path):
    folder = f"ram://{tmp_path}/run"
    ownership.claim(f"{folder}/identity.json", IDENTITY, what="this run")
    with ownership.lock(folder, what="a run"):
        assert tf.io.gfile.listdir(folder) == ["identity.json"]
        ownership.claim(f"{folder}/identity.json", IDENTITY, what="this run")
