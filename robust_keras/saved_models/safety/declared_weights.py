"""How large the weights are that an architecture declares, as they are made: no larger than what its file holds."""

import contextlib
import functools
import math
import threading
from collections.abc import Iterator
from typing import Any

import keras

_SLACK = 1 << 24  # Bytes of what is made anew: states of random numbers, adapters.
_MOST_TENSORS = 100_000
_TIMES = 2  # As of weights that a file keeps in half as many bits.


@contextlib.contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Models that this thread makes inside have no more weights than twice a number of bytes, and a little.

    A text of a few bytes can declare a layer of any size, which Keras makes and fills with random numbers before it
    looks for its weights. It can also have a tensor split into as many as it is long, so tensors are counted too.

    Args:
        num_bytes: of the weights that are there.

    Raises:
        ValueError: naming the layer and its shape, before the memory is taken.
    """
    owner, left, refused, num_tensors = threading.get_ident(), _TIMES * num_bytes + _SLACK, "", 0

    def count(maker: Any, shape: Any, dtype: Any) -> None:
        nonlocal left, refused
        if threading.get_ident() != owner:
            return
        left -= _num_bytes(shape, dtype)
        if left < 0:
            expected = f"weights of the {num_bytes:,} bytes that the file holds"
            refused = f"Expected {expected}. Received: {maker.name} with one of shape {tuple(shape)}, which are more"
            raise ValueError(refused)

    def count_tensor(*_: Any) -> None:
        nonlocal num_tensors, refused
        num_tensors += threading.get_ident() == owner
        if num_tensors > _MOST_TENSORS:
            refused = f"Expected a model that computes at most {_MOST_TENSORS:,} tensors. Received: more"
            raise ValueError(refused)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_watched(keras.KerasTensor, "__init__", _shape, count_tensor))
        for kind, name, shape_of in _MAKERS:
            stack.enter_context(_watched(kind, name, shape_of, count))
        try:
            yield
        except Exception as error:
            if not refused:
                raise
            raise ValueError(refused) from error  # Keras adds to it what it was about to do.
    if refused:
        raise ValueError(refused)


def _shape(_: Any, *args: Any, shape: Any = (), **__: Any) -> Any:
    found = args[0] if args else shape
    return (found,) if isinstance(found, int) else found or ()


def _shape_of_reference(_: Any, *args: Any, reference_variable: Any = None, **__: Any) -> Any:
    return (args[0] if args else reference_variable).shape


def _shape_of_statistics(layer: Any, *args: Any, input_shape: Any = (), **_: Any) -> Any:
    """Of a mean that was given, which is repeated over the axes."""
    axes = (layer.axis,) if isinstance(layer.axis, int) else layer.axis or ()
    return [(args[0] if args else input_shape)[axis] for axis in axes]


# What Keras makes variables and constants with: by class, the function and what finds the shape among its arguments.
_MAKERS = (
    (keras.layers.Layer, "add_weight", _shape),
    (keras.metrics.Metric, "add_variable", _shape),
    (keras.optimizers.Optimizer, "add_variable_from_reference", _shape_of_reference),
    (keras.layers.Normalization, "build", _shape_of_statistics),
)


@contextlib.contextmanager
def _watched(kind: Any, name: str, shape_of: Any, count: Any) -> Iterator[None]:
    """Has a method of Keras' tell what it is about to make."""
    whole = getattr(kind, name)

    @functools.wraps(whole)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        count(self, shape_of(self, *args, **kwargs), kwargs.get("dtype") or getattr(self, "variable_dtype", None))
        return whole(self, *args, **kwargs)

    setattr(kind, name, watched)
    try:
        yield
    finally:
        setattr(kind, name, whole)


def _num_bytes(shape: Any, dtype: Any) -> int:
    bits = {"bool": 8, "int8": 8, "uint8": 8, "float16": 16, "bfloat16": 16, "int4": 8, "float64": 64, "int64": 64}
    return math.prod(axis or 0 for axis in shape) * bits.get(str(dtype), 32) // 8
