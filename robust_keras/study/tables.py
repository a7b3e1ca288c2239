"""The study's tables: the paper's numbers beside what was measured."""

import csv
import io
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_keras import own_folders, storage
from robust_keras.evaluation import comparison, contrast, report
from robust_keras.study import costs, planning
from robust_keras.study import rows as study
from robust_keras.study.measured import Measured, group

REPORTED = "* reported by others, by an attack that the paper calls similar in strength to AA+MT"


class StudyRow(NamedTuple):
    """A row of the study beside what was measured.

    Attributes:
        row: the `rows.Row`.
        measured: a tuple of `Measured`, empty where it was not run.
        expected: by how many points its robust accuracy differs from its baseline's in the paper; None without one.
        compared: a `comparison.Comparison` of the robust accuracies, or None.
        at_chance: models that are at chance, of the row and of its baseline, by name: where there is one, no difference
            can be told.
    """

    row: study.Row
    measured: tuple[Measured, ...]
    expected: float | None
    compared: comparison.Comparison | None
    at_chance: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What the measurement says of the paper's difference, as one line; '' where there is nothing to say."""
        if self.at_chance:
            return f"no difference can be told: at chance on clean images {', '.join(self.at_chance)}"
        return comparison.summary(self.compared) if self.compared else ""


def compare_rows(
    manifest: Sequence[study.Row], rows: Iterable[study.Row], models: Mapping[str, Sequence[Measured]]
) -> list[StudyRow]:
    """Rows beside what was measured, each compared with its baseline.

    Three models or more of the same seeds on both sides are compared seed by seed, others by all models of each side. A
    comparison in which one model is at chance is not made.

    Args:
        manifest: all `rows.Row`s.
        rows: those to show.
        models: lists of `Measured` by `rows.run_name`.

    Returns:
        A list of `StudyRow`.
    """
    return [_compare(manifest, row, models) for row in rows]


def _compare(manifest: Sequence[study.Row], row: study.Row, models: Mapping[str, Sequence[Measured]]) -> StudyRow:
    own = tuple(models.get(study.run_name(row), ())) if row.runnable else ()
    baseline = study.baseline_of(manifest, row)
    if baseline is None or row.robust is None or baseline.robust is None:
        return StudyRow(row, own, None, None)
    expected = row.robust - baseline.robust
    others = tuple(models.get(study.run_name(baseline), ())) if own else ()
    at_chance = tuple(
        f"{study.run_name(of)} of seed {each.seed}"
        for of, of_it in ((row, own), (baseline, others))
        for each in of_it
        if others and each.is_at_chance
    )
    found = None
    if others and not at_chance:
        found = _compared(own, others, expected)
    return StudyRow(row, own, expected, found, at_chance)


def _compared(own: Sequence[Measured], others: Sequence[Measured], expected: float) -> comparison.Comparison:
    # Of two pairs, `compare` shows up to six in a hundred differences of none.
    if len(own) > 2 and [each.seed for each in own] == [each.seed for each in others]:
        return comparison.compare(
            *(np.stack([each.stands for each in side]) for side in (own, others)), expected=expected
        )
    groups = [group(side, "robust", sign) for side, sign in ((own, 1), (others, -1))]
    return contrast.compare(groups, expected=expected)


def paper_columns(rows: Iterable[study.Row]) -> list[tuple[str, ...]]:
    """Lines of text cells: `rows.Row`s with the paper's numbers."""
    lines: list[tuple[str, ...]] = [
        ("table", "row", "setting", "kind", "recipe", "bindings", "clean", "PGD-40", "robust (AA+MT)")
    ]
    for row in rows:
        numbers = (_spread(row.clean, row.clean_spread), _number(row.pgd40), _robust(row))
        bindings = "; ".join(row.bindings)
        lines.append((str(row.table), row.row, row.setting, row.kind, " ".join(row.files), bindings, *numbers))
    return lines


