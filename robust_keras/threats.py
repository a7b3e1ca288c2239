"""Threat models: the geometry of a norm ball around an image, inside [0, 1].

A norm is a few small functions; `threat(norm=..., epsilon=...)` puts them together with a radius.
"""

import fractions
import functools
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import compilation, noise

# Radii beyond these are meant to be fractions of 255.
_LARGEST = {"Linf": 1.0, "L2": 3072**0.5 / 2, "L1": 3072 / 2}
# Digits with a point and an exponent, and nothing else that Python would take for a number, such as '1_0' or 'nan'.
_DECIMAL = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3})?"
_FRACTION = re.compile(rf"([+-]?{_DECIMAL})(?:/({_DECIMAL}))?", re.ASCII)
# What images may leave [0, 1] by, as those of a resampling do.
_ROUNDING = 1e-6


class Threat(NamedTuple):
    """A norm ball of one radius, made by `threat`.

    Attributes:
        norm: 'Linf', 'L2' or 'L1'.
        epsilon: the radius in pixel units of [0, 1].
        epsilon_fraction: the radius as typed, such as '8/255'.
        random_start: `(x, seeds) -> x_adv`, a random point of the ball, clipped to [0, 1].
        steepest_step: `(gradient) -> direction` of unit norm along which a linear loss rises most.
        project: `(x_adv, x) -> x_adv` inside the ball and [0, 1].
        distance: `(x_adv, x) -> [batch]` in the norm.
        whole: of a `part_of` a threat model, that one; None for one of its own.
        share: of the whole's radius.
    """

    norm: str
    epsilon: float
    epsilon_fraction: str
    random_start: Callable
    steepest_step: Callable
    project: Callable
    distance: Callable
    whole: "Threat | None" = None
    share: Any = 1.0


def threat(*, norm: str, epsilon: float | str) -> Threat:
    """The threat model of perturbations whose `norm` is at most `epsilon`.

        >>> linf = threat(norm="Linf", epsilon="8/255")
        >>> linf.epsilon == 8 / 255, linf.epsilon_fraction
        (True, '8/255')

    Args:
        norm: 'Linf', 'L2' or 'L1'.
        epsilon: the radius in pixel units of [0, 1]: a number or an exact fraction such as '8/255'.

    Returns:
        A `Threat`.

    Raises:
        ValueError: for an unknown norm, or a radius that is no number, negative, not finite, or too large to be meant:
            more than the whole range in Linf, and in L2 and L1 more than half the diagonal of 32 x 32 x 3 pixels, 27.7
            and 1536, from where on every such image may be turned grey.
    """
    if norm not in _NORMS:
        raise ValueError(f"Expected a norm out of {', '.join(_NORMS)}. Received: {norm!r}")
    radius = parse_fraction(epsilon, "epsilon")
    if radius < 0:
        raise ValueError(f"Expected a radius epsilon >= 0. Received: {epsilon!r}")
    if radius > _LARGEST[norm]:
        meant = "" if "/" in str(epsilon) else f", such as '{epsilon}/255'"
        raise ValueError(
            f"Expected a radius epsilon in units of the pixel range [0, 1]{meant}, of at most {_LARGEST[norm]:g} in "
            f"{norm}. Received: {epsilon!r}"
        )
    random_start, steepest_step, project, distance = _NORMS[norm]
    return Threat(
        norm=norm,
        epsilon=radius,
        epsilon_fraction=str(epsilon),
        random_start=functools.partial(random_start, epsilon=radius),
        steepest_step=steepest_step,
        project=functools.partial(project, epsilon=radius),
        distance=distance,
    )


def part_of(whole: Threat, share: tf.Tensor | float) -> Threat:
    """The same threat model with a `share` of its radius, a float32 scalar or `[batch, 1, ...]`, maybe a program's.

    With a share of 1 attacks do the same as with the whole, to the bit. A share may exceed 1.
    """
    radius: Any = share * whole.epsilon
    random_start, _, project, _ = _NORMS[whole.norm]
    return whole._replace(
        epsilon=radius,
        random_start=functools.partial(random_start, epsilon=radius),
        project=functools.partial(project, epsilon=radius),
        whole=whole,
        share=share,
    )


