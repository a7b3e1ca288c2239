"""Robust accuracy over a data set: attacks in sequence on what still stands, every adversarial image verified."""

import functools
import math
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import noise

# A float32 subtraction of two pixels is off by at most this much.
_TOLERANCE = 1e-6


def correct_under_attack(logits_fn, x, labels, *, seeds, attack):
    """Whether each example is classified correctly, clean and under one attack.

    Args:
        logits_fn: images to logits.
        x: float32 `[batch, ...]` in [0, 1].
        labels: int `[batch]`.
        seeds: int32 `[batch, 2]`.
        attack: `(logits_fn, x, labels, *, seeds) -> x_adv`.

    Returns:
        (clean, robust): bool `[batch]` each. What the clean image gets wrong is not robust.
    """
    clean = _is_correct(logits_fn(x), labels)
    return clean, clean & _is_correct(logits_fn(attack(logits_fn, x, labels, seeds=seeds)), labels)


class Evaluation(NamedTuple):
    """What `evaluate` returns.

    Attributes:
        results: a dictionary as results.json holds it, but for `model`, `dataset` and `versions`.
        examples: NumPy arrays by name as examples.npz holds them.
    """

    results: dict
    examples: dict


def evaluate(logits_fn, source, *, attacks, threat, num_examples=None, batch_size=128, seed=0, progress=True):
    """Clean and robust accuracy of a classifier.

    Attacks run in order, each on the examples that all before it left standing. An example counts as broken only where
    a fresh forward pass on its adversarial image, after that was checked to lie inside the threat model, is wrong. Full
    batches of one fixed size are packed from whatever is active, so everything is compiled once.

    Args:
        logits_fn: float32 images `[batch, ...]` in [0, 1] to logits `[batch, num_classes]`.
        source: a `data.sources.Source`: uint8 images and labels.
        attacks: `(logits_fn, x, labels, *, seeds) -> x_adv` each, functions with bound arguments; all for `threat`.
        threat: the `threats.Threat` that adversarial images must obey.
        num_examples: how many examples, the first ones; None for all.
        batch_size: of every forward pass and attack.
        seed: of the attacks' noise.
        progress: whether to show progress with time left per attack.

    Returns:
        An `Evaluation`.

    Raises:
        ValueError: for labels outside the classes, outputs that are probabilities, non-finite logits on clean images,
            an attack bound to another threat, or an adversarial image outside the threat model.
    """
    if num_examples is not None and not 1 <= num_examples <= len(source.labels):
        raise ValueError(f"Expected num_examples from 1 to {len(source.labels)}. Received: {num_examples!r}")
    for attack in attacks:
        bound = attack.keywords["threat"]
        if (bound.norm, bound.epsilon) != (threat.norm, threat.epsilon):
            raise ValueError(
                f"Expected attacks on the threat model {threat.norm} {threat.epsilon_fraction}. "
                f"Received: {_name(attack)} on {bound.norm} {bound.epsilon_fraction}"
            )
    images, labels = source.images[:num_examples], source.labels[:num_examples]
    run = _Batches(images, labels, batch_size, seed, progress)
    predict_fn = tf.function(logits_fn)

    logits = run.collect("clean", np.arange(len(labels)), lambda x, y, seeds: (predict_fn(x),))[0]
    _check_logits(logits, labels)
    clean_prediction = logits.argmax(axis=-1)
    standing = clean_prediction == labels
    broken_by = np.where(standing, -1, 0)
    adversarial = images.astype(np.float32) / np.float32(255)
    standing_uint8 = standing.copy()
    records, after, warnings = [], [], []

    for k, attack in enumerate(attacks, start=1):
        active = np.flatnonzero(standing)
        started = time.perf_counter()
        broken = active[:0]
        if len(active):
            found, distance, low, high = run.collect(_name(attack), active, _attack_fn(attack, logits_fn, threat))
            _check_inside(attack, threat, distance, low, high)
            wrong, wrong_uint8, finite = run.verify(active, found, predict_fn, threat)
            if not finite and "non_finite_logits" not in warnings:
                warnings.append("non_finite_logits")
            broken = active[wrong]
            broken_by[broken] = k
            adversarial[broken] = found[wrong]
            standing[broken] = False
            standing_uint8[active[wrong_uint8]] = False
        seconds = time.perf_counter() - started
        records.append(
            {
                "name": _name(attack),
                "parameters": _parameters(attack),
                "seconds": round(seconds, 3),
                "examples_attacked": len(active),
                "examples_broken": len(broken),
            }
        )
        after.append({"attack": _name(attack), "robust_accuracy": float(standing.mean())})

    results = {
        "num_examples": len(labels),
        "clean_accuracy": float((clean_prediction == labels).mean()),
        "robust_accuracy": float(standing.mean()),
        "robust_accuracy_uint8": float(standing_uint8.mean()),
        "robust_accuracy_after": after,
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "epsilon_fraction": threat.epsilon_fraction,
        "attacks": records,
        "confidence_interval_95": wilson_interval(int(standing.sum()), len(labels)),
        "warnings": warnings,
        "seed": seed,
    }
    examples = {
        "index": np.arange(len(labels)),
        "label": labels,
        "clean_prediction": clean_prediction.astype(np.int32),
        "robust": standing,
        "broken_by": broken_by.astype(np.int32),
        "adversarial": adversarial,
    }
    return Evaluation(results, examples)


