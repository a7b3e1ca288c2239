"""Smooth networks on images of any shape, for the tests of attacks."""

import math

import numpy as np
import tensorflow as tf

from robust_keras import noise


def seeds_of(indices, run_seed=0):
    return noise.example_seeds(run_seed, 0, tf.constant(np.array(indices, np.int32)))


def smooth_network(shape, num_classes, seed=0):
    """`tanh((x - 1/2) hidden) output`, images of any shape; its logits spread evenly over the classes."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    hidden = tf.constant(rng.normal(0.0, 2.5 / size**0.5, (size, 24)), tf.float32)
    output = tf.constant(rng.normal(size=(24, num_classes)), tf.float32)
    return lambda x: tf.tanh(tf.reshape(x - 0.5, (-1, size)) @ hidden) @ output


def pictures(shape, num, seed=1):
    return tf.constant(np.clip(np.random.default_rng(seed).uniform(-0.1, 1.1, (num, *shape)), 0, 1), tf.float32)


def predictions(network, x):
    return tf.argmax(network(x), axis=-1, output_type=tf.int32)
