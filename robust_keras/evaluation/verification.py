"""Fresh predictions: of clean images, and of those that attacks propose, each of which must lie in the threat model."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.evaluation.examples import as_floats
from robust_keras.models import any_network

# A float32 subtraction of two pixels is off by at most this much.
_TOLERANCE = 1e-6
# Of the largest logit: what another machine, or batches of another size, may compute otherwise.
_SLACK = 1e-3


def predict(predict_fn: Callable, images: np.ndarray, batch_size: int) -> np.ndarray:
    """float32 logits `[n, num_classes]` of `[n, ...]` images, n >= 1: uint8, or float32 in [0, 1]; in full batches."""
    pieces = []
    for start in range(0, len(images), batch_size):
        packed = np.resize(np.arange(start, min(start + batch_size, len(images))), batch_size)
        x = tf.constant(images[packed], tf.float32)
        logits = predict_fn(x / 255.0 if images.dtype == np.uint8 else x).numpy()
        pieces.append(logits[: len(images) - start].astype(np.float32))
    return np.concatenate(pieces)


# What a model raises that takes other images, or returns no tensor.
_NO_SUCH_MODEL = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    tf.errors.InvalidArgumentError,
    tf.errors.UnimplementedError,
)


def first_look(predict_fn: Callable, images: np.ndarray, batch_size: int) -> np.ndarray:
    """What `predict` returns, of a model that may be none of such images.

    Raises:
        ValueError: where it does not take them, or returns no logits of several classes for each.
    """
    try:
        logits = predict(predict_fn, images, batch_size)
    except _NO_SUCH_MODEL as error:
        if str(error).startswith("Expected"):
            raise
        raise ValueError(
            f"Expected a model of images {images.shape[1:]} in batches of {batch_size}. "
            f"Received: {any_network.reason(error)}"
        ) from error
    if logits.ndim != 2 or logits.shape[0] != len(images) or logits.shape[1] < 2:
        raise ValueError(
            f"Expected logits [{len(images)}, classes] of at least two classes. Received: shape {logits.shape}"
        )
    return logits


def is_wrong_or_nearly(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which of float32 logits `[n, num_classes]` are wrong, or as near to it as other machines compute: bool `[n]`."""
    margin, slack = _margin(logits, labels)
    return losses.is_wrong(logits, labels).numpy() | (margin <= slack)


def is_right_or_nearly(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which are right, or as near to it; see `is_wrong_or_nearly`."""
    margin, slack = _margin(logits, labels)
    return margin >= -slack


class Judged(NamedTuple):
    """What came of images that an attack proposed: bool `[n]` each.

    Attributes:
        wrong: inside the threat model, and the model gets them wrong.
        wrong_uint8: the same, after they were rounded to bytes; none where clean images are no bytes.
        non_finite: not all of the pixels are finite numbers. These break nothing.
        outside: finite, and outside of the threat model. Nor do these.
    """

    wrong: np.ndarray
    wrong_uint8: np.ndarray
    non_finite: np.ndarray
    outside: np.ndarray


class Judge:
    """Decides whether images that attacks propose count.

    Attributes:
        batch_size: int.
        non_finite: whether any logits so far were no finite numbers.
    """

    def __init__(
        self, predict_fn: Callable, images: np.ndarray, labels: np.ndarray, threat: threats.Threat, batch_size: int
    ) -> None:
        """
        Args:
            predict_fn: images to logits, over all replicas.
            images: `[num_examples, ...]`, the clean ones, uint8 or float32 in [0, 1].
            labels: int32 `[num_examples]`.
            threat: what adversarial images must obey.
            batch_size: of each prediction.
        """
        self._predict_fn, self._images, self._labels = predict_fn, images, labels
        self._threat, self.batch_size = threat, batch_size
        self.non_finite = False

    def predict(self, x: np.ndarray) -> np.ndarray:
        """float32 logits `[n, num_classes]` of float32 images `[n, ...]`, n >= 1."""
        return predict(self._predict_fn, x, self.batch_size)

    def judge(self, indices: np.ndarray, proposed: np.ndarray) -> Judged:
        """Fresh predictions on proposed images, as they are and rounded to bytes.

        Args:
            indices: int `[n]`, the examples.
            proposed: float32 `[n, ...]`.

        Returns:
            A `Judged`.
        """
        wrong, wrong_uint8 = np.zeros((2, len(indices)), bool)
        clean = as_floats(self._images[indices])
        finite = np.isfinite(proposed).all(axis=tuple(range(1, proposed.ndim)))
        inside = finite & self._is_inside(proposed, clean)
        if inside.any():
            proposed, clean, labels = proposed[inside], clean[inside], self._labels[indices[inside]]
            wrong[inside] = self._is_wrong(proposed, labels)
            if self._images.dtype == np.uint8:
                wrong_uint8[inside] = self._is_wrong(_rounded(proposed, clean, self._threat), labels)
        return Judged(wrong, wrong_uint8, ~finite, finite & ~inside)

    def holds(self, indices: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Whether images that were kept lie in the threat model and the model gets them wrong, or nearly: bool `[n]`.

        Args:
            indices: int `[n]`, the examples.
            kept: float32 `[n, ...]`.
        """
        finite = np.isfinite(kept).all(axis=tuple(range(1, kept.ndim)))
        inside = finite & self._is_inside(np.where(np.isfinite(kept), kept, 2.0), as_floats(self._images[indices]))
        logits = self.predict(np.clip(np.nan_to_num(kept), 0.0, 1.0))
        return inside & is_wrong_or_nearly(logits, self._labels[indices])

    def _is_wrong(self, x, labels):
        logits = self.predict(x)
        self.non_finite = self.non_finite or not np.isfinite(logits).all()
        return losses.is_wrong(logits, labels).numpy()

    def _is_inside(self, proposed, clean):
        distance = self._threat.distance(tf.constant(proposed), tf.constant(clean)).numpy()
        in_range = ((proposed >= 0.0) & (proposed <= 1.0)).all(axis=tuple(range(1, proposed.ndim)))
        return (distance <= _limit(self._threat)) & in_range


def _margin(logits, labels):
    """How far a label's logit is above the highest other, and what of that rounding may do."""
    found = np.nan_to_num(logits.astype(np.float64), nan=0.0)
    rows = np.arange(len(labels))
    own = found[rows, labels].copy()
    slack = _SLACK * (1.0 + np.abs(found).max(axis=1))
    found[rows, labels] = -np.inf
    return own - found.max(axis=1), slack


def _rounded(x_adv, x, threat):
    """Adversarial images as whole bytes: the nearest ones or, where these leave the ball, those nearer to `x`."""
    nearest = np.round(x_adv * 255)
    # A thousandth of a byte makes up for float32.
    step = (x_adv - x) * 255
    towards_x = np.round(x * 255) + np.trunc(step + np.copysign(1e-3, step))
    outside = threat.distance(nearest / np.float32(255), x).numpy() > _limit(threat)
    return np.where(outside.reshape(-1, *[1] * (x.ndim - 1)), towards_x, nearest) / np.float32(255)


def _limit(threat):
    return threat.epsilon * (1 + 1e-5) + _TOLERANCE
