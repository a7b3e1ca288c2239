"""Finds images of a large pool that duplicate, exactly or nearly, an image of a test set.

    index = duplicates.build_index(test.images)
    nearest = compilation.fused(functools.partial(duplicates.nearest, index))
    neighbors, cosines = (x.numpy() for x in nearest(batch))  # For every image of the pool.
    found = cosines >= duplicates.COARSE_THRESHOLD  # A few in a hundred.
    similarities, exact = duplicates.similarity(index, batch[found], neighbors[found])
    duplicated = similarities >= duplicates.THRESHOLD

Gowal et al. (2020, section 4.3.1) remove duplicates of the CIFAR-10 test set before they pseudo-label 80M-TI, and do
not say how. Found here are copies, mirrored or not, that were recompressed, brightened, or shifted by up to two pixels.
"""

import functools
import hashlib
import math
from typing import NamedTuple

import numpy as np
import tensorflow as tf

# The measure by which an image is a duplicate, in one line for a manifest, and what it reaches for one. Among the pairs
# of a CIFAR-10 training image and its nearest test image, all look the same to the eye from 0.8 on, nearly all from 0.7
# on, and two in three between 0.6 and 0.7.
MEASURE = (
    "largest correlation of the central differences (along rows and columns, in all channels) of an image and of its "
    "nearest test image, over shifts of up to 2 pixels and both mirrorings, with noise of 1 grey level added to both"
)
THRESHOLD = 0.7
# The cosine of `nearest` from which an image is worth comparing. Recompressed copies of CIFAR-10's test images reach
# 0.99, copies shifted by one pixel 0.96 with few exceptions; its training images reach 0.96 once in 23.
COARSE_THRESHOLD = 0.96

_SHIFT = 2
# Where a test image is cropped: no shift of up to two pixels is further than one pixel from one of these.
_OFFSETS = [(i, j) for i in (0, 2, 4) for j in (0, 2, 4)] + [(i, j) for i in (1, 3) for j in (1, 3)]
_CHUNK = 64
# Test images that are compared at a time: their products with a batch of 256 stay in a processor's cache.
_TILE = 1000


class SearchIndex(NamedTuple):
    """Test images, prepared for search.

    Attributes:
        images: uint8 `[T, height, width, channels]`, a NumPy array.
        digests: the SHA-256 digests of their bytes, a frozenset.
        even: float32 `[tiles, crops, D, tile]`, the part of each crop's descriptor that mirroring leaves as it is; the
            last test image fills up the last tile.
        odd: float32 `[tiles, crops, E, tile]`, the part of which it changes the sign. Both together have unit norm.
    """

    images: np.ndarray
    digests: frozenset
    even: tf.Tensor
    odd: tf.Tensor


