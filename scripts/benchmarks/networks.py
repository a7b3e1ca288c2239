"""Networks that subjects build, and what a training step is given."""

import functools
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from absl import flags

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def define_flags(values: flags.FlagValues, *, depth: int = 16, width: int = 2) -> None:
    """Those of the network."""
    flags.DEFINE_integer("depth", depth, "Of the WRN.", flag_values=values, lower_bound=10)
    flags.DEFINE_integer("width", width, "Of the WRN.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("activation", "silu", "Of the WRN.", flag_values=values)
    flags.DEFINE_enum("dtype", "float32", ["float32", "mixed_bfloat16"], "Keras' policy.", flag_values=values)


def wide_resnet(depth: int, width: int, activation: str, *, dtype: str = "float32", group_size: int | None = None):
    """A WRN for CIFAR-10 whose classifier does not start at zero."""
    from robust_keras.models import wide_resnet

    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(0)
    try:
        network = wide_resnet.wide_resnet(
            depth=depth,
            width=width,
            num_classes=10,
            activation=activation,
            mean=MEAN,
            std=STD,
            statistics_group_size=group_size,
        )
    finally:
        keras.config.set_dtype_policy(previous)
    kernel = network.layers[-1].kernel
    kernel.assign(0.1 * tf.random.stateless_normal(kernel.shape, (0, 0)))
    return network


def evaluated(network: keras.Model):
    """A function of images to logits, as evaluation calls the network."""
    from robust_keras.models import any_network

    return any_network.as_logits_fn(network)


def images(num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Random bytes `[num_images, 32, 32, 3]`, and labels."""
    rng = np.random.default_rng(0)
    shape = (num_images, 32, 32, 3)
    return rng.integers(0, 256, shape, np.uint8), rng.integers(0, 10, num_images, np.int32)


def batch(num_images: int) -> dict[str, Any]:
    """A batch of a training step, of random bytes."""
    from robust_keras import noise

    x, labels = images(num_images)
    return {
        "image": tf.constant(x),
        "label": tf.constant(labels),
        "targets": tf.one_hot(labels, 10),
        "seeds": noise.example_seeds(0, 0, tf.range(num_images)),
    }


def model(network: keras.Model, *, objective: str, attack_steps: int, batch_norm: str, optimizer: Any = None):
    """An `AdversarialModel` around a network, compiled: PGD in Linf 8/255 with steps of 2/255."""
    import robust_keras as rk
    from robust_keras import losses, threats
    from robust_keras.attacks.pgd import pgd

    attack = None
    if attack_steps:
        loss_fn = losses.kl_divergence if objective == "trades" else losses.cross_entropy
        threat = threats.threat(norm="Linf", epsilon="8/255")
        attack = functools.partial(pgd, threat=threat, loss_fn=loss_fn, num_steps=attack_steps, step_size="2/255")
    made = rk.AdversarialModel(
        network, objective=objective, attack=attack, attack_batch_norm=batch_norm, log_accuracy=False
    )
    made.compile(optimizer or rk.NesterovSGD(0.1, momentum=0.9, weight_decay=5e-4))
    made.optimizer.build(network.trainable_variables)
    return made
