"""Auto-PGD: projected gradient ascent with momentum that halves its step size by itself.

Croce & Hein 2020 (https://arxiv.org/abs/2003.01690, algorithm 1) for Linf and L2; Croce & Hein 2021
(https://arxiv.org/abs/2103.01208) for L1. Details follow the reference implementation, so that from equal starting
points the two break the same examples.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import compilation, losses, noise, threats
from robust_keras.attacks import stepwise


class _Ascent(NamedTuple):
    """What is ascended, and how: the settings of `apgd`, and

    loss_fn: `(logits, labels, target_classes) -> [batch]`.
    num_targets: classes to aim at, in falling order of their clean logits; 1 for a loss that has no target.
    """

    loss_fn: Callable
    num_targets: int
    threat: threats.Threat
    num_steps: int
    num_restarts: int
    eot_steps: int
    rho: float
    shrinking_radius: bool


@stepwise.attack
def apgd(
    *,
    threat: threats.Threat,
    loss_fn: Callable = losses.cross_entropy,
    num_steps: int = 100,
    num_restarts: int = 1,
    eot_steps: int = 1,
    rho: float = 0.75,
    shrinking_radius: bool = False,
) -> stepwise.Search:
    """APGD on an untargeted loss: 'apgd-ce' with `cross_entropy`, 'apgd-dlr' with `dlr`.

    Args:
        threat: a `threats.Threat`.
        loss_fn: `(logits, labels) -> [batch]`, ascended.
        num_steps: gradient steps of a restart, an int >= 1.
        num_restarts: independent random starts, an int >= 1.
        eot_steps: gradients averaged at each point (expectation over transformation, for randomised models).
        rho: a step size is halved where fewer than this share of the steps since the last checkpoint raised the loss.
        shrinking_radius: L1 only: 30 % of the steps within three times the radius, 30 % within twice, 40 % within it.

    Raises:
        ValueError: for counts under 1, or a shrinking radius with a norm other than L1 or fewer than three steps.
    """
    name = getattr(loss_fn, "func", loss_fn).__name__

    def untargeted(logits, labels, target_classes):
        return loss_fn(logits, labels)

    settings = (threat, num_steps, num_restarts, eot_steps, rho, shrinking_radius)
    return _search({"cross_entropy": "apgd-ce"}.get(name, f"apgd-{name}"), _Ascent(untargeted, 1, *settings))


@stepwise.attack
def apgd_targeted(
    *,
    threat: threats.Threat,
    num_targets: int = 9,
    num_steps: int = 100,
    num_restarts: int = 1,
    eot_steps: int = 1,
    rho: float = 0.75,
    shrinking_radius: bool = False,
) -> stepwise.Search:
    """APGD on the targeted DLR loss, 'apgd-t': one target after the other, in falling order of their clean logits.

    Args:
        threat: see `apgd`, like all others but `num_targets`; restarts are per target.
        num_targets: wrong classes to aim at; all of them where there are fewer.

    Raises:
        ValueError: see `apgd`; for num_targets under 1.
    """
    settings = (threat, num_steps, num_restarts, eot_steps, rho, shrinking_radius)
    return _search("apgd-t", _Ascent(losses.targeted_dlr, num_targets, *settings))


class _Norm(NamedTuple):
    """What APGD does differently in each norm.

    Attributes:
        draw: `(seeds, shape) -> noise`, `[batch, *shape]`.
        start: `(x, noise, epsilon) -> x_adv`.
        move: `(x, state, epsilon, momentum) -> x_adv`, one gradient step.
        scale: the first step size in units of epsilon.
        windows: `(num_steps) -> [int]`, the steps from each checkpoint to the next.
        adapt: `(x, state, step_size_0, window, rho) -> (state, restarts)`: at a checkpoint, new step sizes, and which
            examples go back to their best point.
        reset: `(x, x_adv, given) -> dict`, this norm's own part of the state when a run begins; `given` says whether
            its point was handed over from a larger radius.
    """

    draw: Callable
    start: Callable
    move: Callable
    scale: float
    windows: Callable
    adapt: Callable
    reset: Callable


def _search(name, ascent):
    stepwise.check_counts(num_steps=ascent.num_steps, num_restarts=ascent.num_restarts, eot_steps=ascent.eot_steps)
    stepwise.check_counts(num_targets=ascent.num_targets)
    if ascent.shrinking_radius and ascent.threat.norm != "L1":
        raise ValueError(f"Expected the norm L1 with shrinking_radius. Received: {ascent.threat.norm}")
    if ascent.shrinking_radius and ascent.num_steps < 3:
        raise ValueError(f"Expected num_steps >= 3 with shrinking_radius. Received: {ascent.num_steps}")
    whole = ascent.threat.whole or ascent.threat
    plan = _plan(_NORMS[whole.norm], whole.epsilon, ascent.num_steps, ascent.shrinking_radius)

    def first_loss_fn(logits, labels):
        first = stepwise.target_class(tf.stop_gradient(logits), labels, tf.zeros_like(labels))
        return ascent.loss_fn(logits, labels, first)

    def num_runs(num_classes):
        return min(ascent.num_targets, num_classes - 1) * ascent.num_restarts

    start, step = (functools.partial(function, ascent, plan) for function in (_start, _step))
    return stepwise.Search(name, num_runs, len(plan.epsilon), start, step, first_loss_fn)


def _start(ascent, plan, x, labels, clean_logits, seeds, run):
    norm = _NORMS[ascent.threat.norm]
    x_adv = norm.start(x, norm.draw(seeds, tuple(x.shape[1:])), float(plan.epsilon[0]) * ascent.threat.share)
    zeros = tf.zeros_like(labels, tf.float32)
    image = tf.zeros_like(x)
    return {
        "x_adv": x_adv,
        "previous": x_adv,
        "gradient": image,
        "x_best": x_adv,
        "gradient_best": image,
        "loss_best": zeros,
        "loss_best_at_checkpoint": zeros,
        "loss": zeros,
        "num_rises": zeros,
        "was_reduced": tf.zeros_like(zeros, tf.bool),
        "step_size": zeros,
        "target_classes": stepwise.target_class(clean_logits, labels, run // ascent.num_restarts),
        **norm.reset(x, x_adv, ascent.shrinking_radius),
    }


def _step(ascent, plan, logits_fn, x, labels, state, k):
    norm = _NORMS[ascent.threat.norm]
    now = _Plan(*(tf.gather(tf.constant(column), tf.minimum(k, len(column) - 1)) for column in plan))
    # Where a run begins, its gradient is zero: the point stays where it is, or is brought within a smaller radius.
    radius = stepwise.expand(now.epsilon, x) * ascent.threat.share
    step_size_0 = norm.scale * tf.reshape(radius, (-1,))
    x_adv = norm.move(x, state, radius, stepwise.expand(now.momentum, x))
    logits, loss, gradient = _evaluate(
        logits_fn, x_adv, lambda logits: ascent.loss_fn(logits, labels, state["target_classes"]), ascent.eot_steps
    )
    fresh = norm.reset(x, x_adv, ascent.shrinking_radius) | {"step_size": step_size_0}
    state = _take_note(state, x_adv, loss, gradient, now.begins)
    state |= {key: tf.where(now.begins, fresh[key], state[key]) for key in fresh}
    adapted, goes_back = norm.adapt(x, state, step_size_0, now.window, ascent.rho)
    check = now.window > 0
    state |= {key: tf.where(check, value, state[key]) for key, value in adapted.items()}
    goes_back = check & goes_back
    state |= _go_on(state, x_adv, gradient, goes_back, now.ends)
    if ascent.shrinking_radius:
        state["gradient"] = stepwise.choose(now.ends, tf.zeros_like(x), state["gradient"])
    return state, x_adv, now.counts & losses.is_wrong(logits, labels)


@compilation.fused
def _take_note(state, x_adv, loss, gradient, begins):
    """The state after the evaluation of a point, before step sizes are adapted."""
    better = begins | (loss > state["loss_best"])
    return state | {
        "x_adv": x_adv,
        "previous": state["x_adv"],
        "gradient": gradient,
        "x_best": stepwise.choose(better, x_adv, state["x_best"]),
        "gradient_best": stepwise.choose(better, gradient, state["gradient_best"]),
        "loss_best": tf.where(better, loss, state["loss_best"]),
        "loss_best_at_checkpoint": tf.where(begins, loss, state["loss_best_at_checkpoint"]),
        # The reference compares the first loss of a run with zero.
        "loss": tf.where(begins, 0.0, loss),
        "num_rises": tf.where(begins, 0.0, state["num_rises"] + tf.cast(loss > state["loss"], tf.float32)),
        "was_reduced": begins | state["was_reduced"],
    }


@compilation.fused
def _go_on(state, x_adv, gradient, goes_back, ends):
    """The point to go on from, and its gradient."""
    return {
        "x_adv": stepwise.choose(goes_back | ends, state["x_best"], x_adv),
        "gradient": stepwise.choose(goes_back, state["gradient_best"], gradient),
    }


class _Plan(NamedTuple):
    """What is known before a run: arrays over its steps; each step is the evaluation of one point."""

    epsilon: np.ndarray  # the radius
    begins: np.ndarray  # whether the point is a start, not the result of a gradient step
    momentum: np.ndarray  # the weight of the gradient step against that of the last displacement
    ends: np.ndarray  # whether it is the last point within this radius
    window: np.ndarray  # at a checkpoint, the steps since the last one; elsewhere zero
    counts: np.ndarray  # whether a misclassified point is one of the threat model


def _plan(norm, epsilon, num_steps, shrinking_radius):
    if shrinking_radius:
        early = math.ceil(0.3 * num_steps)
        phases = [(3 * epsilon, early), (2 * epsilon, early), (epsilon, num_steps - 2 * early)]
    else:
        phases = [(epsilon, num_steps)]
    rows = []
    for radius, steps in phases:
        checkpoints = dict(zip(np.cumsum(windows := norm.windows(steps)), windows))
        rows += [
            (radius, k == 0, 1.0 if k == 1 else 0.75, k == steps, checkpoints.get(k, 0), radius == epsilon)
            for k in range(steps + 1)
        ]
    dtypes = (np.float32, bool, np.float32, bool, np.float32, bool)
    return _Plan(*(np.array(column, dtype) for column, dtype in zip(zip(*rows), dtypes)))


def _evaluate(logits_fn, x_adv, loss_fn, eot_steps):
    """Logits and losses, the last of `eot_steps`, and the mean gradient."""

    def again(i, logits, loss, total):
        logits, loss, gradient = stepwise.value_and_gradient(logits_fn, x_adv, loss_fn)
        return i + 1, logits, loss, total + gradient

    logits, loss, total = stepwise.value_and_gradient(logits_fn, x_adv, loss_fn)
    if eot_steps > 1:
        _, logits, loss, total = tf.while_loop(
            lambda i, *_: i < eot_steps, again, (tf.constant(1), logits, loss, total)
        )
        total /= eot_steps
    return logits, losses.nan_is_lowest(loss), total


def _halving_windows(num_steps):
    window, shortest, shorter = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    windows = []
    while sum(windows) + window <= num_steps:
        windows.append(window)
        window = max(window - shorter, shortest)
    return windows


def _halve(x, state, step_size_0, window, rho):
    oscillates = state["num_rises"] <= window * rho
    stalls = ~state["was_reduced"] & (state["loss_best_at_checkpoint"] >= state["loss_best"])
    reduced = oscillates | stalls
    adapted = {
        "step_size": tf.where(reduced, state["step_size"] / 2.0, state["step_size"]),
        "num_rises": tf.zeros_like(state["num_rises"]),
        "was_reduced": reduced,
        "loss_best_at_checkpoint": state["loss_best"],
    }
    return adapted, reduced


def _linf_start(x, draw, epsilon):
    largest = tf.reduce_max(tf.abs(draw), axis=_image_axes(draw), keepdims=True)
    return tf.clip_by_value(x + epsilon * draw / (largest + 1e-12), 0.0, 1.0)


def _linf_move(x, state, epsilon, momentum):
    def inside(x_adv):
        return tf.clip_by_value(tf.clip_by_value(x_adv, x - epsilon, x + epsilon), 0.0, 1.0)

    x_adv = state["x_adv"]
    stepped = inside(x_adv + stepwise.expand(state["step_size"], x) * tf.sign(state["gradient"]))
    return inside(x_adv + (stepped - x_adv) * momentum + (x_adv - state["previous"]) * (1.0 - momentum))


def _l2_norm(delta):
    return tf.sqrt(tf.reduce_sum(tf.square(delta), axis=_image_axes(delta), keepdims=True))


def _l2_start(x, draw, epsilon):
    return tf.clip_by_value(x + epsilon * draw / (_l2_norm(draw) + 1e-12), 0.0, 1.0)


def _l2_move(x, state, epsilon, momentum):
    def inside(x_adv):
        norm = _l2_norm(x_adv - x)
        return tf.clip_by_value(x + (x_adv - x) * (tf.minimum(epsilon, norm) / (norm + 1e-12)), 0.0, 1.0)

    x_adv, gradient = state["x_adv"], state["gradient"]
    # Upstream's 1e-12 would shorten steps along tiny gradients, and the squares of huge ones overflow.
    largest = tf.reduce_max(tf.abs(gradient), axis=_image_axes(gradient), keepdims=True)
    gradient *= threats.ordinary_scale(largest, at_least=2.0**-30)
    stepped = inside(x_adv + stepwise.expand(state["step_size"], x) * gradient / (_l2_norm(gradient) + 1e-12))
    return inside(x_adv + (stepped - x_adv) * momentum + (x_adv - state["previous"]) * (1.0 - momentum))


def _l1_project(delta, x, epsilon):
    # What the projection takes away is subtracted last, as in the reference: pixels keep a trace of rounding, and count
    # as changed. Without it the counts are far smaller, the steps sparser, and other examples break.
    return tf.clip_by_value((x + delta) + (threats.l1_nearest(delta, x, epsilon=epsilon) - delta), 0.0, 1.0)


def _l1_start(x, draw, epsilon):
    return _l1_project(draw, x, epsilon)


def _l1_move(x, state, epsilon, momentum):
    gradient = state["gradient"]
    num_pixels = math.prod(x.shape[1:])
    rank = tf.cast(tf.clip_by_value((1.0 - state["share"]) * num_pixels, 0.0, num_pixels - 1.0), tf.int32)
    size = tf.abs(gradient)
    direction = tf.where(size >= threats.order_statistic(size, rank), tf.sign(gradient), 0.0)
    direction /= tf.reduce_sum(tf.abs(direction), axis=_image_axes(direction), keepdims=True) + 1e-10
    stepped = state["x_adv"] + stepwise.expand(state["step_size"], x) * direction
    return _l1_project(stepped - x, x, epsilon)


def _l1_windows(num_steps):
    window = max(int(0.04 * num_steps), 1)
    return [window] * (num_steps // window)


def _num_changed(x_adv, x):
    return tf.reduce_sum(tf.cast(x_adv != x, tf.float32), axis=_image_axes(x))


def _share(num_changed, x):
    return num_changed / math.prod(x.shape[1:]) / 1.5


def _l1_reset(x, x_adv, given):
    if given:
        num_changed = _num_changed(x_adv, x)
        return {"num_changed": num_changed, "share": _share(num_changed, x)}
    zeros = _num_changed(x, x)
    return {"num_changed": zeros + math.prod(x.shape[1:]), "share": zeros + 0.2}


def _adapt_sparsity(x, state, step_size_0, window, rho):
    num_changed = _num_changed(state["x_best"], x)
    sparser = num_changed / state["num_changed"] < 0.95
    step_size = tf.where(sparser, step_size_0, state["step_size"] / 1.5)
    adapted = {
        "step_size": tf.clip_by_value(step_size, step_size_0 / 10.0, step_size_0),
        "num_changed": num_changed,
        "share": _share(num_changed, x),
    }
    return adapted, sparser


def _none(x, x_adv, given):
    return {}


_NORMS = {
    "Linf": _Norm(
        lambda seeds, shape: noise.uniform(seeds, shape, -1.0, 1.0),
        _linf_start,
        _linf_move,
        2.0,
        _halving_windows,
        _halve,
        _none,
    ),
    "L2": _Norm(noise.normal, _l2_start, _l2_move, 2.0, _halving_windows, _halve, _none),
    "L1": _Norm(noise.normal, _l1_start, _l1_move, 1.0, _l1_windows, _adapt_sparsity, _l1_reset),
}


def _image_axes(x):
    return list(range(1, x.shape.rank))
