"""What crosses between host and devices in a run, and what is compiled when."""

import json
import os
import pathlib

import pytest

from robust_keras import storage
from tests import warm_processes

NUM_STEPS, NUM_DEVICES = 12, 2
BATCH = 16 * (8 * 8 * 3 + 4 + 4 * 4 + 2 * 4 + 4)  # Bytes of images, labels, targets, seeds and flags.
DUE = [4, 6, 8, 12]  # Steps at which a row is due, or a snapshot.


def run(workdir, cache):
    """What a run in a process of its own counted."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(NUM_DEVICES), "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    log = pathlib.Path(f"{workdir}.log")
    process = warm_processes.Popen(counting_run, log=log, env=environment, workdir=str(workdir))
    assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    return json.loads(log.read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def first(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("first")
    return workdir, run(workdir, cache)


def test_a_step_takes_its_batch_to_the_devices_and_nothing_else(first):
    _, counted = first
    assert [step for step, _ in counted["steps"]] == list(range(1, NUM_STEPS + 1))
    # The first step comes with all variables, unless the validation that was tried out has brought them.
    assert dict(counted["steps"][1:]) == dict.fromkeys(range(2, NUM_STEPS + 1), BATCH)


def test_what_steps_find_comes_back_where_it_is_due(first):
    _, counted = first
    assert sorted(set(counted["read"])) == DUE
    assert sorted(set(counted["brought_back"])) == [6, NUM_STEPS]


def test_nothing_is_traced_or_compiled_after_the_first_step(first):
    _, counted = first
    assert set(counted["lowered"]) <= {0, 1}
    assert set(counted["compiled"]) <= {0, 1}
    assert counted["misses"] > 0


def test_a_second_start_compiles_nothing(first, cache, tmp_path):
    workdir, counted = first
    again = run(tmp_path / "again", cache)
    assert again["misses"] == 0
    assert again["hits"] == counted["misses"] + counted["hits"]
    snapshot = storage.read(workdir / "checkpoints", 6)
    storage.write(tmp_path / "resumed" / "checkpoints", 6, snapshot.arrays, snapshot.info)
    resumed = run(tmp_path / "resumed", cache)
    assert resumed["misses"] == 0
    assert [step for step, _ in resumed["steps"]] == list(range(7, NUM_STEPS + 1))


def counting_run(workdir):
    """A run that counts."""
    import functools

    import jax

    from robust_keras.data import training_batches
    from robust_keras.engines.on_jax import execution, programs, strategy, variables
    from tests.training import train_test as training_test

    found = {"steps": [], "read": [], "brought_back": [], "lowered": [], "compiled": [], "hits": 0, "misses": 0}
    now = {"step": 0, "bytes": 0}

    class Read(float):
        """A value on a device; who looks at it is noted."""

        def __new__(cls, value):
            made = super().__new__(cls, 0.0)
            made.value = value
            return made

        def __float__(self):
            found["read"].append(now["step"])
            return float(self.value)

    def put(self, array, *args, before=strategy.JaxStrategy.put):
        now["bytes"] += array.nbytes
        return before(self, array, *args)

    def take(self, state, batch, num_steps, before=execution.Steps.take):
        now["step"] += 1
        now["bytes"] = 0
        with jax.transfer_guard_host_to_device("disallow"):  # But for `put`.
            state, logs, sums = before(self, state, batch, num_steps)
        found["steps"].append((now["step"], now["bytes"]))
        return state, {name: Read(value) for name, value in logs.items()}, sums

    def noted(kind, before):
        def call(*args, **kwargs):
            found[kind].append(now["step"])
            return before(*args, **kwargs)

        return call

    def heard(event, *_, **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found["compiled"].append(now["step"])
        found["hits"] += event == "/jax/compilation_cache/cache_hits"
        found["misses"] += event == "/jax/compilation_cache/cache_misses"

    jax.monitoring.register_event_listener(heard)
    jax.monitoring.register_event_duration_secs_listener(heard)
    strategy.JaxStrategy.put, execution.Steps.take = put, take
    programs.lower = noted("lowered", programs.lower)
    variables.DeviceVariables.bring_back = noted("brought_back", variables.DeviceVariables.bring_back)
    steps = storage.steps(pathlib.Path(workdir) / "checkpoints")
    now["step"] = max(steps, default=0)
    training_test.tiny_run(
        workdir,
        strategy="jax",
        train_steps=NUM_STEPS,
        batches=functools.partial(training_batches.batches, batch_size=16, group_size=4),
        validation_batch_size=8,
        validate_every=NUM_STEPS,
        checkpoint_every=6,
        log_every=4,
    )
    print(json.dumps(found))
