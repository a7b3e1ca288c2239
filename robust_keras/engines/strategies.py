"""A `tf.distribute` strategy from a name."""

import concurrent.futures
import functools
import json
import os
import signal
import threading
from typing import Any

import tensorflow as tf

from robust_keras.engines import replicas
from robust_keras.engines.on_jax import devices

NAMES = ("auto", "one", "mirrored", "tpu", "multi_worker", "jax")


def strategy(name: str = "auto", *, tpu: str | None = None) -> Any:
    """The strategy that a run executes under, the same object for the same devices.

    Processes meet in it, and a TPU is initialised: call it before anything else that uses TensorFlow's devices.

    Args:
        name: 'one' device; 'mirrored' over all GPUs of this machine, or over its logical CPUs where it has none; 'tpu';
            'multi_worker' over the processes that the environment variable TF_CONFIG lists; 'jax' over all devices of
            this machine that JAX drives; or 'auto': the TPU whose address is given, else several processes if TF_CONFIG
            lists them, else a TPU or GPUs that TensorFlow has, else accelerators that JAX has, else the CPU.
        tpu: address of the TPU; None for the one that TPU_NAME or COLAB_TPU_ADDR names, or that is attached.

    Returns:
        A `tf.distribute.Strategy`, or an `on_jax.strategy.JaxStrategy`, which is used like one.

    Raises:
        ValueError: for an unknown name, or hardware or processes that are not there.
    """
    if name not in NAMES:
        raise ValueError(f"Expected a strategy out of {', '.join(NAMES)}. Received: {name!r}")
    if tpu is not None and name not in ("auto", "tpu"):
        raise ValueError(f"Expected the strategy 'tpu' with a TPU's address. Received: {name!r} and {tpu!r}")
    if name == "auto":
        name, _ = _best_there_is(tpu)
    if name == "jax":
        return _made("jax")
    if name == "multi_worker":
        if not _workers_of_environment():
            raise ValueError(
                "Expected an environment variable TF_CONFIG that lists the workers and says which of them this process "
                f"is. Received: {os.environ.get('TF_CONFIG')!r}"
            )
        return _made("multi_worker")
    if name == "tpu":
        return _made("tpu", tpu or _tpu_of_environment() or "local")
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return _made("mirrored", *(device.name for device in devices))
    return _default_strategy()


def by_itself() -> Any:
    """A strategy over one device that JAX drives, on which the programs of one device are lowered.

    Raises:
        ValueError: as `strategy('jax')` does.
    """
    return _jax_strategy(1)


def description(strategy: Any) -> str:
    """How many devices of which kind a strategy computes on, such as '8 TPU', and by what."""
    if replicas.is_on_jax(strategy):
        return f"{strategy.num_replicas_in_sync} {strategy.devices[0].device_kind}, by JAX {strategy.version}"
    if isinstance(strategy, tf.distribute.TPUStrategy):
        kind = "TPU"
    else:
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return f"{strategy.num_replicas_in_sync} {kind}"


def announcement(name: str = "auto", *, tpu: str | None = None) -> str:
    """A line that says what `strategy` chooses, and why."""
    why = _best_there_is(tpu)[1] if name == "auto" else f"--strategy={name}"
    return f"Computing on {description(strategy(name, tpu=tpu))} ({why})"


def _best_there_is(tpu):
    """The name of the best strategy, and why it is."""
    if tpu:
        return "tpu", "the address of a TPU is given"
    if (num_workers := _workers_of_environment()) > 1:
        return "multi_worker", f"TF_CONFIG lists {num_workers} processes"
    if tf.config.list_physical_devices("TPU"):
        return "tpu", "TensorFlow has a TPU"
    if _tpu_of_environment() not in (None, "local"):  # 'local' is the attached one, which may be JAX's.
        return "tpu", "the environment names a TPU"
    if gpus := tf.config.list_physical_devices("GPU"):
        return ("mirrored" if len(gpus) > 1 else "one"), "TensorFlow has GPUs"
    if devices.has_accelerator():
        return "jax", "TensorFlow has no accelerator, and JAX has"
    return "one", "TensorFlow and JAX have no accelerator"


@functools.cache  # Several strategies over the same devices collide.
def _made(name, *devices):
    if name == "multi_worker":
        return _multi_worker_strategy()
    if name == "jax":
        return _jax_strategy()
    return _tpu_strategy(*devices) if name == "tpu" else tf.distribute.MirroredStrategy(list(devices))


def _default_strategy():
    """TensorFlow's own, of one device, also in the scope of another: a new thread is in none."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        return thread.submit(tf.distribute.get_strategy).result()


def _workers_of_environment():
    """How many processes TF_CONFIG lists; 0 where there is none."""
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        config = dict(json.loads(text))
        cluster = config.get("cluster", {})
        if cluster and config["task"]["type"] not in cluster:
            raise ValueError("no such task")
        return sum(len(cluster.get(kind, ())) for kind in ("chief", "worker"))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"Expected a TF_CONFIG with 'cluster' and this process's 'task'. Received: {text}") from error


def _multi_worker_strategy():
    if (num_workers := _workers_of_environment()) > 1:
        print(f"Waiting for all {num_workers} processes of TF_CONFIG", flush=True)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    if threading.current_thread() is threading.main_thread():
        # TensorFlow has put a handler of its own below Python's, which would not hear of SIGTERM again.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return strategy


def _tpu_of_environment():
    colab = os.environ.get("COLAB_TPU_ADDR")
    return os.environ.get("TPU_NAME") or (f"grpc://{colab}" if colab else None)


def _tpu_strategy(address):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(address)
        # Data sets stay on this machine: another one would not have its files, nor its Python.
        tf.config.experimental_connect_to_cluster(resolver, make_master_device_default=False)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, OSError, RuntimeError, ImportError, tf.errors.OpError) as error:
        reason = " ".join(str(error).splitlines()[:1])
        raise ValueError(f"Expected a TPU that answers. Received: {address!r} ({reason})") from error
    return tf.distribute.TPUStrategy(resolver)


def _jax_strategy(most=None):
    taken = devices.take()[:most]  # Before anything imports what only JAX brings.
    from robust_keras.engines.on_jax import strategy as on_jax

    on_jax.keep_compiled()
    return on_jax.JaxStrategy(taken)
