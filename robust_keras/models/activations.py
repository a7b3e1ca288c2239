"""The six activations of the paper's section 4.5.2 and Table 8, as serialisable Keras layers."""

from typing import Any

import keras
import tensorflow as tf

_FUNCTIONS = {
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, alpha=0.01),
    "elu": tf.nn.elu,
    "softplus": tf.nn.softplus,
    "gelu": lambda x: tf.nn.gelu(x, approximate=True),
}
NAMES = tuple(_FUNCTIONS)
_SAME = {"swish": "silu"}


@keras.saving.register_keras_serializable(package="robust_keras")
class Activation(keras.layers.Layer):
    """An element-wise activation, by name.

    Swish is SiLU, and saved by that name. As in the JAX functions that the paper's code calls, leaky ReLU has slope
    0.01 and GELU is the tanh approximation.

    Args:
        activation: 'relu', 'silu' or 'swish', 'leaky_relu', 'elu', 'softplus' or 'gelu'.

    Raises:
        ValueError: for any other name.
    """

    def __init__(self, activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        activation = _SAME.get(activation, activation)
        if activation not in _FUNCTIONS:
            raise ValueError(f"Expected an activation out of {', '.join(NAMES)}. Received: {activation!r}")
        self.activation = activation

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The activation of each element."""
        return _FUNCTIONS[self.activation](x)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return input_shape

    def get_config(self) -> dict:
        """The arguments, as Keras saves them."""
        return {**super().get_config(), "activation": self.activation}
