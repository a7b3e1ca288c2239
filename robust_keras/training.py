"""Adversarial training: the compiled step, and the run around it."""

import functools
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import distribution, noise
from robust_keras.averaging import WeightAveraging
from robust_keras.data import sources
from robust_keras.normalization import BATCH, batch_norm_mode
from robust_keras.optimizers import NesterovSGD
from robust_keras.recording import RunRecorder

ATTACK_TARGETS = ("label", "targets", "clean_prediction")


class AdversarialModel(keras.Model):
    """A network with a training step that attacks its own batch and then minimises an objective on it.

    `fit` takes batches as `data.mixing.batches` makes them. Random numbers come from the batch's `seeds` alone.

    Args:
        network: images in [0, 1] to logits.
        objective: `(logits_fn, x, x_adv, labels, targets) -> [batch]`, as in `objectives`.
        attack: `(logits_fn, x, targets, *, seeds) -> x_adv`, or None for an objective that needs none.
        attack_target: what the attack moves away from: the 'label', the 'targets' (mixed or smoothed labels), or the
            'clean_prediction', softmax(network(x)) held fixed.
        attack_batch_norm: mode of `BatchNorm` in the attack and the clean prediction it moves away from: 'batch' as in
            the paper's code, or 'moving'.
    """

    def __init__(self, network, *, objective, attack=None, attack_target="label", attack_batch_norm=BATCH):
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
        # Functions of the step that `train_step` calls after the optimiser.
        self.after_update = []
        self.built = True

    def call(self, x, training=False):
        return self.network(x, training=training)

    def train_step(self, batch):
        x = tf.cast(batch["image"], tf.float32) / 255.0
        labels, targets = batch["label"], batch["targets"]

        def logits_fn(images):
            return self.network(images, training=True)

        x_adv = self._attacked(logits_fn, x, labels, targets, batch["seeds"])
        num_replicas = self.distribute_strategy.num_replicas_in_sync
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.objective(logits_fn, x, x_adv, labels, targets))
            # The optimiser sums gradients over replicas.
            replica_loss = loss / num_replicas
        weights = self.network.trainable_weights
        step = tf.identity(self.optimizer.iterations.value)
        self.optimizer.apply(tape.gradient(replica_loss, weights), weights)
        for update in self.after_update:
            update(step)
        labelled_fraction = tf.reduce_mean(tf.cast(batch["is_labelled"], tf.float32)) / num_replicas
        logs = {"loss": replica_loss, "labelled_fraction": labelled_fraction}
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, logs)

    def _attacked(self, logits_fn, x, labels, targets, seeds):
        if self.attack is None:
            return x
        with batch_norm_mode(self.attack_batch_norm):
            if self.attack_target == "clean_prediction":
                target = tf.nn.softmax(logits_fn(x))
            else:
                target = labels if self.attack_target == "label" else targets
            return self.attack(logits_fn, x, tf.stop_gradient(target), seeds=noise.fold_in(seeds, noise.ATTACK))


class TrainedModel(NamedTuple):
    """What `train` returns.

    Attributes:
        network: the trained network, on the strategy's devices.
        averaged: the twin with the averaged weights, or None without averaging.
        best: a float32 `keras.Model` with the best weights on the validation images (averaged ones where there is
            averaging), or with the last ones where nothing was validated.
        report: a dictionary with 'last' and 'best': step and validation accuracies.
    """

    network: keras.Model
    averaged: keras.Model | None
    best: keras.Model
    report: dict


