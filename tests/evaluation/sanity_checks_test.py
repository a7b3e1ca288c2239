import numpy as np
import pytest

from robust_keras.evaluation import sanity_checks

N = 100
RADII = ["Linf 4/255", "Linf 8/255", "Linf 16/255", "Linf 1"]


def first(*numbers):
    """bool [len(numbers), N]: in each row the first so many are broken."""
    return np.arange(N) < np.array(numbers)[:, None]


def made(**changes):
    """What attacks broke where each finds what is there, or not."""
    found = {
        "correct": np.arange(N) < 90,
        "radii": RADII,
        "at": 1,
        "by_gradient": first(20, 50, 85, 90),
        "by_noise": first(0, 2, 10, 60),
        "by_steps": {10: first(48)[0], 20: first(50)[0], 40: first(51)[0]},
        "by_black_box": first(30)[0],
    }
    return sanity_checks.Broken(**{**found, **changes})


def verdicts(**changes):
    return {each["name"]: each["passed"] for each in sanity_checks.checks(made(**changes))}


def test_attacks_that_find_what_is_there_pass():
    found = sanity_checks.checks(made())
    assert [each["name"] for each in found] == list(sanity_checks.NAMES)
    assert [each["passed"] for each in found] == [True] * 5
    assert "all 90 images" in found[0]["told"] and "Linf 1" in found[0]["told"]
    assert "50" in found[1]["told"] or "51" in found[1]["told"]
    assert sanity_checks.told(found) == "Of 5 sanity checks 5 passed and 0 failed."


@pytest.mark.parametrize(
    "failing, changes",
    [
        ("unbounded_attack_wins", {"by_gradient": first(20, 50, 85, 89)}),
        ("more_steps_no_worse", {"by_steps": {10: first(50)[0], 20: first(50)[0], 40: first(43)[0]}}),
        ("larger_radius_no_better", {"by_gradient": first(20, 90, 80, 90)}),
        ("black_box_weaker", {"by_black_box": first(56)[0]}),
        ("random_noise_weaker", {"by_noise": first(0, 62, 10, 60), "by_black_box": first(52)[0]}),
    ],
)
def test_each_check_fails_for_what_it_is_there(failing, changes):
    assert [name for name, passed in verdicts(**changes).items() if not passed] == [failing]


def test_what_chance_may_do_fails_nothing():
    # Four to none that Square alone broke: a coin does it in 6.25 of 100 cases, five to none in 3.1.
    assert verdicts(by_black_box=first(55)[0])["black_box_weaker"] is True
    # Six to none at fewer steps, of three comparisons: p = 1 / 64 < 0.05 / 3.
    assert verdicts(by_steps={10: first(50)[0], 20: first(50)[0], 40: first(45)[0]})["more_steps_no_worse"] is True
    assert verdicts(by_steps={10: first(50)[0], 20: first(50)[0], 40: first(44)[0]})["more_steps_no_worse"] is False
    # What the weaker attack alone breaks counts against what the stronger one alone breaks.
    other = np.roll(first(51)[0], 5)
    assert verdicts(by_black_box=other)["black_box_weaker"] is True


def test_noise_is_compared_with_the_black_box_too():
    noise = first(0, 12, 12, 12)
    assert verdicts(by_noise=noise, by_black_box=first(12)[0])["random_noise_weaker"] is True
    assert verdicts(by_noise=noise, by_black_box=first(0)[0])["random_noise_weaker"] is False


def test_what_cannot_be_said_is_not_said():
    nothing = np.zeros((4, N), bool)
    found = sanity_checks.checks(made(correct=np.zeros(N, bool), by_gradient=nothing))
    assert {each["passed"] for each in found} == {None}
    assert "none of the 100 images is right" in found[0]["told"]
    assert "5 could not be made" in sanity_checks.told(found)
    idle = dict.fromkeys((10, 20, 40), nothing[0])
    found = verdicts(by_gradient=nothing, by_noise=nothing, by_steps=idle, by_black_box=None)
    assert found == {**dict.fromkeys(sanity_checks.NAMES), "unbounded_attack_wins": False}
