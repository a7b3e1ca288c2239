"""The study's tables and figures: the paper's numbers beside what was measured."""

import csv
import io
import posixpath
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras.evaluation import comparison, report
from robust_keras.study import rows as study

# Figures of the paper that show a table.
FIGURES = {6: "Figure 3", 7: "Figure 4", 8: "Figure 5", 9: "Figure 2"}


class Measured(NamedTuple):
    """One evaluated model.

    Attributes:
        seed: of its training run.
        clean: accuracy in percent, like the next two.
        pgd40: under PGD-40; None where the evaluation had no baseline.
        robust: under all attacks.
        stands: bool `[num_examples]`, which examples are right under all attacks.
        curve: rows of the run's metrics.csv with a validation: dictionaries of floats.
    """

    seed: int
    clean: float
    pgd40: float | None
    robust: float
    stands: np.ndarray
    curve: list


class StudyRow(NamedTuple):
    """A row of the study beside what was measured.

    Attributes:
        row: the `rows.Row`.
        measured: a tuple of `Measured`, empty where it was not run.
        expected: by how many points its robust accuracy differs from its baseline's in the paper; None without one.
        compared: a `comparison.Comparison` of the robust accuracies, or None.
    """

    row: study.Row
    measured: tuple
    expected: float | None
    compared: comparison.Comparison | None


def read_measured(evaluation, *, seed, training):
    """What a finished evaluation and its training run have on disk.

    Args:
        evaluation: the folder with results.json and examples.npz.
        seed: of the training run.
        training: the run's folder, with metrics.csv.

    Returns:
        A `Measured`.

    Raises:
        ValueError: for an evaluation that is not finished.
    """
    (results,) = report.read_results([evaluation])
    with tf.io.gfile.GFile(posixpath.join(training, "metrics.csv")) as file:
        lines = [line for line in csv.DictReader(io.StringIO(file.read())) if line["val_robust"]]
    curve = [{name: float(value) for name, value in line.items() if value} for line in lines]
    pgd40 = results.get("baseline", {}).get("robust_accuracy")
    return Measured(
        seed=seed,
        clean=100 * results["clean_accuracy"],
        pgd40=None if pgd40 is None else 100 * pgd40,
        robust=100 * results["robust_accuracy"],
        stands=report.examples(evaluation)["robust"],
        curve=curve,
    )


def compare_rows(manifest, rows, measured):
    """Rows beside what was measured, each compared with its baseline over the seeds that both have.

    Args:
        manifest: all `rows.Row`s.
        rows: those to show.
        measured: lists of `Measured` by `rows.run_name`.

    Returns:
        A list of `StudyRow`.
    """
    compared = []
    for row in rows:
        own = measured.get(study.run_name(row), []) if row.runnable else []
        baseline = study.baseline_of(manifest, row)
        expected = found = None
        if baseline:
            expected = row.robust - baseline.robust
            others = {each.seed: each for each in measured.get(study.run_name(baseline), [])}
            pairs = [(each.stands, others[each.seed].stands) for each in own if each.seed in others]
            if pairs:
                found = comparison.compare(*map(np.stack, zip(*pairs)), expected=expected)
        compared.append(StudyRow(row, tuple(own), expected, found))
    return compared


def paper_columns(rows):
    """Lines of text cells: `rows.Row`s with the paper's numbers."""
    lines = [("table", "row", "setting", "kind", "recipe", "bindings", "clean", "PGD-40", "robust (AA+MT)")]
    for row in rows:
        numbers = (_spread(row.clean, row.clean_spread), _number(row.pgd40), _spread(row.robust, row.robust_spread))
        bindings = "; ".join(row.bindings)
        lines.append((str(row.table), row.row, row.setting, row.kind, " ".join(row.files), bindings, *numbers))
    return lines


