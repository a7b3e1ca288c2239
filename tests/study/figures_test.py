"""The paper's figures, drawn from its own numbers as if they had been measured: what stands where in the axes."""

import datetime

import numpy as np
import pytest
from matplotlib import text

from robust_keras.study import drawing, figures, measured, models_by_date, rows, tables

MANIFEST = rows.read()
WITHOUT, WITH = "without additional data", "with additional data"


def compared(table, setting=None, *, only=None, shift=0.0, seeds=1, curve=(), at_chance=False):
    """Rows with what the paper has as measurements, `shift` points off; `only` names those that were measured."""
    found = []
    for row in rows.select(MANIFEST, table=table, setting=setting):
        made = [
            measured.Measured(
                seed, row.clean + shift, None, row.robust + shift + seed, at_chance, np.ones(1, bool), list(curve)
            )
            for seed in range(seeds)
            if only is None or row.row in only
        ]
        found.append(tables.StudyRow(row, tuple(made), None, None))
    return found


def series(axis):
    """Means by label and place: {label: {x: y}}."""
    found = {}
    for container in axis.containers:
        x, y = container[0].get_data()
        there = ~np.isnan(np.asarray(y, float))
        found.setdefault(container.get_label(), {}).update(
            zip(np.asarray(x)[there].tolist(), np.asarray(y)[there].tolist())
        )
    return found


def names(axis):
    return [each.get_text() for each in axis.get_xticklabels()]


def test_figure_2_goes_from_more_unlabelled_images_to_none():
    figure = figures.of_table(9, compared(9), scale="the paper's scale")
    (axis,) = figure.axes
    assert names(axis) == ["1:9", "2:8", "3:7", "4:6", "5:5", "6:4", "7:3", "8:2", "9:1", "10:0"]
    robust = [58.06, 59.13, 59.36, 59.04, 58.41, 57.19, 56.58, 53.27, 51.79]  # Table 9, from below.
    expected = dict(zip(range(1, 10), robust))
    assert series(axis) == {
        f"{WITH}: the paper": expected,
        f"{WITH}: measured": expected,
        f"{WITHOUT}: the paper": {10: 50.80},
        f"{WITHOUT}: measured": {10: 50.80},
    }
    assert axis.get_xlabel() == "labeled-to-unlabeled ratio" and axis.get_ylabel() == "robust accuracy, %"


def test_figure_3_has_clean_and_robust_panels_over_the_size():
    figure = figures.of_table(6, compared(6), scale="the paper's scale")
    panels = {(axis.get_ylabel(), axis.get_subplotspec().colspan.start): axis for axis in figure.axes}
    assert len(panels) == 4
    clean, robust = panels["clean accuracy, %", 0], panels["robust accuracy, %", 1]
    # Table 6, WRN-28, 34, 40 and 46 of width 20; WRN-28-10 has 36.5 million parameters.
    wide = series(clean)["width 20: the paper"]
    assert [wide[size] for size in sorted(wide)] == [86.87, 87.32, 86.62, 87.22]
    narrow = series(robust)["width 10: measured"]
    assert [narrow[size] for size in sorted(narrow)] == [58.41, 58.52, 59.47, 59.40]
    assert min(narrow) == pytest.approx(36.48, abs=0.01)
    assert [axis.get_title() for axis in figure.axes if axis.get_title()] == [f"(a) {WITHOUT}", f"(b) {WITH}"]


def curve(averaged):
    kept = {"val_robust_averaged": 0.5} if averaged else {}
    return [{"step": 100.0, "val_robust": 0.25, **kept}, {"step": 200.0, "val_robust": 0.5}]


