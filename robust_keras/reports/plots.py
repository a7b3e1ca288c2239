"""Plots as SVG that stands in a page: its text is the page's, its colours are variables of the page's style.

So one plot is readable in the dark and in the light, and a reader's machine is asked for nothing. Lines differ in their
strokes and markers, not in their colours alone.
"""

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from robust_keras.reports import contents
from robust_keras.shown_text import printable

# What is drawn in which colour, and what stands in its place in the page.
_INK, _GRID = "#010101", "#010102"
CLEAN, ROBUST, LOST, OTHER = "#010103", "#010104", "#010105", "#010106"
_VARIABLES = {
    _INK: "currentColor",
    _GRID: "var(--grid)",
    CLEAN: "var(--clean)",
    ROBUST: "var(--robust)",
    LOST: "var(--lost)",
    OTHER: "var(--other)",
}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robust_keras",
    "text.parse_math": False,  # A name may have dollars in it.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 13,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_WIDTH = 6.0  # Inches, which a page shows in 36 em at most.
MOST_NAME = 22  # Letters of a name beside an axis.
_MOST_POINTS = 400
_drawing = threading.Lock()  # matplotlib's style is one for all threads.


def learning_curves(run: contents.Run) -> str:
    """Validation accuracies, clean and robust, of the raw and the averaged weights, with the best step marked."""
    with _figure(3.6) as (figure, text):
        axes = figure.subplots()
        for name, label, color, line, marker in (
            ("val_clean_averaged", "clean, averaged weights", CLEAN, "-", "o"),
            ("val_clean", "clean", CLEAN, "--", "v"),
            ("val_robust_averaged", "robust, averaged weights", ROBUST, "-", "s"),
            ("val_robust", "robust", ROBUST, "--", "D"),
        ):
            there = np.isfinite(run.curve[name])
            if there.any():
                step, value = _thinned(run.curve["step"][there], 100 * run.curve[name][there])
                every = max(len(step) // 12, 1)
                axes.plot(step, value, line, color=color, marker=marker, ms=6, markevery=every, label=label)
        if run.best_step is not None:
            axes.axvline(run.best_step, color=_INK, lw=1, ls=":", label=f"best, step {run.best_step:,}")
        axes.set_ylim(0, 100)
        axes.set_xlabel("step")
        axes.set_ylabel("right, %")
        _legend(axes)
    return text()


def loss_and_rate(run: contents.Run) -> str:
    """The training loss and, below it, the learning rate against the step."""
    with _figure(3.6) as (figure, text):
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        for axes, name, _label, color in (
            (upper, "loss", "loss", LOST),
            (lower, "learning_rate", "learning rate", OTHER),
        ):
            there = np.isfinite(run.curve[name])
            axes.plot(*_thinned(run.curve["step"][there], run.curve[name][there]), color=color)
            axes.set_ylabel(name.replace("_", " "))
        lower.set_ylim(bottom=0)
        lower.set_xlabel("step")
    return text()


def waterfall(names: Sequence[str], left: Sequence[float], interval: Sequence[float]) -> str:
    """Bars of what each step takes away, and of what is left at the end, with its interval.

    Args:
        names: of the steps.
        left: in percent, what is left after each; all before the first is 100.
        interval: (low, high) of the last, in percent.
    """
    names = [*names, "still right"]
    with _figure(0.9 + 0.42 * len(names)) as (figure, text):
        axes = figure.subplots()
        before = 100.0
        for row, share in enumerate(left):
            axes.barh(row, before - share, left=share, color=LOST, height=0.6)
            sign = "\N{MINUS SIGN}" if before - share > 0.05 else ""
            axes.text(before + 1.5, row, f"{sign}{before - share:.1f}", va="center")
            before = share
        axes.barh(len(left), before, color=ROBUST, height=0.6)
        low, high = interval
        reach = [[max(before - low, 0.0)], [max(high - before, 0.0)]]
        axes.errorbar(before, len(left), xerr=reach, fmt="none", color=_INK, capsize=4)
        axes.text(max(high, before) + 1.5, len(left), f"{before:.1f}", va="center")
        _rows(axes, names)
        axes.set_xlim(0, 115)  # With room for what is written beside a bar.
        axes.set_xticks(range(0, 101, 20))
    return text()


def security_curve(found: dict[str, Any], radius: float) -> str:
    """Robust accuracy against the radius, under the attack and under random noise; the evaluated radius is marked."""
    scale, unit = (255, " / 255") if found["norm"] == "Linf" else (1, "")
    with _figure(3.4) as (figure, text):
        axes = figure.subplots()
        for points, label, color, line, marker in (
            (found["curve"], "attack", ROBUST, "-", "s"),
            (found["random_noise"], "random noise", OTHER, "--", "^"),
        ):
            if points:
                x, y = [scale * p["epsilon"] for p in points], [100 * p["robust_accuracy"] for p in points]
                axes.plot(x, y, line, color=color, marker=marker, ms=5, label=label)
        axes.axvline(scale * radius, color=_INK, lw=1, ls=":", label="radius of the evaluation")
        axes.set_ylim(0, 103)
        axes.set_xlim(left=0)
        axes.set_xlabel(printable(f"radius, {found['norm']}{unit}"))
        axes.set_ylabel("right, %")
        _legend(axes)
    return text()


def by_row(names: Sequence[str], clean: Sequence[float], robust: Sequence[float], intervals: Sequence) -> str:
    """A line a class, or model: its clean and its robust accuracy, the latter with its interval; all in percent."""
    with _figure(1.2 + 0.32 * len(names)) as (figure, text):
        axes = figure.subplots()
        rows = np.arange(len(names))
        axes.hlines(rows, robust, clean, color=_GRID, lw=3)
        reach = np.maximum([[r - low, high - r] for r, (low, high) in zip(robust, intervals)], 0).T
        axes.errorbar(robust, rows, xerr=reach, fmt="none", ecolor=ROBUST, capsize=3)
        axes.plot(robust, rows, "s", color=ROBUST, ms=7, clip_on=False, label="robust, with its 95 % interval")
        axes.plot(clean, rows, "o", color=CLEAN, ms=7, clip_on=False, label="clean")
        _rows(axes, names)
        _legend(axes)
    return text()


def margins(of: dict[str, np.ndarray]) -> str:
    """Histograms of margins on clean images, one on the other.

    Args:
        of: margins by what became of their images, at most three kinds.
    """
    kept = {label: values for label, values in of.items() if len(values)}
    with _figure(3.4) as (figure, text):
        axes = figure.subplots()
        every = np.concatenate(list(kept.values()))
        edges = np.histogram_bin_edges(every, bins=30)
        axes.hist(
            list(kept.values()),
            bins=edges.tolist(),
            stacked=True,
            color=[color for color, label in zip((ROBUST, LOST, OTHER), of) if label in kept],
            hatch=[hatch for hatch, label in zip(("", "//", ".."), of) if label in kept],
            edgecolor=_INK,
            linewidth=0.5,
            label=list(kept),
        )
        axes.axvline(0, color=_INK, lw=1, ls=":")
        axes.set_xlabel("margin of the clean image, in logits")
        axes.set_ylabel("images")
        _legend(axes)
    return text()


@contextlib.contextmanager
def _figure(height: float) -> Iterator:
    """A figure to draw in, and what then returns its SVG."""
    made: list[str] = []
    with _drawing, matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Letters that this machine has not, and a reader's may.
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        yield figure, lambda: made[0]
        made.append(_svg(figure))


def _svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    _, tag, drawn = file.getvalue().partition("<svg ")
    svg = re.sub(r"<metadata>.*?</metadata>", "", tag + drawn, flags=re.S)
    svg = svg.replace("'DejaVu Sans'", "system-ui").replace("xlink:href", "href")
    return re.sub("|".join(_VARIABLES), lambda match: _VARIABLES[match[0]], svg).strip()


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names the rows, the first one on top, and gives the other axis percent."""
    axes.set_yticks(range(len(names)), [printable(name, most=MOST_NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("right, %")
    axes.grid(visible=False, axis="y")


def _legend(axes: Axes) -> None:
    """Above the plot, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderaxespad=0)


def _thinned(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many points as a page can show, each the mean of those that follow each other."""
    pieces = min(len(step), _MOST_POINTS)
    if pieces == len(step):
        return step, value
    cuts = np.linspace(0, len(step), pieces + 1).astype(int)[:-1]
    sizes = np.diff([*cuts, len(step)])
    return np.add.reduceat(step, cuts) / sizes, np.add.reduceat(value, cuts) / sizes
