"""Labelled sets by name, in memory where they are small, on disk where they are not."""

from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras.data.readers import digits, formats, pictures, tfds_sets, tfrecords, views
from robust_keras.data.readers.published import find_file


def load(
    name: str, split: str, folder: str, *, side: int | None = None, cache_dir: str | None = None
) -> tuple[Any, np.ndarray, int]:
    """Loads a labelled set, or opens one that stays on disk.

    Args:
        name: one of
            'cifar10', or another TFDS image-classification set of uint8 images;
            'digits', by Alpaydin and Kaynak (1998), enlarged bilinearly to 32 x 32 x 3: its test set is the first 360
            of `np.random.RandomState(0).permutation(1797)`, its training set the others;
            'npz:FILE' with `image` uint8 `[N, height, width, channels]`, or floats k/255 which convert without loss,
            and `label` integers `[N]` or `[N, 1]`;
            'tfrecord:GLOB', see `tfrecords.blocks`, which like an npz file is one set, whatever the split;
            'images:FOLDER', see `pictures.part_of` and `pictures.list_folder`.
        split: 'train', 'test', or 'validation' of sets that have it.
        folder: where TFDS sets are, and what is not found as it is.
        side: height and width of the squares, in colour, that images of any size are resized to, and that raw bytes,
            digits and arrays are; None where images are of one shape.
        cache_dir: a local folder for what has to be converted, or None for beside the data.

    Returns:
        (images, labels, num_classes): an image array, as `mapped` says, integers `[N]` and an int. The images are in
        the order in which they are stored; those of a folder in that of `np.random.RandomState(0).permutation(N)`, so
        that the first ones are of all classes.

    Raises:
        ValueError: for an unknown name or split, or a malformed set.
        DataUnavailable: (a ValueError) where the data is missing and cannot be downloaded.
    """
    kind, _, path = str(name).partition(":")
    if split not in ("train", "test") and (split != "validation" or kind in ("digits", "npz", "tfrecord")):
        raise ValueError(f"Expected the split 'train' or 'test'. Received: {split!r}")
    image_shape = None if side is None else (side, side, 3)
    images: Any
    labels: Any
    if name == "digits":
        images, labels = digits.load(split)
        _check_shape(name, images, image_shape)
        return images, labels, digits.NUM_CLASSES
    if kind == "images" and path:
        path = find_file(name, path, folder, tf.io.gfile.isdir, "folder")
        return _folder(path, split, image_shape, cache_dir)
    if kind == "npz" and path:
        images, labels = formats.load_npz(find_file(name, path, folder), cache_dir)
        _check_shape(name, images, image_shape)
    elif kind == "tfrecord" and path:
        path = find_file(name, path, folder, tfrecords.list_files)
        images, labels = formats.tfrecord(path, **_any(image_shape, cache_dir))
    elif tfds_sets.is_name(str(name)):
        return formats.load_tfds(name, split, folder, image_shape=image_shape, cache_dir=cache_dir)
    else:
        raise ValueError(f"Expected {tfds_sets.KNOWN}. Received: {name!r}")
    labels = np.asarray(labels)
    return images, labels, int(labels.max()) + 1


def _folder(path: str, split: str, image_shape: tuple | None, cache_dir: str | None) -> tuple[Any, np.ndarray, int]:
    part, classes = pictures.part_of(path, split)
    images, labels = formats.images(part, classes=classes, **_any(image_shape, cache_dir))
    order = np.random.RandomState(0).permutation(len(images))
    return views.Selected(images, order), np.asarray(labels)[order], len(classes)


def _check_shape(name: str, images: Any, image_shape: tuple | None) -> None:
    if image_shape is not None and images.shape[1:] != image_shape:
        raise ValueError(
            f"Expected an image_size that {name!r} has, whose images, {images.shape[1:]}, are not resized. "
            f"Received: {image_shape[0]}"
        )


def _any(image_shape: tuple | None, cache_dir: str | None) -> dict[str, Any]:
    """The arguments of a format for labels of any number of classes, and images of any size where a shape is given."""
    return {
        "image_shape": image_shape,
        "num_classes": 0,
        "cache_dir": cache_dir,
        "resized": image_shape is not None,
    }
