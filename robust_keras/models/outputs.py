"""What a model's outputs are: logits, or something else that was taken for them."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

# Probabilities in half precision sum to 1 so nearly.
_TOLERANCE = 1e-2
# Fewer examples, or outputs, than these say little of what outputs are like.
_MANY = 50
# The largest float32 under a probability of 1, as a logarithm.
_NEARLY_ONE = -(2.0**-24)


def check(outputs: np.ndarray, *, are_log_probabilities: bool = False) -> None:
    """Refuses what cannot be logits.

    Softmax is told by rows that sum to 1. Sigmoids are told by where they lie: all between 0 and 1 on 50 examples or
    more, the highest of a row over .95 in a tenth of the rows, and a quarter of the others under .05. Logits of a
    trained model leave that range, cosines and the like stay away from its ends.

    Args:
        outputs: float32 `[num_examples, num_classes]`, on clean images.
        are_log_probabilities: whether they are logarithms of what the model calls probabilities.

    Raises:
        ValueError: for outputs that are not finite, are probabilities, or were called so and exceed 1.
    """
    if not np.isfinite(outputs).all():
        raise ValueError("Expected finite logits on clean images. Received: some that are not")
    if are_log_probabilities:
        if outputs.max() > np.log1p(_TOLERANCE):
            raise ValueError(
                f"Expected probabilities, as --outputs or from_logits says. Received: up to {np.exp(outputs.max()):.6g}"
            )
        return
    hint = "for a model of probabilities, say --outputs=probabilities, or from_logits=False in Python"
    if (outputs >= 0).all() and _sum_to_one(outputs):
        raise ValueError(f"Expected logits. Received: rows that sum to 1; {hint}")
    if len(outputs) >= _MANY and is_within_0_1(outputs):
        highest, others = outputs.max(axis=-1), np.sort(outputs, axis=-1)[:, :-1]
        if (highest > 0.95).mean() >= 0.1 and others.size and (others < 0.05).mean() >= 0.25:
            raise ValueError(f"Expected logits. Received: values from 0 to 1, as of sigmoids; {hint}")


def is_within_0_1(outputs: np.ndarray) -> bool:
    """Whether all outputs lie in [0, 1], of so many that this means something."""
    return bool(outputs.size >= _MANY and outputs.min() >= 0.0 and outputs.max() <= 1.0)


def are_log_probabilities(logits_fn: Callable) -> bool:
    """Whether a function, as its attribute `outputs` says, returns logarithms of what its model calls probabilities."""
    return getattr(logits_fn, "outputs", None) == "probabilities"


def attackable(logits_fn: Callable, outputs: np.ndarray) -> Callable:
    """The function to attack: `logits_fn` itself, or the `log_odds` of probabilities that don't sum to 1.

    Args:
        logits_fn: images to logits.
        outputs: of it, float32 `[num_examples, num_classes]`.
    """
    if are_log_probabilities(logits_fn) and not _sum_to_one(np.exp(outputs)):
        return log_odds(logits_fn)
    return logits_fn


def log_odds(logits_fn: Callable) -> Callable:
    """Sigmoids' own logits, `log p - log(1 - p)`, of a function that returns `log p`.

    The logarithm of a softmax is its logits but for a constant; that of a sigmoid is not, and levels off at 0.
    """

    def log_odds_fn(x):
        log_p = tf.minimum(tf.cast(logits_fn(x), tf.float32), _NEARLY_ONE)
        return log_p - tf.math.log(-tf.math.expm1(log_p))

    return log_odds_fn


def num_saturated(log_probabilities: np.ndarray) -> int:
    """How many examples have a probability of exactly 0 or 1, whose gradient is lost."""
    lowest = np.log(np.finfo(np.float32).tiny)
    saturated = (log_probabilities.max(axis=-1) >= 0.0) | (log_probabilities.min(axis=-1) <= lowest + 1e-3)
    return int(saturated.sum())


def _sum_to_one(probabilities):
    return np.allclose(probabilities.sum(axis=-1), 1.0, rtol=0.0, atol=_TOLERANCE)
