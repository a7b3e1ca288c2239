"""One model against ten, two against three, a drop against nothing: by hand, and by draws with a known truth."""

import ast
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from robust_keras.evaluation import comparison, contrast
from robust_keras.evaluation.contrast import Group, compare

DRAWS, IMAGES = 1000, 300


def drawn(rng, counts, *, effect=0.0, seed=0.05, image=1.0, preference=0.3, noise=0.5, draws=DRAWS, images=IMAGES):
    """Right where a normal score is positive: bool `[draws, num_models, images]` of each configuration.

    Args:
        rng: a generator.
        counts: models of the first configuration, and of the second.
        effect: how much higher the first one's scores are; .1 is about 3 points.
        seed: how much a model's scores vary, of each configuration or of both.
        image: how much images differ in ease, for all models.
        preference: how much a configuration likes some images more.
        noise: of a model on an image.
        draws: how many.
        images: how many.
    """
    ease = 0.3 + image * rng.normal(size=(draws, 1, images))
    sides = []
    for k, (count, spread) in enumerate(zip(counts, np.broadcast_to(seed, 2))):
        score = ease + preference * rng.normal(size=(draws, 1, images)) + spread * rng.normal(size=(draws, count, 1))
        sides.append(score + noise * rng.normal(size=(draws, count, images)) + (effect if k == 0 else 0.0) > 0)
    return sides


def chosen_by_validation(rng, models, images=1024):
    """Validation accuracies: those on the images, as far as another sample of so many tells."""
    accuracy = models.mean(axis=2)
    return accuracy + rng.normal(size=accuracy.shape) * math.sqrt(0.15 / images)


def one_of_two_against_ten(rng, **settings):
    row, baseline = drawn(rng, (2, 10), **settings)
    validated = [chosen_by_validation(rng, each) for each in (row, baseline)]
    better = validated[0].argmax(axis=1)
    for k in range(len(row)):
        yield compare(
            [Group(row[k, [better[k]]], 1, 2), Group(baseline[k], -1, validation=validated[1][k])], expected=1
        )


def many_against_many(rng, num_row, num_baseline, **settings):
    for row, baseline in zip(*drawn(rng, (num_row, num_baseline), **settings)):
        if num_row == num_baseline > 2:  # As `study.tables` does.
            yield comparison.compare(row, baseline, expected=1)
        else:
            yield compare([Group(row), Group(baseline, -1)], expected=1)


PROTOCOLS = {
    "one of two against ten": one_of_two_against_ten,
    "2 against 2": lambda rng, **settings: many_against_many(rng, 2, 2, **settings),
    "3 against 3": lambda rng, **settings: many_against_many(rng, 3, 3, **settings),
    "2 against 3": lambda rng, **settings: many_against_many(rng, 2, 3, **settings),
}


@pytest.fixture
def no_plans(monkeypatch):
    """Leaves `needed` out where a test makes a thousand comparisons."""
    monkeypatch.setattr(comparison, "least", lambda *args: (None, ""))


def share(found, verdict):
    verdicts = [each.verdict for each in found]
    return verdicts.count(verdict) / len(verdicts)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_effect_and_a_reversed_one_are_shown_in_at_most_a_twentieth(no_plans, protocol):
    rng = np.random.default_rng(1)
    for effect, seed in ((0.0, 0.05), (-0.05, 0.05), (0.0, 0.3)):  # Of .3, seeds are most of the variance.
        assert share(PROTOCOLS[protocol](rng, effect=effect, seed=seed), "shown") <= 0.05


@pytest.mark.parametrize("protocol, power", zip(PROTOCOLS, (0.9, 0.5, 0.9, 0.8)))
def test_an_effect_is_shown_and_its_reverse_contradicted(no_plans, protocol, power):
    rng = np.random.default_rng(2)
    assert share(PROTOCOLS[protocol](rng, effect=0.4), "shown") >= power
    assert share(PROTOCOLS[protocol](rng, effect=-0.4, draws=200), "contradicted") >= power - 0.1


def test_what_validation_prefers_is_not_held_against_the_other_side(no_plans):
    # Seeds matter much, and validation tells exactly which model is better: a plain mean would be .56 deviations below.
    rng = np.random.default_rng(3)
    row, baseline = drawn(rng, (2, 10), seed=0.3, images=100, draws=400)
    chosen = row[np.arange(400), row.mean(axis=2).argmax(axis=1)]
    differences, plain = [], []
    for one, ten in zip(chosen, baseline):
        groups = [Group(one[None], 1, 2), Group(ten, -1, validation=ten.mean(axis=1))]
        differences.append(compare(groups).difference)
        plain.append(one.mean() - ten.mean())
    assert abs(np.mean(differences)) < 0.012 < 0.03 < np.mean(plain)


def test_how_often_validation_prefers_each():
    np.testing.assert_allclose(contrast.better_of([0.3, 0.5, 0.4], 2), [0, 2 / 3, 1 / 3])
    np.testing.assert_allclose(contrast.better_of([0.5, 0.5], 2), [1, 0])  # Of equals the first.
    np.testing.assert_allclose(contrast.better_of([0.1, 0.2, 0.3, 0.4], 3), [0, 0, 1 / 4, 3 / 4])
    np.testing.assert_allclose(contrast.better_of([0.1, 0.2], 1), [0.5, 0.5])


