"""What a training step minimises.

An objective is `objective(logits_fn, x, x_adv, labels, targets) -> [batch] loss`. It runs the passes that it needs, the
clean one only if it needs it, and chooses the mode of `BatchNorm` in each: one pass updates the moving statistics.
`labels` are int `[batch]`, `targets` class probabilities `[batch, num_classes]`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras.losses import as_labels, cross_entropy, kl_divergence
from robust_keras.models.normalization import BATCH, BATCH_AND_UPDATE, batch_norm_mode


def adversarial_training(
    logits_fn: Callable, x: tf.Tensor, x_adv: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor
) -> tf.Tensor:
    """Cross-entropy on the adversarial images (Madry et al. 2017; the paper's equation 3)."""
    with batch_norm_mode(BATCH_AND_UPDATE):
        return cross_entropy(logits_fn(x_adv), targets)


def standard_training(
    logits_fn: Callable, x: tf.Tensor, x_adv: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor
) -> tf.Tensor:
    """Cross-entropy on the clean images: plain, non-robust training. Needs no attack."""
    with batch_norm_mode(BATCH_AND_UPDATE):
        return cross_entropy(logits_fn(x), targets)


def trades(
    logits_fn: Callable, x: tf.Tensor, x_adv: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor, *, beta: float = 6.0
) -> tf.Tensor:
    """TRADES: be right on the clean images, and predict the same on the adversarial ones (Zhang et al. 2019).

    `cross_entropy(f(x), targets) + beta * D_KL(p || q)` with `p = softmax(f(x))` and `q = softmax(f(x_adv))`. Gradients
    flow into both sides of the divergence. Its attack ascends the divergence from the clean prediction.

    The clean and the adversarial images go through in two passes, each normalised with the statistics of its own batch;
    the adversarial pass updates the moving ones.

    Args:
        logits_fn: images to logits `[batch, num_classes]`.
        x: clean images.
        x_adv: adversarial images, shaped like `x`.
        labels: not used.
        targets: `[batch, num_classes]`.
        beta: weight of the divergence. Gowal et al. 2020 do not give theirs; 6 is that of their released code, and of
            Zhang et al. on CIFAR-10.

    Returns:
        float32 `[batch]`.

    Raises:
        ValueError: for a negative or non-finite `beta`.
    """
    _check_weight(beta)
    clean_logits, adv_logits = _clean_and_adversarial(logits_fn, x, x_adv)
    return cross_entropy(clean_logits, targets) + beta * kl_divergence(adv_logits, tf.nn.softmax(clean_logits))


def mart(
    logits_fn: Callable, x: tf.Tensor, x_adv: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor, *, beta: float = 6.0
) -> tf.Tensor:
    """MART, misclassification-aware adversarial training (Wang et al. 2020).

    `cross_entropy(f(x_adv), targets) - log(1 - max_{k != y} q_k) + beta * D_KL(p || q) * (1 - p_y)` with
    `p = softmax(f(x))`, `q = softmax(f(x_adv))` and y the label: a boosted cross-entropy on the adversarial images, and
    the divergence of TRADES where the clean image is not classified with confidence. Gradients flow into every term,
    the factor `1 - p_y` included. Its attack ascends the cross-entropy of the label.

    Smoothed or mixed targets enter the cross-entropy only: the other two terms single out one true class, `labels`.

    As in the authors' code (https://github.com/YisenWang/MART) the second logarithm is `log(1 + 1e-4 - max)`, and the
    divergence takes `log(q + 1e-12)`: both are bounded, so a confident mistake costs at most 9.2 and 27.6 there.
    `1 - p` is summed from the other classes, without cancellation, so that the 1e-7 which they add to `1 - p_y` is not
    needed.

    `BatchNorm` as in `trades`.

    Args:
        logits_fn: images to logits `[batch, num_classes]`, two classes or more.
        x: clean images.
        x_adv: adversarial images, shaped like `x`.
        labels: int `[batch]`.
        targets: `[batch, num_classes]`.
        beta: weight of the divergence. Gowal et al. 2020 do not give theirs; 6 is the default of the authors' loss and
            of their script for Wide ResNets (5 in the one for ResNet-18).

    Returns:
        float32 `[batch]`.

    Raises:
        ValueError: for a negative or non-finite `beta`.
    """
    _check_weight(beta)
    clean_logits, adv_logits = _clean_and_adversarial(logits_fn, x, x_adv)
    clean, adv = tf.nn.softmax(clean_logits), tf.nn.softmax(adv_logits)
    labels = as_labels(labels)
    is_label = tf.one_hot(labels, adv.shape[-1], on_value=True, off_value=False)
    strongest_wrong = tf.argmax(tf.where(is_label, adv_logits.dtype.min, adv_logits), axis=-1, output_type=tf.int32)
    boosted = cross_entropy(adv_logits, targets) - tf.math.log(_probability_of_others(adv, strongest_wrong) + 1e-4)
    # Not `kl_divergence`: the floor under q is part of the loss.
    divergence = tf.reduce_sum(clean * (tf.nn.log_softmax(clean_logits) - tf.math.log(adv + 1e-12)), axis=-1)
    return boosted + beta * divergence * _probability_of_others(clean, labels)


class Objective(NamedTuple):
    """An objective, and the attack that goes with it.

    Attributes:
        function: as above.
        attack_loss: what its attack ascends; None for no attack.
        attack_target: what the attack moves away from, see `AdversarialModel`.
    """

    function: Callable
    attack_loss: Callable | None = cross_entropy
    attack_target: str = "label"


NAMED = {
    "adversarial_training": Objective(adversarial_training),
    "trades": Objective(trades, kl_divergence, "clean_prediction"),
    "mart": Objective(mart),
    "standard": Objective(standard_training, None),
}


def named(objective: str | Callable) -> Objective:
    """An `Objective` from its name, or around a function.

    Raises:
        ValueError: for an unknown name, and for what cannot be called.
    """
    if callable(objective):
        return Objective(objective)
    if objective not in NAMED:
        raise ValueError(f"Expected an objective out of {', '.join(NAMED)}, or a function. Received: {objective!r}")
    return NAMED[objective]


def _check_weight(beta):
    if not 0 <= beta < math.inf:
        raise ValueError(f"Expected a finite weight beta >= 0. Received: {beta!r}")


def _clean_and_adversarial(logits_fn, x, x_adv):
    """float32 logits of both, of which the adversarial pass updates the moving statistics of `BatchNorm`."""
    with batch_norm_mode(BATCH):
        clean_logits = logits_fn(x)
    with batch_norm_mode(BATCH_AND_UPDATE):
        adv_logits = logits_fn(x_adv)
    return tf.cast(clean_logits, tf.float32), tf.cast(adv_logits, tf.float32)


def _probability_of_others(probabilities, classes):
    """`1 - probabilities[classes]`, `[batch]`, exact also where it is all but zero."""
    others = tf.one_hot(classes, probabilities.shape[-1], on_value=0.0, off_value=1.0)
    return tf.reduce_sum(probabilities * others, axis=-1)
