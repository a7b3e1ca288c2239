"""A training run, from its data to its best weights."""

import functools
import posixpath
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import noise, storage
from robust_keras.data import sources
from robust_keras.engines import replicas, strategies
from robust_keras.training.adversarial_model import AdversarialModel
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.recorder import RunRecorder
from robust_keras.training.records import Cadence, Layout, Recipe
from robust_keras.training.weight_averaging import WeightAveraging

# Others would need loss scaling, or narrow weights.
DTYPE_POLICIES = ("float32", "mixed_bfloat16")


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
    workdir: str,
    recipe: Recipe,
    layout: Layout = Layout(),  # noqa: B008  It cannot change.
    cadence: Cadence = Cadence(),  # noqa: B008
    data_dir: str | None = None,
) -> TrainedModel:
    """Trains a network, or continues training it where `workdir` shows an earlier call that was interrupted.

    Writes snapshots to `workdir`/checkpoints, the best weights on the validation images to `workdir`/best,
    `workdir`/metrics.csv and TensorBoard events to `workdir`/events.

    Args:
        workdir: the run's folder, any `tf.io.gfile` path.
        recipe: what is trained, a `records.Recipe`.
        layout: where, a `records.Layout`.
        cadence: how often it validates, saves and logs, a `records.Cadence`.
        data_dir: given to the recipe's `data`.

    Returns:
        A `TrainedModel`.

    Raises:
        ValueError: for settings or data that do not fit together, before training starts.
        recorder.NonFiniteLoss: where the loss is not finite; that step is never saved.
        recorder.Terminated: after SIGTERM, once a snapshot is written.
    """
    _check_settings(recipe, layout, cadence)
    strategy = strategies.strategy(layout.strategy, tpu=layout.tpu)  # Processes meet before anything else.
    data = recipe.data(data_dir=data_dir)
    if not len(data.validation.labels):
        raise ValueError("Expected at least one image held out for validation. Received: 0")
    learning_rate = functools.partial(recipe.optimizer.learning_rate, num_steps=recipe.train_steps)
    learning_rate(0)  # A bad setting shows now.
    keras.utils.set_random_seed(recipe.seed)
    with tf.device("CPU:0"):  # Other devices draw other numbers.
        drawn = {weight.path: weight.numpy() for weight in _network(recipe.model, data).weights}
    with strategy.scope():
        network = _network(recipe.model, data, recipe.dtype_policy)
        averaging = None
        if recipe.averaging is not None:
            averaging = WeightAveraging(_network(recipe.model, data), **recipe.averaging._asdict())
        is_new = not storage.steps(posixpath.join(str(workdir), "checkpoints"))
        _assign(network, recipe.initial_weights() if recipe.initial_weights is not None and is_new else drawn)
        adversarial_model = _adversarial_model(network, recipe, layout)
        optimizer = NesterovSGD(
            learning_rate, momentum=recipe.optimizer.momentum, weight_decay=recipe.optimizer.weight_decay
        )
        optimizer.build(network.trainable_variables)
        adversarial_model.compile(
            optimizer=optimizer, jit_compile=layout.jit_compile, steps_per_execution=layout.steps_per_execution
        )
        num_hosts, host = replicas.num_processes(), replicas.process_index()
        twin = averaging.twin if averaging else None
        try_out, validate = _validation(
            network,
            twin,
            data.validation,
            recipe.validation.correct_fn,
            layout.validation_batch_size,
            recipe.seed,
        )

    best = _network(recipe.model, data)
    batches = functools.partial(
        recipe.batches, data, seed=recipe.seed, num_steps=recipe.train_steps, num_hosts=num_hosts, host=host
    )
    dataset = batches()
    share = dataset.element_spec["image"].shape[0]
    _check_layout(share, strategy.num_replicas_in_sync // num_hosts, layout.accumulation_steps, network)
    with strategy.scope():
        recorder = RunRecorder(
            workdir,
            state=_state(network, optimizer, twin),
            weights={w.path: f"{'averages' if twin else 'weights'}/{w.path}" for w in network.weights},
            validate=validate,
            best_metric=f"val_{recipe.validation.best_by}_averaged" if twin else f"val_{recipe.validation.best_by}",
            description={
                "architecture": best.to_json(),
                "weights": "averaged" if twin else "raw",
                "dataset": data.labelled.name,
                "extra_data": data.extra and data.extra.name,
                "extra_data_is_the_papers": data.extra and sources.is_paper_extra_data(data.extra.name),
            },
            learning_rate=learning_rate,
            batch_size=share * num_hosts,
            train_steps=recipe.train_steps,
            cadence=cadence,
        )
        start_step = recorder.restore()
    if not recorder.is_finished():
        with strategy.scope(), recorder.running():
            if start_step < recipe.train_steps:
                try_out()  # A bad setting, or too large a batch, shows before there is anything to lose.
                if averaging:
                    averaging.start_from_model = start_step == 0
                adversarial_model.fit(
                    batches(start_step=start_step) if start_step else dataset,
                    steps_per_epoch=recipe.train_steps - start_step,
                    callbacks=[averaging, recorder] if averaging else [recorder],
                    verbose=0,
                    pause_every=(cadence.validate_every, cadence.checkpoint_every, cadence.log_every),
                )
    _assign(best, recorder.best_weights())
    return TrainedModel(network, twin, best, recorder.report())


def _check_settings(recipe, layout, cadence):
    """Refuses values that no run can have."""
    counts = {
        "train_steps": recipe.train_steps,
        "validate_every": cadence.validate_every,
        "checkpoint_every": cadence.checkpoint_every,
        "log_every": cadence.log_every,
        "num_checkpoints": cadence.num_checkpoints,
        "accumulation_steps": layout.accumulation_steps,
        "steps_per_execution": layout.steps_per_execution,
        "validation_batch_size": layout.validation_batch_size,
    }
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"Expected {name} as an integer >= 1. Received: {value!r}")
    if recipe.validation.best_by not in ("robust", "clean"):
        raise ValueError(f"Expected best_by out of robust, clean. Received: {recipe.validation.best_by!r}")
    if recipe.dtype_policy not in DTYPE_POLICIES:
        raise ValueError(
            f"Expected a dtype_policy out of {', '.join(DTYPE_POLICIES)}. Received: {recipe.dtype_policy!r}"
        )


