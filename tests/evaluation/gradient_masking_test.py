import functools
import json

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, threats
from robust_keras.attacks.attack import Attack
from robust_keras.evaluation import gradient_masking
from robust_keras.models.normalization import batch_norm_mode

LINF = threats.threat(norm="Linf", epsilon="8/255")
FIGURES = {
    "logits_spread",
    "zero_gradients",
    "gradient_mismatch",
    "margin",
    "margin_5_steps",
    "margin_50_steps",
    "non_finite_gradients",
    "batch_dependence",
}
# A classifier of two classes: the margin is that of pixel values around grey, in units of the radius.
UNIT = LINF.epsilon


def of_margin(margin_fn):
    """Logits of an image with one pixel that matters: `margin_fn` of it, in units of the radius away from grey."""

    def logits_fn(x):
        margin = margin_fn((x[:, 0, 0, 0] - 0.5) / UNIT)
        return tf.stack([tf.zeros_like(margin), margin], axis=1)

    return logits_fn


def grey(num_examples=4):
    return tf.fill((num_examples, 2, 2, 1), 0.5), tf.zeros(num_examples, tf.int32)


def diagnose(logits_fn, x, labels, threat=LINF, **options):
    seeds = noise.example_seeds(0, 0, tf.range(len(x)))
    figures, proposed = gradient_masking.diagnose(logits_fn, x, labels, seeds, threat=threat, **options)
    assert len(proposed) == 2 and all(images.shape == x.shape for images in proposed)
    assert all(np.all(threat.distance(images, x) <= threat.epsilon * 1.0001) for images in proposed)
    assert {name for name in figures if ":" not in name} == FIGURES
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    return figures


@pytest.fixture(scope="module")
def tiny(make_tiny_model):
    """A smooth network, images and its predictions."""
    network = functools.partial(make_tiny_model(), training=False)
    x = tf.constant(np.random.default_rng(3).integers(0, 256, (8, 8, 8, 3)) / 255, tf.float32)
    return network, x, tf.argmax(network(x), axis=-1, output_type=tf.int32)


@pytest.mark.parametrize("norm, epsilon", [("Linf", "8/255"), ("L2", 0.5), ("L1", 4.0)])
def test_a_smooth_network_raises_no_flag(tiny, norm, epsilon):
    network, x, labels = tiny
    figures = diagnose(network, x, labels, threats.threat(norm=norm, epsilon=epsilon))
    assert gradient_masking.flags(figures) == []
    assert figures["zero_gradients"] == figures["gradient_mismatch"] == 0.0
    assert figures["logits_spread"] < 1e-6
    # Correct, and less so under attack.
    assert figures["margin"] < 0 and figures["margin_5_steps"] > figures["margin"] + 0.1


def test_figures_by_hand():
    # The margin is s - 2: -2 at grey, -1 a radius away.
    figures = diagnose(of_margin(lambda s: s - 2.0), *grey())
    np.testing.assert_allclose([figures["margin"], figures["margin_5_steps"]], [-2.0, -1.0], atol=1e-5)
    np.testing.assert_allclose(figures["margin_50_steps"], -1.0, atol=1e-5)
    assert (figures["logits_spread"], figures["zero_gradients"], figures["gradient_mismatch"]) == (0.0, 0.0, 0.0)
    assert gradient_masking.flags(figures) == []


def test_quantised_input_has_no_gradient(tiny):
    network, x, _ = tiny

    def quantised(x):
        return network(tf.round(x * 15.0) / 15.0)

    figures = diagnose(quantised, x, tf.argmax(quantised(x), axis=-1, output_type=tf.int32))
    assert figures["zero_gradients"] == 1.0 and figures["gradient_mismatch"] == 0.0
    # With no gradient, no attack of gradients goes anywhere.
    assert gradient_masking.flags(figures) == ["zero_gradients", "loss_did_not_rise"]


