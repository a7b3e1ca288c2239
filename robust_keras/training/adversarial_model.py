"""A network with a training step that attacks its own batch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from robust_keras import compilation, losses, noise
from robust_keras.engines import execution, replicas
from robust_keras.models.normalization import BATCH, BatchNorm, apply_updates, batch_norm_mode, pending_updates
from robust_keras.training import inputs

ATTACK_TARGETS = ("label", "targets", "clean_prediction")


class AdversarialModel(keras.Model):
    """A network with a training step that attacks its own batch and then minimises an objective on it.

    `fit` takes batches as `training_batches.batches` makes them, and the arguments of `execution.fit`. Random numbers
    come from the batch's `seeds` alone. `compile(jit_compile=True)` compiles all of the step but the updates with XLA.

    Args:
        network: images in [0, 1] to logits.
        objective: `(logits_fn, x, x_adv, labels, targets) -> [batch]`, as in `objectives`.
        attack: `(logits_fn, x, targets, *, seeds) -> x_adv`, or None for an objective that needs none.
        attack_target: what the attack moves away from: the 'label', the 'targets' (mixed or smoothed labels), or the
            'clean_prediction', softmax(network(x)) held fixed.
        attack_batch_norm: mode of `BatchNorm` in the attack and the clean prediction it moves away from: 'batch' as in
            the paper's code, or 'moving'.
        accumulation_steps: parts, of whole `BatchNorm` groups, in which a replica takes its batch, one after another,
            so that memory holds one of them; the step is the same.
    """

    def __init__(
        self,
        network: keras.Model,
        *,
        objective: Callable,
        attack: Callable | None = None,
        attack_target: str = "label",
        attack_batch_norm: str = BATCH,
        accumulation_steps: int = 1,
    ) -> None:
        super().__init__(name="adversarial_model")
        if attack_target not in ATTACK_TARGETS:
            raise ValueError(
                f"Expected an attack_target out of {', '.join(ATTACK_TARGETS)}. Received: {attack_target!r}"
            )
        with batch_norm_mode(attack_batch_norm):  # Refuses an unknown mode now, not while tracing.
            pass
        self.network = network
        self.objective = objective
        self.attack = attack
        self.attack_target = attack_target
        self.attack_batch_norm = attack_batch_norm
        self.accumulation_steps = accumulation_steps
        # Functions of the step that `train_step` calls after the optimiser.
        self.after_update: list[Callable] = []
        self.built = True

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The network's logits."""
        return self.network(x, training=training)

    def fit(self, dataset: tf.data.Dataset, **arguments: Any) -> keras.callbacks.History:
        """See `engines.execution.fit`.

        Raises:
            ValueError: for batches that are not such as `training_batches.batches` makes, before a step is taken.
        """
        inputs.check_batch(dataset.element_spec)
        return execution.fit(self, dataset, check=inputs.check_batch, **arguments)

    def train_step(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Attacks a replica's share of a batch and takes a step: 'loss' and 'labelled_fraction' of the whole batch."""
        layers: list[BatchNorm] = []  # Of the pending updates, in order.
        compute: Callable = functools.partial(self._gradients, layers)
        if self.jit_compile or self.accumulation_steps > 1:  # A function of its own is traced once.
            compute = compilation.function(compute, jit_compile=bool(self.jit_compile))
        num_parts = self.accumulation_steps
        parts = tf.nest.map_structure(lambda values: _split(values, num_parts), batch)

        def add(k, sums):
            return k + 1, tf.nest.map_structure(tf.add, sums, compute(tf.nest.map_structure(lambda v: v[k], parts)))

        sums = compute(tf.nest.map_structure(lambda values: values[0], parts))
        if num_parts > 1:
            left = tf.constant(1), sums
            _, sums = tf.while_loop(lambda k, _: k < num_parts, add, left, maximum_iterations=num_parts - 1)
        logs, gradients, statistics = sums

        weights = self.network.trainable_weights
        step = tf.identity(self.optimizer.iterations.value)
        self.optimizer.apply(gradients, weights)
        apply_updates(layers, tf.nest.map_structure(lambda values: values / num_parts, statistics))
        for update in self.after_update:
            update(step)
        return dict(zip(logs, replicas.all_reduce("SUM", list(logs.values()))))

    def _gradients(self, layers, batch):
        """What a part of the batch adds to logs, gradients and statistics, those of `layers`; changes no variable."""
        inputs.check_batch(batch)
        x = tf.cast(batch["image"], tf.float32) / 255.0
        labels, targets = losses.as_labels(batch["label"]), batch["targets"]
        logits_fn = functools.partial(self.network, training=True)
        x_adv = self.attacked(x, labels, targets, batch["seeds"])
        # The optimiser sums gradients over replicas.
        share = 1.0 / (self.distribute_strategy.num_replicas_in_sync * self.accumulation_steps)
        with pending_updates() as updates, tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.objective(logits_fn, x, x_adv, labels, targets)) * share
        layers[:] = [layer for layer, _ in updates]
        gradients = tape.gradient(loss, [weight.value for weight in self.network.trainable_weights])
        labelled_fraction = tf.reduce_mean(tf.cast(batch["is_labelled"], tf.float32)) * share
        logs = {"loss": loss, "labelled_fraction": labelled_fraction}
        return logs, gradients, [statistics for _, statistics in updates]

    def attacked(self, x: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        """The images that the attack of a step makes, or `x` without one.

        Args:
            x: float32 `[batch, height, width, channels]` in [0, 1].
            labels: int `[batch]`.
            targets: class probabilities `[batch, num_classes]`.
            seeds: int32 `[batch, 2]`, the batch's.

        Returns:
            Images like `x`.
        """
        if self.attack is None:
            return x
        logits_fn = functools.partial(self.network, training=True)
        with batch_norm_mode(self.attack_batch_norm):
            if self.attack_target == "clean_prediction":
                target = tf.nn.softmax(logits_fn(x))
            else:
                target = labels if self.attack_target == "label" else targets
            return self.attack(logits_fn, x, tf.stop_gradient(target), seeds=noise.fold_in(seeds, noise.ATTACK))


def _split(values, num_parts):
    if values.shape[0] % num_parts:
        raise ValueError(
            f"Expected a batch on each replica that divides into accumulation_steps={num_parts} parts. "
            f"Received: a batch of {values.shape[0]}"
        )
    return tf.reshape(values, (num_parts, -1, *values.shape[1:]))
