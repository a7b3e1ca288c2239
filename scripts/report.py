"""Prints the results of evaluations as one table.

python scripts/report.py --workdir=runs/at/pgd40 --workdir=runs/trades/pgd40
"""

from robust_keras.scripts import launcher  # isort: skip  Before TensorFlow is imported.

from absl import flags


def define_flags(values):
    flags.DEFINE_multi_string(
        "workdir", None, "Folder of a finished evaluation; any number of times.", flag_values=values
    )
    flags.mark_flag_as_required("workdir", flag_values=values)


def main(values):
    from robust_keras import reporting

    print(reporting.table(reporting.read_results(values.workdir)))


def command():
    launcher.launch(main, define_flags, __doc__)


if __name__ == "__main__":
    command()
