"""Threat models: the geometry of a norm ball around an image, inside [0, 1].

A norm is a few small functions; `threat(norm=..., epsilon=...)` puts them together with a radius.
"""

import fractions
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras import noise


class Threat(NamedTuple):
    """A norm ball of one radius, made by `threat`.

    Attributes:
        norm: 'Linf' or 'L2'.
        epsilon: the radius in pixel units of [0, 1].
        epsilon_fraction: the radius as typed, such as '8/255'.
        random_start: `(x, seeds) -> x_adv`, a random point of the ball, clipped to [0, 1].
        steepest_step: `(gradient) -> direction` of unit norm along which a linear loss rises most.
        project: `(x_adv, x) -> x_adv` inside the ball and [0, 1].
        distance: `(x_adv, x) -> [batch]` in the norm.
    """

    norm: str
    epsilon: float
    epsilon_fraction: str
    random_start: Callable
    steepest_step: Callable
    project: Callable
    distance: Callable


def threat(*, norm, epsilon):
    """The threat model of perturbations whose `norm` is at most `epsilon`.

    Args:
        norm: 'Linf' or 'L2'.
        epsilon: the radius in pixel units of [0, 1]: a number or an exact fraction such as '8/255'.

    Returns:
        A `Threat`.

    Raises:
        ValueError: for an unknown norm, or a radius that is no number, negative or not finite.
    """
    if norm not in _NORMS:
        raise ValueError(f"Expected a norm out of {', '.join(_NORMS)}. Received: {norm!r}")
    radius = parse_fraction(epsilon, "epsilon")
    if radius < 0:
        raise ValueError(f"Expected a radius epsilon >= 0. Received: {epsilon!r}")
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


def parse_fraction(value, name):
    """The float nearest to a number or to an exact fraction such as '8/255'.

    Raises:
        ValueError: where it is neither, or not finite.
    """
    try:
        number = float(fractions.Fraction(value)) if isinstance(value, str) else float(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"Expected {name} as a finite number or a fraction such as '8/255'. Received: {value!r}")
    return number


def linf_random_start(x, seeds, *, epsilon):
    """Uniform in the cube of half-side `epsilon` around `x`."""
    return _clip(x + noise.uniform(seeds, tuple(x.shape[1:]), -epsilon, epsilon))


def linf_steepest_step(gradient):
    """The gradient's sign."""
    return tf.sign(gradient)


def linf_project(x_adv, x, *, epsilon):
    """The nearest point of the cube around `x`, within [0, 1]."""
    return _clip(tf.clip_by_value(x_adv, x - epsilon, x + epsilon))


def linf_distance(x_adv, x):
    """The largest absolute difference: `[batch]`."""
    delta = tf.convert_to_tensor(x_adv - x)
    return tf.reduce_max(tf.abs(delta), axis=_image_axes(delta))


def l2_random_start(x, seeds, *, epsilon):
    """Uniform in the Euclidean ball of radius `epsilon` around `x`."""
    shape = tuple(x.shape[1:])
    direction = l2_steepest_step(noise.normal(noise.fold_in(seeds, 0), shape))
    unit = noise.uniform(noise.fold_in(seeds, 1), (1,) * len(shape))
    return _clip(x + epsilon * unit ** (1.0 / math.prod(shape)) * direction)


def l2_steepest_step(gradient):
    """The gradient divided by its Euclidean norm; zero where it is zero."""
    # Scaled by the largest entry first: squares of tiny gradients would underflow.
    largest = tf.reduce_max(tf.abs(gradient), axis=_image_axes(gradient), keepdims=True)
    scaled = tf.math.divide_no_nan(gradient, largest)
    return tf.math.divide_no_nan(scaled, _l2_norm(scaled))


def l2_project(x_adv, x, *, epsilon):
    """Scaled back to the ball around `x`, then clipped to [0, 1] (which only brings it nearer to `x`)."""
    delta = x_adv - x
    norm = _l2_norm(delta)
    return _clip(x + delta * tf.where(norm > epsilon, tf.math.divide_no_nan(epsilon, norm), 1.0))


def l2_distance(x_adv, x):
    """The Euclidean distance: `[batch]`."""
    return tf.norm(tf.reshape(x_adv - x, (tf.shape(x)[0], -1)), axis=-1)


def _clip(x):
    return tf.clip_by_value(x, 0.0, 1.0)


def _image_axes(x):
    return list(range(1, x.shape.rank))


def _l2_norm(delta):
    return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=_image_axes(delta), keepdims=True))


_NORMS = {
    "Linf": (linf_random_start, linf_steepest_step, linf_project, linf_distance),
    "L2": (l2_random_start, l2_steepest_step, l2_project, l2_distance),
}
