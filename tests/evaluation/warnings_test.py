import numpy as np
import pytest

from robust_keras import threats
from robust_keras.attacks.attack import Attack
from robust_keras.evaluation import warnings


def record(name, **parameters):
    return Attack(name, None, parameters, None)


def rows(num_examples, *broken):
    """bool [num_attacks, num_examples]: each attack breaks the examples of a list."""
    verdicts = np.zeros((len(broken), num_examples), bool)
    for row, indices in zip(verdicts, broken):
        row[list(indices)] = True
    return verdicts


def of_verdicts(names, broken, baseline=None):
    return warnings.of_verdicts(names, broken, ~broken.any(axis=0), baseline)


@pytest.mark.parametrize("name", ["square", "transfer"])
def test_an_attack_without_gradients_that_breaks_more(name):
    flag = [f"{name}_beats_white_box"]
    names = ["apgd-ce", name]
    assert of_verdicts(names, rows(1000, range(400), range(400, 403))) == flag
    # Two in a thousand may happen; what the other attack breaks too is no sign.
    assert of_verdicts(names, rows(1000, range(400), range(400, 402))) == []
    assert of_verdicts(names, rows(1000, range(400), range(402))) == []
    assert of_verdicts(names[::-1], rows(1000, range(403), range(400))) == flag
    # Any of those with gradients counts.
    assert of_verdicts(["apgd-ce", name, "fab-t"], rows(1000, [], range(50), range(50))) == []
    assert of_verdicts(["apgd-ce", name, "fab-t"], rows(1000, [], range(50), range(40))) == flag


def test_attacks_without_gradients_alone_beat_none():
    assert of_verdicts(["square"], rows(10, range(5))) == []
    assert of_verdicts(["square", "transfer"], rows(10, range(5), range(5, 10))) == []
    assert of_verdicts(["apgd-ce"], rows(10, range(5))) == []
    assert of_verdicts([], rows(10)) == []


def test_each_attack_without_gradients_is_named():
    broken = rows(100, range(10), range(10, 20), range(20, 30))
    flags = of_verdicts(["apgd-ce", "transfer", "square"], broken)
    assert flags == ["transfer_beats_white_box", "square_beats_white_box"]


def test_a_baseline_gap():
    def gap(num_baseline, num_broken, start=0):
        baseline = rows(100, range(start, start + num_baseline))[0]
        return of_verdicts(["apgd-ce"], rows(100, range(num_broken)), baseline)

    flag = ["baseline_gap_above_5_points"]
    assert gap(10, 15) == [] and gap(10, 16) == flag
    # A baseline that breaks more than all attacks together; two in a thousand may do so by chance.
    assert gap(40, 15) == ["baseline_beats_attacks"] and gap(15, 15) == [] and gap(16, 15) == ["baseline_beats_attacks"]
    # The two accuracies are compared: 20 that the baseline alone broke, 22 or 26 that the attack alone did.
    assert gap(20, 22, start=50) == [] and gap(20, 26, start=50) == flag
    assert warnings.of_verdicts([], rows(10), np.ones(10, bool), np.zeros(10, bool)) == []


@pytest.mark.parametrize(
    "by_diagnosis, by_attacks, flagged",
    [
        (0, 0, False),
        (1, 0, False),
        (4, 0, False),
        (5, 0, True),
        (6, 1, False),
        (7, 1, True),
        (20, 20, False),
        (0, 9, False),
    ],
)
def test_a_diagnosis_that_breaks_more(by_diagnosis, by_attacks, flagged):
    # 1 / 32 is under 5 %, and so is 9 / 256; 1 / 16 and 8 / 128 are not.
    found = warnings.of_diagnosis(by_diagnosis, by_attacks)
    assert found == (["diagnosis_beats_attacks"] if flagged else [])


@pytest.mark.parametrize(
    "num_classes, names, expected",
    [
        (2, ["apgd-ce"], []),
        (2, ["apgd-ce", "apgd-dlr"], ["dlr_fell_back_to_margin"]),
        (2, ["apgd-t"], ["targeted_dlr_fell_back_to_margin"]),
        (2, ["apgd-dlr", "apgd-t"], ["dlr_fell_back_to_margin", "targeted_dlr_fell_back_to_margin"]),
        (3, ["apgd-dlr", "apgd-t"], ["targeted_dlr_fell_back_to_margin"]),
        (4, ["apgd-dlr", "apgd-t"], []),
        (5, ["apgd-dlr", "apgd-t"], []),
    ],
)
def test_few_classes_for_a_loss(num_classes, names, expected):
    assert warnings.of_classes([record(name) for name in names], num_classes) == expected


@pytest.mark.parametrize("num_classes, flagged", [(2, True), (3, True), (5, True), (9, True), (10, False)])
def test_few_classes_to_aim_at(num_classes, flagged):
    found = warnings.of_classes([record("square"), record("fab-t", num_targets=9)], num_classes)
    assert found == (["fewer_target_classes"] if flagged else [])
    assert warnings.of_classes([record("multi-targeted", num_targets=num_classes - 1)], num_classes) == []


@pytest.mark.parametrize(
    "name, norm, num_targets, flagged",
    [
        ("multi-targeted", "Linf", 99, False),
        ("multi-targeted", "Linf", 98, True),
        ("multi-targeted", "Linf", 9, True),
        # Upstream's own choice, for any number of classes.
        ("apgd-t", "Linf", 9, False),
        ("apgd-t", "Linf", 8, True),
        ("apgd-t", "L1", 5, False),
        ("apgd-t", "L1", 4, True),
        ("fab-t", "L1", 9, False),
        ("fab-t", "L1", 5, True),
        ("fab", "Linf", 5, False),
    ],
)
def test_not_all_of_the_wrong_classes(name, norm, num_targets, flagged):
    threat = threats.threat(norm=norm, epsilon=0.1)
    found = warnings.of_classes([Attack(name, threat, {"num_targets": num_targets}, None)], 100)
    assert found == (["fewer_targets_than_classes"] if flagged else [])
