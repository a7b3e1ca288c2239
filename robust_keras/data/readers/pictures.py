"""PNG, JPEG and BMP images, decoded in blocks, and the files of a folder.

Images are decoded as they are, to the channels and the orientation that they are stored in; or, where they differ in
size, in colour, and the middle square of each is resized.
"""

import functools
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.data.readers.picture_headers import MOST_PIXELS, PNG, checked, num_pixels
from robust_keras.data.readers.pipelines import read_ahead
from robust_keras.data.readers.tfds_sets import why

BLOCK = 256  # Images that are decoded in one call.
_BLOCK_BYTES = 1 << 22  # Or fewer, where they are large: several calls run at once.
_FILES_AT_ONCE = 1 << 16  # Whose paths are held twice.
_SIGNATURES = (PNG, b"\xff\xd8\xff", b"BM")
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp")
MOST_BYTES = 1 << 28  # Of an image's file.
# The parts that a folder can be divided into.
_PARTS = {"train": ("train",), "test": ("test", "val"), "validation": ("val",)}
# TensorFlow's messages can hold bytes of a damaged file, and are then no text.
FAILURES = (tf.errors.OpError, UnicodeDecodeError)


def part_of(folder: str, split: str) -> tuple[str, list[str]]:
    """The part of a folder that is a split, and the classes that its labels count.

    A folder with `train` and `test` or `val` in it, or nothing but these, is divided, and its classes are those of
    `train` if it has that. Any other is one set, whatever the split.

    Args:
        folder: a path that `tf.io.gfile` can list.
        split: 'train'; 'test', which is `test` or, where there is none, `val`; or 'validation', which is `val`.

    Returns:
        (part, classes): a folder, and the sorted names of the sub-folders that are its classes.

    Raises:
        ValueError: for a part that is not there.
    """
    names, _ = _listed(folder)
    parts = {part for choices in _PARTS.values() for part in choices}.intersection(names)
    if not parts or not (parts == set(names) or ("train" in parts and len(parts) > 1)):
        return folder, names
    found = [part for part in _PARTS[split] if part in parts]
    if not found:
        raise ValueError(
            f"Expected a folder {' or '.join(map(repr, _PARTS[split]))} in {folder}, for its split {split!r}. "
            f"Received: {', '.join(sorted(parts))}"
        )
    part = os.path.join(folder, found[0])
    return part, _listed(os.path.join(folder, "train") if "train" in parts else part)[0]


def list_folder(folder: str, classes: Sequence[str] | None = None) -> tuple[list[str], np.ndarray | None]:
    """Finds the images in a folder, or in its sub-folders, each a class.

    Names that begin with a dot do not count, nor does what has been converted to shards.

    Args:
        folder: a path that `tf.io.gfile` can list.
        classes: names of the classes that labels count, of which the folder need not have all; None for its own.

    Returns:
        (paths, labels): the files, sorted, class by class; and int64 `[N]`, the places of the classes among their
        sorted names, or None for images directly in the folder.

    Raises:
        ValueError: for a folder without images, with images in it and in sub-folders too, or a sub-folder without or
            of none of the classes; for a link in it, or anything else that is called an image and is no file.
    """
    folder = foreign_files.local_path(folder) or folder
    names, files = _listed(folder)
    flat = _images(folder, files)
    paths, counts = [], []
    for name in names:
        at_top = os.path.join(folder, name)
        visible = ((at, files) for at, _, files in _walk(at_top) if "/." not in at[len(at_top) :])
        found = [path for at, files in visible for path in _images(at, files)]
        paths += sorted(found)
        counts.append(len(found))
    if flat and paths:
        raise ValueError(f"Expected images in {folder} or in sub-folders of it. Received: both")
    if flat or not paths:
        if not flat:
            raise ValueError(f"Expected files *{', *'.join(_EXTENSIONS)} in {folder}. Received: none")
        return sorted(flat), None
    if empty := [name for name, count in zip(names, counts) if not count]:
        raise ValueError(
            f"Expected images in every sub-folder of {folder}, each a class. Received: none in {empty[:5]}"
        )
    places = {name: place for place, name in enumerate(names if classes is None else classes)}
    if unknown := [name for name in names if name not in places]:
        raise ValueError(
            f"Expected sub-folders of {folder} by the names of the {len(places)} classes of the training set. "
            f"Received: {unknown[:5]}"
        )
    return paths, np.repeat([places[name] for name in names], counts)


def file_blocks(
    paths: Sequence[str],
    labels: np.ndarray | None,
    image_shape: tuple | None,
    *,
    first: int = 0,
    resized: bool = False,
) -> Generator[tuple[np.ndarray, np.ndarray | None], None, None]:
    """Decodes image files.

    Args:
        paths: a list of them.
        labels: integers `[N]`, or None.
        image_shape: of every image, or None for that of the first.
        first: how many to leave out at the beginning.
        resized: whether images of any size are made images of that shape, see `decoded`.

    Yields:
        (images, labels): uint8 `[n, height, width, channels]`, and `[n]` or None.

    Raises:
        ValueError: for a file that is no whole image, or of another shape.
    """
    shape = image_shape or _decoded_file(paths[0]).shape
    decode = compiled(decoded, shape=shape, read=tf.io.read_file, resized=resized)
    size = block_size(shape)
    for begin in range(first, len(paths), _FILES_AT_ONCE):
        dataset = tf.data.Dataset.from_tensor_slices(paths[begin : begin + _FILES_AT_ONCE])
        dataset = dataset.batch(size).map(decode, tf.data.AUTOTUNE)
        done = begin
        try:
            for images in read_ahead(dataset).as_numpy_iterator():
                start, done = done, done + len(images)
                yield images, None if labels is None else labels[start:done]
        except FAILURES as error:
            for path in paths[done : done + size]:
                _decoded_file(path, shape, resized)
            raise ValueError(f"Expected images that can be read. Received: {paths[done]} ({why(error)})") from error


