"""How large an image is by its header: what would fill the memory is refused before it is decoded."""

import tensorflow as tf

MOST_PIXELS = 1 << 26  # The largest image in ImageNet has 61 million.
PNG = b"\x89PNG\r\n\x1a\n"


def num_pixels(data: tf.Tensor) -> tf.Tensor:
    """How many pixels an image has by its header, float32; infinitely many where it is none that is known.

    Args:
        data: a string: a PNG, JPEG, BMP or GIF.

    Raises:
        tf.errors.InvalidArgumentError: for a JPEG without one.
    """

    def of_numbers(position, kind, is_big_endian):
        part = tf.strings.join([tf.strings.substr(data, tf.minimum(position, tf.strings.length(data)), 8), b"\xff" * 8])
        read = tf.io.decode_raw(tf.strings.substr(part, 0, 2 * kind.size), kind, little_endian=not is_big_endian)
        return tf.reduce_prod(tf.abs(tf.cast(read, tf.float32)))

    def of_jpeg():
        return tf.reduce_prod(tf.cast(tf.io.extract_jpeg_shape(data)[:2], tf.float32))

    start = tf.strings.substr(data, 0, 2)
    cases = [
        (start == PNG[:2], lambda: of_numbers(16, tf.int32, True)),
        (start == b"\xff\xd8", of_jpeg),
        (start == b"BM", lambda: of_numbers(18, tf.int32, False)),
        (start == b"GI", lambda: of_numbers(6, tf.uint16, False)),
    ]
    return tf.case(cases, default=lambda: tf.constant(float("inf")))


def checked(data: tf.Tensor) -> tf.Tensor:
    """`data`, in a graph; an error for an image of more than `MOST_PIXELS` pixels."""
    pixels = num_pixels(data)
    told = [f"an image of more than {MOST_PIXELS:,} pixels", pixels]
    with tf.control_dependencies([tf.debugging.Assert(pixels <= MOST_PIXELS, told)]):
        return tf.identity(data)