def test_models_as_a_whole_by_hand():
    # The three vary by .01, which counts twice in the one: variance .01 (2 + 1/3), t of 2 degrees of freedom 4.303.
    groups = [Group(np.array([[0.5]])), Group(np.array([[0.1], [0.2], [0.3]]), -1)]
    found = compare(groups, expected=1)
    half = 4.302653 * math.sqrt(0.01 * (2 + 1 / 3))
    assert found.interval == pytest.approx((0.3 - half, 0.3 + half)) and found.verdict == "not resolved"
    # The estimate that is too low half the time, .01 * 2 / 1.386, with three models each: t of 4 is 2.776, so .272 < .3;
    # with two and three it is .42.
    assert found.needed == (1, 3)
    said = comparison.summary(found, unit="epochs")
    assert said == "+30.0 epochs (95 %: -35.7 to +95.7), 1 seed against 3: not resolved; about 3 seeds would"


def test_images_and_seeds_by_hand():
    # The ten agree: only images matter. Of 100 the one is right on 10 more: sum of squares 10 - 1, and the two halves 1.
    ten = np.zeros((10, 100), bool)
    one = np.arange(100)[None] < 10
    found = compare([Group(one), Group(ten, -1)], expected=1)
    half = stats.t.ppf(0.975, 99) * math.sqrt((9 + 1) / 99 / 100)
    assert found.interval == pytest.approx((0.1 - half, 0.1 + half)) and found.verdict == "shown"
    assert (found.num_seeds, found.num_baseline_seeds, found.num_images) == (1, 10, 100)
    # The same as a number, and taken off one.
    assert compare([Group(one), Group(ten, 0)], offset=0.04).interval == pytest.approx((0.06 - half, 0.06 + half))


def test_the_wider_of_a_common_spread_and_of_each_sides_own():
    # One side varies, of two models; pooled with the ten that agree, its spread would count for little.
    ten = np.zeros((10, 1))
    two = np.array([[0.5], [0.3]])
    found = compare([Group(two), Group(ten, -1)])
    half = 12.7062 * math.sqrt(0.02 / 2)  # Its own variance .02, of one degree of freedom.
    assert found.interval == pytest.approx((0.4 - half, 0.4 + half), rel=1e-4)


def test_nothing_is_resolved_without_a_spread_or_where_a_choice_is_not_allowed_for():
    ones, zeros = np.ones((1, 500), bool), np.zeros((1, 500), bool)
    for groups, seeds in (([Group(ones), Group(zeros, -1)], 1), ([Group(ones), Group(zeros.repeat(2, 0), -1)], 1)):
        found = compare(groups, expected=1)
        assert found.verdict == "not resolved" and not found.covers_seeds and found.num_seeds == seeds
        assert found.needed is None and found.not_needed == "more seeds would have to agree"
    ten = zeros.repeat(10, 0)
    assert compare([Group(ones, 1, 2), Group(ten, -1)], expected=1).verdict == "not resolved"
    assert compare([Group(ones, 1, 2), Group(ten, -1, validation=range(10))], expected=1).verdict == "shown"
    # Both sides were chosen alike.
    both = [Group(ones, 1, 2), Group(zeros, -1, 2), Group(ten, 0)]
    assert compare(both, expected=1).verdict == "shown" and compare(both, expected=-1).verdict == "contradicted"
    assert compare(both).verdict == "no expectation"
    # Models as a whole that agree to the last digit do not tell how exact that is.
    assert compare([Group(np.full((4, 1), 0.5))], expected=1).verdict == "not resolved"


def test_a_plan_is_about_right():
    # From data whose observed difference happens to be the true one, as a plan supposes.
    rng, deviation = np.random.default_rng(4), math.sqrt(1 + 0.3**2 + 0.05**2 + 0.5**2)
    truth = stats.norm.cdf((0.3 + 0.2) / deviation) - stats.norm.cdf(0.3 / deviation)
    row, baseline = drawn(rng, (1, 10), effect=0.2, draws=400, images=150)
    like = np.flatnonzero(abs(row.mean(axis=(1, 2)) - baseline.mean(axis=(1, 2)) - truth) < 0.1 * truth)[:40]
    plans = [found.needed for k in like if (found := compare([Group(row[k]), Group(baseline[k], -1)])).needed]
    # Plans for more than one seed are those that no number of images would do for.
    num_images = sorted(num_images if num_seeds == 1 else 10_000 for num_images, num_seeds in plans)[len(plans) // 2]
    row, baseline = drawn(rng, (1, 10), effect=0.2, draws=200, images=num_images)
    found = [compare([Group(one), Group(ten, -1)]) for one, ten in zip(row, baseline)]
    assert 0.35 <= np.mean([each.interval[0] > 0 for each in found]) <= 0.85


@pytest.mark.parametrize(
    "groups, options, message",
    [
        ([(1, 2)], {"confidence": 95}, r"Expected a confidence in \(0, 1\). Received: 95"),
        ([(1, 2)], {"expected": math.inf}, "Expected a finite expected difference"),
        ([], {}, r"Expected one group of sign 1, and at most one of -1 after it. Received: \[\]"),
        ([(1, 2), (1, 2)], {}, r"Received: \[1, 1\]"),
        ([(1, 2), (-1, 3)], {}, r"Expected groups .* of the same images. Received: \(1, 2\), \(1, 3\)"),
        ([(1, 0)], {}, r"Received: \(1, 0\)"),
    ],
)
def test_bad_input(groups, options, message):
    made = [Group(np.zeros((1, images)), sign) for sign, images in groups]
    with pytest.raises(ValueError, match=message):
        compare(made, **options)


def test_imports_no_tensorflow():
    nodes = ast.walk(ast.parse(pathlib.Path(contrast.__file__).read_text()))
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if hasattr(n, "names")}
    assert not any(name.startswith(("tensorflow", "keras")) for name in names)
