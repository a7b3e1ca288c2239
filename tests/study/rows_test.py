"""The manifest of the study: the paper's numbers, every row once, and what is compared with what."""

import csv
import pathlib
import re

import pytest

from robust_keras.study import rows as study

ROOT = pathlib.Path(__file__).parents[2]
PAPER_TEXT = ROOT.parent / "shared" / "reference" / "gowal2020_uncovering_the_limits.txt"
ROWS = study.read()

# Typed from Gowal et al. 2020. Columns: row | cifar10 | 80mti, each clean, PGD-40 in Tables 2 and 5, robust.
BASELINE = "84.85±1.20 50.80±0.23 | 90.93±0.25 58.41±0.25"
PAPER = {
    1: f"""
        AT     | {BASELINE}
        TRADES | 82.74 51.91 | 88.36 59.45
        MART   | 80.51 51.93 | 90.45 58.25""",
    2: """
        AT-XENT       | 84.85 53.87 50.80 | 90.93 61.46 58.41
        AT-KL         | 88.21 50.67 48.53 | 91.86 59.49 56.89
        AT-MARGIN     | 85.12 54.72 48.79 | 90.01 61.53 55.18
        TRADES-XENT   | 83.01 54.19 52.76 | 89.12 61.25 58.98
        TRADES-KL     | 82.74 53.85 51.91 | 88.36 61.11 59.45
        TRADES-MARGIN | 81.60 54.47 51.28 | 86.88 61.37 57.82""",
    3: f"""
        AT eps=8/255     | {BASELINE}
        AT eps=8.8/255   | 82.13 51.65 | 90.16 58.72
        AT eps=9.6/255   | 83.60 51.81 | 89.39 58.77
        TRADES eps=8/255 | 82.74 51.91 | 88.36 59.45""",
    4: """
        500K (Carmon et al., 2019) | | 90.93 58.41
        200K (regenerated)         | | 90.95 57.29
        500K (regenerated)         | | 90.68 59.12
        1M (regenerated)           | | 91.00 58.89""",
    5: """
        Pang et al. (2020) (WRN-34-20)        | 85.14 - 53.74     |
        Ours (WRN-70-16)                      | 84.33 58.04 56.43 | 91.10 67.16 65.87
        Ours (WRN-34-20)                      | 84.56 57.45 56.04 |
        Engstrom et al. (2019) (ResNet-50)    | 90.83 - 69.24     |
        Ours (WRN-70-16, L2)                  | 89.37 74.89 73.57 | 94.74 82.19 80.45
        Rice et al. (2020) (ResNet-18)        | 53.83 - 18.95     |
        Ours (WRN-70-16, CIFAR-100)           | 61.01 31.47 30.54 | 69.15 38.97 37.70
        Carmon et al. (2019) (WRN-28-10)      |                   | 89.69 - 59.47
        Ours (data from Carmon et al., 2019)  |                   | 90.95 66.70 65.06
        Ours (WRN-28-10)                      |                   | 89.48 64.08 62.76
        Augustin et al. (2020) (ResNet-50)    |                   | 91.08 - 72.91
        Hendrycks et al. (2019) (ResNet-18)   |                   | 59.23 - 28.42""",
    6: f"""
        WRN-28-10 | {BASELINE}
        WRN-28-15 | 86.91 51.79 | 91.71 59.81
        WRN-28-20 | 86.87 51.78 | 91.63 59.90
        WRN-34-10 | 86.42 51.18 | 91.45 58.52
        WRN-34-15 | 86.40 51.12 | 91.84 59.61
        WRN-34-20 | 87.32 52.91 | 92.14 60.90
        WRN-40-10 | 86.27 51.89 | 91.47 59.47
        WRN-40-15 | 86.94 52.18 | 91.66 60.44
        WRN-40-20 | 86.62 53.19 | 91.98 60.97
        WRN-46-10 | 85.98 52.02 | 91.71 59.40
        WRN-46-15 | 86.73 52.74 | 91.78 60.56
        WRN-46-20 | 87.22 53.24 | 92.08 61.14""",
    7: f"""
        no averaging | {BASELINE}
        tau=0.95     | 85.48 50.46 | 91.07 58.12
        tau=0.9625   | 85.80 50.53 | 91.28 58.23
        tau=0.975    | 86.34 50.65 | 91.03 58.37
        tau=0.9875   | 83.47 51.45 | 91.09 58.33
        tau=0.99     | 83.41 51.37 | 91.51 58.69
        tau=0.9925   | 86.08 51.44 | 91.23 58.74
        tau=0.995    | 84.41 52.10 | 90.28 59.14
        tau=0.9975   | 84.91 52.31 | 91.28 58.19
        tau=0.999    | 84.62 52.21 | 91.66 57.16""",
    8: f"""
        ReLU       | {BASELINE}
        Swish/SiLU | 85.60 51.40 | 91.03 59.54
        Leaky ReLU | 85.21 51.00 | 90.77 58.55
        ELU        | 81.87 49.20 | 89.13 56.48
        Softplus   | 83.59 50.61 | 89.87 57.83
        GELU       | 83.05 50.66 | 91.09 59.37""",
    9: """
        10:0 | 84.85±1.20 50.80±0.23 |
        9:1  | | 88.60 51.79
        8:2  | | 86.74 53.27
        7:3  | | 90.37 56.58
        6:4  | | 90.85 57.19
        5:5  | | 90.93±0.25 58.41±0.25
        4:6  | | 91.06 59.04
        3:7  | | 90.99 59.36
        2:8  | | 90.69 59.13
        1:9  | | 90.57 58.06""",
    10: f"""
        Multistep   | {BASELINE}
        Cosine      | 83.90 47.49 | 91.28 57.87
        Exponential | 83.39 47.73 | 91.08 56.56""",
}


