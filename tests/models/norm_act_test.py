import functools
import itertools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import compilation
from robust_keras.models import norm_act
from robust_keras.models.normalization import BatchNorm, batch_norm_mode
from robust_keras.models.wide_resnet import wide_resnet

pytestmark = pytest.mark.oldest

EPSILON = 1e-5
NAMES = [None, "relu", "silu", "leaky_relu", "elu", "softplus", "gelu"]


def act(z, name):
    """The activation and its derivative, in float64."""
    sigmoid = 1.0 / (1.0 + np.exp(-z))
    inner = np.sqrt(2.0 / np.pi) * (z + 0.044715 * z**3)
    return {
        None: (z, np.ones_like(z)),
        "relu": (np.maximum(z, 0.0), 1.0 * (z > 0)),
        "silu": (z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))),
        "leaky_relu": (np.where(z > 0, z, 0.01 * z), np.where(z > 0, 1.0, 0.01)),
        "elu": (np.where(z > 0, z, np.expm1(z)), np.where(z > 0, 1.0, np.exp(z))),
        "softplus": (np.log1p(np.exp(z)), sigmoid),
        "gelu": (
            0.5 * z * (1.0 + np.tanh(inner)),
            0.5 * (1.0 + np.tanh(inner))
            + 0.5 * z / np.cosh(inner) ** 2 * np.sqrt(2.0 / np.pi) * (1.0 + 3 * 0.044715 * z**2),
        ),
    }[name]


def expected(x, upstream, scale, offset, num_groups, name):
    """Value, each group's statistics and gradients by x, scale and offset, by hand and in float64."""
    shape, channels = x.shape, x.shape[-1]
    x, dy = (np.asarray(each, np.float64).reshape(num_groups, -1, channels) for each in (x, upstream))
    mean, variance = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    x_hat = (x - mean) / np.sqrt(variance + EPSILON)
    y, slope = act(x_hat * scale + offset, name)
    dz = dy * slope
    dx = dz - dz.mean(1, keepdims=True) - x_hat * (dz * x_hat).mean(1, keepdims=True)
    dx *= scale / np.sqrt(variance + EPSILON)
    sums = (dz * x_hat).sum((0, 1)), dz.sum((0, 1))
    return y.reshape(shape), mean[:, 0], variance[:, 0], dx.reshape(shape), *sums


def drawn(*shape):
    rng = np.random.default_rng(3)
    channels = shape[-1]
    x = rng.normal(rng.normal(size=channels), rng.uniform(0.5, 2.0, channels), shape)
    return x, rng.normal(size=shape), rng.uniform(0.5, 2.0, channels), rng.normal(size=channels)


def differentiated(function, x, *others):
    """What a compiled function returns, and its gradients."""

    @tf.function
    def run(x, upstream, *parameters):
        with tf.GradientTape() as tape:
            tape.watch([x, *parameters])
            y, *rest = function(x, *parameters)
        rest = [tf.reshape(each, (-1, each.shape[-1])) for each in rest]
        return y, *rest, *tape.gradient(y, [x, *parameters], upstream)

    return run(x, *others)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "shape, group",
    [((8, 5, 3, 6), None), ((8, 5, 3, 6), 2), ((8, 5, 3, 6), 8), ((12, 4), 3), ((4, 3, 2, 33), 2)],
)
def test_values_and_gradients_of_groups(shape, group, compiled, name):
    x, upstream, scale, offset = drawn(*shape)
    found = differentiated(
        lambda *args: norm_act.standardized(
            *args, group_size=group, epsilon=EPSILON, activation=name, compiled=compiled
        ),
        *(tf.constant(each, tf.float32) for each in (x, upstream, scale, offset)),
    )
    num_groups = shape[0] // group if group else 1
    for value, wanted in zip(found, expected(x, upstream, scale, offset, num_groups, name), strict=True):
        assert value.dtype == tf.float32
        np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (4, 3, 2, 33), (12, 4)])
def test_values_and_gradients_of_given_statistics(shape, compiled, name):
    x, upstream, factor, offset = drawn(*shape)
    found = differentiated(
        lambda *args: [norm_act.affine(*args, activation=name, compiled=compiled)],
        *(tf.constant(each, tf.float32) for each in (x, upstream, factor, offset)),
    )
    y, slope = act(x * factor + offset, name)
    dz = upstream * slope
    axes = tuple(range(x.ndim - 1))
    wanted = y, dz * factor, (dz * x).sum(axes), dz.sum(axes)
    for value, each in zip(found, wanted, strict=True):
        np.testing.assert_allclose(value, each, rtol=2e-5, atol=2e-5 * np.abs(each).max())


@pytest.mark.parametrize("function", ["standardized", "affine", "activated"])
def test_bfloat16_is_rounded_once(function):
    x, upstream, scale, offset = drawn(4, 5, 3, 6)
    x = tf.cast(x, tf.bfloat16)
    upstream = tf.cast(upstream, tf.bfloat16)
    parameters = tf.constant(scale, tf.float32), tf.constant(offset, tf.float32)

    def run(x, scale, offset, compiled):
        if function == "standardized":
            settings = {"group_size": 2, "epsilon": EPSILON}
            return norm_act.standardized(x, scale, offset, **settings, activation="silu", compiled=compiled)[:1]
        if function == "affine":
            return [norm_act.affine(x, scale, offset, activation="silu", compiled=compiled)]
        return [norm_act.activated(x, "silu", compiled=compiled) + 0.0 * tf.cast(scale + offset, x.dtype)]

    low = differentiated(lambda *args: run(*args, True), x, upstream, *parameters)
    up = (tf.cast(each, tf.float32) for each in (x, upstream))
    high = differentiated(lambda *args: run(*args, False), *up, *parameters)
    assert low[0].dtype == low[1].dtype == tf.bfloat16
    # Between normalisation and activation the kernel's value is one of bfloat16.
    scales = 2.0 if function == "standardized" else 1.001
    for value, wanted in zip(low[:2], high[:2]):
        difference = np.abs(value.numpy().astype(np.float32) - wanted)
        assert np.max(difference) <= scales * 2.0**-8 * np.abs(wanted).max()


