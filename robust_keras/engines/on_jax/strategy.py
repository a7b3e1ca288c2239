"""The strategy over the devices of this machine that JAX drives."""

import contextlib
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tensorflow as tf
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robust_keras.engines import replicas
from robust_keras.engines.on_jax import programs
from robust_keras.engines.on_jax.variables import DeviceVariables

AXIS = "replicas"
EVERYWHERE = PartitionSpec()


class JaxStrategy:
    """Batches shared among devices, each of which holds all variables; `strategies.strategy('jax')` makes it.

    It is used as `tf.distribute.Strategy` is: `scope()`, `num_replicas_in_sync`.

    Args:
        devices: of JAX, of this process.
    """

    def __init__(self, devices: list) -> None:
        self.mesh = Mesh(np.array(devices), (AXIS,))
        self.num_replicas_in_sync = len(devices)
        self.variables = DeviceVariables(self.put)

    version = jax.__version__

    @property
    def devices(self) -> list:
        """Of JAX."""
        return list(self.mesh.devices)

    @contextlib.contextmanager
    def scope(self) -> Iterator["JaxStrategy"]:
        """Inside the context, functions over replicas and training steps run on these devices."""
        with replicas.entered(self):
            yield self

    def put(self, array: np.ndarray, spec: PartitionSpec = EVERYWHERE) -> jax.Array:
        """A NumPy array on all devices, or cut among them as `spec` says."""
        with running():
            return jax.device_put(array, NamedSharding(self.mesh, spec))

    def over_replicas(self, fn: Callable) -> Callable:
        """See `replicas.over_replicas`."""
        compiled: dict[tuple, Callable] = {}

        def call(*args):
            args = tf.nest.map_structure(tf.convert_to_tensor, args)
            flat = tf.nest.flatten(args)
            key = tuple((each.dtype, *each.shape) for each in flat)
            if key not in compiled:
                compiled[key] = self._compiled(fn, args)
            return compiled[key](flat)

        return call

    def bring_back(self) -> None:
        """See `replicas.bring_back`."""
        with running(), unbroken():
            self.variables.bring_back()

    def on_each(self, fn: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`fn` on every device, of its part of each array."""
        return jax.shard_map(fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def constants(self, program: programs.Program) -> list[jax.Array]:
        """What a program takes besides its arguments and variables."""
        return [self.put(each.numpy()) for each in program.constants]

    def share(self, spec: tf.TensorSpec) -> tf.TensorSpec:
        """A device's part of a batch like `spec`; scalars go to each device.

        Raises:
            ValueError: for a batch that does not divide among the devices.
        """
        if not spec.shape.rank:
            return spec
        size = replicas.part_size(spec.shape[0], self.num_replicas_in_sync)
        return tf.TensorSpec((size, *spec.shape[1:]), spec.dtype)

    def whole(self, spec: tf.TensorSpec) -> tf.TensorSpec:
        """The batch of which the devices' parts are like `spec`."""
        return tf.TensorSpec((spec.shape[0] * self.num_replicas_in_sync, *spec.shape[1:]), spec.dtype)

    def _compiled(self, fn, args):
        flat = tf.nest.flatten(args)
        shares = [self.share(tf.TensorSpec(each.shape, each.dtype)) for each in flat]
        program = programs.lower(fn, *tf.nest.pack_sequence_as(args, shares), exact=True)
        # What noise is drawn from is alike on all devices; anything else that they assign need not be.
        if self.num_replicas_in_sync > 1 and (others := [v for v in program.written if not v.dtype.is_integer]):
            raise ValueError(f"Expected no variable that each of several devices assigns. Received: {others[0].name}")
        places = [PartitionSpec(AXIS) if each.shape.rank else EVERYWHERE for each in flat]
        on_each = self.on_each(program, (places, EVERYWHERE, EVERYWHERE), (PartitionSpec(AXIS), EVERYWHERE))
        constants, run = self.constants(program), jax.jit(on_each)

        def call(flat):
            with running():
                arrays = [self.put(each.numpy(), place) for each, place in zip(flat, places)]
                results, written = run(arrays, constants, self.variables.arrays(program.variables))
                self.variables.replace(program.written, written)
                results = jax.device_get(results)
            if written:
                self.bring_back()
            return program.packed([tf.constant(np.array(each)) for each in results])

        return call


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Inside the context, JAX has types of 64 bits, of which step counters are.

    Raises:
        tf.errors.ResourceExhaustedError: where a device has too little memory.
    """
    try:
        with _x64():
            yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise tf.errors.ResourceExhaustedError(None, None, str(error).splitlines()[0]) from error


@contextlib.contextmanager
def unbroken() -> Iterator[None]:
    """Inside the context, Ctrl-C waits for its end, or for a second one: new values are where they belong by then."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed: list = []

    def hear(number, frame):
        if pressed:
            signal.signal(number, before)
            signal.raise_signal(number)
        pressed.append(number)

    signal.signal(signal.SIGINT, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)


def _x64() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # Of older versions.


def keep_compiled() -> None:
    """Has JAX keep compiled programs, small ones too, for later runs, as far as nobody has said where and which."""
    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "robust_keras", "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