def summary(results):
    """The main numbers of a results dictionary, as lines of text."""
    low, high = (100 * bound for bound in results["confidence_interval_95"])
    lines = [
        f"{results['num_examples']} examples, {results['norm']} {results['epsilon_fraction']}",
        f"clean accuracy: {100 * results['clean_accuracy']:.2f} %",
    ]
    lines += [
        f"robust accuracy after {after['attack']}: {100 * after['robust_accuracy']:.2f} %"
        for after in results["robust_accuracy_after"]
    ]
    lines.append(
        f"robust accuracy (an upper bound of the true one): {100 * results['robust_accuracy']:.2f} %, "
        f"95 % interval {low:.2f} to {high:.2f} %"
    )
    lines += [f"warning: {warning}" for warning in results["warnings"]]
    return "\n".join(lines)


def wilson_interval(num_successes, num_trials):
    """The 95 % Wilson score interval of a proportion, [low, high]."""
    z = 1.959963984540054
    p, n = num_successes / num_trials, num_trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return [max(centre - half, 0.0), min(centre + half, 1.0)]


class _Batches:
    """Runs compiled functions over fixed-size batches of chosen examples."""

    def __init__(self, images, labels, batch_size, seed, progress):
        self.images, self.labels = images, labels
        self.batch_size, self.seed, self.progress = batch_size, seed, progress

    def collect(self, name, indices, fn):
        """Outputs of `fn(x, labels, seeds)`, a tuple of `[batch, ...]` tensors, for the examples `indices`."""
        pieces = []
        starts = range(0, len(indices), self.batch_size)
        for start in tqdm(starts, desc=name, unit="batch", disable=not self.progress, leave=False):
            chosen = indices[start : start + self.batch_size]
            packed = np.resize(chosen, self.batch_size)
            x = tf.constant(self.images[packed], tf.float32) / 255.0
            seeds = noise.example_seeds(self.seed, 0, tf.constant(packed, tf.int32))
            outputs = fn(x, tf.constant(self.labels[packed], tf.int32), seeds)
            pieces.append([output.numpy()[: len(chosen)] for output in outputs])
        return [np.concatenate(parts) for parts in zip(*pieces)]

    def verify(self, indices, found, predict_fn, threat):
        """Fresh predictions on adversarial images, as they are and rounded to bytes.

        Returns:
            (wrong, wrong after rounding): bool like `indices`; and whether all logits were finite.
        """
        wrong, finite = np.zeros((2, len(indices)), bool), True
        for start in range(0, len(indices), self.batch_size):
            rows = np.arange(start, min(start + self.batch_size, len(indices)))
            packed = np.resize(rows, self.batch_size)
            clean = self.images[indices[packed]] / np.float32(255)
            for k, x in enumerate((found[packed], _rounded(found[packed], clean, threat))):
                logits = predict_fn(tf.constant(x, tf.float32)).numpy()[: len(rows)]
                # A prediction that is no number is not right.
                is_finite = np.isfinite(logits).all(axis=-1)
                wrong[k, rows] = (logits.argmax(axis=-1) != self.labels[indices[rows]]) | ~is_finite
                finite = finite and bool(is_finite.all())
        return wrong[0], wrong[1], finite


def _rounded(x_adv, x, threat):
    """Adversarial images as whole bytes: the nearest ones or, where these leave the ball, those nearer to `x`."""
    nearest = np.round(x_adv * 255)
    # A thousandth of a byte makes up for float32.
    step = (x_adv - x) * 255
    towards_x = np.round(x * 255) + np.trunc(step + np.copysign(1e-3, step))
    outside = threat.distance(nearest / np.float32(255), x).numpy() > _limit(threat)
    return np.where(outside[:, None, None, None], towards_x, nearest) / np.float32(255)


def _limit(threat):
    return threat.epsilon * (1 + 1e-5) + _TOLERANCE


def _attack_fn(attack, logits_fn, threat):
    @tf.function
    def run(x, labels, seeds):
        x_adv = attack(logits_fn, x, labels, seeds=noise.fold_in(seeds, noise.ATTACK))
        axes = list(range(1, x.shape.rank))
        return x_adv, threat.distance(x_adv, x), tf.reduce_min(x_adv, axes), tf.reduce_max(x_adv, axes)

    return run


def _is_correct(logits, labels):
    return tf.equal(tf.argmax(logits, axis=-1, output_type=tf.int32), tf.cast(labels, tf.int32))


def _check_logits(logits, labels):
    if not np.isfinite(logits).all():
        raise ValueError("Expected finite logits on clean images. Received: some that are not")
    outside = labels[(labels < 0) | (labels >= logits.shape[-1])]
    if len(outside):
        raise ValueError(f"Expected labels of the model's {logits.shape[-1]} classes. Received: {outside[0]}")
    if (logits >= 0).all() and np.allclose(logits.sum(axis=-1), 1.0, atol=1e-3):
        raise ValueError(
            "Expected logits. Received: rows that sum to 1; for a model of probabilities, say --outputs=probabilities"
        )


def _check_inside(attack, threat, distance, low, high):
    # NaN must count as outside.
    if not (distance.max() <= _limit(threat) and low.min() >= 0.0 and high.max() <= 1.0):
        raise ValueError(
            f"Expected images of {_name(attack)} within {threat.norm} {threat.epsilon_fraction} and [0, 1]. "
            f"Received: a distance of {distance.max()}, pixels from {low.min()} to {high.max()}"
        )


def _name(attack):
    return attack.func.__name__


def _parameters(attack):
    """Bound arguments as JSON can hold them; the threat model stands beside the attacks."""
    return {name: _described(value) for name, value in attack.keywords.items() if name != "threat"}


def _described(value):
    if isinstance(value, functools.partial):
        arguments = ", ".join(f"{name}={_described(bound)}" for name, bound in value.keywords.items())
        return value.func.__name__ + (f"({arguments})" if arguments else "")
    if callable(value) or hasattr(value, "name"):
        return getattr(value, "name", None) or value.__name__
    return value
