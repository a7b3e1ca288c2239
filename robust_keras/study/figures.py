"""The paper's Figures 1 to 5: its numbers, and beside them what was measured.

figure = of_table(7, compared, scale="mini scale")  # Figure 4
paths = drawing.write(folder, "table7", figure)
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import dates, patheffects, ticker
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from robust_keras.study import costs, drawing, models_by_date, tables

NOTHING = "Nothing is measured yet"
# What a table of the paper is drawn as.
NUMBERS = {6: 3, 7: 4, 8: 5, 9: 2}
# The decay that the paper ends up with (section 5), whose curve its Figure 4b is taken to show.
_DECAY = 0.995
# Of a name, from its mark: points, and in which direction to the right and up.
_PLACES = [
    (distance, right, up)
    for distance in (5, 9, 14, 20, 28, 38, 50)
    for right, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
]
_WIDTHS = {
    10: drawing.Style("width 10", drawing.BLUE, "o"),
    15: drawing.Style("width 15", drawing.ORANGE, "s"),
    20: drawing.Style("width 20", drawing.GREEN, "^"),
}


def of_table(table: int, rows: Sequence[tables.StudyRow], *, scale: str) -> Figure:
    """The figure that the paper has of a table.

    Args:
        table: a key of `NUMBERS`.
        rows: of the table, any of them, measured or not.
        scale: a description of what was measured, for the title.

    Returns:
        A figure of matplotlib that is of no window.
    """
    draw: dict[int, Callable[..., float]] = {6: _by_size, 7: _by_decay, 8: _by_activation, 9: _by_ratio}
    models = [model for each in rows for model in each.measured]
    measured = f"Measured at {scale}" if models else NOTHING
    if at_chance := sum(model.is_at_chance for model in models):
        measured += f"; {at_chance} of {len(models)} models are at chance on clean images"
    with matplotlib.rc_context(drawing.FONT):
        figure = drawing.empty(f"Figure {NUMBERS[table]} of the paper, Table {table}", measured)
        height = draw[table](figure, rows)
        return drawing.finished(figure, height)


def by_date(models: Sequence[models_by_date.Model], *, scale: str) -> Figure:
    """Figure 1: robust accuracies of models by date of publication, and one's own.

    Args:
        models: any order.
        scale: a description of how the study was measured, for the title; '' where nothing is of the study.

    Returns:
        A figure of matplotlib that is of no window.
    """
    own = [each for each in models if each.is_own]
    lowest = min([40.0, *(each.robust - (each.spread or 0.0) for each in own)]) - 2
    shown, below = [each for each in models if each.robust >= lowest], sum(each.robust < lowest for each in models)
    here = f"Filled: measured here, the study at {scale}" if scale else "Filled: measured here"
    measured = here if own else NOTHING
    left_out = f"; {below} models below {lowest:.0f} % are left out" if below else ""
    with matplotlib.rc_context(drawing.FONT):
        figure = drawing.empty(f"Figure 1 of the paper: CIFAR-10, Linf 8/255, AutoAttack or AA+MT{left_out}", measured)
        axis = figure.subplots()
        for setting, style in (*drawing.SETTINGS.items(), (None, drawing.Style("data not told", drawing.GREY, "D"))):
            for is_own in (False, True):
                group = [each for each in shown if (each.setting, each.is_own) == (setting, is_own)]
                _dated(axis, group, style, is_own)
        axis.margins(x=0.06, y=0.12)
        axis.set_ylim(bottom=lowest - 1)
        years = max(each.date.year for each in shown) - min(each.date.year for each in shown)
        axis.xaxis.set_major_locator(dates.YearLocator(1 + years // 12))
        axis.xaxis.set_major_formatter(dates.DateFormatter("%Y"))
        axis.set_xlabel("date of publication, or of the measurement here")
        axis.set_ylabel("robust accuracy, %")
        axis.grid(alpha=0.25)
        finished = drawing.finished(figure, 4.4)
        _place_labels(finished, axis, shown)
        return finished


def _by_ratio(figure: Figure, rows: Sequence[tables.StudyRow]) -> float:
    """Figure 2: robust accuracy by the share of labelled images in a batch, from 1:9 up to all of them, 10:0."""
    shares = {each.row.row: int(each.row.row.partition(":")[0]) for each in rows}
    panel = drawing.panel_at(
        figure, figure.add_gridspec(2, 1), 0, slice(None), [(_paper(rows, "robust"), _measured(rows, "robust"))]
    )
    for setting, style, own in _by_setting(rows):
        own = sorted(own, key=lambda each: shares[each.row.row])
        _both(panel, [shares[each.row.row] for each in own], own, "robust", style)
        if setting == "cifar10":
            _levels(panel, own, "robust", style.color)
    for axis in panel.each:
        axis.grid(alpha=0.25)
    panel.bottom.set_xticks(sorted(shares.values()), sorted(shares, key=lambda name: shares[name]))
    panel.bottom.set_xlabel("labeled-to-unlabeled ratio")
    panel.label("robust accuracy")
    return 3.4 if panel.top is panel.bottom else 5.0


def _by_size(figure: Figure, rows: Sequence[tables.StudyRow]) -> float:
    """Figure 3: clean and robust accuracy by the number of parameters, a line a width, for each setting."""

    networks = {each.row.row: tuple(map(int, re.findall(r"\d+", each.row.row))) for each in rows}
    sizes = {name: costs.num_parameters(*network) / 1e6 for name, network in networks.items()}

    def draw(panel: drawing.Panel, own: Sequence[tables.StudyRow], kind: str) -> None:
        for width, style in _WIDTHS.items():
            line = [each for each in own if networks[each.row.row][1] == width]
            line.sort(key=lambda each: sizes[each.row.row])
            _both(panel, [sizes[each.row.row] for each in line], line, kind, style)
            for each, (value, _) in zip(line, _paper(line, kind)):
                depth = str(networks[each.row.row][0])
                panel.paper.annotate(
                    depth,
                    (sizes[each.row.row], value),
                    (5, -7),
                    textcoords="offset points",
                    fontsize=6,
                    color=style.color,
                    path_effects=[patheffects.withStroke(linewidth=1.5, foreground="white")],
                )
        panel.bottom.set_xscale("log")
        ticks = (40, 60, 100, 150, 250)
        panel.bottom.set_xticks(ticks, map(str, ticks))
        panel.bottom.minorticks_off()
        panel.bottom.set_xlabel("millions of parameters (at a mark: depth)")

    return _clean_and_robust(figure, rows, draw)


def _by_activation(figure: Figure, rows: Sequence[tables.StudyRow]) -> float:
    """Figure 5: clean and robust accuracy of each activation function, for each setting."""
    names = list(dict.fromkeys(each.row.row for each in rows))

    def draw(panel: drawing.Panel, own: Sequence[tables.StudyRow], kind: str) -> None:
        style = drawing.SETTINGS[own[0].row.setting]
        places = np.array([names.index(each.row.row) for each in own])
        _series(panel.paper, places - 0.12, _paper(own, kind), style, measured=False, line=False)
        _series(panel.measured, places + 0.12, _measured(own, kind), style, measured=True, line=False)
        _levels(panel, [each for each in own if each.row.kind == "baseline"], kind, style.color)
        panel.bottom.set_xlim(-0.5, len(names) - 0.5)
        panel.bottom.set_xticks(range(len(names)), names, rotation=30, ha="right", rotation_mode="anchor")

    return _clean_and_robust(figure, rows, draw)


def _clean_and_robust(figure: Figure, rows: Sequence[tables.StudyRow], draw: Callable[..., None]) -> float:
    """A column for each setting, with a panel of the clean accuracies over one of the robust ones."""
    settings = _by_setting(rows)
    grid = figure.add_gridspec(4, len(settings))
    are_split = False
    for column, (_, style, own) in enumerate(settings):
        for line, kind in enumerate(("clean", "robust")):
            panel = drawing.panel_at(figure, grid, line, column, [(_paper(own, kind), _measured(own, kind))])
            draw(panel, own, kind)
            for axis in panel.each:
                axis.grid(alpha=0.25)
            panel.label(f"{kind} accuracy")
            if line == 0:
                panel.top.set_title(f"({'ab'[column]}) {style.label}" if len(settings) > 1 else style.label)
                panel.bottom.set_xlabel("")
                panel.bottom.tick_params(labelbottom=False)
            are_split |= panel.top is not panel.bottom
    return 7.5 if are_split else 5.2


def _by_decay(figure: Figure, rows: Sequence[tables.StudyRow]) -> float:
    """Figure 4: a, robust accuracy by the decay of averaging, of each setting on an axis of its own; b, the curves."""
    settings = _by_setting(rows)
    has_curves = any(measured.curve for each in rows for measured in each.measured)
    grid = figure.add_gridspec(4 if has_curves else 2, len(settings))
    names = sorted({each.row.row for each in rows}, key=lambda name: float(_decay(name) or 0))
    left = drawing.panel_at(
        figure, grid, 0, slice(None), [(_paper(own, "robust"), _measured(own, "robust")) for *_, own in settings]
    )
    panels = [left, left.twin()] if len(settings) > 1 else [left]
    for panel, shift, (_, style, own) in zip(panels, (-0.08, 0.08), settings):
        for is_baseline in (True, False):
            line = [each for each in own if (each.row.kind == "baseline") == is_baseline]
            # Beside each other, since marks of one axis could hide those of the other.
            places = [names.index(each.row.row) + shift for each in line]
            _both(panel, places, line, "robust", style)
        _levels(panel, [each for each in own if each.row.kind == "baseline"], "robust", style.color)
        panel.label("robust accuracy", style.color)
        for axis in panel.each:
            axis.tick_params(axis="y", labelcolor=style.color)
    sides = [style.label for _, style, _ in settings]
    told = f"left axis {sides[0]}, right axis {sides[1]}" if sides[1:] else sides[0]
    left.top.set_title(f"(a) after training: {told}")
    left.bottom.set_xticks(range(len(names)), [_decay(name) or "none" for name in names])
    left.bottom.set_xlabel("decay rate of the averaged weights, \N{GREEK SMALL LETTER TAU}")
    for column, (_, style, own) in enumerate(settings if has_curves else ()):
        axis = figure.add_subplot(grid[2:, column])
        _curves(axis, own, style)
        axis.set_title(f"(b) {style.label}: validation under PGD-40")
    return (3.4 if left.top is left.bottom else 5.0) + 2.4 * has_curves


def _curves(axis: Any, rows: Sequence[tables.StudyRow], style: drawing.Style) -> None:
    """Robust accuracy in the course of training, without averaging and with it, mean and range of the seeds."""

    kept = "val_robust_averaged"
    has_kept = {each.row.row: any(kept in at for one in each.measured for at in one.curve) for each in rows}
    averaged = [each for each in rows if _decay(each.row.row) and has_kept[each.row.row]]
    lines = [(each, "val_robust", "no averaging", drawing.GREY, ":") for each in rows if each.row.kind == "baseline"]
    if averaged:
        row = min(averaged, key=lambda each: abs(float(_decay(each.row.row)) - _DECAY))
        name = f"\N{GREEK SMALL LETTER TAU} = {_decay(row.row.row)}"
        for column, which, line in (("val_robust", "raw", "--"), (kept, "averaged", "-")):
            lines.append((row, column, f"{style.label}: {name}, {which} weights", style.color, line))
    for each, column, label, color, line in lines:
        curves = [{at["step"]: 100 * at[column] for at in one.curve if column in at} for one in each.measured]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        steps = sorted(set.intersection(*map(set, curves)))
        values = np.array([[curve[step] for step in steps] for curve in curves])
        axis.plot(steps, values.mean(axis=0), line, color=color, label=label, linewidth=1.2)
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=color, alpha=0.15, linewidth=0)
    if not axis.lines:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center")
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("training step")
    axis.set_ylabel("robust accuracy, %")


def _by_setting(rows: Sequence[tables.StudyRow]) -> list[tuple[str, drawing.Style, list[tables.StudyRow]]]:
    """The settings that rows have, without additional data first, each with its rows."""
    rows_of = {setting: [each for each in rows if each.row.setting == setting] for setting in drawing.SETTINGS}
    return [(setting, drawing.SETTINGS[setting], own) for setting, own in rows_of.items() if own]


def _both(
    panel: drawing.Panel, places: Sequence[float], rows: Sequence[tables.StudyRow], kind: str, style: drawing.Style
) -> None:
    _series(panel.paper, places, _paper(rows, kind), style, measured=False)
    _series(panel.measured, places, _measured(rows, kind), style, measured=True)


def _series(
    axis: Any, places: Any, values: drawing.Values, style: drawing.Style, *, measured: bool, line: bool = True
) -> None:
    """Marks at the values that there are; a line joins neighbours."""
    if not any(value is not None for value, _ in values):
        return
    label = f"{style.label}: {'measured' if measured else 'the paper'}"
    # The open marks are larger, so that equal ones are seen in each other.
    look: dict[str, Any] = {"markerfacecolor": "white", "markersize": 6.5, "zorder": 2.5}
    if measured:
        look = {"markersize": 3.5, "zorder": 3}
    linestyle = ("-" if measured else "--") if line else "none"
    drawing.errorbar(
        axis, places, values, label=label, color=style.color, marker=style.marker, linestyle=linestyle, **look
    )


def _levels(panel: drawing.Panel, rows: Sequence[tables.StudyRow], kind: str, color: str) -> None:
    """Thin lines at the baseline's accuracy, the paper's and the measured one."""
    for axis, values, line in ((panel.paper, _paper(rows, kind), "--"), (panel.measured, _measured(rows, kind), "-")):
        for value, _ in values:
            if value is not None:
                axis.axhline(value, color=color, linestyle=line, linewidth=0.6, alpha=0.6, zorder=1)


def _paper(rows: Iterable[tables.StudyRow], kind: str) -> drawing.Values:
    return [(getattr(each.row, kind), getattr(each.row, f"{kind}_spread")) for each in rows]


def _measured(rows: Iterable[tables.StudyRow], kind: str) -> drawing.Values:
    return [tables.mean_of(each.measured, kind) for each in rows]


def _decay(name: str) -> str:
    """The decay rate in the name of a row of Table 7; '' where it averages nothing."""
    return name.partition("=")[2]


def _dated(axis: Any, models: Sequence[models_by_date.Model], style: drawing.Style, is_own: bool) -> None:
    if not models:
        return
    label = f"{style.label}, measured here" if is_own else style.label
    look: dict[str, Any] = {"markersize": 6.5} if is_own else {"markerfacecolor": "white"}
    look |= {"label": label, "color": style.color, "marker": style.marker, "linestyle": "none"}
    values = [(each.robust, each.spread) for each in models]
    drawing.errorbar(axis, [each.date for each in models], values, **look)


def _place_labels(figure: Figure, axis: Any, models: Sequence[models_by_date.Model]) -> None:
    """Names models beside their marks, where there is room: on no mark, no other name, and within the axes."""
    figure.draw_without_rendering()
    marks = axis.transData.transform([(dates.date2num(each.date), each.robust) for each in models])
    taken, room = [Bbox.from_extents(x - 6, y - 6, x + 6, y + 6) for x, y in marks], axis.bbox
    for each, (x, y) in zip(models, marks):
        if not each.label:
            continue
        text = f"{each.label}\n{each.robust:.2f} %"
        measured = figure.text(0, 0, text, parse_math=False, fontsize=7, linespacing=1)
        size = measured.get_window_extent().size
        measured.remove()
        for distance, right, up in _PLACES:
            # A name lies beside the end of its line, or above or below it.
            left = x + distance * right * figure.dpi / 72 - size[0] * (1 - right) / 2
            low = y + distance * up * figure.dpi / 72 - size[1] * (1 - up) / 2
            box = Bbox.from_bounds(left, low, *size)
            is_inside = room.x0 <= box.x0 and box.x1 <= room.x1 and room.y0 <= box.y0 and box.y1 <= room.y1
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                axis.annotate(
                    text,
                    (each.date, each.robust),
                    (distance * right, distance * up),
                    textcoords="offset points",
                    ha={-1: "right", 0: "center", 1: "left"}[right],
                    va={-1: "top", 0: "center", 1: "bottom"}[up],
                    parse_math=False,
                    fontsize=7,
                    linespacing=1,
                    multialignment="center",
                    arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": drawing.GREY} if distance > 8 else None,
                )
                break