def test_figure_4_has_an_axis_for_each_setting_and_a_panel_of_curves_for_each():
    figure = figures.of_table(7, compared(7, curve=curve(averaged=True)), scale="the paper's scale")
    left, right, *curves = figure.axes
    assert names(left) == ["none", "0.95", "0.9625", "0.975", "0.9875", "0.99", "0.9925", "0.995", "0.9975", "0.999"]
    without = [50.80, 50.46, 50.53, 50.65, 51.45, 51.37, 51.44, 52.10, 52.31, 52.21]  # Table 7.
    with_ = [58.41, 58.12, 58.23, 58.37, 58.33, 58.69, 58.74, 59.14, 58.19, 57.16]
    for axis, setting, robust in ((left, WITHOUT, without), (right, WITH, with_)):
        drawn = {label: {round(x): y for x, y in values.items()} for label, values in series(axis).items()}
        assert drawn == {f"{setting}: {who}": dict(enumerate(robust)) for who in ("the paper", "measured")}
        assert axis.get_ylabel() == "robust accuracy, %"
    assert right.yaxis.get_label_position() == "right"
    assert left.get_title() == f"(a) after training: left axis {WITHOUT}, right axis {WITH}"
    assert [axis.get_title() for axis in curves] == [f"(b) {s}: validation under PGD-40" for s in (WITHOUT, WITH)]
    for axis in curves:
        drawn = {line.get_label().rpartition(": ")[2]: line.get_xydata().tolist() for line in axis.lines}
        assert drawn == {
            "no averaging": [[100, 25], [200, 50]],
            "\N{GREEK SMALL LETTER TAU} = 0.995, raw weights": [[100, 25], [200, 50]],
            "\N{GREEK SMALL LETTER TAU} = 0.995, averaged weights": [[100, 50]],
        }


def test_figure_5_has_clean_and_robust_panels_over_the_activations():
    figure = figures.of_table(8, compared(8), scale="the paper's scale")
    panels = {(axis.get_ylabel(), axis.get_subplotspec().colspan.start): axis for axis in figure.axes}
    bottom = panels["robust accuracy, %", 0]
    assert names(bottom) == ["ReLU", "Swish/SiLU", "Leaky ReLU", "ELU", "Softplus", "GELU"]
    for (kind, column), numbers in {
        ("clean", 0): [84.85, 85.60, 85.21, 81.87, 83.59, 83.05],  # Table 8.
        ("robust", 0): [50.80, 51.40, 51.00, 49.20, 50.61, 50.66],
        ("clean", 1): [90.93, 91.03, 90.77, 89.13, 89.87, 91.09],
        ("robust", 1): [58.41, 59.54, 58.55, 56.48, 57.83, 59.37],
    }.items():
        drawn = series(panels[f"{kind} accuracy, %", column])
        assert {round(x): y for x, y in drawn[f"{(WITHOUT, WITH)[column]}: the paper"].items()} == dict(
            enumerate(numbers)
        )
        assert {round(x): y for x, y in drawn[f"{(WITHOUT, WITH)[column]}: measured"].items()} == dict(
            enumerate(numbers)
        )


@pytest.mark.parametrize("table", figures.NUMBERS)
def test_what_lies_far_from_the_paper_has_axes_of_its_own(table):
    far = figures.of_table(table, compared(table, only=FIRST[table], shift=-30.0), scale="mini scale")
    near = figures.of_table(table, compared(table, only=FIRST[table], shift=-1.0), scale="mini scale")
    assert len(far.axes) > len(near.axes)
    for axis in far.axes:
        assert len({label.rpartition(": ")[2] for label in series(axis)}) <= 1
    assert {axis.get_ylabel().rpartition("\n")[2] for axis in far.axes if "\n" in axis.get_ylabel()} >= {"measured"}


FIRST = {6: ("WRN-28-10", "WRN-34-20"), 7: ("no averaging", "tau=0.995"), 8: ("ReLU", "ELU"), 9: ("5:5", "3:7", "10:0")}


@pytest.mark.parametrize("table", figures.NUMBERS)
@pytest.mark.parametrize("setting", [None, *rows.SETTINGS])
def test_nothing_measured_is_the_papers_alone(table, setting):
    figure = figures.of_table(table, compared(table, setting, only=()), scale="a scale")
    assert "Nothing is measured yet" in figure.get_suptitle()
    labels = {label for axis in figure.axes for label in series(axis)}
    assert labels and all(label.endswith(": the paper") for label in labels)


