"""Model weight averaging (the paper's section 4.5.1)."""

import keras
import tensorflow as tf

from robust_keras.engines import replicas


def averaging_decay(step: tf.Tensor | int, *, tau: float, warm_up: bool = True) -> tf.Tensor:
    """The decay at `step` (0 at the first): tau, or with warm-up min(tau, (1 + step) / (10 + step))."""
    step = tf.cast(step, tf.float32)
    return tf.minimum(tau, (1.0 + step) / (10.0 + step)) if warm_up else tf.constant(tau, tf.float32)


class WeightAveraging(keras.callbacks.Callback):
    """Keeps an exponential moving average of a model's weights in a twin network.

        average = decay * average + (1 - decay) * weights

    The average covers every trainable weight; the twin's `BatchNorm` statistics are copies of the live ones. The update
    is part of the training step's graph, so it is exact at every step, however many steps one execution runs. Nothing
    is swapped in place: `twin` can be validated and exported at any time.

    The model given to `fit` must have `after_update`, a list of functions of the step that its `train_step` calls after
    the optimiser, and `network`, the network being trained. Under a strategy, make the twin inside its scope.

    Args:
        twin: a network like the one trained. It starts as a copy of it when training begins, unless `start_from_model`
            is false (as after a restore).
        tau: the decay rate, in [0, 1).
        warm_up: whether the decay starts as (1 + step) / (10 + step) until that reaches `tau`. The paper does not say;
            the released code does.

    Raises:
        ValueError: for a `tau` outside [0, 1).
    """

    def __init__(self, twin: keras.Model, *, tau: float, warm_up: bool = True, start_from_model: bool = True) -> None:
        super().__init__()
        if not 0 <= tau < 1:
            raise ValueError(f"Expected an averaging decay rate tau in [0, 1), or None for none. Received: {tau!r}")
        self.twin = twin
        self.tau = tau
        self.warm_up = warm_up
        self.start_from_model = start_from_model

    def set_model(self, model: keras.Model) -> None:
        """Makes the update a part of the model's training step."""
        super().set_model(model)
        if self.start_from_model:
            self.twin.set_weights(model.network.get_weights())
        if self._update not in model.after_update:
            model.after_update.append(self._update)

    def _update(self, step):
        decay = averaging_decay(step, tau=self.tau, warm_up=self.warm_up)
        network = self.model.network
        averages = [*self.twin.trainable_weights, *self.twin.non_trainable_weights]
        weights = [*network.trainable_weights, *network.non_trainable_weights]
        decays = [decay] * len(network.trainable_weights) + [0.0] * len(network.non_trainable_weights)

        def assign(average, weight, decay):
            average.assign(decay * average + (1.0 - decay) * weight)

        replicas.update(assign, [a.value for a in averages], [w.value for w in weights], decays)
