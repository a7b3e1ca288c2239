"""The examples under evaluation, and whether they, and what the model says of them, can be what was meant."""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from robust_keras import losses


class Examples(NamedTuple):
    """Images, what they show, and what the model says of them.

    Attributes:
        images: uint8 `[num_examples, height, width, channels]`.
        labels: int32 `[num_examples]`.
        clean_logits: float32 `[num_examples, num_classes]`.
    """

    images: np.ndarray
    labels: np.ndarray
    clean_logits: np.ndarray

    @property
    def num_classes(self) -> int:
        """Of the model."""
        return self.clean_logits.shape[-1]

    @property
    def correct(self) -> np.ndarray:
        """Which the model gets right before any attack: bool `[num_examples]`."""
        return ~losses.is_wrong(self.clean_logits, self.labels).numpy()

    def digest(self) -> str:
        """The SHA-256 of images and labels."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        for array in (self.images, self.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def first(source: Any, num_examples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first images and labels of a source.

    Args:
        source: has `images`, uint8 `[n, ...]`, and `labels`, see `losses.as_labels`.
        num_examples: how many; None for all.

    Returns:
        (images, labels), uint8 `[num_examples, ...]` and int32 `[num_examples]`.

    Raises:
        ValueError: for more than there are or none, images of another type, or labels that are no classes.
    """
    if num_examples is not None and not 1 <= num_examples <= len(source.labels):
        raise ValueError(f"Expected num_examples from 1 to {len(source.labels)}. Received: {num_examples!r}")
    images, labels = np.asarray(source.images[:num_examples]), np.asarray(source.labels[:num_examples])
    is_labels = np.issubdtype(labels.dtype, np.integer) or (labels.ndim == 2 and labels.shape[-1] > 1)
    if images.dtype != np.uint8 or not is_labels:
        raise ValueError(f"Expected uint8 images and integer labels. Received: {images.dtype} and {labels.dtype}")
    if len(images) != len(labels):
        raise ValueError(f"Expected a label for each image. Received: {len(labels)} for {len(images)}")
    return images, losses.as_labels(labels).numpy()


def check_labels(labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError for labels that are none of the model's classes."""
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        raise ValueError(f"Expected labels of the model's {num_classes} classes. Received: {outside[0]}")


def check_above_chance(examples: Examples) -> None:
    """Raises ValueError where clean accuracy is not above that of guessing; fewer than 50 examples tell nothing."""
    correct = examples.correct
    chance = 1 / examples.num_classes
    # As high as one in twenty blind guessers gets.
    limit = chance + 1.645 * math.sqrt(chance * (1 - chance) / len(correct))
    if len(correct) >= 50 and correct.mean() <= limit:
        raise ValueError(
            f"Expected clean accuracy above chance, {100 * chance:.2f} %. Received: {100 * correct.mean():.2f} % of "
            f"{len(correct)} examples. Do --input_range, --input_layout, --logits_output and --dataset fit the model? "
            "evaluate.allow_chance = True goes on all the same"
        )