def expected_numbers(table):
    """`{(row, setting): (clean, clean_spread, pgd40, robust, robust_spread)}`."""
    numbers = {}
    for line in PAPER[table].strip().splitlines():
        row, *cells = (cell.strip() for cell in line.split("|"))
        for setting, cell in zip(("cifar10", "80mti"), cells, strict=True):
            if cell:
                values = [[*map(float, value.split("±")), None] if value != "-" else [None] for value in cell.split()]
                clean, *pgd40, robust = values
                numbers[row, setting] = (*clean[:2], pgd40[0][0] if pgd40 else None, *robust[:2])
    return numbers


def one(table, row, setting="cifar10"):
    (found,) = study.select(ROWS, table=table, row=row, setting=setting)
    return found


def test_the_tables_are_the_papers():
    assert {row.table for row in ROWS} == set(PAPER)


@pytest.mark.parametrize("table", PAPER)
def test_every_row_and_its_numbers_are_the_papers_and_none_is_beyond(table):
    rows = study.select(ROWS, table=table)
    assert {(row.row, row.setting): row[7:12] for row in rows} == expected_numbers(table)
    assert len(rows) == len(expected_numbers(table))  # Names are unique in a table and setting.


@pytest.mark.skipif(not PAPER_TEXT.exists(), reason="the paper's text is not beside this checkout")
@pytest.mark.parametrize("table", PAPER)
def test_the_numbers_stand_in_the_papers_text_in_this_order(table):
    # A table ends where the next one or the discussion of its results begins.
    text = re.split(rf"^\s*Table {table}: ", PAPER_TEXT.read_text(), flags=re.M)[1]
    text = re.split(r"^\s*(?:Table \d+: |Results\.)", text, flags=re.M)[0]
    with (ROOT / "gin" / "study.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] == str(table)]
    columns = ("clean", "clean_spread", "pgd40", "robust", "robust_spread")
    typed = [line[column] for line in lines for column in columns if line[column]]
    found = re.findall(r"(\d+\.\d\d)(?=[±%])%?(\*?)", text)
    assert typed == [number + asterisk for number, asterisk in found]


def test_what_others_reported_is_marked():
    # Table 5's asterisks: computed by an attack similar in strength, which the paper did not run.
    reported = [row for row in ROWS if row.is_reported]
    assert {row.row.split(" ")[0] for row in reported} == {"Pang", "Engstrom", "Rice", "Augustin", "Hendrycks"}
    assert len(reported) == 5 and {row.kind for row in reported} == {"reference"}
    assert not one(5, "Carmon et al. (2019) (WRN-28-10)", "80mti").is_reported


def test_what_is_a_baseline_what_ours_and_what_others():
    baselines = ["AT", "AT-XENT", "AT eps=8/255", "500K (Carmon et al., 2019)", "WRN-28-10", "no averaging", "ReLU"]
    baselines += ["10:0", "5:5", "Multistep"]
    assert list(dict.fromkeys(row.row for row in ROWS if row.kind == "baseline")) == baselines
    assert {row.kind for row in ROWS} == set(study.KINDS)
    for row in ROWS:
        assert (row.kind == "reference") == (row.table == 5 and not row.row.startswith("Ours")), row
        assert row.runnable == (row.kind != "reference"), row


def test_every_row_of_ours_has_a_baseline_that_can_be_run_in_its_setting():
    for row in ROWS:
        baseline = study.baseline_of(ROWS, row)
        other_threat_or_data = row.table == 5 and ("L2" in row.row or "CIFAR-100" in row.row)
        if row.kind != "ours" or other_threat_or_data:
            assert baseline is None, row
        else:
            assert baseline.kind == "baseline" and baseline.runnable and baseline.setting == row.setting, row
            assert baseline.table == (1 if row.table == 5 else row.table), row


def test_a_baseline_is_looked_for_in_its_own_table_first():
    confusing = one(5, "Ours (WRN-28-10)", "80mti")._replace(row="5")
    assert study.baseline_of([confusing, *ROWS], one(9, "3:7", "80mti")) == one(9, "5:5", "80mti")
    assert study.baseline_of(ROWS, one(5, "Ours (WRN-34-20)")) == one(1, "AT")
    assert study.baseline_of(ROWS, one(1, "AT")) is None
    with pytest.raises(ValueError, match=r"Expected .* baseline of Table 9, 3:7, 80mti\. Received: '5:5'"):
        study.baseline_of([row for row in ROWS if row.row != "5:5"], one(9, "3:7", "80mti"))


def test_settings_differ_in_the_recipe_alone():
    by_row = {}
    for row in ROWS:
        if row.runnable and row.table != 5:
            assert row.files[0].endswith("_80mti.gin") == (row.setting == "80mti")
            by_row.setdefault((row.table, row.row), set()).add(
                (row.files[0].replace("_80mti", ""), row.bindings, row.kind, row.baseline)
            )
    assert {key: found for key, found in by_row.items() if len(found) != 1} == {}


# What a row's name says, in gin's words.
@pytest.mark.parametrize(
    "table, name, setting, files, bindings",
    [
        (1, "MART", "80mti", "mart_80mti.gin", ()),
        (
            2,
            "AT-KL",
            "cifar10",
            "at.gin",
            ("training/pgd.loss_fn = @kl_divergence()", "train.attack_target = 'clean_prediction'"),
        ),
        (2, "AT-MARGIN", "80mti", "at_80mti.gin", ("training/pgd.loss_fn = @margin()",)),
        (
            2,
            "TRADES-XENT",
            "80mti",
            "trades_80mti.gin",
            ("training/pgd.loss_fn = @cross_entropy()", "train.attack_target = 'label'"),
        ),
        (
            2,
            "TRADES-MARGIN",
            "cifar10",
            "trades.gin",
            ("training/pgd.loss_fn = @margin()", "train.attack_target = 'label'"),
        ),
        (2, "TRADES-KL", "cifar10", "trades.gin", ()),
        (3, "TRADES eps=8/255", "80mti", "trades_80mti.gin", ()),
        (4, "200K (regenerated)", "80mti", "at_80mti.gin", ("EXTRA_DATA = 'tfrecord:80mti/200k/*.tfrecord'",)),
        (4, "500K (regenerated)", "80mti", "at_80mti.gin", ("EXTRA_DATA = 'tfrecord:80mti/500k/*.tfrecord'",)),
        (4, "1M (regenerated)", "80mti", "at_80mti.gin", ("EXTRA_DATA = 'tfrecord:80mti/1m/*.tfrecord'",)),
        (5, "Ours (WRN-70-16)", "cifar10", "best_wrn70_16.gin", ()),
        (5, "Ours (WRN-34-20)", "cifar10", "best_wrn34_20.gin", ()),
        (5, "Ours (WRN-70-16, L2)", "cifar10", "best_wrn70_16_l2.gin", ()),
        (5, "Ours (WRN-70-16, CIFAR-100)", "cifar10", "best_wrn70_16_cifar100.gin", ()),
        (5, "Ours (WRN-70-16)", "80mti", "best_wrn70_16_80mti.gin", ()),
        (
            5,
            "Ours (data from Carmon et al., 2019)",
            "80mti",
            "best_wrn70_16_80mti.gin",
            ("EXTRA_DATA = 'carmon'",),
        ),
        (5, "Ours (WRN-28-10)", "80mti", "best_wrn28_10_80mti.gin", ()),
        (5, "Ours (WRN-70-16, L2)", "80mti", "best_wrn70_16_80mti_l2.gin", ()),
        (5, "Ours (WRN-70-16, CIFAR-100)", "80mti", "best_wrn70_16_80mti_cifar100.gin", ()),
        (10, "Cosine", "cifar10", "at.gin", ("train.learning_rate = @cosine()",)),
        (10, "Exponential", "80mti", "at_80mti.gin", ("train.learning_rate = @exponential()",)),
    ],
)
def test_configurations(table, name, setting, files, bindings):
    row = one(table, name, setting)
    assert (row.files, row.bindings) == ((files,), bindings)


def test_the_names_of_rows_that_differ_in_a_number_are_their_bindings():
    for row in ROWS:
        bound = dict(binding.split(" = ") for binding in row.bindings)
        if row.table == 3 and row.kind == "ours" and row.row.startswith("AT"):
            numerator, denominator = bound.pop("training/threat.epsilon").strip("'").split("/")
            radius = float(row.row.removeprefix("AT eps=").removesuffix("/255"))
            assert float(numerator) / float(denominator) == pytest.approx(radius / 255, rel=1e-12)
        elif row.table == 6:
            size = f"WRN-{bound.pop('DEPTH', 28)}-{bound.pop('WIDTH', 10)}"
            assert size == row.row
        elif row.table == 7:
            tau = bound.pop("TAU", None)
            assert row.row == (f"tau={tau}" if tau else "no averaging")
        elif row.table == 8:
            activation = bound.pop("ACTIVATION", "'relu'").strip("'").replace("_", " ")
            assert activation in row.row.lower().split("/") and (not bound)
        elif row.table == 9 and row.setting == "80mti":
            fraction = float(bound.pop("batches.labelled_fraction", 0.5))
            assert row.row == f"{10 * fraction:.0f}:{10 - 10 * fraction:.0f}"
        else:
            continue
        assert bound == {}, row


def test_the_same_configuration_has_the_same_run_in_every_table():
    configurations = {}
    for row in filter(lambda row: row.runnable, ROWS):
        configurations.setdefault(study.run_name(row), set()).add((row.files, frozenset(row.bindings)))
    assert {name: found for name, found in configurations.items() if len(found) != 1} == {}
    assert len(configurations) == len({(row.files, frozenset(row.bindings)) for row in ROWS if row.runnable})
    for name in configurations:
        assert re.fullmatch(r"[a-z0-9][a-z0-9_.=-]*[a-z0-9]", name) and len(name) < 100, name
    for setting, name, tables in (("cifar10", "at", 8), ("80mti", "at_80mti", 9)):  # Table 4 has additional data alone.
        baselines = [row for row in ROWS if row.kind == "baseline" and row.setting == setting]
        assert len(baselines) == tables and {study.run_name(row) for row in baselines} == {name}
    assert study.run_name(one(1, "TRADES")) == study.run_name(one(2, "TRADES-KL")) == "trades"


@pytest.mark.parametrize(
    "table, row, setting, name",
    [
        (2, "AT-KL", "cifar10", "at-attack_target=clean_prediction-training.loss_fn=kl_divergence"),
        (4, "1M (regenerated)", "80mti", "at_80mti-extra_data=tfrecord_80mti_1m_.tfrecord"),
        (6, "WRN-34-20", "80mti", "at_80mti-depth=34-width=20"),
        (7, "tau=0.995", "cifar10", "at-tau=0.995"),
        (9, "3:7", "80mti", "at_80mti-labelled_fraction=0.3"),
        (10, "Cosine", "cifar10", "at-learning_rate=cosine"),
    ],
)
def test_run_names(table, row, setting, name):
    assert study.run_name(one(table, row, setting)) == name


def test_run_names_follow_the_files_and_scopes_and_not_the_order_of_bindings():
    row = one(6, "WRN-34-20")
    assert study.run_name(row._replace(bindings=row.bindings[::-1])) == study.run_name(row)
    assert study.run_name(row._replace(files=("at.gin", "scales/mini.gin"), bindings=())) == "at-scales_mini"
    everywhere, training = (("threat.epsilon = '4/255'",), ("training/threat.epsilon = '4/255'",))
    assert study.run_name(row._replace(bindings=everywhere)) == "at-epsilon=4_255"
    assert study.run_name(row._replace(bindings=training)) == "at-training.epsilon=4_255"


def test_a_row_of_other_people_has_no_run():
    with pytest.raises(ValueError, match=r"can be run\. Received: Table 5, Pang .*, cifar10, of kind reference"):
        study.run_name(one(5, "Pang et al. (2020) (WRN-34-20)"))


def test_select():
    assert study.select(ROWS) == ROWS
    assert len(study.select(ROWS, table=7, setting="80mti")) == 10
    assert study.select(ROWS, table="7") == study.select(ROWS, table=7)
    assert [row.table for row in study.select(ROWS, row="WRN-28-10", setting="cifar10")] == [6]


@pytest.mark.parametrize(
    "wanted, message",
    [
        (dict(table=11), "Expected a table out of 1, 2, 3, 4, 5, 6, 7, 8, 9, 10. Received: 11"),
        (
            dict(table=10, row="Linear"),
            "Expected a row of Table 10 out of Multistep, Cosine, Exponential. Received: Linear",
        ),
        (dict(table=9, row="3:7", setting="cifar10"), "of Table 9, 3:7 out of 80mti. Received: cifar10"),
        (dict(row="3:7", setting="cifar10"), "Expected a setting of 3:7 out of 80mti. Received: cifar10"),
        (dict(setting="ddpm"), "Expected a setting out of cifar10, 80mti. Received: ddpm"),
    ],
)
def test_select_says_what_there_is(wanted, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        study.select(ROWS, **wanted)
