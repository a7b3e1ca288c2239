"""How a gradient becomes a step."""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras.threats import parse_fraction


class StepRule(NamedTuple):
    """How a gradient becomes a direction.

    Attributes:
        name: what results call it, with its settings.
        init: `(x) -> state`, a tuple of tensors.
        update: `(gradient, state, step, threat) -> (direction, state)`; the attack adds `step_size * direction`.
    """

    name: str
    init: Callable
    update: Callable


def steepest():
    """The direction of unit norm along which a linear loss rises most: the sign for Linf, gradient / norm for L2."""
    return StepRule(
        "steepest", lambda x: (), lambda gradient, state, step, threat: (threat.steepest_step(gradient), state)
    )


def adam(*, beta_1=0.9, beta_2=0.999, epsilon=1e-9):
    """Adam (Kingma & Ba 2015) on the pixels, without a sign: the inner optimiser of the paper's released code."""

    def init(x):
        return tf.zeros_like(x), tf.zeros_like(x)

    def update(gradient, state, step, threat):
        first, second = state
        first = beta_1 * first + (1.0 - beta_1) * gradient
        second = beta_2 * second + (1.0 - beta_2) * tf.square(gradient)
        count = tf.cast(step + 1, tf.float32)
        direction = (first / (1.0 - beta_1**count)) / (tf.sqrt(second / (1.0 - beta_2**count)) + epsilon)
        return direction, (first, second)

    return StepRule(f"adam(beta_1={beta_1}, beta_2={beta_2}, epsilon={epsilon})", init, update)


def check_restarts(num_restarts, random_start):
    """Raises ValueError for several restarts from one and the same start."""
    if num_restarts > 1 and not random_start:
        raise ValueError(
            "Expected random_start=True with num_restarts > 1: the restarts would all be alike. "
            f"Received: num_restarts={num_restarts}, random_start=False"
        )


def step_size_fn(step_size):
    """A function of the step, from one or from a number or fraction such as '2/255'."""
    if callable(step_size):
        return step_size
    value = parse_fraction(step_size, "step_size")
    if value <= 0:
        raise ValueError(f"Expected step_size > 0. Received: {step_size!r}")
    return lambda step: tf.fill(tf.shape(step), value)
