"""What an export answers: functions of images that look at them first, and of an empty batch too.

    floats(network)    # `serving_default`: float32 images in [0, 1]
    bytes_(network)    # `serving_uint8`
    gradients(network) # `gradient`: of the cross-entropy by the images

Neither TensorFlow nor its servers hold images against the shape that a signature states, so that the graph does: an
image of another size, with other values than in [0, 1] or NaN ends in an error that names the shape or the range.
Where XLA compiles a signature it drops the check of values, as it drops every `Assert`.
"""

from collections.abc import Callable

import keras
import tensorflow as tf

# What values may leave [0, 1] by: some hundred roundings of float32 at 1, and a fortieth of a grey level of 1 / 255, so
# that no image of another range passes.
ROUNDING = 1e-4


def floats(network: keras.Model) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """`image`, float32 `[batch, height, width, channels]` in [0, 1], to what `answers` says."""

    def serving_default(image):
        return answers(_logits(network, _in_range(_of_size(image, network))))

    return serving_default


def bytes_(network: keras.Model) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """`image`, uint8 `[batch, height, width, channels]`, to what `answers` says."""

    def serving_uint8(image):
        return answers(_logits(network, tf.cast(_of_size(image, network), tf.float32) / 255.0))

    return serving_uint8


def answers(logits: tf.Tensor) -> dict[str, tf.Tensor]:
    """`logits` and `probabilities`, float32 `[batch, num_classes]`, and `class`, int64 `[batch]`."""
    return {"logits": logits, "probabilities": tf.nn.softmax(logits), "class": tf.argmax(logits, axis=-1)}


def gradients(network: keras.Model) -> Callable[[tf.Tensor, tf.Tensor], dict[str, tf.Tensor]]:
    """`image` as in `floats` and `label`, int64 `[batch]`, to `loss`, each image's cross-entropy, float32 `[batch]`,
    and `gradient`, of each image's loss by that image.

    Steps along its sign, back into the ball and into [0, 1], are PGD; against it, with a target's label, targeted PGD.
    """

    def gradient(image, label):
        image, label = _in_range(_of_size(image, network)), tf.ensure_shape(label, (None,))
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(image)
            logits = _logits(network, image)
            label = _a_class(label, logits.shape[-1])
            loss = tf.nn.sparse_softmax_cross_entropy_with_logits(label, logits)
        return {"loss": loss, "gradient": tape.gradient(loss, image)}

    return gradient


def _of_size(image, network):
    return tf.ensure_shape(image, (None, *network.input_shape[1:]))


def _in_range(image):
    low, high = tf.reduce_min(image), tf.reduce_max(image)
    # On a GPU the lowest and the highest may pass over NaN. A sum does not.
    total = tf.reduce_sum(image)
    is_empty = tf.equal(tf.shape(image)[0], 0)  # Its lowest is infinity.
    fits = is_empty | ((low >= -ROUNDING) & (high <= 1.0 + ROUNDING) & tf.equal(total, total))
    expected = "Expected images in [0, 1]; serving_uint8 takes bytes. Received: values from"
    return _checked(image, fits, [expected, low, "to", high])


def _a_class(label, num_classes):
    fits = tf.reduce_all((label >= 0) & (label < num_classes))
    return _checked(label, fits, [f"Expected labels from 0 to {num_classes - 1}. Received:", label])


def _checked(tensor, condition, message):
    # `tf.debugging.assert_*` would put a branch into the graph, which costs more and is harder to read.
    with tf.control_dependencies([tf.raw_ops.Assert(condition=condition, data=message, summarize=10)]):
        return tf.identity(tensor)


def _logits(network, image):
    # oneDNN's convolutions give an empty batch the shape of their input, so that one blank image stands in for it.
    num = tf.shape(image)[0]
    missing = tf.cast(tf.equal(num, 0), tf.int32)
    filled = tf.pad(image, [[0, missing]] + [[0, 0]] * (image.shape.rank - 1))
    return tf.cast(network(filled, training=False), tf.float32)[:num]
