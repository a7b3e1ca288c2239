"""`fit` and `evaluate` of an `AdversarialModel`, from what a Keras user gives to batches of its training step.

`model` is the `AdversarialModel`, which imports this module.
"""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import bounds as pixel_bounds
from robust_keras import losses, noise
from robust_keras.data import fit_batches
from robust_keras.engines import execution, replicas
from robust_keras.models import any_network, outputs, passes
from robust_keras.training import inputs, weight_decay

# What a step reports of its own examples. Other values are running means that Keras' metrics keep.
_MEANS = ("loss", "labelled_fraction", "accuracy", "robust_accuracy")
_LOOKED_AT = 32  # Images that the network is tried on.
_AT_ONCE = 4096  # Examples of arrays that are looked at together.


class Data(NamedTuple):
    """Images and labels, as `AdversarialModel.fit` takes them."""

    x: Any
    y: Any = None
    sample_weight: Any = None
    class_weight: Mapping[int, float] | None = None
    batch_size: int | None = None
    shuffle: bool = False


class HeldOut(NamedTuple):
    """Validation, as `AdversarialModel.fit` takes it."""

    data: Any = None
    split: float = 0.0
    steps: int | None = None
    batch_size: int | None = None
    every: int = 1


class Schedule(NamedTuple):
    """Epochs and what happens around them, as `engines.execution.fit` takes it."""

    epochs: int = 1
    initial_epoch: int = 0
    steps_per_epoch: int | None = None
    callbacks: Sequence[keras.callbacks.Callback] | None = None
    verbose: str | int = "auto"
    pause_every: Sequence[int] = ()


class _Preparation(NamedTuple):
    """Makes batches of the training step out of `(images, labels, weights)`, and refuses what cannot be meant.

    Attributes:
        model: the `AdversarialModel`.
        num_classes: of the network's logits.
        class_weight: factors of the losses of classes.
        augmentation: `(images, seeds) -> images`, or None.
    """

    model: Any
    num_classes: int
    class_weight: Mapping[int, float] | None = None
    augmentation: Callable | None = None

    def __call__(self, batch: tuple, step: int) -> dict[str, tf.Tensor]:
        """The batch of a step."""
        images, labels, weights = batch
        x = pixel_bounds.to_unit(np.asarray(images), self.model.bounds)
        labels, targets = self._labels(np.asarray(labels), len(x))
        seeds = noise.example_seeds(self.model.seed, step, tf.range(len(x)) + len(x) * replicas.process_index())
        made = {"image": tf.constant(x), "label": labels, "targets": targets, "seeds": seeds}
        if self.augmentation is not None:
            made["image"] = self.augmentation(made["image"], seeds)
        if weights is not None or self.class_weight:
            made["weight"] = tf.constant(self._weights(weights, labels.numpy()))
        return made

    def check_all(self, x: Any, y: Any) -> None:
        """Refuses arrays of which only a later batch would show what is wrong; images on disk are left for it."""
        if y is None:
            return
        labels, is_in_memory = np.asarray(y), not isinstance(x, np.memmap)
        images = np.asarray(x) if is_in_memory else x
        for start in range(0, len(labels), _AT_ONCE):
            part = labels[start : start + _AT_ONCE]
            self._labels(part, len(part))
            if is_in_memory and images.dtype != np.uint8:
                pixel_bounds.to_unit(images[start : start + _AT_ONCE], self.model.bounds)

    def _labels(self, given_labels, num_images):
        labels = losses.as_labels(given_labels)
        if len(labels) != num_images:
            raise ValueError(f"Expected a label for each of {num_images} images. Received: {len(labels)}")
        inputs.check_labels(labels.numpy(), self.num_classes)
        if given_labels.ndim != 2 or given_labels.shape[1] == 1:
            return labels, tf.one_hot(labels, self.num_classes)
        targets = given_labels.astype(np.float32)
        sums = targets.sum(axis=1)
        if targets.shape[1] != self.num_classes or not (targets >= 0).all() or not np.allclose(sums, 1, atol=1e-3):
            raise ValueError(
                f"Expected class probabilities [batch, {self.num_classes}], rows that sum to 1. Received: "
                f"{targets.shape}, sums from {sums.min():.4g} to {sums.max():.4g}"
            )
        return labels, tf.constant(targets)

    def _weights(self, weights, labels):
        factors = np.ones(len(labels), np.float32)
        for label, factor in (self.class_weight or {}).items():
            factors[labels == label] = factor
        if weights is None:
            return factors
        weights = np.asarray(weights, np.float32).reshape(-1)
        if len(weights) != len(labels) or not np.isfinite(weights).all():
            raise ValueError(f"Expected a finite weight for each of {len(labels)} images. Received: {weights.shape}")
        return factors * weights


def checked(batch: Mapping[str, tf.Tensor], step: int) -> Mapping[str, tf.Tensor]:
    """A batch as `training_batches.batches` makes it, unless `inputs.check_batch` refuses it."""
    inputs.check_batch(batch)
    return batch


