"""What a core runs at once, as training and evaluation compile it: their own functions, with arguments of their shapes.

with parts.Cores(32).scope():
    program = training_program.build(recipe, layout, data)
    for part in parts.of_training(program, recipe, layout, batch):
        lowering.lower(part.function, *part.arguments)
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras.attacks.attack import Attack
from robust_keras.data import sources, training_batches
from robust_keras.engines import replicas
from robust_keras.engines.halves import Halves
from robust_keras.evaluation import batching
from robust_keras.training.program import Program
from robust_keras.training.recipes import Layout, Recipe


class Part(NamedTuple):
    """What a core runs at once.

    Attributes:
        name: for people.
        function: of tensors.
        arguments: of their shapes; their values don't matter.
        keeps: whether the variables that it takes, such as weights, momentum and averages, stay in memory while others
            run.
    """

    name: str
    function: Callable
    arguments: tuple
    keeps: bool = False


class Cores:
    """In place of a strategy over cores that are not there, for programs that are lowered and not run.

    As under the strategy `jax`, every core has programs of its own and sums over cores are taken between them.

    Args:
        num_cores: over which batches are spread.
    """

    def __init__(self, num_cores: int) -> None:
        self.num_replicas_in_sync = num_cores

    @contextlib.contextmanager
    def scope(self) -> Iterator["Cores"]:
        """Inside the context, replicas are these cores."""
        with replicas.entered(self):
            yield self

    def bring_back(self) -> None:
        """Does nothing: variables are where they are."""

    def over_replicas(self, fn: Callable) -> Callable:
        """The function that a core runs."""
        return fn


def black_images(name: str, image_shape: tuple, num_classes: int, *, has_extra: bool) -> training_batches.TrainingData:
    """Data of a shape, an image a class, in place of a set that need not be there.

    Args:
        name: of the set, by which its channel statistics may be known.
        image_shape: (height, width, channels).
        num_classes: of the set.
        has_extra: whether there are pseudo-labelled images beside.
    """
    images = np.zeros((num_classes, *image_shape), np.uint8)
    source = sources.Source(name, images, np.arange(num_classes, dtype=np.int32), num_classes)
    extra = source if has_extra else None
    return training_batches.TrainingData(source, source, extra, *sources.channel_statistics(source))


def of_training(program: Program, recipe: Recipe, layout: Layout, batch: dict[str, tf.TensorSpec]) -> Iterator[Part]:
    """The parts of a training run, in the scope of `Cores` as all that is done with them.

    These are the halves of a step, between which cores add up what they found: its attack and gradients, and the
    update of weights, momentum and averages; the attack alone; and the validations.

    Args:
        program: what `training.program.build` makes of the recipe on the layout `on_one_device`.
        recipe: of the run.
        layout: of the run.
        batch: the specification of a batch over all cores.
    """
    num_cores = replicas.num_replicas()

    def share(size, *names, **dtypes):
        return tuple(_zeros(batch[name], size // num_cores, dtypes.get(name)) for name in names)

    batch_size = batch["image"].shape[0]
    step = dict(zip(batch, share(batch_size, *batch)))
    halves = Halves(program.model)
    yield Part("training step, gradients", halves.begin, (tf.constant(0), step), keeps=True)
    with contextlib.suppress(tf.errors.OperatorNotAllowedInGraphError):  # For which the first half is refused.
        found = _specs_of(halves.begin, tf.constant(0), step)
        if all(spec.shape.is_fully_defined() for spec in tf.nest.flatten(found)):
            yield Part("training step, update", halves.update, (*found, {}), keeps=True)
    if recipe.attack is not None:
        size = batch_size // layout.accumulation_steps
        attacked = share(size, "image", "label", "targets", "seeds", image=tf.float32)
        yield Part("training attack", program.model.attacked, attacked)
    for ending, correct in program.validator.on_replica.items():
        name = f"validation{ending.replace('_', ', ')}"
        yield Part(name, correct, share(layout.validation_batch_size, "image", "label", "seeds"))


def of_evaluation(
    network: keras.Model, attacks: Sequence[Attack], image_shape: tuple, num_classes: int, *, batch_size: int
) -> Iterator[Part]:
    """The parts of an evaluation: the prediction and each attack.

    Args:
        network: images in [0, 1] to logits.
        attacks: records, a baseline too.
        image_shape: (height, width, channels).
        num_classes: of the logits.
        batch_size: images on a core.
    """
    logits_fn = functools.partial(network, training=False)
    x, labels = tf.zeros((batch_size, *image_shape)), tf.zeros(batch_size, tf.int32)
    seeds, logits = tf.zeros((batch_size, 2), tf.int32), tf.zeros((batch_size, num_classes))
    yield Part("prediction", logits_fn, (x,))
    for attack in attacks:
        run, begin, advance = batching.programs(attack, logits_fn, num_classes)
        if run is not None:
            yield Part(f"attack {attack.name}", run, (x, labels, seeds))
        if begin is not None and advance is not None:
            beginning = x, labels, logits, seeds, labels
            progress = _zeros_like(begin, *beginning)
            yield Part(f"attack {attack.name}, start", begin, beginning)
            yield Part(f"attack {attack.name}, steps", advance, (x, labels, progress, tf.constant(1)))


def _zeros(spec: tf.TensorSpec, size: int, dtype: tf.DType | None = None) -> tf.Tensor:
    return tf.zeros((size, *spec.shape[1:]), dtype or spec.dtype)


def _zeros_like(function: Callable, *arguments: Any) -> Any:
    """A nest of tensors like what a function returns."""
    return tf.nest.map_structure(lambda spec: tf.zeros(spec.shape, spec.dtype), _specs_of(function, *arguments))


def _specs_of(function: Callable, *arguments: Any) -> Any:
    """A nest of `tf.TensorSpec` like what a function returns, which is traced and not run."""
    returned = tf.function(function, autograph=False).get_concrete_function(*arguments).structured_outputs
    return tf.nest.map_structure(lambda each: tf.TensorSpec(each.shape, each.dtype), returned)
