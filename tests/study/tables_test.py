"""Tables of the paper's numbers beside invented measurements."""

import csv

import numpy as np
import pytest

from robust_keras.study import measured as models
from robust_keras.study import rows, tables

MANIFEST = rows.read()
ROWS = rows.select(MANIFEST, table=10, setting="cifar10")  # Multistep, cosine, exponential.
NAMES = {row.row: rows.run_name(row) for row in ROWS}


def measured(seed, robust, *, is_at_chance=False, num_images=400):
    stands = np.arange(num_images) < robust * num_images
    return models.Measured(seed, 80.0, None, 100 * robust, is_at_chance, stands, [])


def written(tmp_path, found, number=10, shown=ROWS):
    paths = tables.write_study(str(tmp_path), number, tables.compare_rows(MANIFEST, shown, found), scale="a scale")
    with open(paths[1], newline="") as file:
        return {(line["row"], line["setting"]): line for line in csv.DictReader(file)}, open(paths[0]).read()


def test_a_difference_and_the_papers(tmp_path):
    found = {
        NAMES["Multistep"]: [measured(seed, 0.5) for seed in range(3)],
        NAMES["Cosine"]: [measured(seed, 0.4) for seed in range(3)],
    }
    lines, text = written(tmp_path, found)
    line = lines["Cosine", "cifar10"]
    # Table 10: 47.49 against 50.80 %.
    assert float(line["paper_difference"]) == -3.31 and float(line["difference"]) == pytest.approx(-10)
    assert line["verdict"] == "shown" and "-10.0 points" in text
    assert lines["Exponential", "cifar10"]["verdict"] == ""


@pytest.mark.parametrize("who", ["Multistep", "Cosine"])
def test_nothing_is_told_of_a_network_at_chance(tmp_path, who):
    found = {
        name: [measured(0, 0.5 - 0.01 * k), measured(1, 0.5, is_at_chance=name == NAMES[who])]
        for k, name in enumerate((NAMES["Multistep"], NAMES["Cosine"]))
    }
    lines, text = written(tmp_path, found)
    line = lines["Cosine", "cifar10"]
    assert line["verdict"] == "at chance"
    assert [line[name] for name in ("difference", "difference_low", "images_needed", "seeds_needed")] == [""] * 4
    assert f"no difference can be told: at chance on clean images {NAMES[who]} of seed 1" in text
    assert "images and" not in text.split("\n\n")[1]  # Nothing is advised.
    found[NAMES[who]][1] = measured(1, 0.5)
    lines, text = written(tmp_path, found)
    assert lines["Cosine", "cifar10"]["images_needed"] != "" and "at chance" not in text


def test_numbers_of_others_are_marked(tmp_path):
    chosen = rows.select(MANIFEST, table=5, setting="cifar10")
    lines, text = written(tmp_path, {}, 5, chosen)
    assert "| 53.74*" in text and "| 56.43 " in text and text.endswith(f"{tables.REPORTED}.\n")
    marks = {name: line["paper_robust_is_reported"] for (name, _), line in lines.items()}
    assert marks["Pang et al. (2020) (WRN-34-20)"] == "True" and marks["Ours (WRN-70-16)"] == "False"
    assert "reported" not in written(tmp_path, {})[1]


def test_one_model_that_validation_chose_against_ten(tmp_path):
    # Table 10: cosine 47.49, multistep 50.80 %. The chosen of two is compared with the better ones of pairs of the ten.
    ten = [measured(seed, 0.5 + 0.005 * (seed % 3 - 1))._replace(validation=0.3 + 0.01 * seed) for seed in range(10)]
    (one,) = (measured(1, 0.4)._replace(validation=0.2, chosen_of=2),)
    lines, text = written(tmp_path, {NAMES["Multistep"]: ten, NAMES["Cosine"]: [one]})
    line = lines["Cosine", "cifar10"]
    assert line["verdict"] == "shown" and "1 seed against 10 x 400 images: shown" in text
    # Weights 0, 1/45, ..., 9/45 of the ten in the order of their validation.
    mean = sum(k * (50 + 0.5 * (k % 3 - 1)) for k in range(10)) / 45
    assert float(line["difference"]) == pytest.approx(40 - mean, abs=0.05)
    assert float(line["measured_robust_deviation"] or 0) == 0 and line["seeds"] == "1"
    # Without their validation nothing allows for the choice.
    unknown = [each._replace(validation=None) for each in ten]
    lines, _ = written(tmp_path, {NAMES["Multistep"]: unknown, NAMES["Cosine"]: [one]})
    assert lines["Cosine", "cifar10"]["verdict"] == "not resolved"


def test_two_models_against_three(tmp_path):
    found = {
        NAMES["Multistep"]: [measured(seed, 0.5 + 0.01 * seed) for seed in range(3)],
        NAMES["Cosine"]: [measured(seed, 0.3 + 0.01 * seed) for seed in range(2)],
    }
    lines, text = written(tmp_path, found)
    assert lines["Cosine", "cifar10"]["verdict"] == "shown" and "2 seeds against 3 x 400 images" in text
