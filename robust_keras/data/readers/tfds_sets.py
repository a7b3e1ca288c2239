"""Image-classification sets of TensorFlow Datasets as arrays."""

import os
import re
import urllib.parse
from typing import Any

import absl.logging
import numpy as np
import tensorflow as tf

from robust_keras.data.readers.published import DataUnavailable

# What a set can be called, these and others.
KNOWN = "a TensorFlow Datasets name such as 'cifar10' or 'cifar100', 'digits', or 'npz:FILE'"
_NAME = re.compile(r"[a-z]\w*(/[\w.\-]+)?(:\d+\.\d+\.\d+)?")


def is_name(name: str) -> bool:
    """Whether a string has the form of a TFDS name, such as 'cifar10' or 'mnist:3.0.1'."""
    return bool(_NAME.fullmatch(name))


def load(name: str, split: str, folder: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Loads a set, which is downloaded where `folder` has no prepared copy.

    Returns:
        (images, labels, num_classes): uint8 `[N, height, width, channels]`, integers `[N]` and an int.

    Raises:
        ValueError: for an unknown set, or one whose images are not uint8 and of one shape.
        DataUnavailable: (a ValueError) where it cannot be downloaded.
    """
    import tensorflow_datasets as tfds  # Slow to import, and not needed for other sets.

    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        try:
            builder = tfds.builder(name, data_dir=folder)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(f"Expected {KNOWN}. Received: {name!r}") from error
        except Exception as error:  # For an unknown version or configuration, among others.
            raise ValueError(f"Expected {KNOWN}. Received: {name!r} ({why(error)})") from error
        shape, num_classes = _image_features(name, builder.info.features)
        _prepare(name, builder, folder)
        return *_read(name, builder, split, shape), num_classes
    finally:
        absl.logging.set_verbosity(verbosity)


def _image_features(name: str, features) -> tuple[tuple, int]:
    """Shape of the images of a TFDS set and number of its classes."""
    image: Any = features["image"] if "image" in features else None
    label: Any = features["label"] if "label" in features else None
    num_classes = getattr(label, "num_classes", None)
    if image is None or not num_classes or label.shape not in ((), (1,)):
        has = f"labels of shape {label.shape}" if image is not None and num_classes else sorted(features)
        raise ValueError(f"Expected a set with an 'image' and a class 'label'. Received: {name!r}, which has {has}")
    dtype = tf.as_dtype(image.dtype)
    if dtype != tf.uint8 or len(image.shape) != 3 or None in image.shape:
        raise ValueError(
            "Expected a set whose images are uint8 and of one shape. "
            f"Received: {name!r} with {dtype.name} of shape {image.shape}"
        )
    return image.shape, num_classes


def _prepare(name, builder, folder):
    """Downloads a TFDS set, unless there is a prepared copy."""
    copy = builder.data_dir
    if tf.io.gfile.exists(os.path.join(copy, "dataset_info.json")):
        return
    if tf.io.gfile.exists(copy):
        raise ValueError(
            f"Expected a whole copy of {name!r}, or none. Received: {copy} without a "
            "dataset_info.json; copy it again, or delete that folder to download it"
        )
    cause = None
    try:
        reason = _unreachable(builder.url_infos or ())
        if reason is None:
            builder.download_and_prepare()
            return
    except Exception as error:
        reason, cause = why(error), error
    raise DataUnavailable(
        f"Expected {name!r} to be in {folder} or to be downloaded, which failed ({reason}). Give a "
        f"prepared copy with --data_dir=DIR, where DIR holds {os.path.relpath(copy, folder)}/"
        f"dataset_info.json and the records beside it. Received: no {copy}"
    ) from cause


def _unreachable(urls):
    """Why no host can be reached; None if one can. TFDS itself would try for minutes."""
    import requests  # As TFDS does, so that proxies are treated alike.

    reason = None
    for scheme, host in sorted({urllib.parse.urlsplit(url)[:2] for url in urls}):
        if scheme not in ("http", "https"):
            return None
        try:
            requests.head(f"{scheme}://{host}", timeout=10)
            return None
        except requests.RequestException as error:
            reason = f"cannot reach {host}: {type(error).__name__}"
    return reason


def _read(name, builder, split, shape):
    import tensorflow_datasets as tfds

    splits = builder.info.splits
    if split not in splits:
        raise ValueError(f"Expected {name!r} to have a split {split!r}. Received: {list(splits)}")
    num_images = splits[split].num_examples
    images, labels = np.empty((num_images, *shape), np.uint8), np.empty(num_images, np.int64)
    # One shard after the other.
    config = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
    end = 0
    try:
        dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
        dataset = dataset.map(lambda example: (example["image"], example["label"])).batch(1024)
        for batch in dataset.as_numpy_iterator():
            start, end = end, end + len(batch[0])
            images[start:end], labels[start:end] = batch[0], batch[1].reshape(-1)
    except Exception as error:
        raise ValueError(f"Expected a whole copy of {name!r} in {builder.data_dir}. Received: {why(error)}") from error
    return images, labels


def why(error: BaseException) -> str:
    """The first line of an error, shortened, without the names of TensorFlow's nodes."""
    lines = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", str(getattr(error, "message", error))).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
