"""Images and labels to evaluate on, in the forms that people have them."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras import losses
from robust_keras.evaluation.examples import as_bytes


class Collected(NamedTuple):
    """Examples in memory, a source of `evaluate.evaluate`.

    Attributes:
        images: `[N, ...]`, uint8 where all of them are whole bytes, else float32 in [0, 1].
        labels: int32 `[N]`.
        given_labels: as they were given, maybe one-hot rows.
        name: what results call the set.
    """

    images: np.ndarray
    labels: np.ndarray
    given_labels: np.ndarray
    name: str

    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return self.images, self.labels


def collected(data: Any, num_examples: int | None, bounds: Sequence[float]) -> Collected:
    """The examples of any form of data.

    Args:
        data: `(x, y)`; a `tf.data.Dataset` or a `keras.utils.PyDataset` of such batches, or of dictionaries of `image`
            and `label`; or whatever has `images` and `labels`, as a `data.sources.Source`.
        num_examples: how many, the first ones; None for all.
        bounds: of float images.

    Raises:
        ValueError: for data of another form, without an end or without examples, more examples than there are, and
            images or labels that are none.
    """
    if num_examples is not None and (not isinstance(num_examples, int) or num_examples < 1):
        raise ValueError(f"Expected num_examples as an integer >= 1, or None for all. Received: {num_examples!r}")
    if hasattr(data, "images") and hasattr(data, "labels"):  # Which may lie on disk.
        images, labels, name = data.images[:num_examples], data.labels[:num_examples], getattr(data, "name", "source")
    elif isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)):
        images, labels, name = *_of_batches(data, num_examples), "dataset"
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        (images, labels), name = data, "arrays"
    else:
        raise ValueError(f"Expected data as (x, y), a dataset of such batches or a Source. Received: {_form(data)}")
    images, labels = np.asarray(images)[:num_examples], np.asarray(labels)[:num_examples]
    if len(images.shape) < 2 or not len(images) or len(labels) != len(images):
        raise ValueError(
            f"Expected images [N, ...] and a label for each. Received: images {images.shape}, labels {labels.shape}"
        )
    if num_examples is not None and len(images) < num_examples:
        raise ValueError(f"Expected num_examples from 1 to {len(images)}. Received: {num_examples}")
    if images.dtype != np.uint8:
        images = as_bytes(pixel_bounds.to_unit(images, bounds))
    return Collected(images, losses.as_labels(labels).numpy(), labels, name)


def _of_batches(data: Any, num_examples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first examples of a dataset."""
    if num_examples is None and _has_no_end(data):
        raise ValueError("Expected a dataset that ends, or num_examples. Received: one that repeats for ever")
    parts, num = [], 0
    for images, labels in _pairs(data):
        parts.append((images, labels))
        num += len(labels)
        if num_examples is not None and num >= num_examples:
            break
    if not parts:
        raise ValueError("Expected a dataset with examples. Received: an empty one")
    if len(shapes := {images.shape[1:] for images, _ in parts}) > 1:
        one, other = sorted(shapes)[:2]
        raise ValueError(f"Expected images of one shape. Received: some of {one} and some of {other}")
    images, labels = (np.concatenate(each) for each in zip(*parts))
    return images, labels


def _has_no_end(data: Any) -> bool:
    if isinstance(data, tf.data.Dataset):
        return int(data.cardinality()) == tf.data.INFINITE_CARDINALITY
    return data.num_batches is None


def _pairs(data: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of images and labels, arrays."""
    batches: Iterable
    if isinstance(data, tf.data.Dataset):
        batches = data.as_numpy_iterator()
    else:
        batches = (data[k] for k in (itertools.count() if data.num_batches is None else range(data.num_batches)))
    for batch in batches:
        if isinstance(batch, dict) and {"image", "label"} <= batch.keys():
            batch = batch["image"], batch["label"]
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError(f"Expected a dataset of batches (x, y). Received: batches as {_form(batch)}")
        images, labels = map(np.asarray, batch)
        if images.ndim < 2 or labels.ndim < 1 or len(images) != len(labels):
            raise ValueError(
                "Expected a dataset of batches (x, y), as dataset.batch(...) makes them. Received: elements of shapes "
                f"{images.shape} and {labels.shape}"
            )
        yield images, labels


def _form(data: Any) -> str:
    if isinstance(data, (tuple, list)):
        return f"a {type(data).__name__} of {len(data)}"
    return f"a {type(data).__name__}"
