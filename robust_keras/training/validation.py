"""How right a run's networks are on the images held out, while it trains."""

import functools
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from robust_keras import losses, noise
from robust_keras.data import sources
from robust_keras.engines import replicas
from robust_keras.models import any_network
from robust_keras.training import recipes


class Validator:
    """Validates the network that is trained and, where there is one, its averaged twin.

    Make it in the scope of the run's strategy. An incomplete last batch is filled up with images that are not counted,
    so that one program is compiled. Attacks run on what is right before them, where that makes fewer batches.

    Args:
        network: the one that is trained.
        twin: the one with averaged weights, or None.
        source: the images held out.
        validation: what is right, and which accuracy tells the best weights.
        batch_size: images in a batch, over all replicas.
        seed: the run's.

    Attributes:
        on_replica: what a replica computes for each network, `(image, label, seeds) -> (clean, robust)` with bytes,
            int32 labels and bool results `[batch]`, by the ending of its columns: '' and, of the twin, '_averaged'.
        best_metric: the column that tells the best weights.

    Raises:
        ValueError: for a batch_size that does not divide among the replicas.
    """

    def __init__(
        self,
        network: keras.Model,
        twin: keras.Model | None,
        source: sources.Source,
        validation: recipes.Validation,
        *,
        batch_size: int,
        seed: int,
    ) -> None:
        num_replicas = replicas.num_replicas()
        if batch_size % num_replicas:
            raise ValueError(
                f"Expected a validation_batch_size that divides among {num_replicas} replicas. Received: {batch_size}"
            )
        self._source, self._seed = source, seed
        self._batch_size = batch_size
        networks = {"": network} if twin is None else {"": network, "_averaged": twin}
        self.on_replica = {ending: _correct_of(each, validation.correct_fn) for ending, each in networks.items()}
        self._compiled = {ending: replicas.over_replicas(correct) for ending, correct in self.on_replica.items()}
        self.best_metric = f"val_{validation.best_by}{list(networks)[-1]}"
        # A single batch takes as long with fewer images in it.
        spares = not validation.needs_wrong_ones and len(source.labels) > batch_size
        spared = networks if spares else {}
        self._right = {ending: replicas.over_replicas(_right_of(each)) for ending, each in spared.items()}

    def try_out(self) -> None:
        """Compiles what a validation runs of one network, and runs it on a batch: a bad setting, or too large a batch,
        shows. Of the other network it is the same; on JAX's devices, where compiling takes long, all is compiled now.
        """
        last = list(self._compiled.values())[-1]
        for compiled in [*self._right.values(), *self._compiled.values()] if replicas.is_on_jax() else [last]:
            compiled(*self._full_batch(np.arange(min(self._batch_size, len(self._source.labels)))))

    def __call__(self, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Accuracies by column of metrics.csv, or None once `should_stop()` is true."""
        columns: dict[str, float] = {}
        for ending, correct in self._compiled.items():
            num_images = len(self._source.labels)
            seen: np.ndarray | None = np.arange(num_images)
            if ending in self._right:
                right = self._all_of(self._right[ending], seen, should_stop)
                seen = None if right is None else np.flatnonzero(right[0])
            found = None if seen is None else self._all_of(correct, seen, should_stop)
            if found is None:
                return None
            clean, robust = found.sum(axis=1) / num_images
            columns |= {f"val_clean{ending}": float(clean), f"val_robust{ending}": float(robust)}
        return columns

    def _all_of(self, compiled, indices, should_stop):
        """What a compiled function finds of images by their numbers, bool `[results, n]`; None once it is to stop."""
        found = []
        for start in range(0, len(indices), self._batch_size):
            if should_stop():
                return None
            found.append(np.stack(compiled(*self._full_batch(indices[start : start + self._batch_size]))))
        return np.concatenate(found, axis=1)[:, : len(indices)] if found else np.zeros((2, 0), bool)

    def _full_batch(self, indices):
        return self.batch_of(np.resize(indices, self._batch_size))

    def batch_of(self, indices: np.ndarray) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """What `on_replica` takes of some of the images held out, by their numbers."""
        seeds = noise.fold_in(noise.example_seeds(self._seed, 0, tf.constant(indices, tf.int32)), noise.VALIDATION)
        return tf.constant(self._source.images[indices]), tf.constant(self._source.labels[indices]), seeds


def _correct_of(network: keras.Model, correct_fn: Callable) -> Callable:
    def correct(image, label, seeds):
        x = tf.cast(image, tf.float32) / 255.0
        return correct_fn(functools.partial(any_network.evaluated, network), x, label, seeds=seeds)

    return correct


def _right_of(network: keras.Model) -> Callable:
    def right(image, label, seeds):
        return (~losses.is_wrong(any_network.evaluated(network, tf.cast(image, tf.float32) / 255.0), label),)

    return right