def parse_fraction(value: float | str, name: str) -> float:
    """The float nearest to a number or to an exact fraction such as '8/255' or '8.8/255'.

    A fraction is two decimal numbers and a slash, without spaces; truth values are no numbers.

    Raises:
        ValueError: where it is neither, or not finite.
    """
    number = math.nan
    try:
        if isinstance(value, str):
            if match := _FRACTION.fullmatch(value):
                number = float(fractions.Fraction(match[1]) / fractions.Fraction(match[2] or 1))
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            number = float(value)
    except (ValueError, ArithmeticError):  # Of a division by zero, and of numbers that no float holds.
        pass
    if not math.isfinite(number):
        raise ValueError(f"Expected {name} as a finite number or a fraction such as '8/255'. Received: {value!r}")
    return number


def diameter(norm: str, shape: Sequence[int]) -> float:
    """The largest distance in `norm` between images of a `shape` in [0, 1]: in it, any may become any other."""
    return float(math.prod(shape) ** {"Linf": 0.0, "L2": 0.5, "L1": 1.0}[norm])


def check_images(x: tf.Tensor, threat: Threat | None = None) -> tf.Tensor:
    """Images as attacks take them: float32 `[batch, ...]` in [0, 1].

    Values are looked at where there are any, so not while a program is traced.

    Args:
        x: floats `[batch, ...]`.
        threat: what they are to be attacked within, if that is to be looked at too.

    Returns:
        float32 like `x`.

    Raises:
        ValueError: for integers, a tensor of one axis, values that are no finite numbers or are outside [0, 1] by
            more than rounding (1e-6), and a radius that is more than the diameter of [0, 1]^d in the norm.
    """
    x = tf.convert_to_tensor(x)
    if not x.dtype.is_floating:
        raise ValueError(f"Expected float images in [0, 1]; divide bytes by 255. Received: images of {x.dtype.name}")
    if x.shape.rank is not None and x.shape.rank < 2:
        raise ValueError(f"Expected images [batch, ...]. Received: shape {x.shape}")
    if tf.executing_eagerly() and tf.size(x) > 0:
        low, high = float(tf.reduce_min(x)), float(tf.reduce_max(x))
        # The comparison fails for NaN too, which either end may hide.
        if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING) or not tf.reduce_all(tf.math.is_finite(x)):
            raise ValueError(f"Expected finite images in [0, 1]. Received: values from {low:.6g} to {high:.6g}")
    if threat is not None and None not in x.shape[1:].as_list() and isinstance(threat.epsilon, float):
        if threat.epsilon > (most := diameter(threat.norm, x.shape[1:])):
            raise ValueError(
                f"Expected a radius of at most {most:g}, the diameter in {threat.norm} of images of shape "
                f"{tuple(x.shape[1:])}. Received: {threat.epsilon_fraction}"
            )
    return tf.cast(x, tf.float32)


