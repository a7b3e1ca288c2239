"""How large an image is by its header: what would fill the memory is refused before it is decoded."""

import tensorflow as tf

MOST_PIXELS = 1 << 26  # The largest image in ImageNet has 61 million.
PNG = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = 32
# How a PNG, a BMP and a GIF begin, where two numbers stand, and what each of their bytes counts.
_STARTS = [PNG[:2], b"BM", b"GI"]
_PLACES = [16, 18, 6]
_UPWARDS, _DOWNWARDS = [1, 1 << 8, 1 << 16, 1 << 24], [1 << 24, 1 << 16, 1 << 8, 1]
_NONE, _TWO = [0] * 4, [1, 1 << 8]
_WEIGHTS = [
    [_DOWNWARDS + _NONE, _NONE + _DOWNWARDS],
    [_UPWARDS + _NONE, _NONE + _UPWARDS],
    [_TWO + [0] * 6, [0] * 2 + _TWO + _NONE],
]


def num_pixels(data: tf.Tensor) -> tf.Tensor:
    """How many pixels images have by their headers, float32 `[n]`; infinitely many where one is none that is known.

    Args:
        data: strings `[n]`: PNG, JPEG, BMP or GIF.

    Raises:
        tf.errors.InvalidArgumentError: for a JPEG without one.
    """
    start = tf.strings.substr(data, 0, 2)[:, None]
    header = tf.strings.join([tf.strings.substr(data, 0, _HEADER_BYTES), b"\xff" * _HEADER_BYTES])  # If it ends there.
    parts = [tf.io.decode_raw(tf.strings.substr(header, at, 8), tf.uint8, fixed_length=8) for at in _PLACES]
    numbers = tf.reduce_sum(
        tf.constant(_WEIGHTS, tf.int64) * tf.cast(tf.stack(parts, 1), tf.int64)[:, :, None], axis=-1
    )
    numbers = tf.cast(tf.minimum(numbers, (1 << 32) - numbers), tf.float32)  # Of a BMP, a height may be negative.
    pixels = tf.reduce_min(tf.where(start == _STARTS, tf.reduce_prod(numbers, axis=-1), float("inf")), axis=-1)

    def of_jpeg(one):
        return tf.reduce_prod(tf.cast(tf.io.extract_jpeg_shape(one)[:2], tf.float32))

    jpegs = tf.where(start[:, 0] == b"\xff\xd8")
    of_jpegs = tf.map_fn(of_jpeg, tf.gather_nd(data, jpegs), fn_output_signature=tf.TensorSpec((), tf.float32))
    return tf.tensor_scatter_nd_update(pixels, jpegs, of_jpegs)


def checked(data: tf.Tensor) -> tf.Tensor:
    """`data`, strings `[n]` in a graph; an error for an image of more than `MOST_PIXELS` pixels."""
    pixels = num_pixels(data)
    told = [f"an image of more than {MOST_PIXELS:,} pixels", pixels]
    with tf.control_dependencies([tf.debugging.Assert(tf.reduce_all(pixels <= MOST_PIXELS), told)]):
        return tf.identity(data)
