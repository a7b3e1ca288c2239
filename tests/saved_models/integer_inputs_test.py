"""Models that take integers: the nearest bytes go in, and gradients come out as of the same network on floats."""

import functools
import logging
from unittest import mock

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.saved_models import load, safety

pytestmark = pytest.mark.oldest

SHAPE, NUM_CLASSES = (8, 8, 3), 4


def network(dtype, sequential=False):
    """Pixels from 0 to 255 to logits, the same weights every time; SiLU has a gradient of its own in TensorFlow."""
    rng = np.random.default_rng(0)
    layers = [
        keras.layers.Rescaling(1 / 255, offset=-0.5),
        keras.layers.Conv2D(4, 3, activation="silu"),
        keras.layers.Flatten(),
        keras.layers.Dense(NUM_CLASSES),
    ]
    image = keras.Input(SHAPE, dtype=dtype)
    if sequential:
        model = keras.Sequential([image, *layers])
    else:
        model = keras.Model(image, functools.reduce(lambda x, layer: layer(x), layers, image))
    for weight in model.weights:
        weight.assign(rng.normal(0.0, 2 * np.prod(weight.shape[:-1]) ** -0.5, weight.shape))
    return model


class Program(tf.Module):
    """A SavedModel written by hand: what `prepare` makes of the images, into the network on floats."""

    def __init__(self, prepare, spec):
        super().__init__()
        self.network = network("float32")
        inner = tf.function(lambda x: prepare(x))  # A call inside a call.
        self.serve = tf.function(
            lambda image: {"logits": self.network(tf.cast(inner(image), tf.float32))}, input_signature=[spec]
        )

    def save(self, path):
        tf.saved_model.save(self, path, signatures={"serving_default": self.serve})


def hand_made(prepare, dtype="uint8", shape=SHAPE):
    return lambda path: Program(prepare, tf.TensorSpec((None, *shape), dtype, name="image")).save(path)


def of_tensorflow_1(path):
    """One graph, without functions and objects."""
    kernel = np.random.default_rng(1).normal(size=(192, NUM_CLASSES)).astype(np.float32)
    # What wrote such models is deprecated.
    with mock.patch.object(tf.get_logger(), "level", logging.ERROR), tf.Graph().as_default():
        session = tf.compat.v1.Session()
        image = tf.compat.v1.placeholder(tf.uint8, (None, *SHAPE), name="image")
        variable = tf.compat.v1.get_variable("kernel", initializer=kernel)
        logits = tf.reshape(tf.cast(image[..., ::-1], tf.float32) / 255.0, (-1, 192)) @ variable
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.saved_model.simple_save(session, path, {"image": image}, {"logits": logits})


def of_keras(dtype, sequential=False):
    return lambda path: network(dtype, sequential).export(path)


def keras_file(dtype, sequential=False):
    return lambda path: network(dtype, sequential).save(path)


def flipped(x):
    return tf.reverse(tf.ensure_shape(tf.transpose(x, (0, 2, 3, 1)), (None, *SHAPE)), [3])


def kernel_logits(x):
    kernel = np.random.default_rng(1).normal(size=(192, NUM_CLASSES)).astype(np.float32)
    return tf.reshape(x[..., ::-1] / 255.0, (-1, 192)) @ kernel


MADE = {
    "uint8": of_keras("uint8"),
    "uint8, sequential": of_keras("uint8", True),
    "int32": of_keras("int32"),
    "int64": of_keras("int64"),
    "uint8.keras": keras_file("uint8"),
    "uint8, sequential.keras": keras_file("uint8", True),
    "int32.keras": keras_file("int32"),
    "by hand": hand_made(lambda x: x),
    "by hand, int32": hand_made(lambda x: x, "int32"),
    "through int32": hand_made(lambda x: tf.cast(x, tf.int32)),
    "resized": hand_made(lambda x: tf.image.resize(x, SHAPE[:2])),
    "nearest neighbours": hand_made(lambda x: tf.image.resize(x, SHAPE[:2], method="nearest")),
    "reshaped": hand_made(lambda x: tf.reshape(tf.reshape(x, (tf.shape(x)[0], -1)), (-1, *SHAPE))),
    "swapped channels": hand_made(lambda x: tf.gather(tf.tile(x, (1, 1, 1, 2)), (0, 4, 2), axis=3)),
    "channels first, reversed": hand_made(flipped, shape=(3, 8, 8)),
    "TensorFlow 1": of_tensorflow_1,
}


@pytest.fixture(scope="module")
def x():
    """Pixels that are no whole bytes, but of which none is half-way between two."""
    rng = np.random.default_rng(2)
    return tf.constant((rng.integers(0, 256, (5, *SHAPE)) + rng.uniform(-0.4, 0.4, (5, *SHAPE))) / 255, tf.float32)


def value_and_gradient(logits_fn, x):
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = logits_fn(x)
        largest = tf.reduce_sum(logits[:, 1] ** 2)
    return logits, tape.gradient(largest, x)


@pytest.mark.parametrize("name", MADE)
def test_logits_and_gradients_are_those_of_the_network_on_the_nearest_bytes(tmp_path, x, name):
    path = str(tmp_path / name)
    MADE[name](path)
    layout = "NCHW" if "channels first" in name else "NHWC"
    logits_fn = load.load_logits_fn(path, input_range=(0, 255), input_layout=layout)
    expected_fn = kernel_logits if name == "TensorFlow 1" else network("float32")
    if layout == "NCHW":
        expected_fn = functools.partial(lambda model, x: model(x[..., ::-1]), expected_fn)
    expected, slope = value_and_gradient(lambda x: expected_fn(x * 255.0), tf.round(x * 255.0) / 255.0)
    assert np.abs(expected - expected_fn(x * 255.0)).max() > 1e-4  # Rounding shows.
    assert logits_fn.straight_through_cast
    for fn in (logits_fn, tf.function(logits_fn)):
        logits, gradient = value_and_gradient(fn, x)
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
        np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-4 * np.abs(slope).max())


