"""The same run on any layout: engines, devices, processes, steps in an execution, and changes at restarts."""

import csv
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import time

import numpy as np
import pytest

from robust_keras import storage
from tests import warm_processes

NUM_STEPS = 20
HAS_JAX = importlib.util.find_spec("jax") is not None
needs_jax = pytest.mark.skipif(not HAS_JAX, reason="JAX, which needs Python 3.11, is not here")
# Of a run that is killed, with a step of it: the index in its call, or of its snapshot.
MOMENTS = {"before the first snapshot": 2, "between snapshots": 7, "in a snapshot, after a validation": 10}


def start(workdir, *, num_devices=1, strategy="one", worker=None, cluster=(), trains_alone=False, dies=None, **changes):
    """A process of a run, which also looks at its inputs and evaluates unless it `trains_alone`.

    Runs of one folder share what XLA compiles.
    """
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    environment["XDG_CACHE_HOME"] = str(pathlib.Path(workdir).parent / "cache")
    environment.pop("TF_CONFIG", None)
    if worker is not None:
        task = {"type": "worker", "index": worker}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": task})
    arguments = {"workdir": str(workdir), "num_devices": num_devices, "strategy": strategy, "changes": changes}
    arguments |= {"trains_alone": trains_alone, "dies": dies}
    return warm_processes.Popen(one_process, log=f"{workdir}.{worker or 0}.log", env=environment, **arguments)


def start_workers(workdir, **changes):
    """Starts two processes on this machine."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    cluster = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return [start(workdir, strategy="multi_worker", worker=k, cluster=cluster, **changes) for k in range(2)]


def finish(workdir, *processes):
    for process in processes:
        assert process.wait(timeout=400) == 0, pathlib.Path(f"{workdir}.0.log").read_text()[-3000:]


def result(workdir):
    """Losses and the last snapshot's arrays."""
    snapshot = storage.read(workdir / "checkpoints", NUM_STEPS)
    rows = snapshot.info["rows"]
    assert [row["step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    with open(workdir / "metrics.csv") as file:  # One process wrote it.
        assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(1, NUM_STEPS + 1))
    return [row["loss"] for row in rows], snapshot.arrays


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The undisturbed run on each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    layouts = {
        "one": {},
        "two devices": {"num_devices": 2, "strategy": "mirrored"},
        "four devices, three steps in an execution": {
            "num_devices": 4,
            "strategy": "mirrored",
            "steps_per_execution": 3,
        },
        "in two parts, three steps in an execution": {"accumulation_steps": 2, "steps_per_execution": 3},
        "jax": {"strategy": "jax"},
        "jax on four devices, three steps in an execution": {
            "num_devices": 4,
            "strategy": "jax",
            "steps_per_execution": 3,
        },
    }
    names = list(layouts) if HAS_JAX else [name for name in layouts if "jax" not in name]
    for pair in (names[:2], names[2:4], names[4:]):  # Two at a time.
        processes = [start(folder / name, **layouts[name]) for name in pair]
        for name, process in zip(pair, processes):
            finish(folder / name, process)
    finish(folder / "two processes", *start_workers(folder / "two processes"))
    return {name: folder / name for name in ["one", "two processes", *names[1:]]}


@pytest.mark.parametrize("layout", [*range(1, 5), *(pytest.param(k, marks=needs_jax) for k in (5, 6))])
def test_every_layout_is_the_same_run(runs, layout):
    one, ours = runs["one"], list(runs.values())[layout]
    assert pathlib.Path(f"{ours}.digest").read_text() == pathlib.Path(f"{one}.digest").read_text()
    # Another compiler's logarithm in it is rounded otherwise.
    rtol = 1e-5 if "jax" in ours.name else 0
    np.testing.assert_allclose(np.load(f"{ours}.normal.npy"), np.load(f"{one}.normal.npy"), rtol=rtol)
    (losses, arrays), (our_losses, our_arrays) = result(one), result(ours)
    np.testing.assert_allclose(our_losses, losses, rtol=1e-5)
    assert our_arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(our_arrays[name], array, atol=2e-4, err_msg=name)


def test_validations_do_not_depend_on_the_layout(runs):
    def validations(workdir):
        rows = storage.read(workdir / "checkpoints", NUM_STEPS).info["rows"]
        return [[row[name] for name in row if name.startswith("val_")] for row in rows]

    expected = validations(runs["one"])
    assert [len(columns) for columns in expected if columns] == [4, 4]
    for workdir in runs.values():
        assert validations(workdir) == expected


def test_evaluations_find_the_same_on_any_layout(runs):
    expected = np.load(f"{runs['one']}.verdicts.npy")
    assert len(set(expected)) == 3  # Wrong, broken and robust ones.
    for workdir in runs.values():
        np.testing.assert_array_equal(np.load(f"{workdir}.verdicts.npy"), expected)


def test_a_run_that_changes_layout_and_engine_at_restarts_keeps_to_the_curve(runs):
    moved = runs["one"]
    elsewhere = {"strategy": "jax" if HAS_JAX else "mirrored", "num_devices": 4}
    for stop, layout in ((5, {"strategy": "mirrored", "num_devices": 2}), (10, elsewhere), (15, {"strategy": "one"})):
        snapshot = storage.read(moved / "checkpoints", stop)
        moved = runs["one"].with_name(f"from {stop}")
        storage.write(moved / "checkpoints", stop, snapshot.arrays, snapshot.info)
        finish(moved, start(moved, trains_alone=True, **layout))
        assert pathlib.Path(f"{moved}.0.log").read_text().count(f"Resuming from step {stop}\n") == 1
    np.testing.assert_allclose(result(moved)[0], result(runs["one"])[0], rtol=1e-5)


@needs_jax
def test_kills_cost_no_more_than_restarts(runs):
    workdir = runs["jax"].with_name("killed on jax")
    for moment in MOMENTS:
        process = start(workdir, strategy="jax", trains_alone=True, dies=moment)
        assert process.wait(timeout=400) == -signal.SIGKILL, pathlib.Path(f"{workdir}.0.log").read_text()[-3000:]
    finish(workdir, start(workdir, strategy="jax", trains_alone=True))
    log = pathlib.Path(f"{workdir}.0.log").read_text()
    assert re.findall(r"^Resuming from step (.*)$", log, re.MULTILINE) == ["5", "5"]
    ours, theirs = result(workdir), result(runs["jax"])
    assert ours[0] == theirs[0]
    assert_same_arrays(ours[1], theirs[1])


def test_a_killed_worker_costs_no_more_than_a_restart(runs):
    workdir = runs["two processes"].with_name("killed of two processes")
    processes = start_workers(workdir, trains_alone=True)
    deadline = time.monotonic() + 300
    while storage.steps(workdir / "checkpoints")[:1] != [5]:
        assert time.monotonic() < deadline and processes[1].poll() is None
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGKILL)
    assert processes[0].wait(timeout=120) != 0
    finish(workdir, *start_workers(workdir, trains_alone=True))
    assert "Resuming from step" in pathlib.Path(f"{workdir}.0.log").read_text()
    ours, theirs = result(workdir), result(runs["two processes"])
    assert ours[0] == theirs[0]
    assert_same_arrays(ours[1], theirs[1])


