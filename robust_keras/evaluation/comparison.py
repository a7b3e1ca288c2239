"""Is a difference between two training configurations real, or due to the seeds and the test images at hand?

found = comparison.compare(robust, baseline_robust, expected=+1.1)
print(comparison.summary(found))
# +1.2 points (95 %: -0.4 to +2.8), 3 seeds x 500 images: not resolved; about 1,900 images and 3 seeds would
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAX_NUM_IMAGES = 10_000  # Where the search for what would resolve a difference ends: CIFAR-10's test set,
MAX_NUM_SEEDS = 100  # and more trainings than anyone will run.


class Comparison(NamedTuple):
    """What the results of two configurations say about the difference of their accuracies.

    Attributes:
        difference: the mean of `row - baseline`, a fraction of the images, positive where `row` is better.
        interval: (low, high), in which the true difference lies with the given confidence.
        verdict: 'shown' if the interval excludes 0 in the expected direction, 'contradicted' if in the other,
            'not resolved' if it holds 0 or rests on one seed, and 'no expectation' where none was given, whatever the
            interval.
        num_seeds: how many models of each configuration.
        num_images: how many images.
        needed: (num_images, num_seeds), both at least those at hand, with which the interval of a true difference of
            the observed size would be expected to exclude 0 (so that every other time, about, it does): the fewest
            seeds, then the fewest images, to two digits. A guess with two or three seeds, which hardly tell how much
            seeds matter. None if the interval excludes 0 already, or for the reason in `not_needed`.
        not_needed: why `needed` is None although nothing is resolved; '' otherwise.
        covers_seeds: whether the interval speaks of models trained with other seeds. False with one seed, where it is
            about other images only and too narrow for a claim about the configurations.
        confidence: of the interval.
        num_baseline_seeds: how many models of the other configuration, where that is another number (`contrast`).
    """

    difference: float
    interval: tuple[float, float]
    verdict: str
    num_seeds: int
    num_images: int
    needed: tuple[int, int] | None
    not_needed: str
    covers_seeds: bool
    confidence: float
    num_baseline_seeds: int | None = None


class _Variances(NamedTuple):
    """The components of the variance of row - baseline. With one seed, `rest` is a part of `images`."""

    images: float
    seeds: float
    rest: float


def compare(
    row: np.ndarray, baseline: np.ndarray, *, expected: float | None = None, confidence: float = 0.95
) -> Comparison:
    """Compares two configurations by the same images and paired seeds.

    Seeds and images are both samples: d[s, i] = row - baseline is a mean plus random effects of the seed, of the image
    and of the two together, crossed, so that with S seeds and I images

        Var(mean of d) = images / I + seeds / S + rest / (S I).

    The components come from the mean squares of the two-way analysis of variance, the degrees of freedom of Student's t
    from Satterthwaite (1946). With one seed the variance is that of the images alone, and `covers_seeds` is False.

    Args:
        row: bool [num_seeds, num_images], whether the model of each seed is right on each image (clean, or under
            attack).
        baseline: the same for the configuration it is compared with: the same images, in the same order.
        expected: the difference in the paper, in any unit, as its sign alone counts; None or 0 for no expectation.
        confidence: of the interval, in (0, 1).

    Returns:
        A `Comparison`.

    Raises:
        ValueError: for arrays that are not bool, differ in shape or have no seed or fewer than two images, and for an
            expected difference or a confidence that is not a number in its range.
    """
    row, baseline = _checked(row, baseline, expected, confidence)
    num_seeds, num_images = row.shape
    d = row.astype(np.float64) - baseline
    difference = float(d.mean())
    variances = _variances(d)
    half = float(_half_width(variances, num_seeds, num_images, confidence))
    is_resolved = abs(difference) > half
    needed, not_needed = None, ""
    if not is_resolved:
        planned = functools.partial(_half_width, _variances(d, too_low(num_seeds - 1)), confidence=confidence)
        needed, not_needed = least(planned, difference, num_seeds, num_images, num_seeds > 1)
    elif num_seeds == 1:
        not_needed = "more seeds would have to agree"
    return Comparison(
        difference=difference,
        interval=(max(difference - half, -1.0), min(difference + half, 1.0)),
        verdict=verdict(difference, expected, is_resolved and num_seeds > 1),
        num_seeds=num_seeds,
        num_images=num_images,
        needed=needed,
        not_needed=not_needed,
        covers_seeds=num_seeds > 1,
        confidence=confidence,
    )


def _checked(row, baseline, expected, confidence):
    row, baseline = np.asarray(row), np.asarray(baseline)
    for name, array in (("row", row), ("baseline", baseline)):
        if array.dtype != bool:
            raise ValueError(f"Expected {name} to be a bool array. Received: dtype {array.dtype}")
        if array.ndim != 2 or array.shape[0] < 1 or array.shape[1] < 2:
            raise ValueError(
                f"Expected {name} [num_seeds, num_images] of at least 1 seed and 2 images. Received: {array.shape}"
            )
    if row.shape != baseline.shape:
        raise ValueError(f"Expected row and baseline of one shape. Received: {row.shape} and {baseline.shape}")
    check_options(expected, confidence)
    return row, baseline


def check_options(expected: float | None, confidence: float) -> None:
    """Raises ValueError for an expected difference or a confidence that is not a number in its range."""
    if expected is not None and not math.isfinite(expected):
        raise ValueError(f"Expected a finite expected difference or None. Received: {expected}")
    if not 0 < confidence < 1:
        raise ValueError(f"Expected a confidence in (0, 1). Received: {confidence}")


def verdict(difference: float, expected: float | None, is_shown: bool) -> str:
    """`Comparison.verdict`, of an interval that excludes 0 and speaks of other seeds, or not."""
    if not expected:
        return "no expectation"
    if not is_shown:
        return "not resolved"
    return "shown" if (difference > 0) == (expected > 0) else "contradicted"


def summary(comparison: Comparison, *, unit: str = "points") -> str:
    """A comparison as one line for people, in percentage points, or hundredths of another unit."""
    low, high = comparison.interval
    verdict, not_needed = comparison.verdict, comparison.not_needed
    if verdict == "no expectation":
        verdict = "may be chance" if low <= 0 <= high else "more than chance"
    if not comparison.difference and not comparison.needed:
        not_needed = "the two are right equally often"
    against, by_image = comparison.num_baseline_seeds, comparison.num_images > 1
    line = (
        f"{_points(comparison.difference)} {unit} ({100 * comparison.confidence:g} %: {_points(low)} to "
        f"{_points(high)}{'' if comparison.covers_seeds else ', other seeds not covered'}), "
        f"{_count(comparison.num_seeds, 'seed')}{'' if against is None else f' against {against}'}"
        f"{f' x {comparison.num_images:,} images' if by_image else ''}: {verdict}"
    )
    if comparison.needed:
        num_images, num_seeds = comparison.needed
        line += f"; about {f'{num_images:,} images and ' if by_image else ''}{_count(num_seeds, 'seed')} would"
        line += "" if comparison.verdict == "not resolved" else " tell it from 0"
    return line + (f"; {not_needed}" if not_needed else "")


def is_at_chance(predictions: np.ndarray, labels: np.ndarray) -> bool:
    """Whether predictions are right no more often than a guesser is.

    The guesser always names the class that most of these images have, and is as lucky as one in twenty.
    """
    chance = np.bincount(labels).max() / len(labels)
    return bool((predictions == labels).mean() <= luckiest(chance, len(labels)))


def luckiest(chance: float, num_images: int) -> float:
    """The accuracy that one in twenty guessers exceeds, each right on a share `chance` of all images, on so many."""
    return chance + 1.645 * math.sqrt(chance * (1 - chance) / num_images)


def _variances(d, scale_seeds=1.0):
    num_seeds, num_images = d.shape
    of_image, of_seed, mean = d.mean(axis=0), d.mean(axis=1), d.mean()
    ms_images = num_seeds * np.square(of_image - mean).sum() / (num_images - 1)
    if num_seeds == 1:
        return _Variances(ms_images, 0.0, 0.0)
    ms_seeds = scale_seeds * num_images * np.square(of_seed - mean).sum() / (num_seeds - 1)
    rest = np.square(d - of_image - of_seed[:, None] + mean).sum() / ((num_seeds - 1) * (num_images - 1))
    # A negative estimate is chance, and read as 0. So no mean square counts for less than the rest's, and Var(mean) is
    # never below what the images alone, or the seeds alone, would give.
    return _Variances(max(ms_images - rest, 0.0) / num_seeds, max(ms_seeds - rest, 0.0) / num_images, rest)


def _half_width(variances, num_seeds, num_images, confidence):
    """Half the interval's width, of numbers of images as of one."""
    from scipy import stats  # A second to import, which only comparisons need.

    freedom_images = num_images - 1
    # One image more that row wins and one that it loses, of half the weight each (Agresti and Min, 2005): few images
    # on which the two differ, or none, are no proof that there is no variance.
    ms_images = variances.rest + num_seeds * (variances.images + 1 / freedom_images)
    if num_seeds == 1:
        variance, freedom = ms_images, freedom_images
    else:
        freedom_seeds = num_seeds - 1
        ms_seeds = variances.rest + num_images * variances.seeds
        variance = ms_images + ms_seeds - variances.rest
        freedom = variance**2 / (
            ms_images**2 / freedom_images
            + ms_seeds**2 / freedom_seeds
            + variances.rest**2 / (freedom_images * freedom_seeds)
        )
        freedom = np.maximum(freedom, np.minimum(freedom_images, freedom_seeds))
    return stats.t.ppf((1 + confidence) / 2, freedom) * np.sqrt(variance / (num_seeds * num_images))