def _adversarial_model(network, recipe, layout):
    attack = recipe.attack
    return AdversarialModel(
        network,
        objective=recipe.objective,
        accumulation_steps=layout.accumulation_steps,
        **(
            {}
            if attack is None
            else {
                "attack": attack.attack_fn,
                "attack_target": attack.target,
                "attack_batch_norm": attack.batch_norm,
            }
        ),
    )


def _check_layout(batch_size, num_replicas, num_parts, network):
    """Refuses a process's share of a batch that does not spread over its replicas, and their parts, in whole groups."""
    groups = {getattr(layer, "statistics_group_size", None) or 1 for layer in network.layers}
    size, rest = divmod(batch_size, num_replicas * num_parts)
    if rest or any(size % group for group in groups):
        raise ValueError(
            f"Expected a batch that gives each of {num_replicas} replicas accumulation_steps={num_parts} parts of "
            f"whole groups of {max(groups)} images (STATISTICS_GROUP_SIZE). Received: a batch of {batch_size}"
        )


def _network(model, data, dtype_policy="float32"):
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype_policy)
    try:
        return model(
            num_classes=data.labelled.num_classes,
            mean=data.mean,
            std=data.std,
            input_shape=data.labelled.images.shape[1:],
        )
    finally:
        keras.config.set_dtype_policy(previous)


def _assign(network, weights):
    """Gives a network weights by name."""
    shapes = {weight.path: tuple(weight.shape) for weight in network.weights}
    given = {name: array.shape for name, array in weights.items()}
    if shapes != given:
        name = min(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise ValueError(
            f"Expected weights of this network. Received: {name} of shape {given.get(name)}, not {shapes.get(name)}"
        )
    for weight in network.weights:
        weight.assign(weights[weight.path])


def _state(network, optimizer, twin):
    """Every variable that the next step depends on, by name."""
    state = {"step": optimizer.iterations.value}
    state |= {f"weights/{w.path}": w.value for w in network.weights}
    state |= {f"momentum/{w.path}": m.value for w, m in zip(network.trainable_weights, optimizer.momentums)}
    if twin is not None:
        state |= {f"averages/{w.path}": w.value for w in twin.weights}
    return state


def _validation(network, twin, source, correct_fn, batch_size, seed):
    """Functions `try_out()`, which compiles what a validation runs, and `validate`, as `RunRecorder` takes it."""
    num_images = len(source.labels)
    num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
    if batch_size % num_replicas:
        raise ValueError(
            f"Expected a validation_batch_size that divides among {num_replicas} replicas. Received: {batch_size}"
        )
    padded = np.arange(-(-num_images // batch_size) * batch_size) % num_images

    def correct_of(model):
        def correct(image, label, seeds):
            x = tf.cast(image, tf.float32) / 255.0
            return correct_fn(lambda images: model(images, training=False), x, label, seeds=seeds)

        return replicas.over_replicas(correct)

    functions = {"": correct_of(network)} | ({"_averaged": correct_of(twin)} if twin is not None else {})

    def batch_of(indices):
        seeds = noise.fold_in(noise.example_seeds(seed, 0, tf.constant(indices, tf.int32)), noise.VALIDATION)
        return tf.constant(source.images[indices]), tf.constant(source.labels[indices]), seeds

    def try_out():
        for correct in functions.values():
            correct(*batch_of(padded[:batch_size]))

    def validate(should_stop):
        columns = {}
        for suffix, correct in functions.items():
            right = []
            for indices in padded.reshape(-1, batch_size):
                if should_stop():
                    return None
                right.append(np.stack(correct(*batch_of(indices))))
            clean, robust = np.concatenate(right, axis=1)[:, :num_images].mean(axis=1)
            columns |= {f"val_clean{suffix}": float(clean), f"val_robust{suffix}": float(robust)}
        return columns

    return try_out, validate
