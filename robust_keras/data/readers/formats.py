"""Sets of images in files, as arrays that stay on disk: a function for each format.

What is stored as it is used is memory-mapped where it lies, the rest is converted once, as `shards` says; only `carmon`
reads everything, and `load_npz` and `load_tfds` what is small. The functions take these arguments and return the same:

Args:
    path: of the set.
    image_shape: (height, width, channels) that the images have to have, or None for any.
    num_classes: of the labels that are wanted, 0 for any number; None where no labels are.
    cache_dir: a local folder for what has to be converted, or None for beside the set.
    resized: whether images of other sizes are resized to `image_shape`, a square in colour, see `pictures.decoded`.

Returns:
    (images, labels): an image array, as `mapped` says; and integers `[N]`, not None where labels are wanted, which are
    not checked to be of the classes.

Raises:
    ValueError: for a set that is damaged, of another shape, or without the labels that are wanted.
"""

import contextlib
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import pickles
from robust_keras.data.readers import archives, pictures, shards, tfds_sets, tfrecords
from robust_keras.data.readers.mapped import MappedImages, Part
from robust_keras.data.readers.published import HOW_TO_LABEL
from robust_keras.foreign_files import local_path

Opened = tuple[np.ndarray | MappedImages, np.ndarray | None]

# Labelled sets up to this size are held in memory.
IN_MEMORY_BYTES = 1 << 29
_BLOCK_BYTES = 1 << 24
_TINY_SHAPE = (32, 32, 3)
_TINY_BYTES = math.prod(_TINY_SHAPE)


def load_npz(path: str, cache_dir: str | None = None) -> Opened:
    """A labelled npz file as arrays in memory, or one of more than `IN_MEMORY_BYTES` as `npz` opens it."""
    image, _ = _npz_members(path, labelled=True)
    if math.prod(image.shape) * image.dtype.itemsize > IN_MEMORY_BYTES:
        return npz(path, image_shape=None, num_classes=0, cache_dir=cache_dir)
    images, labels = archives.load(path, ("image", "label"))
    return as_bytes(images, f"'image' in {path}"), labels.reshape(-1)


def load_tfds(
    name: str, split: str, folder: str, *, image_shape: tuple | None, cache_dir: str | None
) -> tuple[Any, np.ndarray, int]:
    """A labelled set of TensorFlow Datasets as arrays in memory, or on disk where it is larger than `IN_MEMORY_BYTES`.

    Args:
        name: see `tfds_sets.find`, like `split` and `folder`.
        image_shape: what images are resized to, as above; None for a set whose images are of one shape.
        cache_dir: as above; shards are otherwise kept in the folder of the set.

    Returns:
        (images, labels, num_classes).

    Raises:
        ValueError: as `tfds_sets.find`, and for images that cannot be read.
    """
    found = tfds_sets.find(name, split, folder, any_size=image_shape is not None)
    if found.image_shape == image_shape:
        image_shape = None
    if image_shape is None and found.num_images * math.prod(found.image_shape) <= IN_MEMORY_BYTES:
        return *tfds_sets.read(found), found.num_classes
    shape = image_shape or found.image_shape
    decode = None if image_shape is None else pictures.compiled(pictures.decoded, shape=shape, resized=True)

    def blocks(folder, first):
        return tfds_sets.blocks(found, pictures.block_size(shape), first=first, decode=decode)

    path, resized = os.path.join(found.folder, found.split), image_shape is not None
    opened = _converted(
        path, shards.identity(found.files), blocks, shape, True, cache_dir, total=found.num_images, resized=resized
    )
    return opened[0], np.asarray(opened[1]), found.num_classes


def npz(path: str, *, image_shape: tuple | None, num_classes: int | None, cache_dir: str | None) -> Opened:
    """An npz file of `image` uint8 `[N, height, width, channels]`, or floats k/255, and `label`, integers `[N]`."""
    labelled = num_classes is not None
    image, label = _npz_members(path, labelled)
    check_shape(image.shape[1:], image_shape, path)
    if (found := _mapped(path, image, label if labelled else None, cache_dir)) is not None:
        return found

    def blocks(folder, first):
        num_rows = max(1, _BLOCK_BYTES // (math.prod(image.shape[1:]) * image.dtype.itemsize))
        wanted = [member for member in (image, label) if member is not None]
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(archives.blocks(path, member, folder, num_rows, first=first)))
                for member in wanted
            ]
            for images, *labels in zip(*streams):
                yield as_bytes(images, f"'image' in {path}"), labels[0].reshape(-1) if labels else None

    return _converted(path, shards.identity([path]), blocks, image_shape, labelled, cache_dir, total=image.shape[0])


