"""Prints the results of evaluations as one table.

python scripts/report.py --workdir=runs/at/pgd40 --workdir=runs/trades/pgd40
"""

from robust_keras.scripts import launcher  # isort: skip  Before TensorFlow is imported.

from absl import flags

_WORKDIR = flags.DEFINE_multi_string("workdir", None, "Folder of a finished evaluation; any number of times.")
flags.mark_flag_as_required("workdir")


def main():
    from robust_keras import reporting

    print(reporting.table(reporting.read_results(_WORKDIR.value)))


def command():
    launcher.launch(main)


if __name__ == "__main__":
    command()