def test_a_trusted_model_is_told_of_once(tmp_path, capfd):
    """Its copy with another input is none that somebody has to be told of."""

    def prepare(x):
        tf.raw_ops.WriteFile(filename=str(tmp_path / "written"), contents="")
        return x

    hand_made(prepare)(str(tmp_path / "model"))
    with safety.trusting():
        logits_fn = load.load_logits_fn(tmp_path / "model", input_range=(0, 255))
    assert logits_fn.straight_through_cast
    assert capfd.readouterr().err.count("Let through as trusted: ") == 1


def test_floats_are_not_rounded(tmp_path, x):
    of_keras("float32")(str(tmp_path / "model"))
    logits_fn = load.load_logits_fn(tmp_path / "model", input_range=(0, 255))
    assert not logits_fn.straight_through_cast
    np.testing.assert_allclose(logits_fn(x), network("float32")(x * 255.0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["uint8", "uint8.keras"])
def test_an_attack_on_bytes_finds_what_it_finds_on_floats(tmp_path, kind):
    MADE[kind](str(tmp_path / kind))
    images = np.random.default_rng(3).integers(0, 256, (40, *SHAPE)).astype(np.float32) / 255
    settings = {"threat": threats.threat(norm="Linf", epsilon="8/255"), "loss_fn": losses.cross_entropy}
    network_on_floats, found = network("float32"), []

    def on_floats_fn(x):
        return network_on_floats(x * 255.0)

    for logits_fn in (load.load_logits_fn(tmp_path / kind), on_floats_fn):
        labels = tf.argmax(logits_fn(images), axis=-1, output_type=tf.int32)
        seeds = tf.stack([tf.range(40), tf.zeros(40, tf.int32)], axis=1)
        x_adv = pgd(logits_fn, tf.constant(images), labels, num_steps=10, step_size="2/255", seeds=seeds, **settings)
        found.append(float(np.mean(np.argmax(logits_fn(x_adv), -1) == labels)))
    on_bytes, on_floats = found
    assert on_floats < 0.6 and abs(on_bytes - on_floats) <= 0.05


@pytest.mark.parametrize(
    "prepare, operation",
    [
        (lambda x: tf.bitwise.bitwise_and(x, tf.constant(0xF0, tf.uint8)), "BitwiseAnd"),
        (lambda x: tf.gather(np.arange(256).astype(np.uint8) & 0xF0, tf.cast(x, tf.int32)), "GatherV2"),
    ],
)
def test_what_computes_with_integers_goes_on_without_a_gradient(tmp_path, x, caplog, prepare, operation):
    path = str(tmp_path / "bits")
    hand_made(prepare)(path)
    with caplog.at_level(logging.WARNING):
        logits_fn = load.load_logits_fn(path)
    assert "No gradient passes the integer input" in caplog.text and operation in caplog.text
    assert not logits_fn.straight_through_cast
    logits, gradient = value_and_gradient(logits_fn, x)
    upper = np.round(x * 255).astype(np.uint8) & 0xF0
    np.testing.assert_allclose(logits, network("float32")(upper.astype(np.float32)), rtol=0, atol=2e-5)
    assert gradient is None


def test_other_signatures_and_callers_of_a_shared_function_stay(tmp_path, x):
    """Two signatures call one function: both get it, and the model's own method too."""
    program = Program(lambda x: x, tf.TensorSpec((None, *SHAPE), tf.uint8, name="image"))
    path = str(tmp_path / "two")
    tf.saved_model.save(program, path, signatures={"serving_default": program.serve, "also": program.serve})
    logits, gradient = value_and_gradient(load.load_logits_fn(path), x)
    np.testing.assert_allclose(logits, network("float32")(tf.round(x * 255.0)), rtol=0, atol=2e-5)
    assert np.abs(gradient).max() > 0


# The range of pixels.


def test_bytes_go_from_0_to_255(tmp_path, x):
    of_keras("uint8")(str(tmp_path / "model"))
    logits_fn = load.load_logits_fn(tmp_path / "model")
    assert logits_fn.input_range == (0.0, 255.0)
    np.testing.assert_array_equal(logits_fn(x), load.load_logits_fn(tmp_path / "model", input_range=(0, 255))(x))


@pytest.mark.parametrize("kind, given", [("int32", (0.0, 1.0)), ("uint8", (-1.0, 1.0)), ("uint8", (0.0, 256.0))])
def test_a_range_that_integers_cannot_take_is_refused(tmp_path, kind, given):
    MADE[kind](str(tmp_path / "model"))
    with pytest.raises(ValueError, match=f"takes {kind}, such as --input_range=0,255. Received: {given[0]},{given[1]}"):
        load.load_logits_fn(tmp_path / "model", input_range=given)


# Half precision.


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [of_keras, keras_file])
def test_half_precision_inputs_have_gradients(tmp_path, x, dtype, make):
    path = str(tmp_path / ("model.keras" if make is keras_file else "model"))
    make(dtype)(path)
    logits_fn = load.load_logits_fn(path, input_range=(0, 255))
    assert not logits_fn.straight_through_cast
    logits, gradient = value_and_gradient(logits_fn, x)
    expected, slope = value_and_gradient(lambda x: network("float32")(x * 255.0), x)
    assert logits.dtype == gradient.dtype == tf.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=0.05)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=0.05 * np.abs(slope).max())
