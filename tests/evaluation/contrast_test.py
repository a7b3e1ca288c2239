"""One model against ten, two against three, a drop against nothing: by hand, and by draws with a known truth."""

import math

import numpy as np
import pytest

from robust_keras.evaluation import comparison
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
        if num_row == num_baseline:
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
    for effect in (0.0, -0.05):
        assert share(PROTOCOLS[protocol](rng, effect=effect), "shown") <= 0.05


@pytest.mark.parametrize("protocol, power", zip(PROTOCOLS, (0.9, 0.5, 0.9, 0.8)))
def test_an_effect_is_shown_and_its_reverse_contradicted(no_plans, protocol, power):
    rng = np.random.default_rng(2)
    assert share(PROTOCOLS[protocol](rng, effect=0.4), "shown") >= power
    assert share(PROTOCOLS[protocol](rng, effect=-0.4, draws=200), "contradicted") >= power - 0.1