def write_study(directory, table, rows, *, scale):
    """Writes a table of the study as Markdown and CSV, and where the paper has a figure of it, as a plot.

    Args:
        directory: where to; any `tf.io.gfile` path.
        table: its number.
        rows: `StudyRow`s.
        scale: a description of what was measured, for the title.

    Returns:
        The paths.
    """
    title = f"Table {table}. Measured at {scale}"
    header = ("row", "setting", "paper: clean", "PGD-40", "robust", "measured: clean", "PGD-40", "robust", "models")
    lines = [
        (*header, "compared with", "paper: difference", "measured: difference of robust accuracies (upper bounds)")
    ]
    records = []
    for each in rows:
        row = each.row
        lines.append(
            (
                row.row,
                row.setting,
                _spread(row.clean, row.clean_spread),
                _number(row.pgd40),
                _spread(row.robust, row.robust_spread),
                *(_spread(*_mean(each.measured, name)) for name in ("clean", "pgd40", "robust")),
                str(len(each.measured)),
                row.baseline,
                _number(each.expected, "+.2f"),
                comparison.summary(each.compared) if each.compared else each.row.kind,
            )
        )
        records.append(_record(each))
    base = posixpath.join(directory, f"table{table}")
    paths = [f"{base}.md", f"{base}.csv"]
    tf.io.gfile.makedirs(directory)
    with tf.io.gfile.GFile(paths[0], "w") as file:
        file.write(f"{title}.\n\n{report.markdown(lines)}\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    with tf.io.gfile.GFile(paths[1], "w") as file:
        file.write(text.getvalue())
    if table in FIGURES:
        paths.append(f"{base}.png")
        with tf.io.gfile.GFile(paths[2], "wb") as file:
            file.write(_plot(rows, f"{FIGURES[table]} ({title})", curves=table == 7))
    return paths


def _record(each):
    """A line of the CSV."""
    row, compared = each.row, each.compared
    record = {
        "table": row.table,
        "row": row.row,
        "setting": row.setting,
        "kind": row.kind,
        "compared_with": row.baseline,
        "paper_clean": row.clean,
        "paper_pgd40": row.pgd40,
        "paper_robust": row.robust,
        "paper_difference": None if each.expected is None else round(each.expected, 2),
        "seeds": " ".join(str(measured.seed) for measured in each.measured),
    }
    for name in ("clean", "pgd40", "robust"):
        mean, deviation = _mean(each.measured, name)
        record |= {f"measured_{name}": mean, f"measured_{name}_deviation": deviation}
    low, high = compared.interval if compared else (None, None)
    needed_images, needed_seeds = compared.needed if compared and compared.needed else (None, None)
    return record | {
        "difference": compared and 100 * compared.difference,
        "difference_low": compared and 100 * low,
        "difference_high": compared and 100 * high,
        "verdict": compared and compared.verdict,
        "images_needed": needed_images,
        "seeds_needed": needed_seeds,
    }


def _mean(measured, name):
    """Mean and standard deviation over models; None where there is none."""
    values = [value for each in measured if (value := getattr(each, name)) is not None]
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _number(value, form=".2f"):
    return "" if value is None else format(value, form)


def _spread(value, deviation):
    return _number(value) + ("" if deviation is None else f" ± {deviation:.2f}")


def _plot(rows, title, *, curves):
    """A PNG file's bytes: robust accuracies of the paper and measured, and where asked for, validation curves."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(each.row.setting for each in rows))
    figure = Figure(figsize=(7 * (len(settings) + curves), 5))
    axes = figure.subplots(1, len(settings) + curves, squeeze=False)
    for axis, setting in zip(axes[0], settings):
        shown = [each for each in rows if each.row.setting == setting]
        positions = range(len(shown))
        axis.plot(positions, [each.row.robust for each in shown], "o--", color="0.6", label="paper")
        for position, each in zip(positions, shown):
            mean, deviation = _mean(each.measured, "robust")
            if mean is not None:
                axis.errorbar(position, mean, deviation or 0.0, fmt="s", color="C0", capsize=3)
        axis.plot([], [], "s", color="C0", label="measured, with the deviation of seeds")
        axis.set_xticks(positions, [each.row.row for each in shown], rotation=45, ha="right")
        axis.set_ylabel("robust accuracy, %")
        axis.set_title(setting)
        axis.legend()
    if curves:
        axis = axes[0][-1]
        for each in rows:
            for measured in each.measured[:1]:
                steps = [line["step"] for line in measured.curve]
                raw = axis.plot(steps, [100 * line["val_robust"] for line in measured.curve], ":", alpha=0.7)[0]
                column = [100 * line.get("val_robust_averaged", np.nan) for line in measured.curve]
                label = f"{each.row.row}, {each.row.setting}"
                axis.plot(steps, column, "-", color=raw.get_color(), label=label)
        axis.set_title("validation, PGD-40: raw (dotted) and averaged weights")
        axis.set_xlabel("step")
        axis.set_ylabel("robust accuracy, %")
        if any(each.measured for each in rows):
            axis.legend(fontsize="small")
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()
