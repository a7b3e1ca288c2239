"""The devices that an installed JAX drives, and who holds them."""

import importlib.metadata
import importlib.util
import os
from typing import Any

import tensorflow as tf

_MISSING = "the package jax; pip install 'robust_keras[jax]' brings it"


def has_accelerator() -> bool:
    """Whether JAX is installed and drives something else than the CPU; it then holds it.

    Raises:
        ValueError: for one that it cannot use, such as a TPU that another process holds.
    """
    return _may_have_accelerator() and any(device.platform != "cpu" for device in _devices())


def take() -> list[Any]:
    """All devices of this machine that JAX drives, which TensorFlow leaves alone from now on.

    Raises:
        ValueError: without JAX or its devices, for a TPU or GPUs that TensorFlow has taken, and for several processes.
    """
    if tf.config.list_physical_devices("TPU"):
        raise ValueError(
            "Expected a TPU that TensorFlow leaves to JAX, as tensorflow-cpu does in place of tensorflow-tpu. "
            "Received: one that it holds"
        )
    devices = _devices()
    if any(device.platform in ("gpu", "cuda", "rocm") for device in devices):
        try:
            tf.config.set_visible_devices([], "GPU")
        except RuntimeError as error:
            raise ValueError(
                "Expected the strategy jax before anything computes on TensorFlow's GPUs. Received: GPUs that it holds"
            ) from error
    return devices


def _may_have_accelerator():
    """Whether anything by which JAX finds accelerators is installed; to import it takes a command half a second."""
    if importlib.util.find_spec("jax") is None or os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    has_plugin = importlib.util.find_spec("jax_plugins") or importlib.metadata.entry_points(group="jax_plugins")
    return bool(has_plugin or importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH"))


def _devices():
    try:
        import jax
    except (ImportError, AttributeError, RuntimeError) as error:  # Also of parts that do not fit each other.
        raise ValueError(f"Expected {_MISSING}. Received: {' '.join(str(error).split())}") from error
    if not hasattr(jax, "shard_map"):
        raise ValueError(f"Expected JAX 0.6.2 or newer for the strategy jax. Received: {jax.__version__}")
    try:
        if jax.process_count() > 1:
            raise ValueError(f"Expected one process for the strategy jax. Received: {jax.process_count()}")
        return jax.local_devices()
    except RuntimeError as error:  # Of a backend that does not start.
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected devices that JAX can use, or --strategy=one. Received: {reason}") from error
