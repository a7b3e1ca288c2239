"""Learning rates and step sizes as functions of the step (an integer tensor, the first step is 0)."""

import tensorflow as tf


def multistep(step, *, base, num_steps, drops=(1 / 2, 3 / 4), factor=0.1):
    """`base`, multiplied by `factor` at each of the fractions `drops` of `num_steps` steps.

    The defaults are the paper's multistep schedule (section 3.1): ten times less half-way, and again at three quarters.

    Args:
        step: int scalar, from 0.
        base: the first value.
        num_steps: steps of the whole run.
        drops: fractions of `num_steps` in rising order.
        factor: of each drop.

    Returns:
        float32 scalar.
    """
    values = [base * factor**k for k in range(len(drops) + 1)]
    return piecewise_constant(step, boundaries=[drop * num_steps for drop in drops], values=values)


def piecewise_constant(step, *, boundaries, values):
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
