"""Tells what runs and evaluations came to: a table here, and a page with all there is to see.

    python scripts/report.py --workdir=runs/at/autoattack

prints the table and writes report.html and report.md beside the results. Of several, side by side, they go to a folder:

    python scripts/report.py --workdir=runs/at/autoattack --workdir=runs/trades/autoattack --output=reports/two

A run that is under way is shown to browsers of this machine, as it grows; nothing is written then:

    python scripts/report.py --workdir=runs/at --watch

With several seeds on both sides, in the same order, the intervals speak of other images and other seeds:

    python scripts/report.py --workdir=silu/0/eval --workdir=silu/1/eval --baseline=relu/0/eval --baseline=relu/1/eval
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import functools
import posixpath
from collections.abc import Sequence

from absl import flags


def run(
    *,
    workdirs: Sequence[str],
    baselines: Sequence[str] = (),
    output: str | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
) -> None:
    """Prints a table, and how evaluations differ from their baselines; writes report.html and report.md.

    Args:
        workdirs: folders of runs or of finished evaluations.
        baselines: folders of evaluations to compare with, one for each; none for no comparison.
        output: where the page goes; None for the folder in `workdirs` where it is one, and nowhere where they are more.
        dataset: where the evaluated images are, as `data.sources.load` takes it; None for those of results.json where
            they are the package's, or a prepared set of TensorFlow Datasets.
        data_dir: where prepared sets are.

    Raises:
        ValueError: for a folder of anything else, files that hold it, baselines on other images, or a `dataset` that
            cannot be read.
    """
    from robust_keras import foreign_files, own_folders, storage
    from robust_keras.commands import evaluated_images
    from robust_keras.evaluation import report
    from robust_keras.reports import contents, document, markdown, page

    load_images = evaluated_images.at_hand(dataset=dataset, data_dir=data_dir)
    failures: list[ValueError] = []

    def load(evaluated):
        try:
            return load_images(evaluated)
        except ValueError as error:
            failures.append(error)
            raise

    found = contents.read(workdirs, baselines=baselines, load_images=load)
    if dataset is not None and failures and all(each.clean is None for each in found.evaluations):
        raise failures[0]
    if found.evaluations:
        print(report.table([each.results for each in found.evaluations]))
    folders = [each.folder for each in found.evaluations]
    files = [posixpath.join(folder, "results.json") for folder in folders]
    files += [posixpath.join(each.folder, "metrics.csv") for each in found.runs]
    named = foreign_files.printable(", ".join(dict.fromkeys(files)), most=4000)
    print(f"Read from {named}; nothing was measured now.")
    for name, told in found.differences.items():
        print(f"{name}: {told}")
    folder = output or (workdirs[0] if len(workdirs) == 1 else None)
    if folder is None:
        print("--output=FOLDER writes report.html, which shows them side by side, and report.md")
        return
    made = document.of(found)
    with own_folders.within(folder):
        own_folders.make(folder)
        for name, text in (("report.md", markdown.of(made)), ("report.html", page.of(made))):
            storage.write_text(posixpath.join(folder, name), text)
    print(f"Report: {posixpath.join(folder, 'report.html')}")


def watch(
    *,
    workdirs: Sequence[str],
    baselines: Sequence[str] = (),
    dataset: str | None = None,
    data_dir: str | None = None,
    port: int = 0,
) -> None:
    """Serves the page to browsers of this machine until Ctrl-C, made again when there is something new.

    Args:
        workdirs: folders as in `run`, like all but `port`; those of runs may hold nothing yet.
        port: of 127.0.0.1; 0 for any that is free.

    Raises:
        ValueError: for what is no folder, and a port that is in use.
    """
    from robust_keras.commands import evaluated_images
    from robust_keras.reports import page, watching

    load_images = evaluated_images.at_hand(dataset=dataset, data_dir=data_dir)
    make = functools.partial(page.html, workdirs, baselines=baselines, load_images=load_images)
    watching.watch([*workdirs, *baselines], make, port=port)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the command's flags."""
    flags.DEFINE_multi_string(
        "workdir", None, "Folder of a run or of a finished evaluation; any number of times.", flag_values=values
    )
    flags.DEFINE_multi_string(
        "baseline", [], "Folder of an evaluation to compare with, one for each --workdir.", flag_values=values
    )
    flags.DEFINE_string("output", None, "Folder for report.html and report.md; the only --workdir.", flag_values=values)
    flags.DEFINE_string(
        "dataset", None, "Where the evaluated images are, such as npz:FILE; as results.json says.", flag_values=values
    )
    flags.DEFINE_string("data_dir", None, "Where prepared data sets are, to show clean images.", flag_values=values)
    flags.DEFINE_bool("watch", False, "Serve the page of what is under way, and write nothing.", flag_values=values)
    flags.DEFINE_integer("port", 6007, "Of 127.0.0.1, where --watch serves; 0 for any.", flag_values=values)
    flags.mark_flag_as_required("workdir", flag_values=values)


def main(values: flags.FlagValues) -> None:
    """Runs the command with the values of its flags."""
    given = {
        "workdirs": values.workdir,
        "baselines": values.baseline,
        "dataset": values.dataset,
        "data_dir": values.data_dir,
    }
    if values.watch and values.output:
        raise ValueError(f"Expected --output or --watch, which writes nothing. Received: both, {values.output}")
    if values.watch:
        watch(**given, port=values.port)
    else:
        run(**given, output=values.output)


def command() -> None:
    """Runs the command as it was typed."""
    launcher.launch(main, define_flags, __doc__)
