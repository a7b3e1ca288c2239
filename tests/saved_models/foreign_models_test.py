"""Classifiers that other people saved, attacked: gradients must flow through what they wrote."""

import functools
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.square import square
from robust_keras.data import sources
from robust_keras.evaluation import evaluate as evaluation
from robust_keras.saved_models import load

pytestmark = pytest.mark.oldest

ORACLES = pathlib.Path(__file__).parents[1] / "oracles"
LINF = threats.threat(norm="Linf", epsilon="8/255")
SHAPE, NUM_CLASSES = (8, 8, 3), 4


class Foreign(tf.Module):
    """A network of two layers with variables, images NHWC in [0, 1] to logits."""

    def __init__(self):
        super().__init__()
        rng = np.random.default_rng(0)
        size = int(np.prod(SHAPE))
        self.hidden = tf.Variable(rng.normal(0.0, 3.0 * size**-0.5, (size, 16)), dtype=tf.float32)
        self.last = tf.Variable(rng.normal(size=(16, NUM_CLASSES)), dtype=tf.float32)

    def logits(self, x):
        return tf.nn.silu(tf.reshape(x - 0.5, (-1, int(np.prod(SHAPE)))) @ self.hidden) @ self.last

    def save(self, path, signature):
        """Saves `signature(x)` of a batch of any size in the layout that its `shape` says."""
        spec = tf.TensorSpec((None, *getattr(signature, "shape", SHAPE)), tf.float32, name="pixels")
        serve = tf.function(signature, input_signature=[spec])
        tf.saved_model.save(self, str(path), signatures={"serving_default": serve})
        return str(path)


def from_bytes(network):
    return lambda x: {"scores": network.logits(x / 255.0)}


def channels_first(network):
    def signature(x):
        return {"scores": network.logits(tf.transpose(x, (0, 2, 3, 1)))}

    signature.shape = (SHAPE[2], *SHAPE[:2])
    return signature


def probabilities(network):
    return lambda x: {"p": tf.nn.softmax(network.logits(x))}


def several(network):
    return lambda x: {"embedding": x[:, 0, 0], "raw": network.logits(x), "shifted": network.logits(x) + 1.0}


KINDS = {
    "logits": (lambda network: lambda x: {"out": network.logits(x)}, {}),
    "bytes": (from_bytes, {"input_range": (0.0, 255.0)}),
    "NCHW": (channels_first, {"input_layout": "NCHW"}),
    "probabilities": (probabilities, {"outputs": "probabilities"}),
    "several": (several, {"logits_output": "raw"}),
}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(2).integers(0, 256, (10, *SHAPE)).astype(np.uint8)


def evaluate(logits_fn, images, labels, num_classes=NUM_CLASSES, threat=LINF, diagnose=False):
    source = sources.Source("made", images, np.asarray(labels, np.int32), num_classes)
    few = [
        functools.partial(apgd, threat=threat, num_steps=5),
        functools.partial(square, threat=threat, num_queries=10),
    ]
    return evaluation.evaluate(
        logits_fn, source, attacks=few, threat=threat, batch_size=10, individual=True, diagnose=diagnose, progress=False
    )


