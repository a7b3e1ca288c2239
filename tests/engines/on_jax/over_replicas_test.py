"""Functions of a batch on several devices of JAX."""

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise
from robust_keras.engines import lowering, replicas

X = tf.constant(np.random.default_rng(0).random((8, 3)), tf.float32)
LABELS = tf.range(8)


def test_a_batch_is_shared_among_devices(on_jax):
    weight, shift = tf.Variable([1.0, 2.0, 3.0]), tf.constant([0.5, 0.5, 0.5])
    traced = []

    def fn(batch, scale):
        traced.append(batch["x"].shape[0])
        y = batch["x"] * weight * scale + shift
        return {"y": y, "flags": (y[:, 0] > 0.7, tf.cast(255.0 * batch["x"], tf.uint8)), "label": batch["label"] + 1}

    def wanted(n, scale):
        y = X[:n] * weight * scale + shift
        return {"y": y, "flags": (y[:, 0] > 0.7, tf.cast(255.0 * X[:n], tf.uint8)), "label": LABELS[:n] + 1}

    with on_jax(4).scope():
        assert replicas.num_replicas() == 4 and replicas.is_on_jax() and replicas.current() is on_jax(4)
        call = replicas.over_replicas(fn)
    assert not replicas.is_on_jax()
    for n, scale in ((8, 1.0), (4, 2.0), (8, 3.0)):
        found = call({"x": X[:n], "label": LABELS[:n].numpy()}, scale)
        tf.nest.assert_same_structure(found, wanted(n, scale))
        for ours, theirs in zip(tf.nest.flatten(found), tf.nest.flatten(wanted(n, scale))):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        weight.assign_add([1.0, 1.0, 1.0])  # The next call sees it.
    assert traced == [2, 1]  # A device's part, once for each size.


def test_what_replicas_cannot_do_is_refused(on_jax):
    mean = tf.Variable(0.0)
    with on_jax(2).scope():
        with pytest.raises(ValueError, match="Expected a batch that divides among 2 replicas. Received: 7"):
            replicas.over_replicas(lambda x: x)(X[:7])
        with pytest.raises(ValueError, match="Expected no variable that each of several devices assigns. Received: Va"):
            replicas.over_replicas(lambda x: x + mean.assign(tf.reduce_mean(x)))(X)
        with pytest.raises(lowering.Refused, match="Received: .*PyFunc"):
            replicas.over_replicas(lambda x: tf.numpy_function(np.sin, [x], tf.float32))(X)
    assert mean.numpy() == 0


@pytest.mark.parametrize("num_devices", [1, 2])
def test_functions_that_draw_new_noise_at_each_call_do_so(on_jax, num_devices):
    state = tf.Variable([3, 4], dtype=tf.uint32)

    def noisy(x):
        seed = tf.cast(tf.identity(state), tf.int32)
        state.assign_add(tf.constant([0, 1], tf.uint32))
        return x + tf.random.stateless_uniform(tf.shape(x), seed, alg="philox")

    with on_jax(num_devices).scope():
        call = replicas.over_replicas(noisy)
    first, second = call(X), call(X)
    assert state.numpy().tolist() == [3, 6] and np.abs(first - second).min() > 0
    state.assign([3, 4])
    np.testing.assert_array_equal(call(X), first)


def test_noise_is_that_of_one_device(on_jax):
    seeds = noise.example_seeds(0, 5, tf.range(8))

    def fn(seeds):
        return noise.uniform(seeds, (100,)), noise.integers(seeds, 100, 7), noise.normal(seeds, (100,))

    expected = fn(seeds)
    with on_jax(2).scope():
        found = replicas.over_replicas(fn)(seeds)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[2], expected[2], rtol=1e-5)
