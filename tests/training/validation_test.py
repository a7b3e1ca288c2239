import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.data import sources
from robust_keras.evaluation.evaluate import correct_under_attack
from robust_keras.training import recipes, validation

ATTACK = functools.partial(
    pgd, threat=threats.threat(norm="L2", epsilon=0.1), loss_fn=losses.margin, num_steps=4, step_size=0.05
)
CORRECT = functools.partial(correct_under_attack, attack=ATTACK)


def looks(network, source, batch_size, **options):
    """What a validation finds, and the images of each batch that it looks at."""
    validator = validation.Validator(
        network, None, source, recipes.Validation(CORRECT, **options), batch_size=batch_size, seed=0
    )
    batches, batch_of = [], validator.batch_of
    validator.batch_of = lambda indices: batches.append(indices.tolist()) or batch_of(indices)
    return validator(lambda: False), batches


@pytest.fixture(scope="module")
def network(make_tiny_model):
    return make_tiny_model()


@pytest.fixture
def source(network):
    """20 images, of which every other one is classified wrongly."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    labels = tf.argmax(network(images / np.float32(255), training=False), axis=-1).numpy().astype(np.int32)
    labels[::2] = (labels[::2] + 1) % 4
    return sources.Source("made", images, labels, 4)


def test_images_that_are_wrong_before_any_attack_are_not_attacked(network, source):
    expected, batches = looks(network, source, 8)
    assert expected["val_clean"] == 0.5 and 0 < expected["val_robust"] < 0.5
    assert len(batches) == 3
    found, batches = looks(network, source, 8, needs_wrong_ones=False)
    assert found == expected
    assert len(batches) == 5 and {k % 2 for batch in batches[3:] for k in batch} == {1}


def test_nothing_is_looked_at_twice_where_that_saves_no_batch(network, source):
    found, batches = looks(network, source, 20, needs_wrong_ones=False)
    assert len(batches) == 1 and found == looks(network, source, 20)[0]


def test_nothing_is_attacked_where_all_is_wrong(network, source):
    right = np.argmax(network(source.images / np.float32(255), training=False), axis=-1)
    wrong = source._replace(labels=((right + 1) % 4).astype(np.int32))
    found, batches = looks(network, wrong, 8, needs_wrong_ones=False)
    assert found == {"val_clean": 0.0, "val_robust": 0.0} and len(batches) == 3


@pytest.mark.parametrize("needs_wrong_ones, num_batches", [(True, 3), (False, 5)])
def test_it_stops_when_it_is_to(network, source, needs_wrong_ones, num_batches):
    how = recipes.Validation(CORRECT, needs_wrong_ones=needs_wrong_ones)
    validator = validation.Validator(network, None, source, how, batch_size=8, seed=0)
    for count in range(num_batches):
        answers = [False] * count + [True]
        assert validator(lambda answers=answers: answers.pop(0)) is None and not answers