def _listed(folder):
    """Sub-folders that are classes, or parts of the set, in the order of their labels, and files."""
    _, sub_folders, files = next(_walk(foreign_files.local_path(folder) or folder), (folder, [], []))
    sub_folders = (name.rstrip("/") for name in sub_folders)
    names = sorted(name for name in sub_folders if not name.startswith(".") and not name.endswith(".shards"))
    if all(name.isdecimal() for name in names):
        names.sort(key=int)  # Labels: 2 comes before 10.
    return names, files


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, of any file system, where nothing that counts is a link: it could lead to anybody's pictures."""
    if foreign_files.local_path(folder) is None:
        yield from tf.io.gfile.walk(folder)
        return
    waiting = [folder]
    while waiting:
        at = waiting.pop()
        folders: list[str] = []
        files: list[str] = []
        with os.scandir(at) as entries:
            for entry in entries:
                is_folder, is_named = entry.is_dir(), entry.name.lower().endswith(_EXTENSIONS)
                if entry.name.startswith(".") or not (is_folder or is_named):
                    continue
                if entry.is_symlink() or not (is_folder or entry.is_file()):
                    what = "a link" if entry.is_symlink() else foreign_files.kind(entry.stat().st_mode)
                    raise ValueError(
                        "Expected files and folders in a folder of images, which alone may be a link; copy what is "
                        f"linked, or give that folder. Received: {foreign_files.printable(entry.path)}, {what}"
                    )
                (folders if is_folder else files).append(entry.name)
        waiting += [os.path.join(at, name) for name in folders]
        yield at, folders, files


def block_size(shape: tuple) -> int:
    """How many images of a shape are decoded in one call."""
    return max(1, min(BLOCK, _BLOCK_BYTES // math.prod(shape)))


def _images(folder, files):
    names = (name for name in files if name.lower().endswith(_EXTENSIONS) and not name.startswith("."))
    return [os.path.join(folder, name) for name in names]


@functools.lru_cache(maxsize=8)
def compiled(function: Callable, **options: Any) -> Callable:
    """A function of strings, which is traced once and not for each file."""
    strings = tf.TensorSpec([None], tf.string)
    return tf.function(functools.partial(function, **options), input_signature=[strings], autograph=False)


def decoded(block: tf.Tensor, shape: tuple, read: Callable = tf.identity, resized: bool = False) -> tf.Tensor:
    """Images `[n, height, width, channels]` of strings, in a graph; an error that says little if one does not fit.

    Resized images are of any size; the middle square of each, in colour, is resized bilinearly, with antialiasing.
    """

    if read is not tf.identity:
        block = tf.map_fn(read, block)

    def decoded_if_it_fits(data):
        start = tf.strings.substr(data, 0, 2)
        is_known = tf.reduce_any(start == [signature[:2] for signature in _SIGNATURES])
        is_deep = (start == PNG[:2]) & (tf.strings.substr(data, 24, 1) == b"\x10")
        with tf.control_dependencies([tf.debugging.Assert(is_known & ~is_deep, [is_deep])]):
            return (
                _resized_middle(_decoded_one(data, 3), shape) if resized else tf.ensure_shape(_decoded_one(data), shape)
            )

    return tf.map_fn(decoded_if_it_fits, checked(block), fn_output_signature=tf.TensorSpec(shape, tf.uint8))


def _resized_middle(image, shape):
    size = tf.reduce_min(tf.shape(image)[:2])
    top, left = tf.unstack((tf.shape(image)[:2] - size) // 2)
    middle = image[top : top + size, left : left + size]
    resized = tf.image.resize(middle, shape[:2], antialias=True)
    return tf.ensure_shape(tf.saturate_cast(tf.round(resized), tf.uint8), shape)


def _decoded_one(data, channels=0):
    # By default TensorFlow decodes JPEG by a method that is up to 20 grey levels off what other programs read.
    return tf.cond(
        tf.strings.substr(data, 0, 2) == _SIGNATURES[-1],
        lambda: tf.io.decode_bmp(data, channels),
        lambda: tf.io.decode_jpeg(data, channels, dct_method="INTEGER_ACCURATE"),  # PNG too.
    )


def _decoded_file(path, shape=None, resized=False):
    with foreign_files.open_regular(path, follow=True, most_bytes=MOST_BYTES) as file:
        return decoded_or_refused(file.read(), shape, path, resized)


def decoded_or_refused(data: bytes, shape: tuple | None, where: str, resized: bool = False) -> np.ndarray:
    """The image as an array; an error that says what is wrong where it is not one of that shape, or to be resized."""
    if not data.startswith(_SIGNATURES):
        raise ValueError(f"Expected a PNG, JPEG or BMP image in {where}. Received: {len(data)} bytes of something else")
    if data.startswith(PNG) and data[24:25] == b"\x10":
        raise ValueError(f"Expected an image of 8 bits a channel in {where}. Received: 16 bits")
    try:
        if (pixels := num_pixels(tf.constant([data])).numpy()[0]) > MOST_PIXELS:
            raise ValueError(
                f"Expected an image of at most {MOST_PIXELS:,} pixels in {where}. Received: {pixels:,.0f} by its header"
            )
        image = _decoded_one(data, 3 if resized else 0).numpy()
    except FAILURES as error:
        raise ValueError(f"Expected a whole image in {where}. Received: {why(error)}") from error
    if shape is not None and image.shape != shape and not resized:
        raise ValueError(
            "Expected an image_size, to which images of several sizes are resized, or an image of shape "
            f"{shape} in {where}. Received: {image.shape}"
        )
    return image
