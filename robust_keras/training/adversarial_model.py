"""A network with a training step that attacks its own batch.

model = AdversarialModel(network, norm="Linf", epsilon="8/255", objective="trades")
model.compile(optimizer="adam", metrics=["accuracy"])
model.fit(x, y, validation_data=(x_val, y_val), epochs=10)
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.engines import execution, replicas
from robust_keras.models import any_network, passes
from robust_keras.models.normalization import MOVING, batch_norm_mode
from robust_keras.training import epsilon_warm_up, fitting, inputs, objectives, steps
from robust_keras.training.reported import Reported

ATTACK_TARGETS = ("label", "targets", "clean_prediction")


class AdversarialModel(keras.Model):
    """A network with a training step that attacks its own batch and then minimises an objective on it.

    The network may hold stock `BatchNormalization`, also frozen or nested, Dropout, augmentation, regularisers: the
    attack sees it as evaluation does, moving statistics move once in a step, with the adversarial images, and
    regularisation losses count once. `save`, `export` and `predict` are the network's. Random numbers of attacks depend
    on `seed`, the step and the example's place in the batch alone. `compile(jit_compile=True)` compiles all of the step
    but the updates with XLA.

    Args:
        network: any `keras.Model` of one input, images, and one output, logits.
        norm: of the threat model: 'Linf', 'L2' or 'L1'.
        epsilon: its radius, a fraction of the pixel range such as '8/255'; None without a threat model, where `attack`
            says all.
        objective: 'adversarial_training', 'trades', 'mart', 'standard', or a function `(logits_fn, x, x_adv, labels,
            targets) -> [batch]`, as in `objectives`.
        attack: `(logits_fn, x, targets, *, seeds) -> x_adv`; by default PGD with 10 steps of a quarter of the radius on
            the objective's loss, and none for 'standard' or without a radius.
        attack_target: what the attack moves away from: the 'label', the 'targets' (mixed or smoothed labels), or the
            'clean_prediction', softmax(network(x)) held fixed. By default the objective's.
        attack_batch_norm: statistics that the attack's passes normalise with: 'moving', as in evaluation, or 'batch' as
            in the paper's code.
        epsilon_warmup_steps: N, over which the attack's radius grows: step k, from 0, attacks in min(1, (k + 1) / N) of
            it. PGD's steps are as much shorter; an attack of one's own has to take its radius from a bound `threat`.
            The optimiser counts, a step for each batch: a new one starts again. Validation is within the full radius.
        attack_noise: whether Dropout, augmentation and the like are on in the attack.
        bounds: pixel values that the network takes for black and white. Images given to `fit` lie within them, or are
            uint8.
        from_logits: whether the network returns logits; False for probabilities.
        augmentation: `(images, seeds) -> images` on float32 images in [0, 1], before the attack.
        validation_attack: like `attack`, for validation and `evaluate`; by default PGD with 20 steps of an eighth of
            the radius on the cross-entropy.
        accumulation_steps: parts, of whole groups of `BatchNorm`, in which a replica takes its batch, one after
            another, so that memory holds one of them.
        log_accuracy: whether steps report accuracies, clean and robust.
        seed: of the attacks' noise and the order of arrays.

    Raises:
        ValueError: for what is none of these.
    """

    def __init__(
        self,
        network: keras.Model,
        *,
        norm: str = "Linf",
        epsilon: float | str | None = None,
        objective: str | Callable = "adversarial_training",
        attack: Callable | None = None,
        attack_target: str | None = None,
        attack_batch_norm: str = MOVING,
        epsilon_warmup_steps: int = 0,
        attack_noise: bool = False,
        bounds: tuple[float, float] = (0.0, 1.0),
        from_logits: bool = True,
        augmentation: Callable | None = None,
        validation_attack: Callable | None = None,
        accumulation_steps: int = 1,
        log_accuracy: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(name="adversarial_model", dtype="float32")  # Its network casts what it is given.
        inputs.check_network(network)
        with batch_norm_mode(attack_batch_norm):  # Refuses an unknown mode now, not while tracing.
            pass
        chosen = objectives.named(objective)
        attack_target = attack_target or chosen.attack_target
        if attack_target not in ATTACK_TARGETS:
            raise ValueError(
                f"Expected an attack_target out of {', '.join(ATTACK_TARGETS)}. Received: {attack_target!r}"
            )
        inputs.check_functions(objective=objective, attack=attack, validation_attack=validation_attack)
        self.network = network
        self.threat = None if epsilon is None else threats.threat(norm=norm, epsilon=epsilon)
        if chosen.attack_loss and attack is None and self.threat is None and isinstance(objective, str):
            raise ValueError(f"Expected a radius epsilon, or an attack, for {objective!r}. Received: none")
        self.objective = chosen.function
        self.attack = attack or _pgd(self.threat, chosen.attack_loss, num_steps=10, parts=4)
        self.attack_target, self.attack_batch_norm, self.attack_noise = attack_target, attack_batch_norm, attack_noise
        self.epsilon_warmup_steps = epsilon_warm_up.checked(epsilon_warmup_steps, self.attack)
        self.bounds, self.from_logits = pixel_bounds.parse(bounds), from_logits
        self.augmentation = augmentation
        self.validation_attack = validation_attack or _pgd(self.threat, losses.cross_entropy, num_steps=20, parts=8)
        self.accumulation_steps = accumulation_steps
        self.log_accuracy = log_accuracy
        self.seed = seed
        # Functions of the step that `train_step` calls after the optimiser.
        self.after_update: list[Callable] = []
        # Whether metrics want class probabilities, as labels were given, and whether there are metrics.
        self.has_soft_labels = self.has_metrics = self.is_asked_for_accuracy = False
        self.examined: Callable | None = None  # Made by `fitting`.
        self.num_passes = 0  # Over arrays, each in an order of its own.
        self._reported: list[keras.metrics.Metric] = []
        self.strategy = replicas.current()  # Keras knows those of `tf.distribute` alone.
        self.built = True

    @property
    def reading(self) -> any_network.Reading:
        """The network, and how `robust_keras.evaluate` and attacks are to read it."""
        return any_network.Reading(self.network, self.bounds, self.from_logits, self.threat)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """What the network returns for images of its own range."""
        return self.network(x, training=training)

    def compile(
        self, optimizer: Any = "rmsprop", *, metrics: Any = None, jit_compile: bool | str = False, **arguments: Any
    ) -> None:
        """See `keras.Model.compile`; the objective is the loss.

        Args:
            optimizer: any of Keras', `NesterovSGD` among them. Where it decays weights, scales and offsets of
                normalisation are left out, unless its own `exclude_from_weight_decay` was called.
            metrics: of the clean images, on what the network returns, and `weighted_metrics`, those with weights.
            jit_compile: whether to compile the step with XLA, which is slower on CPUs.
            **arguments: `steps_per_execution`, `run_eagerly`, `weighted_metrics`, and `auto_scale_loss`: whether the
                loss is scaled where a layer of the network computes in float16.

        Raises:
            ValueError: for a loss.
        """
        if arguments.get("loss") is not None:
            raise ValueError(f"Expected no loss: the objective is one. Received: {arguments['loss']!r}")
        given = [metrics] if isinstance(metrics, (str, keras.metrics.Metric)) else metrics or []
        self.is_asked_for_accuracy = False
        if isinstance(given, (list, tuple)):
            names = {getattr(metric, "name", metric) for metric in given}
            self._reported = [Reported(name) for name in ("accuracy", "robust_accuracy") if name not in names]
            self.is_asked_for_accuracy = "accuracy" in names
            metrics = [*given, *self._reported]
        optimizer = keras.optimizers.get(optimizer)
        is_scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        if arguments.get("auto_scale_loss", True) and not is_scaled and passes.computes_in(self.network, "float16"):
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        super().compile(optimizer, metrics=metrics, jit_compile=jit_compile is True, **arguments)
        self.examined, self.has_metrics = None, bool(given or arguments.get("weighted_metrics"))

    def fit(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int = 1,
        pause_every: Sequence[int] = (),
    ) -> keras.callbacks.History:
        """Trains as `keras.Model.fit` does, whose arguments these are, in exact steps (see `engines.execution.fit`).

        Reports `loss`, `accuracy` and `robust_accuracy` of the training batches, and of validation data `val_loss` (the
        objective on the images of `validation_attack`), `val_accuracy` and `val_robust_accuracy`, with the metrics of
        `compile` on clean images.

        Args:
            x: images, uint8 or floats within `bounds`; or batches `(images, labels[, weights])`: a `tf.data.Dataset`, a
                `keras.utils.PyDataset` or a generator; or a dataset as `training_batches.batches` makes it.
            y: labels, integers `[N]` or `[N, 1]`, or class probabilities `[N, num_classes]`, one-hot or soft.
            batch_size: of arrays, over all replicas; 32 by default.
            steps_per_epoch: steps; None for all that is given. Arrays are then read on from epoch to epoch.
            validation_data: a tuple of arrays `(x, y[, weights])`, or batches like `x`.
            pause_every: see `engines.execution.fit`.

        Raises:
            ValueError: for images, labels or a network that cannot be meant, before a step is taken.
        """
        if self.after_update:  # Of a `fit` that was interrupted; the callbacks of this one add theirs.
            self.after_update, self.train_function = [], None
        schedule = fitting.Schedule(epochs, initial_epoch, steps_per_epoch, callbacks, verbose, pause_every)
        if isinstance(x, tf.data.Dataset) and inputs.is_batch(x.element_spec):
            inputs.check_batch(x.element_spec)
            return execution.fit(self, x, prepare=fitting.checked, **schedule._asdict())
        data = fitting.Data(x, y, sample_weight, class_weight, batch_size, shuffle)
        has_own = validation_data is not None and not isinstance(validation_data, (tuple, list))
        size = validation_batch_size or (None if has_own else batch_size)
        held_out = fitting.HeldOut(validation_data, validation_split, validation_steps, size, validation_freq)
        return fitting.fit(self, data, held_out, schedule)

    def evaluate(
        self,
        x: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        sample_weight: Any = None,
        steps: int | None = None,
        return_dict: bool = False,
    ) -> list[float] | dict[str, float]:
        """The loss, the clean and the robust accuracy, and metrics, as validation in `fit` has them.

        Args:
            x: see `fit`, like `y`, `batch_size` and `sample_weight`.
            verbose: whether to show progress: 0 for not.
            steps: batches; None for all.
            return_dict: whether to return a dictionary instead of a list.

        Raises:
            ValueError: see `fit`.
        """
        data = fitting.Data(x, y, sample_weight, batch_size=batch_size)
        found = fitting.evaluate(self, data, steps, show=verbose != 0)
        return found if return_dict else list(found.values())

    def save(self, filepath: Any, overwrite: bool = True, **arguments: Any) -> None:
        """Saves the network, as `keras.Model.save` does."""
        self.network.save(filepath, overwrite=overwrite, **arguments)

    def export(self, filepath: Any, *arguments: Any, **named: Any) -> None:
        """Exports the network, as `keras.Model.export` does."""
        self.network.export(filepath, *arguments, **named)

    def train_step(self, batch: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Attacks a replica's share of a batch and takes a step: means over the whole batch, such as 'loss'."""
        return self.begin_step(batch).finished(batch)

    def begin_step(self, batch: Mapping[str, tf.Tensor]) -> steps.Begun:
        """The first half of `train_step`: attacks a replica's share of a batch, and changes no variable."""
        return steps.begin(self, batch)

    def measured(self, batch: Mapping[str, tf.Tensor], predictions: tf.Tensor) -> dict[str, tf.Tensor]:
        """The metrics of `compile`, once they know what the network returned for a batch."""
        labels = batch["targets"] if self.has_soft_labels else batch["label"]
        found = self.compute_metrics(None, labels, predictions, sample_weight=batch.get("weight"))
        reported = {"loss", *(each.name for each in self._reported)}
        return {name: value for name, value in found.items() if name not in reported}

    def attacked(self, x: tf.Tensor, labels: tf.Tensor, targets: tf.Tensor, seeds: tf.Tensor) -> tf.Tensor:
        """The images that the attack of the next step makes, or `x` without one.

        Args:
            x: float32 `[batch, ...]` in [0, 1].
            labels: int `[batch]`.
            targets: class probabilities `[batch, num_classes]`.
            seeds: int32 `[batch, 2]`, the batch's.

        Returns:
            Images like `x`.
        """
        return steps.attacked(self, x, labels, targets, seeds)


def _pgd(threat, loss_fn, *, num_steps, parts):
    """PGD with steps of a part of the radius; None without a radius or a loss."""
    if threat is None or loss_fn is None or not threat.epsilon:
        return None
    return functools.partial(pgd, threat=threat, loss_fn=loss_fn, num_steps=num_steps, step_size=threat.epsilon / parts)
