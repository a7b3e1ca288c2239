"""PNG, JPEG and BMP images, decoded in blocks, and the files of a folder.

Images are decoded as they are, to the channels and the orientation that they are stored in.
"""

import functools
import os
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras.data.readers.mapped import local_path
from robust_keras.data.readers.tfds_sets import why

BLOCK = 256  # Images that are decoded in one call.
_FILES_AT_ONCE = 1 << 16  # Whose paths are held twice.
PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = (PNG, b"\xff\xd8\xff", b"BM")
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp")
# TensorFlow's messages can hold bytes of a damaged file, and are then no text.
FAILURES = (tf.errors.OpError, UnicodeDecodeError)


def list_folder(folder: str) -> tuple[list[str], np.ndarray | None]:
    """Finds the images in a folder, or in its sub-folders, each a class.

    Names that begin with a dot do not count, nor does what has been converted to shards.

    Args:
        folder: a path that `tf.io.gfile` can list.

    Returns:
        (paths, labels): the files, sorted, class by class; and int64 `[N]`, the places of the classes among their
        sorted names, or None for images directly in the folder.

    Raises:
        ValueError: for a folder without images, with images in it and in sub-folders too, or a sub-folder without.
    """
    walk = os.walk if local_path(folder) else tf.io.gfile.walk
    folder = local_path(folder) or folder
    _, sub_folders, files = next(iter(walk(folder)), (folder, [], []))
    flat = _images(folder, files)
    sub_folders = (name.rstrip("/") for name in sub_folders)
    classes = sorted(name for name in sub_folders if not name.startswith(".") and not name.endswith(".shards"))
    if all(name.isdecimal() for name in classes):
        classes.sort(key=int)  # Labels: 2 comes before 10.
    paths, counts = [], []
    for name in classes:
        at_top = os.path.join(folder, name)
        visible = ((at, files) for at, _, files in walk(at_top) if "/." not in at[len(at_top) :])
        found = [path for at, files in visible for path in _images(at, files)]
        paths += sorted(found)
        counts.append(len(found))
    if flat and paths:
        raise ValueError(f"Expected images in {folder} or in sub-folders of it. Received: both")
    if flat or not paths:
        if not flat:
            raise ValueError(f"Expected files *{', *'.join(_EXTENSIONS)} in {folder}. Received: none")
        return sorted(flat), None
    if empty := [name for name, count in zip(classes, counts) if not count]:
        raise ValueError(
            f"Expected images in every sub-folder of {folder}, each a class. Received: none in {empty[:5]}"
        )
    return paths, np.repeat(np.arange(len(classes)), counts)


def file_blocks(
    paths: Sequence[str], labels: np.ndarray | None, image_shape: tuple | None, *, first: int = 0
) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:
    """Decodes image files.

    Args:
        paths: a list of them.
        labels: integers `[N]`, or None.
        image_shape: of every image, or None for that of the first.
        first: how many to leave out at the beginning.

    Yields:
        (images, labels): uint8 `[n, height, width, channels]`, and `[n]` or None.

    Raises:
        ValueError: for a file that is no whole image, or of another shape.
    """
    shape = image_shape or _decoded_file(paths[0]).shape
    decode = compiled(decoded, shape=shape, read=tf.io.read_file)
    for begin in range(first, len(paths), _FILES_AT_ONCE):
        dataset = tf.data.Dataset.from_tensor_slices(paths[begin : begin + _FILES_AT_ONCE])
        dataset = dataset.batch(BLOCK).map(decode, tf.data.AUTOTUNE)
        done = begin
        try:
            for images in dataset.prefetch(2).as_numpy_iterator():
                start, done = done, done + len(images)
                yield images, None if labels is None else labels[start:done]
        except FAILURES as error:
            for path in paths[done : done + BLOCK]:
                _decoded_file(path, shape)
            raise ValueError(f"Expected images that can be read. Received: {paths[done]} ({why(error)})") from error


def _images(folder, files):
    names = (name for name in files if name.lower().endswith(_EXTENSIONS) and not name.startswith("."))
    return [os.path.join(folder, name) for name in names]


@functools.lru_cache(maxsize=8)
def compiled(function: Callable, **options: Any) -> Callable:
    """A function of strings, which is traced once and not for each file."""
    strings = tf.TensorSpec([None], tf.string)
    return tf.function(functools.partial(function, **options), input_signature=[strings], autograph=False)


def decoded(block: tf.Tensor, shape: tuple, read: Callable = tf.identity) -> tf.Tensor:
    """Images `[n, height, width, channels]` of strings, in a graph; an error that says little if one does not fit."""

    def decoded_if_it_fits(data):
        data = read(data)
        start = tf.strings.substr(data, 0, 2)
        is_known = tf.reduce_any(start == [signature[:2] for signature in _SIGNATURES])
        is_deep = (start == PNG[:2]) & (tf.strings.substr(data, 24, 1) == b"\x10")
        with tf.control_dependencies([tf.debugging.Assert(is_known & ~is_deep, [is_deep])]):
            return tf.ensure_shape(_decoded_one(data), shape)

    return tf.map_fn(decoded_if_it_fits, block, fn_output_signature=tf.TensorSpec(shape, tf.uint8))


def _decoded_one(data):
    # By default TensorFlow decodes JPEG by a method that is up to 20 grey levels off what other programs read.
    return tf.cond(
        tf.strings.substr(data, 0, 2) == _SIGNATURES[-1],
        lambda: tf.io.decode_bmp(data),
        lambda: tf.io.decode_jpeg(data, dct_method="INTEGER_ACCURATE"),  # PNG too.
    )


def _decoded_file(path, shape=None):
    with tf.io.gfile.GFile(path, "rb") as file:
        return decoded_or_refused(file.read(), shape, path)


def decoded_or_refused(data: bytes, shape: tuple | None, where: str) -> np.ndarray:
    """The image as an array; an error that says what is wrong where it is not one of that shape."""
    if not data.startswith(_SIGNATURES):
        raise ValueError(f"Expected a PNG, JPEG or BMP image in {where}. Received: {len(data)} bytes of something else")
    if data.startswith(PNG) and data[24:25] == b"\x10":
        raise ValueError(f"Expected an image of 8 bits a channel in {where}. Received: 16 bits")
    try:
        image = _decoded_one(data).numpy()
    except FAILURES as error:
        raise ValueError(f"Expected a whole image in {where}. Received: {why(error)}") from error
    if shape is not None and image.shape != shape:
        raise ValueError(f"Expected an image of shape {shape} in {where}. Received: {image.shape}")
    return image
