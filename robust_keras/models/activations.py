"""The six activations of the paper's section 4.5.2 and Table 8, as serialisable Keras layers."""

from typing import Any

import keras
import tensorflow as tf

from robust_keras.models import norm_act
from robust_keras.models.normalization import current_mode

NAMES = tuple(norm_act.ACTIVATIONS)


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
        self.activation = norm_act.activation_named(activation)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The activation of each element."""
        return norm_act.activated(x, self.activation, compiled=current_mode() is not None)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return input_shape

    def get_config(self) -> dict:
        """The arguments, as Keras saves them."""
        return {**super().get_config(), "activation": self.activation}
