"""Loss primitives: per example, on logits, in float32. Attacks ascend them, objectives descend them.

Each is `loss(logits, targets) -> [batch]`. `targets` are class indices, int `[batch]` or `[batch, 1]`, one-hot rows of
integers, or class probabilities, float `[batch, num_classes]`: a label, a smoothed or mixed label, or a prediction.
All raise ValueError for targets of another shape, or of another batch than the logits': nothing is broadcast.
"""

import numpy as np
import tensorflow as tf


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Softmax cross-entropy, `-sum_c targets_c log softmax(logits)_c`.

    Args:
        logits: `[batch, num_classes]`.
        targets: int `[batch]` or float `[batch, num_classes]`.

    Returns:
        float32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    return tf.nn.softmax_cross_entropy_with_logits(as_probabilities(targets, logits), logits)


def kl_divergence(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Kullback-Leibler divergence of the prediction from the targets, `sum_c t_c (log t_c - log softmax(logits)_c)`.

    This is D_KL(targets || softmax(logits)), the regularizer of TRADES (Zhang et al. 2019) when `targets`
    is the prediction on the clean image. Gradients flow into both arguments.

    Args:
        logits: `[batch, num_classes]`.
        targets: int `[batch]` or float `[batch, num_classes]`.

    Returns:
        float32 `[batch]`, non-negative.
    """
    logits = tf.cast(logits, tf.float32)
    targets = as_probabilities(targets, logits)
    # Of smaller numbers the reciprocal, which the gradient takes, can overflow.
    log_targets = tf.math.log(tf.where(targets > np.finfo(np.float32).tiny, targets, 1.0))
    return tf.reduce_sum(targets * (log_targets - tf.nn.log_softmax(logits)), axis=-1)


def margin(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Margin of the strongest wrong class, `max_{c != y} logits_c - logits_y`.

    Positive exactly where the example is misclassified (Uesato et al. 2018; Gowal et al. 2020, section 4.2.1).
    The true class y of probabilities is their argmax.

    Args:
        logits: `[batch, num_classes]`, two classes or more.
        targets: int `[batch]` or float `[batch, num_classes]`.

    Returns:
        float32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    is_true_class = tf.one_hot(_labels_of(logits, targets), logits.shape[-1], on_value=True, off_value=False)
    true_logit = tf.reduce_sum(tf.where(is_true_class, logits, 0.0), axis=-1)
    return tf.reduce_max(tf.where(is_true_class, logits.dtype.min, logits), axis=-1) - true_logit


def dlr(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Difference of logits ratio, `-(z_y - max_{c != y} z_c) / (z_(1) - z_(3))`, z_(i) the i-th highest logit.

    Unchanged when logits are shifted or scaled (Croce & Hein 2020, https://arxiv.org/abs/2003.01690, equation 6). Two
    classes have no third logit: there it falls back to the numerator, `margin`.

    Args:
        logits: `[batch, num_classes]`, two classes or more.
        targets: int `[batch]` or float `[batch, num_classes]`.

    Returns:
        float32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    if logits.shape[-1] < 3:
        return margin(logits, targets)
    highest = tf.math.top_k(logits, 3).values
    return margin(logits, targets) / (highest[:, 0] - highest[:, 2] + _floor(logits))


def targeted_margin(logits: tf.Tensor, targets: tf.Tensor, target_classes: tf.Tensor) -> tf.Tensor:
    """Margin of given wrong classes t, `z_t - z_y`: what MultiTargeted ascends (Gowal et al. 2019, equation 5).

    Args:
        logits: `[batch, num_classes]`.
        targets: int `[batch]` or float `[batch, num_classes]`.
        target_classes: int `[batch]`.

    Returns:
        float32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    # Products, not gathers: their gradient is dense and the same on every device.
    towards, away = (tf.one_hot(classes, logits.shape[-1]) for classes in (target_classes, _labels_of(logits, targets)))
    return tf.reduce_sum(logits * (towards - away), axis=-1)


def targeted_dlr(logits: tf.Tensor, targets: tf.Tensor, target_classes: tf.Tensor) -> tf.Tensor:
    """Targeted difference of logits ratio, `(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)`.

    Croce & Hein 2020, equation 7. Fewer than four classes have no fourth logit: there it falls back to the numerator,
    `targeted_margin`.

    Args:
        logits: `[batch, num_classes]`.
        targets: int `[batch]` or float `[batch, num_classes]`.
        target_classes: int `[batch]`.

    Returns:
        float32 `[batch]`.
    """
    logits = tf.cast(logits, tf.float32)
    numerator = targeted_margin(logits, targets, target_classes)
    if logits.shape[-1] < 4:
        return numerator
    highest = tf.math.top_k(logits, 4).values
    return numerator / (highest[:, 0] - 0.5 * (highest[:, 2] + highest[:, 3]) + _floor(logits))


def is_wrong(logits: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Whether each prediction is wrong: its class, `argmax_c logits_c`, is not the label, or a logit is not finite.

    The only definition of what attacks look for, and of what accuracies count.

    Args:
        logits: `[batch, num_classes]`.
        labels: see `as_labels`.

    Returns:
        bool `[batch]`.

    Raises:
        ValueError: for labels of another shape or batch.
    """
    logits = tf.convert_to_tensor(logits)
    labels = _labels_of(logits, labels)
    is_finite = tf.reduce_all(tf.math.is_finite(logits), axis=-1)
    return tf.not_equal(tf.argmax(logits, axis=-1, output_type=tf.int32), labels) | ~is_finite


def as_probabilities(targets: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """`targets` as float32 probabilities of the shape of `logits`, `[batch, num_classes]`.

    Raises:
        ValueError: for labels that `as_labels` refuses, or for targets of another batch or number of classes.
    """
    targets, labels = tf.convert_to_tensor(targets), _labels_of(logits, targets)
    if targets.dtype.is_floating:
        return tf.cast(targets, tf.float32)
    return tf.one_hot(labels, logits.shape[-1], dtype=tf.float32)


def as_targets(targets: tf.Tensor) -> tf.Tensor:
    """What a loss takes: labels as `as_labels` has them, or probabilities as they are."""
    targets = tf.convert_to_tensor(targets)
    return targets if targets.dtype.is_floating and targets.shape.rank != 1 else as_labels(targets)


def nan_is_lowest(loss: tf.Tensor) -> tf.Tensor:
    """A loss that can be compared: any number is higher than what is none."""
    return tf.where(tf.math.is_nan(loss), -float("inf"), loss)


def as_labels(targets: tf.Tensor) -> tf.Tensor:
    """`targets` as class indices; the most probable class of probabilities.

    Args:
        targets: integers `[batch]`, or `[batch, 1]` as `keras.datasets` gives them; or, of two classes or more,
            one-hot rows, int `[batch, num_classes]`, or probabilities, float `[batch, num_classes]`. The rows are
            looked at where there are values, so not in a program that is being traced.

    Returns:
        int32 `[batch]`.

    Raises:
        ValueError: for anything else.
    """
    targets = tf.convert_to_tensor(targets)
    shape, dtype = targets.shape, targets.dtype
    if dtype.is_integer and (shape.rank == 1 or (shape.rank == 2 and shape[1] == 1)):
        return tf.cast(tf.reshape(targets, (-1,)), tf.int32)
    if dtype.is_floating and shape.rank == 2 and shape[1] != 1:
        return tf.argmax(targets, axis=-1, output_type=tf.int32)
    is_one_hot = dtype.is_integer and shape.rank == 2 and shape[1] is not None
    if is_one_hot and tf.executing_eagerly():
        values = targets.numpy()
        is_one_hot = bool(np.all((values == 0) | (values == 1)) and np.all(np.count_nonzero(values, axis=-1) == 1))
    if is_one_hot:
        return tf.argmax(tf.cast(targets, tf.int32), axis=-1, output_type=tf.int32)
    raise ValueError(
        "Expected labels, integers [batch] or [batch, 1] or one-hot rows, or probabilities, floats "
        f"[batch, num_classes]. Received: {dtype.name} {shape}"
    )


def check_labels(targets: tf.Tensor, num_classes: int) -> None:
    """Looks at labels that are to be some of a model's classes.

    Args:
        targets: see `as_labels`.
        num_classes: of the model.

    Raises:
        ValueError: for labels that `as_labels` refuses, are outside the classes, or are rows of another number of them.
    """
    labels, shape = as_labels(targets).numpy(), np.shape(targets)
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(shape) == 2 and shape[1] not in (1, num_classes):
        raise ValueError(f"Expected labels of the model's {num_classes} classes. Received: rows of {shape[1]}")
    if len(outside):
        raise ValueError(f"Expected labels of the model's {num_classes} classes. Received: {outside[0]}")


def _floor(logits):
    """What keeps a difference of logits from 0, `[batch]`: 1e-12, as upstream has it, and less for tiny logits."""
    largest = tf.reduce_max(tf.abs(tf.stop_gradient(logits)), axis=-1)
    return 1e-12 * tf.clip_by_value(largest * 2.0**10, 2.0**-60, 1.0)


def _labels_of(logits, targets):
    """`as_labels`, of the logits' examples and classes."""
    targets = tf.convert_to_tensor(targets)
    labels = as_labels(targets)
    are_rows = targets.shape.rank == 2 and (targets.dtype.is_floating or targets.shape[1] != 1)
    if are_rows and not targets.shape.is_compatible_with(logits.shape):
        raise ValueError(f"Expected probabilities of the logits' shape, {logits.shape}. Received: {targets.shape}")
    if not labels.shape.is_compatible_with(logits.shape[:1]):
        raise ValueError(f"Expected labels of {logits.shape[0]} examples, as logits. Received: {labels.shape[0]}")
    return labels