def test_models_at_chance_are_told():
    said = figures.of_table(9, compared(9, only=("3:7",), seeds=2, at_chance=True), scale="a scale").get_suptitle()
    assert "2 of 2 models are at chance on clean images" in said
    assert "at chance" not in figures.of_table(9, compared(9, only=("3:7",)), scale="a scale").get_suptitle()


def test_seeds_have_a_mean_and_their_deviation():
    figure = figures.of_table(9, compared(9, only=("3:7",), seeds=3), scale="a scale")
    (axis,) = figure.axes
    (drawn,) = [each for each in axis.containers if each.get_label() == f"{WITH}: measured"]
    assert series(axis)[f"{WITH}: measured"] == {3: pytest.approx(60.36)}  # 59.36 and 0, 1 and 2 points more.
    spans = [np.ptp(part[:, 1]) for part in drawn[2][0].get_segments() if len(part) and not np.isnan(part).any()]
    assert spans == pytest.approx([2.0])  # A standard deviation of one point up and down.


def test_figure_1_has_models_by_date_and_ones_own():
    own = models_by_date.Model("mine", datetime.date(2026, 11, 29), "cifar10", 45.5, 0.5, "mine", is_own=True)
    figure = figures.by_date([*models_by_date.read(MANIFEST), own], scale="")
    (axis,) = figure.axes
    drawn = series(axis)
    assert list(drawn[f"{WITHOUT}, measured here"].values()) == [45.5]
    # Figure 1 names 59.53 and 65.87 with, and 44.04, 53.42, 53.08 and 56.43 without additional data.
    without, with_ = (
        next(each[0].get_ydata().tolist() for each in axis.containers if each.get_label() == setting)
        for setting in (WITHOUT, WITH)
    )
    assert {59.53, 65.87, 62.76, 54.92} <= set(with_) and {44.04, 53.42, 53.08, 56.43, 53.74} <= set(without)
    said = [each.get_text() for each in axis.texts]
    assert {"Madry et al.\n44.04 %", "Zhang et al. (TRADES)\n53.08 %", "mine\n45.50 %"} <= set(said)
    assert max(axis.get_xlim()) > 20_780 and axis.get_ylim()[0] == 37  # Days since 1970, up to November 2026.
    assert "9 models below 38 % are left out\nFilled: measured here" in figure.get_suptitle()


def test_no_text_lies_on_another_or_is_cut_off(tmp_path):
    own = [
        models_by_date.Model(name, datetime.date(2020, 2, 1), "80mti", 53.5, None, name, is_own=True) for name in "ab"
    ]
    figure = figures.by_date([*models_by_date.read(MANIFEST), *own], scale="a scale")
    figure.draw_without_rendering()
    (axis,) = figure.axes
    boxes = [text.Text.get_window_extent(each) for each in axis.texts]  # Without its line.
    assert len(boxes) == 8 and all(axis.bbox.contains(*box.min) and axis.bbox.contains(*box.max) for box in boxes)
    assert not any(one.overlaps(two) for k, one in enumerate(boxes) for two in boxes[:k])


def test_a_figure_is_a_picture_and_a_page(tmp_path):
    figure = figures.of_table(9, compared(9, "80mti"), scale="a scale")
    png, pdf = drawing.write(str(tmp_path / "new"), "table9", figure)
    assert png.endswith("new/table9.png") and pdf.endswith("new/table9.pdf")
    with open(png, "rb") as picture, open(pdf, "rb") as page:
        first = page.read()
        assert picture.read(4) == b"\x89PNG" and first.startswith(b"%PDF")
    drawing.write(str(tmp_path / "new"), "table9", figure)
    with open(pdf, "rb") as page:
        assert page.read() == first
