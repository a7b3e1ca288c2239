"""What stock optimisers, metrics and precisions do around an `AdversarialModel`, against stock `fit` where it can."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import threats
from robust_keras.training.adversarial_model import AdversarialModel
from tests.training.any_keras_model_test import BATCH, NUM_CLASSES, SHAPE, images

pytestmark = pytest.mark.oldest

X, LABELS = images(BATCH * 4)
PIXELS = X / np.float32(255)


def dense(*before, dtype=None):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(SHAPE), *before, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES, dtype=dtype)]
    return keras.Sequential(layers)


def stock(network, optimizer, **arguments):
    """What stock `fit` makes of a network, in order."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    compiled = {name: arguments.pop(name) for name in ("metrics", "weighted_metrics") if name in arguments}
    network.compile(optimizer, loss=loss, **compiled)
    return network.fit(PIXELS, LABELS, batch_size=BATCH, shuffle=False, verbose=0, **arguments).history


def ours(network, optimizer, *, options=None, **arguments):
    compiled = {name: arguments.pop(name) for name in ("metrics", "weighted_metrics") if name in arguments}
    model = AdversarialModel(network, **{"objective": "standard", **(options or {})})
    model.compile(optimizer, **compiled)
    return model.fit(PIXELS, LABELS, batch_size=BATCH, shuffle=False, verbose=0, **arguments).history


def assert_alike(network, other):
    for weight, expected in zip(network.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(weight, expected, atol=1e-6)


def test_gradients_that_the_optimiser_accumulates_are_those_of_stock_keras():
    optimizer = lambda: keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)  # noqa: E731
    network, other = dense(), dense()
    seen = []

    def attack(logits_fn, x, targets, *, seeds):
        seen.append(seeds.numpy())
        return x

    model = AdversarialModel(network, attack=attack)
    model.compile(optimizer(), run_eagerly=True)
    model.fit(PIXELS, LABELS, batch_size=BATCH, shuffle=False, verbose=0, epochs=2)
    stock(other, optimizer(), epochs=2)
    assert_alike(network, other)
    assert len(np.unique(np.concatenate(seen), axis=0)) == 2 * len(X)  # No batch has another one's seeds.
    compiled, other = dense(), dense()
    ours(compiled, optimizer())
    stock(other, optimizer())
    assert_alike(compiled, other)


def test_the_radius_grows_by_the_step_where_the_optimiser_accumulates():
    radii = []

    def attack(logits_fn, x, targets, *, seeds, threat):
        radii.append(float(threat.epsilon))
        return x

    bound = functools.partial(attack, threat=threats.threat(norm="Linf", epsilon=0.4))
    model = AdversarialModel(dense(), attack=bound, epsilon_warmup_steps=4)
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), run_eagerly=True)
    model.fit(PIXELS, LABELS, batch_size=BATCH, verbose=0)
    np.testing.assert_allclose(radii, [0.1, 0.2, 0.3, 0.4], rtol=1e-6)


@pytest.mark.parametrize("metrics", [{}, {"metrics": ["accuracy"]}])
def test_weighted_metrics_are_weighted(metrics):
    weights = np.random.default_rng(0).random(len(X)).astype(np.float32)
    arguments = {"sample_weight": weights, "validation_data": (PIXELS, LABELS, weights)}
    weighted = [keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce"), "accuracy"]
    network, other = dense(), dense()
    found = ours(network, keras.optimizers.SGD(0.0), weighted_metrics=weighted, **metrics, **arguments)
    weighted = [keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce"), "accuracy"]
    expected = stock(other, keras.optimizers.SGD(0.0), weighted_metrics=weighted, metrics=["accuracy"], **arguments)
    assert expected.keys() == found.keys() and "val_weighted_accuracy" in found
    for name, values in expected.items():
        if not name.endswith("loss"):
            np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)
    assert abs(found["ce"][0] - found["loss"][0]) > 1e-3


def test_metrics_do_not_need_accuracies():
    metrics = ["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce")]
    found = ours(dense(), keras.optimizers.SGD(0.0), metrics=metrics, options={"log_accuracy": False})
    network = dense()
    assert found["ce"][0] == pytest.approx(found["loss"][0], rel=1e-5)
    assert found["accuracy"][0] == pytest.approx(np.mean(network(PIXELS).numpy().argmax(-1) == LABELS))


class Unused(keras.Model):
    """Rows of an embedding are added, and some weights never used."""

    def __init__(self):
        super().__init__()
        self.rows = keras.layers.Embedding(8, 3)
        self.layers_used = [keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)]
        self.unused = keras.layers.Dense(4)

    def build(self, shape):
        self.rows.build((None,))
        self.layers_used[1].build((None, int(np.prod(SHAPE))))
        self.unused.build((None, 3))
        self.built = True

    def call(self, x):
        x = x + self.rows(keras.ops.arange(8))[None, :, None]
        for layer in self.layers_used:
            x = layer(x)
        return x


