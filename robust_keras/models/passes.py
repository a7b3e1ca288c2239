"""Forward passes of a training step through any Keras network, none of which changes a variable.

    passes = Passes(logits_of, network, attack_batch_norm="moving")
    x_adv = attack(passes.of_attack, x, labels, seeds=seeds)
    loss = objective(passes.of_objective, x, x_adv, labels, targets)
    outcome = passes.outcome(x_adv)  # What the step may now change, and the network's own losses.

Stock layers move their statistics in every pass that trains, and draw new noise in each. Here a pass runs in Keras'
`StatelessScope`, which keeps what it would have changed. One pass of the objective then counts: the one in which
`batch_norm_mode` says so, else the one of the adversarial images, else the last one.

A layer such as `SpectralNormalization` assigns to a weight that is trained. As with stock Keras, gradients are with
respect to what it assigned, which is in effect before the optimiser's update: `assign_trained`.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras.engines import replicas
from robust_keras.models import any_network, normalization
from robust_keras.models.normalization import BATCH, BATCH_AND_UPDATE, MOVING, BatchNorm, batch_norm_mode


class Outcome(NamedTuple):
    """What the objective's passes leave to be done once, after the step's gradients.

    Attributes:
        layers: `BatchNorm` layers whose moving statistics the pass that counts would have updated, in order.
        statistics: with what: (mean, variance) of each.
        moving: other variables of floats that it would have changed, such as a stock layer's moving statistics, and
            weights that are trained.
        moved: their new values.
        counters: variables of integers that the passes changed, such as the state of a `SeedGenerator`.
        counted: their new values.
        loss: the sum of `network.losses` in the pass that counts; None where it has none.
    """

    layers: list[BatchNorm]
    statistics: list[tuple[tf.Tensor, tf.Tensor]]
    moving: list[keras.Variable]
    moved: list[tf.Tensor]
    counters: list[keras.Variable]
    counted: list[tf.Tensor]
    loss: tf.Tensor | None


class _Pass(NamedTuple):
    images: tf.Tensor
    logits: tf.Tensor
    counts: bool | None  # None where nobody said.
    pending: list
    changed: dict[int, tuple[keras.Variable, tf.Tensor]]
    loss: tf.Tensor | None


class _Scope(keras.StatelessScope):
    """Remembers the variables that were assigned to."""

    def __init__(self, values: dict[int, tuple[keras.Variable, tf.Tensor]], **options: Any) -> None:
        super().__init__(state_mapping=list(values.values()), **options)
        self._assigned: dict[int, keras.Variable] = {}

    def add_update(self, update: tuple[keras.Variable, tf.Tensor]) -> None:
        variable, value = update
        if variable.trainable and _is_float(variable):
            # The value, with the gradient of the variable.
            before = tf.cast(tf.convert_to_tensor(variable.value), value.dtype)
            value = tf.stop_gradient(value) + (before - tf.stop_gradient(before))
        super().add_update((variable, value))
        self._assigned[id(variable)] = variable

    def changed(self) -> dict[int, tuple[keras.Variable, tf.Tensor]]:
        """Variables and their new values by the variables' `id`."""
        return {key: (variable, self.get_current_value(variable)) for key, variable in self._assigned.items()}