@pytest.fixture(scope="module")
def live(images):
    """The evaluation of the network itself, before it is saved."""
    network = Foreign()
    return evaluate(network.logits, images, np.argmax(network.logits(images / np.float32(255)), -1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_foreign_model_is_attacked_as_if_it_were_ours(tmp_path, images, live, kind):
    make_signature, options = KINDS[kind]
    network = Foreign()
    logits_fn = load.load_logits_fn(network.save(tmp_path / "model", make_signature(network)), **options)
    labels = np.argmax(network.logits(images / np.float32(255)), -1)
    results, examples = evaluate(logits_fn, images, labels)
    assert results["clean_accuracy"] == 1.0
    for record, own in zip(results["attacks"], live.results["attacks"]):
        assert record["examples_attacked"] == 10
        # Rounding may decide about one.
        assert abs(record["examples_broken"] - own["examples_broken"]) <= 1
    assert results["attacks"][0]["examples_broken"] >= 3
    # What broke the saved model is wrong in the live one: they are one network.
    x_adv = examples["adversarial"][~examples["robust"]]
    margins = losses.margin(network.logits(x_adv), labels[~examples["robust"]]).numpy()
    assert margins.min() > -1e-4
    assert np.abs(examples["adversarial"] - images / np.float32(255)).max() <= LINF.epsilon + 1e-6
    # The logarithm of a probability keeps its gradient where it is not saturated.
    assert ("saturated_examples" in results) == (kind == "probabilities")
    assert results.get("saturated_examples", 0) == 0


def test_a_model_that_takes_integers_is_attacked_as_if_it_took_floats(tmp_path, images, live):
    network = Foreign()
    spec = tf.TensorSpec((None, *SHAPE), tf.uint8, name="pixels")
    serve = tf.function(lambda x: {"out": network.logits(tf.cast(x, tf.float32) / 255.0)}, input_signature=[spec])
    tf.saved_model.save(network, str(tmp_path / "model"), signatures={"serving_default": serve})
    logits_fn = load.load_logits_fn(tmp_path / "model")
    labels = np.argmax(network.logits(images / np.float32(255)), -1)
    results, examples = evaluate(logits_fn, images, labels, diagnose=True)
    on_floats = live.results["attacks"][0]["examples_broken"]
    assert results["attacks"][0]["examples_broken"] >= on_floats - 1 >= 2
    # Differences of less than a byte are rounded away: that they contradict the gradient is no news.
    assert results["diagnosis"]["gradient_mismatch"] > 0.1 and results["diagnosis"]["zero_gradients"] == 0.0
    assert "straight_through_cast" in results["warnings"] and "gradient_mismatch" not in results["warnings"]
    whole = np.round(examples["adversarial"] * 255) / np.float32(255)
    np.testing.assert_array_equal(np.argmax(network.logits(whole), -1) == labels, examples["robust"])


@pytest.mark.parametrize("kind", ["bytes", "NCHW", "probabilities", "several"])
def test_the_wrong_option_shows(tmp_path, images, kind):
    make_signature, _ = KINDS[kind]
    network = Foreign()
    path = network.save(tmp_path / "model", make_signature(network))
    labels = np.argmax(network.logits(images / np.float32(255)), -1)
    if kind == "NCHW":
        options, error, match = {}, Exception, "8,8,3|shape"
    elif kind == "several":
        options, error, match = {}, ValueError, "--logits_output, one of embedding, raw, shifted"
    elif kind == "probabilities":
        options, error, match = {}, ValueError, "--outputs=probabilities"
    else:
        # Too few here to tell by the accuracy: the predictions are others.
        logits_fn = load.load_logits_fn(path)
        assert np.mean(np.argmax(logits_fn(images / np.float32(255)), -1) == labels) < 0.8
        return
    with pytest.raises(error, match=match):
        evaluate(load.load_logits_fn(path, **options), images, labels)


# A model of TensorFlow 2.15.


@pytest.fixture(scope="module")
def recorded():
    with np.load(ORACLES / "tf215.npz") as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def tf215():
    return load.load_logits_fn(ORACLES / "tf215_saved_model")


def test_logits_and_gradients_of_tensorflow_215(tf215, recorded):
    x = tf.constant(recorded["images"], tf.float32) / 255.0
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        logits = tf215(x)
        columns = tf.unstack(logits, axis=-1)
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-5)
    assert np.abs(recorded["gradients"]).max(axis=(2, 3, 4)).min() > 0.01
    for column, expected in zip(columns, recorded["gradients"]):
        np.testing.assert_allclose(tape.gradient(column, x), expected, rtol=0, atol=1e-5)
    # Batches of any size, compiled too.
    compiled = tf.function(tf215)
    for part in (x[:1], x[1:]):
        np.testing.assert_allclose(compiled(part), tf215(part), rtol=0, atol=1e-5)


def test_a_model_of_tensorflow_215_is_attacked(tf215, recorded):
    images, labels = recorded["images"], recorded["logits"].argmax(-1)
    # Its logits are at least 22 bytes from each other, by their gradients.
    threat = threats.threat(norm="Linf", epsilon="48/255")
    results, examples = evaluate(tf215, images, labels, recorded["logits"].shape[-1], threat)
    assert results["clean_accuracy"] == 1.0
    assert results["attacks"][0]["examples_broken"] >= 2
    predictions = np.argmax(tf215(examples["adversarial"]), axis=-1)
    np.testing.assert_array_equal(predictions == labels, examples["robust"])


def test_the_recorded_model_is_small():
    sizes = [path.stat().st_size for path in ORACLES.glob("tf215*/**/*") if path.is_file()]
    assert sum(sizes) + os.path.getsize(ORACLES / "tf215.npz") < 60_000