def test_the_share_without_a_gradient():
    # Flat for the first of four, whose other pixel is black.
    x, labels = grey()
    x = tf.tensor_scatter_nd_update(x, [[0, 1, 1, 0]], [0.0])

    def logits_fn(x):
        margin = tf.where(x[:, 1, 1, 0] > 0.25, (x[:, 0, 0, 0] - 0.5) / UNIT, 0.0) - 2.0
        return tf.stack([tf.zeros_like(margin), margin], axis=1)

    figures = diagnose(logits_fn, x, labels)
    assert figures["zero_gradients"] == 0.25
    assert gradient_masking.flags(figures) == ["zero_gradients"]


@tf.custom_gradient
def straight_through(x):
    return tf.round(x * 15.0) / 15.0, lambda dy: dy


@tf.custom_gradient
def reversed_gradient(x):
    return tf.identity(x), lambda dy: -dy


@tf.custom_gradient
def tenfold_gradient(x):
    return tf.identity(x), lambda dy: 10.0 * dy


@tf.custom_gradient
def noisy_gradient(x):
    signs = tf.where(tf.range(tf.size(x)) % 2 == 0, 1.0, -1.0)
    return tf.identity(x), lambda dy: dy * tf.reshape(signs, tf.shape(x))


@pytest.mark.parametrize("wrong", [straight_through, reversed_gradient, tenfold_gradient, noisy_gradient])
def test_a_wrong_gradient_is_a_mismatch(tiny, wrong):
    network, x, _ = tiny

    def logits_fn(x):
        return network(wrong(x))

    figures = diagnose(logits_fn, x, tf.argmax(logits_fn(x), axis=-1, output_type=tf.int32))
    assert figures["gradient_mismatch"] > 0.5 and figures["zero_gradients"] == 0.0
    assert "gradient_mismatch" in gradient_masking.flags(figures)


def test_a_large_network_by_scale_is_no_mismatch(tiny):
    # Nothing but the units of the logits changes; the softmax of these is one-hot.
    network, x, labels = tiny
    for factor in (1e4, 1e-4):
        figures = diagnose(lambda x: factor * network(x), x, labels)  # noqa: B023
        assert gradient_masking.flags(figures) == []


def test_a_randomised_network(tiny):
    network, x, labels = tiny
    generator = tf.random.Generator.from_seed(0)

    def randomised(x):
        return network(x + generator.normal(x.shape, stddev=0.02))

    figures = diagnose(randomised, x, labels)
    assert figures["logits_spread"] > 1e-3
    assert "randomized_model" in gradient_masking.flags(figures)


def test_a_loss_that_falls_under_fine_steps():
    # A hill a tenth of the radius away, a valley, and a slope up from .3: fine steps of .04 end on the hill, and coarse
    # steps of .4 leap over both.
    def margin(s):
        return tf.where(s < 0.1, s, tf.where(s < 0.25, 0.2 - s, 2.0 * s - 0.55)) - 4.0

    figures = diagnose(of_margin(margin), *grey())
    np.testing.assert_allclose(figures["margin_5_steps"], 2.0 - 0.55 - 4.0, atol=1e-4)
    assert figures["margin_50_steps"] < -3.85
    assert gradient_masking.flags(figures) == ["loss_did_not_rise"]


def test_a_batch_of_one(tiny):
    network, x, labels = tiny
    assert gradient_masking.flags(diagnose(network, x[:1], labels[:1])) == []


def test_black_and_white_pixels_count_not():
    # Half of the pixels are black or white, with no room on one side.
    x = tf.constant(np.random.default_rng(0).integers(0, 2, (8, 2, 2, 3)), tf.float32)
    x = tf.tensor_scatter_nd_update(x, [[k, 0, 0, 0] for k in range(8)], [0.5] * 8)

    def logits_fn(x):
        # Beyond the range there is nothing to differentiate: a clip has no slope.
        margin = tf.reduce_sum(tf.clip_by_value(x, 0.0, 1.0), axis=(1, 2, 3)) - 20.0
        return tf.stack([tf.zeros_like(margin), margin], axis=1)

    figures = diagnose(logits_fn, x, tf.zeros(8, tf.int32))
    assert figures["gradient_mismatch"] == 0.0


