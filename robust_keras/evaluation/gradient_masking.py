"""Signs that gradients do not tell how robust a classifier is (Athalye et al. 2018, https://arxiv.org/abs/1802.00420)."""

import functools

import numpy as np
import tensorflow as tf

from robust_keras import losses
from robust_keras.attacks import pgd, stepwise
from robust_keras.engines import replicas

# Attacks that ask the attacked classifier for no gradients.
BLACK_BOX = ("square", "transfer")
# Attacks that aim at classes.
TARGETED = ("apgd-t", "fab-t", "multi-targeted")


def diagnose(logits_fn, x, labels, seeds, *, threat):
    """Looks at a batch of correctly classified examples.

    Args:
        logits_fn: images to logits.
        x: float32 `[batch, ...]` in [0, 1].
        labels: int32 `[batch]`.
        seeds: int32 `[batch, 2]`.
        threat: a `threats.Threat`.

    Returns:
        A dictionary of figures, as JSON can hold them:
        `logits_spread`: the largest distance between normalised logits of the same image in five passes;
        `zero_gradients`: the share of examples whose margin has no gradient at all;
        `gradient_mismatch`: the share of the others for which the gradient is off by more than a factor of two from
        finite differences along its sign;
        `margin`, `margin_5_steps`, `margin_50_steps`: the mean margin on clean images and after PGD of so many steps.
    """
    predict_fn = replicas.over_replicas(logits_fn)
    passes = np.stack([predict_fn(x).numpy() for _ in range(5)])
    passes /= np.linalg.norm(passes, axis=-1, keepdims=True) + 1e-10
    spread = np.linalg.norm(passes[:, None] - passes[None], axis=-1).max()

    zero, mismatch = (
        flags.numpy() for flags in replicas.over_replicas(functools.partial(_gradients, logits_fn))(x, labels)
    )
    figures = {
        "logits_spread": float(spread),
        "zero_gradients": float(zero.mean()),
        "gradient_mismatch": float(mismatch[~zero].mean()) if not zero.all() else 0.0,
        "margin": float(np.mean(losses.margin(predict_fn(x), labels))),
    }
    for num_steps in (5, 50):

        def margin(x, labels, seeds, num_steps=num_steps):
            x_adv = pgd.pgd(
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
            return losses.margin(logits_fn(x_adv), labels)

        figures[f"margin_{num_steps}_steps"] = float(np.mean(replicas.over_replicas(margin)(x, labels, seeds)))
    # JSON knows no NaN.
    return {name: value if np.isfinite(value) else None for name, value in figures.items()}


def flags(figures):
    """The warnings that the figures of `diagnose` call for."""
    margins = [figures[name] for name in ("margin", "margin_5_steps", "margin_50_steps")]
    found = {
        "randomized_model": figures["logits_spread"] is None or figures["logits_spread"] > 1e-4,
        "zero_gradients": figures["zero_gradients"] > 0,
        "gradient_mismatch": figures["gradient_mismatch"] > 0.1,
        "loss_did_not_rise": None in margins or _did_not_rise(*margins, figures["zero_gradients"]),
    }
    return [name for name, is_found in found.items() if is_found]


def _did_not_rise(clean, few_steps, many_steps, zero_gradients):
    rounding = 1e-5 * max(abs(clean), 1.0)
    if max(abs(few_steps - clean), abs(many_steps - clean)) <= rounding and not zero_gradients:
        return False  # A radius of zero.
    # Small steps may reach a little less than large ones (single pixels in L1), and far less only against the gradient.
    return many_steps <= clean + max(0.5 * (few_steps - clean), rounding)


def attack_flags(names, broken, standing, baseline_broken):
    """The warnings that verdicts call for.

    Args:
        names: of the attacks, in order.
        broken: bool `[num_attacks, num_examples]`.
        standing: bool `[num_examples]`, what no attack broke.
        baseline_broken: bool `[num_examples]`, what the baseline broke; None without one.
    """
    num_examples = len(standing)
    black = np.array([name in BLACK_BOX for name in names], bool)
    flags = []
    if black.any() and not black.all():
        by_white = broken[~black].any(axis=0)
        for name, verdicts in zip(names, broken):
            if name in BLACK_BOX and (verdicts & ~by_white).sum() > 0.002 * num_examples:
                flags.append(f"{name}_beats_white_box")
    if baseline_broken is not None and len(names):
        missed = (broken.any(axis=0) & ~baseline_broken).sum() - (baseline_broken & standing).sum()
        if missed > 0.05 * num_examples:
            flags.append("baseline_gap_above_5_points")
    return flags


def class_flags(names, num_targets, num_classes):
    """The warnings that too few classes call for; `num_targets` of each attack, None where it has none."""
    flags = []
    if num_classes < 3 and "apgd-dlr" in names:
        flags.append("dlr_fell_back_to_margin")
    if num_classes < 4 and "apgd-t" in names:
        flags.append("targeted_dlr_fell_back_to_margin")
    aimed = [targets for name, targets in zip(names, num_targets) if name in TARGETED and targets is not None]
    if any(targets > num_classes - 1 for targets in aimed):
        flags.append("fewer_target_classes")
    return flags


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
