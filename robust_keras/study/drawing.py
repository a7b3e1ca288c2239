"""How the study's figures are drawn: colours, panels, marks, and the files.

What the paper has are open marks on broken lines, what was measured are filled ones on whole lines, with the standard
deviation over seeds. Where the two lie far apart, as small networks' do, they stand in axes of their own.
"""

import io
import posixpath
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from robust_keras import own_folders

# Of Okabe and Ito: they differ to the colour-blind and in shades of grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.35"
_DOTS_PER_INCH = 200
_WIDTH = 7.2  # Inches, as two columns of a page are.
FONT: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "legend.fontsize": 7,
    "figure.titlesize": 8,
    "pdf.fonttype": 42,
}

Values = Sequence[tuple[float | None, float | None]]  # Percent and its standard deviation.


class Style(NamedTuple):
    """How a series looks, in colour and without."""

    label: str
    color: str
    marker: str


SETTINGS = {
    "cifar10": Style("without additional data", BLUE, "o"),
    "80mti": Style("with additional data", ORANGE, "s"),
}


class Panel(NamedTuple):
    """Axes of what the paper has and of what was measured, mostly the same."""

    paper: Any
    measured: Any
    top: Any
    bottom: Any

    @property
    def each(self) -> tuple[Any, ...]:
        return (self.top,) if self.top is self.bottom else (self.top, self.bottom)

    def label(self, what: str, color: str = "black") -> None:
        """Names the vertical axes."""
        for axis in self.each:
            who = "" if self.top is self.bottom else "\nmeasured" if axis is self.measured else "\nthe paper's"
            axis.set_ylabel(f"{what}, %{who}", color=color)

    def twin(self) -> "Panel":
        """The same with a vertical axis of its own on the right."""
        twins = {axis: axis.twinx() for axis in self.each}
        return Panel(*(twins[axis] for axis in self))


def write(directory: str, name: str, figure: Figure) -> list[str]:
    """Writes a figure as `directory`/`name`.png, to look at, and .pdf, to print.

    Returns:
        The paths.
    """
    own_folders.make(directory)
    paths = [posixpath.join(directory, f"{name}.{form}") for form in ("png", "pdf")]
    for path in paths:
        content = io.BytesIO()
        with matplotlib.rc_context(FONT):
            if path.endswith("png"):
                figure.savefig(content, format="png", dpi=_DOTS_PER_INCH)
            else:  # Without the time, so that the same figure is the same file.
                figure.savefig(content, format="pdf", metadata={"CreationDate": None})
        with own_folders.open_file(path, "wb") as file:
            file.write(content.getvalue())
    return paths


def empty(title: str, measured: str) -> Figure:
    """A figure with a title, and a line on what was measured."""
    figure = Figure(figsize=(_WIDTH, 4.0), layout="constrained")
    figure.suptitle(f"{title}\n{textwrap.fill(measured, 115)}", parse_math=False)
    return figure


def finished(figure: Figure, height: float) -> Figure:
    """The figure in its height in inches, with one legend of all axes below them."""
    figure.set_figheight(height)
    found: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            found.setdefault(label, handle)
    is_wide = len(found) == 4 or any(len(label) > 40 for label in found)
    columns = min(len(found), 2 if is_wide else 3)
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, frameon=False)
    return figure


def errorbar(axis: Any, places: Any, values: Values, **look: Any) -> None:
    """Marks at the values that there are, with their deviations; a line joins neighbours."""
    axis.margins(x=0.08, y=0.12)
    means, spreads = (np.array([np.nan if each is None else each for each in side]) for side in zip(*values))
    axis.errorbar(places, means, spreads, capsize=2.5, **{"markersize": 4.5, "linewidth": 1.0, **look})


def panel_at(figure: Any, grid: Any, row: int, columns: Any, values: Iterable[tuple[Values, Values]]) -> Panel:
    """Axes, of which there are two, one over the other, where what was measured lies far from what the paper has.

    Args:
        figure: of matplotlib.
        grid: of it, with two lines for each row of panels.
        row: of the panel.
        columns: of the panel.
        values: of the paper and measured, a pair for each vertical axis.
    """
    ranges = [(_range(paper), _range(measured)) for paper, measured in values]
    far = [(one, other) for one, other in ranges if one and other and _are_far(one, other)]
    if not far:
        axis = figure.add_subplot(grid[2 * row : 2 * row + 2, columns])
        return Panel(axis, axis, axis, axis)
    top, bottom = (figure.add_subplot(grid[2 * row + part, columns]) for part in range(2))
    top.sharex(bottom)
    top.tick_params(labelbottom=False)
    paper, measured = far[0]
    return Panel(top, bottom, top, bottom) if paper > measured else Panel(bottom, top, top, bottom)


def _range(values: Values) -> tuple[float, float] | None:
    there = [value for value, _ in values if value is not None]
    return (min(there), max(there)) if there else None


def _are_far(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a common axis would be mostly the room between two ranges."""
    gap = max(one[0], other[0]) - min(one[1], other[1])
    return gap > 2 * max(one[1] - one[0], other[1] - other[0], 2.0)
