"""Attacks on a surrogate."""

from collections.abc import Callable

import tensorflow as tf

from robust_keras import losses, threats


def transfer(
    logits_fn: Callable,
    x: tf.Tensor,
    labels: tf.Tensor,
    *,
    threat: threats.Threat,
    surrogate: Callable,
    attack: Callable,
    seeds: tf.Tensor,
) -> tf.Tensor:
    """An attack on another classifier, for one whose own gradients may be masked.

    Args:
        logits_fn: the classifier under evaluation, which is not asked.
        x: float32 images `[batch, ...]` in [0, 1].
        labels: int `[batch]`.
        threat: a `threats.Threat`, that of `attack`.
        surrogate: images to logits, such as `saved_models.load.load_logits_fn` returns.
        attack: `(logits_fn, x, labels, *, seeds) -> x_adv`.
        seeds: int32 `[batch, 2]`.

    Returns:
        What `attack` makes of the surrogate.
    """
    return attack(surrogate, threats.check_images(x), losses.as_labels(labels), seeds=seeds)
