"""How a gradient becomes a step.

A step moves an image by `step_size * direction`. `by_norm` is for the paper's PGD-40 and MultiTargeted: in Linf the
optimiser of its released code, in L2 and L1, for which that code has none, steps of one length along the gradient.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf
from absl import logging

from robust_keras import schedules, threats

# The largest gradient of a run down to which Adam's epsilon is what it is said to be.
_ORDINARY = 2.0**-10


class StepRule(NamedTuple):
    """How a gradient becomes a direction.

    Attributes:
        name: what results call it, with its settings.
        init: `(x) -> state`, a tuple of tensors.
        update: `(gradient, state, step, threat) -> (direction, state)`; the attack adds `step_size * direction`.
        length: `(threat) -> float`, of a direction in the norm; None where that is not known.
    """

    name: str
    init: Callable
    update: Callable
    length: Callable | None = None


class ByNorm(NamedTuple):
    """A rule for each threat model: call it with one.

    Attributes:
        name: that of the rule in Linf.
        linf: the rule in Linf; elsewhere steps are normalised, and their sizes in diameters of the ball.
    """

    name: str
    linf: StepRule

    def __call__(self, threat: threats.Threat) -> StepRule:
        return self.linf if threat.norm == "Linf" else _normalised("normalised, in diameters", lambda t: 2 * t.epsilon)


def steepest() -> StepRule:
    """The direction of unit norm along which a linear loss rises most: the sign for Linf, gradient / norm for L2."""
    return StepRule(
        "steepest",
        lambda x: (),
        lambda gradient, state, step, threat: (threat.steepest_step(gradient), state),
        lambda threat: 1.0,
    )


def adam(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-9) -> StepRule:
    """Adam (Kingma & Ba 2015) on the pixels, without a sign: the inner optimiser of the paper's released code.

    Its steps do not depend on the scale of the loss: where the root of an example's second moment is nowhere above
    2^-10, `epsilon` shrinks with its largest entry. Where it is, as with logits of ordinary size, this is Adam to the
    bit. Along coordinates, it suits Linf; in L2 it walks along the gradient's sign, which leads less far.
    """

    def init(x):
        return tf.zeros_like(x), tf.zeros_like(x)

    def update(gradient, state, step, threat):
        first, second = state
        first = beta_1 * first + (1.0 - beta_1) * gradient
        second = beta_2 * second + (1.0 - beta_2) * tf.square(gradient)
        count = tf.cast(step + 1, tf.float32)
        size = tf.sqrt(second / (1.0 - beta_2**count))
        largest = tf.reduce_max(size, axis=list(range(1, size.shape.rank)), keepdims=True)
        floor = epsilon * tf.minimum(largest / _ORDINARY, 1.0)
        return tf.math.divide_no_nan(first / (1.0 - beta_1**count), size + floor), (first, second)

    def length(threat):
        return 1.0 if threat.norm == "Linf" else math.inf  # Elsewhere by the number of pixels.

    return StepRule(f"adam(beta_1={beta_1}, beta_2={beta_2}, epsilon={epsilon})", init, update, length)


def by_norm(*, beta_1: float = 0.9, beta_2: float = 0.999, epsilon: float = 1e-9) -> ByNorm:
    """`adam` in Linf; in L2 and L1 steps of one length, whose sizes are in diameters (two radii) of the ball.

    So one schedule, such as Adam's rates of .1, .01 and .0001, serves all norms and radii. In L2 a step leads along the
    gradient, in L1 along the signs of its largest hundredth (Tramèr & Boneh 2019, https://arxiv.org/abs/1904.13000).
    The paper and its released code, which is for Linf alone, say nothing of these two: they are this project's choice.

    Args:
        beta_1: of `adam`, like the others.
        beta_2: see there.
        epsilon: see there.
    """
    linf = adam(beta_1=beta_1, beta_2=beta_2, epsilon=epsilon)
    return ByNorm(linf.name, linf)


def resolve(
    step_rule: StepRule | ByNorm | None,
    step_size: float | str | Callable | dict | None,
    *,
    threat: threats.Threat,
    num_steps: int,
    default: Callable = steepest,
) -> tuple[StepRule, Callable]:
    """The rule and the sizes of an attack's steps.

    Steps that together are shorter than the radius lead nowhere near what it allows, as Linf's do in L2: a warning says
    so, where their sizes are numbers or may be computed, so not those of a function while a program is traced.

    Args:
        step_rule: as an attack is given it. None is `by_norm` without a step size, and with one `default`, in L2 and L1
            steps of that length.
        step_size: a number, a fraction such as '2/255', a function of the step, or one of these by norm; None for .1,
            .01 from half of the steps and .0001 from three quarters, as the released code's PGD-40 has it.
        threat: the threat model; of a `threats.part_of` one, steps are those of the whole, as much shorter.
        num_steps: of the attack.
        default: makes the rule in Linf where there is a step size alone.

    Returns:
        `(step_rule, step_size_fn)`: a `StepRule` and a function of the step.

    Raises:
        ValueError: for a step size that is not positive, or not there for the norm.
    """
    if threat.whole is not None:  # A part of a ball: the steps of the whole, as much shorter.
        whole = threat.whole
        rule, size_of = resolve(step_rule, step_size, threat=whole, num_steps=num_steps, default=default)
        part = rule._replace(update=lambda gradient, state, step, _: rule.update(gradient, state, step, whole))
        return part, lambda step: threat.share * size_of(step)
    size: Any = step_size
    if isinstance(step_size, dict):
        if threat.norm not in step_size:
            raise ValueError(f"Expected a step_size for the norm {threat.norm}. Received: {step_size!r}")
        size = step_size[threat.norm]
    if step_rule is None:
        if size is None:
            step_rule = by_norm()
        else:
            step_rule = default() if threat.norm == "Linf" else _normalised("normalised", lambda threat: 1.0)
    if isinstance(step_rule, ByNorm):
        step_rule = step_rule(threat)
    if size is None:
        size = functools.partial(
            schedules.piecewise_constant, boundaries=(num_steps // 2, num_steps * 3 // 4), values=(0.1, 0.01, 0.0001)
        )
    size_fn = step_size_fn(size)
    if step_rule.length is not None and (tf.executing_eagerly() or not callable(size)):
        _check_reach(step_rule.length(threat), size if not callable(size) else size_fn, num_steps, threat)
    return step_rule, size_fn


def _check_reach(length, size, num_steps, threat):
    """Warns of steps that are too short together; `size` is a number, a fraction or a function of the step."""
    if callable(size):
        reach = length * sum(float(size(tf.constant(k))) for k in range(num_steps))
    else:
        reach = length * num_steps * threats.parse_fraction(size, "step_size")
    if reach < threat.epsilon * (1 - 1e-6):
        _warn(
            f"Expected steps that together reach the radius, {threat.norm} {threat.epsilon_fraction}. Received: "
            f"{num_steps} of {reach:.3g} in all, of {threat.epsilon:.3g}: bind a larger step_size, or in training add "
            f"--gin_file=gin/threats/{threat.norm.lower()}_training.gin"
        )


@functools.cache  # Each once, however often a program is traced.
def _warn(message):
    logging.warning("%s", message)


def step_size_fn(step_size: float | str | Callable) -> Callable:
    """A function of the step, from one or from a number or fraction such as '2/255'.

    Raises:
        ValueError: for a number that is not positive.
    """
    if callable(step_size):
        return step_size
    value = threats.parse_fraction(step_size, "step_size")
    if value <= 0:
        raise ValueError(f"Expected step_size > 0. Received: {step_size!r}")
    return lambda step: tf.fill(tf.shape(step), value)


def check_restarts(num_restarts: int, random_start: bool) -> None:
    """Raises ValueError for several restarts from one and the same start."""
    if num_restarts > 1 and not random_start:
        raise ValueError(
            "Expected random_start=True with num_restarts > 1: the restarts would all be alike. "
            f"Received: num_restarts={num_restarts}, random_start=False"
        )


def _normalised(name, length_fn):
    """Steps of the length `length_fn(threat)`, in L1 spread over the largest hundredth of the gradient."""

    def update(gradient, state, step, threat):
        direction = threats.l1_sparse_step(gradient) if threat.norm == "L1" else threat.steepest_step(gradient)
        return length_fn(threat) * direction, state

    return StepRule(name, lambda x: (), update, length_fn)
