"""Signs that gradients do not tell how robust a classifier is (Athalye et al. 2018, https://arxiv.org/abs/1802.00420)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks import attack as attacks_of
from robust_keras.attacks import stepwise
from robust_keras.attacks.pgd import pgd
from robust_keras.engines import replicas

# Logits of the same image are the same, but for rounding, which other sizes of the batch may change.
_SAME_PASS, _SAME_BATCH = 1e-4, 1e-2
# What begins the name of the figure of an attack.
_OF_ATTACK = "zero_gradients:"


class Diagnosis(NamedTuple):
    """What `diagnose` finds.

    Attributes:
        figures: by name, as JSON can hold them.
        proposed: float32 `[n, ...]` each, the images that PGD of 5 and of 50 steps ended with.
    """

    figures: dict[str, float | None]
    proposed: list[np.ndarray]


def diagnose(
    logits_fn: Callable,
    x: tf.Tensor,
    labels: tf.Tensor,
    seeds: tf.Tensor,
    *,
    threat: threats.Threat,
    attacks: Sequence[attacks_of.Attack] = (),
    batch_size: int | None = None,
    takes_other_sizes: bool = True,
) -> Diagnosis:
    """Looks at correctly classified examples.

    Args:
        logits_fn: images to logits.
        x: float32 `[n, ...]` in [0, 1].
        labels: int32 `[n]`.
        seeds: int32 `[n, 2]`.
        threat: a `threats.Threat`.
        attacks: records of attacks, the gradient of whose losses is looked at too.
        batch_size: over all replicas; n by default.
        takes_other_sizes: whether the model takes batches of another size too.

    Returns:
        A `Diagnosis` of these figures, None for one that is no number:
        `logits_spread`: the largest distance between normalised logits of the same image in five passes;
        `zero_gradients`: the share of examples whose margin has no gradient at all;
        `zero_gradients:NAME`: the same for the loss of the attack of that name;
        `non_finite_gradients`: the share for which one of these gradients has entries that are no finite numbers;
        `gradient_mismatch`: the share of those with a gradient for which it is off by more than a factor of two from
        finite differences along its sign;
        `margin`, `margin_5_steps`, `margin_50_steps`: the mean margin on clean images and after PGD of so many steps;
        `batch_dependence`: the largest change of an image's logits among other images, in units of the length of the
        logits without their mean.
    """
    batch_size = batch_size or len(x)
    predict = _in_batches(logits_fn, batch_size)
    logits = [predict(x) for _ in range(5)]
    passes = np.stack(logits)
    passes /= np.linalg.norm(passes, axis=-1, keepdims=True) + 1e-10
    spread = np.linalg.norm(passes[:, None] - passes[None], axis=-1).max()

    zero, mismatch = _in_batches(functools.partial(_gradients, logits_fn), batch_size)(x, labels)
    figures: dict[str, Any] = {
        "logits_spread": spread,
        "zero_gradients": zero.mean(),
        **_loss_figures(logits_fn, attacks, batch_size, x, labels),
        "gradient_mismatch": mismatch[~zero].mean() if not zero.all() else 0.0,
        "margin": np.mean(losses.margin(logits[-1], labels)),
    }
    proposed = []
    for num_steps in (5, 50):
        attacked = functools.partial(_attacked, logits_fn, threat, num_steps)
        x_adv, margin = _in_batches(attacked, batch_size)(x, labels, seeds)
        proposed.append(x_adv)
        figures[f"margin_{num_steps}_steps"] = np.mean(margin)
    figures["batch_dependence"] = _batch_dependence(predict, logits[0], logits_fn, x, batch_size, takes_other_sizes)
    # JSON knows no NaN.
    return Diagnosis({name: float(value) if np.isfinite(value) else None for name, value in figures.items()}, proposed)


def flags(figures: dict[str, float | None]) -> list[str]:
    """The warnings that the figures of `diagnose` call for; those of an older version may lack some."""

    def exceeds(name, limit):
        value = figures.get(name, 0.0)
        return value is None or value > limit

    no_gradient = exceeds("zero_gradients", 0)
    is_random = exceeds("logits_spread", _SAME_PASS)
    found = {
        "randomized_model": is_random,
        "zero_gradients": no_gradient or bool(without_gradients(figures)),
        "non_finite_gradients": exceeds("non_finite_gradients", 0),
        "gradient_mismatch": exceeds("gradient_mismatch", 0.1),
        "loss_did_not_rise": _did_not_rise(figures, no_gradient),
        # Of a randomised model nothing more can be told.
        "batch_dependent_model": exceeds("batch_dependence", _SAME_BATCH) and not is_random,
    }
    return [name for name, is_found in found.items() if is_found]


def without_gradients(figures: dict[str, float | None]) -> list[str]:
    """Names of the attacks whose losses had no gradient on some of the examples."""
    return [name.removeprefix(_OF_ATTACK) for name, share in figures.items() if name.startswith(_OF_ATTACK) and share]


def _did_not_rise(figures, no_gradient):
    clean, few_steps, many_steps = (figures[name] for name in ("margin", "margin_5_steps", "margin_50_steps"))
    if None in (clean, few_steps, many_steps):
        return True
    rounding = 1e-5 * max(abs(clean), 1.0)
    if max(abs(few_steps - clean), abs(many_steps - clean)) <= rounding and not no_gradient:
        return False  # A radius of zero.
    # Small steps may reach a little less than large ones (single pixels in L1), and far less only against the gradient.
    return many_steps <= clean + max(0.5 * (few_steps - clean), rounding)


def _in_batches(fn, batch_size):
    """`fn` of tensors `[batch, ...]`, compiled over all replicas, as a function of any number of examples."""
    compiled = replicas.over_replicas(fn)

    def call(*inputs):
        pieces, num_examples = [], len(inputs[0])
        for start in range(0, num_examples, batch_size):
            packed = np.resize(np.arange(start, min(start + batch_size, num_examples)), batch_size)
            found = compiled(*(tf.gather(each, packed) for each in inputs))
            pieces.append(tf.nest.map_structure(lambda part, n=num_examples - start: part.numpy()[:n], found))
        return tf.nest.map_structure(lambda *parts: np.concatenate(parts), *pieces)

    return call


def _gradients(logits_fn, x, labels):
    def margin(x):
        return stepwise.value_and_gradient(logits_fn, x, lambda logits: losses.margin(logits, labels))

    axes = list(range(1, x.shape.rank))
    logits, _, gradient = margin(x)
    zero = tf.reduce_all(tf.equal(gradient, 0.0), axis=axes)
    # Pixels at the edge of [0, 1] have no room for a difference.
    direction = tf.where((x > 1 / 255) & (x < 254 / 255), tf.sign(gradient), 0.0)
    slope = tf.reduce_sum(direction * gradient, axes, keepdims=True)
    # As far as a hundredth of the logits' spread, and no further than half a byte.
    spread = stepwise.expand(tf.math.reduce_std(logits, axis=-1), x)
    length = tf.minimum(0.01 * tf.math.divide_no_nan(spread, slope), 0.5 / 255)
    rise = 0.5 * (margin(x + length * direction)[1] - margin(x - length * direction)[1])
    ratio = tf.math.divide_no_nan(rise, tf.reshape(length * slope, (-1,)))
    return zero, ~((ratio > 0.5) & (ratio < 2.0))


def _loss_figures(logits_fn, attacks, batch_size, x, labels):
    """Shares of the examples where the margin or an attack's loss has no gradient, or one of no finite numbers."""
    followed = [attack for attack in attacks if attack.loss_fn is not None]
    look = functools.partial(_zero_and_non_finite, logits_fn, [*(a.loss_fn for a in followed), losses.margin])
    zero, non_finite = _in_batches(look, batch_size)(x, labels)
    figures: dict[str, float] = {}
    for attack, share in zip(followed, zero.mean(axis=0)):  # Several may have one name.
        name = f"{_OF_ATTACK}{attack.name}"
        figures[name] = max(share, figures.get(name, 0.0))
    return {**figures, "non_finite_gradients": non_finite.mean()}


