"""Model weight averaging (the paper's section 4.5.1).

averaging = WeightAveraging(tau=0.995)
model.fit(x, y, callbacks=[averaging])  # Any compiled keras.Model, or an AdversarialModel.
averaging.averaged_model.save("averaged.keras")
"""

import os
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from robust_keras import storage
from robust_keras.engines import replicas
from robust_keras.models import any_network


def averaging_decay(step: tf.Tensor | int, *, tau: float, warm_up: bool = True) -> tf.Tensor:
    """The decay at `step` (0 at the first): tau, or with warm-up min(tau, (1 + step) / (10 + step))."""
    step = tf.cast(step, tf.float32)
    return tf.minimum(tau, (1.0 + step) / (10.0 + step)) if warm_up else tf.constant(tau, tf.float32)


class WeightAveraging(keras.callbacks.Callback):
    """Keeps an exponential moving average of a model's weights in a twin network.

        average = decay * average + (1 - decay) * weights

    The average covers every trainable weight; the twin's other weights, such as the moving statistics of normalisation
    and what is frozen, are copies of the live ones. The update is part of the training step's graph, so it is exact at
    every step, however many steps one execution runs. Nothing is swapped in place: `averaged_model` can be validated
    and exported at any time.

    It averages any compiled `keras.Model` under its own `fit`, and the network of an `AdversarialModel`.

    Args:
        twin: a network like the one trained; by default a clone of it, made when training begins. It starts as a copy
            of it, unless `start_from_model` is false (as after a restore). Under a strategy, make it inside its scope.
        tau: the decay rate, in [0, 1).
        warm_up: whether the decay starts as (1 + step) / (10 + step) until that reaches `tau`. The paper does not say;
            the released code does.
        start_from_model: whether the twin starts as a copy. A callback that goes on from `fit` to `fit`, or from
            `backup_dir`, does so with its averages.
        backup_dir: a folder of its own for the averages at each epoch's end, from which an interrupted `fit` goes on
            beside `keras.callbacks.BackupAndRestore`, which comes after it in the list of callbacks; None for none.

    Raises:
        ValueError: for a `tau` outside [0, 1); when training begins, for a network that cannot be cloned.
    """

    def __init__(
        self,
        twin: keras.Model | None = None,
        *,
        tau: float = 0.995,
        warm_up: bool = True,
        start_from_model: bool = True,
        backup_dir: str | os.PathLike | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= tau < 1:
            raise ValueError(f"Expected an averaging decay rate tau in [0, 1), or None for none. Received: {tau!r}")
        self.twin = twin
        self.tau = tau
        self.warm_up = warm_up
        self.start_from_model = start_from_model
        self.backup_dir = None if backup_dir is None else str(backup_dir)
        self._stock_step: Callable | None = None

    @property
    def averaged_model(self) -> keras.Model:
        """The network with the averaged weights.

        Raises:
            ValueError: before training has begun.
        """
        if self.twin is None:
            raise ValueError("Expected averaged weights once training has begun. Received: none yet")
        return self.twin

    @property
    def network(self) -> keras.Model:
        """The network that is averaged."""
        return self.model.network if hasattr(self.model, "after_update") else self.model

    def set_model(self, model: keras.Model) -> None:
        """Makes the update a part of the model's training step."""
        super().set_model(model)
        if self.twin is None:
            with model.distribute_strategy.scope():
                self.twin = _clone(self.network)
        _check_alike(self.network, self.twin)
        if self.start_from_model:
            self.twin.set_weights(self.network.get_weights())
            self.start_from_model = False
        if not hasattr(model, "after_update"):
            self._wrap_step(model)
        elif self._update not in model.after_update:
            model.after_update.append(self._update)
            model.train_function = None  # One that was traced before would not update.

    def on_train_begin(self, logs: dict | None = None) -> None:
        """The averages are read back at the first epoch: only then every callback has restored what it restores."""
        self._begins = True

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Reads the averages back at the first epoch of a training that goes on."""
        if self.backup_dir is None or not self._begins:
            return
        self._begins = False
        step = int(self.model.optimizer.iterations.numpy())
        if step == 0:
            return
        if step not in storage.steps(self.backup_dir):
            raise ValueError(f"Expected averages of step {step} in {self.backup_dir}. Received: none")
        arrays = storage.read(self.backup_dir, step).arrays
        self.averaged_model.set_weights([arrays[str(k)] for k in range(len(arrays))])

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the averages, where there is a folder for them."""
        if self.backup_dir is not None:
            # By place: names of layers are counted on in a process.
            arrays = {str(k): weight for k, weight in enumerate(self.averaged_model.get_weights())}
            storage.write(self.backup_dir, int(self.model.optimizer.iterations.numpy()), arrays, {})

    def on_train_end(self, logs: dict | None = None) -> None:
        """Gives a stock model its training step back, and removes the averages of a training that is over."""
        if self.backup_dir is not None and tf.io.gfile.exists(self.backup_dir):
            tf.io.gfile.rmtree(self.backup_dir)
        if self._stock_step is not None:
            self.model.train_step = self._stock_step
            self._stock_step = None
            self.model.make_train_function(force=True)

    def _wrap_step(self, model):
        """Makes the update follow a stock model's step: Keras asks for `train_step` when it traces a step."""
        step_of_model = self._stock_step = model.train_step

        def train_step(data: Any) -> Any:
            step = tf.identity(model.optimizer.iterations.value)
            logs = step_of_model(data)
            self._update(step)
            return logs

        model.train_step = train_step
        model.make_train_function(force=True)

    def _update(self, step):
        decay = averaging_decay(step, tau=self.tau, warm_up=self.warm_up)
        trained = {id(weight) for weight in self.network.trainable_weights}
        networks, twins = self.network.weights, self.averaged_model.weights
        decays = [decay if id(weight) in trained else 0.0 for weight in networks]

        def assign(average, weight, decay):
            average.assign(decay * average + (1.0 - decay) * weight)

        replicas.update(assign, [a.value for a in twins], [w.value for w in networks], decays)


def _clone(network):
    """A network of the same architecture, built, with weights of its own."""
    try:
        if isinstance(network, keras.Sequential) or any_network.known_inputs(network):
            return keras.models.clone_model(network)
        twin = type(network).from_config(network.get_config())
        twin.build_from_config(network.get_build_config())
        return twin
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            "Expected a network that can be cloned, by get_config, or WeightAveraging(twin=...) with one like it. "
            f"Received: {network.name!r}, {' '.join(str(error).split())[:200]}"
        ) from error


def _check_alike(network, twin):
    if network.weights and not twin.weights:
        raise ValueError("Expected a twin that is built, as a first call on images does. Received: one without weights")
    shapes, others = ([tuple(weight.shape) for weight in each.weights] for each in (network, twin))
    if shapes != others:
        raise ValueError(
            f"Expected a twin with weights like the network's {len(shapes)}. Received: {len(others)}, others"
        )
