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

from robust_keras import own_folders, storage
from robust_keras.engines import replicas, step_counter
from robust_keras.models import any_network
from robust_keras.models import weights as named_weights


def averaging_decay(step: tf.Tensor | int, *, tau: float, warm_up: bool = True) -> tf.Tensor:
    """The decay at the update `step` (0 at the first): tau, or with warm-up min(tau, (1 + step) / (10 + step))."""
    step = tf.cast(step, tf.float32)
    return tf.minimum(tau, (1.0 + step) / (10.0 + step)) if warm_up else tf.constant(tau, tf.float32)


class WeightAveraging(keras.callbacks.Callback):
    """Keeps an exponential moving average of a model's weights in a twin network.

        average = decay * average + (1 - decay) * weights

    The average covers every trainable weight; the twin's other weights, such as the moving statistics of normalisation
    and what is frozen, are copies of the live ones. The update is part of the training step's graph, so it is exact at
    every update of the weights, however many steps one execution runs; an optimiser that accumulates gradients over
    several steps, or skips one of which they are not finite, updates less often. Nothing is swapped in place:
    `averaged_model` can be validated and exported at any time.

    It averages any compiled `keras.Model` under its own `fit`, and the network of an `AdversarialModel`, from one `fit`
    that is given it to the next one, also with another optimiser in between. No other `fit` moves the average.

    Args:
        twin: a network like the one trained; by default a clone of it, made when training begins. It starts as a copy
            of it, unless `start_from_model` is false (as after a restore). Under a strategy, make it inside its scope.
        tau: the decay rate, in [0, 1).
        warm_up: whether the decay starts as (1 + step) / (10 + step) until that reaches `tau`. The paper does not say;
            the released code does. The callback counts the steps, its updates, from where the optimiser was at the
            first one.
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
        self._updates: Any = None  # The variable that counts them, made when training begins.

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
        return self.model.network if _takes_updates(self.model) else self.model

    def set_model(self, model: keras.Model) -> None:
        """Makes the twin, and the update a part of an `AdversarialModel`'s training step."""
        super().set_model(model)
        with replicas.of(model).scope():
            if self.twin is None:
                self.twin = _clone(self.network)
            if self._updates is None:
                only_first = tf.VariableAggregation.ONLY_FIRST_REPLICA
                self._updates = tf.Variable(0, trainable=False, dtype=tf.int64, aggregation=only_first)
        _check_alike(self.network, self.twin)
        if self.start_from_model:
            self.twin.set_weights(self.network.get_weights())
            self.start_from_model = False
        named_weights.refresh(self.twin)
        if self._updates.numpy() == 0:
            self._updates.assign(_steps_taken(model) // step_counter.in_an_update(model.optimizer))
        if _takes_updates(model) and self._update not in model.after_update:
            model.after_update.append(self._update)
            model.train_function = None  # One that was traced before would not update.

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Makes the update a part of a stock model's training step."""
        # The averages are read back at the first epoch: only then every callback has restored what it restores.
        self._begins = True
        if not _takes_updates(self.model):
            steps = _StepWithUpdates.of(self.model) or _StepWithUpdates(self.model)
            if self._update not in steps.after_update:
                steps.after_update.append(self._update)
                self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: dict | None = None) -> None:
        """Reads the averages back at the first epoch of a training that goes on."""
        if self.backup_dir is None or not self._begins:
            return
        self._begins = False
        step = _steps_taken(self.model)
        if step == 0:
            return
        if step not in storage.steps(self.backup_dir):
            raise ValueError(f"Expected averages of step {step} in {self.backup_dir}. Received: none")
        arrays = storage.read(self.backup_dir, step).arrays
        self._updates.assign(arrays.pop("updates", step))  # Older versions did not count.
        self.averaged_model.set_weights([arrays[str(k)] for k in range(len(arrays))])
        named_weights.refresh(self.averaged_model)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        """Writes the averages, where there is a folder for them."""
        if self.backup_dir is not None:
            # By place: names of layers are counted on in a process.
            arrays = {str(k): weight for k, weight in enumerate(self.averaged_model.get_weights())}
            arrays["updates"] = self._updates.numpy()
            storage.write(self.backup_dir, _steps_taken(self.model), arrays, {})

    def on_train_end(self, logs: dict | None = None) -> None:
        """Gives the model its training step back, and removes the averages of a training that is over."""
        if self.backup_dir is not None and tf.io.gfile.exists(self.backup_dir):
            own_folders.remove_folder(self.backup_dir)
        if _takes_updates(self.model):
            self.model.after_update.remove(self._update)
            self.model.train_function = None
        elif steps := _StepWithUpdates.of(self.model):
            steps.remove(self._update)

    def _update(self, step):
        """Averages after a training step that the optimiser counted as its `step`."""
        decay = averaging_decay(self._updates, tau=self.tau, warm_up=self.warm_up)
        num_updates = tf.constant(1, tf.int64)
        if _may_not_update(self.model.optimizer):
            has_updated = _has_updated(self.model.optimizer, step)
            decay, num_updates = tf.where(has_updated, decay, 1.0), tf.cast(has_updated, tf.int64)
        trained = {id(weight) for weight in self.network.trainable_weights}
        pairs = list(zip(self.averaged_model.weights, self.network.weights))

        def average(average, weight, decay):
            average.assign(decay * average + (1.0 - decay) * weight)

        def copy(variable, weight):
            variable.assign(tf.cast(weight, variable.dtype))

        averaged = [(twin.value, live.value) for twin, live in pairs if id(live) in trained]
        copied = [(twin.value, live.value) for twin, live in pairs if id(live) not in trained]
        replicas.update(average, *_columns(averaged), [decay] * len(averaged))
        replicas.update(copy, *_columns(copied))
        replicas.update(lambda count, number: count.assign_add(number), [self._updates], [num_updates])