def _zero_and_non_finite(logits_fn, loss_fns, x, labels):
    """Whether each loss has no gradient, bool `[batch, num_losses]`, and whether any has one of no finite numbers."""
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(x)
        logits = logits_fn(x)
        totals = [tf.reduce_sum(loss_fn(logits, labels)) for loss_fn in loss_fns]
    axes = list(range(1, x.shape.rank))
    zero, non_finite = [], tf.zeros_like(labels, tf.bool)
    for total in totals:
        # Not by `stepwise.value_and_gradient`, for which entries that are no finite numbers are zero.
        gradient = tape.gradient(total, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        is_finite = tf.math.is_finite(gradient)
        zero.append(tf.reduce_all(tf.equal(gradient, 0.0) | ~is_finite, axis=axes))
        non_finite |= tf.reduce_any(~is_finite, axis=axes)
    return tf.stack(zero, axis=1), non_finite


def _attacked(logits_fn, threat, num_steps, x, labels, seeds):
    """Images that PGD on the margin ends with, and their margins."""
    x_adv = pgd(
        logits_fn,
        x,
        labels,
        threat=threat,
        loss_fn=losses.margin,
        num_steps=num_steps,
        step_size=max(2 * threat.epsilon / num_steps, 1e-12),
        seeds=seeds,
        random_start=False,
    )
    return x_adv, losses.margin(logits_fn(x_adv), labels)


def _batch_dependence(predict, logits, logits_fn, x, batch_size, takes_other_sizes):
    """The largest change of logits `[n, num_classes]` where each image is among inverted ones."""
    num_replicas = replicas.num_replicas()
    if batch_size == num_replicas:  # An image alone has no company.
        if not takes_other_sizes:
            return 0.0
        predict = _in_batches(logits_fn, 2 * num_replicas)
    among_others = predict(tf.reshape(tf.stack([x, 1.0 - x], axis=1), (-1, *x.shape[1:])))[::2]
    scale = np.linalg.norm(logits - logits.mean(axis=-1, keepdims=True), axis=-1)
    return np.max(np.linalg.norm(among_others - logits, axis=-1) / np.maximum(scale, 1e-30))
