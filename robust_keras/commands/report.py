"""Prints the results of evaluations as one table, and how they differ from a baseline on the same images.

    python scripts/report.py --workdir=runs/at/pgd40 --workdir=runs/trades/pgd40

With several seeds on both sides, in the same order, the intervals speak of other images and other seeds:

    python scripts/report.py --workdir=silu/0/eval --workdir=silu/1/eval --baseline=relu/0/eval --baseline=relu/1/eval
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

from absl import flags


def define_flags(values):
    flags.DEFINE_multi_string(
        "workdir", None, "Folder of a finished evaluation; any number of times.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "baseline", [], "Folder of an evaluation to compare with, one for each --workdir.", flag_values=values
    )
    flags.mark_flag_as_required("workdir", flag_values=values)


def main(values):
    from robust_keras.evaluation import comparison, report

    compared = report.compare_evaluations(values.workdir, values.baseline) if values.baseline else {}
    print(report.table(report.read_results([*values.workdir, *values.baseline])))
    for name, found in compared.items():
        print(f"{name}: {comparison.summary(found)}")


def command():
    launcher.launch(main, define_flags, __doc__)
