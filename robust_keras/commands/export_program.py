"""Leaves a run's training step and evaluation in a folder, from where they run with JAX and NumPy alone.

    python scripts/export_program.py --gin_file=gin/quickstart.gin --workdir=programs/quickstart
    python programs/quickstart/run.py --steps=30 --evaluate --time --out=runs/travelled

The second command works wherever there is JAX 0.7.2 or newer, on whatever it drives, and needs nothing of this package.
It trains as train.py would, on the batches in the folder, and leaves a run's folder, with which train.py goes on.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import posixpath
from collections.abc import Sequence

from absl import flags


def run(
    *,
    gin_files: Sequence[str],
    workdir: str,
    gin_params: Sequence[str] = (),
    data_dir: str | None = None,
    num_steps: int = 30,
    num_images: int | None = None,
    from_run: str | None = None,
) -> None:
    """Writes the folder.

    Args:
        gin_files: recipes, read in order.
        workdir: a new folder.
        gin_params: further bindings.
        data_dir: where data sets are.
        num_steps: steps whose batches travel.
        num_images: images held out that travel; None for all.
        from_run: folder of a run of the same recipe, to go on from its newest snapshot.

    Raises:
        ValueError: for bad input, such as a recipe with an operation that does not lower, which is named.
    """
    from robust_keras.commands import configuration, workdirs
    from robust_keras.engines import strategies

    strategy = strategies.by_itself()
    from robust_keras.training import travelling

    configuration.parse(gin_files, gin_params)
    with strategy.scope():
        train = configuration.resolve(configuration.train)
        config = configuration.operative_config()
        if from_run is not None:
            workdirs.claim(from_run, config, holds_results=True, write=False)
        has = travelling.write(
            workdir,
            **train._asdict(),
            config=config,
            extent=travelling.Extent(num_steps, num_images, from_run),
            data_dir=data_dir,
        )
    print(f"Batches of {has.num_steps} steps after step {has.step}, {has.num_images} images held out")
    print(f"Program: {posixpath.join(workdir, 'run.py')}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    launcher.define_recipe(values)
    flags.DEFINE_string("workdir", None, "A new folder for the program.", flag_values=values)
    flags.DEFINE_integer("num_steps", 30, "Steps whose batches are in the folder.", flag_values=values)
    flags.DEFINE_integer("num_images", None, "Images held out in the folder; all by default.", flag_values=values)
    flags.DEFINE_string(
        "from_run", None, "Go on from the newest snapshot of this run of the same recipe.", flag_values=values
    )
    flags.mark_flag_as_required("workdir", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(
        gin_files=values.gin_file,
        gin_params=values.gin_param,
        data_dir=values.data_dir,
        workdir=values.workdir,
        num_steps=values.num_steps,
        num_images=values.num_images,
        from_run=values.from_run,
    )


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
