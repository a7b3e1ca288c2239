"""Networks of all kinds as functions from images in [0, 1] to logits."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import threats
from robust_keras.models import any_network

pytestmark = pytest.mark.oldest

X = tf.constant(np.random.default_rng(0).random((5, 4, 4, 3)), tf.float32)
DENSE = keras.layers.Dense(3)
DENSE.build((None, 48))


def linear(x):
    return DENSE(tf.reshape(x, (-1, 48)))


def functional(dtype="float32", batch_size=None, preprocess=None, head=None):
    images = keras.Input((4, 4, 3), batch_size=batch_size, dtype=dtype)
    x = preprocess(images) if preprocess else images
    logits = DENSE(keras.layers.Flatten()(x))
    return keras.Model(images, head(logits) if head else logits)


class Subclass(keras.Model):
    def __init__(self):
        super().__init__()
        self.noise, self.flatten = keras.layers.Dropout(0.5), keras.layers.Flatten()

    def call(self, x, training=None):
        return DENSE(self.flatten(self.noise(x, training=training)))


def nested():
    images = keras.Input((4, 4, 3))
    x = keras.layers.RandomFlip()(images)
    return keras.Model(images, functional()(keras.layers.BatchNormalization(epsilon=0.0)(x)))


def in_dictionaries():
    images = keras.Input((4, 4, 3), name="image")
    return keras.Model({"image": images}, {"features": images, "logits": DENSE(keras.layers.Flatten()(images))})


NETWORKS = {
    "functional": (functional, {}),
    "sequential": (lambda: keras.Sequential([keras.layers.Flatten(), DENSE]), {}),
    "subclass, in inference": (Subclass, {}),
    "nested, in inference": (nested, {}),
    "dictionaries": (in_dictionaries, {}),
    "a fixed batch": (lambda: functional(batch_size=2), {}),
    "a layer": (lambda: keras.layers.Lambda(linear), {}),
    "a function": (lambda: linear, {}),
    "a compiled function": (lambda: tf.function(linear, autograph=False), {}),
    "of bytes": (lambda: functional(preprocess=lambda x: x / 255.0), {"bounds": (0, 255)}),
    "of -1 to 1": (lambda: lambda x: linear((x + 1.0) / 2.0), {"bounds": (-1, 1)}),
    "of a softmax": (lambda: functional(head=keras.layers.Softmax()), {"from_logits": False}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_gradients_are_the_networks(name):
    make, options = NETWORKS[name]
    logits_fn = any_network.as_logits_fn(make(), **options)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(X)
        found = any_network.try_out(logits_fn, X, needs_gradients=True), tf.function(logits_fn, autograph=False)(X)
        expected = linear(X)
        differences = [z[:, 1] - z[:, 0] for z in (expected, *found)]  # A softmax shifts logits.
    gradients = [tape.gradient(each, X) for each in differences]
    for logits, difference, gradient in zip(found, differences[1:], gradients[1:]):
        assert logits.dtype == tf.float32 and logits.shape == (5, 3)
        np.testing.assert_allclose(difference, differences[0], atol=1e-5)
        np.testing.assert_allclose(gradient, gradients[0], atol=1e-5)
    assert logits_fn.outputs == ("logits" if options.get("from_logits", True) else "probabilities")
    assert logits_fn.input_range == options.get("bounds", (0, 1)) and not logits_fn.straight_through_cast


def test_logits_are_float32_under_a_mixed_policy():
    images = keras.Input((4, 4, 3))
    mixed = keras.layers.Dense(3, dtype="mixed_bfloat16")
    network = keras.Model(images, mixed(keras.layers.Flatten()(images)))
    assert network.compute_dtype == "float32" and network(X).dtype == tf.bfloat16
    assert any_network.as_logits_fn(network)(X).dtype == tf.float32


def test_a_network_of_integers_is_rounded_and_passes_gradients():
    logits_fn = any_network.as_logits_fn(functional("uint8", preprocess=keras.layers.Rescaling(1 / 255)))
    assert logits_fn.input_range == (0, 255) and logits_fn.straight_through_cast
    with tf.GradientTape() as tape:
        tape.watch(X)
        logits = logits_fn(X)
    np.testing.assert_allclose(logits, linear(np.round(X * 255) / 255), atol=1e-5)
    np.testing.assert_allclose(tape.gradient(logits, X)[0, 0, 0], tf.reduce_sum(DENSE.kernel, -1)[:3], atol=1e-5)


def test_what_a_function_says_of_itself_is_kept():
    def read(x):
        return tf.math.log(tf.nn.softmax(linear(x)))

    read.outputs, read.straight_through_cast, read.batch_size = "probabilities", True, 5
    for from_logits in (True, False):
        logits_fn = any_network.as_logits_fn(read, from_logits=from_logits)
        assert logits_fn.outputs == "probabilities" and logits_fn.straight_through_cast and logits_fn.batch_size == 5
        np.testing.assert_allclose(logits_fn(X), read(X), atol=1e-6)


def two_inputs():
    one, other = keras.Input((4, 4, 3), name="one"), keras.Input((4, 4, 3), name="other")
    return keras.Model([one, other], DENSE(keras.layers.Flatten()(one + other)))


class OfTwo(Subclass):
    def call(self, x, other):
        return DENSE(self.flatten(x + other))


REFUSED = {
    "two inputs": (two_inputs, "one input, the images. Received: one, other in functional"),
    "two arguments": (OfTwo, r"takes images, float32 \(5, 4, 4, 3\), alone. Received: .*other"),
    "two outputs": (lambda: lambda x: (linear(x), linear(x)), r"one output, the logits, .*one of 0, 1. Received: None"),
    "one class": (lambda: lambda x: linear(x)[:, :1], r"at least two classes.*\[1 - p, p\].* Received: .*\(5, 1\)"),
    "maps": (lambda: lambda x: x, r"at least two classes.* Received: an output of shape \(5, 4, 4, 3\)"),
    "another depth": (
        lambda: keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(2)]),
        r"of the network's shape \(4, 4, 1\). Received: \(4, 4, 3\)",
    ),
    "arrays": (lambda: lambda x: linear(x).numpy(), "TensorFlow operations, which returns a tensor. Received: ndarray"),
    "no gradient": (
        lambda: lambda x: tf.one_hot(tf.argmax(linear(x), -1), 3),
        "through which gradients flow; .*square",
    ),
    "other images": (lambda: lambda x: linear(x)[:3], r"logits of each of 5 images. Received: \(3, 3\)"),
    "an error": (lambda: lambda x: tf.matmul(x, tf.ones((5, 7))), "takes images, .* alone. Received: "),
    "a path": (lambda: "runs/at", "a keras.Model or a function .*load_logits_fn opens files. Received: 'runs/at'"),
    "nothing": (lambda: None, "Expected a keras.Model or a function from images to logits. Received: None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_network_is_refused_in_one_line(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        any_network.try_out(any_network.as_logits_fn(make()), X, needs_gradients=True)
    assert str(refusal.value).startswith("Expected ") and "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 600


def beginning_with(*layers):
    return keras.Sequential([keras.Input((4, 4, 3)), *layers, keras.layers.Flatten(), keras.layers.Dense(3)])


def imagenet_preprocessing():
    return keras.layers.Normalization(mean=[123.7, 116.3, 103.5], variance=[58.4**2, 57.1**2, 57.4**2])


@pytest.mark.parametrize(
    "make, bounds, warns",
    [
        (lambda: beginning_with(keras.layers.Rescaling(1 / 255)), (0, 1), True),
        (lambda: beginning_with(keras.layers.Rescaling(1 / 255)), (0, 255), False),
        (lambda: beginning_with(keras.layers.RandomFlip(), keras.layers.Rescaling(1 / 127.5, offset=-1)), (0, 1), True),
        (lambda: beginning_with(beginning_with(keras.layers.Rescaling(1 / 255)).layers[0]), (0, 1), True),
        (lambda: beginning_with(imagenet_preprocessing()), (0, 1), True),
        (lambda: beginning_with(imagenet_preprocessing()), (0, 255), False),
        (lambda: beginning_with(keras.layers.Rescaling(255.0), imagenet_preprocessing()), (0, 1), False),
        (lambda: keras.Sequential([keras.Input((4, 4, 3)), beginning_with(keras.layers.Rescaling(1 / 255))]), (0, 1), True),
        (lambda: beginning_with(keras.layers.Conv2D(2, 1), keras.layers.Rescaling(1 / 255)), (0, 1), False),
        (lambda: beginning_with(keras.layers.Rescaling([1 / 255, 1.0, 1 / 255])), (0, 1), False),
    ],
)  # fmt: skip
def test_bounds_of_which_the_first_layers_leave_nothing_are_warned_of(make, bounds, warns):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        any_network.as_logits_fn(make(), bounds=bounds)
    assert len([warning for warning in told if "say bounds=(0, 255)" in str(warning.message)]) == warns


def test_bounds_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"two finite numbers low < high.* Received: \(1, 0\)"):
        any_network.as_logits_fn(linear, bounds=(1, 0))
    with pytest.raises(ValueError, match=r"a model that takes int32, such as bounds=\(0, 255\). Received: 0.0,1.0"):
        any_network.as_logits_fn(functional("int32"), bounds=(0, 1))


class Trained:
    """What says of its network how it is read."""

    reading = any_network.Reading(linear, (0.0, 255.0), False, threats.threat(norm="L2", epsilon="128/255"))


def test_a_network_is_read_as_what_trains_it_says():
    assert any_network.read(linear) == (linear, (0.0, 1.0), True, None)
    assert any_network.read("runs/at", bounds=[-1, 1], from_logits=False) == ("runs/at", (-1.0, 1.0), False, None)
    assert any_network.read(Trained(), bounds=(0, 255), from_logits=False) is Trained.reading
    assert any_network.as_logits_fn(Trained()).input_range == (0.0, 255.0)
    for contradiction, message in {
        ("bounds", (0, 1)): r"bounds=\(0.0, 255.0\), as the Trained says. Received: bounds=\(0.0, 1.0\)",
        ("from_logits", True): "from_logits=False, as the Trained says. Received: from_logits=True",
    }.items():
        with pytest.raises(ValueError, match=f"^Expected {message}$"):
            any_network.as_logits_fn(Trained(), **dict([contradiction]))


def test_a_threat_model_is_the_one_given_else_the_networks_own():
    own = Trained.reading
    assert own.against(None, None) is own.against("L2", None) is own.threat
    assert own.against(None, "1/255")[:3] == ("L2", 1 / 255, "1/255")
    assert own.against("Linf", "8/255")[:3] == ("Linf", 8 / 255, "8/255")
    for reading, norm, epsilon in [
        (own, "Linf", None),
        (any_network.read(linear), None, None),
        (any_network.read(linear), None, 0.1),
    ]:
        with pytest.raises(ValueError, match="^Expected a threat model, .* Received: norm=.*, epsilon=[^\n]*$"):
            reading.against(norm, epsilon)
