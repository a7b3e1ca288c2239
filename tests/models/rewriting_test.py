import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras.models import any_network, graph_reading, rewriting, searching
from robust_keras.models.wide_resnet import wide_resnet
from robust_keras.saved_models import export, load

BATCH = 16
ACTIVATIONS = ("relu", "silu", "leaky_relu", "elu", "softplus", "gelu")


@pytest.fixture(autouse=True)
def same_weights():
    keras.utils.set_random_seed(0)


def images(size=16):
    return tf.random.stateless_uniform((BATCH, size, size, 3), [1, 2])


def scrambled(network):
    rng = np.random.default_rng(0)
    for weight in network.weights:
        if weight.dtype == "float32" and len(weight.shape) >= 1:
            weight.assign(np.abs(rng.normal(0.5, 0.3, weight.shape)) if "var" in weight.path else _near(rng, weight))
    return network


def _near(rng, weight):
    return weight.numpy() + rng.normal(0.0, 0.05, weight.shape)


def value_and_gradient(function, x):
    @tf.function(autograph=False)
    def run(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            logits = function(x)
            loss = tf.reduce_sum(logits[:, 0] - logits[:, 1])
        return logits, tape.gradient(loss, x)

    return run(x)


def agree(function, x, dtype="float32", tolerance=2e-5):
    rewritten = rewriting.rewritten(function, dtype=dtype)
    for ours, theirs in zip(value_and_gradient(rewritten, x), value_and_gradient(function, x), strict=True):
        assert ours.dtype == tf.float32 and ours.shape == theirs.shape
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs)
    return rewritten


def compiled_parts(function, x):
    graph = tf.function(function, autograph=False).get_concrete_function(tf.TensorSpec(x.shape)).graph
    return sum("_XlaMustCompile" in op.node_def.attr for op in graph.get_operations() if "Call" in op.type)


@pytest.mark.parametrize(
    "activation",
    ["relu", "silu", *(pytest.param(a, marks=pytest.mark.slow) for a in ACTIVATIONS if a not in ("relu", "silu"))],
)
def test_a_wide_resnet_in_float32_and_bfloat16(activation):
    network = scrambled(wide_resnet(depth=10, width=2, num_classes=5, activation=activation, input_shape=(16, 16, 3)))
    logits_fn = any_network.as_logits_fn(network)
    rewritten = agree(logits_fn, images())
    # A normalisation before each convolution but the first, and a sum in front of three.
    assert compiled_parts(rewritten, images()) >= 7
    # Where an activation has a kink, a rounding more or less takes another side.
    agree(logits_fn, images(), "bfloat16", tolerance=0.25)


def test_an_exported_network_is_read_through_its_functions(tmp_path):
    network = scrambled(wide_resnet(depth=10, width=1, num_classes=5, activation="silu", input_shape=(16, 16, 3)))
    export.export(network, tmp_path / "model", card={})
    agree(load.load_logits_fn(str(tmp_path / "model")), images())
    agree(load.load_logits_fn(str(tmp_path / "model")), images(), "bfloat16", tolerance=0.25)


def keras_network(kind):
    x = inputs = keras.Input((16, 16, 3))
    if kind == "sequence":
        x = keras.layers.Rescaling(2.0, offset=-1.0)(x)
        x = keras.layers.Conv2D(8, 3, activation="relu")(x)
        x = keras.layers.MaxPooling2D()(x)
        x = keras.layers.Conv2D(8, 3, padding="same", activation="tanh")(x)
        x = keras.layers.Flatten()(x)
        x = keras.layers.Dense(16, activation="gelu")(x)
    elif kind == "residual":
        x = keras.layers.Conv2D(8, 3, padding="same")(x)
        for _ in range(2):
            y = keras.layers.BatchNormalization()(x)
            y = keras.layers.Conv2D(8, 3, padding="same")(keras.layers.ReLU()(y))
            x = keras.layers.Add()([x, y])
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Activation("silu")(x))
    else:
        x = keras.layers.Conv2D(8, 3, padding="same")(x)
        x = keras.layers.ReLU(max_value=6.0)(keras.layers.BatchNormalization()(x))
        y = keras.layers.DepthwiseConv2D(3, padding="same")(x)
        x = keras.layers.Concatenate()([x, keras.layers.Activation("swish")(y)])
        x = keras.layers.AveragePooling2D(2)(keras.layers.Conv2D(8, 1)(x))
        x = keras.layers.GlobalMaxPooling2D()(keras.layers.ZeroPadding2D()(x))
    return scrambled(keras.Model(inputs, keras.layers.Dense(4)(x)))


@pytest.mark.parametrize("kind", ["sequence", "residual", "mobile"])
def test_networks_of_keras_layers(kind):
    logits_fn = any_network.as_logits_fn(keras_network(kind))
    agree(logits_fn, images())
    agree(logits_fn, images(), "bfloat16", tolerance=0.2)


def test_numbers_for_each_channel_and_for_each_pixel():
    # As many columns as channels: which of them a number belongs to is told by its axis.
    rng = np.random.default_rng(0)
    first, second = (tf.constant(rng.normal(0, 0.1, (3, 3, c, 16)), tf.float32) for c in (3, 16))
    shapes = (16,), (1, 1, 1, 16), (16, 1), (16, 16, 16)
    by_channel, also_by_channel, by_column, by_pixel = (tf.constant(rng.normal(size=s), tf.float32) for s in shapes)

    def function(x):
        y = tf.nn.silu(tf.nn.conv2d(x - 0.5, first, 1, "SAME") * by_channel + also_by_channel)
        y = tf.nn.conv2d(y, second, 1, "SAME")
        return tf.reduce_mean(tf.nn.relu(y * by_channel + by_column) * also_by_channel + tf.tanh(y + by_pixel), (1, 2))

    agree(function, images())