@pytest.fixture(scope="module")
def of_eight(tiny):
    network, x, labels = tiny
    return diagnose(network, x, labels, batch_size=8)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_the_size_of_the_batch_changes_no_figure(tiny, of_eight, batch_size):
    network, x, labels = tiny
    other = diagnose(network, x, labels, batch_size=batch_size)
    for name, figure in of_eight.items():
        np.testing.assert_allclose(other[name], figure, rtol=1e-4, atol=1e-6, err_msg=name)
    assert gradient_masking.flags(other) == []


# The loss of each attack.


def attacks_of(*losses_and_names):
    return [Attack(name, None, {}, None, None, loss_fn) for name, loss_fn in losses_and_names]


def test_an_attack_whose_loss_has_no_gradient_is_named(tiny):
    network, x, labels = tiny
    attacks = attacks_of(("apgd-ce", losses.cross_entropy), ("pgd", losses.margin), ("square", None))
    figures = diagnose(network, x, labels, attacks=attacks)
    assert figures["zero_gradients:apgd-ce"] == figures["zero_gradients:pgd"] == 0.0
    assert gradient_masking.flags(figures) == [] and "zero_gradients:square" not in figures
    # The softmax of these is one-hot, in float32 to the last bit: no gradient of the cross-entropy, all of the margin.
    figures = diagnose(lambda x: 1e5 * network(x), x, labels, attacks=attacks)
    assert (
        figures["zero_gradients:apgd-ce"] >= 0.5 and figures["zero_gradients:pgd"] == figures["zero_gradients"] == 0.0
    )
    assert gradient_masking.flags(figures) == ["zero_gradients"]
    assert gradient_masking.without_gradients(figures) == ["apgd-ce"]


def test_of_attacks_of_one_name_the_worse_counts(tiny):
    network, x, labels = tiny
    for order in (1, -1):
        attacks = attacks_of(("pgd", losses.margin), ("pgd", lambda logits, labels: 0.0 * logits[:, 0]))[::order]
        assert diagnose(network, x, labels, attacks=attacks)["zero_gradients:pgd"] == 1.0


def test_gradients_that_are_no_numbers():
    # A square root has an infinite slope at 0: of the first of four images, one pixel is black.
    x, labels = grey()
    x = tf.tensor_scatter_nd_update(x, [[0, 1, 1, 0]], [0.0])

    def logits_fn(x):
        margin = tf.reduce_sum(tf.sqrt(x), axis=(1, 2, 3)) - 8.0
        return tf.stack([tf.zeros_like(margin), margin], axis=1)

    figures = diagnose(logits_fn, x, labels)
    assert figures["non_finite_gradients"] == 0.25 and figures["zero_gradients"] == 0.0
    assert "non_finite_gradients" in gradient_masking.flags(figures)


# Images whose logits depend on others.


def with_batch_statistics(make_tiny_model):
    network = make_tiny_model()

    def logits_fn(x):
        with batch_norm_mode("batch"):
            return network(x, training=True)

    return logits_fn


@pytest.fixture
def no_steps(monkeypatch):
    """Leaves the two attacks out, which take longest, where other figures are looked at."""

    def attacked(logits_fn, threat, num_steps, x, labels, seeds):
        return x, 0.0 * logits_fn(x)[:, 0]

    monkeypatch.setattr(gradient_masking, "_attacked", attacked)


@pytest.mark.parametrize("num_examples, batch_size", [(8, 2), (8, 4), (8, 8), (8, 32), (1, 4), (3, 2), (8, 1), (1, 1)])
def test_a_model_of_batch_statistics(make_tiny_model, tiny, no_steps, num_examples, batch_size):
    network, x, labels = tiny
    x, labels = x[:num_examples], labels[:num_examples]
    figures = diagnose(with_batch_statistics(make_tiny_model), x, labels, batch_size=batch_size)
    assert figures["batch_dependence"] > 0.05
    assert "batch_dependent_model" in gradient_masking.flags(figures)
    assert diagnose(network, x, labels, batch_size=batch_size)["batch_dependence"] < 1e-4