def build_index(images: np.ndarray) -> SearchIndex:
    """Prepares test images for search.

    Args:
        images: uint8 `[T, height, width, channels]`, grey or colour, at least 8 pixels high and wide.

    Returns:
        A `SearchIndex`; its descriptors take 1.5 kB an image.

    Raises:
        ValueError: for images of another type or shape, or none.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape or min(images.shape[1:3]) < 8:
        raise ValueError(
            "Expected test images, uint8 [T, height, width, channels] with height and width >= 8. "
            f"Received: {images.dtype} {images.shape}"
        )
    tile = min(len(images), _TILE)
    places = np.minimum(np.arange(-(-len(images) // tile) * tile), len(images) - 1).reshape(-1, tile)
    parts = [_descriptors(tf.constant(images), *offset) for offset in _OFFSETS]
    even, odd = (
        tf.transpose(tf.gather(tf.stack(kind), places, axis=1), (1, 0, 3, 2))  # From [crops, tiles, tile, D].
        for kind in zip(*parts)
    )
    return SearchIndex(images, frozenset(map(_digest, images)), even, odd)


def nearest(index: SearchIndex, images: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The test image of which a crop, mirrored or not, is coarsely most like the middle of an image, for each image.

    A crop is described by its low spatial frequencies (a cosine transform over rows, columns and channels), scaled to
    unit norm. There are 13 crops of each test image, 2 pixels smaller on each side: whatever filled the edge of a copy
    that was shifted by up to 2 pixels, its middle is one of them or one pixel off. Mirroring changes the sign of the
    frequencies that are odd along a row, so the larger cosine of an image and its mirror image is even + |odd|, from
    one pair of products. With 10,000 test images in colour it takes 7 MFLOP and about 0.1 MB an image.

    Args:
        index: a `SearchIndex`.
        images: uint8, or floats in [0, 1], `[batch, height, width, channels]`, shaped like the test images.

    Returns:
        (neighbors, cosines): int32 and float32 `[batch]`. A flat image is near flat ones, nearest to one of its colour.

    Raises:
        ValueError: for images of another type, or shaped unlike the test images.
    """
    images = tf.convert_to_tensor(images)
    if images.shape[1:] != index.images.shape[1:] or not (images.dtype == tf.uint8 or images.dtype.is_floating):
        raise ValueError(
            f"Expected images, uint8 or floats, of shape [batch, {', '.join(map(str, index.images.shape[1:]))}]. "
            f"Received: {images.dtype.name} {images.shape}"
        )
    even, odd = _descriptors(images, _SHIFT, _SHIFT)
    num_tiles, _, _, tile = index.even.shape

    def compare(k, neighbors, largest):
        crops = zip(tf.unstack(index.even[k]), tf.unstack(index.odd[k]))
        cosines = functools.reduce(
            tf.maximum, (tf.matmul(even, crop[0]) + tf.abs(tf.matmul(odd, crop[1])) for crop in crops)
        )
        cosine, neighbor = tf.reduce_max(cosines, axis=1), tf.argmax(cosines, axis=1, output_type=tf.int32)
        is_larger = cosine > largest
        neighbors = tf.where(is_larger, neighbor + k * tile, neighbors)
        return k + 1, neighbors, tf.where(is_larger, cosine, largest)

    none = tf.zeros_like(even[:, 0], tf.int32), tf.fill(tf.shape(even)[:1], -np.inf)
    _, neighbors, largest = tf.while_loop(
        lambda k, *_: k < num_tiles, compare, (0, *none), maximum_iterations=num_tiles
    )
    return neighbors, largest


