"""What measurements say of the claims of the paper's text, and the files that say it."""

import csv
import io
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_keras import own_folders, storage
from robust_keras.evaluation import comparison, contrast, report
from robust_keras.study import claims, measured, tables
from robust_keras.study import rows as study
from robust_keras.study.measured import Measured


class Judged(NamedTuple):
    """A claim beside what was measured.

    Attributes:
        claim: the `claims.Claim`.
        side: models of its side; empty where they were not run, as the next one.
        against: of what it is compared with; empty for a number too.
        compared: a `comparison.Comparison` of the measure, or None.
        at_chance: names of models that are at chance: where there is one, nothing can be told.
    """

    claim: claims.Claim
    side: tuple[Measured, ...]
    against: tuple[Measured, ...]
    compared: comparison.Comparison | None
    at_chance: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """As one line; '' where there is nothing to say."""
        if self.at_chance:
            return f"nothing can be told: at chance on clean images {', '.join(self.at_chance)}"
        if self.compared is None:
            return ""
        return comparison.summary(self.compared, unit=measured.MEASURES[self.claim.measure].unit)


def judge(manifest: Sequence[study.Row], claim: claims.Claim, models: Mapping[str, Sequence[Measured]]) -> Judged:
    """Compares the two sides of a claim.

    Args:
        manifest: all `rows.Row`s.
        claim: one that can be run.
        models: lists of `Measured` by `rows.run_name`, of the sides and of the baseline.

    Returns:
        A `Judged`: the claim is shown where the interval lies within what it expects, contradicted where outside.
    """
    found = [tuple(models.get(study.run_name(row), ())) for row in claim.rows]
    side, against = found[0], found[1] if len(found) > 1 else ()
    at_chance = tuple(
        f"{study.run_name(row)} of seed {each.seed}"
        for row, of in zip(claim.rows, found)
        for each in of
        if each.is_at_chance
    )
    if at_chance or not all(found):
        return Judged(claim, side, against, None, at_chance)
    groups = [measured.group(of, claim.measure, sign) for of, sign in zip(found, (1, -1))]
    names = [study.run_name(row) for row in claim.rows]
    baseline = claims.baseline_of(manifest, claim)
    if baseline is not None and study.run_name(baseline) not in names and (of := models.get(study.run_name(baseline))):
        groups.append(measured.group(of, claim.measure, 0))
    return Judged(claim, side, against, _compare(claim, groups))


def _compare(claim: claims.Claim, groups: Sequence[contrast.Group]) -> comparison.Comparison:
    number = claim.against / 100 if isinstance(claim.against, float) else 0.0
    bound = {"more": 0.0, "less": 0.0}.get(claim.expects, claims.MARGIN / 100)
    sign = 1 if claim.expects == "more" else -1
    if claim.expects == "same" and contrast.compare(groups, offset=number).difference < 0:
        sign, bound = 1, -bound  # The nearer of the two.
    found = contrast.compare(groups, expected=sign, offset=number + bound)
    low, high = found.interval
    return found._replace(difference=found.difference + bound, interval=(low + bound, high + bound))


def write(directory: str, judged: Sequence[Judged], *, scale: str) -> list[str]:
    """Writes a claim in its settings as Markdown and CSV.

    Args:
        directory: where to; any `tf.io.gfile` path.
        judged: of one claim.
        scale: a description of what was measured, for the title.

    Returns:
        The paths.
    """
    name = judged[0].claim.name
    title = f"The paper's claim {name}. Measured at {scale}"
    base = posixpath.join(directory, f"claim-{name}")
    own_folders.make(directory)
    notes = "".join(f"\n{note}.\n" for note in dict.fromkeys(each.claim.note for each in judged) if note)
    storage.write_text(f"{base}.md", f"{title}.\n\n{report.markdown(_lines(judged))}\n{notes}")
    records, text = [_record(each) for each in judged], io.StringIO()
    writer = csv.DictWriter(text, records[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    storage.write_text(f"{base}.csv", text.getvalue())
    return [f"{base}.md", f"{base}.csv"]


def paper_columns(chosen: Sequence[claims.Claim]) -> list[tuple[str, ...]]:
    """Lines of text cells: `claims.Claim`s with the paper's numbers."""
    lines: list[tuple[str, ...]] = [
        ("claim", "section", "setting", "kind", "what it says", "measure", "of", "against", "expected", "paper", "note")
    ]
    for claim in chosen:
        of, against = (_named(each) for each in (claim.side, claim.against))
        measure = measured.MEASURES[claim.measure].title
        paper = "" if claim.paper is None else f"{claim.paper:+.2f}"
        cells = (claim.name, claim.section, claim.setting, claim.kind, claim.sentence, measure)
        lines.append((*cells, of, against, claim.expects, paper, claim.note))
    return lines


def _named(side: study.Row | float | None) -> str:
    if isinstance(side, study.Row):
        return f"{side.table}:{side.row}" if side.table else side.row
    return "" if side is None else f"{side:g}"


def _lines(judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    header = ("setting", "claim", "measure", "of", "measured", "models", "against", "measured", "models", "expected")
    lines: list[tuple[str, ...]] = [(*header, "paper: difference", "measured: difference")]
    for each in judged:
        claim = each.claim
        sides = [
            (_named(row), _spread(claim.measure, models), str(len(models)) if models else "")
            for row, models in ((claim.side, each.side), (claim.against, each.against))
        ]
        expected = f"within {claims.MARGIN:g}" if claim.expects == "same" else claim.expects
        expected = f"no more, by {claims.MARGIN:g}" if claim.expects == "no more" else expected
        paper = "" if claim.paper is None else f"{claim.paper:+.2f}"
        title = measured.MEASURES[claim.measure].title
        lines.append(
            (claim.setting, claim.sentence, title, *sides[0], *sides[1], expected, paper, each.verdict or claim.kind)
        )
    return lines


def _record(each: Judged) -> dict[str, Any]:
    """A line of the CSV."""
    claim, compared = each.claim, each.compared
    record: dict[str, Any] = {
        "claim": claim.name,
        "section": claim.section,
        "setting": claim.setting,
        "kind": claim.kind,
        "sentence": claim.sentence,
        "measure": claim.measure,
        "expects": claim.expects,
        "paper_difference": claim.paper,
    }
    for name, row, models in (("side", claim.side, each.side), ("against", claim.against, each.against)):
        mean, deviation = _mean(claim.measure, models)
        record |= {name: _named(row), f"{name}_mean": mean, f"{name}_deviation": deviation}
        record[f"{name}_seeds"] = " ".join(str(model.seed) for model in models)
    return record | tables.difference_columns(compared) | ({"verdict": "at chance"} if each.at_chance else {})


def _mean(measure: str, models: Sequence[Measured]) -> tuple[float | None, float | None]:
    """Mean and standard deviation over models, in hundredths; None where there is none."""
    if not models:
        return None, None
    means = 100 * measured.values(measure, models).mean(axis=1)
    return float(means.mean()), float(np.std(means, ddof=1)) if len(means) > 1 else None


def _spread(measure: str, models: Sequence[Measured]) -> str:
    mean, deviation = _mean(measure, models)
    return "" if mean is None else f"{mean:.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")