def test_rounding_is_no_dependence(tiny, no_steps):
    network, x, labels = tiny
    for dtype in (tf.float16, tf.bfloat16):

        def rounded(x):
            return tf.cast(tf.cast(network(x) + 1e-4 * tf.cast(x.shape[0], tf.float32), dtype), tf.float32)  # noqa: B023

        for batch_size in (1, 8):
            figures = diagnose(rounded, x, labels, batch_size=batch_size)
            assert "batch_dependent_model" not in gradient_masking.flags(figures)


def test_a_model_that_takes_one_size_alone(tiny):
    network, x, labels = tiny
    for size in (1, 4):

        def fixed(x):
            return network(tf.ensure_shape(x, (size, 8, 8, 3)))  # noqa: B023

        figures = diagnose(fixed, x, labels, batch_size=size, takes_other_sizes=False)
        assert gradient_masking.flags(figures) == []


@pytest.mark.parametrize("num_examples", [1, 2, 3])
def test_a_model_without_any_numbers(num_examples):
    # Nothing is finite but the clean logits.
    x, labels = grey(num_examples)

    def undefined(x):
        margin = tf.where(tf.equal(x[:, 0, 0, 0], 0.5), -1.0, np.nan)
        return tf.stack([tf.zeros_like(margin), margin], axis=1)

    figures = diagnose(undefined, x, labels)
    assert set(gradient_masking.flags(figures)) <= {"zero_gradients", "loss_did_not_rise", "gradient_mismatch"}


CLEAN = {
    "logits_spread": 0.0,
    "zero_gradients": 0.0,
    "gradient_mismatch": 0.0,
    "margin": -3.0,
    "margin_5_steps": -1.0,
    "margin_50_steps": -0.9,
}


@pytest.mark.parametrize(
    "figures, expected",
    [
        ({}, []),
        ({"logits_spread": 1.1e-4}, ["randomized_model"]),
        ({"logits_spread": 0.9e-4}, []),
        ({"zero_gradients": 1 / 32}, ["zero_gradients"]),
        ({"gradient_mismatch": 0.11}, ["gradient_mismatch"]),
        ({"gradient_mismatch": 0.1}, []),
        # Up to half of what five steps gained, 2, may be lost.
        ({"margin_50_steps": -1.99}, []),
        ({"margin_50_steps": -2.01}, ["loss_did_not_rise"]),
        # A radius of zero.
        ({"margin_5_steps": -3.0, "margin_50_steps": -3.0}, []),
        ({"margin_5_steps": -4.0, "margin_50_steps": -3.1}, ["loss_did_not_rise"]),
        ({"margin_5_steps": -4.0, "margin_50_steps": -2.0}, []),
        ({"margin_50_steps": None}, ["loss_did_not_rise"]),
        ({"zero_gradients:pgd": 0.0, "non_finite_gradients": 0.0, "batch_dependence": 0.9e-2}, []),
        ({"zero_gradients:pgd": 1 / 32}, ["zero_gradients"]),
        ({"non_finite_gradients": 1 / 32}, ["non_finite_gradients"]),
        ({"batch_dependence": 1.1e-2}, ["batch_dependent_model"]),
        ({"batch_dependence": None}, ["batch_dependent_model"]),
        ({"batch_dependence": 0.5, "logits_spread": 0.5}, ["randomized_model"]),
        (
            {"logits_spread": 1.0, "zero_gradients": 0.5, "gradient_mismatch": 0.5, "margin_50_steps": -5.0},
            ["randomized_model", "zero_gradients", "gradient_mismatch", "loss_did_not_rise"],
        ),
    ],
)
def test_flags(figures, expected):
    assert gradient_masking.flags({**CLEAN, **figures}) == expected
