"""What a run computes, from its recipe: the network and its twin, the training step, the validation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras.data.training_batches import TrainingData
from robust_keras.engines import strategies
from robust_keras.models import weights
from robust_keras.training import weight_decay
from robust_keras.training.adversarial_model import AdversarialModel
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.recipes import Layout, Recipe
from robust_keras.training.validation import Validator
from robust_keras.training.weight_averaging import WeightAveraging


class Program(NamedTuple):
    """What `build` makes.

    Attributes:
        network: the network that is trained, with its initial weights.
        averaging: the callback that holds its averaged twin and is part of `model.train_step`, or None.
        model: the `AdversarialModel` around the network, compiled; `model.train_step(batch)` is a step.
        validator: the validation; `validator.on_replica` are the functions that replicas run.
        learning_rate: of the step.
        names: of the network's weights and, in the same order, its twin's.
        architecture: the network in float32, as `keras.models.model_from_json` reads it.
    """

    network: keras.Model
    averaging: WeightAveraging | None
    model: AdversarialModel
    validator: Validator
    learning_rate: Callable
    names: list[str]
    architecture: str

    @property
    def twin(self) -> keras.Model | None:
        """The network with the averaged weights."""
        return self.averaging.twin if self.averaging else None


def build(recipe: Recipe, layout: Layout, data: TrainingData) -> Program:
    """Makes what a run executes, with new weights, in the scope of the layout's strategy.

    Args:
        recipe: what is trained.
        layout: where, and in what portions.
        data: what the recipe's `data` loads, or other images of the same shape and classes.

    Returns:
        A `Program`.

    Raises:
        ValueError: for settings that do not fit together, or a network that could not be saved.
    """
    strategy = strategies.strategy(layout.strategy, tpu=layout.tpu)
    learning_rate = functools.partial(recipe.optimizer.learning_rate, num_steps=recipe.train_steps)
    learning_rate(0)  # A bad setting shows now.
    architecture, drawn = _drawn(recipe, data)
    with strategy.scope():
        network = _network(recipe, data, recipe.dtype_policy)
        weights.assign(network, drawn, list(drawn))
        averaging = None
        if recipe.averaging is not None:
            averaging = WeightAveraging(_network(recipe, data), **recipe.averaging._asdict())
        model = _compiled(network, learning_rate, recipe, layout)
        if averaging:
            averaging.set_model(model)
        validator = Validator(
            network,
            averaging.twin if averaging else None,
            data.validation,
            recipe.validation,
            batch_size=layout.validation_batch_size,
            seed=recipe.seed,
        )
    return Program(network, averaging, model, validator, learning_rate, list(drawn), architecture)


def network_of(architecture: str, arrays: Mapping[str, np.ndarray]) -> keras.Model:
    """A float32 network from `Program.architecture` and weights by name."""
    network = keras.models.model_from_json(architecture)
    weights.assign(network, arrays)
    return network


def _drawn(recipe: Recipe, data: TrainingData) -> tuple[str, dict[str, np.ndarray]]:
    """The architecture, and the initial weights by name, the same on every device."""
    keras.utils.set_random_seed(recipe.seed)
    with tf.device("CPU:0"):  # Other devices draw other numbers.
        network = _network(recipe, data)
        drawn = {name: weight.numpy() for name, weight in weights.by_name(network).items()}
        try:  # Not after the last step.
            architecture = network.to_json()
            read = keras.models.model_from_json(architecture)
            weights.assign(read, drawn)
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                "Expected a network that Keras can save and load: layers with get_config, registered with "
                f"keras.saving.register_keras_serializable. Received: {reason}"
            ) from error
    return architecture, drawn


def _network(recipe: Recipe, data: TrainingData, dtype_policy: str = "float32") -> keras.Model:
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype_policy)
    try:
        return recipe.model(
            num_classes=data.labelled.num_classes,
            mean=data.mean,
            std=data.std,
            input_shape=data.image_shape,
        )
    finally:
        keras.config.set_dtype_policy(previous)


def _compiled(network: keras.Model, learning_rate: Callable, recipe: Recipe, layout: Layout) -> AdversarialModel:
    attack: dict[str, Any] = {}
    if recipe.attack is not None:
        attack_fn, target, batch_norm, warmup_steps = recipe.attack
        attack = {"attack": attack_fn, "attack_target": target, "attack_batch_norm": batch_norm}
        attack["epsilon_warmup_steps"] = warmup_steps
    model = AdversarialModel(
        network,
        objective=recipe.objective,
        accumulation_steps=layout.accumulation_steps,
        log_accuracy=False,  # It would cost adversarial training a pass.
        **attack,
    )
    optimizer = _optimizer(learning_rate, recipe)
    weight_decay.leave_out_scales(optimizer, network)
    optimizer.build(network.trainable_variables)
    model.compile(optimizer=optimizer, jit_compile=layout.jit_compile, steps_per_execution=layout.steps_per_execution)
    return model


def _optimizer(learning_rate: Callable, recipe: Recipe) -> keras.optimizers.Optimizer:
    given = recipe.optimizer
    if given.make is None:
        return NesterovSGD(learning_rate, momentum=given.momentum, weight_decay=given.weight_decay)
    made = given.make(_Schedule(learning_rate))
    if not isinstance(made, keras.optimizers.Optimizer):
        raise ValueError(f"Expected a keras.optimizers.Optimizer from train.optimizer. Received: {made!r}")
    return made


class _Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """A learning rate of the step as Keras' optimisers take it."""

    def __init__(self, learning_rate: Callable) -> None:
        self.learning_rate = learning_rate

    def __call__(self, step):
        return tf.cast(self.learning_rate(tf.cast(step, tf.int64)), tf.float32)
