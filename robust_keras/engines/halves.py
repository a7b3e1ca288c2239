"""A training step in two halves, each a function that is lowered on its own."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from robust_keras.engines import replicas


class Halves:
    """The functions of a step's halves; between them, replicas add up what they found.

    Args:
        model: with `begin_step`; see `training.steps`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._update: Callable | None = None

    def begin(self, number: tf.Tensor, batch: Any) -> tuple:
        """What a replica, by its number, finds in its share of a batch: `(added, averaged, same, predictions)`."""
        with replicas.numbered(number):
            *found, self._update = self._model.begin_step(batch)
        return tf.nest.map_structure(tf.convert_to_tensor, tuple(found))

    def update(self, added: Any, averaged: Any, same: Any, predictions: Any, batch: Any) -> Any:
        """What all replicas then do alike, after `begin` was traced; `batch` is what metrics read of it."""
        if self._update is None:
            raise ValueError("Expected a first half that was traced. Received: none")
        return self._update(added, averaged, same, predictions, batch)
