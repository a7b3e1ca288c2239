"""The statistics of a difference: by hand, by simulation with a known truth, and in words."""

import ast
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from robust_keras.evaluation import comparison
from robust_keras.evaluation.comparison import compare, summary

# By hand: row is right where d >= 0 and the baseline where d < 0 or both are.
#     d = [[1, 1, 0, 0],
#          [1, 0, 0, -1]], mean 1/4; of images 1, 1/2, 0, -1/2; of seeds 1/2, 0.
ROW = np.array([[1, 1, 1, 0], [1, 0, 1, 0]], bool)
BASELINE = np.array([[0, 0, 1, 0], [0, 0, 1, 1]], bool)


def simulate(rng, num_sets, num_seeds, num_images, *, means, image=1.0, preference=0.3, seed=0.05, noise=0.5):
    """Right where a normal score is positive, so that the true difference is known.

    Returns row and baseline, each bool [num_sets, num_seeds, num_images], and the true difference.
    """
    score = (
        np.reshape(means, (2, 1, 1, 1))
        + image * rng.normal(size=(1, num_sets, 1, num_images))  # How easy the image is, for both configurations.
        + preference * rng.normal(size=(2, num_sets, 1, num_images))
        + seed * rng.normal(size=(2, num_sets, num_seeds, 1))
        + noise * rng.normal(size=(2, num_sets, num_seeds, num_images))
    )
    row, baseline = score > 0
    scale = math.sqrt(image**2 + preference**2 + seed**2 + noise**2)
    return row, baseline, stats.norm.cdf(means[0] / scale) - stats.norm.cdf(means[1] / scale)


def compare_all(row, baseline, **options):
    return [compare(a, b, **options) for a, b in zip(row, baseline)]


def half_width(found):
    return (found.interval[1] - found.interval[0]) / 2


@pytest.fixture
def no_plans(monkeypatch):
    """Leaves `needed` out where a test makes hundreds of comparisons."""
    monkeypatch.setattr(comparison, "least", lambda *args: (None, ""))


def test_hand_computed_with_two_seeds():
    # Sums of squares: images 2 (9/16 + 1/16 + 1/16 + 9/16) = 5/2, seeds 4 (1/16 + 1/16) = 1/2, in all 4 - 8/16 = 7/2,
    # so rest 1/2. Mean squares: (5/2) / 3 plus the two halved images' 2 / 3, 1/2 / 1, 1/2 / 3.
    images, seeds, rest = 5 / 6 + 2 / 3, 1 / 2, 1 / 6
    variance = (images + seeds - rest) / 8
    freedom = (8 * variance) ** 2 / (images**2 / 3 + seeds**2 / 1 + rest**2 / 3)
    assert freedom == pytest.approx(3.33, abs=0.001)
    half = stats.t.ppf(0.75, freedom) * math.sqrt(variance)
    found = compare(ROW, BASELINE, expected=1.0, confidence=0.5)
    assert found.difference == 0.25
    assert found.interval == pytest.approx((0.25 - half, 0.25 + half))
    assert found.verdict == "not resolved" and (found.num_seeds, found.num_images) == (2, 4) and found.covers_seeds


def test_hand_computed_with_one_seed():
    # d = [1, 1, 0, 0]: the sum of squares is 1, and 1 more for the two halved images; t of 3 degrees is 3.182.
    found = compare(ROW[:1], BASELINE[:1])
    half = 3.182446 * math.sqrt((1 + 1) / 3 / 4)
    assert found.interval == pytest.approx((max(0.5 - half, -1), min(0.5 + half, 1)))
    assert found.interval[1] == 1.0  # No difference is larger.
    assert not found.covers_seeds


def test_one_seed_shows_nothing():
    found = compare(np.ones((1, 500), bool), np.zeros((1, 500), bool), expected=1.0)
    assert found.interval[0] > 0.9 and found.verdict == "not resolved"
    assert found.needed is None and found.not_needed == "more seeds would have to agree"


def test_negative_components_count_as_zero():
    # d = [[1, -1], [-1, 1]] is all rest: the mean squares are images 0, seeds 0, rest 4, so images and seeds count as
    # the rest's 4, the images with the two halved ones' 2 more. Variance (6 + 4 - 4) / 4, of 1 degree of freedom.
    row = np.array([[1, 0], [0, 1]], bool)
    half = comparison._half_width(comparison._variances(row.astype(float) - ~row), 2, 2, 0.95)
    assert half == pytest.approx(12.7062 * math.sqrt(6 / 4), rel=1e-4)
    assert compare(row, ~row).interval == (-1.0, 1.0)


