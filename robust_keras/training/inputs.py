"""What training is given, looked at before the first step: images as bytes, and a label of a class for each."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from robust_keras import losses
from robust_keras.data import sources
from robust_keras.data.training_batches import TrainingData

_NAMES = ("image", "label", "targets", "seeds", "is_labelled")


def checked(data: TrainingData) -> TrainingData:
    """The data of a run, its labels `[N]`.

    Raises:
        ValueError: for images that are not bytes `[N, height, width, channels]`, another number of labels, a label
            outside the classes, and no image held out.
    """
    if not len(data.validation.labels):
        raise ValueError("Expected at least one image held out for validation. Received: 0")
    num_classes = data.labelled.num_classes
    return data._replace(
        labelled=_checked_source(data.labelled, num_classes),
        validation=_checked_source(data.validation, num_classes),
        extra=data.extra and _checked_source(data.extra, num_classes),
    )


def _checked_source(source: sources.Source, num_classes: int) -> sources.Source:
    if np.ndim(source.labels) != 1:
        source = source._replace(labels=losses.as_labels(source.labels).numpy())
    sources.check(source)
    _check_range(source.labels, num_classes, f" in {source.name!r}")
    return source


def check_batch(batch: Mapping[str, tf.Tensor]) -> None:
    """Checks a batch, or its `element_spec`, as `AdversarialModel` takes it; of tensors with values, the labels' too.

    Raises:
        ValueError: for a missing entry, images that are not bytes, entries of different length, and a label outside
            the classes.
    """
    received = set(batch) if isinstance(batch, Mapping) else set()
    if missing := [name for name in _NAMES if name not in received]:
        raise ValueError(f"Expected a dictionary with {', '.join(_NAMES)} as a batch. Received: no {missing[0]}")
    image, targets = batch["image"], batch["targets"]
    if image.dtype != tf.uint8 or image.shape.rank != 4:
        raise ValueError(
            "Expected a batch of images as bytes, uint8 [batch, height, width, channels], which training divides by "
            f"255. Received: {image.dtype.name} {image.shape}"
        )
    if not targets.dtype.is_floating or targets.shape.rank != 2:
        raise ValueError(
            "Expected targets as probabilities, floats [batch, classes]. "
            f"Received: {targets.dtype.name} {targets.shape}"
        )
    sizes = {name: batch[name].shape[0] for name in _NAMES}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"Expected a batch with as many of each. Received: {sizes}")
    if tf.executing_eagerly() and not isinstance(batch["label"], tf.TensorSpec):
        _check_range(losses.as_labels(batch["label"]).numpy(), targets.shape[1], "")


def _check_range(labels: np.ndarray, num_classes: int, where: str) -> None:
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Expected labels as integers{where}. Received: {labels.dtype}")
    if len(labels) and not (0 <= (low := int(labels.min())) and (high := int(labels.max())) < num_classes):
        outside = low if low < 0 else high
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}{where}. Received: {outside}")
