"""Trains a classifier from a recipe, or continues a run that was interrupted.

python scripts/train.py --gin_file=gin/at_80mti.gin --data_dir=DIR --workdir=runs/mine --gin_param="TAU = 0.995"
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import posixpath
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from robust_keras.commands import train_settings
    from robust_keras.training import train as training


def run(
    *,
    gin_files: Sequence[str],
    gin_params: Sequence[str] = (),
    data_dir: str | None = None,
    workdir: str | None = None,
    strategy: str | None = None,
    tpu: str | None = None,
    init_from: str | None = None,
) -> "training.TrainedModel":
    """Trains, and exports the best model to `workdir`/saved_model.

    Args:
        gin_files: recipes, read in order.
        gin_params: further bindings.
        data_dir: where data sets are.
        workdir: the run's folder, see `workdirs.default_workdir`.
        strategy: binds `train.strategy` where it is not None, like the two after it.
        tpu: binds `train.tpu`.
        init_from: binds `load_weights.path`, and `train.initial_weights` to it.

    Returns:
        A `training.TrainedModel`.

    Raises:
        ValueError: for bad input, before training starts; for a folder of another run, or in use by a command.
    """
    from robust_keras.commands import configuration, workdirs

    workdir = workdir or workdirs.default_workdir(gin_files)
    configuration.parse(gin_files, [*gin_params, *bindings(strategy, tpu, init_from)])
    with configuration.strategy("train").scope():  # Processes meet first; other networks may be loaded in it.
        train = configuration.resolve(configuration.train)
    return train_and_export(train, configuration.operative_config(), data_dir=data_dir, workdir=workdir)


def bindings(
    strategy: str | None, tpu: str | None, init_from: str | None, functions: Sequence[str] = ("train",)
) -> list[str]:
    """What these arguments of `run` bind, strategy and TPU for each of `functions`: a list of gin bindings."""
    given = {f"{name}.strategy": strategy for name in functions} | {f"{name}.tpu": tpu for name in functions}
    given["load_weights.path"] = init_from
    bound = [f"{name} = {value!r}" for name, value in given.items() if value is not None]
    return bound if init_from is None else [*bound, "train.initial_weights = @load_weights()"]


def train_and_export(
    train: "train_settings.ConfiguredRun", config: str, *, data_dir: str | None, workdir: str
) -> "training.TrainedModel":
    """What `run` does with the configured `train` and its operative configuration."""
    from robust_keras import failures, ownership, storage
    from robust_keras.commands import workdirs
    from robust_keras.engines import replicas, strategies
    from robust_keras.training import train as training

    strategy = strategies.strategy(train.layout.strategy, tpu=train.layout.tpu)
    with strategy.scope():
        process = replicas.process_index()
    writes = process == 0
    if writes:
        line = strategies.announcement(train.layout.strategy, tpu=train.layout.tpu)
        print(line, file=sys.stderr, flush=True)
    with failures.running(workdir, process=process), ownership.lock(workdir, what=training.TRAINING, writes=writes):
        holds_results = bool(storage.steps(posixpath.join(workdir, "checkpoints")))
        workdirs.claim(workdir, config, holds_results=holds_results, write=writes)
        trained = train(workdir=workdir, data_dir=data_dir)
        if writes:
            _export(trained, workdir)
    return trained


def _export(trained: "training.TrainedModel", workdir: str) -> None:
    from robust_keras.commands import model_cards
    from robust_keras.saved_models import export

    for name, validation in trained.report.items():
        metrics = ", ".join(f"{column} {100 * value:.2f} %" for column, value in validation["metrics"].items())
        print(f"{name}: step {validation['step']}, {metrics}")
    saved_model = posixpath.join(workdir, "saved_model")
    if not export.is_finished(saved_model):
        network, card = export.network_of_run(workdir)
        export.export(network, saved_model, card=model_cards.of_run({**card, "validation": trained.report}))
    print(f"SavedModel: {saved_model}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    launcher.define_recipe(values)
    flags.DEFINE_string("workdir", None, "The run's folder; runs/<recipe> by default.", flag_values=values)
    launcher.define_strategy(values)
    flags.DEFINE_string(
        "init_from", None, "Start from the weights of this run's folder or .keras file.", flag_values=values
    )


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        gin_files=values.gin_file,
        gin_params=values.gin_param,
        data_dir=values.data_dir,
        workdir=values.workdir,
        strategy=values.strategy,
        tpu=values.tpu,
        init_from=values.init_from,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
