"""Gradient attacks on any callable that returns logits.

    linf = threat(norm="Linf", epsilon="8/255")
    seeds = noise.example_seeds(run_seed=0, step=0, indices=tf.range(len(x)))
    x_adv = pgd(model, x, labels, threat=linf, loss_fn=cross_entropy, num_steps=10, step_size="2/255", seeds=seeds)

An attack is a loss, which it ascends, a step rule, a start and the threat model's projection.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras import losses, noise, schedules
from robust_keras.attacks import stepwise
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


def pgd(
    logits_fn,
    x,
    targets,
    *,
    threat,
    loss_fn,
    num_steps,
    step_size,
    seeds,
    step_rule=None,
    num_restarts=1,
    random_start=True,
):
    """Projected gradient ascent of a loss inside a threat model (Madry et al. 2017; the paper's equation 2).

    x_0 = a random point of the ball (or x itself); x_{k+1} = project(x_k + step_size * direction(gradient)). The last
    iterate is returned. Of several restarts, an example keeps the one that is misclassified, and among equals the one
    of the highest loss.

    Args:
        logits_fn: images `[batch, ...]` to logits `[batch, num_classes]`.
        x: float32 images `[batch, ...]` in [0, 1].
        targets: what to move away from, int `[batch]` or class probabilities float `[batch, num_classes]`.
        threat: a `threats.Threat`.
        loss_fn: `(logits, targets) -> [batch]`, ascended.
        num_steps: gradient steps, an int >= 1.
        step_size: in pixel units: a number, a fraction such as '2/255', or a function of the step (int32 scalar).
        seeds: int32 `[batch, 2]`, one per example.
        step_rule: a `StepRule`; `steepest()` by default.
        num_restarts: independent starts, an int >= 1.
        random_start: whether to start at a random point of the ball.

    Returns:
        float32 images like `x`, inside the ball and [0, 1]; no gradient flows through them.

    Raises:
        ValueError: for num_steps or num_restarts under 1, several restarts from one and the same start, or a
            step size that is not positive.
    """
    if num_steps < 1 or num_restarts < 1:
        raise ValueError(f"Expected num_steps and num_restarts >= 1. Received: {num_steps}, {num_restarts}")
    _check_restarts(num_restarts, random_start)
    x = tf.convert_to_tensor(x, tf.float32)
    step_size_fn = step_size if callable(step_size) else _constant(step_size)
    step_rule = step_rule or steepest()

    def run(restart):
        x_adv = threat.random_start(x, noise.fold_in(seeds, restart)) if random_start else x

        def step(k, x_adv, state):
            gradient = stepwise.value_and_gradient(logits_fn, x_adv, lambda logits: loss_fn(logits, targets))[2]
            direction, state = step_rule.update(gradient, state, k, threat)
            return k + 1, threat.project(x_adv + step_size_fn(k) * direction, x), state

        return tf.while_loop(
            lambda k, *_: k < num_steps,
            step,
            (tf.constant(0), x_adv, step_rule.init(x)),
            maximum_iterations=num_steps,
        )[1]

    if num_restarts == 1:
        return tf.stop_gradient(run(0))

    labels = losses.as_labels(targets)

    def restart(r, best, best_broken, best_loss):
        x_adv = run(r)
        logits = logits_fn(x_adv)
        broken = tf.not_equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels)
        loss = loss_fn(logits, targets)
        better = (broken & ~best_broken) | (tf.equal(broken, best_broken) & (loss > best_loss))
        best = tf.where(tf.reshape(better, (-1,) + (1,) * (x.shape.rank - 1)), x_adv, best)
        return r + 1, best, broken | best_broken, tf.where(better, loss, best_loss)

    nothing = (tf.constant(0), x, tf.zeros_like(labels, tf.bool), tf.fill(tf.shape(labels), tf.float32.min))
    return tf.stop_gradient(
        tf.while_loop(lambda r, *_: r < num_restarts, restart, nothing, maximum_iterations=num_restarts)[1]
    )


def transfer(logits_fn, x, labels, *, threat, surrogate, attack, seeds):
    """An attack on another classifier, for one whose own gradients may be masked.

    Args:
        logits_fn: the classifier under evaluation, which is not asked.
        x: float32 images `[batch, ...]` in [0, 1].
        labels: int `[batch]`.
        threat: a `threats.Threat`, that of `attack`.
        surrogate: images to logits, such as `loading.load_logits_fn` returns.
        attack: `(logits_fn, x, labels, *, seeds) -> x_adv`.
        seeds: int32 `[batch, 2]`.

    Returns:
        What `attack` makes of the surrogate.
    """
    return attack(surrogate, x, labels, seeds=seeds)


@stepwise.attack
def multi_targeted(
    *, threat, num_steps=200, num_restarts=10, num_targets=9, step_rule=None, step_size=None, random_start=True
):
    """MultiTargeted (Gowal et al. 2019, https://arxiv.org/abs/1910.09338): PGD on the margin of each wrong class.

    The margin of class t is `z_t - z_y`. Of a run's `num_steps + 1` points, any misclassified one counts. Gowal et al.
    2020 do not say how they step: `step_rule` and `step_size` default to the optimiser of their released code's PGD.

    Args:
        threat: a `threats.Threat`.
        num_steps: gradient steps of a run, an int >= 1.
        num_restarts: random starts per target class, an int >= 1.
        num_targets: wrong classes of the highest clean logits to aim at; all of them where there are fewer.
        step_rule: a `StepRule`; `adam()` by default, `steepest()` for sign steps in Linf.
        step_size: in pixel units: a number, a fraction such as '2/255', or a function of the step; by default .1, .01
            from half of the steps, .0001 from three quarters.
        random_start: whether to start at random points of the ball.

    Raises:
        ValueError: for counts under 1, several restarts from one start, or a step size that is not positive.
    """
    if min(num_steps, num_restarts, num_targets) < 1:
        raise ValueError(
            "Expected num_steps, num_restarts and num_targets >= 1. "
            f"Received: {num_steps}, {num_restarts}, {num_targets}"
        )
    _check_restarts(num_restarts, random_start)
    step_rule = step_rule or adam()
    if step_size is None:
        step_size = functools.partial(
            schedules.piecewise_constant, boundaries=(num_steps // 2, num_steps * 3 // 4), values=(0.1, 0.01, 0.0001)
        )
    step_size_fn = step_size if callable(step_size) else _constant(step_size)

    def num_targets_of(num_classes):
        return min(num_targets, num_classes - 1)

    def start(x, labels, clean_logits, seeds, run):
        return {
            # Every target once, then again: most examples that break do so before the second round.
            "target_classes": stepwise.target_class(clean_logits, labels, run % num_targets_of(clean_logits.shape[-1])),
            "x_adv": threat.random_start(x, seeds) if random_start else x,
            "rule": step_rule.init(x),
        }

    def step(logits_fn, x, labels, state, k):
        x_adv = state["x_adv"]
        logits, _, gradient = stepwise.value_and_gradient(
            logits_fn, x_adv, lambda logits: losses.targeted_margin(logits, labels, state["target_classes"])
        )
        direction, rule = step_rule.update(gradient, state["rule"], stepwise.expand(k, x), threat)
        moved = threat.project(x_adv + stepwise.expand(step_size_fn(k), x) * direction, x)
        return {**state, "x_adv": moved, "rule": rule}, x_adv, stepwise.is_wrong(logits, labels)

    return stepwise.Search(
        "multi-targeted", lambda num_classes: num_restarts * num_targets_of(num_classes), num_steps + 1, start, step
    )


def _check_restarts(num_restarts, random_start):
    if num_restarts > 1 and not random_start:
        raise ValueError(
            "Expected random_start=True with num_restarts > 1: the restarts would all be alike. "
            f"Received: num_restarts={num_restarts}, random_start=False"
        )


def _constant(step_size):
    value = parse_fraction(step_size, "step_size")
    if value <= 0:
        raise ValueError(f"Expected step_size > 0. Received: {step_size!r}")
    return lambda step: tf.fill(tf.shape(step), value)
