import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import activations

VALUES = np.array([-30.0, -5.0, -2.0, -1.0, -0.3, -1e-3, 0.0, 1e-3, 0.3, 1.0, 2.0, 5.0, 30.0])


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


FORMULAS = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x * sigmoid(x),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.exp(np.minimum(x, 0.0)) - 1),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
DERIVATIVES = {
    "relu": lambda x: np.where(x > 0, 1.0, 0.0),
    "silu": lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))),
    "leaky_relu": lambda x: np.where(x > 0, 1.0, 0.01),
    "elu": lambda x: np.where(x > 0, 1.0, np.exp(np.minimum(x, 0.0))),
    "softplus": sigmoid,
}
# By hand at x = -1: the table to which the formulas above are held.
AT_MINUS_ONE = {
    "relu": 0.0,
    "silu": -0.2689414,
    "leaky_relu": -0.01,
    "elu": -0.6321206,
    "softplus": 0.3132617,
    "gelu": -0.1588080,  # the exact one, with the error function, is -0.1586553
}


def test_there_are_six():
    assert set(activations.NAMES) == set(FORMULAS)
    assert len(activations.NAMES) == 6


def test_swish_is_silu():
    layer = activations.Activation("swish")
    assert layer.activation == layer.get_config()["activation"] == "silu"
    np.testing.assert_array_equal(layer(VALUES), activations.Activation("silu")(VALUES))


@pytest.mark.parametrize("name", FORMULAS)
def test_formula(name):
    y = activations.Activation(name)(tf.constant(VALUES, tf.float32))
    np.testing.assert_allclose(y, FORMULAS[name](VALUES), rtol=2e-5, atol=1e-6)
    y = activations.Activation(name)(tf.constant([[-1.0]]))
    np.testing.assert_allclose(y, [[AT_MINUS_ONE[name]]], atol=1e-6)


@pytest.mark.parametrize("name", DERIVATIVES)
def test_gradient(name):
    x = tf.constant(VALUES[VALUES != 0.0], tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = activations.Activation(name)(x)
    np.testing.assert_allclose(tape.gradient(y, x), DERIVATIVES[name](x.numpy().astype(float)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", FORMULAS)
def test_round_trip_through_a_file(name, tmp_path):
    inputs = keras.Input((len(VALUES),))
    model = keras.Model(inputs, activations.Activation(name, name="the_activation")(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    layer = loaded.get_layer("the_activation")
    assert isinstance(layer, activations.Activation) and layer.activation == name
    x = tf.constant(VALUES[None], tf.float32)
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_allclose(loaded(x)[0], FORMULAS[name](VALUES), rtol=2e-5, atol=1e-6)


def test_shape_and_type_are_the_inputs():
    layer = activations.Activation("silu")
    assert layer.compute_output_shape((None, 4, 4, 3)) == (None, 4, 4, 3)
    y = activations.Activation("silu", dtype="mixed_bfloat16")(tf.ones((2, 3)))
    assert y.dtype == tf.bfloat16 and y.shape == (2, 3)


@pytest.mark.parametrize("name", ["Swish", "ReLU", "", None])
def test_unknown_name(name):
    with pytest.raises(ValueError, match=r"relu, silu, leaky_relu, elu, softplus, gelu.*Received: "):
        activations.Activation(name)