def test_batches_of_another_size():
    logits_fn = any_network.as_logits_fn(keras_network("sequence"))
    rewritten = agree(logits_fn, images())
    np.testing.assert_allclose(rewritten(images()[:3]), logits_fn(images()[:3]), rtol=1e-4, atol=1e-5)


def test_gradients_without_a_program_around_it():
    logits_fn, x = any_network.as_logits_fn(keras_network("residual")), images()
    with tf.GradientTape() as tape:
        tape.watch(x)
        logits = rewriting.rewritten(logits_fn)(x)
        loss = tf.reduce_sum(logits[:, 0] - logits[:, 1])
    np.testing.assert_allclose(tape.gradient(loss, x), value_and_gradient(logits_fn, x)[1], rtol=1e-3, atol=1e-5)


def test_padding_with_a_number():
    convolutions = [keras.layers.Conv2D(4, 3, activation="relu") for _ in range(3)]

    def logits_fn(x):
        x = convolutions[1](convolutions[0](x))
        return tf.reduce_mean(convolutions[2](tf.pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=0.5)), (1, 2))

    logits_fn(images())
    agree(logits_fn, images())
    agree(logits_fn, images(), "bfloat16", tolerance=0.2)


def test_only_the_first_convolution_and_what_follows_the_last_stay_float32():
    network = wide_resnet(depth=10, width=1, num_classes=5, input_shape=(16, 16, 3))
    rewritten = rewriting.rewritten(any_network.as_logits_fn(network), dtype="bfloat16")
    graph = tf.function(rewritten, autograph=False).get_concrete_function(tf.TensorSpec((BATCH, 16, 16, 3))).graph
    types = {op.type: [] for op in graph.get_operations()}
    for op in graph.get_operations():
        types[op.type].append(op.outputs[0].dtype if op.outputs else None)
    assert types["Conv2D"][0] == tf.float32
    assert types["Conv2D"][1:] == [tf.bfloat16] * (len(types["Conv2D"]) - 1)
    assert types["Mean"] == types["MatMul"] == [tf.float32]


@tf.custom_gradient
def straight_through(x):
    return tf.nn.relu(x), lambda upstream: upstream


def looped(x):
    return tf.while_loop(lambda k, _: k < 3, lambda k, x: (k + 1, 0.9 * x), (0, x))[1]


@pytest.mark.parametrize(
    "bend, received",
    [
        (straight_through, "a gradient of its own"),
        (looped, "the operation (Stateless)?While"),
        (lambda x: x + tf.random.normal(x.shape), "the operation RandomStandardNormal"),
        (lambda x: tf.numpy_function(lambda v: v, [x], tf.float32), "the operation PyFunc"),
    ],
)
def test_what_is_not_understood_is_said(bend, received):
    dense = keras.layers.Dense(3)

    def logits_fn(x):
        return dense(tf.reshape(bend(x), (BATCH, 16 * 16 * 3)))

    logits_fn(images())
    with pytest.raises(rewriting.Unsupported, match=received):
        rewriting.rewritten(logits_fn)(images())


def test_silus_gradient_is_the_only_one_that_is_known():
    @tf.custom_gradient
    def scaled(x, beta):
        return x * tf.sigmoid(beta * x), lambda upstream: (2.0 * upstream, tf.zeros_like(beta))

    for function in (lambda x: scaled(x, tf.constant(2.0)), lambda x: tf.stop_gradient(x) * straight_through(x)):
        with pytest.raises(graph_reading.Unsupported, match="a gradient of its own"):
            graph_reading.read(lambda x, function=function: function(x)[:, 0, 0], tf.TensorSpec((2, 4, 4, 3)))


def test_a_network_without_a_second_convolution_has_nothing_to_compute_in_bfloat16():
    dense = keras.layers.Dense(3)
    with pytest.raises(rewriting.Unsupported, match="without a second convolution"):
        rewriting.rewritten(lambda x: dense(tf.reshape(x, (BATCH, 768))), dtype="bfloat16")(images())


def test_public_attacks_search_on_it(monkeypatch):
    network, called = keras_network("residual"), []

    def search_fn(logits_fn, before=searching.search_fn):
        called.append(before(logits_fn))
        return called[-1]

    x, y = images().numpy(), np.arange(BATCH) % 4
    monkeypatch.setattr(searching, "search_fn", lambda logits_fn: logits_fn)
    plainly = rk.attacks.pgd(network, x, y, norm="L2", epsilon=0.5, num_steps=3)
    monkeypatch.setattr(searching, "search_fn", search_fn)
    rewritten = rk.attacks.pgd(network, x, y, norm="L2", epsilon=0.5, num_steps=3)
    assert len(called) == 1 and compiled_parts(called[0], images()) >= 3
    np.testing.assert_allclose(rewritten, plainly, atol=2e-4)


def test_what_cannot_be_rewritten_is_searched_as_it_is():
    dense = keras.layers.Dense(3)

    def logits_fn(x):
        return dense(tf.reshape(straight_through(x), (BATCH, 16 * 16 * 3)))

    np.testing.assert_array_equal(searching.search_fn(logits_fn)(images()), logits_fn(images()))
    with pytest.raises(ValueError, match="Expected a network that can be searched in bfloat16.*a gradient of its own"):
        searching.search_fn(logits_fn, "bfloat16")(images())
