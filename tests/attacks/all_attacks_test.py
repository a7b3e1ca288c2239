"""What every attack owes its caller, whatever it is given."""

import functools

import numpy as np
import pytest
import tensorflow as tf
from smooth_networks import pictures, predictions, seeds_of, smooth_network

from robust_keras import losses, threats
from robust_keras.attacks import step_rules, stepwise, transfer
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.fab import fab
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square

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
        return functools.partial(pgd, threat=threat, **{"step_size": threat.epsilon / 3, **settings})

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
    "multi-targeted": search(multi_targeted, num_steps=6, num_restarts=1, num_targets=2),
    "apgd-ce": search(apgd, num_steps=6),
    "apgd-dlr": search(apgd, num_steps=6, loss_fn=losses.dlr),
    "apgd-t": search(apgd_targeted, num_steps=6, num_targets=2),
    "fab": search(fab, num_steps=4, num_restarts=2),
    "fab-t": search(fab, num_steps=4, num_restarts=1, num_targets=2, targeted=True),
    "square": search(square, num_queries=40),
    "transfer": on_surrogate,
}


@pytest.fixture(params=NORMS)
def threat(request):
    return threats.threat(norm=request.param, epsilon=RADII[request.param])


@pytest.fixture(params=ATTACKS)
def name(request):
    return request.param


@pytest.fixture
def attack(name, threat):
    return ATTACKS[name](threat)


def network_of(x, *, factor=1.0, power=1.0, level=-1.0):
    """`factor` times the logits of the images to a `power`; numbers where the first pixel is above a `level`."""
    return factor * NETWORK(x**power) + 0.0 * tf.math.log(x[:, 0, 0, :1] - level)


@functools.cache
def program(name, norm):
    """An attack on `network_of`, traced once for all tests: `(x, labels, **settings of the network) -> x_adv`."""
    attack = ATTACKS[name](threats.threat(norm=norm, epsilon=RADII[norm]))

    def run(x, labels, settings):
        return attack(functools.partial(network_of, **settings), x, labels, seeds=seeds_of(range(8)))

    run = tf.function(run, autograph=False)

    def call(x, labels, **settings):
        settings = {"factor": 1.0, "power": 1.0, "level": -1.0} | settings
        return run(x, labels, {key: tf.constant(value, tf.float32) for key, value in settings.items()})

    return call


def test_labels_of_one_column_and_one_hot_rows_are_labels(name):
    # As `keras.datasets` and `to_categorical` give them: of one shape, they would be broadcast to [8, 8].
    run = program(name, "Linf")
    expected = run(IMAGES, LABELS)
    assert np.any(predictions(NETWORK, expected) != LABELS)
    forms = [LABELS[:, None]]
    if name in ("pgd", "transfer", "apgd-ce"):  # The others are searches too.
        forms.append(tf.one_hot(LABELS, 4))
    for labels in forms:
        np.testing.assert_allclose(run(IMAGES, labels), expected, rtol=0, atol=1e-6)


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


# --- Numbers that are none

# Bright, black and in between: the third of the pixels is 0, where a root has no slope.
DARK = tf.constant(np.where(np.arange(8 * 192).reshape(8, *SHAPE) % 3 == 0, 0.0, IMAGES), tf.float32)


def with_gamma(power):
    return lambda x: NETWORK(x**power)


def distances(x_adv, x, norm):
    order = {"Linf": np.inf, "L2": 2, "L1": 1}[norm]
    return np.linalg.norm(np.reshape(x_adv - x, (len(x), -1)).astype(np.float64), order, axis=1)


def assert_allowed(x_adv, x, threat):
    assert np.all(np.isfinite(x_adv))
    assert np.min(x_adv) >= 0.0 and np.max(x_adv) <= 1.0
    assert np.all(distances(x_adv, x, threat.norm) <= threat.epsilon * (1 + 1e-5))


