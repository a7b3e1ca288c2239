import contextlib
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import normalization
from robust_keras.models.normalization import BatchNorm, batch_norm_mode

pytestmark = pytest.mark.oldest

EPSILON = 1e-5


def random(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(rng.normal(size=shape[-1]), rng.uniform(0.5, 2.0, shape[-1]), shape).astype(np.float32)


def layer(channels=3, group=None, seed=5, **kwargs):
    """A built `BatchNorm` with random scale, offset and moving statistics, and those four as a dictionary."""
    norm = BatchNorm(group, **kwargs)
    norm.build((None, 4, 4, channels))
    rng = np.random.default_rng(seed)
    values = {
        "scale": rng.uniform(0.5, 2.0, channels),
        "offset": rng.normal(size=channels),
        "moving_mean": rng.normal(size=channels),
        "moving_variance": rng.uniform(0.5, 2.0, channels),
    }
    for name, value in values.items():
        getattr(norm, name).assign(value)
    return norm, values


def reference(x, values, group):
    """Batch normalisation of consecutive groups, in float64; the statistics of every group too."""
    x = np.asarray(x, np.float64)
    axes = tuple(range(x.ndim - 1))
    parts = [x[i : i + group] for i in range(0, len(x), group)]
    means = np.array([part.mean(axes) for part in parts])
    variances = np.array([part.var(axes) for part in parts])  # biased
    y = [
        (part - mean) / np.sqrt(variance + EPSILON) * values["scale"] + values["offset"]
        for part, mean, variance in zip(parts, means, variances)
    ]
    return np.concatenate(y), means, variances


def state(norm):
    return [v.numpy().copy() for v in norm.non_trainable_variables]


def assert_same_state(norm, before):
    for value, expected in zip(state(norm), before, strict=True):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("group", [None, 8, 4, 2, 1])
@pytest.mark.parametrize("mode", ["batch", "batch_and_update"])
def test_batch_modes_normalise_every_group_with_its_own_statistics(group, mode):
    x = random(8, 4, 4, 3)
    norm, values = layer(group=group)
    with batch_norm_mode(mode):
        y = norm(x)
    assert y.shape == x.shape and y.dtype == tf.float32
    np.testing.assert_allclose(y, reference(x, values, group or 8)[0], rtol=1e-4, atol=1e-5)


def test_moving_mode_normalises_with_the_moving_statistics():
    x = random(6, 4, 4, 3)
    norm, values = layer(group=4)  # which the batch need not fill here
    before = state(norm)
    expected = (x - values["moving_mean"]) / np.sqrt(values["moving_variance"] + EPSILON)
    expected = expected * values["scale"] + values["offset"]
    with batch_norm_mode("moving"):
        np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm(x, training=False), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(norm, before)


def test_epsilon_is_1e_5_and_can_be_changed():
    # The variance is 1e-5 as well, so that half of the denominator is epsilon.
    x = np.float32(1e-5**0.5) * np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)
    with batch_norm_mode("batch"):
        np.testing.assert_allclose(BatchNorm()(x)[:, 0], [0.5**0.5, -(0.5**0.5)] * 2, rtol=1e-4)
        np.testing.assert_allclose(BatchNorm(epsilon=3e-5)(x)[:, 0], [0.5, -0.5] * 2, rtol=1e-4)


def test_of_vectors():
    x = random(6, 3)
    norm, values = layer(group=3)
    with batch_norm_mode("batch"):
        np.testing.assert_allclose(norm(x), reference(x, values, 3)[0], rtol=1e-4, atol=1e-5)


def test_does_not_depend_on_the_layout():
    # A batch of eight in groups of four is two batches of four, as on two devices.
    x = random(8, 4, 4, 3)
    norm, _ = layer(group=4)
    whole, _ = layer(group=None)
    with batch_norm_mode("batch"):
        together = norm(x).numpy()
        np.testing.assert_allclose(np.concatenate([norm(x[:4]), norm(x[4:])]), together, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.concatenate([whole(x[:4]), whole(x[4:])]), together, rtol=1e-5, atol=1e-6)
        # The groups do matter.
        assert np.abs(whole(x) - together).max() > 0.01


