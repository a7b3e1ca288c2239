"""The examples under evaluation, and whether they, and what the model says of them, can be what was meant."""

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np

from robust_keras import bounds, losses

# Floats so near to k / 255, in units of 1 / 255, are the bytes k: what conversions between ranges in float32 may add.
_SAME_BYTE = 1e-4
_CHUNK = 1 << 24


class Examples(NamedTuple):
    """Images, what they show, and what the model says of them.

    Attributes:
        images: `[num_examples, height, width, channels]`, uint8, or float32 in [0, 1].
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
        return digest(self.images, self.labels)


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """The SHA-256 of images `[n, ...]` and their labels, int32 `[n]`, as `first` returns them."""
    kind = "" if images.dtype == np.uint8 else f" {images.dtype}"
    found = hashlib.sha256(f"{images.shape}{kind}".encode())
    for array in (images, labels):
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def first(source: Any, num_examples: int | None) -> tuple[np.ndarray, np.ndarray]:
    """The first images and labels of a source.

    Args:
        source: has `images`, `[n, ...]`, uint8 or floats in [0, 1], and `labels`, see `losses.as_labels`.
        num_examples: how many; None for all.

    Returns:
        (images, labels), `[num_examples, ...]` and int32 `[num_examples]`; images are uint8 where they are whole bytes,
        else float32.

    Raises:
        ValueError: for more than there are or none, images of another type, or labels that are no classes.
    """
    if num_examples is not None and not 1 <= num_examples <= len(source.labels):
        raise ValueError(f"Expected num_examples from 1 to {len(source.labels)}. Received: {num_examples!r}")
    images, labels = np.asarray(source.images[:num_examples]), np.asarray(source.labels[:num_examples])
    is_labels = np.issubdtype(labels.dtype, np.integer) or (labels.ndim == 2 and labels.shape[-1] > 1)
    if not (images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating)) or not is_labels:
        raise ValueError(
            f"Expected uint8 or float images and integer labels. Received: {images.dtype} and {labels.dtype}"
        )
    if len(images) != len(labels):
        raise ValueError(f"Expected a label for each image. Received: {len(labels)} for {len(images)}")
    if images.dtype != np.uint8:
        images = as_bytes(bounds.to_unit(images))
    return images, losses.as_labels(labels).numpy()


def as_floats(images: np.ndarray) -> np.ndarray:
    """Images as `Examples` has them, as float32 in [0, 1]."""
    return images / np.float32(255) if images.dtype == np.uint8 else images


def as_bytes(images: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] as bytes, uint8, where all of them are k / 255 but for rounding; else as they are."""
    flat, found = images.reshape(-1), np.empty(images.size, np.uint8)
    for start in range(0, images.size, _CHUNK):
        scaled = flat[start : start + _CHUNK] * np.float32(255)
        whole = np.rint(scaled)
        if np.abs(scaled - whole).max() > _SAME_BYTE:
            return images
        found[start : start + _CHUNK] = whole
    return found.reshape(images.shape)


def check_above_chance(examples: Examples) -> None:
    """Raises ValueError where clean accuracy is not above that of guessing; fewer than 50 examples tell nothing."""
    correct = examples.correct
    chance = 1 / examples.num_classes
    # As high as one in twenty blind guessers gets.
    limit = chance + 1.645 * math.sqrt(chance * (1 - chance) / len(correct))
    if len(correct) >= 50 and correct.mean() <= limit:
        raise ValueError(
            f"Expected clean accuracy clearly above chance, {100 * limit:.2f} % or more of {len(correct)} examples. "
            f"Received: {100 * correct.mean():.2f} %. Do images and labels fit the model: --input_range (bounds=), "
            "--input_layout, --logits_output, --dataset? Has its BatchNormalization moving statistics of 100 steps or "
            "more? evaluate.allow_chance = True (allow_chance=True) goes on all the same"
        )
