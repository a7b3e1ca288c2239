"""Augmentation as a function of images and one seed per example, vectorised over the batch."""

import tensorflow as tf

from robust_keras import noise


def crop_and_flip(images: tf.Tensor, seeds: tf.Tensor, *, padding: int = 4, flip: bool = True) -> tf.Tensor:
    """Pads with zeros, crops back at a random place, and mirrors half of the images (the paper's section 3.1).

    Args:
        images: `[batch, height, width, channels]` of any type.
        seeds: int32 `[batch, 2]`, one per example.
        padding: pixels added on each side, >= 0.
        flip: whether to mirror left and right; not for digits or letters.

    Returns:
        Images like `images`.
    """
    height, width = images.shape[1:3]
    seeds = noise.fold_in(seeds, noise.AUGMENTATION)
    offsets = noise.integers(seeds, 2, 2 * padding + 1)
    rows = offsets[:, 0:1] + tf.range(height)
    columns = offsets[:, 1:2] + tf.range(width)
    if flip:
        mirrored = noise.integers(noise.fold_in(seeds, 0), 1, 2) == 1
        columns = tf.where(mirrored, tf.reverse(columns, axis=[1]), columns)
    padded = tf.pad(images, [[0, 0], [padding, padding], [padding, padding], [0, 0]])
    cropped = tf.gather(tf.gather(padded, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
    return tf.ensure_shape(cropped, images.shape)
