"""The paper's optimiser."""

import keras
import tensorflow as tf

from robust_keras.engines import replicas


@keras.saving.register_keras_serializable(package="robust_keras")
class NesterovSGD(keras.optimizers.Optimizer):
    """SGD with Nesterov momentum, the learning rate outside the momentum, and coupled L2 weight decay.

        g = gradient + weight_decay * w;  v = momentum * v + g;  w = w - learning_rate * (g + momentum * v)

    `keras.optimizers.SGD` keeps the learning rate inside v, so the two part ways when the rate changes, and its weight
    decay is decoupled. Here the decay is the gradient of `weight_decay * ||w||^2 / 2` added to the loss. It covers
    kernels and the classifier's bias, and never scale and offset of `BatchNorm`.

    Args:
        learning_rate: a float or a function of the step (int64 scalar, 0 at the first).
        momentum: of the buffer v, which starts at 0.
        weight_decay: factor of the L2 term.
    """

    def __init__(self, learning_rate=0.1, momentum=0.9, weight_decay=5e-4, name="nesterov_sgd", **kwargs):
        schedule = learning_rate
        if callable(schedule):
            learning_rate = lambda: schedule(self._iterations.value)  # noqa: E731
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.momentum = momentum
        # Not the base class' `weight_decay`, which would be decoupled.
        self.l2 = weight_decay

    def build(self, variables):
        if self.built:
            return
        super().build(variables)
        self.momentums = [self.add_variable_from_reference(variable, name="momentum") for variable in variables]
        self._decays = [v.path.rsplit("/", 1)[-1] not in ("scale", "offset") for v in variables]

    def _all_reduce_sum_gradients(self, grads_and_vars):
        # Keras' own sends each gradient by itself from process to process.
        gradients, variables = zip(*grads_and_vars)
        return list(zip(replicas.all_reduce("SUM", list(gradients)), variables))

    def update_step(self, gradient, variable, learning_rate):
        index = self._get_variable_index(variable)
        learning_rate = tf.cast(learning_rate, variable.dtype)
        if self._decays[index]:
            gradient = gradient + self.l2 * variable
        velocity = self.momentums[index]
        self.assign(velocity, self.momentum * velocity + gradient)
        self.assign_sub(variable, learning_rate * (gradient + self.momentum * velocity))

    def get_config(self):
        return {**super().get_config(), "momentum": self.momentum, "weight_decay": self.l2}