def test_weights_without_a_gradient_stay_whatever_the_number_of_parts():
    found = []
    for parts in (1, 2):
        keras.utils.set_random_seed(0)
        network = Unused()
        network.build((None, *SHAPE))
        before = network.unused.kernel.numpy()
        ours(network, keras.optimizers.SGD(0.1), options={"accumulation_steps": parts})
        np.testing.assert_array_equal(network.unused.kernel.numpy(), before)
        found.append(network)
    assert_alike(*found)


@pytest.fixture
def policy():
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


def test_losses_are_scaled_where_a_layer_computes_in_float16(policy, tmp_path):
    policy("mixed_float16")
    network = dense(keras.layers.Conv2D(4, 3), dtype="float32")
    policy("float32")
    network.save(tmp_path / "half.keras")
    scaled = keras.optimizers.LossScaleOptimizer
    for each in (network, keras.models.load_model(tmp_path / "half.keras"), keras.Sequential([network])):
        model = AdversarialModel(each, objective="standard")
        for optimizer, arguments, expected in [
            ("sgd", {}, True),
            (scaled(keras.optimizers.SGD()), {}, True),
            ("sgd", {"auto_scale_loss": False}, False),
        ]:
            model.compile(optimizer, **arguments)
            assert isinstance(model.optimizer, scaled) == expected
            assert not isinstance(getattr(model.optimizer, "inner_optimizer", None), scaled)
    before = network.layers[0].kernel.numpy()
    network.layers[-1].kernel.assign(3e-5 * network.layers[-1].kernel)  # Gradients that float16 does not hold.
    model = AdversarialModel(network, objective="standard")
    model.compile(keras.optimizers.SGD(1e4))
    model.fit(PIXELS, LABELS, batch_size=BATCH, verbose=0)
    assert np.mean(network.layers[0].kernel.numpy() != before) > 0.99


def test_a_float32_network_stays_one_under_another_global_policy(policy):
    network = dense(keras.layers.Conv2D(4, 3))
    expected = network.predict(PIXELS, verbose=0)
    policy("mixed_float16")
    model = AdversarialModel(network, objective="standard")
    model.compile("sgd")
    assert not isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    np.testing.assert_array_equal(model.predict(PIXELS, verbose=0), expected)
    np.testing.assert_array_equal(model(tf.constant(PIXELS)), expected)


def spectral(seed=0):
    keras.utils.set_random_seed(seed)
    normalised = lambda layer: keras.layers.SpectralNormalization(layer)  # noqa: E731
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            normalised(keras.layers.Conv2D(4, 3, activation="tanh", kernel_regularizer=keras.regularizers.L2(0.01))),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            normalised(keras.layers.Dense(NUM_CLASSES)),
        ]
    )


class Decayed(keras.layers.Layer):
    """A layer that assigns to its weight once it has used it."""

    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")

    def call(self, x, training=False):
        x = x * self.scale
        if training:
            self.scale.assign(0.9 * self.scale)
        return x


@pytest.mark.parametrize("make", [spectral, lambda: dense(Decayed())])
def test_weights_that_layers_assign_learn_as_in_stock_keras(make):
    network, other = make(), make()
    before = network.get_weights()
    history = ours(network, keras.optimizers.SGD(0.1, momentum=0.9))
    expected = stock(other, keras.optimizers.SGD(0.1, momentum=0.9))
    assert_alike(network, other)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    assert all((old != new).any() for old, new in zip(before, network.get_weights()))


@pytest.mark.parametrize("how", [{}, {"accumulation_steps": 2}])
def test_weights_that_layers_assign_learn_under_attack(how):
    """Of two passes, each starts from the weights before the step, so both see what one of them assigns."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.SpectralNormalization(keras.layers.Dense(NUM_CLASSES, use_bias=False))
    network = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), layer])
    kernel, u = layer.layer.kernel.numpy(), layer.vector_u.numpy()
    v = u @ kernel.T / np.linalg.norm(u @ kernel.T)
    u = v @ kernel / np.linalg.norm(v @ kernel)
    used = tf.Variable(kernel / (v @ kernel @ u.T))
    x = PIXELS[:BATCH].reshape(BATCH, -1)

    def both(logits_fn, x, x_adv, labels, targets):
        clean, adv = (tf.nn.softmax_cross_entropy_with_logits(targets, logits_fn(images)) for images in (x, x_adv))
        return clean + adv

    model = AdversarialModel(network, objective=both, attack=lambda f, x, targets, *, seeds: 1.0 - x, **how)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(PIXELS[:BATCH], LABELS[:BATCH], batch_size=BATCH, verbose=0)
    with tf.GradientTape() as tape:
        targets = np.concatenate([LABELS[:BATCH]] * 2)
        logits = tf.concat([x @ used, (1.0 - x) @ used], axis=0)
        loss = tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)) / BATCH
    np.testing.assert_allclose(layer.layer.kernel, used - 0.1 * tape.gradient(loss, used), atol=1e-5)
    np.testing.assert_allclose(layer.vector_u, u, atol=1e-5)
