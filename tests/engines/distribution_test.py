"""Strategies by name, and batches over replicas."""

import json
import logging
import os
import signal
import socket

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.engines import replicas, strategies
from tests import warm_processes

CLUSTER = {"cluster": {"chief": ["a:1"], "worker": ["b:1", "c:1"]}, "task": {"type": "worker", "index": 0}}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("TF_CONFIG", "TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)
    strategies._made.cache_clear()
    yield monkeypatch
    strategies._made.cache_clear()


@pytest.fixture
def made(monkeypatch):
    """What is made instead of strategies that need hardware, or a session's only one."""
    monkeypatch.setattr(tf.distribute, "MultiWorkerMirroredStrategy", lambda: "multi_worker")
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: ("mirrored", devices))
    monkeypatch.setattr(strategies, "_tpu_strategy", lambda address: ("tpu", address))


@pytest.mark.parametrize(
    "variables, arguments, expected",
    [
        ({}, {"name": "mirrored"}, ("mirrored", ["/device:CPU:0", "/device:CPU:1"])),
        ({"TF_CONFIG": json.dumps(CLUSTER)}, {}, "multi_worker"),
        ({"TF_CONFIG": json.dumps(CLUSTER), "TPU_NAME": "mine"}, {"name": "tpu"}, ("tpu", "mine")),
        ({"TPU_NAME": "mine"}, {}, ("tpu", "mine")),
        ({"TF_CONFIG": json.dumps(CLUSTER)}, {"tpu": "yours"}, ("tpu", "yours")),
        ({"TPU_NAME": "mine"}, {"tpu": "yours"}, ("tpu", "yours")),
        ({"COLAB_TPU_ADDR": "10.0.0.2:8470"}, {}, ("tpu", "grpc://10.0.0.2:8470")),
        ({}, {"name": "tpu"}, ("tpu", "local")),
    ],
)
def test_strategy_by_name_and_environment(made, environment, variables, arguments, expected):
    for name, value in variables.items():
        environment.setenv(name, value)
    assert strategies.strategy(**arguments) == expected
    assert strategies.strategy(**arguments) is strategies.strategy(**arguments)


def test_one_device_unless_there_is_more():
    assert strategies.strategy().num_replicas_in_sync == 1
    assert strategies.strategy("one").num_replicas_in_sync == 1
    assert strategies.description(strategies.strategy("one")) == "1 CPU"


def test_one_device_is_one_device_in_the_scope_of_others(mirrored):
    default = tf.distribute.get_strategy()
    with mirrored.scope():
        assert strategies.strategy("one") is default
        assert strategies.description(mirrored) == "2 CPU"
    assert strategies.strategy("one") is default


def test_the_same_devices_are_the_same_strategy(monkeypatch):
    made = []
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda devices: made.append(devices) or object())
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a", "b"] if kind == "GPU" else [])
    assert strategies.strategy("auto") is strategies.strategy("mirrored") is strategies.strategy()
    assert len(made) == 1


@pytest.mark.parametrize("address", ["mine", "yours"])
def test_the_same_tpu_is_the_same_strategy(monkeypatch, environment, address):
    made = []
    monkeypatch.setattr(strategies, "_tpu_strategy", lambda address: made.append(address) or object())
    environment.setenv("TPU_NAME", "mine")
    there = strategies.strategy("tpu")
    assert strategies.strategy() is there
    assert (strategies.strategy("tpu", tpu=address) is there) == (address == "mine")
    assert len(made) == (1 if address == "mine" else 2)


def test_a_local_tpu_is_tensorflows_only_if_it_has_one(made, environment, monkeypatch):
    environment.setenv("TPU_NAME", "local")
    assert strategies.strategy().num_replicas_in_sync == 1
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a"] if kind == "TPU" else [])
    assert strategies.strategy() == ("tpu", "local")


def test_auto_is_mirrored_over_several_gpus(made, monkeypatch):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["a", "b"] if kind == "GPU" else [])
    assert strategies.strategy()[0] == "mirrored"


@pytest.mark.parametrize(
    "variables, arguments, message",
    [
        ({}, {"name": "gpus"}, "out of auto, one, mirrored, tpu, multi_worker, jax. Received: 'gpus'"),
        ({}, {"name": "mirrored", "tpu": "mine"}, "Expected the strategy 'tpu' with a TPU's address"),
        ({}, {"name": "multi_worker"}, "Expected an environment variable TF_CONFIG"),
        ({"TF_CONFIG": "{"}, {}, "Expected a TF_CONFIG with 'cluster'"),
        ({"TF_CONFIG": "[1]"}, {}, "Expected a TF_CONFIG with 'cluster'"),
        ({"TF_CONFIG": '{"cluster": {"worker": ["a:1"]}}'}, {}, "Expected a TF_CONFIG with 'cluster'"),
        (
            {"TF_CONFIG": json.dumps({**CLUSTER, "task": {"type": "evaluator", "index": 0}})},
            {},
            "Expected a TF_CONFIG with 'cluster'",
        ),
        ({}, {"name": "tpu"}, "Expected a TPU that answers. Received: 'local'"),
        ({"TPU_NAME": "mine"}, {}, "Expected a TPU that answers. Received: 'mine'"),
    ],
)
def test_what_is_not_there_is_refused(environment, variables, arguments, message):
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        strategies.strategy(**arguments)


