"""Prints the results of evaluations as one table, and how they differ from a baseline on the same images.

    python scripts/report.py --workdir=runs/at/pgd40 --workdir=runs/trades/pgd40

With several seeds on both sides, in the same order, the intervals speak of other images and other seeds:

    python scripts/report.py --workdir=silu/0/eval --workdir=silu/1/eval --baseline=relu/0/eval --baseline=relu/1/eval
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import posixpath
from collections.abc import Sequence

from absl import flags


def run(*, workdirs: Sequence[str], baselines: Sequence[str] = ()) -> None:
    """Prints a table, and how evaluations differ from their baselines.

    Args:
        workdirs: folders of finished evaluations.
        baselines: folders of those to compare with, one for each; none for no comparison.

    Raises:
        ValueError: for a folder without a finished evaluation, or baselines on other images.
    """
    from robust_keras import foreign_files
    from robust_keras.evaluation import comparison, report

    compared = report.compare_evaluations(workdirs, baselines) if baselines else {}
    print(report.table(report.read_results([*workdirs, *baselines])))
    files = ", ".join(dict.fromkeys(posixpath.join(folder, "results.json") for folder in [*workdirs, *baselines]))
    print(f"Read from {foreign_files.printable(files, most=4000)}; nothing was measured now.")
    at_chance = report.at_chance([*workdirs, *baselines]) if baselines else []
    for name, found in compared.items():
        told = comparison.summary(found)
        if name == "robust" and at_chance:
            told = f"no difference can be told: at chance on clean images {', '.join(at_chance)}"
        print(f"{name}: {told}")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_multi_string(
        "workdir", None, "Folder of a finished evaluation; any number of times.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "baseline", [], "Folder of an evaluation to compare with, one for each --workdir.", flag_values=values
    )
    flags.mark_flag_as_required("workdir", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    run(workdirs=values.workdir, baselines=values.baseline)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
