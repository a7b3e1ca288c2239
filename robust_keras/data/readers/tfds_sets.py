"""Image-classification sets of TensorFlow Datasets."""

import contextlib
import os
import re
import urllib.parse
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import absl.logging
import numpy as np
import tensorflow as tf

from robust_keras.data.readers import picture_headers, record_lengths, tfds_folders
from robust_keras.data.readers.pipelines import read_ahead
from robust_keras.data.readers.published import DataUnavailable
from robust_keras.foreign_files import local_path

# What a set can be called, these and others.
KNOWN = (
    "a TensorFlow Datasets name such as 'cifar10' or 'cifar100', 'digits', 'npz:FILE', 'images:FOLDER', or "
    "'tfrecord:GLOB'"
)
_NAME = re.compile(r"[a-z]\w*(/[\w.\-]+)?(:\d+\.\d+\.\d+)?")


def is_name(name: str) -> bool:
    """Whether a string has the form of a TFDS name, such as 'cifar10' or 'mnist:3.0.1'."""
    return bool(_NAME.fullmatch(name))


def is_prepared(name: str, folder: str) -> bool:
    """Whether a folder of sets has a copy of one, of any version; nothing is downloaded to find out."""
    return bool(_NAME.fullmatch(name)) and tfds_folders.has_copy(re.split("[/:]", name)[0], folder)


class Split(NamedTuple):
    """A split of a set that is there.

    Attributes:
        name: of the set.
        split: its name in the set.
        image_shape: (height, width, channels), None for what differs from image to image.
        num_classes: of the labels.
        builder: that of TFDS.
    """

    name: str
    split: str
    image_shape: tuple
    num_classes: int
    builder: Any

    @property
    def num_images(self) -> int:
        """How many there are."""
        return self.builder.info.splits[self.split].num_examples

    @property
    def folder(self) -> str:
        """Where the prepared copy is."""
        return str(self.builder.data_dir)

    @property
    def files(self) -> list[str]:
        """Those of the prepared copy that hold the split."""
        return [str(path) for path in self.builder.info.splits[self.split].filepaths]


def find(name: str, split: str, folder: str, *, any_size: bool = False) -> Split:
    """Finds a split of a set, which is downloaded where `folder` has no prepared copy.

    Args:
        name: of the set.
        split: 'train', 'validation' or 'test'; a set without 'test' has 'validation' in its place.
        folder: of all sets.
        any_size: whether images may differ in size.

    Raises:
        ValueError: for an unknown set, or one whose images are not uint8 and of one shape.
        DataUnavailable: (a ValueError) where it cannot be downloaded.
    """
    import tensorflow_datasets as tfds  # Slow to import, and not needed for other sets.

    tfds_folders.check(name, folder)
    with _quiet():
        try:
            builder = tfds.builder(name, data_dir=folder)
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(f"Expected {KNOWN}. Received: {name!r}") from error
        except Exception as error:  # For an unknown version or configuration, among others.
            raise ValueError(f"Expected {KNOWN}. Received: {name!r} ({why(error)})") from error
        shape, num_classes = _image_features(name, builder.info.features, any_size)
        _prepare(name, builder, folder)
        splits = list(builder.info.splits)
    found = "validation" if split == "test" and split not in splits else split
    if found not in splits:
        raise ValueError(f"Expected {name!r} to have a split {split!r}. Received: {splits}")
    return Split(name, found, shape, num_classes, builder)


def read(found: Split) -> tuple[np.ndarray, np.ndarray]:
    """All images, uint8 `[N, height, width, channels]`, and labels, integers `[N]`, in memory.

    Raises:
        ValueError: for a copy that is not whole.
    """
    images, labels = np.empty((found.num_images, *found.image_shape), np.uint8), np.empty(found.num_images, np.int64)
    end = 0
    for some_images, some_labels in blocks(found, 1024):
        start, end = end, end + len(some_images)
        images[start:end], labels[start:end] = some_images, some_labels
    return images, labels


def blocks(
    found: Split, size: int, *, first: int = 0, decode: Callable | None = None
) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:
    """Images and labels, in the order of the files.

    Args:
        found: the split.
        size: images in a block.
        first: how many to leave out at the beginning.
        decode: makes images of the strings that they are stored as; None for TFDS' own way, for images of one shape.

    Yields:
        (images, labels): uint8 `[n, height, width, channels]`, and integers `[n]`.

    Raises:
        ValueError: for a copy that is not whole, or what `decode` cannot read.
    """
    import tensorflow_datasets as tfds

    # One shard after the other.
    config = tfds.ReadConfig(try_autocache=False, interleave_cycle_length=1)
    # Of the features no others are decoded; of an image the header comes first.
    wanted = tfds.decode.PartialDecoding({"image": True, "label": True}, {"image": tfds.decode.SkipDecoding()})
    feature, done = found.builder.info.features["image"], first

    def taken(example):
        data = example["image"]
        return data if decode else feature.decode_example(picture_headers.checked(data[None])[0]), example["label"]

    try:
        for path in found.files:
            if local := local_path(path):
                record_lengths.check(local)
        with _quiet():
            options = {"shuffle_files": False, "read_config": config, "decoders": wanted}
            dataset = found.builder.as_dataset(split=found.split, **options)
        dataset = dataset.map(taken).skip(first).batch(size)
        if decode is not None:
            dataset = dataset.map(lambda images, labels: (decode(images), labels), tf.data.AUTOTUNE)
        for images, labels in read_ahead(dataset).as_numpy_iterator():
            yield images, labels.reshape(-1)
            done += len(images)
    except Exception as error:
        raise ValueError(
            f"Expected a whole copy of {found.name!r} in {found.folder}, of which {done:,} images were read. "
            f"Received: {why(error)}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(verbosity)


def _image_features(name: str, features, any_size: bool = False) -> tuple[tuple, int]:
    """Shape of the images of a TFDS set and number of its classes."""
    image: Any = features["image"] if "image" in features else None
    label: Any = features["label"] if "label" in features else None
    num_classes = getattr(label, "num_classes", None)
    if image is None or not num_classes or label.shape not in ((), (1,)):
        has = f"labels of shape {label.shape}" if image is not None and num_classes else sorted(features)
        raise ValueError(f"Expected a set with an 'image' and a class 'label'. Received: {name!r}, which has {has}")
    dtype = tf.as_dtype(image.dtype)
    if dtype != tf.uint8 or len(image.shape) != 3 or (None in image.shape and not any_size):
        raise ValueError(
            "Expected a set whose images are uint8 and of one shape, or an image_size to which they are resized. "
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


def why(error: BaseException) -> str:
    """The first line of an error, shortened, without the names of TensorFlow's nodes."""
    lines = re.sub(r"\{\{.*?\}\} *| *\[Op:.*", "", str(getattr(error, "message", error))).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
