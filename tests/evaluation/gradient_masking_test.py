import functools
import json

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise, threats
from robust_keras.evaluation import gradient_masking

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


def diagnose(logits_fn, x, labels, threat=LINF):
    seeds = noise.example_seeds(0, 0, tf.range(len(x)))
    figures = gradient_masking.diagnose(logits_fn, x, labels, seeds, threat=threat)
    assert figures.keys() == FIGURES
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
        (
            {"logits_spread": 1.0, "zero_gradients": 0.5, "gradient_mismatch": 0.5, "margin_50_steps": -5.0},
            ["randomized_model", "zero_gradients", "gradient_mismatch", "loss_did_not_rise"],
        ),
    ],
)
def test_flags(figures, expected):
    assert gradient_masking.flags({**CLEAN, **figures}) == expected