def test_every_bfloat16_is_read_and_rounded_as_tensorflow_does():
    bits = np.arange(2**16, dtype=np.uint16)
    numbers = tf.bitcast(tf.constant(bits), tf.bfloat16)
    read = norm_act.as_float32(numbers)
    np.testing.assert_array_equal(read, tf.cast(numbers, tf.float32))
    rng = np.random.default_rng(0)
    anything = rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    anything = np.concatenate([anything, read.numpy(), [np.inf, -np.inf, np.nan, 3.4e38, 0.0, -0.0, 1e-45]])
    anything = tf.constant(anything.astype(np.float32))
    ours, theirs = norm_act.rounded(anything, tf.bfloat16), tf.cast(anything, tf.bfloat16)
    is_number = ~np.isnan(anything.numpy())
    ours, theirs = (tf.bitcast(each, tf.uint16).numpy() for each in (ours, theirs))
    # TensorFlow's own takes the smallest numbers, which hardware may flush, for zeros.
    is_normal = np.abs(anything.numpy()) >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(ours[is_number & is_normal], theirs[is_number & is_normal])
    assert np.isnan(tf.bitcast(ours[~is_number], tf.bfloat16).numpy().astype(np.float32)).all()


def operations(function, *args):
    def inside(graph):
        for operation in graph.get_operations():
            yield operation.type
        for each in graph.as_graph_def(add_shapes=False).library.function:
            yield from (node.op for node in each.node_def)
            if "_XlaMustCompile" in each.attr and each.attr["_XlaMustCompile"].b:
                yield "compiled"

    return set(inside(tf.function(function).get_concrete_function(*args).graph))


def layer(**kwargs):
    made = BatchNorm(activation="silu", **kwargs)
    made.build((None, 4, 4, 3))
    return made


@pytest.mark.parametrize("mode", ["batch", "moving"])
def test_only_passes_with_a_mode_are_compiled_in_parts_and_nothing_inside_xla(mode):
    norm, x = layer(), tf.TensorSpec((4, 4, 4, 3), tf.float32)

    def told(x):
        with batch_norm_mode(mode):
            return norm(x)

    assert "compiled" in operations(told, x)
    for training in (True, False):
        assert not {"compiled", "FusedBatchNormV3"} & operations(functools.partial(norm, training=training), x)
    inside = compilation.function(told, jit_compile=True)
    assert not {"FusedBatchNormV3"} & operations(inside, x)


def test_a_program_keeps_no_more_than_the_gradient_needs():
    norm = layer()

    def gradient(x, upstream):
        with batch_norm_mode("moving"), tf.GradientTape() as tape:
            tape.watch(x)
            y = norm(x)
        return tape.gradient(y, x, upstream)

    spec = tf.TensorSpec((4, 4, 4, 3), tf.float32)
    concrete = tf.function(gradient).get_concrete_function(spec, spec)
    x, upstream = (tf.random.stateless_normal(spec.shape, [1, k]) for k in range(2))
    by_x = concrete(x, upstream)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = norm(x)
    np.testing.assert_allclose(by_x, tape.gradient(y, x, upstream), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch, group", itertools.product([None, 8], [None, 4]))
def test_a_batch_of_unknown_size(batch, group):
    norm = layer(statistics_group_size=group)
    x = tf.constant(drawn(8, 4, 4, 3)[0], tf.float32)

    @tf.function(input_signature=[tf.TensorSpec((batch, 4, 4, 3), tf.float32)])
    def run(x):
        with batch_norm_mode("batch"):
            return norm(x)

    with batch_norm_mode("batch"):
        np.testing.assert_allclose(run(x), norm(x), rtol=1e-5, atol=1e-6)


def test_more_groups_than_go_one_after_the_other():
    x, upstream, scale, offset = drawn(130, 2, 2, 3)
    found = differentiated(
        lambda *args: norm_act.standardized(*args, group_size=1, epsilon=EPSILON, activation="silu", compiled=True),
        *(tf.constant(each, tf.float32) for each in (x, upstream, scale, offset)),
    )
    for value, wanted in zip(found, expected(x, upstream, scale, offset, 130, "silu"), strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_layers_are_few():
    network = wide_resnet(depth=10, width=1, num_classes=3)
    norms = [each for each in network.layers if isinstance(each, BatchNorm)]
    assert len(norms) == 7 and {each.activation for each in norms} == {"relu"}
    with pytest.raises(ValueError, match="Expected an activation out of .* Received: 'selu'"):
        BatchNorm(activation="selu")
    assert BatchNorm(activation="swish").get_config()["activation"] == "silu"
    assert BatchNorm.from_config(BatchNorm().get_config()).activation is None
