"""Random numbers as a pure function of a seed, one seed per example.

`seeds` is int32 `[batch, 2]`. An example's noise depends on its own seed and on nothing else: not on the
batch around it, the replica, the number of devices, or how often the run was interrupted. Every number
comes from Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"),
in uint32 additions, rotations and exclusive ors, so it is vectorised over the batch and compiles with XLA.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

# What a seed is folded with before use, so that no two uses share numbers.
AUGMENTATION = 1
ATTACK = 2
VALIDATION = 3
MIXING = 4

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry(key: Sequence[tf.Tensor], counter: Sequence[tf.Tensor]) -> tuple[tf.Tensor, tf.Tensor]:
    """Threefry-2x32-20.

    Args:
        key: a pair of uint32 tensors.
        counter: a pair of uint32 tensors that broadcast with `key`.

    Returns:
        A pair of uint32 tensors of the broadcast shape.
    """
    rounds = _rounds_as_one_call if tf.inside_function() else _rounds
    return rounds(*key, *counter)


def _rounds(key_0, key_1, x0, x1):
    keys = (key_0, key_1, tf.bitwise.bitwise_xor(tf.bitwise.bitwise_xor(key_0, key_1), _u32(_PARITY)))
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = tf.bitwise.bitwise_xor(_rotate_left(x1, rotation), x0)
        x0 = x0 + keys[(block + 1) % 3]
        x1 = x1 + keys[(block + 2) % 3] + _u32(block + 1)
    return x0, x1


# Some 180 operations, most of what a small attack is traced from: traced once for each shape, not at each use.
_rounds_as_one_call = tf.function(_rounds, autograph=False)


def example_seeds(run_seed: int, step: Any, indices: Any, copies: Any = 0) -> tf.Tensor:
    """One seed for each example of a batch.

    Args:
        run_seed: int, the seed of the run.
        step: int, the training step (or 0 in an evaluation).
        indices: int `[batch]`, each example's index in the whole of the data.
        copies: int or int `[batch]`, which copy of the example this is where a batch repeats it.

    Returns:
        int32 `[batch, 2]`.
    """
    indices = tf.convert_to_tensor(indices)
    zeros = tf.zeros_like(indices)
    key = (_to_u32(zeros + tf.cast(run_seed, indices.dtype)), _to_u32(zeros + tf.cast(copies, indices.dtype)))
    counter = (_to_u32(zeros + tf.cast(step, indices.dtype)), _to_u32(indices))
    return tf.bitcast(tf.stack(threefry(key, counter), axis=-1), tf.int32)


def fold_in(seeds: tf.Tensor, data: Any) -> tf.Tensor:
    """New seeds from `seeds` (int32 `[batch, 2]`) and an int, such as a use or a restart's number."""
    key = _split(seeds)
    data = tf.zeros_like(key[0]) + _to_u32(tf.convert_to_tensor(data))
    words = threefry(key, (data, tf.fill(tf.shape(data), _u32(0xFFFFFFFF))))
    return tf.bitcast(tf.stack(words, axis=-1), tf.int32)


def bits(seeds: tf.Tensor, num: int) -> tf.Tensor:
    """`num` random 32-bit words an example: uint32 `[batch, num]`."""
    num_blocks = (num + 1) // 2
    key = tuple(word[:, None] for word in _split(seeds))
    counter = (_to_u32(tf.range(num_blocks))[None, :], tf.zeros((1, 1), tf.uint32))
    return tf.concat(threefry(key, counter), axis=1)[:, :num]


def uniform(seeds: tf.Tensor, shape: Sequence[int], minval: Any = 0.0, maxval: Any = 1.0) -> tf.Tensor:
    """Uniform float32 in [minval, maxval), `[batch, *shape]`, on a grid of 2^-24 of the interval.

    Its ends are numbers, or float32 tensors that broadcast against the result.
    """
    if tf.is_tensor(maxval):
        below = tf.math.nextafter(maxval, -np.inf)
    else:
        below = np.nextafter(np.float32(maxval), np.float32(-np.inf))
    num = math.prod(shape)
    unit = tf.cast(tf.bitwise.right_shift(bits(seeds, num), _u32(8)), tf.float32) * 2.0**-24
    return tf.minimum(minval + tf.reshape(unit, (-1, *shape)) * (maxval - minval), below)


def normal(seeds: tf.Tensor, shape: Sequence[int]) -> tf.Tensor:
    """Standard normal float32, `[batch, *shape]`, by inversion."""
    cells = tf.cast(tf.bitwise.right_shift(bits(seeds, math.prod(shape)), _u32(8)), tf.float32)
    # The midpoints of 2^24 cells of (-1, 1), exact in float32; the ends would be infinite.
    midpoints = (cells - 8388607.5) * 2.0**-23
    # TensorFlow's erfinv is exact near -1 and infinite near 1.
    values = -math.sqrt(2.0) * tf.sign(midpoints) * tf.math.erfinv(-tf.abs(midpoints))
    return tf.reshape(values, (-1, *shape))


def integers(seeds: tf.Tensor, num: int, bound: Any) -> tf.Tensor:
    """`num` integers an example, uniform in [0, bound): int32 `[batch, num]`. `bound` is a small int (< 2^16)."""
    # The top 16 bits times the bound: no division, and a bias under 2^-16 * bound.
    high = tf.bitwise.right_shift(bits(seeds, num), _u32(16))
    return tf.cast(tf.bitwise.right_shift(high * _u32(bound), _u32(16)), tf.int32)


def _u32(value):
    return tf.constant(value, tf.uint32)


def _to_u32(x):
    return tf.bitcast(tf.cast(x, tf.int32), tf.uint32)


def _split(seeds):
    words = tf.bitcast(tf.cast(seeds, tf.int32), tf.uint32)
    return words[:, 0], words[:, 1]


def _rotate_left(x, distance):
    left = tf.bitwise.left_shift(x, _u32(distance))
    return tf.bitwise.bitwise_or(left, tf.bitwise.right_shift(x, _u32(32 - distance)))
