"""A report as blocks: what the page and the Markdown have in common, which is all but the marks."""

import datetime
from collections.abc import Sequence

import robust_keras
from robust_keras.evaluation import report as tables
from robust_keras.reports import contents, evaluation_sections, plots, reading, run_sections
from robust_keras.reports.blocks import Code, Items, Paragraph, Plot, Report, Section, Table
from robust_keras.reports.contents import Contents, Evaluation, LoadImages, Run

MOST_IN_FULL = 8  # Runs and evaluations; of more there are tables alone, so that the page stays small.
_PICTURE_BYTES = 1_000_000  # Of all pictures of a page.


def read(folders: Sequence[str], *, baselines: Sequence[str] = (), load_images: LoadImages | None = None) -> Report:
    """The report of folders; arguments and errors are those of `contents.read`."""
    return of(contents.read(folders, baselines=baselines, load_images=load_images))


def of(found: Contents) -> Report:
    """The report of what was read."""
    evaluations, runs = found.evaluations, found.runs
    blocks = [Section(("What was measured",), tuple(_summary(found)))]
    if evaluations:
        blocks.append(Section(("Results",), tuple(_results(found))))
    if len(evaluations) + len(runs) > MOST_IN_FULL:
        told = f"Of more than {MOST_IN_FULL} folders there are no details; a report of fewer of them has these."
        blocks.append(Section(("Details",), (Paragraph((told,)),)))
    else:
        each = _PICTURE_BYTES // max(len(evaluations), 1)
        parts = [(one.folder, run_sections.sections(one)) for one in runs]
        trained = {one.folder: run_sections.threat(run) for run in runs for one in run.evaluations}
        for one in evaluations:
            parts.append((one.folder, evaluation_sections.sections(one, each, trained.get(one.folder))))
        if len(runs) <= 1 and len(evaluations) <= 1:
            blocks += [section for _, inner in parts for section in inner]
        else:
            blocks += [Section((Code(folder),), inner) for folder, inner in parts]
    blocks.append(Section(("About this report",), (_about(),)))
    return Report(_title(evaluations, runs), tuple(blocks))


def _title(evaluations: Sequence[Evaluation], runs: Sequence[Run]) -> str:
    if len(evaluations) == 1:
        results = evaluations[0].results
        robust = f"{100 * results['robust_accuracy']:.2f} %"
        return (
            f"At most {robust} robust under {results['norm']} {results['epsilon_fraction']}: {results['model']['path']}"
        )
    if not evaluations:
        return f"Training run{'s' if len(runs) > 1 else ''}: {', '.join(run.folder for run in runs)}"
    if len(runs) == 1 and evaluations == runs[0].evaluations:
        return f"Training run {runs[0].folder} and {len(evaluations)} evaluations of it"
    return f"{len(evaluations)} evaluations side by side"


def _summary(found: Contents):
    for run in found.runs:
        yield run_sections.sentence(run)
    for evaluation in found.evaluations:
        yield reading.sentence(evaluation)
        if evaluation.results.get("warnings") and len(found.evaluations) > 1:
            words = (Code(evaluation.folder), " has warnings that speak against its numbers; see below.")
            yield Paragraph(words, is_alert=True)
    if len(found.evaluations) == 1:
        if found.evaluations[0].results.get("warnings"):
            yield Paragraph(("Warnings speak against these numbers; see below.",), is_alert=True)
        yield reading.points(found.evaluations[0])
    elif found.evaluations:
        yield reading.together(found.evaluations)


def _results(found: Contents):
    evaluations = found.evaluations
    header, *lines = tables.lines([each.results for each in evaluations])
    folders = [each.folder for each in evaluations]
    rows = [(Code(folder), Code(line[0]), *line[1:]) for folder, line in zip(folders, lines)]
    yield Table("Robust accuracy is an upper bound of the true one", (("folder", *header), *rows))
    if 1 < len(evaluations) <= 40:
        names = [_short(folder, folders) for folder in folders]
        shares = [[100 * each.results[f"{kind}_accuracy"] for each in evaluations] for kind in ("clean", "robust")]
        intervals = [[100 * bound for bound in each.results["confidence_interval_95"]] for each in evaluations]
        told = "; ".join(f"{name}: clean {c:.1f} %, robust {r:.1f} %" for name, c, r in zip(names, *shares))
        numbers = [("evaluation", "clean, %", "robust, %", "95 % interval, %")]
        for folder, c, r, (low, high) in zip(folders, *shares, intervals):
            numbers.append((Code(folder), f"{c:.2f}", f"{r:.2f}", f"{low:.2f} to {high:.2f}"))
        yield Plot(
            plots.by_row(names, shares[0], shares[1], intervals),
            told,
            "Clean and robust accuracy of each evaluation, the latter with its 95 % interval for other images. "
            "Intervals that overlap do not mean that two models are alike on the same images.",
            Table("Accuracies side by side", tuple(numbers)),
        )
    if found.differences:
        first = len(evaluations) - found.num_baselines
        what = f"The first {first} against their baselines, pair by pair on the same images"
        yield Paragraph((f"{what}; differences are in percentage points.",))
        yield Items(tuple((f"{name.capitalize()}: ", line) for name, line in found.differences.items()))


def _short(folder: str, among: Sequence[str]) -> str:
    """The last parts of a path, as many as tell it from others, and no more than a plot has room for."""
    parts = folder.rstrip("/").split("/")
    for num in range(1, len(parts) + 1):
        name = "/".join(parts[-num:])
        if sum(other.rstrip("/").endswith(name) for other in among) == 1:
            break
    return name if len(name) <= plots.MOST_NAME else f"\N{HORIZONTAL ELLIPSIS}{name[1 - plots.MOST_NAME :]}"


def _about() -> Items:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return Items(
        (
            (f"Made on {now} by robust_keras {robust_keras.__version__}, scripts/report.py.",),
            ("All numbers were read from files. No model was loaded, and no attack was run now.",),
            ("The page asks for nothing from elsewhere and runs no scripts; numbers of each plot unfold below it.",),
        )
    )