def assert_same_arrays(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


def one_process(*, workdir, num_devices, strategy, changes, trains_alone, dies):
    """What it does."""
    import tensorflow as tf

    devices = [tf.config.LogicalDeviceConfiguration()] * (1 if strategy == "jax" else num_devices)
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)

    from robust_keras.data import training_batches
    from robust_keras.engines import strategies
    from tests.training import train_test as training_test

    batches = functools.partial(training_batches.batches, batch_size=16, group_size=4)
    with strategies.strategy(strategy).scope():
        if not trains_alone:  # Before the run, which stays as it is.
            look_at_inputs(workdir, batches)
    if dies:
        die(dies)
    cadences = {"validate_every": 10, "checkpoint_every": 5, "num_checkpoints": 4, "validation_batch_size": 8}
    trained = training_test.tiny_run(
        workdir, train_steps=NUM_STEPS, batches=batches, strategy=strategy, **cadences, **changes
    )
    with strategies.strategy(strategy).scope():
        if not trains_alone:
            evaluate(workdir, trained)


def die(moment):
    """Has this process end without a word at a moment of its run."""
    from robust_keras.training import recorder

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    taken, write_arrays = recorder.RunRecorder.on_train_batch_end, storage.write_arrays

    def end_of_step(self, batch, logs):
        taken(self, batch, logs)
        if batch == MOMENTS[moment]:
            if moment == "between snapshots":
                self._snapshots.finish()
            kill()

    def write_and_die(path, arrays, **options):
        digest = write_arrays(path, arrays, **options)
        if f"{MOMENTS[moment]:08}" in path and "checkpoints" in path:
            kill()
        return digest

    if moment == "in a snapshot, after a validation":
        storage.write_arrays = write_and_die
    else:
        recorder.RunRecorder.on_train_batch_end = end_of_step


def look_at_inputs(workdir, batches):
    """Leaves the digest of what the replicas are given, and their normal numbers."""
    from robust_keras import noise
    from robust_keras.engines import replicas
    from tests.training import train_test as training_test

    def inputs(image, label, seeds):
        attack_seeds = noise.fold_in(seeds, noise.ATTACK)
        return image, label, seeds, noise.uniform(attack_seeds, (8, 8, 3)), noise.normal(attack_seeds, (8, 8, 3))

    seen, normal, look = hashlib.sha256(), [], replicas.over_replicas(inputs)
    hosts = {"num_hosts": replicas.num_processes(), "host": replicas.process_index()}
    share = batches(training_test.tiny_data(), seed=0, num_steps=NUM_STEPS, **hosts)
    whole = batches(training_test.tiny_data(), seed=0, num_steps=NUM_STEPS)
    for mine, batch in zip(share, whole):
        size = len(mine["seeds"])
        first = replicas.process_index() * size
        np.testing.assert_array_equal(mine["seeds"], batch["seeds"][first : first + size])
        *exact, last = look(batch["image"], batch["label"], batch["seeds"])
        normal.append(last.numpy())
        for values in exact:
            seen.update(values.numpy().tobytes())
    if replicas.process_index() == 0:
        np.save(f"{workdir}.normal.npy", normal)
        pathlib.Path(f"{workdir}.digest").write_text(seen.hexdigest())


def evaluate(workdir, trained):
    """Leaves the verdicts of an evaluation."""
    from robust_keras import threats
    from robust_keras.attacks.apgd import apgd
    from robust_keras.engines import replicas
    from robust_keras.evaluation import evaluate
    from tests.training import train_test as training_test

    source = training_test.tiny_data().labelled
    labels = np.where(np.arange(len(source.labels)) < 8, (source.labels + 1) % 4, source.labels)
    threat = threats.threat(norm="L2", epsilon="160/255")
    found = evaluate.evaluate(
        lambda x: trained.network(x, training=False),
        source._replace(labels=labels),
        attacks=[functools.partial(apgd, threat=threat, num_steps=20)],
        threat=threat,
        batch_size=8,
        save_directory=f"{workdir}.evaluation",
        save_every=0.0,
        allow_chance=True,
        diagnose=False,  # `evaluate_test` has it on two replicas.
        progress=False,
    )
    if replicas.process_index() == 0:
        np.save(f"{workdir}.verdicts.npy", found.examples["broken_by"])
