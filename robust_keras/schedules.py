"""Learning rates and step sizes as functions of the step (an integer tensor, the first step is 0).

A learning rate is `(step, *, num_steps) -> float32 scalar`, where `num_steps` are those of the whole run, so the same
schedule fits a run of any length. The defaults are the paper's values.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf


def multistep(
    step: Any, *, num_steps: int, base: float = 0.1, drops: Sequence[float] = (1 / 2, 3 / 4), factor: float = 0.1
) -> tf.Tensor:
    """`base`, multiplied by `factor` at each of the fractions `drops` of `num_steps` steps.

    The defaults are the paper's multistep schedule (section 3.1): ten times less half-way, and again at three quarters.

    Args:
        step: int scalar, from 0.
        num_steps: steps of the whole run.
        base: the first value.
        drops: fractions of `num_steps` in rising order.
        factor: of each drop.

    Returns:
        float32 scalar.
    """
    values = [base * factor**k for k in range(len(drops) + 1)]
    return piecewise_constant(step, boundaries=[drop * num_steps for drop in drops], values=values)


def cosine(step: Any, *, num_steps: int, base: float = 0.1) -> tf.Tensor:
    """`base * (1 + cos(pi * step / num_steps)) / 2`: from `base` to 0, without restarts (Loshchilov and Hutter 2017).

    Args:
        step: int scalar, from 0.
        num_steps: steps of the whole run.
        base: the first value.

    Returns:
        float32 scalar.
    """
    return base * (1.0 + tf.cos(math.pi * _fraction(step, num_steps))) / 2.0


def exponential(step: Any, *, num_steps: int, base: float = 0.1, final_factor: float = 0.01) -> tf.Tensor:
    """`base * final_factor ** (step / num_steps)`.

    Args:
        step: int scalar, from 0.
        num_steps: steps of the whole run.
        base: the first value.
        final_factor: what `base` is multiplied by in the end. The paper names the schedule only (Table 10); the default
            ends where its multistep schedule does.

    Returns:
        float32 scalar.
    """
    return base * tf.exp(math.log(final_factor) * _fraction(step, num_steps))


def warm_up(step: Any, *, num_steps: int, schedule: Callable, fraction: float) -> tf.Tensor:
    """A linear rise from 0 to the first value of `schedule`, which runs in the steps that are left.

    Args:
        step: int scalar, from 0.
        num_steps: steps of the whole run.
        schedule: `(step, *, num_steps)`.
        fraction: of all steps that the rise takes, rounded down to whole steps.

    Returns:
        float32 scalar.

    Raises:
        ValueError: for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"Expected a warm-up of a fraction in [0, 1) of the steps. Received: {fraction!r}")
    rise = int(fraction * num_steps)
    following = schedule(tf.maximum(step - rise, 0), num_steps=num_steps - rise)
    return following * tf.minimum(_fraction(step, rise), 1.0) if rise else following


def _fraction(step, num_steps):
    return tf.cast(step, tf.float32) / num_steps


def piecewise_constant(step: Any, *, boundaries: Sequence[float], values: Sequence[float]) -> tf.Tensor:
    """`values[k]`, where k counts the `boundaries` that `step` has reached.

    Args:
        step: int of any shape, from 0.
        boundaries: steps in rising order.
        values: one more than boundaries.

    Returns:
        float32 of the shape of `step`.

    Raises:
        ValueError: where the lengths do not fit.
    """
    if len(values) != len(boundaries) + 1:
        raise ValueError(f"Expected one more value than boundaries. Received: {len(values)} and {len(boundaries)}")
    reached = tf.cast(step, tf.float32)[..., None] >= tf.constant(list(boundaries), tf.float32)
    return tf.gather(tf.constant(list(values), tf.float32), tf.reduce_sum(tf.cast(reached, tf.int32), axis=-1))
