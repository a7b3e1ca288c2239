"""What pixel values stand for black and white, and images of such values as fractions of their range.

    >>> to_unit([[0.0, 51.0, 255.0]], (0, 255))  # As everything inside the package takes images.
    array([[0. , 0.2, 1. ]], dtype=float32)
    >>> from_unit(to_unit([[-1.0, 0.5]], (-1, 1)), (-1, 1))
    array([[-1. ,  0.5]], dtype=float32)

Bytes, uint8, are k / 255 whatever the bounds: those are what a model takes, and bytes have their own.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# What values may leave their bounds by, as those of a resampling do: a share of the range.
_ROUNDING = 1e-6
# Bounds that reach as far are those of bytes, or the like, to which values of at most 1 are nearly black.
_FAR = 10.0


def parse(bounds: Sequence[float]) -> tuple[float, float]:
    """The pixel values for black and white, `(low, high)`, as floats.

    Raises:
        ValueError: for anything but two finite numbers with low < high.
    """
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(
            f"Expected bounds as two finite numbers low < high, such as (0, 1) or (0, 255). Received: {bounds!r}"
        )
    return low, high


def to_unit(x: Any, bounds: Sequence[float] = (0, 1)) -> Any:
    """Images as fractions of the pixel range: float32 in [0, 1].

    Floats k of the bounds (0, 255) become the same bits as bytes k. Values are looked at where there are any, so not in
    a program that is being traced.

    Args:
        x: uint8, or floats within the bounds; an array, whatever NumPy makes one of, or a tensor.
        bounds: `(low, high)`, the values of black and white in floats.

    Returns:
        An array for an array, a tensor for a tensor, shaped like `x`.

    Raises:
        ValueError: for other integers, values that are no finite numbers or outside the bounds by more than rounding
            (1e-6 of the range), and floats of at most 1 where the bounds are those of bytes.
    """
    low, high = parse(bounds)
    is_tensor = tf.is_tensor(x)
    try:
        x = x if is_tensor else np.asarray(x)
    except ValueError as error:  # Of lists of other lengths.
        raise ValueError("Expected images of one shape. Received: some of another") from error
    if _check_type(x):
        _check_values(x, low, high)
    else:
        low, high = 0.0, 255.0
    x = tf.cast(x, tf.float32) if is_tensor else x.astype(np.float32)
    if (low, high) != (0.0, 1.0):
        x = (x - np.float32(low) if low else x) / np.float32(high - low)
    return _clip(x)


def from_unit(x: Any, bounds: Sequence[float]) -> Any:
    """Images of the bounds, `low + x * (high - low)`, from fractions of the range; for (0, 1) `x` itself."""
    low, high = parse(bounds)
    return x if (low, high) == (0.0, 1.0) else low + x * (high - low)


def _check_type(x: Any) -> bool:
    """Whether images are floats rather than bytes."""
    dtype = tf.as_dtype(x.dtype)
    if not (dtype.is_floating or dtype == tf.uint8):
        received = "objects" if x.dtype == object else dtype.name
        raise ValueError(f"Expected images as bytes, uint8, or as floats. Received: {received}")
    return dtype.is_floating


def _check_values(x: Any, low: float, high: float) -> None:
    if (tf.is_tensor(x) and not tf.executing_eagerly()) or 0 in x.shape:
        return  # There are none yet.
    values = np.asarray(x)
    values = values if np.issubdtype(values.dtype, np.floating) else values.astype(np.float32)  # Of bfloat16.
    darkest, brightest = float(values.min()), float(values.max())
    slack = _ROUNDING * (high - low)
    received = f"values from {darkest:.6g} to {brightest:.6g}"
    # The comparison fails for NaN too, which both ends then are.
    if not (darkest >= low - slack and brightest <= high + slack):
        of_bytes = high == 1 < brightest <= 255 and darkest >= 0
        hint = "; for a model that takes such floats say bounds=(0, 255), for others divide by 255" if of_bytes else ""
        raise ValueError(f"Expected finite images within the bounds ({low:g}, {high:g}). Received: {received}{hint}")
    if max(-low, high) >= _FAR and 0.0 < max(-darkest, brightest) <= 1.0:
        raise ValueError(
            f"Expected images within the bounds ({low:g}, {high:g}), as the model takes them. Received: {received}, "
            "which are nearly black there"
        )


def _clip(x: Any) -> Any:
    """`x` in [0, 1], to the bit what it was where it is; of an array in its place."""
    return tf.clip_by_value(x, 0.0, 1.0) if tf.is_tensor(x) else np.clip(x, np.float32(0), np.float32(1), out=x)
