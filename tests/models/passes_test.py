"""Passes of a training step through networks that say themselves how some of their layers are to behave."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.training.adversarial_model import AdversarialModel
from tests.training.any_keras_model_test import BATCH, NUM_CLASSES, SHAPE, images


class Block(keras.layers.Layer):
    """Statistics of its own, and noise inside."""

    def __init__(self):
        super().__init__()
        self.drop = keras.layers.Dropout(0.5)

    def build(self, shape):
        self.average = self.add_weight(shape=(shape[-1],), initializer="ones", trainable=False)

    def call(self, x, training=False):
        if training:
            self.average.assign(0.5 * self.average)
        return self.drop(x - self.average, training=training)


class SaysItself(keras.Model):
    """Some layers are told `training` by the network itself, one of them in its second call."""

    def __init__(self):
        super().__init__()
        self.frozen, self.always, self.norm = (keras.layers.BatchNormalization() for _ in range(3))
        self.block, self.head = Block(), keras.layers.Dense(NUM_CLASSES)

    def call(self, x, training=False, how=None):
        told = {"frozen": False, "always": True, "block": training, "norm": training, **(how or {})}
        x = self.norm(self.frozen(x, training=told["frozen"]), training=told["norm"])
        x = self.norm(self.always(x, training=told["always"]), training=False)
        x = self.block(x, training=told["block"])
        return self.head(keras.ops.reshape(x, (-1, int(np.prod(SHAPE)))))


@pytest.mark.parametrize("statistics, noise", [("batch", False), ("moving", True)])
def test_an_attack_leaves_alone_what_the_network_says_itself(statistics, noise):
    keras.utils.set_random_seed(0)
    network = SaysItself()
    x = tf.constant(images(BATCH)[0] / np.float32(255))
    network(x)
    network.block.drop.rate = 0.5 if statistics == "batch" else 0.0  # Where noise is on, there would be no number.
    before, seen = network.get_weights(), []
    labels, seeds = tf.zeros(BATCH, tf.int32), tf.zeros((BATCH, 2), tf.int32)

    def attack(logits_fn, x, targets, *, seeds):
        seen.append(logits_fn(x))
        return x

    model = AdversarialModel(network, attack=attack, attack_batch_norm=statistics, attack_noise=noise)
    model.attacked(x, labels, tf.one_hot(labels, NUM_CLASSES), seeds)
    for weight, value in zip(network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)
    expected = network(x, how={"norm": statistics == "batch", "block": noise})
    np.testing.assert_allclose(seen[0], expected, rtol=1e-5, atol=1e-5)
    network.set_weights(before)
    assert (
        np.abs(seen[0] - network(x, how={"frozen": True, "norm": True, "always": statistics == "batch"})).max() > 1e-2
    )
