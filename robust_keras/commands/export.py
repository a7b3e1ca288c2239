"""Exports the weights of a run as a SavedModel or a .keras file, also while the run goes on.

python scripts/export.py --workdir=runs/at --weights=best --output=exported
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

from absl import flags


def run(*, workdir: str, output: str, weights: str = "best") -> None:
    """Exports.

    Args:
        workdir: folder of a run.
        output: a new folder for a SavedModel, or a path that ends in `.keras`.
        weights: 'best', 'last' or 'last_averaged'.

    Raises:
        ValueError: where the run has no such weights yet, or the output exists.
    """
    from robust_keras.saved_models import export

    network, card = export.network_of_run(workdir, weights)
    if output.endswith(".keras"):
        export.export_keras(network, output)
    else:
        export.export(network, output, card=card)
    print(f"Exported {weights} weights of step {card['step']}: {output}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_string("workdir", None, "The run's folder.", flag_values=values)
    flags.DEFINE_enum(
        "weights",
        "best",
        ["best", "last", "last_averaged"],
        "The best on the validation images, or those of the newest checkpoint, raw or averaged.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "output", None, "A new folder for a SavedModel, or a file that ends in .keras.", flag_values=values
    )
    launcher.define_import(values)
    launcher.define_trust(values)
    flags.mark_flags_as_required(["workdir", "output"], flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(workdir=values.workdir, output=values.output, weights=values.weights)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