def train(
    *,
    workdir,
    data,
    model,
    batches,
    objective,
    attack,
    validation,
    learning_rate,
    train_steps,
    seed,
    data_dir=None,
    attack_target="label",
    attack_batch_norm=BATCH,
    momentum=0.9,
    weight_decay=5e-4,
    tau=None,
    averaging_warm_up=True,
    best_by="robust",
    strategy="auto",
    validation_batch_size=128,
    validate_every=1000,
    checkpoint_every=1000,
    log_every=50,
    num_checkpoints=2,
    jit_compile=False,
    progress=True,
):
    """Trains a network, or continues training it where `workdir` shows an earlier call that was interrupted.

    Writes snapshots to `workdir`/checkpoints, the best weights on the validation images to `workdir`/best,
    `workdir`/metrics.csv and TensorBoard events to `workdir`/events.

    Args:
        workdir: the run's folder, any `tf.io.gfile` path.
        data: `(*, data_dir) -> data.mixing.TrainingData`.
        model: `(*, num_classes, mean, std, input_shape) -> keras.Model`, such as `models.wide_resnet` with depth and
            width bound.
        batches: `(data, *, seed, num_steps, start_step) -> tf.data.Dataset`, such as `data.mixing.batches` with a batch
            size bound.
        objective: see `AdversarialModel`.
        attack: see `AdversarialModel`.
        validation: `(logits_fn, x, labels, *, seeds) -> (clean, robust)`: bool `[batch]` each, what is right.
        learning_rate: `(step, *, num_steps)`, one of `schedules`.
        train_steps: optimiser steps of the whole run.
        seed: of initial weights, order, augmentation and noise.
        data_dir: given to `data`.
        attack_target: see `AdversarialModel`.
        attack_batch_norm: see `AdversarialModel`.
        momentum: of Nesterov SGD.
        weight_decay: factor of the L2 term.
        tau: decay rate of weight averaging, or None for none.
        averaging_warm_up: see `averaging.WeightAveraging`.
        best_by: the validation accuracy that tells the best weights, 'robust' or 'clean'; of averaged weights where
            there are some.
        strategy: name of a `distribution.strategy`.
        validation_batch_size: images in a batch of the validation attack, over all replicas.
        validate_every: steps between validations; the last step is validated too.
        checkpoint_every: steps between snapshots; the last step has one too.
        log_every: steps between rows of metrics.csv.
        num_checkpoints: snapshots kept.
        jit_compile: whether to compile the whole step with XLA (always the case on TPU).
        progress: whether to show a progress bar.

    Returns:
        A `TrainedModel`.

    Raises:
        ValueError: for settings or data that do not fit together, before training starts.
        recording.NonFiniteLoss: where the loss is not finite; that step is never saved.
        recording.Terminated: after SIGTERM, once a snapshot is written.
    """
    counts = {
        "train_steps": train_steps,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "num_checkpoints": num_checkpoints,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name} as an integer >= 1. Received: {value!r}")
    if best_by not in ("robust", "clean"):
        raise ValueError(f"Expected best_by out of robust, clean. Received: {best_by!r}")
    data = data(data_dir=data_dir)
    if not len(data.validation.labels):
        raise ValueError("Expected at least one image held out for validation. Received: 0")
    strategy = distribution.strategy(strategy)
    learning_rate = functools.partial(learning_rate, num_steps=train_steps)
    learning_rate(0)  # A bad setting shows now.
    keras.utils.set_random_seed(seed)
    with strategy.scope():
        network = _network(model, data)
        averaging = None
        if tau is not None:
            averaging = WeightAveraging(_network(model, data), tau=tau, warm_up=averaging_warm_up)
        adversarial_model = AdversarialModel(
            network,
            objective=objective,
            attack=attack,
            attack_target=attack_target,
            attack_batch_norm=attack_batch_norm,
        )
        optimizer = NesterovSGD(learning_rate, momentum=momentum, weight_decay=weight_decay)
        optimizer.build(network.trainable_variables)
        adversarial_model.compile(optimizer=optimizer, jit_compile=jit_compile)

    dataset = batches(data, seed=seed, num_steps=train_steps)
    twin = averaging.twin if averaging else None
    recorder = RunRecorder(
        workdir,
        state=_state(network, optimizer, twin),
        weights={w.path: f"{'averages' if twin else 'weights'}/{w.path}" for w in network.weights},
        validate=_validation(strategy, network, twin, data.validation, validation, validation_batch_size, seed),
        best_metric=f"val_{best_by}_averaged" if twin else f"val_{best_by}",
        description={
            "architecture": network.to_json(),
            "weights": "averaged" if twin else "raw",
            "dataset": data.labelled.name,
            "extra_data": data.extra and data.extra.name,
            "extra_data_is_the_papers": data.extra and sources.is_paper_extra_data(data.extra.name),
        },
        learning_rate=learning_rate,
        batch_size=dataset.element_spec["image"].shape[0],
        train_steps=train_steps,
        validate_every=validate_every,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        num_checkpoints=num_checkpoints,
        progress=progress,
    )
    start_step = recorder.restore()
    if start_step < train_steps:
        if start_step > 0:
            dataset = batches(data, seed=seed, num_steps=train_steps, start_step=start_step)
        if averaging:
            averaging.start_from_model = start_step == 0
        with recorder.stopping_on_sigterm():
            adversarial_model.fit(
                dataset,
                steps_per_epoch=train_steps - start_step,
                shuffle=False,
                callbacks=[averaging, recorder] if averaging else [recorder],
                verbose=0,
            )
    best = _network(model, data)
    weights = recorder.best_weights()
    for variable in best.weights:
        variable.assign(weights[variable.path])
    return TrainedModel(network, twin, best, recorder.report())


def _network(model, data):
    return model(
        num_classes=data.labelled.num_classes,
        mean=data.mean,
        std=data.std,
        input_shape=data.labelled.images.shape[1:],
    )


def _state(network, optimizer, twin):
    """Every variable that the next step depends on, by name."""
    state = {"step": optimizer.iterations.value}
    state |= {f"weights/{w.path}": w.value for w in network.weights}
    state |= {f"momentum/{w.path}": m.value for w, m in zip(network.trainable_weights, optimizer.momentums)}
    if twin is not None:
        state |= {f"averages/{w.path}": w.value for w in twin.weights}
    return state


def _validation(strategy, network, twin, source, correct_fn, batch_size, seed):
    """A function without arguments that returns the columns of a validation: accuracies over `source`."""
    num_images = len(source.labels)
    padded = np.arange(-(-num_images // batch_size) * batch_size) % num_images
    seeds = noise.fold_in(noise.example_seeds(seed, 0, tf.constant(padded, tf.int32)), noise.VALIDATION)
    arrays = (source.images[padded], source.labels[padded], seeds, np.arange(len(padded)) < num_images)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    dataset = tf.data.Dataset.from_tensor_slices(arrays).batch(batch_size, drop_remainder=True).with_options(options)
    dataset = strategy.experimental_distribute_dataset(dataset)

    def counter(model):
        def on_replica(image, label, seeds, counts):
            x = tf.cast(image, tf.float32) / 255.0
            correct = correct_fn(lambda images: model(images, training=False), x, label, seeds=seeds)
            return tf.stack([tf.math.count_nonzero(right & counts) for right in correct])

        @tf.function
        def on_batch(batch):
            return strategy.reduce("SUM", strategy.run(on_replica, args=batch), axis=None)

        return on_batch

    counters = {"": counter(network)} | ({"_averaged": counter(twin)} if twin is not None else {})

    def validate():
        columns = {}
        for suffix, count in counters.items():
            clean, robust = sum(count(batch).numpy() for batch in dataset) / num_images
            columns |= {f"val_clean{suffix}": float(clean), f"val_robust{suffix}": float(robust)}
        return columns

    return validate