class _StepWithUpdates:
    """A stock model's training step with functions of the step after it, in one `fit`.

    Keras asks for `train_step` when it traces a step, and for the traced one at the start of each `fit`. That is where
    a later `fit` gets rid of what an interrupted one left.
    """

    def __init__(self, model: keras.Model) -> None:
        self.after_update: list[Callable] = []
        self._model, self._fit = model, _fit_of(model)
        self._step, self._make = model.train_step, model.make_train_function
        model.train_step, model.make_train_function = self.train_step, self.make_train_function

    @classmethod
    def of(cls, model: keras.Model) -> "_StepWithUpdates | None":
        """That of a model which has one."""
        owner = getattr(model.train_step, "__self__", None)
        return owner if isinstance(owner, cls) else None

    def train_step(self, data: Any) -> Any:
        """In place of the model's."""
        step = tf.identity(step_counter.of(self._model.optimizer).value)
        logs = self._step(data)
        for update in self.after_update:
            update(step)
        return logs

    def make_train_function(self, force: bool = False) -> Any:
        """In place of the model's."""
        if self._fit is _fit_of(self._model):
            return self._make(force=force)
        for update in list(self.after_update):
            self.remove(update)
        return self._model.train_function

    def remove(self, update: Callable) -> None:
        """Does without an update; the model gets its own step back with the last one."""
        self.after_update.remove(update)
        if not self.after_update:
            self._model.train_step, self._model.make_train_function = self._step, self._make
        self._make(force=True)


def _takes_updates(model):
    """Whether a model calls functions after its update itself, as an `AdversarialModel` does."""
    return hasattr(model, "after_update")


def _fit_of(model):
    """What tells one `fit` from another: each makes its history before anything else."""
    return getattr(model, "history", None)


def _steps_taken(model):
    return int(step_counter.of(model.optimizer).numpy())


def _may_not_update(optimizer):
    """Whether it accumulates gradients over several steps, or skips one of which they are not finite."""
    return step_counter.in_an_update(optimizer) > 1 or isinstance(optimizer, keras.optimizers.LossScaleOptimizer)


def _has_updated(optimizer, step):
    """Whether it updated weights in the step before which its count was `step`."""
    count = tf.convert_to_tensor(step_counter.of(optimizer).value)
    return (count != step) & (count % step_counter.in_an_update(optimizer) == 0)


def _columns(pairs):
    return [first for first, _ in pairs], [second for _, second in pairs]


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