@pytest.mark.parametrize("num_seeds", [3, 5])
@pytest.mark.parametrize("seed", [0.02, 0.1, 0.3])
def test_coverage(no_plans, num_seeds, seed):
    # From seeds that hardly matter (about half a percentage point) to seeds that are most of the variance.
    rng = np.random.default_rng(1)
    row, baseline, truth = simulate(rng, 400, num_seeds, 200, means=(0.4, 0.25), seed=seed)
    intervals = np.array([found.interval for found in compare_all(row, baseline)])
    covered = np.mean((intervals[:, 0] <= truth) & (truth <= intervals[:, 1]))
    assert 0.91 <= covered <= 0.995
    # Neither by luck on one side nor far too wide.
    scatter = np.std((row.astype(float) - baseline).mean(axis=(1, 2)))
    assert np.median(intervals[:, 1] - intervals[:, 0]) / 2 < 1.25 * stats.t.ppf(0.975, num_seeds - 1) * scatter


def test_one_seed_covers_images_and_not_seeds(no_plans):
    rng = np.random.default_rng(2)

    def covered(seed):
        row, baseline, truth = simulate(rng, 400, 1, 300, means=(0.4, 0.25), seed=seed)
        return np.mean([f.interval[0] <= truth <= f.interval[1] for f in compare_all(row, baseline)])

    assert 0.92 <= covered(0.0) <= 0.98
    assert covered(0.3) < 0.6


def test_coverage_where_the_two_rarely_differ(no_plans):
    # One image in 100 is discordant: without the two halved images the interval is of
    # no width at all in the quarter of the data sets where there are none.
    rng = np.random.default_rng(3)
    row = np.ones((400, 1, 150), bool)
    baseline = rng.random((400, 1, 150)) > 0.01
    covered = np.mean([f.interval[0] <= 0.01 <= f.interval[1] for f in compare_all(row, baseline)])
    assert covered >= 0.91


def test_no_effect_is_seldom_shown(no_plans):
    rng = np.random.default_rng(4)
    row, baseline, truth = simulate(rng, 600, 4, 200, means=(0.3, 0.3), seed=0.1)
    assert truth == 0
    verdicts = [found.verdict for found in compare_all(row, baseline, expected=0.01)]
    shown, contradicted = verdicts.count("shown") / 600, verdicts.count("contradicted") / 600
    assert 0.002 <= shown <= 0.045 and 0.002 <= contradicted <= 0.045


def test_an_effect_is_shown_or_contradicted():
    rng = np.random.default_rng(5)
    row, baseline, truth = simulate(rng, 1, 4, 2000, means=(0.6, 0.2), seed=0.02)
    row, baseline = row[0], baseline[0]
    up, down = compare(row, baseline, expected=3.0), compare(baseline, row, expected=3.0)
    assert up.verdict == "shown" and down.verdict == "contradicted"
    assert up.needed is None and up.not_needed == ""
    assert compare(row, baseline, expected=-0.1).verdict == "contradicted"
    assert compare(baseline, row, expected=-0.1).verdict == "shown"
    for expected in (None, 0, 0.0):
        assert compare(row, baseline, expected=expected).verdict == "no expectation"
    assert up.interval == pytest.approx([-bound for bound in reversed(down.interval)])
    assert half_width(compare(row, baseline, confidence=0.99)) > half_width(up)


@pytest.mark.parametrize("num_seeds", [1, 4])
def test_pairing_images_helps(num_seeds):
    rng = np.random.default_rng(6)
    row, baseline, _ = simulate(rng, 1, num_seeds, 1000, means=(0.4, 0.25), seed=0.02)
    paired = compare(row[0], baseline[0])
    unpaired = compare(row[0], baseline[0][:, rng.permutation(1000)])
    assert unpaired.difference == pytest.approx(paired.difference)
    assert half_width(unpaired) > 1.2 * half_width(paired)