def fit(model: Any, data: Data, held_out: HeldOut, schedule: Schedule) -> keras.callbacks.History:
    """Trains; see `AdversarialModel.fit`."""
    validated = held_out.data
    if held_out.split and validated is None:
        first, validated = fit_batches.split(data.x, data.y, data.sample_weight, held_out.split)
        data = data._replace(**dict(zip(("x", "y", "sample_weight"), first)))
    with replicas.of(model).scope():
        batches = _batches(model, data)
        preparation = _begin(model, batches, data)
        _check_lengths(model, batches, schedule)
        validate = None
        if validated is not None:
            arrays = validated if isinstance(validated, (tuple, list)) else (validated,)
            x, y, weights = (*arrays, None, None)[:3]
            # Every process examines all of it.
            examined = fit_batches.batches(x, y, sample_weight=weights, batch_size=held_out.batch_size)
            preparation.check_all(x, y)
            if examined.is_read_once and schedule.epochs - schedule.initial_epoch > 1 and held_out.steps is None:
                raise ValueError(
                    "Expected validation data that each epoch can read anew, or validation_steps. Received: a generator"
                )
            _tried_out(model, examined.first())
            preparation(examined.first(), 0)
            plain = preparation._replace(class_weight=None, augmentation=None)
            validate = functools.partial(_validate, model, examined, plain, held_out)
    steps_per_epoch = schedule.steps_per_epoch
    return execution.fit(
        model,
        _ordered(model, batches) if steps_per_epoch is None else batches.read_on(steps_per_epoch),
        prepare=preparation,
        validate=validate,
        means=_MEANS,
        **{
            **schedule._asdict(),
            "steps_per_epoch": steps_per_epoch or batches.num_batches,
            "callbacks": [_Finalized(), *(schedule.callbacks or ())],
        },
    )


class _Finalized(keras.callbacks.Callback):
    """At the end of training, the weights are what the optimiser holds for it, before other callbacks look at them."""

    def on_train_end(self, logs: dict | None = None) -> None:
        self.model.optimizer.finalize_variable_values(self.model.network.trainable_weights)


def _ordered(model, batches):
    """Batches by epoch; the first epoch after another `fit` of the same numbers is in an order that was not yet."""

    def of_epoch(epoch: int):
        number = max(epoch, model.num_passes)
        model.num_passes = number + 1
        return batches.of_epoch(number)

    return of_epoch


def evaluate(model: Any, data: Data, steps: int | None, *, show: bool) -> dict[str, float]:
    """Loss and accuracies; see `AdversarialModel.evaluate`."""
    with replicas.of(model).scope():
        batches = fit_batches.batches(data.x, data.y, sample_weight=data.sample_weight, batch_size=data.batch_size)
        return _examine(model, batches, _begin(model, batches, data), steps, show=show)


def _batches(model, data):
    return fit_batches.batches(
        data.x,
        data.y,
        sample_weight=data.sample_weight,
        batch_size=data.batch_size,
        shuffle=data.shuffle,
        seed=model.seed,
        process=(replicas.process_index(), replicas.num_processes()),
    )


def _begin(model, batches, data):
    """The `_Preparation` of batches, once the network was tried on the first one, and built by it."""
    if not model.compiled:
        raise ValueError("Expected a compiled model. Received: one before compile()")
    _, labels, _ = first = batches.first()
    logits = _tried_out(model, first)
    are_soft = np.ndim(labels) == 2 and np.shape(labels)[1] != 1
    if are_soft != model.has_soft_labels:  # A step that was traced before gives metrics the other form.
        model.has_soft_labels, model.train_function = are_soft, None
    weight_decay.leave_out_scales(model.optimizer, model.network)
    if not model.optimizer.built:
        model.optimizer.build(model.network.trainable_variables)
    preparation = _Preparation(model, logits.shape[-1], data.class_weight, model.augmentation)
    if unknown := set(data.class_weight or ()) - set(range(logits.shape[-1])):
        raise ValueError(f"Expected class weights of classes 0 to {logits.shape[-1] - 1}. Received: {sorted(unknown)}")
    preparation.check_all(data.x, data.y)
    prepared = preparation(first, 0)
    num = len(logits)
    returned = logits if model.from_logits else tf.exp(logits)
    model.measured({name: prepared[name][:num] for name in ("label", "targets")}, returned)  # Makes what it counts in.
    return preparation


def _tried_out(model, batch):
    """The network's logits of some images of a batch, in evaluation."""
    x = tf.constant(pixel_bounds.to_unit(np.asarray(batch[0])[:_LOOKED_AT], model.bounds))
    logits_fn = any_network.as_logits_fn(model.network, bounds=model.bounds, from_logits=model.from_logits)
    logits = any_network.try_out(logits_fn, x, needs_gradients=model.attack is not None)
    _check_outputs(logits.numpy(), model.from_logits)
    return logits


