"""The study of the paper as data: every row of its Tables 1 to 10, with the configuration that reproduces it.

    rows = study.read()
    for row in study.select(rows, table=7, setting="80mti"):
        print(row.row, study.run_name(row), row.files, row.bindings, row.robust)

The rows are `gin/study.csv`. Accuracies are the paper's, in percent.
"""

import csv
import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SETTINGS = ("cifar10", "80mti")  # Without additional data, and with.
KINDS = ("baseline", "ours", "reference")
_COLUMNS = "table,row,setting,kind,recipe,bindings,baseline,clean,clean_spread,pgd40,robust,robust_spread"


class Row(NamedTuple):
    """One row of a table in one setting.

    Attributes:
        table: the number of the paper's table.
        row: the row's name in it.
        setting: 'cifar10' without additional data, '80mti' with.
        kind: 'baseline' is what other rows of its table are compared with, 'ours' any other row that the paper
            trained, and 'reference' a model of other authors, which cannot be run.
        files: gin files relative to the folder of the recipes; empty for a reference.
        bindings: gin bindings on top of them, each 'NAME = VALUE'.
        baseline: the row of its setting that it is compared with, a name in its table or 'TABLE:ROW'; '' for none.
        clean: clean accuracy.
        clean_spread: what the paper gives after a +-. As all numbers, None where the paper has none.
        pgd40: robust accuracy under PGD-40 on the margin loss.
        robust: robust accuracy under AutoAttack and MultiTargeted.
        robust_spread: what the paper gives after a +-.
        is_reported: whether `robust` is a number that others reported, by an attack that the paper calls similar in
            strength: an asterisk in its Table 5, and after the number in the file.
    """

    table: int
    row: str
    setting: str
    kind: str
    files: tuple[str, ...]
    bindings: tuple[str, ...]
    baseline: str
    clean: float | None
    clean_spread: float | None
    pgd40: float | None
    robust: float | None
    robust_spread: float | None
    is_reported: bool = False

    @property
    def runnable(self) -> bool:
        """Whether there is a configuration to run."""
        return bool(self.files)


def read(path: str | os.PathLike | None = None) -> tuple[Row, ...]:
    """Reads a study.

    Args:
        path: a csv file like `gin/study.csv`, which None stands for; '; ' separates gin files and bindings, and an
            asterisk follows a robust accuracy that others reported.

    Returns:
        A tuple of `Row`, in the file's order.

    Raises:
        ValueError: for a malformed line, a row that is there twice, a baseline that is not there or cannot be run, and
            two configurations of one `run_name`.
    """
    path = pathlib.Path(path) if path is not None else folder() / "study.csv"
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        if (header := ",".join(next(lines, []))) != _COLUMNS:
            raise ValueError(f"Expected the columns {_COLUMNS} in {path.name}. Received: {header}")
        for line in lines:
            rows.append(from_cells(line, f"in line {lines.line_num} of {path.name}"))
    seen: set[tuple] = set()
    configurations: dict[str, tuple] = {}
    for row in rows:
        if row[:3] in seen:
            raise ValueError(f"Expected each row once. Received: {_where(row)} twice")
        seen.add(row[:3])
        if (baseline := baseline_of(rows, row)) and not baseline.runnable:
            raise ValueError(f"Expected a baseline that can be run for {_where(row)}. Received: {row.baseline!r}")
        if row.runnable:
            configuration = (row.files, frozenset(row.bindings))
            if configurations.setdefault(run_name(row), configuration) != configuration:
                raise ValueError(f"Expected one configuration named {run_name(row)}. Received: another, {_where(row)}")
    return tuple(rows)


def select(
    rows: Iterable[Row], *, table: int | str | None = None, row: str | None = None, setting: str | None = None
) -> tuple[Row, ...]:
    """The rows of a table (its number), of a name and of a setting, where None is any.

    Returns:
        A tuple of `Row`.

    Raises:
        ValueError: where there are none; it says which there are.
    """
    place = ""
    for noun, field, wanted in (("table", "table", table), ("row", "row", row), ("setting", "setting", setting)):
        if wanted is None:
            continue
        there = dict.fromkeys(str(getattr(r, field)) for r in rows)
        rows = [r for r in rows if str(getattr(r, field)) == str(wanted)]
        if not rows:
            raise ValueError(f"Expected a {noun}{place} out of {', '.join(there)}. Received: {wanted}")
        place = f" of Table {wanted}" if field == "table" else f"{place or ' of'}{',' if place else ''} {wanted}"
    return tuple(rows)