def similarity(index: SearchIndex, images: np.ndarray, neighbors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How like its neighbor each image is, by `MEASURE`.

    Central differences a, b of the two images over the region where they overlap, in grey levels, have the
    correlation sum(a b) / sqrt((sum(a^2) + n) (sum(b^2) + n)), with n twice their number, which is what noise of one
    grey level adds. It does not change with brightness, nor with contrast well above the noise, and is near 0 where
    either image is flat: a flat image duplicates only what it equals. The sums are of integers, so they are exact.

    Args:
        index: a `SearchIndex`.
        images: uint8 `[n, height, width, channels]`, shaped like the test images.
        neighbors: integers `[n]`, of `nearest`.

    Returns:
        (similarities, exact): float32 `[n]` in [-1, 1], and bool `[n]`, whether an image's bytes are those of some
        test image (of its neighbor but for ties) or of its mirror image, in which case its similarity is 1.

    Raises:
        ValueError: for images of another type, or shaped unlike the test images, or for neighbors that do not fit.
    """
    images, neighbors = np.asarray(images), np.asarray(neighbors)
    shape = index.images.shape
    if images.dtype != np.uint8 or images.shape[1:] != shape[1:]:
        raise ValueError(
            f"Expected images, uint8 [n, {', '.join(map(str, shape[1:]))}]. Received: {images.dtype} {images.shape}"
        )
    if neighbors.dtype.kind not in "iu" or neighbors.shape != images.shape[:1]:
        raise ValueError(
            f"Expected neighbors, integers of shape {images.shape[:1]}. Received: {neighbors.dtype} {neighbors.shape}"
        )
    if len(neighbors) and not 0 <= neighbors.min() <= neighbors.max() < shape[0]:
        raise ValueError(
            f"Expected neighbors from 0 to {shape[0] - 1}. Received: {neighbors.min()} to {neighbors.max()}"
        )
    similarities, exact = np.zeros(len(images), np.float32), np.zeros(len(images), bool)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        tests, differences = index.images[neighbors[chunk]], _differences(images[chunk])
        sides = [_correlation(differences, _differences(side)) for side in (tests, tests[:, :, ::-1])]
        exact[chunk] = [index.digests & {_digest(image), _digest(image[:, ::-1])} != set() for image in images[chunk]]
        similarities[chunk] = np.where(exact[chunk], 1.0, np.maximum(*sides))
    return similarities, exact


def _digest(image):
    return hashlib.sha256(image.tobytes()).digest()


def _descriptors(images, row, column):
    """Even and odd parts, float32 `[batch, D]` and `[batch, E]`, of the descriptors of crops at (row, column)."""
    height, width, channels = images.shape[1] - 2 * _SHIFT, images.shape[2] - 2 * _SHIFT, images.shape[3]
    pixels = tf.cast(images[:, row : row + height, column : column + width], tf.float32)
    if images.dtype != tf.uint8:
        pixels *= 255.0
    pixels = tf.reshape(pixels, (-1, height * width * channels))
    even, odd = (tf.matmul(pixels, tf.constant(basis)) for basis in _bases(height, width, channels))
    # One grey level of contrast beside the others, so that flat images have a direction too.
    even = tf.concat([even, tf.ones_like(even[:, :1])], axis=1)
    scale = tf.math.rsqrt(tf.reduce_sum(even**2, axis=1, keepdims=True) + tf.reduce_sum(odd**2, axis=1, keepdims=True))
    return even * scale, odd * scale


def _bases(height, width, channels):
    """Cosines as columns, float32 `[height * width * channels, D]` and `[.., E]`: even and odd along a row.

    A coefficient is an amplitude in grey levels, with weights that were chosen by trial: the spectrum of natural
    images is flattened in part, colour raised, and the mean, which copies keep less well than the rest, lowered.
    """
    parts = [], []
    for k in range(channels):
        limit = 2 if k else 4
        for i in range(limit + 1):
            for j in range(limit + 1 - i):
                weight = (math.hypot(i, j) ** 0.5 if i + j else 0.125) * (1.5 if k and i + j else 1.0)
                waves = _cosine(height, i)[:, None, None] * _cosine(width, j)[:, None] * _cosine(channels, k)
                parts[j % 2].append(weight * waves.ravel() / math.sqrt(height * width))
    return tuple(np.stack(part, axis=1).astype(np.float32) for part in parts)


def _cosine(num, frequency):
    """Column `frequency` of the orthonormal cosine transform of `num` numbers: float64 `[num]`."""
    scale = math.sqrt((2 if frequency else 1) / num)
    return scale * np.cos(np.pi * frequency * (np.arange(num) + 0.5) / num)


def _differences(images):
    """Central differences along rows and columns, int32 `[n, height - 2, width - 2, 2 * channels]`."""
    images = images.astype(np.int32)
    rows = images[:, 2:, 1:-1] - images[:, :-2, 1:-1]
    columns = images[:, 1:-1, 2:] - images[:, 1:-1, :-2]
    return np.concatenate([rows, columns], axis=-1)


def _correlation(a, b):
    """The largest correlation of differences over shifts, float64 `[n]`."""
    height, width, num = a.shape[1:]
    # int32 holds the sum over one row of pixels, int64 over all.
    squares = [np.einsum("nhwc,nhwc->nhw", x, x) for x in (a, b)]
    best = np.full(len(a), -1.0)
    for row in range(-_SHIFT, _SHIFT + 1):
        for column in range(-_SHIFT, _SHIFT + 1):
            in_a = np.s_[:, max(0, row) : height + min(0, row), max(0, column) : width + min(0, column)]
            in_b = np.s_[:, max(0, -row) : height - max(0, row), max(0, -column) : width - max(0, column)]
            products = np.einsum("nhwc,nhwc->nh", a[in_a], b[in_b]).sum(axis=1, dtype=np.int64)
            noise = 2 * num * (height - abs(row)) * (width - abs(column))
            norms = [np.sqrt(x[where].sum((1, 2), dtype=np.int64) + noise) for x, where in zip(squares, (in_a, in_b))]
            best = np.maximum(best, products / (norms[0] * norms[1]))
    return best
