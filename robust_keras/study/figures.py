"""The paper's figures of its tables, with what was measured beside its numbers."""

import io
import posixpath
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_keras import own_folders
from robust_keras.study import tables

# Figures of the paper that show a table.
FIGURES = {6: "Figure 3", 7: "Figure 4", 8: "Figure 5", 9: "Figure 2"}


def write(directory: str, table: int, rows: Sequence[tables.StudyRow], *, scale: str) -> list[str]:
    """Draws a table of the study, where the paper has a figure of it.

    Args:
        directory: where to; any `tf.io.gfile` path.
        table: its number.
        rows: `tables.StudyRow`s.
        scale: a description of what was measured, for the title.

    Returns:
        The paths; none for a table without a figure.
    """
    if table not in FIGURES:
        return []
    path = posixpath.join(directory, f"table{table}.png")
    own_folders.make(directory)
    with own_folders.open_file(path, "wb") as file:
        title = f"{FIGURES[table]} (Table {table}. Measured at {scale})"
        file.write(_plot(rows, title, curves=table == 7))
    return [path]


def _plot(rows: Sequence[tables.StudyRow], title: str, *, curves: bool) -> bytes:
    """A PNG file's bytes: robust accuracies of the paper and measured, and where asked for, validation curves."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys(each.row.setting for each in rows))
    figure = Figure(figsize=(7 * (len(settings) + curves), 5))
    axes = figure.subplots(1, len(settings) + curves, squeeze=False)
    for axis, setting in zip(axes[0], settings):
        _plot_accuracies(axis, [each for each in rows if each.row.setting == setting])
        axis.set_title(setting)
    if curves:
        _plot_curves(axes[0][-1], rows)
    figure.suptitle(textwrap.fill(title, 80 * axes.size), fontsize="medium")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _plot_accuracies(axis: Any, rows: Sequence[tables.StudyRow]) -> None:
    positions = range(len(rows))
    axis.plot(positions, [each.row.robust for each in rows], "o--", color="0.6", label="paper")
    for position, each in zip(positions, rows):
        mean, deviation = tables.mean_of(each.measured, "robust")
        if mean is not None:
            axis.errorbar(position, mean, deviation or 0.0, fmt="s", color="C0", capsize=3)
    axis.plot([], [], "s", color="C0", label="measured, with the deviation of seeds")
    axis.set_xticks(positions, [each.row.row for each in rows], rotation=45, ha="right")
    axis.set_ylabel("robust accuracy, %")
    axis.legend()


def _plot_curves(axis: Any, rows: Sequence[tables.StudyRow]) -> None:
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
