"""What training is given, looked at before the first step: data, networks and objectives."""

import inspect
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_keras import losses
from robust_keras.data import sources
from robust_keras.data.training_batches import TrainingData
from robust_keras.models import any_network

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
    check_labels(source.labels, num_classes, f" in {source.name!r}")
    return source


def is_batch(element: Any) -> bool:
    """Whether a batch, or its `element_spec`, is meant as one that `training_batches.batches` makes."""
    return isinstance(element, Mapping) and not {"targets", "seeds", "is_labelled"}.isdisjoint(element)


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
        check_labels(losses.as_labels(batch["label"]).numpy(), targets.shape[1])


def check_network(network: Any) -> None:
    """Refuses what training cannot take, as far as that shows before there are images.

    Raises:
        ValueError: for what is no `keras.Model`, several inputs or outputs, or one that takes integers.
    """
    if not isinstance(network, keras.Model):
        raise ValueError(f"Expected a keras.Model, from images to logits. Received: {type(network).__name__}")
    inputs = any_network.known_inputs(network)
    outputs = network.outputs if inputs else ()
    if len(inputs) > 1 or len(outputs) > 1:
        raise ValueError(
            "Expected a network with one input, the images, and one output, the logits. Received: "
            f"{len(inputs)} inputs and {len(outputs)} outputs of {network.name!r}"
        )
    if inputs and not tf.as_dtype(inputs[0].dtype).is_floating:
        raise ValueError(
            "Expected a network that takes floats, through which gradients flow; bytes are scaled to its bounds. "
            f"Received: one that takes {inputs[0].dtype}"
        )


def check_functions(**given: Any) -> None:
    """Refuses functions of one's own that do not take what a step calls them with; names and None are left alone.

    Args:
        **given: by the argument of `AdversarialModel` that they are.

    Raises:
        ValueError: for what is no function, or takes something else.
    """
    attack = "(logits_fn, x, targets, *, seeds)"
    takes = {"objective": "(logits_fn, x, x_adv, labels, targets)", "attack": attack, "validation_attack": attack}
    for name, function in given.items():
        if function is None or (name == "objective" and isinstance(function, str)):
            continue
        if not callable(function):
            raise ValueError(f"Expected {name} as a function {takes[name]}. Received: {function!r}")
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # Some of what is written in C has none.
            continue
        try:
            signature.bind(*[None] * 5) if name == "objective" else signature.bind(None, None, None, seeds=None)
        except TypeError:
            raise ValueError(f"Expected {name} as a function {takes[name]}. Received: one {signature}") from None


def check_objective(values: tf.Tensor, labels: tf.Tensor) -> None:
    """Raises ValueError for an objective that does not return a loss for each example."""
    if not tf.is_tensor(values) or values.shape.rank != 1 or not values.shape.is_compatible_with(labels.shape):
        received = tuple(values.shape) if tf.is_tensor(values) else type(values).__name__
        raise ValueError(
            f"Expected an objective that returns the loss of each example, {tuple(labels.shape)}. Received: {received}"
        )


def as_floats(image: tf.Tensor) -> tf.Tensor:
    """Images of a batch, bytes or floats in [0, 1], as float32 in [0, 1]."""
    return tf.cast(image, tf.float32) / 255.0 if image.dtype == tf.uint8 else image


def check_labels(labels: np.ndarray, num_classes: int, where: str = "") -> None:
    """Raises ValueError for labels that are no integers or none of the classes; `where` is for the message."""
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"Expected labels as integers{where}. Received: {labels.dtype}")
    if len(labels) and not (0 <= (low := int(labels.min())) and (high := int(labels.max())) < num_classes):
        outside = low if low < 0 else high
        raise ValueError(f"Expected labels from 0 to {num_classes - 1}{where}. Received: {outside}")