def cost_columns(plan: planning.Plan, jobs: Mapping[str, planning.Job]) -> list[tuple[str, ...]]:
    """Lines of text cells: what configurations, by name, take at a scale, in all and on `costs.DEVICES`."""
    header = ("configuration", "network", "parameters", "steps", "a step", "models", "training", "evaluation, at most")
    lines = [(*header, "in all", *(f"hours on {device.title}" for device in costs.DEVICES.values()))]
    total = 0.0
    for name, job in jobs.items():
        cost, network = planning.cost(plan, job), plan.network(job.depth, job.width)
        lines.append(
            (
                name,
                "WRN-{}-{}".format(*network),
                f"{costs.num_parameters(*network, num_classes=job.num_classes):,}",
                f"{plan.steps(job.train_steps):,}",
                f"{planning.step_flops(plan, job):.4g} FLOP",
                f"{job.num_runs}, {job.num_evaluated} evaluated",
                f"{cost.training:.3g} FLOP",
                f"{cost.evaluation:.3g} FLOP",
                *_totals(cost.total),
            )
        )
        total += cost.total
    return [*lines, ("all", *[""] * 7, *_totals(total))]


def _totals(flops: float) -> list[str]:
    hours = (flops / device.flops_per_second / 3600 for device in costs.DEVICES.values())
    return [f"{flops:.3g} FLOP", *(f"{each:,.1f}" for each in hours)]


def write_study(directory: str, table: int, rows: Sequence[StudyRow], *, scale: str) -> list[str]:
    """Writes a table of the study as Markdown and CSV.

    Args:
        directory: where to; any `tf.io.gfile` path.
        table: its number.
        rows: `StudyRow`s.
        scale: a description of what was measured, for the title.

    Returns:
        The paths.
    """
    title = f"Table {table}. Measured at {scale}"
    records = [_record(each) for each in rows]
    base = posixpath.join(directory, f"table{table}")
    paths = [f"{base}.md", f"{base}.csv"]
    own_folders.make(directory)
    note = f"\n{REPORTED}.\n" if any(each.row.is_reported for each in rows) else ""
    storage.write_text(paths[0], f"{title}.\n\n{report.markdown(_lines(rows))}\n{note}")
    text = io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    storage.write_text(paths[1], text.getvalue())
    return paths


def _lines(rows: Iterable[StudyRow]) -> list[tuple[str, ...]]:
    """Lines of text cells."""
    header = ("row", "setting", "paper: clean", "PGD-40", "robust", "measured: clean", "PGD-40", "robust", "models")
    lines: list[tuple[str, ...]] = [
        (*header, "compared with", "paper: difference", "measured: difference of robust accuracies (upper bounds)")
    ]
    for each in rows:
        row = each.row
        lines.append(
            (
                row.row,
                row.setting,
                _spread(row.clean, row.clean_spread),
                _number(row.pgd40),
                _robust(row),
                *(_spread(*mean_of(each.measured, name)) for name in ("clean", "pgd40", "robust")),
                str(len(each.measured)),
                row.baseline,
                _number(each.expected, "+.2f"),
                each.verdict or row.kind,
            )
        )
    return lines


def _record(each: StudyRow) -> dict[str, Any]:
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
        "paper_robust_is_reported": row.is_reported,
        "paper_difference": None if each.expected is None else round(each.expected, 2),
        "seeds": " ".join(str(measured.seed) for measured in each.measured),
    }
    for name in ("clean", "pgd40", "robust"):
        mean, deviation = mean_of(each.measured, name)
        record |= {f"measured_{name}": mean, f"measured_{name}_deviation": deviation}
    return record | difference_columns(compared) | ({"verdict": "at chance"} if each.at_chance else {})


def difference_columns(compared: comparison.Comparison | None) -> dict[str, Any]:
    """Cells of a CSV: a difference in points, or hundredths of its unit; None where there is none."""
    names = ("difference", "difference_low", "difference_high", "verdict", "images_needed", "seeds_needed")
    if compared is None:
        return dict.fromkeys(names)
    points = (100 * each for each in (compared.difference, *compared.interval))
    return dict(zip(names, (*points, compared.verdict, *(compared.needed or (None, None)))))


def mean_of(measured: Iterable[Measured], name: str) -> tuple[float | None, float | None]:
    """Mean and standard deviation over models; None where there is none."""
    values = [value for each in measured if (value := getattr(each, name)) is not None]
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def _robust(row: study.Row) -> str:
    return _spread(row.robust, row.robust_spread) + ("*" if row.is_reported else "")


def _number(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else format(value, form)


def _spread(value: float | None, deviation: float | None) -> str:
    return _number(value) + ("" if deviation is None else f" ± {deviation:.2f}")
