"""Attacks on any Keras model, with images and labels as they are:

    >>> import keras, numpy as np, robust_keras as rk
    >>> network = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])
    >>> x, y = np.full((4, 8, 8, 1), 128, np.uint8), [0, 1, 2, 0]
    >>> x_adv = rk.attacks.pgd(network, x, y, norm="Linf", epsilon="8/255", num_steps=5)
    >>> x_adv.shape, bool(np.abs(x_adv - x / 255).max() < 8.1 / 255)
    ((4, 8, 8, 1), True)

A call compiles the attack once: give it all images together. For a program or a training step there are the functions
inside the modules, such as `attacks.pgd.pgd`, which take a threat model and seeds.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import keras
import numpy as np
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras import compilation, losses, noise, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.apgd import apgd as apgd_of
from robust_keras.attacks.apgd import apgd_targeted as apgd_targeted_of
from robust_keras.attacks.attack import Attack, as_attack
from robust_keras.attacks.autoattack import autoattack as autoattack_of
from robust_keras.attacks.fab import fab as fab_of
from robust_keras.attacks.multi_targeted import multi_targeted as multi_targeted_of
from robust_keras.attacks.pgd import pgd as pgd_of
from robust_keras.attacks.square import square as square_of
from robust_keras.models import any_network, outputs, searching

_ARGUMENTS = """
    Args:
        network: a `keras.Model`, called with `training=False`, or a function of images through which gradients flow.
            An `AdversarialModel` stands for its network, its bounds and what it returns, which nothing may contradict,
            and for its norm and radius where none are given.
        x: images `[N, ...]`: uint8, or floats of the `bounds`.
        y: labels: integers `[N]` or `[N, 1]`, or one-hot rows `[N, num_classes]`.
        norm: 'Linf', 'L2' or 'L1'.
        epsilon: the radius as a fraction of the pixel range: a number, or an exact fraction such as '8/255'.
        bounds: `(low, high)`, the pixel values that the network takes for black and white; (0, 1) unless said.
        from_logits: whether it returns logits, as it does unless said; False where it returns probabilities.
        batch_size: images in a batch; the last one is filled up.
        seed: of random starts and the like; with the same one the images are the same.
        **settings: {settings}; see `robust_keras.attacks.{name}`.

    Returns:
        float32 like `x`, of the network's own range, in the bounds and in the ball: {returns}.

    Raises:
        ValueError: before the attack, for images, labels, settings or a network that do not fit together.