def meet_and_listen():
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    strategies.strategy("multi_worker")
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1]


def test_sigterm_is_still_heard_where_processes_met(tmp_path):
    """TensorFlow's own handler, which it sets as the processes meet, hears it in place of Python's."""
    with socket.create_server(("localhost", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
    cluster = {"cluster": {"worker": [address]}, "task": {"type": "worker", "index": 0}}
    environment, log = {**os.environ, "TF_CONFIG": json.dumps(cluster)}, tmp_path / "log.txt"
    process = warm_processes.Popen(meet_and_listen, log=log, env=environment)
    assert process.wait(timeout=120) == 0, log.read_text()


def test_one_process_is_the_first_of_one():
    assert (replicas.process_index(), replicas.num_processes()) == (0, 1)
    assert replicas.all_processes(True) == [1.0]
    replicas.expect_same(3, "anywhere")


def test_processes_that_see_different_folders_are_told(monkeypatch):
    monkeypatch.setattr(replicas, "all_processes", lambda number: [number, 0.0])
    with pytest.raises(ValueError, match="Received: runs/mine with snapshots 10, 0"):
        replicas.expect_same(10.0, "runs/mine")


def test_replicas_get_consecutive_parts(mirrored):
    batch = {"x": tf.reshape(tf.range(12), (6, 2)), "scale": tf.constant(3)}
    with mirrored.scope():
        parts = mirrored.experimental_local_results(replicas.to_replicas(batch)["x"])
        scales = mirrored.experimental_local_results(replicas.to_replicas(batch)["scale"])
        with pytest.raises(ValueError, match="divides among 2 replicas. Received: 3"):
            replicas.to_replicas(tf.zeros(3))
    np.testing.assert_array_equal(np.concatenate(parts), batch["x"])
    assert [len(part) for part in parts] == [3, 3]
    assert [int(scale) for scale in scales] == [3, 3]
    assert replicas.to_replicas(batch) is batch


def test_a_function_over_replicas_is_the_function(mirrored):
    sizes = []

    def fn(x, k):
        sizes.append(x["a"].shape[0])
        return {"sum": x["a"] + tf.cast(k, tf.float32), "is_large": x["b"] > 2}

    x = {"a": tf.reshape(tf.range(12.0), (6, 2)), "b": tf.range(6)}
    with mirrored.scope():
        over_two = replicas.over_replicas(fn)
    for _ in range(2):
        found = over_two(x, tf.constant(10))
    np.testing.assert_array_equal(found["sum"], x["a"] + 10)
    np.testing.assert_array_equal(found["is_large"], [False, False, False, True, True, True])
    assert sizes == [3, 3]  # Each replica once, however often it is called.
    alone = replicas.over_replicas(fn, jit_compile=True)(x, tf.constant(10))
    np.testing.assert_array_equal(alone["sum"], found["sum"])
    assert sizes == [3, 3, 6]


def test_every_replicas_copy_is_updated(mirrored):
    with mirrored.scope():
        variables = [tf.Variable([1.0, 2.0]), tf.Variable(3.0)]

    @tf.function
    def run():
        def on_replica():
            constants = [tf.constant([5.0, 7.0]), tf.constant(9.0)]
            values = tf.distribute.get_replica_context().all_reduce("MEAN", constants)
            replicas.update(lambda v, value, factor: v.assign(value * factor), variables, values, [2.0, 3.0])

        mirrored.run(on_replica)

    run()
    for variable, expected in zip(variables, ([10.0, 14.0], 27.0)):
        for copy in mirrored.experimental_local_results(variable):
            np.testing.assert_array_equal(copy, expected)


def test_processes_exchange_one_message(mirrored, monkeypatch):
    values = [tf.constant([[1.0, 2.0], [3.0, 4.0]]), tf.constant(5.0), tf.constant([6.0])]
    messages = []
    monkeypatch.setattr(replicas, "_has_processes", lambda strategy: True)
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def counted(context, operation, values, options=None):
        messages.append(values)
        return all_reduce(context, operation, values, options)

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", counted)
    for operation, factor in (("SUM", 2.0), ("MEAN", 1.0)):
        messages.clear()
        found = mirrored.run(tf.function(lambda op=operation: replicas.all_reduce(op, values)))
        assert [message.shape for message in messages] == [(6,), (6,)]  # One of each replica.
        for ours, value in zip(found, values, strict=True):
            for copy in mirrored.experimental_local_results(ours):
                np.testing.assert_array_equal(copy, factor * value)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_functions_of_one_code_are_not_taken_for_one_that_is_traced_again(jit_compile):
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("tensorflow").addHandler(listener)
    try:
        for k in range(6):

            def shifted(x, k=k):
                return x + k

            assert replicas.over_replicas(shifted, jit_compile=jit_compile)(tf.zeros(2)).numpy().tolist() == [k, k]
    finally:
        logging.getLogger("tensorflow").removeHandler(listener)
    assert said == []
