"""A training step of an `AdversarialModel` in two halves, between which replicas add up what they found.

    begun = steps.begin(model, batch)  # Attacks the batch and differentiates; changes no variable.
    logs = begun.finished(batch)       # The optimiser's update, moving statistics, averages.

`model` is the `AdversarialModel`, which imports this module.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import compilation, losses, noise
from robust_keras.engines import replicas, step_counter
from robust_keras.models import passes
from robust_keras.models.normalization import batch_norm_mode
from robust_keras.training import batch_parts, epsilon_warm_up, inputs


class Begun(NamedTuple):
    """The first half of a step on one replica, nests of tensors.

    Attributes:
        added: logs, and gradients: sums over replicas are those of the whole batch.
        averaged: new moving statistics and other values, of which means over replicas are taken.
        same: new values of integers, the same on all replicas.
        predictions: what the network returned for each example, where `compile` asks for metrics; else ().
        update: `(added, averaged, same, predictions, batch) -> logs`, the other half.
    """

    added: Any
    averaged: Any
    same: Any
    predictions: Any
    update: Callable

    def finished(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The other half, from inside the replica."""
        return self.update(self.added, self.averaged, self.same, self.predictions, batch)


def begin(model: Any, batch: Mapping[str, tf.Tensor]) -> Begun:
    """The first half of a step on a replica's share of a batch."""
    # Of the computation below, when it is traced, and which weights have a gradient.
    made: list[tuple[passes.Outcome, list[bool]]] = []
    compute: Callable = functools.partial(_gradients, model, made, attack_now(model))
    num_parts = model.accumulation_steps
    if model.jit_compile or num_parts > 1:  # A function of its own is traced once.
        compute = compilation.function(compute, jit_compile=bool(model.jit_compile))
    first = _first_part(model)
    parts = {name: batch_parts.split(values, num_parts) for name, values in batch.items()}
    sums, last = compute({name: values[0] for name, values in parts.items()}, first)
    predictions = last.pop("predictions", ())
    if num_parts > 1:
        begun = sums, last, predictions
        sums, last, predictions = batch_parts.accumulated(compute, parts, first, begun, num_parts)
    logs, gradients, statistics, moved = sums
    averaged = tf.nest.map_structure(lambda values: values / num_parts, (statistics, moved))
    update = functools.partial(_update, model, *made[-1])
    return Begun((logs, gradients), averaged, last["counted"], predictions, update)


def _update(model, outcome, has_gradient, added, averaged, counted, predictions, batch):
    logs, gradients = added
    statistics, moved = averaged
    step = tf.identity(step_counter.of(model.optimizer).value)
    found = iter(gradients)
    gradients = [next(found) if has else None for has in has_gradient]
    passes.assign_trained(outcome, moved)
    model.optimizer.apply(gradients, model.network.trainable_weights)
    passes.apply(outcome, statistics, moved, counted)
    for update in model.after_update:
        update(step)
    logs = dict(zip(logs, replicas.all_reduce("SUM", list(logs.values()))))
    if not model.has_metrics:
        return logs
    measured = model.measured(batch, predictions)
    return {**dict(zip(measured, replicas.all_reduce("MEAN", list(measured.values())))), **logs}


def _gradients(model, made, attack, batch, part):
    """What a part of the batch adds to logs, gradients and statistics, those of `made`, and what does not add up;
    changes no variable.
    """
    x, labels, targets = inputs.as_floats(batch["image"]), losses.as_labels(batch["label"]), batch["targets"]
    through = _passes(model, part)
    x_adv = _attacked(model, attack, through, x, labels, targets, batch["seeds"])
    # The optimiser sums gradients over replicas.
    share = 1.0 / (replicas.num_replicas() * model.accumulation_steps)
    with tf.GradientTape() as tape:
        each = model.objective(through.of_objective, x, x_adv, labels, targets)
        inputs.check_objective(each, labels)
        loss = tf.reduce_mean(each * batch["weight"] if "weight" in batch else each) * share
        outcome = through.outcome(x_adv)
        if outcome.loss is not None:
            loss += outcome.loss * share
        scaled = model.optimizer.scale_loss(loss)
    gradients = tape.gradient(scaled, [weight.value for weight in model.network.trainable_weights])
    made.append((outcome, [gradient is not None for gradient in gradients]))
    gradients = [gradient for gradient in gradients if gradient is not None]
    if model.accumulation_steps > 1:  # Those of embeddings are of the rows that were looked up.
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
    logs = {"loss": loss}
    if "is_labelled" in batch:
        logs["labelled_fraction"] = tf.reduce_mean(tf.cast(batch["is_labelled"], tf.float32)) * share
    last = {"counted": outcome.counted}
    logits = through.predicted(x) if model.log_accuracy or model.has_metrics else None
    if model.log_accuracy or model.is_asked_for_accuracy:
        logs["accuracy"] = _accuracy(logits, labels) * share
    if model.log_accuracy and model.attack is not None:
        logs["robust_accuracy"] = _accuracy(through.predicted(x_adv), labels) * share
    if model.has_metrics:
        last["predictions"] = logits if model.from_logits else tf.exp(logits)
    return (logs, gradients, outcome.statistics, outcome.moved), last


def attack_now(model: Any) -> Callable | None:
    """The attack of the next step, in the part of its ball that is reached."""
    if not model.epsilon_warmup_steps:
        return model.attack
    step = tf.identity(step_counter.of(model.optimizer).value)
    return epsilon_warm_up.attack_of(step, model.epsilon_warmup_steps, model.attack)


def attacked(model: Any, x: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
    """See `AdversarialModel.attacked`."""
    return _attacked(model, attack_now(model), _passes(model, 0), x, labels, targets, seeds)


def _attacked(model, attack, through, x, labels, targets, seeds):
    if attack is None:
        return x
    with batch_norm_mode(model.attack_batch_norm):
        if model.attack_target == "clean_prediction":
            target = tf.nn.softmax(through.of_attack(x))
        else:
            target = labels if model.attack_target == "label" else targets
        seeds = noise.fold_in(seeds, noise.ATTACK)
        return tf.stop_gradient(attack(through.of_attack, x, tf.stop_gradient(target), seeds=seeds))


def _passes(model, part):
    return passes.Passes(
        functools.partial(passes.logits_of, model.network, model.bounds, model.from_logits),
        model.network,
        attack_batch_norm=model.attack_batch_norm,
        attack_noise=model.attack_noise,
        part=part,
    )


def _first_part(model):
    """The number of this replica's first part of the batch among all parts."""
    if replicas.num_replicas() == 1:
        return 0 if model.accumulation_steps == 1 else tf.constant(0)
    return replicas.number() * model.accumulation_steps


def _accuracy(logits, labels):
    return tf.reduce_mean(tf.cast(~losses.is_wrong(logits, labels), tf.float32))
