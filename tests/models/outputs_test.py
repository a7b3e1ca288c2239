"""What is told of a model's outputs."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.data import sources
from robust_keras.evaluation import evaluate
from robust_keras.models import outputs

THREAT = threats.threat(norm="Linf", epsilon="4/255")


def trained_logits(num_examples=200, num_classes=10, seed=0, high=6.0):
    """As of a trained model: one class stands out by about `high`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(-high / 2, 1.5, (num_examples, num_classes))
    logits[np.arange(num_examples), rng.integers(0, num_classes, num_examples)] += high
    return logits.astype(np.float32)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, tf.bfloat16.as_numpy_dtype])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
def test_a_softmax_is_refused_in_any_precision(dtype, num_classes):
    probabilities = tf.nn.softmax(trained_logits(num_classes=num_classes)).numpy().astype(dtype).astype(np.float32)
    for rows in (probabilities, probabilities[:1]):
        with pytest.raises(ValueError, match="rows that sum to 1; .*--outputs=probabilities"):
            outputs.check(rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("num_classes, high", [(2, 6.0), (10, 6.0), (10, 12.0), (100, 9.0)])
def test_sigmoids_are_refused(dtype, num_classes, high):
    probabilities = sigmoid(trained_logits(num_classes=num_classes, high=high)).astype(dtype).astype(np.float32)
    with pytest.raises(ValueError, match="from 0 to 1, as of sigmoids; .*--outputs=probabilities"):
        outputs.check(probabilities)
    outputs.check(probabilities[:49])  # Too few to tell.


@pytest.mark.parametrize(
    "logits",
    [
        trained_logits(),
        trained_logits(high=60.0),
        1e-12 * trained_logits(),
        np.maximum(trained_logits(), 0.0),
        # Cosines of features that are not negative: the right class near one, the others not near zero.
        np.clip(0.25 + 0.1 * trained_logits(), 0.0, 1.0),
        tf.nn.log_softmax(trained_logits()).numpy(),
    ],
    ids=["plain", "large", "tiny", "rectified", "cosines", "log-softmax"],
)
def test_logits_are_none_of_these(logits):
    outputs.check(logits)


def test_what_lies_between_0_and_1_is_said():
    cosines = np.clip(0.25 + 0.1 * trained_logits(), 0.0, 1.0)
    assert outputs.is_within_0_1(cosines) and outputs.is_within_0_1(cosines[:40])
    assert not outputs.is_within_0_1(cosines[: 49 // cosines.shape[-1]])
    assert not outputs.is_within_0_1(trained_logits()) and not outputs.is_within_0_1(2 * cosines)


def test_log_probabilities():
    outputs.check(np.log(sigmoid(trained_logits())), are_log_probabilities=True)
    outputs.check(tf.nn.log_softmax(trained_logits()).numpy(), are_log_probabilities=True)
    with pytest.raises(
        ValueError, match="Expected probabilities, as --outputs or from_logits says. Received: up to 2.5"
    ):
        outputs.check(np.log(np.float32([[0.5, 2.5]])), are_log_probabilities=True)


def test_log_odds_are_the_logits_of_sigmoids():
    logits = tf.constant([[-30.0, -3.0, 0.0, 2.0, 9.0]])
    with tf.GradientTape() as tape:
        tape.watch(logits)
        log_odds = outputs.log_odds(lambda z: tf.math.log(tf.sigmoid(z)))(logits)
    np.testing.assert_allclose(log_odds, logits, rtol=1e-3)
    np.testing.assert_allclose(tape.gradient(log_odds, logits), tf.ones_like(logits), rtol=1e-2)
    # A probability that is 1 in float32 has none.
    assert np.isfinite(outputs.log_odds(lambda z: tf.math.log(tf.sigmoid(z)))(tf.constant([[40.0]]))).all()


def linear_source(num_examples=60):
    """Grey images, and labels by what a linear model sees in them."""
    rng = np.random.default_rng(0)
    images = rng.integers(100, 156, (num_examples, 4, 4, 1)).astype(np.uint8)
    weights = rng.normal(size=(16, 3)).astype(np.float32)

    def logits_fn(x):
        return 8.0 * tf.reshape(x - 0.5, (-1, 16)) @ weights

    labels = np.argmax(logits_fn(images / np.float32(255)), axis=-1).astype(np.int32)
    return sources.Source("made", images, labels, 3), logits_fn


def robust_accuracy(logits_fn, source):
    attack = functools.partial(pgd, threat=THREAT, loss_fn=losses.cross_entropy, num_steps=10, step_size="1/255")
    found = evaluate.evaluate(logits_fn, source, attacks=[attack], threat=THREAT, batch_size=20, progress=False)
    return found.results["robust_accuracy"], found.results["warnings"]


def test_a_sigmoid_head_of_probabilities_is_attacked_by_its_log_odds(monkeypatch):
    source, logits_fn = linear_source()
    expected, _ = robust_accuracy(logits_fn, source)

    # In the flat part of the sigmoids, whose logarithms have gradients of very different sizes.
    def read(x):
        return tf.math.log(tf.maximum(tf.sigmoid(logits_fn(x) + 5.0), np.finfo(np.float32).tiny))

    read.outputs = "probabilities"
    assert 0.1 < expected < 0.9
    assert robust_accuracy(read, source) == (expected, [])
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "attackable", lambda logits_fn, clean_logits: logits_fn)
        assert robust_accuracy(read, source)[0] > expected
    with pytest.raises(ValueError, match="as of sigmoids"):
        robust_accuracy(lambda x: tf.sigmoid(6 * logits_fn(x) - 9.0), source)