def _check_outputs(logits, from_logits):
    outputs.check(logits, are_log_probabilities=not from_logits)
    if not from_logits and not np.allclose(np.exp(logits).sum(axis=-1), 1, atol=1e-2):
        raise ValueError("Expected probabilities, rows that sum to 1, with from_logits=False. Received: other rows")


def _check_lengths(model, batches, schedule):
    """Refuses steps for which there are no batches, and a last batch that does not divide."""
    epochs = schedule.epochs - schedule.initial_epoch
    wanted = epochs * (schedule.steps_per_epoch or 0)
    if batches.is_read_once and epochs > 1 and not wanted:
        raise ValueError(
            f"Expected steps_per_epoch for {epochs} epochs of a generator, which is read once. Received: none"
        )
    if not batches.starts_anew and batches.num_batches is not None and wanted > batches.num_batches:
        raise ValueError(
            f"Expected {wanted} batches, for the steps of all epochs; a dataset's repeat() gives them. Received: "
            f"{batches.num_batches}"
        )
    num_parts = replicas.of(model).num_replicas_in_sync * model.accumulation_steps
    if batches.last_size is not None and batches.last_size % num_parts:
        raise ValueError(
            f"Expected batches that divide into {num_parts} parts, for replicas and accumulation_steps. Received: "
            f"{batches.last_size} images in the last one; another batch_size, or fewer images, would do"
        )


def _validate(model, batches, preparation, held_out, epoch):
    """The validation that is due at the end of an epoch, or None."""
    if (epoch + 1) % held_out.every:
        return None

    def measure():
        found = _examine(model, batches, preparation, held_out.steps, show=False)
        return {f"val_{name}": value for name, value in found.items()}

    return measure


def _examine(model, batches, preparation, steps, *, show):
    """Means over examples of the loss and accuracies, and metrics, of evaluation: its statistics, and no noise."""
    if model.examined is None:
        model.examined = replicas.over_replicas(functools.partial(_on_replica, model), jit_compile=model.jit_compile)
    model.reset_metrics()
    size, num_examples, sums, measured = None, 0, {}, {}
    total = steps or batches.num_batches
    some = itertools.islice(batches.of_epoch(0), steps)
    for raw in tqdm(some, total=total, unit="batch", disable=not show, leave=False):
        batch = preparation(raw, 0)
        batch["seeds"] = noise.fold_in(
            noise.example_seeds(model.seed, 0, num_examples + tf.range(len(batch["label"]))), noise.VALIDATION
        )
        size = size or _size(len(batch["label"]))
        values = model.examined(_filled(batch, size))
        count = len(batch["label"])
        logits = values.pop("logits")[:count]
        for name, each in values.items():
            sums[name] = sums.get(name, 0.0) + float(np.sum(each[:count], dtype=np.float64))
        num_examples += count
        if model.has_metrics:
            measured = model.measured(batch, logits if model.from_logits else tf.exp(logits))
    if not num_examples:
        raise ValueError("Expected batches to evaluate on. Received: the end of the generator")
    regularised = [weight for weight in model.network.trainable_weights if weight.regularizer is not None]
    penalty = sum(float(tf.reduce_sum(weight.regularizer(weight))) for weight in regularised)
    means = {name: value / num_examples for name, value in sums.items()}
    return {**{name: float(value) for name, value in measured.items()}, **means, "loss": means["loss"] + penalty}


def _on_replica(model, batch):
    """Of each example the loss, whether it is right, clean and under attack, and the clean logits."""
    x, labels, seeds = batch["image"], losses.as_labels(batch["label"]), batch["seeds"]
    logits_fn = functools.partial(passes.evaluated, model.network, model.bounds, model.from_logits)
    logits = logits_fn(x)
    correct = {"accuracy": ~losses.is_wrong(logits, labels)}
    x_adv = x
    if model.validation_attack is not None:
        x_adv = tf.stop_gradient(model.validation_attack(logits_fn, x, labels, seeds=seeds))
        correct["robust_accuracy"] = correct["accuracy"] & ~losses.is_wrong(logits_fn(x_adv), labels)
    loss = model.objective(logits_fn, x, x_adv, labels, batch["targets"])
    return {
        "loss": loss * batch["weight"] if "weight" in batch else loss,
        **{name: tf.cast(values, tf.float32) for name, values in correct.items()},
        "logits": logits,
    }


def _size(count):
    """The least number that the replicas divide and a batch of `count` fits into."""
    num_replicas = replicas.num_replicas()
    return -(-count // num_replicas) * num_replicas


def _filled(batch, size):
    """A batch of `size` examples, filled up with its first ones: one program serves all."""
    count = len(batch["label"])
    if count > size:
        raise ValueError(f"Expected no validation batch larger than the first, of {size}. Received: one of {count}")
    indices = tf.range(size) % count
    return {name: tf.gather(values, indices) for name, values in batch.items()}
