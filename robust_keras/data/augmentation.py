"""Augmentation as a function of images and one seed per example.

What is drawn depends on an example's own seed alone, and bytes are computed in integers: they are the same everywhere.
"""

import math
from collections.abc import Sequence

import tensorflow as tf

from robust_keras import noise

_MOST_PIXELS = 1024**2  # Bytes times weights of more would not fit into int32.


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


def random_resized_crop(
    images: tf.Tensor,
    seeds: tf.Tensor,
    *,
    size: int | None = None,
    area: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: bool = True,
) -> tf.Tensor:
    """Crops a random part of each image, resizes it bilinearly, and mirrors half of them (Szegedy et al. 2015).

    The part has a share of the image's area, and a ratio of width to height, that are drawn uniformly, of the ratio the
    logarithm. Of ten draws the first counts that fits into the image, and the whole image if none does.

    Args:
        images: uint8 `[batch, height, width, channels]`.
        seeds: int32 `[batch, 2]`, one per example.
        size: height and width of the result; None for those of the images.
        area: the least and the largest share of the area, above 0 and up to 1.
        ratio: the least and the largest ratio.
        flip: whether to mirror left and right; not for digits or letters.

    Returns:
        uint8 `[batch, size, size, channels]`.

    Raises:
        ValueError: for images that are no bytes, a size outside 1 to 1024, or bounds that are none.
    """
    height, width, channels = images.shape[1:]
    new_height, new_width = (height, width) if size is None else (size, size)
    if images.dtype != tf.uint8:
        raise ValueError(f"Expected images as bytes. Received: {images.dtype.name}")
    is_size = isinstance(new_height, int) and 1 <= min(new_height, new_width) and new_height * new_width <= _MOST_PIXELS
    if not (is_size and 0 < area[0] <= area[1] <= 1 and 0 < ratio[0] <= ratio[1]):
        raise ValueError(
            "Expected a size from 1 to 1024, an area within (0, 1] and a ratio above 0, from low to high. "
            f"Received: {new_height} x {new_width}, {tuple(area)}, {tuple(ratio)}"
        )
    seeds = noise.fold_in(seeds, noise.AUGMENTATION)
    boxes = _boxes(seeds, (height, width), area, ratio)
    mirrored = noise.integers(noise.fold_in(seeds, 0), 1, 2)[:, 0] == 1 if flip else tf.zeros_like(boxes[:, 0]) > 0

    def resized(example):
        image, box, is_mirrored = example
        top, left, box_height, box_width = tf.unstack(box)
        columns = left, box_width, new_width, is_mirrored
        rows = top, box_height, new_height, tf.zeros_like(is_mirrored)
        image = _resampled(_resampled(image, 0, *rows), 1, *columns)
        total = 4 * new_height * new_width  # Of the weights of a pixel.
        return tf.cast((image + total // 2) // total, tf.uint8)

    # One after the other: in a large batch all together would take gigabytes.
    spec = tf.TensorSpec((new_height, new_width, channels), tf.uint8)
    return tf.map_fn(resized, (images, boxes, mirrored), fn_output_signature=spec)


def _boxes(seeds: tf.Tensor, shape: tuple[int, int], area: Sequence[float], ratio: Sequence[float]) -> tf.Tensor:
    """Where to crop: int32 `[batch, 4]`, top, left, height, width."""
    height, width = shape
    drawn = noise.uniform(noise.fold_in(seeds, 1), (10, 2))
    share = area[0] + drawn[..., 0] * (area[1] - area[0])
    of_ratio = tf.exp(math.log(ratio[0]) + drawn[..., 1] * math.log(ratio[1] / ratio[0]))
    sides = tf.sqrt(share * height * width / of_ratio), tf.sqrt(share * height * width * of_ratio)
    sides = tf.stack([tf.cast(tf.round(side), tf.int32) for side in sides], axis=-1)
    whole = tf.constant((height, width))
    sides = tf.concat([tf.maximum(sides, 1), tf.broadcast_to(whole, (tf.shape(sides)[0], 1, 2))], axis=1)
    fits = tf.reduce_all(sides <= whole, axis=-1)
    sides = tf.gather(sides, tf.argmax(tf.cast(fits, tf.int32), axis=1), axis=1, batch_dims=1)
    free = tf.cast(whole - sides + 1, tf.float32)
    offsets = tf.cast(noise.uniform(noise.fold_in(seeds, 2), (2,)) * free, tf.int32)
    return tf.concat([tf.minimum(offsets, whole - sides), sides], axis=1)


def _resampled(
    image: tf.Tensor, axis: int, begin: tf.Tensor, length: tf.Tensor, size: int, mirrored: tf.Tensor
) -> tf.Tensor:
    """`length` pixels along an axis, resized bilinearly to `size` and multiplied by 2 * size: int32."""
    # The centre of pixel k lies at (2 k + 1) * length / (2 size) - 1/2 of the old pixels, here 2 size times that.
    position = (2 * tf.range(size) + 1) * length - size
    position = tf.clip_by_value(position, 0, 2 * size * (length - 1))
    position = tf.where(mirrored, tf.reverse(position, [0]), position)
    below, weight = position // (2 * size), position % (2 * size)
    above = tf.minimum(below + 1, length - 1)
    weight = tf.reshape(weight, (-1, 1, 1) if axis == 0 else (1, -1, 1))
    low, high = (tf.cast(tf.gather(image, begin + at, axis=axis), tf.int32) for at in (below, above))
    return low * (2 * size - weight) + high * weight
