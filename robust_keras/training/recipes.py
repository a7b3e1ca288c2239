"""What a training run is told: what identifies it, where it computes, and when it validates, saves and logs."""

from collections.abc import Callable
from typing import NamedTuple

from robust_keras.models.normalization import BATCH


class InnerAttack(NamedTuple):
    """The attack inside a training step.

    Attributes:
        attack_fn: `(logits_fn, x, targets, *, seeds) -> x_adv`.
        target: what it moves away from, one of `adversarial_model.ATTACK_TARGETS`.
        batch_norm: mode of `BatchNorm` in it, 'batch' or 'moving'; see `AdversarialModel`.
        epsilon_warmup_steps: over which its radius grows; see there.
    """

    attack_fn: Callable
    target: str = "label"
    batch_norm: str = BATCH
    epsilon_warmup_steps: int = 0


class Optimizer(NamedTuple):
    """Nesterov SGD with these values, `optimizer.NesterovSGD`, or another optimiser.

    Attributes:
        learning_rate: `(step, *, num_steps)`, one of `schedules`.
        momentum: of the buffer of Nesterov SGD.
        weight_decay: factor of its L2 term.
        make: `(learning_rate) -> keras.optimizers.Optimizer`, which is given a Keras schedule; None for Nesterov SGD.
    """

    learning_rate: Callable
    momentum: float = 0.9
    weight_decay: float = 5e-4
    make: Callable | None = None


class Averaging(NamedTuple):
    """Weight averaging; see `weight_averaging.WeightAveraging`.

    Attributes:
        tau: the decay rate, in [0, 1).
        warm_up: whether the decay rises to it.
    """

    tau: float
    warm_up: bool = True


class Validation(NamedTuple):
    """How held-out images tell the best weights.

    Attributes:
        correct_fn: `(logits_fn, x, labels, *, seeds) -> (clean, robust)`: bool `[batch]` each, what is right.
        best_by: the accuracy that tells the best weights, 'robust' or 'clean'; of averaged weights where there are
            some.
        needs_wrong_ones: whether `correct_fn` has to see images that are classified wrongly before any attack. Those
            that it need not see count as neither.
        seen_fn: like `correct_fn`, to `(clean, robust, clean margin, robust margin, x_adv)`: what TensorBoard is shown;
            margins are `losses.margin`, `[batch]`. None where there is none.
    """

    correct_fn: Callable
    best_by: str = "robust"
    needs_wrong_ones: bool = True
    seen_fn: Callable | None = None


class Recipe(NamedTuple):
    """What identifies a run: with another value it is another run.

    Attributes:
        data: `(*, data_dir) -> data.training_batches.TrainingData`.
        model: `(*, num_classes, mean, std, input_shape) -> keras.Model`, such as `wide_resnet` with depth and width
            bound.
        batches: `(data, *, seed, num_steps, start_step) -> tf.data.Dataset`, such as `training_batches.batches` with
            its batch size bound.
        objective: see `AdversarialModel`.
        attack: an `InnerAttack`, or None for an objective that needs none.
        optimizer: an `Optimizer`.
        validation: a `Validation`.
        train_steps: optimiser steps of the whole run.
        seed: of initial weights, order, augmentation and noise.
        averaging: an `Averaging`, or None for none.
        dtype_policy: Keras' policy for the layers of the network that is trained, 'float32' or 'mixed_bfloat16'.
            Pixels, attacks, losses, averaged and exported networks are float32 all the same.
        initial_weights: `() -> {name: array}`, the network's to start from, such as `load_weights` with a path bound;
            None for new ones. A run that goes on does not need them again.
    """

    data: Callable
    model: Callable
    batches: Callable
    objective: Callable
    attack: InnerAttack | None
    optimizer: Optimizer
    validation: Validation
    train_steps: int
    seed: int
    averaging: Averaging | None = None
    dtype_policy: str = "float32"
    initial_weights: Callable | None = None


class Layout(NamedTuple):
    """Where and in what portions a run computes. It is the same run on any layout, and may change when it goes on.

    Attributes:
        strategy: name of a `strategies.strategy`; all its processes call `train` with the same arguments.
        tpu: address of the TPU, see there.
        accumulation_steps: see `AdversarialModel`.
        steps_per_execution: steps in one compiled call, which also ends where anything is due. SIGTERM is heard between
            calls.
        jit_compile: whether to compile the whole step with XLA (always the case on TPU).
        validation_batch_size: images in a batch of the validation attack, over all replicas.
    """

    strategy: str = "auto"
    tpu: str | None = None
    accumulation_steps: int = 1
    steps_per_execution: int = 1
    jit_compile: bool = False
    validation_batch_size: int = 128

    def on_one_device(self) -> "Layout":
        """The layout of one device's program, of which all is compiled together, and not parts of it."""
        return self._replace(strategy="one", tpu=None, steps_per_execution=1, jit_compile=False)


class Cadence(NamedTuple):
    """When a run validates, saves and says something. It may change when the run goes on.

    Attributes:
        validate_every: steps between validations; the last step is validated too.
        checkpoint_every: steps between snapshots; the last step has one too.
        log_every: steps between rows of metrics.csv.
        num_checkpoints: snapshots kept.
        progress: whether to show a progress bar or, where stderr is no terminal, lines between validations.
    """

    validate_every: int = 1000
    checkpoint_every: int = 1000
    log_every: int = 50
    num_checkpoints: int = 2
    progress: bool = True