def baseline_of(rows: Iterable[Row], row: Row) -> Row | None:
    """The row that `row` is compared with, in the same setting; None if with none.

    Raises:
        ValueError: where `rows` lack it.
    """
    if not row.baseline:
        return None
    # Names have colons too: 5:5 is a row of Table 9 before it is one of Table 5.
    table, _, name = row.baseline.partition(":")
    for place in ((str(row.table), row.baseline), (table, name)):
        for other in rows:
            if (str(other.table), other.row) == place and other.setting == row.setting:
                return other
    raise ValueError(
        f"Expected a row of setting {row.setting} as baseline of {_where(row)}. Received: {row.baseline!r}"
    )


def run_name(row: Row) -> str:
    """A file-name-safe name of the row's configuration, such as 'at-tau=0.995', the same in every table.

    Raises:
        ValueError: for a row that cannot be run.
    """
    if not row.runnable:
        raise ValueError(f"Expected a row that can be run. Received: {_where(row)}, of kind {row.kind}")
    parts = []
    for binding in row.bindings:
        name, value = binding.split(" = ", 1)
        scope, _, name = name.rpartition("/")
        parts.append(f"{scope}.{name.rpartition('.')[2]}={value}".lstrip("."))
    names = [file.removesuffix(".gin") for file in row.files] + sorted(parts)
    return "-".join(re.sub("[^a-z0-9_.=]+", "_", name.lower()).replace("=_", "=").strip("_") for name in names)


def folder() -> pathlib.Path:
    """The folder of the recipes."""
    package = pathlib.Path(__file__).parents[1]
    folders = (package / "gin", package.parent / "gin")  # In the installed package, or beside it in a checkout.
    return next(each for each in folders if each.is_dir())


def check(fine: object, expected: str, where: str, received: object) -> None:
    """Raises ValueError where what stands somewhere in a file is not fine."""
    if not fine:
        raise ValueError(f"Expected {expected} {where}. Received: {received!r}")


def from_cells(cells: Sequence[str], where: str) -> Row:
    """The row of a line of `gin/study.csv`.

    Raises:
        ValueError: for a malformed one; it says `where` that is.
    """
    check(len(cells) == _COLUMNS.count(",") + 1, "as many cells as columns", where, len(cells))
    table, row, setting, kind, recipe, bindings, baseline, *numbers = cells
    files = tuple(recipe.split("; ")) if recipe else ()
    bound = tuple(bindings.split("; ")) if bindings else ()
    check(table.isdecimal(), "the number of a table", where, table)
    check(row, "the name of a row", where, row)
    check(setting in SETTINGS, f"a setting out of {', '.join(SETTINGS)}", where, setting)
    check(kind in KINDS, f"a kind out of {', '.join(KINDS)}", where, kind)
    check(all(re.fullmatch(r"[\w/]+\.gin", file) for file in files), "gin files", where, recipe)
    check(
        bool(files) == (kind != "reference"),
        f"{'no' if kind == 'reference' else 'a'} recipe for a row of the kind {kind}",
        where,
        recipe,
    )
    check(all(re.fullmatch(r"[\w./]+ = \S.*", binding) for binding in bound), "bindings NAME = VALUE", where, bindings)
    check(len({binding.split(" = ")[0] for binding in bound}) == len(bound), "each name bound once", where, bindings)
    check(files or not bound, "no bindings without a recipe", where, bindings)
    check(kind == "ours" or not baseline, f"no baseline for a row of the kind {kind}", where, baseline)
    is_reported = kind == "reference" and numbers[3].endswith("*")
    numbers[3] = numbers[3][: len(numbers[3]) - is_reported]
    for number in numbers:
        check(re.fullmatch(r"100|\d?\d(\.\d+)?|", number), "percent numbers", where, number)
    clean, clean_spread, pgd40, robust, spread = (float(number) if number else None for number in numbers)
    paper = (clean, clean_spread, pgd40, robust, spread, is_reported)
    return Row(int(table), row, setting, kind, files, bound, baseline, *paper)


def _where(row: Row) -> str:
    return f"Table {row.table}, {row.row}, {row.setting}"
