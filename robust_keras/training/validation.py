"""How right a run's networks are on the images held out, while it trains."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import losses, noise
from robust_keras.data import sources
from robust_keras.engines import replicas
from robust_keras.models import any_network
from robust_keras.training import recipes

_MOST_PICTURED, _MOST_PIXELS = 8, 1 << 18


class Seen(NamedTuple):
    """What a validation saw of one network.

    Attributes:
        clean_margin: `losses.margin` of all images held out, float32 `[n]`.
        robust_margin: the larger one with and without the attack, so that it is below 0 of what is robust.
        adversarial: the first few images under attack, float32 `[few, ...]`; those that were not attacked as they are.
    """

    clean_margin: np.ndarray
    robust_margin: np.ndarray
    adversarial: np.ndarray


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
        on_replica: what a replica computes for each network, `(image, label, seeds) -> (clean, robust, ...)` of bytes
            and int32 labels, as the `seen_fn` returns it or, without one, the `correct_fn`; by the ending of its
            columns: '' and, of the twin, '_averaged'.
        best_metric: the column that tells the best weights.
        seen: a `Seen` of each network in the last validation, by these endings; nothing without a `seen_fn`.
        pictured: the first images held out, as bytes: as many as `Seen.adversarial` has, 8 or fewer large ones.

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
        self._has_seen = validation.seen_fn is not None
        fn = validation.seen_fn or validation.correct_fn
        self.on_replica = {ending: _of_bytes(each, fn) for ending, each in networks.items()}
        self._compiled = {ending: replicas.over_replicas(each) for ending, each in self.on_replica.items()}
        self.seen: dict[str, Seen] = {}
        height, width = source.images.shape[1:3]
        self.pictured = source.images[: min(_MOST_PICTURED, max(_MOST_PIXELS // (height * width), 1))]
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
        for ending in self._compiled:
            found = self._found(ending, should_stop)
            if found is None:
                return None
            clean, robust = (float(each.sum() / len(each)) for each in found[:2])
            columns |= {f"val_clean{ending}": clean, f"val_robust{ending}": robust}
            if self._has_seen:
                self.seen[ending] = Seen(found[2], np.maximum(found[2], found[3]), found[4])
        return columns

    def _found(self, ending, should_stop):
        """What the function of one network finds of all images, arrays `[n, ...]`, of the last one the first few; None
        once it is to stop.
        """
        every = np.arange(len(self._source.labels))
        if ending not in self._right:
            return self._all_of(self._compiled[ending], every, should_stop)
        first = self._all_of(self._right[ending], every, should_stop)
        if first is None:
            return None
        right, margin = first
        attacked = np.flatnonzero(right)
        found = self._all_of(self._compiled[ending], attacked, should_stop)
        if found is None:
            return None
        whole = [np.zeros(len(every), bool), np.zeros(len(every), bool), margin, margin.copy()]
        for of_all, of_some in zip(whole, found):
            of_all[attacked] = of_some
        pictures = np.float32(self.pictured / 255)
        if found[4:]:
            pictures[attacked[: len(found[4])]] = found[4]
        return [*whole, pictures]

    def _all_of(self, compiled, indices, should_stop):
        """What a compiled function finds of images by their numbers, arrays `[n, ...]`, of images those among the first
        few; None once it is to stop.
        """
        found = []
        for start in range(0, len(indices), self._batch_size):
            if should_stop():
                return None
            chosen = indices[start : start + self._batch_size]
            counts = (*4 * [len(chosen)], np.sum(chosen < len(self.pictured)))
            results = compiled(*self._full_batch(chosen))
            found.append([np.asarray(each[:count]) for each, count in zip(results, counts)])
        return [np.concatenate(each) for each in zip(*found)]

    def _full_batch(self, indices):
        return self.batch_of(np.resize(indices, self._batch_size))

    def batch_of(self, indices: np.ndarray) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """What `on_replica` takes of some of the images held out, by their numbers."""
        seeds = noise.fold_in(noise.example_seeds(self._seed, 0, tf.constant(indices, tf.int32)), noise.VALIDATION)
        return tf.constant(self._source.images[indices]), tf.constant(self._source.labels[indices]), seeds


def _of_bytes(network: keras.Model, fn: Callable) -> Callable:
    def of_bytes(image, label, seeds):
        x = tf.cast(image, tf.float32) / 255.0
        return fn(functools.partial(any_network.evaluated, network), x, label, seeds=seeds)

    return of_bytes


def _right_of(network: keras.Model) -> Callable:
    def right(image, label, seeds):
        logits = any_network.evaluated(network, tf.cast(image, tf.float32) / 255.0)
        return ~losses.is_wrong(logits, label), losses.margin(logits, label)

    return right