def tiny_images(path: str, *, image_shape: tuple | None, num_classes: int | None, cache_dir: str | None) -> Opened:
    """`tiny_images.bin` of Torralba et al. (2008): records of 3,072 bytes, `[channels, width, height]`, no labels."""
    if num_classes is not None:
        raise ValueError(f"Expected images with labels; {HOW_TO_LABEL}. Received: {path}, which has none")
    check_shape(_TINY_SHAPE, image_shape, path)
    num_bytes = tf.io.gfile.stat(path).length
    if not num_bytes or num_bytes % _TINY_BYTES:
        raise ValueError(
            f"Expected a whole number of images of {_TINY_BYTES} bytes in {path}; it is truncated or something else. "
            f"Received: {num_bytes} bytes"
        )
    num_images = num_bytes // _TINY_BYTES
    if local := local_path(path):
        return MappedImages([Part(local, 0, num_images)], _TINY_SHAPE, column_major=True), None

    def blocks(folder, first):
        with tf.io.gfile.GFile(path, "rb") as file:
            file.seek(first * _TINY_BYTES)
            while data := file.read(_BLOCK_BYTES // _TINY_BYTES * _TINY_BYTES):
                columns = np.frombuffer(data, np.uint8).reshape(-1, *_TINY_SHAPE[::-1])
                yield np.ascontiguousarray(columns.transpose(0, 3, 2, 1)), None

    return _converted(path, shards.identity([path]), blocks, image_shape, False, cache_dir, total=num_images)


def tfrecord(
    path: str,
    *,
    image_shape: tuple | None,
    num_classes: int | None,
    cache_dir: str | None,
    resized: bool = False,
) -> Opened:
    """TFRecord files, a glob, of `tf.train.Example`s of `image` and maybe `label`: see `tfrecords.blocks`."""
    labelled = num_classes is not None
    files = tfrecords.list_files(path)
    tfrecords.check_complete(files)

    def blocks(folder, first):
        return tfrecords.blocks(files, image_shape, labelled=labelled, first=first, resized=resized)

    return _converted(path, shards.identity(files), blocks, image_shape, labelled, cache_dir, resized=resized)


def images(
    path: str,
    *,
    image_shape: tuple | None,
    num_classes: int | None,
    cache_dir: str | None,
    resized: bool = False,
    classes: Sequence[str] | None = None,
) -> Opened:
    """A folder of image files, or of sub-folders, each a class: see `pictures.list_folder`, also for `classes`."""
    labelled = num_classes is not None
    own_labels = labelled and classes is None  # By other classes the shards may have other labels.
    files, labels = pictures.list_folder(path, classes)
    if num_classes is not None and labels is None:
        raise ValueError(f"Expected a sub-folder of images for each class in {path}; {HOW_TO_LABEL}. Received: none")
    if num_classes and labels is not None and labels[-1] + 1 != num_classes:
        raise ValueError(f"Expected {num_classes} classes, each a sub-folder of {path}. Received: {labels[-1] + 1}")

    def blocks(folder, first):
        return pictures.file_blocks(files, labels, image_shape, first=first, resized=resized)

    identity, sizes = shards.identity(files, most_bytes=pictures.MOST_BYTES), {"total": len(files), "resized": resized}
    opened = _converted(path, identity, blocks, image_shape, own_labels, cache_dir, **sizes)
    return opened if classes is None else (opened[0], labels)


def carmon(path: str, *, image_shape: tuple | None, num_classes: int | None, cache_dir: str | None) -> Opened:
    """The pickle of Carmon et al. (2019), a dict of `data` and `extrapolated_targets`, which is read into memory."""
    keys = ("data", "extrapolated_targets")
    content = pickles.load(path)
    found = list(content) if type(content) is dict else type(content).__name__
    if type(content) is not dict or not all(type(content.get(k)) is np.ndarray for k in keys):
        raise ValueError(f"Expected a dict with arrays {keys} in {path}. Received: {found}")
    images, labels = (content[key] for key in keys)
    check_form(images, labels, *keys, path)
    images = as_bytes(images, f"'data' in {path}")
    check_shape(images.shape[1:], image_shape, path)
    return images, labels.reshape(-1)


def check_form(
    images: np.ndarray | archives.Member,
    labels: np.ndarray | archives.Member | None,
    image_key: str,
    label_key: str,
    path: str,
) -> None:
    """Raises ValueError unless two arrays, or `archives.Member`s, can be images and their labels.

    Labels may be None, `[N]`, or `[N, 1]` as `keras.datasets` has them.
    """
    shape: tuple = images.shape
    received: Any
    if len(shape) != 4 or 0 in shape:
        expected, received = f"{image_key!r} of shape [N, height, width, channels]", shape
    elif shape[1] in (1, 3) and shape[3] not in (1, 3):
        expected, received = f"{image_key!r} with the channels last", shape
    elif images.dtype != np.uint8 and images.dtype.kind != "f":
        expected, received = f"{image_key!r} of uint8", images.dtype
    elif labels is not None and labels.shape not in (shape[:1], (*shape[:1], 1)):
        expected, received = f"{label_key!r} of shape {shape[:1]}", labels.shape
    elif labels is not None and labels.dtype.kind not in "iu":
        expected, received = f"{label_key!r} of integers", labels.dtype
    else:
        return
    raise ValueError(f"Expected {expected} in {path}. Received: {received}")


def check_shape(shape: tuple, image_shape: tuple | None, where: str) -> None:
    """Raises ValueError where images have another shape than `image_shape`, which may be None."""
    if image_shape is not None and tuple(shape) != tuple(image_shape):
        raise ValueError(
            f"Expected images of shape {tuple(image_shape)}, as in the labelled set, for {where}. "
            f"Received: {tuple(shape)}"
        )


def as_bytes(images: np.ndarray, where: str) -> np.ndarray:
    """Images of uint8 as they are, and of floats k/255 as uint8 k.

    Raises:
        ValueError: for floats that are something else.
    """
    if images.dtype == np.uint8:
        return images
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # Also where there is a NaN.
        raise ValueError(f"Expected uint8, or floats in [0, 1], for {where}. Received: {low:g} to {high:g}")
    tolerance = max(1e-3, 128 * float(np.finfo(images.dtype).eps))  # What rounding to a narrow type can do.
    result = np.empty(images.shape, np.uint8)
    num_rows = max(1, _BLOCK_BYTES // (math.prod(images.shape[1:]) * 8))
    for start in range(0, len(images), num_rows):
        scaled = images[start : start + num_rows].astype(np.float64) * 255
        rounded = np.rint(scaled)
        error = np.abs(scaled - rounded).max()
        if error > tolerance:
            raise ValueError(
                f"Expected uint8, or floats that are multiples of 1/255, for {where}. "
                f"Received: floats up to {error:.3f}/255 away from one"
            )
        result[start : start + num_rows] = rounded
    return result


def _npz_members(path: str, labelled: bool) -> tuple[archives.Member, archives.Member | None]:
    """What `archives.members` says of images, and of labels, which are None if they are neither wanted nor fit."""
    keys = ("image", "label") if labelled else ("image",)
    members, names = archives.members(path, ("image", "label"))
    if not all(key in members for key in keys):
        expected = "the arrays 'image' and 'label'" if labelled else "an array 'image'"
        advice = f"; {HOW_TO_LABEL}" if "image" in members else ""
        raise ValueError(f"Expected {expected} in {path}{advice}. Received: {names}")
    image, label = members["image"], members.get("label")
    if not labelled and label is not None:
        with contextlib.suppress(ValueError):
            check_form(image, label, "image", "label", path)
            return image, label
        label = None
    check_form(image, label, "image", "label", path)
    return image, label


def _mapped(path: str, image: archives.Member, label: archives.Member | None, cache_dir: str | None) -> Opened | None:
    """Images, and labels if they are wanted, mapped where they lie; None where they cannot be."""
    local, wanted = local_path(path), [image] if label is None else [image, label]
    if local is None or image.offset is None or image.dtype != np.uint8:
        return None
    if label is not None and label.offset is None:
        return None
    # A cache_dir that is not local is none for this.
    note = os.path.join(shards.place(path, cache_dir and local_path(cache_dir)), "checked.json")
    archives.verify(local, wanted, note)
    images = MappedImages([Part(local, image.offset, image.shape[0])], image.shape[1:])
    labels = None if label is None else np.memmap(local, label.dtype, "r", label.offset or 0, label.shape[:1])
    return images, labels


def _converted(path, identity, blocks, image_shape, labelled, cache_dir, *, total=None, resized=False):
    where = shards.place(path, cache_dir)
    if resized:  # Each size has a folder of its own.
        where = f"{where.removesuffix('.shards')}.{image_shape[0]}.shards"
    options = {"image_shape": image_shape, "labelled": labelled, "total": total, "trusted": cache_dir is not None}
    return shards.converted(path, where, identity, blocks, **options)