def test_moving_statistics_are_haikus_zero_debiased_average():
    norm, values = layer(group=2)
    # Unlike the initial values, which do not count.
    hidden_mean = hidden_variance = np.zeros(3)
    for counter in range(1, 6):
        x = random(6, 4, 4, 3, seed=counter)
        with batch_norm_mode("batch_and_update"):
            norm(x)
        _, means, variances = reference(x, values, 2)
        hidden_mean = hidden_mean * 0.99 + 0.01 * means.mean(0)
        hidden_variance = hidden_variance * 0.99 + 0.01 * variances.mean(0)
        debias = 1 - 0.99**counter
        np.testing.assert_allclose(norm.moving_mean.numpy(), hidden_mean / debias, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(norm.moving_variance.numpy(), hidden_variance / debias, rtol=1e-4, atol=1e-5)


def test_decay_can_be_changed():
    norm = BatchNorm(decay=0.5)
    for x in ([[1.0], [3.0]], [[7.0], [7.0]]):
        norm(tf.constant(x), training=True)
    # Weights 1/3 and 2/3: means 2 and 7, variances 1 and 0.
    np.testing.assert_allclose(norm.moving_mean.numpy(), [16 / 3], rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), [1 / 3], rtol=1e-5)


def test_fresh_layer():
    norm = BatchNorm()
    norm.build((None, 4, 4, 3))
    x = random(2, 4, 4, 3)
    # Mean 0, variance 1, scale 1, offset 0.
    np.testing.assert_allclose(norm(x), x / np.sqrt(1 + EPSILON), rtol=1e-5)
    assert [v.path.rsplit("/", 1)[-1] for v in norm.trainable_variables] == ["scale", "offset"]
    assert {v.path.rsplit("/", 1)[-1] for v in norm.non_trainable_variables} >= {"moving_mean", "moving_variance"}


def test_batch_mode_leaves_the_moving_statistics():
    norm, _ = layer(group=4)
    before = state(norm)
    with batch_norm_mode("batch"):
        norm(random(8, 4, 4, 3), training=True)
    assert_same_state(norm, before)
    with batch_norm_mode("batch_and_update"):
        norm(random(8, 4, 4, 3), training=False)
    assert not np.allclose(norm.moving_mean.numpy(), before[0])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mode", ["batch", "batch_and_update", "moving"])
def test_mode_overrides_the_training_flag(mode, training):
    x = random(4, 4, 4, 3)
    norm, values = layer()
    before = state(norm)
    moving = (x - values["moving_mean"]) / np.sqrt(values["moving_variance"] + EPSILON)
    moving = moving * values["scale"] + values["offset"]
    with batch_norm_mode(mode):
        y = norm(x, training=training)
    np.testing.assert_allclose(y, moving if mode == "moving" else reference(x, values, 4)[0], rtol=1e-4, atol=1e-5)
    updated = not np.array_equal(state(norm)[0], before[0])
    assert updated == (mode == "batch_and_update")


def effective_mode(training):
    """What a layer does now, from its behaviour alone."""
    norm, _ = layer()
    before = state(norm)
    x = random(4, 4, 4, 3)
    y = norm(x, training=training)
    if not np.array_equal(state(norm)[0], before[0]):
        return "batch_and_update"
    norm.moving_mean.assign(norm.moving_mean + 1.0)
    return "batch" if np.array_equal(y, norm(x, training=training)) else "moving"


def test_mode_is_reset():
    assert effective_mode(True) == "batch_and_update"
    assert effective_mode(False) == "moving"
    with batch_norm_mode("batch"):
        assert effective_mode(True) == effective_mode(False) == "batch"
        with batch_norm_mode("moving"):
            assert effective_mode(True) == "moving"
        assert effective_mode(True) == "batch"
        with contextlib.suppress(ZeroDivisionError), batch_norm_mode("moving"):
            raise ZeroDivisionError
        assert effective_mode(True) == "batch"
    assert effective_mode(True) == "batch_and_update"
    assert effective_mode(False) == "moving"


def test_mode_belongs_to_its_thread():
    # As replicas are traced in threads: the attack of one must not set the mode of another.
    entered, seen = threading.Event(), {}

    def other():
        entered.wait(10)
        seen["mode"] = effective_mode(False)

    thread = threading.Thread(target=other)
    thread.start()
    with batch_norm_mode("batch"):
        entered.set()
        thread.join()
    assert seen == {"mode": "moving"}


@pytest.mark.parametrize("mode", ["train", "", None])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=r"batch_and_update, batch, moving\. Received: "), batch_norm_mode(mode):
        pass
    assert effective_mode(False) == "moving"