"""


class AttackOnModel(Protocol):
    """How the attacks of this module are called."""

    def __call__(
        self,
        network: keras.Model | Callable,
        x: Any,
        y: Any,
        *,
        norm: str | None = None,
        epsilon: float | str | None = None,
        bounds: Sequence[float] | None = None,
        from_logits: bool | None = None,
        batch_size: int = 128,
        seed: int = 0,
        **settings: Any,
    ) -> np.ndarray:
        """See the attacks."""


class _Given(NamedTuple):
    """A model, images and labels, and how they are read."""

    reading: any_network.Reading
    x: Any
    y: Any
    batch_size: int
    seed: int


class _Task(NamedTuple):
    """What is attacked: float32 `images` in [0, 1], int32 `labels`, a function to logits, and the same for searches."""

    images: np.ndarray
    labels: np.ndarray
    logits_fn: Callable
    search_fn: Callable
    batch_size: int
    is_fixed: bool  # Whether the model takes batches of this size alone.
    seed: int


def _on_models(inner: Callable, summary: str, returns: str, **defaults: Any) -> AttackOnModel:
    """The public function of an attack, or of a list of them, that takes a `threat` and settings."""
    own = {
        name: each.replace(default=defaults.get(name, each.default))
        for name, each in inspect.signature(inner).parameters.items()
        if each.kind is inspect.Parameter.KEYWORD_ONLY and name not in ("threat", "seeds")
    }

    def attack(
        network, x, y, *, norm=None, epsilon=None, bounds=None, from_logits=None, batch_size=128, seed=0, **settings
    ):
        if unknown := settings.keys() - own.keys():
            names = ", ".join(sorted(unknown))
            raise ValueError(f"Expected settings out of {', '.join(own)}. Received: {names}")
        reading = any_network.read(network, bounds=bounds, from_logits=from_logits)
        threat = reading.against(norm, epsilon)
        bound = functools.partial(inner, threat=threat, **{**defaults, **settings})
        attacks = bound() if inner is autoattack_of else [bound]
        given = _Given(reading, x, y, batch_size, seed)
        return _run(given, [as_attack(each) for each in attacks], threat)

    made: Any = attack
    name = inner.__name__
    first = [each for each in inspect.signature(attack).parameters.values() if each.name != "settings"]
    made.__name__ = made.__qualname__ = name
    made.__signature__ = inspect.Signature([*first, *own.values()], return_annotation=np.ndarray)
    names = ", ".join(f"`{each}`" for each in own)
    made.__doc__ = summary + _ARGUMENTS.format(settings=names, name=name, returns=returns)
    made.inner = functools.partial(inner, **defaults)
    return cast(AttackOnModel, made)


def _run(given: _Given, attacks: list[Attack], threat: threats.Threat) -> np.ndarray:
    """Attacks in order, each on what still stands; of a single one, whatever it makes of all images."""
    needs_gradients = any(attack.name != "square" for attack in attacks)
    task = _task(given, threat, needs_gradients)
    adversarial, standing = task.images.copy(), np.arange(len(task.images))
    for attack in attacks:
        if len(standing):
            adversarial[standing], is_wrong = _attacked(attack, task, standing)
            standing = standing[~is_wrong]
    low, high = map(np.float32, given.reading.bounds)
    return np.clip(pixel_bounds.from_unit(adversarial, given.reading.bounds), low, high, dtype=np.float32)


def _task(given: _Given, threat: threats.Threat, needs_gradients: bool) -> _Task:
    """What is attacked, looked at: model, images and labels have to fit together."""
    if tf.is_tensor(given.x) and not tf.executing_eagerly():
        raise ValueError(
            "Expected images that have values; programs call the functions inside the modules, such as "
            f"attacks.pgd.pgd. Received: {given.x}"
        )
    images = pixel_bounds.to_unit(np.asarray(given.x), given.reading.bounds)
    labels = losses.as_labels(given.y).numpy()
    if len(images.shape) < 2 or len(images) != len(labels):
        raise ValueError(f"Expected a label for each image. Received: {len(labels)} for images {images.shape}")
    if given.batch_size < 1:
        raise ValueError(f"Expected a batch_size >= 1. Received: {given.batch_size}")
    network, bounds, from_logits, _ = given.reading
    logits_fn = any_network.as_logits_fn(network, bounds=bounds, from_logits=from_logits)
    only = getattr(logits_fn, "batch_size", None)
    batch_size = only or min(given.batch_size, len(images))
    if len(images):
        first = threats.check_images(images[_packed(np.arange(len(images))[:batch_size], batch_size)], threat)
        logits = any_network.try_out(logits_fn, first, needs_gradients=needs_gradients).numpy()
        outputs.check(logits, are_log_probabilities=outputs.are_log_probabilities(logits_fn))
        losses.check_labels(given.y, logits.shape[-1])
        logits_fn = any_network.sized(outputs.attackable(logits_fn, logits), logits.shape[-1])
    search_fn = searching.search_fn(logits_fn)
    return _Task(images, labels, logits_fn, search_fn, batch_size, only is not None, given.seed)


def _attacked(attack: Attack, task: _Task, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What an attack makes of the images `indices`, and which of it the model gets wrong."""

    def run(x, labels, seeds):
        x_adv = attack.run(task.search_fn, x, labels, seeds=seeds)
        return x_adv, losses.is_wrong(task.logits_fn(x_adv), labels)

    compiled: Any = compilation.function(run)
    size = task.batch_size if task.is_fixed else min(task.batch_size, len(indices))
    found = []
    for start in range(0, len(indices), size):
        chosen = indices[start : start + size]
        packed = _packed(chosen, size)
        seeds = noise.example_seeds(task.seed, 0, tf.constant(packed, tf.int32))
        seeds = stepwise.seeds_of(attack.search, noise.fold_in(seeds, noise.ATTACK))
        batch = tf.constant(task.images[packed]), tf.constant(task.labels[packed]), seeds
        if not start:  # All batches are of one shape.
            program = compiled.get_concrete_function(*batch)
        found.append([each.numpy()[: len(chosen)] for each in program(*batch)])
    x_adv, is_wrong = (np.concatenate(parts) for parts in zip(*found))
    return x_adv, is_wrong


def _packed(chosen: np.ndarray, size: int) -> np.ndarray:
    """A batch of `size` of the `chosen`, filled up with copies."""
    return np.resize(chosen, size)


_LAST = "the attack's last images, whether or not they fool the network"
_FOUND = "images that fool the network, and where none was found `x` itself"

pgd = _on_models(
    pgd_of,
    """Projected gradient ascent; by default PGD-40 on the margin, the paper's measure while training.

    The margin, `max_{c != y} z_c - z_y`, is positive exactly where an image is misclassified, and keeps its gradient
    where a network is so sure that the cross-entropy has none. In Linf steps are Adam's, elsewhere along the gradient.
""",
    _LAST,
    loss_fn=losses.margin,
    num_steps=40,
)
apgd = _on_models(
    apgd_of, "Auto-PGD (Croce & Hein 2020); by default 100 steps on the cross-entropy, 'apgd-ce'.\n", _FOUND
)
apgd_targeted = _on_models(
    apgd_targeted_of, "Auto-PGD towards up to nine wrong classes, one after another, 'apgd-t'.\n", _FOUND
)
fab = _on_models(fab_of, "FAB, which looks for the nearest misclassified image (Croce & Hein 2020b).\n", _FOUND)
square = _on_models(square_of, "Square Attack, which needs no gradients (Andriushchenko et al. 2020).\n", _FOUND)
multi_targeted = _on_models(
    multi_targeted_of, "MultiTargeted (Gowal et al. 2019): PGD on the margin of each wrong class.\n", _FOUND
)
autoattack = _on_models(
    autoattack_of,
    """AutoAttack (Croce & Hein 2020): the attacks of a version in order, each on the images that still stand.

    `robust_keras.evaluate` runs the same attacks faster, verifies every image and warns where gradients are masked.
""",
    _FOUND,
)