class Passes:
    """The passes of one training step, or of one part of its batch; made while the step is traced.

    Args:
        logits_of: `(images, *, training) -> float32 logits` of the network, `images` in [0, 1].
        network: the network.
        attack_batch_norm: what the attack's passes normalise with: 'moving' or 'batch' statistics.
        attack_noise: whether layers such as Dropout are on in the attack.
        part: the number of this part of the batch among all parts and replicas, an int or a scalar tensor: layers that
            draw noise draw other numbers in each.
    """

    def __init__(
        self,
        logits_of: Callable,
        network: keras.Model,
        *,
        attack_batch_norm: str = MOVING,
        attack_noise: bool = False,
        part: Any = 0,
    ) -> None:
        self._logits_of, self._network = logits_of, network
        self._attack_batch_norm, self._attack_noise = attack_batch_norm, attack_noise
        layers = list(inside(network))
        self._with_statistics = _layers_with_statistics([each for each in layers if isinstance(each, keras.Layer)])
        seeds = [each.state for each in layers if isinstance(each, keras.random.SeedGenerator)]
        self._offsets = {id(seed): _offset(seed, part) for seed in seeds} if _is_several(part) else {}
        # What later passes start from: noise goes on, and statistics do after a pass that counts.
        self._carried = {id(seed): (seed, seed.value + self._offsets[id(seed)]) for seed in seeds if self._offsets}
        self._passes: list[_Pass] = []
        self._heard: dict[bool, dict[int, list]] = {}

    def of_attack(self, images: tf.Tensor) -> tf.Tensor:
        """Logits of a pass inside the attack, of which nothing remains."""
        with _Scope(self._carried), batch_norm_mode(self._attack_batch_norm):
            return self._run(images, noise=self._attack_noise, statistics=self._attack_batch_norm == BATCH)

    def of_objective(self, images: tf.Tensor) -> tf.Tensor:
        """Logits of a pass that trains."""
        mode = normalization.current_mode()
        counts = None if mode is None else mode == BATCH_AND_UPDATE
        # Whose losses Keras asks the scope for.
        regularised = {
            id(weight): (weight, tf.convert_to_tensor(weight.value))
            for weight in self._network.trainable_weights
            if weight.regularizer is not None
        }
        with (
            normalization.pending_updates() as pending,
            batch_norm_mode(mode or BATCH_AND_UPDATE),
            _Scope({**regularised, **self._carried}, collect_losses=True) as scope,
        ):
            logits = self._run(images, noise=True, statistics=mode != MOVING)
            losses = [tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in self._network.losses]
        changed = scope.changed()
        self._carried |= {key: each for key, each in changed.items() if counts or not _is_float(each[0])}
        loss = tf.add_n(losses) if losses else None
        self._passes.append(_Pass(images, logits, counts, pending, changed, loss))
        return logits

    def predicted(self, images: tf.Tensor) -> tf.Tensor:
        """Logits of these very images as the objective saw them, in one more pass where it did not look."""
        seen = [each.logits for each in self._passes if each.images is images]
        if seen:
            return seen[-1]
        with batch_norm_mode(BATCH), _Scope(self._carried):
            return self._run(images, noise=True, statistics=True)

    def outcome(self, x_adv: tf.Tensor) -> Outcome:
        """What is left to do once the objective has run, whose adversarial images were `x_adv`."""
        counting = [each for each in self._passes if each.counts]
        if not counting:
            undecided = [each for each in self._passes if each.counts is None]
            counting = [each for each in undecided if each.images is x_adv][-1:] or undecided[-1:]
        updates = [update for each in counting for update in each.pending]
        changed = {key: each for passed in counting for key, each in passed.changed.items() if _is_float(each[0])}
        counted = {k: each for passed in self._passes for k, each in passed.changed.items() if not _is_float(each[0])}
        return Outcome(
            layers=[layer for layer, _ in updates],
            statistics=[statistics for _, statistics in updates],
            moving=[variable for variable, _ in changed.values()],
            moved=[tf.cast(value, tf.float32) for _, value in changed.values()],
            counters=[variable for variable, _ in counted.values()],
            counted=[value - self._offsets.get(k, tf.zeros_like(value)) for k, (_, value) in counted.items()],
            loss=next((each.loss for each in reversed(counting or self._passes)), None),
        )

    def _run(self, images, *, noise, statistics):
        if noise == statistics or not self._with_statistics:
            return self._logits_of(images, training=noise)
        if statistics not in self._heard:
            self._heard[statistics] = self._listened(images, statistics)
        calls = {key: iter(values) for key, values in self._heard[statistics].items()}
        with _told(self._with_statistics, lambda layer, _: next(calls[id(layer)], statistics)):
            return self._logits_of(images, training=noise)

    def _listened(self, images, training):
        """What layers with statistics are told in a pass with `training`, call by call: the network may have said so
        itself, as in `layer(x, training=False)`. The pass is traced and not run.
        """
        heard: dict[int, list] = {id(layer): [] for layer in self._with_statistics}

        def listen(layer, received):
            heard[id(layer)].append(training if tf.is_tensor(received) else received)
            return received

        def listening(images):
            with _told(self._with_statistics, listen):
                self._logits_of(images, training=training)

        with batch_norm_mode(BATCH), _Scope(self._carried):
            traced = tf.function(listening, autograph=False)
            traced.get_concrete_function(tf.TensorSpec(images.shape, images.dtype))
        return heard


