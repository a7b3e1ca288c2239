"""What every attack owes its caller, whatever it is given."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from smooth_networks import pictures, predictions, seeds_of, smooth_network

from robust_keras import losses, threats
from robust_keras.attacks import apgd, fab, multi_targeted, pgd, square, step_rules, transfer

pytestmark = pytest.mark.oldest

NORMS = ("Linf", "L2", "L1")
# At which each attack below breaks some of the images.
RADII = {"Linf": 0.08, "L2": 0.8, "L1": 8.0}
SHAPE = (8, 8, 3)
NETWORK = smooth_network(SHAPE, 4)
IMAGES = pictures(SHAPE, 8)
LABELS = predictions(NETWORK, IMAGES)


def pgd_of(**settings):
    settings = dict(loss_fn=losses.cross_entropy, num_steps=5) | settings

    def build(threat):
        return functools.partial(pgd.pgd, threat=threat, **{"step_size": threat.epsilon / 3, **settings})

    return build


def on_surrogate(threat):
    return functools.partial(transfer.transfer, threat=threat, surrogate=NETWORK, attack=ATTACKS["pgd"](threat))


def search(attack, **settings):
    return lambda threat: functools.partial(attack, threat=threat, **settings)


# Each makes an attack of a threat model.
ATTACKS = {
    "pgd": pgd_of(),
    "pgd-restarts": pgd_of(num_restarts=2, loss_fn=losses.dlr),
    "pgd-adam": pgd_of(loss_fn=losses.margin, step_rule=step_rules.adam(), step_size=0.02),
    "multi-targeted": search(multi_targeted.multi_targeted, num_steps=6, num_restarts=1, num_targets=2),
    "apgd-ce": search(apgd.apgd, num_steps=6),
    "apgd-dlr": search(apgd.apgd, num_steps=6, loss_fn=losses.dlr),
    "apgd-t": search(apgd.apgd_targeted, num_steps=6, num_targets=2),
    "fab": search(fab.fab, num_steps=4, num_restarts=2),
    "fab-t": search(fab.fab, num_steps=4, num_restarts=1, num_targets=2, targeted=True),
    "square": search(square.square, num_queries=40),
    "transfer": on_surrogate,
}


@pytest.fixture(params=NORMS)
def threat(request):
    return threats.threat(norm=request.param, epsilon=RADII[request.param])


@pytest.fixture(params=ATTACKS)
def attack(request, threat):
    return ATTACKS[request.param](threat)


def in_a_program(attack, network, x, labels, seeds):
    """What an attack makes of a batch: eagerly some take long."""
    return tf.function(lambda x, labels: attack(network, x, labels, seeds=seeds), autograph=False)(x, labels)


@pytest.mark.parametrize("threat", ["Linf"], indirect=True)
def test_labels_of_one_column_and_one_hot_rows_are_labels(attack):
    # As `keras.datasets` and `to_categorical` give them: of one shape, they would be broadcast to [8, 8].
    expected = in_a_program(attack, NETWORK, IMAGES, LABELS, seeds_of(range(8)))
    assert np.any(predictions(NETWORK, expected) != LABELS)
    for labels in (LABELS[:, None], tf.one_hot(LABELS, 4)):
        x_adv = in_a_program(attack, NETWORK, IMAGES, labels, seeds_of(range(8)))
        np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("threat", ["Linf"], indirect=True)
@pytest.mark.parametrize(
    "x, labels, message",
    [
        (255.0 * IMAGES, LABELS, "images in .0, 1.. Received: values from 0 to 255"),
        (tf.cast(255.0 * IMAGES, tf.uint8), LABELS, "divide bytes by 255. Received: images of uint8"),
        (IMAGES - 0.5, LABELS, "images in .0, 1.. Received: values from -0.5 to 0.5"),
        (IMAGES + np.nan, LABELS, "finite images in .0, 1."),
        (IMAGES, LABELS[:3], "labels of 8 examples, as logits. Received: 3"),
        (IMAGES, tf.tile(LABELS[:, None], (1, 2)), r"Expected labels.* Received: int32 \(8, 2\)"),
        (IMAGES, tf.cast(LABELS, tf.float32), r"Received: float32 \(8,\)"),
    ],
    ids=["255", "bytes", "negative", "nan", "another batch", "two columns", "floats"],
)
def test_refuses(attack, x, labels, message):
    with pytest.raises(ValueError, match=message):
        attack(NETWORK, x, labels, seeds=seeds_of(range(8)))