def test_equal_arrays():
    for num_seeds in (1, 3):
        same = np.ones((num_seeds, 500), bool)
        found = compare(same, same, expected=1.0)
        assert found.difference == 0 and found.verdict == "not resolved"
        assert found.needed is None and found.not_needed == "no difference to resolve"
        # 500 images without a difference leave room for one on some others, but not for many.
        assert 0.001 < found.interval[1] < 0.02 and found.interval[0] == -found.interval[1]
        other = compare(same, ~same, expected=1.0)
        assert (
            other.verdict == ("shown" if num_seeds > 1 else "not resolved")
            and other.difference == other.interval[1] == 1.0
            and other.interval[0] > 0.98
        )


def test_two_images_show_nothing():
    row = np.ones((3, 2), bool)
    assert compare(row, ~row, expected=1.0).verdict == "not resolved"


@pytest.mark.parametrize(("num_seeds", "seed"), [(3, 0.02), (5, 0.02), (5, 0.1), (1, 0.0)])
def test_needed_is_about_right(num_seeds, seed):
    # From data whose observed difference happens to be the true one, as `needed` supposes.
    rng = np.random.default_rng(7)
    effect = dict(means=(0.37, 0.25), seed=seed)
    plans = []
    while len(plans) < 41:
        row, baseline, truth = simulate(rng, 20, num_seeds, 150, **effect)
        for a, b in zip(row, baseline):
            if abs((a.mean() - b.mean()) / truth - 1) < 0.15 and (found := compare(a, b)).needed:
                plans.append(found.needed)
    num_images, seeds = sorted(plans, key=lambda plan: plan[0] * plan[1])[20]
    assert (seeds == 1) == (num_seeds == 1) and seeds >= num_seeds and num_images >= 150
    row, baseline, _ = simulate(rng, 200, seeds, num_images, **effect)
    assert 0.35 <= np.mean([f.interval[0] > 0 for f in compare_all(row, baseline, expected=1)]) <= 0.85


def test_needed_is_the_least():
    # One seed, d = 1 on 6 images of 100 and -1 on 2: the mean square on its own is (8 - 16 / 100) / 99.
    row, baseline = np.zeros((2, 1, 100), bool)
    row[0, :6] = baseline[0, 6:8] = True
    found = compare(row, baseline)
    enough = next(
        n
        for n in range(100, 10_000)
        if stats.t.ppf(0.975, n - 1) * math.sqrt(((8 - 0.16) / 99 + 1 / (n - 1)) / n) < 0.04
    )
    assert 180 < enough < 210
    assert found.needed == (10 * math.ceil(enough / 10), 1)


def test_needed_prefers_images_to_seeds_and_gives_up_none():
    # The seeds agree, so images are enough.
    row, baseline = np.zeros((2, 3, 100), bool)
    row[:, :6] = baseline[:, 6:8] = True
    num_images, num_seeds = compare(row, baseline).needed
    assert num_seeds == 3 and 100 < num_images < 400
    # They disagree, with means 0.7, 0.3 and 0, a sample variance of 0.1233, for which the median-unbiased estimate is
    # 0.1233 * 2 / 1.386 = 0.178: t sqrt(0.178 / S) is 0.353 of 8 seeds and 0.324 of 9, where the difference is 1/3.
    row = np.arange(1000) < np.array([[700], [300], [0]])
    assert compare(row, np.zeros_like(row)).needed == (1000, 9)
    assert compare(np.zeros_like(row), row).needed == (1000, 9)


def test_needed_that_is_out_of_reach():
    row = np.zeros((2, 100), bool)
    row[0, :50] = True
    baseline = np.zeros_like(row)
    baseline[1, :49] = True
    found = compare(row, baseline)
    assert found.needed is None and found.not_needed == "no number up to 10,000 images and 100 seeds would"
    # A difference of one image in 100, where the two differ on 61.
    row = np.arange(100)[None] < 31
    baseline = (np.arange(100)[None] >= 31) & (np.arange(100)[None] < 61)
    found = compare(row, baseline)
    assert found.needed is None and found.not_needed == "no number up to 10,000 images and 1 seed would"
    # More images than that at hand.
    row, baseline = (np.tile(array, (1, 120)) for array in (row, row[:, ::-1]))
    assert compare(row, baseline).not_needed == "no difference to resolve"
    row[0, 31] = True
    assert compare(row, baseline).not_needed == "no number up to 12,000 images and 1 seed would"