@pytest.mark.parametrize("mode", ["batch", "batch_and_update"])
def test_batch_that_is_no_multiple_of_the_group(mode):
    norm, _ = layer(group=4)
    before = state(norm)
    with batch_norm_mode(mode), pytest.raises(ValueError, match=r"(?s)statistics_group_size=4.*Received: a batch of 6"):
        norm(random(6, 4, 4, 3))
    with batch_norm_mode(mode), pytest.raises(ValueError, match="Received: a batch of 2"):
        norm(random(2, 4, 4, 3))
    assert_same_state(norm, before)


@pytest.mark.parametrize("group", [0, -4])
def test_group_size_below_one(group):
    with pytest.raises(ValueError, match=f"statistics_group_size >= 1 or None. Received: {group}"):
        BatchNorm(group)


@pytest.mark.parametrize("group", [None, 2])
def test_batch_of_unknown_size(group):
    x = random(4, 4, 4, 3)
    norm, values = layer(group=group)

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.float32)], autograph=False)
    def normalize(x):
        with batch_norm_mode("batch"):
            return norm(x)

    np.testing.assert_allclose(normalize(x), reference(x, values, group or 4)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("group", [None, 2])
def test_gradient(group):
    # Backward pass by hand, per group: scale / sigma (dy - mean dy - x_hat mean(dy x_hat)).
    x, dy = random(6, 3, 3, 2), np.random.default_rng(9).normal(size=(6, 3, 3, 2))
    norm, values = layer(channels=2, group=group)
    tensor = tf.constant(x)
    with tf.GradientTape() as tape, batch_norm_mode("batch"):
        tape.watch(tensor)
        loss = tf.reduce_sum(norm(tensor) * tf.constant(dy, tf.float32))
    dx, dscale, doffset = tape.gradient(loss, [tensor, norm.scale.value, norm.offset.value])

    size, axes = group or 6, (0, 1, 2)
    expected, expected_scale = [], np.zeros(2)
    for i in range(0, 6, size):
        part, g = x[i : i + size].astype(np.float64), dy[i : i + size]
        sigma = np.sqrt(part.var(axes) + EPSILON)
        x_hat = (part - part.mean(axes)) / sigma
        expected.append(values["scale"] / sigma * (g - g.mean(axes) - x_hat * (g * x_hat).mean(axes)))
        expected_scale += (g * x_hat).sum(axes)
    np.testing.assert_allclose(dx, np.concatenate(expected), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(dscale, expected_scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(doffset, dy.sum(axes), rtol=1e-4, atol=1e-5)


def test_gradient_of_the_moving_mode():
    x = tf.constant(random(2, 3, 3, 3))
    norm, values = layer()
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(norm(x))
    expected = np.broadcast_to(values["scale"] / np.sqrt(values["moving_variance"] + EPSILON), x.shape)
    np.testing.assert_allclose(tape.gradient(loss, x), expected, rtol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_inside_a_while_loop(jit_compile):
    x = random(4, 4, 4, 3)
    norm, values = layer(group=2)
    before = state(norm)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def loop(x):
        with batch_norm_mode("batch"):
            return tf.while_loop(
                lambda k, _: k < 3, lambda k, x: (k + 1, norm(x)), (tf.constant(0), x), maximum_iterations=3
            )[1]

    expected = x
    for _ in range(3):
        expected = reference(expected, values, 2)[0]
    np.testing.assert_allclose(loop(tf.constant(x)), expected, rtol=1e-4, atol=1e-5)
    assert_same_state(norm, before)


def test_updates_in_a_compiled_function():
    norm, values = layer()
    x = random(4, 4, 4, 3)
    update = tf.function(lambda x: norm(x, training=True), autograph=False)
    update(x)
    update(random(4, 4, 4, 3, seed=1))
    means = [reference(random(4, 4, 4, 3, seed=s), values, 4)[1][0] for s in (0, 1)]
    # h_2 / (1 - .99^2), h_2 = .99 * .01 m_1 + .01 m_2.
    np.testing.assert_allclose(norm.moving_mean.numpy(), (0.99 * means[0] + means[1]) / 1.99, rtol=1e-4, atol=1e-5)


def test_round_trip_through_a_file(tmp_path):
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, BatchNorm(2, decay=0.9, epsilon=1e-3, name="norm")(inputs))
    x = random(4, 4, 4, 3)
    model(x, training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    norm = loaded.get_layer("norm")
    assert isinstance(norm, BatchNorm)
    assert (norm.statistics_group_size, norm.decay, norm.epsilon) == (2, 0.9, 1e-3)
    np.testing.assert_array_equal(loaded(x), model(x))
    # The count of updates is kept too: the next one moves both alike.
    for m in (model, loaded):
        m(random(4, 4, 4, 3, seed=1), training=True)
    np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("mode", ["batch", "moving"])
def test_mixed_precision(mode):
    norm, values = layer(dtype="mixed_bfloat16")
    x = tf.cast(random(4, 4, 4, 3), tf.bfloat16)
    with tf.GradientTape() as tape, batch_norm_mode(mode):
        tape.watch(x)
        y = norm(x)
    assert y.dtype == tf.bfloat16
    # In batch mode the sum of the outputs is constant.
    gradient = tape.gradient(y, x)
    expected = 0.0 if mode == "batch" else values["scale"] / np.sqrt(values["moving_variance"] + EPSILON)
    assert gradient.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(gradient, tf.float32), np.broadcast_to(expected, x.shape), rtol=0.05, atol=0.05)
    x = tf.cast(x, tf.float32).numpy()
    expected = reference(x, values, 4)[0]
    if mode == "moving":
        expected = (x - values["moving_mean"]) / np.sqrt(values["moving_variance"] + EPSILON)
        expected = expected * values["scale"] + values["offset"]
    np.testing.assert_allclose(tf.cast(y, tf.float32), expected, rtol=0.05, atol=0.1)


def test_mixed_precision_keeps_float32_moving_statistics():
    norm, values = layer(dtype="mixed_bfloat16")
    # The average of equal updates is any one of them. In bfloat16 the count would stop at 256, the means at 8 bits.
    x = tf.cast(random(4, 4, 4, 3), tf.bfloat16)
    for _ in range(300):
        norm(x, training=True)
    assert norm.num_updates.numpy() == 300
    _, means, variances = reference(tf.cast(x, tf.float32), values, 4)
    np.testing.assert_allclose(norm.moving_mean.numpy(), means[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), variances[0], rtol=1e-4, atol=1e-5)


def test_replicas_store_the_mean_of_their_moving_statistics(mirrored):
    x = random(8, 4, 4, 3)
    with mirrored.scope():
        norm = BatchNorm(4)
        norm.build((None, 4, 4, 3))

    def on_replica(x, mode):
        with batch_norm_mode(mode):
            return norm(x)

    @tf.function(autograph=False)
    def step(x, mode):
        return mirrored.run(on_replica, args=(x, mode))

    def halves(x):
        return mirrored.experimental_distribute_values_from_function(
            lambda context: tf.constant(x[4 * context.replica_id_in_sync_group :][:4])
        )

    def on_both(variable):
        values = [v.numpy() for v in mirrored.experimental_local_results(variable.value)]
        assert len(values) == 2
        return values

    identity = {"scale": 1.0, "offset": 0.0}
    for mode in ("batch", "batch_and_update"):
        y = np.concatenate([v.numpy() for v in mirrored.experimental_local_results(step(halves(x), mode))])
        # One device with groups of four computes the same.
        np.testing.assert_allclose(y, reference(x, identity, 4)[0], rtol=1e-4, atol=1e-5)
        if mode == "batch":
            for zero in (*on_both(norm.moving_mean), *on_both(norm.num_updates)):
                np.testing.assert_array_equal(zero, np.zeros_like(zero))

    second = random(8, 4, 4, 3, seed=1)
    step(halves(second), "batch_and_update")
    statistics = [reference(batch, identity, 4)[1:] for batch in (x, second)]
    assert np.abs(statistics[0][0][0] - statistics[0][0][1]).max() > 0.05  # the replicas' own means differ
    for variable, k in ((norm.moving_mean, 0), (norm.moving_variance, 1)):
        first, then = (s[k].mean(0) for s in statistics)
        for value in on_both(variable):
            np.testing.assert_allclose(value, (0.99 * first + then) / 1.99, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(*on_both(variable))
    assert on_both(norm.num_updates) == [2.0, 2.0]


def test_modes_have_names():
    assert (normalization.BATCH_AND_UPDATE, normalization.BATCH, normalization.MOVING) == (
        "batch_and_update",
        "batch",
        "moving",
    )