def linf_random_start(x: tf.Tensor, seeds: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """Uniform in the cube of half-side `epsilon` around `x`."""
    return _clip(x + noise.uniform(seeds, tuple(x.shape[1:]), -epsilon, epsilon))


def linf_steepest_step(gradient: tf.Tensor) -> tf.Tensor:
    """The gradient's sign."""
    return tf.sign(gradient)


def linf_project(x_adv: tf.Tensor, x: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """The nearest point of the cube around `x`, within [0, 1]."""
    return _clip(tf.clip_by_value(x_adv, x - epsilon, x + epsilon))


def linf_distance(x_adv: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The largest absolute difference: `[batch]`."""
    delta = tf.convert_to_tensor(x_adv - x)
    return tf.reduce_max(tf.abs(delta), axis=_image_axes(delta))


def l2_random_start(x: tf.Tensor, seeds: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """Uniform in the Euclidean ball of radius `epsilon` around `x`."""
    shape = tuple(x.shape[1:])
    direction = l2_steepest_step(noise.normal(noise.fold_in(seeds, 0), shape))
    unit = noise.uniform(noise.fold_in(seeds, 1), (1,) * len(shape))
    return _clip(x + epsilon * unit ** (1.0 / math.prod(shape)) * direction)


def l2_steepest_step(gradient: tf.Tensor) -> tf.Tensor:
    """The gradient divided by its Euclidean norm; zero where it is zero."""
    # Scaled by the largest entry first: squares of tiny gradients would underflow.
    largest = tf.reduce_max(tf.abs(gradient), axis=_image_axes(gradient), keepdims=True)
    scaled = tf.math.divide_no_nan(gradient, largest)
    return tf.math.divide_no_nan(scaled, _l2_norm(scaled))


def l2_project(x_adv: tf.Tensor, x: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """Scaled back to the ball around `x`, then clipped to [0, 1] (which only brings it nearer to `x`)."""
    delta = x_adv - x
    norm = _l2_norm(delta)
    return _clip(x + delta * tf.where(norm > epsilon, tf.math.divide_no_nan(epsilon, norm), 1.0))


def l2_distance(x_adv: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The Euclidean distance: `[batch]`."""
    return tf.norm(tf.reshape(x_adv - x, (tf.shape(x)[0], -1)), axis=-1)


def l1_random_start(x: tf.Tensor, seeds: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """Uniform in the cross-polytope of radius `epsilon` around `x`."""
    shape = tuple(x.shape[1:])
    # Of num_pixels + 1 exponential numbers, divided by their sum, the first num_pixels are uniform in the simplex.
    numbers = -tf.math.log(1.0 - noise.uniform(noise.fold_in(seeds, 0), (math.prod(shape) + 1,)))
    lengths = tf.reshape(numbers[:, :-1] / tf.reduce_sum(numbers, axis=1, keepdims=True), (-1, *shape))
    signs = tf.where(noise.uniform(noise.fold_in(seeds, 1), shape) < 0.5, -1.0, 1.0)
    return _clip(x + epsilon * signs * lengths)


def l1_steepest_step(gradient: tf.Tensor) -> tf.Tensor:
    """The sign of the largest entry, at that entry alone; zero where the gradient is."""
    flat = tf.reshape(gradient, (-1, math.prod(gradient.shape[1:])))
    at_largest = tf.one_hot(tf.argmax(tf.abs(flat), axis=1), flat.shape[1])
    return tf.reshape(at_largest, tf.shape(gradient)) * tf.sign(gradient)


def l1_sparse_step(gradient: tf.Tensor, share: float = 0.01) -> tf.Tensor:
    """The signs of the largest `share` of the entries, of unit norm together (Tramèr & Boneh 2019, algorithm 1)."""
    size = tf.abs(gradient)
    num_pixels = math.prod(gradient.shape[1:])
    rank = tf.fill(tf.shape(gradient)[:1], min(int((1.0 - share) * num_pixels), num_pixels - 1))
    signs = tf.where(size >= order_statistic(size, rank), tf.sign(gradient), 0.0)
    return tf.math.divide_no_nan(signs, tf.reduce_sum(tf.abs(signs), _image_axes(signs), keepdims=True))


def l1_project(x_adv: tf.Tensor, x: tf.Tensor, *, epsilon: float) -> tf.Tensor:
    """The nearest point, in the Euclidean sense, of the cross-polytope around `x` within [0, 1]; see `l1_nearest`."""
    return _clip(x + l1_nearest(x_adv - x, x, epsilon=epsilon))


@compilation.fused
def l1_nearest(delta: tf.Tensor, x: tf.Tensor, *, epsilon: float | tf.Tensor) -> tf.Tensor:
    """The difference nearest to `delta` whose absolute values sum to `epsilon` at most and that keeps `x` in [0, 1].

    Every entry shrinks by one amount, stops at zero and is cut at the edge of [0, 1]; the amount is what leaves a total
    of `epsilon` (Croce & Hein 2021, https://arxiv.org/abs/2103.01208, proposition 2.1).
    """
    length, room = tf.abs(delta), tf.where(delta > 0, 1.0 - x, x)

    def total(values):
        return tf.reduce_sum(values, _image_axes(x), keepdims=True)

    def newton(amount, low, high, _):
        # The total falls piecewise linearly with the amount: the solution of the current piece, or half of the bracket
        # where there is none inside. It is exact as soon as the piece is the right one.
        left = length - amount
        excess = total(tf.clip_by_value(left, 0.0, room)) - epsilon
        num_moving = total(tf.cast((left > 0) & (left < room), tf.float32))
        low, high = tf.where(excess > 0, amount, low), tf.where(excess > 0, high, amount)
        piece = amount + tf.math.divide_no_nan(excess, num_moving)
        inside = (num_moving > 0) & (piece > low) & (piece < high)
        following = tf.where(inside, piece, 0.5 * (low + high))
        # Who is done stays put while others go on: an example's result is its own.
        unfinished = outside & (tf.abs(excess) > 1e-6 * epsilon) & (following != amount)
        return tf.where(unfinished, following, amount), low, high, tf.reduce_any(unfinished)

    outside = total(tf.minimum(length, room)) > epsilon
    high = tf.reduce_max(length, _image_axes(x), keepdims=True)
    zero = tf.zeros_like(high)
    amount = tf.while_loop(lambda *state: state[-1], newton, (zero, zero, high, True), maximum_iterations=50)[0]
    return tf.sign(delta) * tf.clip_by_value(length - tf.where(outside, amount, 0.0), 0.0, room)


def inwards(gradient: tf.Tensor, x_adv: tf.Tensor, threat: Threat) -> tf.Tensor:
    """In L1, `gradient` but for entries that lead out of [0, 1], on which a step of few pixels would be lost."""
    if threat.norm != "L1":
        return gradient
    outwards = ((x_adv >= 1.0) & (gradient > 0.0)) | ((x_adv <= 0.0) & (gradient < 0.0))
    return tf.where(outwards, 0.0, gradient)


@compilation.fused
def order_statistic(sizes: tf.Tensor, rank: tf.Tensor) -> tf.Tensor:
    """The value with `rank` (int32 `[batch]`) values before it in rising order: `[batch, 1, ...]`, of `sizes` >= 0."""
    # Non-negative floats are ordered as their bits are: the value is found bit by bit, without sorting.
    bits = tf.bitcast(sizes, tf.int32)
    rank = tf.reshape(rank, (-1,) + (1,) * (sizes.shape.rank - 1))

    def lower(i, value):
        candidate = value + tf.bitwise.left_shift(1, 30 - i)
        num_below = tf.reduce_sum(tf.cast(bits < candidate, tf.int32), axis=_image_axes(sizes), keepdims=True)
        return i + 1, tf.where(num_below <= rank, candidate, value)

    value = tf.while_loop(lambda i, _: i < 31, lower, (tf.constant(0), tf.zeros_like(rank)), maximum_iterations=31)[1]
    return tf.bitcast(value, tf.float32)


def ordinary_scale(sizes: tf.Tensor, *, at_least: float) -> tf.Tensor:
    """The power of two that brings positive numbers next to 1; 1 for 0, and for what is from `at_least` to 2^40.

    To multiply by it is exact, so that what is of ordinary size stays as it is to the bit, and what is tiny or huge can
    be squared.
    """
    exponent = tf.bitwise.right_shift(tf.bitcast(sizes, tf.int32), 23)  # With the bias of 127.
    scale = tf.bitcast(tf.bitwise.left_shift(tf.maximum(254 - exponent, 1), 23), tf.float32)
    return tf.where(((sizes >= at_least) & (sizes <= 2.0**40)) | tf.equal(sizes, 0.0), 1.0, scale)


def l1_distance(x_adv: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The sum of absolute differences: `[batch]`."""
    delta = tf.convert_to_tensor(x_adv - x)
    return tf.reduce_sum(tf.abs(delta), axis=_image_axes(delta))


def _clip(x):
    return tf.clip_by_value(x, 0.0, 1.0)


def _image_axes(x):
    return list(range(1, x.shape.rank))


def _l2_norm(delta):
    return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=_image_axes(delta), keepdims=True))


_NORMS = {
    "Linf": (linf_random_start, linf_steepest_step, linf_project, linf_distance),
    "L2": (l2_random_start, l2_steepest_step, l2_project, l2_distance),
    "L1": (l1_random_start, l1_steepest_step, l1_project, l1_distance),
}