def test_summary():
    found = comparison.Comparison(0.012, (-0.004, 0.028), "not resolved", 3, 500, (1900, 3), "", True, 0.95)
    assert (
        summary(found)
        == "+1.2 points (95 %: -0.4 to +2.8), 3 seeds x 500 images: not resolved; about 1,900 images and 3 seeds would"
    )
    assert summary(found._replace(verdict="no expectation")).endswith(
        ": may be chance; about 1,900 images and 3 seeds would tell it from 0"
    )
    assert summary(found._replace(verdict="no expectation", interval=(0.004, 0.02), needed=None)).endswith(
        "(95 %: +0.4 to +2.0), 3 seeds x 500 images: more than chance"
    )
    same = np.ones((1, 500), bool)
    assert summary(compare(same, same)).endswith("1 seed x 500 images: may be chance; the two are right equally often")
    assert summary(found._replace(needed=None, not_needed="no number would")).endswith(
        ": not resolved; no number would"
    )
    one = found._replace(
        difference=-0.031, interval=(-0.05, -0.012), verdict="not resolved", num_seeds=1, num_images=10_000, needed=None,
        not_needed="more seeds would have to agree", covers_seeds=False, confidence=0.9,
    )  # fmt: skip
    assert (
        summary(one)
        == "-3.1 points (90 %: -5.0 to -1.2, other seeds not covered), 1 seed x 10,000 images: not resolved; "
        "more seeds would have to agree"
    )


def test_plain_numbers():
    # They go into JSON files.
    found = compare(ROW, BASELINE, expected=1.0)
    values = (found.difference, *found.interval, *(compare(ROW[:1], BASELINE[:1]).needed))
    assert [type(value) for value in values] == [float, float, float, int, int]


@pytest.mark.parametrize(
    ("row", "baseline", "options", "message"),
    [
        (ROW, BASELINE[:1], {}, r"Expected row and baseline of one shape. Received: \(2, 4\) and \(1, 4\)"),
        (ROW, BASELINE[:, :3], {}, "one shape"),
        (ROW.astype(int), BASELINE, {}, "Expected row to be a bool array. Received: dtype int64"),
        (ROW, BASELINE.astype(float), {}, "Expected baseline to be a bool array. Received: dtype float64"),
        (ROW[0], BASELINE[0], {}, r"Expected row \[num_seeds, num_images\] .* Received: \(4,\)"),
        (ROW[:0], BASELINE[:0], {}, r"at least 1 seed and 2 images. Received: \(0, 4\)"),
        (ROW[:, :0], BASELINE[:, :0], {}, r"Received: \(2, 0\)"),
        (ROW[:, :1], BASELINE[:, :1], {}, r"Received: \(2, 1\)"),
        (ROW, BASELINE, {"expected": math.nan}, "Expected a finite expected difference or None. Received: nan"),
        (ROW, BASELINE, {"confidence": 95}, r"Expected a confidence in \(0, 1\). Received: 95"),
        (ROW, BASELINE, {"confidence": 0.0}, "Expected a confidence"),
        (ROW, BASELINE, {"confidence": math.nan}, "Expected a confidence"),
    ],
)
def test_bad_input(row, baseline, options, message):
    with pytest.raises(ValueError, match=message):
        compare(row, baseline, **options)


def test_imports_no_tensorflow():
    nodes = ast.walk(ast.parse(pathlib.Path(comparison.__file__).read_text()))
    names = {n.module if isinstance(n, ast.ImportFrom) else n.names[0].name for n in nodes if hasattr(n, "names")}
    assert names == {"collections.abc", "functools", "math", "typing", "numpy", "scipy"}


@pytest.mark.parametrize(
    "right, at_chance",
    [
        # Of 100 labels in ten classes, a guesser gets 10 +- 3; one in twenty gets 15 or more.
        (14, True),
        (15, False),
        (90, False),
    ],
)
def test_what_chance_is(right, at_chance):
    labels = np.arange(100) % 10
    predictions = np.where(np.arange(100) < right, labels, (labels + 1) % 10)
    assert comparison.is_at_chance(predictions, labels) == at_chance


def test_naming_the_most_frequent_class_is_no_more_than_chance():
    labels = np.r_[np.zeros(60, int), np.arange(40) % 10]
    assert comparison.is_at_chance(np.zeros(100, int), labels)
    assert not comparison.is_at_chance(labels, labels)
