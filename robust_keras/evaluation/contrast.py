"""Is a difference between few and many models, or of one configuration from a number, more than chance?

    row = contrast.Group(right, chosen_of=2)                       # One model, which validation preferred to another,
    baseline = contrast.Group(right_of_ten, -1, validation=accuracies)                       # against ten.
    print(comparison.summary(contrast.compare([row, baseline], expected=+1.1)))
    # +1.2 points (95 %: +0.2 to +2.2), 1 seed against 10 x 10,000 images: shown

`comparison.compare` is for as many models on one side as on the other.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from robust_keras.evaluation import comparison

# The variance of seeds counts so much in a configuration with one model, which borrows it: seeds may matter more in it.
BORROWED = 2
FEWEST_FREEDOM = 2  # Of one degree of freedom, six in a hundred are.


class Group(NamedTuple):
    """Models of one configuration.

    Attributes:
        values: `[num_models, num_images]`, what is measured of each model on each image, such as whether it is right;
            the same images in all groups. Of one column, models are measured as a whole.
        sign: +1 or -1, with which the group's mean enters the contrast; 0 for models that only tell how much seeds
            matter.
        chosen_of: of how many models validation has chosen the one that is here; 1 where there was no choice.
        validation: `[num_models]`, accuracies by which that choice would be made among these; None where not known.
    """

    values: np.ndarray
    sign: int = 1
    chosen_of: int = 1
    validation: Sequence[float] | None = None


class _Parts(NamedTuple):
    """What the variance of a contrast of means is made of.

    Attributes:
        images: of one image's contrast, what would be left of it with any number of models.
        rest: of a model on an image, beyond what either is alone.
        seeds: of a model's mean, beyond its part of `rest`; of all groups together.
        own: the same of each group that counts, None of one with a single model.
        freedom_of_others: degrees of freedom that groups that do not count add to `seeds`.
    """

    images: float
    rest: float
    seeds: float
    own: tuple[float | None, ...]
    freedom_of_others: int


def compare(
    groups: Sequence[Group], *, expected: float | None = None, offset: float = 0.0, confidence: float = 0.95
) -> comparison.Comparison:
    """Compares one or two configurations by whatever models there are of each, with one another or with a number.

    The contrast is the mean of the one group less that of the other. As in `comparison.compare`, seeds and images are
    samples, and images are paired; seeds are not. With weights w of the models,

        Var(contrast) = images / I + sum(w^2) (seeds + rest / I).

    One model does not tell how much its seed matters: the models of all groups do together, as if the variance of seeds
    were the same in each, and `BORROWED` times as much in one with a single model. Where each side has two models or
    more, a second interval takes each side's own spread, and the wider one counts. Degrees of freedom are those of
    Satterthwaite (1946).

    Validation chooses the better of two models, and so flatters a side of which it has: that side is then compared
    with the mean of the better ones, by validation, of all pairs of the other's models. Where nothing distinguishes the
    two configurations, that is what the chosen model is expected to be.

    Args:
        groups: those that count, one or two, the first with the sign +1 and the second with -1, and any of sign 0.
        expected: see `comparison.compare`, like `confidence`.
        offset: a number that is taken off the contrast, a fraction as they are.

    Returns:
        A `Comparison`. It is resolved only where the groups have `FEWEST_FREEDOM` models more than there are groups,
        where a choice by validation can be allowed for, and where models that are measured as a whole differ at all.

    Raises:
        ValueError: for arrays of other shapes, and for what `comparison.compare` refuses.
    """
    values = _checked(groups, expected, confidence)
    signed = [k for k, group in enumerate(groups) if group.sign]
    weights, allowed_for = _weights(groups)
    contrast = sum(groups[k].sign * weights[k] @ values[k] for k in signed)
    difference, num_images = float(contrast.mean()) - offset, values[0].shape[1]
    counts = [len(values[k]) for k in signed]
    shares = [float(np.square(weights[k]).sum()) * _borrowed(len(values[k])) for k in signed]
    freedom = sum(len(array) - 1 for array in values)
    half = float(_half_width(_parts(groups, values, shares, contrast), counts, shares, num_images, confidence))
    covers_seeds = freedom >= FEWEST_FREEDOM and allowed_for and half > 0
    is_resolved = abs(difference) > half
    needed, not_needed = None, "" if covers_seeds else "more seeds would have to agree"
    if not is_resolved:
        parts = _parts(groups, values, shares, contrast, comparison.too_low(freedom))
        planned = functools.partial(_planned, parts, counts, confidence)
        needed, not_needed = comparison.least(planned, difference, min(counts), num_images, covers_seeds)
    bound = 1.0 if num_images > 1 else math.inf
    return comparison.Comparison(
        difference=difference,
        interval=(max(difference - half, -bound), min(difference + half, bound)),
        verdict=comparison.verdict(difference, expected, is_resolved and covers_seeds),
        num_seeds=counts[0],
        num_images=num_images,
        needed=needed,
        not_needed=not_needed,
        covers_seeds=covers_seeds,
        confidence=confidence,
        num_baseline_seeds=counts[1] if len(counts) > 1 else None,
    )


def better_of(validation: Sequence[float], chosen_of: int) -> np.ndarray:
    """How often each of some models is the one that validation prefers among `chosen_of` of them drawn at random.

    Of equals the first is preferred, as `study.runs` does.

    Args:
        validation: `[num_models]`, accuracies.
        chosen_of: at most as many.

    Returns:
        float `[num_models]`, of the sum 1.
    """
    num_models, weights = len(validation), np.zeros(len(validation))
    for rank, model in enumerate(np.argsort(-np.asarray(validation, float), kind="stable")):
        weights[model] = math.comb(num_models - 1 - rank, chosen_of - 1) / math.comb(num_models, chosen_of)
    return weights


def _checked(groups, expected, confidence):
    comparison.check_options(expected, confidence)
    signs = [group.sign for group in groups if group.sign]
    if signs not in ([1], [1, -1]):
        raise ValueError(f"Expected one group of sign 1, and at most one of -1 after it. Received: {signs}")
    values = [np.asarray(group.values, float) for group in groups]
    for array in values:
        if array.ndim != 2 or not all(array.shape) or array.shape[1] != values[0].shape[1]:
            shapes = ", ".join(str(each.shape) for each in values)
            raise ValueError(f"Expected groups [num_models, num_images] of the same images. Received: {shapes}")
    return values


def _weights(groups):
    """The weights of each group's models, and whether they allow for every choice that validation has made."""
    weights, allowed_for = [], True
    for group in groups:
        others = [each for each in groups if each.sign * group.sign < 0]
        chosen_of = max((each.chosen_of for each in others), default=1) if group.chosen_of == 1 else 1
        num_models = len(group.values)
        if chosen_of > 1 and (group.validation is None or num_models < chosen_of):
            allowed_for = False
        if chosen_of > 1 and allowed_for:
            weights.append(better_of(group.validation, chosen_of))
        else:
            weights.append(np.full(num_models, 1 / num_models))
    return weights, allowed_for