def logits_of(
    network: keras.Model, bounds: tuple[float, float], from_logits: bool, images: tf.Tensor, *, training: bool
) -> tf.Tensor:
    """The float32 logits of images in [0, 1], as `any_network.as_logits_fn` has them, with `training` passed on."""
    outputs = any_network.logits_of(any_network.run(network, pixel_bounds.from_unit(images, bounds), training=training))
    return outputs if from_logits else any_network.log_probabilities(outputs)


def evaluated(network: keras.Model, bounds: tuple[float, float], from_logits: bool, images: tf.Tensor) -> tf.Tensor:
    """Logits in a pass as evaluation makes it, whatever `batch_norm_mode` is around it."""
    with batch_norm_mode(MOVING), _Scope({}):
        return logits_of(network, bounds, from_logits, images, training=False)


def computes_in(network: keras.Layer, dtype: str) -> bool:
    """Whether any layer of a network, or the network, computes in a type such as 'float16'."""
    return any(isinstance(each, keras.Layer) and each.compute_dtype == dtype for each in inside(network))


def assign_trained(outcome: Outcome, moved: Sequence[tf.Tensor]) -> None:
    """Makes the changes of an `Outcome` to weights that are trained; like `apply`, but before the optimiser."""
    _assign_means(outcome, moved, are_trained=True)


def apply(outcome: Outcome, statistics: Sequence, moved: Sequence[tf.Tensor], counted: Sequence[tf.Tensor]) -> None:
    """Makes the other changes of an `Outcome`, from inside a replica, with the values given: means over parts of the
    batch, of which means over replicas are taken.
    """
    normalization.apply_updates(outcome.layers, statistics)
    _assign_means(outcome, moved, are_trained=False)
    _assign(outcome.counters, counted)


def _assign_means(outcome, moved, *, are_trained):
    """Assigns to variables of floats that are trained, or to the others."""
    chosen = [(v, value) for v, value in zip(outcome.moving, moved) if v.trainable == are_trained]
    variables, values = [variable for variable, _ in chosen], [value for _, value in chosen]
    if values and replicas.num_replicas() > 1:
        values = replicas.all_reduce("MEAN", values)
    _assign(variables, values)


def _assign(variables, values):
    def assign(variable, value):
        variable.assign(tf.cast(value, variable.dtype))

    replicas.update(assign, [variable.value for variable in variables], values)


def inside(network: keras.Layer) -> Iterator[Any]:
    """A network's layers, itself too, and their seed generators, each once."""
    waiting, seen = [network], set()
    while waiting:
        each = waiting.pop(0)
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, (keras.Layer, keras.random.SeedGenerator)):
            yield each
            waiting += vars(each).values()
        elif isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, (list, tuple, set)):
            waiting += each


def _layers_with_statistics(layers: Sequence[keras.Layer]) -> list[keras.Layer]:
    """Layers, of no others and without noise, that have variables of floats that no optimiser trains, and behave in
    another way while training.

    Frozen layers behave as in evaluation and are none, and neither are this package's, which obey `batch_norm_mode`.
    """
    return [
        layer
        for layer in layers
        if not isinstance(layer, BatchNorm) and layer.trainable and _takes_training(layer)
        if list(inside(layer)) == [layer]
        if any(not variable.trainable and _is_float(variable) for variable in layer.variables)
    ]


def _takes_training(layer):
    return "training" in inspect.signature(layer.call).parameters


@contextlib.contextmanager
def _told(layers: Sequence[keras.Layer], choose: Callable[[keras.Layer, Any], Any]) -> Iterator[None]:
    """Inside, these layers, and they alone, are called with `training=choose(layer, what they were given)`."""

    def told(layer):
        call = layer.call
        return lambda *args, **kwargs: call(*args, **{**kwargs, "training": choose(layer, kwargs.get("training"))})

    for layer in layers:
        # Not by `setattr`, which Keras watches.
        vars(layer)["call"] = told(layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["call"]


def _is_float(variable):
    return keras.backend.is_float_dtype(variable.dtype)


def _is_several(part):
    return not isinstance(part, int) or part > 0


def _offset(seed, part):
    """What is added to a seed generator's state, so that each part of a batch has noise of its own."""
    return tf.stack([tf.cast(part, seed.dtype), tf.zeros((), seed.dtype)])
