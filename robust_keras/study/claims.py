"""The claims of the paper's text as data: what is compared with what, and the paper's number.

    manifest = rows.read()
    for claim in claims.select(claims.read(manifest), ["averaging"], setting="cifar10"):
        print(claim.section, claim.sentence, claim.measure, claim.side, claim.against, claim.paper)

The claims are `gin/claims.csv`; the rows that they compare are those of `gin/study.csv`, or recipes of their own.
"""

import csv
import difflib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from robust_keras.study import measured
from robust_keras.study import rows as study

KINDS = ("ours", "reference", "not run")
# Its sign, or that it is at most, or within, `MARGIN`.
EXPECTS = ("more", "less", "no more", "same")
# In points: twice what the ten baselines vary by, .23 and .25 (section 3.2). The paper gives no limits of what it calls
# no improvement, or "in line".
MARGIN = 0.5
_COLUMNS = "claim,section,setting,kind,sentence,measure,side,against,expects,paper,note"


class Claim(NamedTuple):
    """A claim, in one setting.

    Attributes:
        name: as `--claim` takes it; the same in both settings.
        section: of the paper.
        setting: out of `rows.SETTINGS`.
        kind: 'ours' compares models that can be trained, 'reference' one of them with a number of other authors, and
            'not run' what needs models or data that the study does not have.
        sentence: the claim, in words of ours.
        measure: a key of `measured.MEASURES`.
        side: the `rows.Row` that the claim is about; None where not run.
        against: what it is compared with: a row, a number, or None for nothing: the measure is a difference itself.
        expects: one of `EXPECTS`.
        paper: the paper's difference, in the measure's unit; None where it gives none.
        note: what is chosen here, and where the paper contradicts itself.
    """

    name: str
    section: str
    setting: str
    kind: str
    sentence: str
    measure: str
    side: study.Row | None
    against: study.Row | float | None
    expects: str
    paper: float | None
    note: str

    @property
    def rows(self) -> tuple[study.Row, ...]:
        """The rows that are to be run."""
        return tuple(each for each in (self.side, self.against) if isinstance(each, study.Row))


def read(manifest: Sequence[study.Row], path: str | os.PathLike | None = None) -> tuple[Claim, ...]:
    """Reads claims.

    Args:
        manifest: all `rows.Row`s.
        path: a csv file like `gin/claims.csv`, which None stands for. A side is 'TABLE:ROW', or gin files and bindings
            with '; ' between; its baseline is then the setting's adversarial training.

    Returns:
        A tuple of `Claim`, in the file's order.

    Raises:
        ValueError: for a malformed line, a claim that is there twice, and a row that is not there or cannot be run.
    """
    path = pathlib.Path(path) if path is not None else study.folder() / "claims.csv"
    claims = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if (header := ",".join(next(lines, []))) != _COLUMNS:
            raise ValueError(f"Expected the columns {_COLUMNS} in {path.name}. Received: {header}")
        for line in lines:
            claims.append(_claim(manifest, line, f"in line {lines.line_num} of {path.name}"))
            claim = claims[-1]
            if any((each.name, each.setting) == (claim.name, claim.setting) for each in claims[:-1]):
                raise ValueError(f"Expected each claim once in a setting. Received: {claim.name} twice")
    return tuple(claims)


def select(claims: Iterable[Claim], names: Sequence[str] = (), *, setting: str | None = None) -> tuple[Claim, ...]:
    """The claims of any of `names` in a setting; all if none is given.

    Raises:
        ValueError: for a name that is not there, in that setting; it says which are nearest.
    """
    claims = [claim for claim in claims if setting in (None, claim.setting)]
    there = list(dict.fromkeys(claim.name for claim in claims))
    for name in names:
        if name not in there:
            place = "" if setting is None else f" of {setting}"
            near = ", ".join(difflib.get_close_matches(name, there, cutoff=0.0))
            raise ValueError(f"Expected a claim{place}, such as {near}; see --list. Received: {name}")
    return tuple(claim for claim in claims if not names or claim.name in names)


def baseline_of(manifest: Sequence[study.Row], claim: Claim) -> study.Row | None:
    """The row whose models tell how much seeds matter: the baseline of the claim's side; None without one."""
    if claim.side is None or claim.side.kind == "baseline":
        return claim.side
    return study.baseline_of(manifest, claim.side)


def _claim(manifest: Sequence[study.Row], cells: Sequence[str], where: str) -> Claim:
    study.check(len(cells) == _COLUMNS.count(",") + 1, "as many cells as columns", where, len(cells))
    name, section, setting, kind, sentence, measure, side, against, expects, paper, note = cells
    study.check(re.fullmatch(r"[a-z0-9-]+", name), "a name of a claim", where, name)
    study.check(re.fullmatch(r"\d(\.\d)*", section), "a section", where, section)
    for noun, given, known in (
        ("a setting", setting, study.SETTINGS),
        ("a kind", kind, KINDS),
        ("a measure", measure, tuple(measured.MEASURES)),
        ("what is expected", expects, EXPECTS),
    ):
        study.check(given in known, f"{noun} out of {', '.join(known)}", where, given)
    study.check(sentence, "a sentence", where, sentence)
    study.check(bool(side) == (kind != "not run"), "a side of a claim that is run, and of no other", where, side)
    study.check(re.fullmatch(r"-?\d+(\.\d+)?|", paper), "a number of the paper", where, paper)
    number = float(against) if re.fullmatch(r"\d+(\.\d+)?", against) else None
    study.check(kind != "reference" or number is not None, "a number to compare with", where, against)
    found = _side(manifest, side, setting, where) if side else None
    other = number if number is not None else _side(manifest, against, setting, where) if against else None
    difference = float(paper) if paper else None
    return Claim(name, section, setting, kind, sentence, measure, found, other, expects, difference, note)


def _side(manifest: Sequence[study.Row], text: str, setting: str, where: str) -> study.Row:
    """The row that a cell names, or one that is its recipe."""
    if match := re.fullmatch(r"(\d+):(.+)", text):
        try:
            (row,) = study.select(manifest, table=match[1], row=match[2], setting=setting)
        except ValueError as error:
            raise ValueError(f"{error}, {where}") from error
        study.check(row.runnable, "a row that can be run", where, text)
        return row
    parts = text.split("; ")
    files = "; ".join(each for each in parts if each.endswith(".gin"))
    bindings = "; ".join(each for each in parts if not each.endswith(".gin"))
    return study.from_cells(["0", text, setting, "ours", files, bindings, "1:AT", *[""] * 5], where)
