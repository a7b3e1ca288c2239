"""The one switch of XLA: what is compiled with it, and where.

@compilation.fused  # A small function of tensors: one pass over memory instead of one for each operation.
def nearest(delta, x): ...

step = compilation.function(step, jit_compile=jit_compile)  # As somebody asked for.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import tensorflow as tf

_tracing = threading.local()


def fused(fn: Callable) -> Callable:
    """A function of tensors that is compiled with XLA for its speed alone, also where nothing around it is.

    It is called plainly, as one of many operations, inside a program that XLA compiles anyway (`function` with
    jit_compile=True, a replica of a `TPUStrategy`) and on a device that has no XLA.

    Args:
        fn: of tensors, positional or by keyword, without side effects; other arguments are part of the program.

    Returns:
        A function like `fn`.
    """
    compiled: dict[tuple, Callable] = {}

    @functools.wraps(fn)
    def call(*args, **kwargs):
        if _is_inside_xla() or not has_xla():
            return fn(*args, **kwargs)
        key = tuple(map(_kind, tf.nest.flatten((args, kwargs))))
        if key not in compiled:
            # TensorFlow warns of one function that is traced for many shapes.
            compiled[key] = tf.function(functools.partial(fn), jit_compile=True, autograph=False)
        return compiled[key](*args, **kwargs)

    return call


def _kind(argument):
    """What a program is compiled for: of a tensor its shape and type."""
    shape = getattr(argument, "shape", None)
    if shape is None:
        return argument
    return tuple(shape) if tf.TensorShape(shape).rank is not None else None, tf.as_dtype(argument.dtype)


def function(fn: Callable, *, jit_compile: bool = False) -> Callable:
    """`tf.function(fn, jit_compile=jit_compile, autograph=False)`, inside which `fused` functions know of it.

    Inside a program that XLA compiles anyway it is not asked for again.
    """
    if not jit_compile or _is_inside_xla():
        return tf.function(fn, autograph=False)

    @functools.wraps(fn)
    def traced(*args, **kwargs):
        with plain():
            return fn(*args, **kwargs)

    return tf.function(traced, jit_compile=True, autograph=False)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside the context nothing is compiled for speed alone: what is traced holds single operations."""
    before = _is_traced_for_xla()
    _tracing.for_xla = True
    try:
        yield
    finally:
        _tracing.for_xla = before


@functools.cache
def has_xla() -> bool:
    """Whether XLA compiles for the device that operations run on by default; tried once."""
    try:
        with tf.init_scope():  # It runs now, also where a program is being traced.
            doubled = tf.function(lambda x: 2.0 * x, jit_compile=True, autograph=False)
            return float(doubled(tf.constant(1.0))) == 2.0
    except tf.errors.OpError:
        return False


def is_on_cpu() -> bool:
    """Whether what is called now runs on the CPU operation by operation, and XLA is there to fuse some of them."""
    return not _is_inside_xla() and not _has_accelerator() and has_xla()


@functools.cache
def _has_accelerator():
    return bool(tf.config.list_logical_devices("GPU"))


def _is_traced_for_xla():
    return getattr(_tracing, "for_xla", False)


def _is_inside_xla():
    return _is_traced_for_xla() or isinstance(tf.distribute.get_strategy(), tf.distribute.TPUStrategy)