def _parts(groups, values, shares, contrast, scale=1.0):
    """The `_Parts`, the spread of seeds times `scale`."""
    num_images = len(contrast)
    spreads = [scale * array.mean(axis=1).var(ddof=1) if len(array) > 1 else None for array in values]
    freedoms = [len(array) - 1 for array in values]
    pooled = sum(n * spread for n, spread in zip(freedoms, spreads) if n) / max(sum(freedoms), 1)
    others = sum(n for n, group in zip(freedoms, groups) if not group.sign)
    rest = images = 0.0
    if num_images > 1:  # Else models are measured as a whole.
        of_both = (array - array.mean(axis=0) - array.mean(axis=1)[:, None] + array.mean() for array in values)
        squares = sum(float(np.square(each).sum()) for each in of_both)
        rest = squares / (max(sum(freedoms), 1) * (num_images - 1))
        # One image more that each side wins, of half the weight, as in `comparison.compare`.
        images = max(float(contrast.var(ddof=1)) + 1 / (num_images - 1) - sum(shares) * rest, 0.0)
    # A negative estimate is chance, and read as 0.
    own = (None if each is None else max(each - rest / num_images, 0.0) for each in spreads)
    counting = tuple(each for each, group in zip(own, groups) if group.sign)
    return _Parts(images, rest, max(pooled - rest / num_images, 0.0), counting, others)


def _half_width(parts, counts, shares, num_images, confidence):
    """Half the interval's width, of numbers of images as of one.

    Args:
        parts: a `_Parts`.
        counts: models of each group that counts.
        shares: the sum of their squared weights.
        num_images: an integer, or an array of them.
        confidence: of the interval.
    """
    freedom = parts.freedom_of_others + sum(count - 1 for count in counts)
    widths = [_half(parts, [(sum(shares), parts.seeds, freedom)], num_images, confidence)]
    if min(counts) > 1:
        own = [parts.seeds if seeds is None else seeds for seeds in parts.own]
        apart = [(share, seeds, count - 1) for share, seeds, count in zip(shares, own, counts)]
        widths.append(_half(parts, apart, num_images, confidence))
    return np.max(widths, axis=0)


def _planned(parts, counts, confidence, num_seeds, num_images):
    """The same with at least so many models of each group that counts, all of them evaluated."""
    more = [max(count, num_seeds) for count in counts]
    return _half_width(parts, more, [_borrowed(count) / count for count in more], num_images, confidence)


def _borrowed(count):
    return BORROWED if count == 1 else 1


def _half(parts, spreads, num_images, confidence):
    """The same for seeds of some spreads: (sum of squared weights, variance, degrees of freedom) of each."""
    from scipy import special  # Not for those who compare nothing.

    of_rest, freedom_images = parts.rest / num_images, np.maximum(num_images - 1, 1)
    images = parts.images / num_images + sum(share for share, *_ in spreads) * of_rest
    variance, squares, least = images, images**2 / freedom_images, freedom_images
    for share, seeds, freedom in spreads:
        if freedom:
            variance = variance + share * seeds
            squares = squares + (share * (seeds + of_rest)) ** 2 / freedom
            squares = squares + (share * of_rest) ** 2 / (freedom * freedom_images)
            least = np.minimum(least, freedom)
    freedom = np.maximum(variance**2 / np.maximum(squares, np.finfo(float).tiny), least)
    return special.stdtrit(freedom, (1 + confidence) / 2) * np.sqrt(variance)