@pytest.mark.oldest
def test_a_gradient_that_is_no_number_stops_no_attack(name, threat):
    power = 1 / 2.2 if threat.norm == "L2" else 0.5
    network = functools.partial(network_of, power=power)
    labels = predictions(network, DARK)
    with tf.GradientTape() as tape:
        tape.watch(DARK)
        margin = losses.margin(network(DARK), labels)
    assert not np.any(np.all(np.isfinite(tape.gradient(margin, DARK)), axis=(1, 2, 3)))
    x_adv = program(name, threat.norm)(DARK, labels, power=power)
    assert_allowed(x_adv, DARK, threat)
    assert np.all(np.isfinite(network(x_adv)))
    # What is left of the gradient shows the way.
    assert np.mean(predictions(network, x_adv) != labels) >= 0.25


@pytest.mark.parametrize(
    "name", [name for name in ATTACKS if hasattr(ATTACKS[name](threats.threat(norm="L2", epsilon=1)).func, "search")]
)
def test_no_search_proposes_what_is_no_image(name, threat):
    # Not only what it breaks: all that an evaluation is shown.
    network, bound = with_gamma(0.5), ATTACKS[name](threat)
    labels = predictions(network, DARK)
    search = bound.func.search(**bound.keywords)
    progress = stepwise.begin(search, DARK, labels, network(DARK), seeds_of(range(8)), tf.zeros_like(labels))
    step = tf.function(functools.partial(search.step, network), autograph=False)
    state = progress.state
    for k in range(min(search.num_steps, 8)):
        state, x_adv, broken = step(DARK, labels, state, tf.fill((8,), k))
        assert_allowed(x_adv, DARK, threat)
        np.testing.assert_array_equal(broken & (predictions(network, x_adv) == labels), np.zeros(8, bool))


def test_logits_that_are_no_numbers_are_broken_by_images(name, threat):
    # Logarithms of black pixels; images without any stay what they are.
    network = functools.partial(network_of, level=0.05)
    x = tf.concat([tf.fill((8, 1, 1, 3), 0.08), IMAGES[:, :1, 1:]], axis=2)
    x = tf.concat([x, IMAGES[:, 1:]], axis=1)
    assert np.all(np.isfinite(network(x)))
    x_adv = program(name, threat.norm)(x, predictions(network, x), level=0.05)
    assert_allowed(x_adv, x, threat)


def test_a_loss_that_is_no_number_is_never_the_best(threat):
    # It is none at the start, where its gradient has numbers all the same; the network has them everywhere.
    def loss_fn(logits, labels):
        margin = losses.margin(logits, labels)
        return margin + tf.stop_gradient(tf.where(margin < -0.3, np.nan, 0.0))

    search = apgd.search(threat=threat, loss_fn=loss_fn, num_steps=12)
    clean_logits = NETWORK(IMAGES)
    state = stepwise.begin(search, IMAGES, LABELS, clean_logits, seeds_of(range(8)), tf.zeros_like(LABELS)).state
    step = tf.function(functools.partial(search.step, NETWORK), autograph=False)
    seen = []
    for k in range(search.num_steps):
        state, x_adv, _ = step(IMAGES, LABELS, state, tf.fill((8,), k))
        seen.append(loss_fn(NETWORK(x_adv), LABELS))
    began_without = np.isnan(seen[0]) & np.any(np.isfinite(seen), axis=0)
    assert np.any(began_without)
    highest = np.nanmax(np.stack(seen)[:, began_without], axis=0)
    np.testing.assert_allclose(state["loss_best"][began_without], highest, rtol=1e-4, atol=1e-5)


# --- Scales of logits

# Of a cross-entropy, tiny logits leave too little to compare, and of huge ones no gradient at all.
OF_CROSS_ENTROPY = {"pgd", "apgd-ce", "transfer"}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in OF_CROSS_ENTROPY], indirect=True)
def test_the_scale_of_logits_changes_no_verdict(name, threat):
    plain, small, large = (
        predictions(NETWORK, program(name, threat.norm)(IMAGES, LABELS, factor=factor)) != LABELS
        for factor in (1.0, 1e-12, 1e6)
    )
    assert np.any(plain)
    np.testing.assert_array_equal(small, plain)
    np.testing.assert_array_equal(large, plain)
