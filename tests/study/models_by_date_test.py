"""Published models, and evaluations of one's own beside them."""

import datetime
import json
import os

import pytest

from robust_keras.study import models_by_date, rows

MANIFEST = rows.read()
HEADER = "model,date,extra_data,robust,label,source\n"


def test_the_papers_prior_art_and_its_own_models():
    models = {(each.name, each.setting): each for each in models_by_date.read(MANIFEST)}
    assert len(models) == 38  # AutoAttack's list had 33 on 1 October 2020, and five of Table 5 are of Linf on CIFAR-10.
    before = [each for each in models.values() if not each.name.startswith("Gowal")]
    best = {setting: max(each.robust for each in before if each.setting == setting) for setting in rows.SETTINGS}
    assert best == {"cifar10": 53.74, "80mti": 59.53}  # Section 1: prior art.
    ours = models["Gowal et al. (2020), WRN-70-16", "80mti"]
    assert ours.robust == 65.87 and ours.date == datetime.date(2020, 10, 1)
    for each in models.values():
        if each.source.startswith("arXiv:"):
            assert each.date.strftime("%y%m") == each.source[6:10]
    assert not any(each.is_own for each in models.values())


@pytest.mark.parametrize(
    "line, expected",
    [
        ("A,2020-01,maybe,50,,arXiv:1", "yes or no"),
        ("A,2020-01,no,50,,", "a source"),
        ("A,2020-13,no,50,,arXiv:1", "Expected a date such as 2020-10"),
        ("A,2020-01,no,fifty,,arXiv:1", "Expected an accuracy in percent, or TABLE:ROW"),
        ("A,2020-01,no,5:Nobody,,arXiv:1", "Expected a row of Table 5"),
    ],
)
def test_a_malformed_file(tmp_path, line, expected):
    path = tmp_path / "models.csv"
    path.write_text(HEADER + line + "\n")
    with pytest.raises(ValueError, match=expected):
        models_by_date.read(MANIFEST, path)


def evaluated(folder, robust, **changed):
    folder.mkdir(parents=True)
    results = {
        "model": {"path": "saved_model"},
        "num_examples": 100,
        "norm": "Linf",
        "epsilon": 8 / 255,
        "epsilon_fraction": "8/255",
        "attacks": [{"name": "apgd-ce"}, {"name": "multi-targeted"}],
        "clean_accuracy": 0.9,
        "robust_accuracy": robust,
        "confidence_interval_95": [0.4, 0.6],
        "dataset": {"name": "cifar10"},
        **changed,
    }
    (folder / "results.json").write_text(json.dumps(results))
    seconds = datetime.datetime(2021, 3, 4, 12, tzinfo=datetime.timezone.utc).timestamp()
    os.utime(folder / "results.json", (seconds, seconds))
    return str(folder)


def test_a_studys_own_are_means_over_seeds(tmp_path):
    evaluated(tmp_path / "at" / "seed0" / "evaluation", 0.50)
    evaluated(tmp_path / "at" / "seed1" / "evaluation", 0.52)
    evaluated(tmp_path / "at-tau=0.995" / "seed0" / "evaluation", 0.53)
    evaluated(tmp_path / "at_80mti" / "seed0" / "evaluation", 0.58)
    evaluated(tmp_path / "best_wrn70_16_l2" / "seed0" / "evaluation", 0.7, norm="L2")
    evaluated(tmp_path / "not_of_the_study" / "seed0" / "evaluation", 0.9)
    (tmp_path / "trades" / "seed0").mkdir(parents=True)
    (tmp_path / "plan.json").write_text("{}")
    models = {each.name: each for each in models_by_date.measured(MANIFEST, str(tmp_path))}
    assert set(models) == {"at", "at-tau=0.995", "at_80mti"} and all(each.is_own for each in models.values())
    at = models["at"]
    assert (at.robust, at.spread, at.setting) == (pytest.approx(51), pytest.approx(2**0.5), "cifar10")
    assert at.date == datetime.date(2021, 3, 4) and models["at_80mti"].setting == "80mti"
    assert {name: each.label for name, each in models.items()} == {
        "at": "",
        "at-tau=0.995": "at-tau=0.995",
        "at_80mti": "at_80mti",
    }
    assert models_by_date.measured(MANIFEST, str(tmp_path / "none")) == []


def test_an_evaluation_that_is_given(tmp_path):
    folder = evaluated(tmp_path / "mine", 0.5)
    model = models_by_date.of_evaluation(folder)
    assert (model.robust, model.date, model.setting) == (50.0, datetime.date(2021, 3, 4), None)
    assert model.label == f"{model.name} (100 images)"
    doubtful = evaluated(tmp_path / "doubtful", 0.5, num_examples=10_000, warnings=["zero_gradients"])
    assert models_by_date.of_evaluation(doubtful).label.endswith(" (with warnings)")
    whole = models_by_date.of_evaluation(evaluated(tmp_path / "whole", 0.5, num_examples=10_000))
    assert whole.label == whole.name
    given = models_by_date.of_evaluation(folder, date=datetime.date(2024, 1, 2), setting="80mti")
    assert (given.date, given.setting) == (datetime.date(2024, 1, 2), "80mti")


@pytest.mark.parametrize(
    "changed, told",
    [
        ({"norm": "L2"}, "in L2 8/255"),
        ({"epsilon": 4 / 255, "epsilon_fraction": "4/255"}, "in Linf 4/255"),
        ({"dataset": {"name": "cifar100"}}, "of the data set cifar100"),
        ({"dataset": []}, "of the data set None"),
        ({"attacks": [{"name": "pgd"}]}, "by pgd"),
        ({"attacks": [{"name": "\x1b[2J"}]}, "by \\x1b[2J"),
    ],
)
def test_an_evaluation_of_something_else_is_refused(tmp_path, changed, told):
    folder = evaluated(tmp_path / "mine", 0.5, **changed)
    with pytest.raises(ValueError, match="Expected an evaluation on CIFAR-10 in Linf 8/255") as refused:
        models_by_date.of_evaluation(folder)
    assert told in str(refused.value) and "\x1b" not in str(refused.value)
