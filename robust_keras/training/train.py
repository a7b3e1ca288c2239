"""A training run, from its data to its best weights."""

import functools
import posixpath
from typing import NamedTuple

import keras

from robust_keras import ownership, storage
from robust_keras.data import sources
from robust_keras.data.training_batches import TrainingData
from robust_keras.engines import replicas, strategies
from robust_keras.models import weights
from robust_keras.training import hyper_parameters, inputs
from robust_keras.training.checkpoints import Snapshots
from robust_keras.training.metrics_log import MetricsLog
from robust_keras.training.program import Program, build, network_of
from robust_keras.training.recipes import Cadence, Layout, Optimizer, Recipe
from robust_keras.training.recorder import RunRecorder
from robust_keras.training.run_state import state_of

# Others would need loss scaling, or narrow weights.
DTYPE_POLICIES = ("float32", "mixed_bfloat16")
TRAINING = "a training run"  # What a folder is locked for.


class TrainedModel(NamedTuple):
    """What `train` returns.

    Attributes:
        network: the trained network, on the strategy's devices.
        averaged: the twin with the averaged weights, or None without averaging.
        best: a float32 `keras.Model` with the best weights on the validation images (averaged ones where there is
            averaging).
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
        recipe: what is trained.
        layout: where, and in what portions.
        cadence: how often it validates, saves and logs.
        data_dir: given to the recipe's `data`.

    Returns:
        A `TrainedModel`.

    Raises:
        ValueError: for settings or data that do not fit together, before training starts; for a folder in use.
        recorder.NonFiniteLoss: where the loss is not finite; that step is never saved.
        termination.Terminated: after SIGTERM or SIGINT, once a snapshot is written.
    """
    check_settings(recipe, layout, cadence)
    strategy = strategies.strategy(layout.strategy, tpu=layout.tpu)  # Processes meet before anything else.
    with strategy.scope():
        is_writer = replicas.process_index() == 0
    with ownership.lock(workdir, what=TRAINING, writes=is_writer):
        return _train(workdir, recipe, layout, cadence, data_dir, strategy)


def _train(workdir, recipe, layout, cadence, data_dir, strategy):
    data = inputs.checked(recipe.data(data_dir=data_dir))
    program = build(recipe, layout, data)
    with strategy.scope():
        if recipe.initial_weights is not None and not storage.steps(posixpath.join(str(workdir), "checkpoints")):
            weights.assign(program.network, recipe.initial_weights(), program.names)
        batches = functools.partial(
            recipe.batches,
            data,
            seed=recipe.seed,
            num_steps=recipe.train_steps,
            num_hosts=replicas.num_processes(),
            host=replicas.process_index(),
        )
        share = checked_share(batches().element_spec, program, layout)
        recorder = RunRecorder(
            state_of(program),
            program.validator,
            Snapshots(workdir, description(program, data), cadence.num_checkpoints),
            MetricsLog(workdir, program.learning_rate, share * replicas.num_processes(), hyper_parameters.of(recipe)),
            train_steps=recipe.train_steps,
            cadence=cadence,
        )
        start_step = recorder.restore()
    if not recorder.is_finished():
        with strategy.scope(), recorder.running():
            if start_step < recipe.train_steps:
                _fit(program, batches(start_step=start_step), recorder, recipe.train_steps - start_step, cadence)
    best = network_of(program.architecture, recorder.best_weights())
    return TrainedModel(program.network, program.twin, best, recorder.report())


def _fit(program, dataset, recorder, num_steps, cadence):
    """Takes the steps that are left."""
    program.validator.try_out()  # A bad setting, or too large a batch, shows before there is anything to lose.
    callbacks = [recorder]
    if program.averaging:
        program.averaging.start_from_model = int(program.model.optimizer.iterations.numpy()) == 0
        callbacks = [program.averaging, recorder]
    program.model.fit(
        dataset,
        steps_per_epoch=num_steps,
        callbacks=callbacks,
        verbose=0,
        pause_every=(cadence.validate_every, cadence.checkpoint_every, cadence.log_every),
    )


def check_settings(recipe: Recipe, layout: Layout, cadence: Cadence) -> None:
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
    given = recipe.optimizer
    if given.make is not None and given != Optimizer(given.learning_rate, make=given.make):
        raise ValueError(
            "Expected settings of the given optimizer itself. Received: those of Nesterov SGD, momentum "
            f"{given.momentum} and weight_decay {given.weight_decay}"
        )
    if recipe.dtype_policy not in DTYPE_POLICIES:
        raise ValueError(
            f"Expected a dtype_policy out of {', '.join(DTYPE_POLICIES)}. Received: {recipe.dtype_policy!r}"
        )


def checked_share(spec: dict, program: Program, layout: Layout) -> int:
    """Examples in this process's share of a batch, which spreads over replicas and parts in whole groups."""
    inputs.check_batch(spec)
    share = spec["image"].shape[0]
    num_replicas = replicas.num_replicas() // replicas.num_processes()
    num_parts = layout.accumulation_steps
    groups = {getattr(layer, "statistics_group_size", None) or 1 for layer in program.network.layers}
    size, rest = divmod(share, num_replicas * num_parts)
    if rest or any(size % group for group in groups):
        raise ValueError(
            f"Expected a batch that gives each of {num_replicas} replicas accumulation_steps={num_parts} parts of "
            f"whole groups of {max(groups)} images (STATISTICS_GROUP_SIZE). Received: a batch of {share}"
        )
    return share


def description(program: Program, data: TrainingData) -> dict:
    """What a reader of the weights needs besides them."""
    return {
        "architecture": program.architecture,
        "weights": "raw" if program.twin is None else "averaged",
        "dataset": data.labelled.name,
        "extra_data": data.extra and data.extra.name,
        "extra_data_is_the_papers": data.extra and sources.is_paper_extra_data(data.extra.name),
    }