def too_low(freedom: int) -> float:
    """What a variance of few degrees of freedom is multiplied by to plan with.

    Its distribution is skewed: more often than not it is estimated too low. Plans are made with the estimate that is
    too low half the time.
    """
    from scipy import stats

    return float(freedom / stats.chi2.ppf(0.5, freedom)) if freedom else 1.0


def least(
    half_width: Callable, difference: float, num_seeds: int, num_images: int, can_add_seeds: bool
) -> tuple[tuple[int, int] | None, str]:
    """`Comparison.needed` and `Comparison.not_needed`.

    Args:
        half_width: `(num_seeds, num_images)`, an integer and an array of them, to half the interval's width.
        difference: the observed one.
        num_seeds: at hand, like `num_images`; with one image, models are measured as a whole.
        num_images: of both configurations.
        can_add_seeds: False where the models at hand do not tell how much they differ: no more of them can be planned.
    """
    if not difference:
        return None, "no difference to resolve"
    images = np.array([1])
    if num_images > 1:
        # Two digits are what such a plan is good for.
        images = np.r_[num_images, 10:1000:10, 1000 : MAX_NUM_IMAGES + 1 : 100]
        images = images[images >= num_images]
    last_num_seeds = MAX_NUM_SEEDS if can_add_seeds else num_seeds
    for seeds in range(num_seeds, last_num_seeds + 1):
        # All of them: with more images, seeds are more of the variance, and the interval of few seeds can grow.
        is_enough = half_width(num_seeds=seeds, num_images=images) < abs(difference)
        if is_enough.any():
            return (int(images[is_enough.argmax()]), seeds), ""
    limit = f"{max(MAX_NUM_IMAGES, num_images):,} images and {_count(last_num_seeds, 'seed')}"
    return None, f"no number up to {limit} would"


def _points(fraction):
    return f"{100 * fraction:+.1f}"


def _count(number, noun):
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
