"""`AdversarialModel` around networks that are not this package's, against a plain loop that uses none of it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.training.adversarial_model import AdversarialModel

pytestmark = pytest.mark.oldest

NUM_CLASSES, BATCH, STEPS, EPSILON = 4, 8, 3, 0.1
SHAPE = (8, 8, 3)


def images(num=BATCH * STEPS, shape=SHAPE, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (num, *shape)).astype(np.uint8), rng.integers(0, NUM_CLASSES, num)


def stock_batch_norm():
    x = inputs = keras.Input(SHAPE)
    for filters in (6, 8):
        x = keras.layers.Conv2D(filters, 3, padding="same")(x)
        x = keras.layers.BatchNormalization(momentum=0.9)(x)
        x = keras.layers.Activation("silu")(x)
    return keras.Model(inputs, keras.layers.Dense(NUM_CLASSES)(keras.layers.GlobalAveragePooling2D()(x)))


@keras.saving.register_keras_serializable(package="tests")
class WithDropout(keras.Model):
    """A subclass of Model, built by its first call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.convolution = keras.layers.Conv2D(8, 3, strides=2, activation="tanh")
        self.drop = keras.layers.Dropout(0.4, seed=3)
        self.blocks = [keras.layers.LayerNormalization(), keras.layers.Dropout(0.2, seed=4)]
        self.head = keras.layers.Dense(NUM_CLASSES)

    def call(self, x, training=False):
        x = self.drop(keras.ops.reshape(self.convolution(x), (-1, 72)), training=training)
        for block in self.blocks:
            x = block(x, training=training) if isinstance(block, keras.layers.Dropout) else block(x)
        return self.head(x)


def subclassed():
    network = WithDropout()
    network(tf.zeros((1, *SHAPE)))
    return network


def nested_frozen():
    base = keras.applications.MobileNetV2(input_shape=(32, 32, 3), include_top=False, weights=None, alpha=0.35)
    for weight in base.weights:
        if "kernel" in weight.path:  # New ones let all but nothing through.
            weight.assign(2.0 * weight)
    base.trainable = False
    head = [keras.layers.GlobalAveragePooling2D(), keras.layers.BatchNormalization(), keras.layers.Dense(NUM_CLASSES)]
    return keras.Sequential([keras.Input((32, 32, 3)), base, *head])


def regularised():
    l2 = keras.regularizers.L2(0.05)
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.Conv2D(6, 3, kernel_regularizer=l2),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(NUM_CLASSES, kernel_regularizer=l2, bias_regularizer=l2),
        ]
    )


NETWORKS = [stock_batch_norm, subclassed, pytest.param(nested_frozen, marks=pytest.mark.slow), regularised]


def cross_entropy(logits, labels):
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def divergence(p_logits, q_logits):
    return tf.reduce_sum(tf.nn.softmax(p_logits) * (tf.nn.log_softmax(p_logits) - tf.nn.log_softmax(q_logits)), axis=-1)


def steps(predict, x, loss):
    """Three steps along the gradient from a fixed start inside the ball; its sign would turn with rounding."""
    start = tf.constant(np.random.default_rng(1).uniform(-EPSILON, EPSILON, x.shape).astype(np.float32))
    x_adv = tf.clip_by_value(x + start, 0.0, 1.0)
    for _ in range(3):
        with tf.GradientTape() as tape:
            tape.watch(x_adv)
            value = tf.reduce_sum(loss(predict(x_adv)))
        gradient = tape.gradient(value, x_adv)
        step = 0.5 * gradient / (tf.norm(tf.reshape(gradient, (x.shape[0], -1)), axis=-1)[:, None, None, None] + 1e-12)
        x_adv = tf.clip_by_value(tf.clip_by_value(x_adv + step, x - EPSILON, x + EPSILON), 0.0, 1.0)
    return x_adv


def attack(logits_fn, x, targets, *, seeds):
    if targets.dtype.is_floating:
        return steps(logits_fn, x, lambda logits: divergence(tf.math.log(targets), logits))
    return steps(logits_fn, x, lambda logits: cross_entropy(logits, targets))


def plain_loss(name, network, x, x_adv, labels):
    """The objective of one step, with the moving statistics that only the adversarial pass may move."""
    if name == "adversarial_training":
        return cross_entropy(network(x_adv, training=True), labels)
    seeds = "seed_generator_state"
    before = [(v, v.numpy()) for v in network.non_trainable_variables if seeds not in v.path]
    clean = network(x, training=True)
    for variable, value in before:
        variable.assign(value)
    adv = network(x_adv, training=True)
    if name == "trades":
        return cross_entropy(clean, labels) + 6.0 * divergence(clean, adv)
    is_label = tf.one_hot(labels, NUM_CLASSES)
    p, q = tf.nn.softmax(clean), tf.nn.softmax(adv)
    strongest = tf.reduce_max(q - 2.0 * is_label, axis=-1)
    boosted = cross_entropy(adv, labels) - tf.math.log(1.0001 - strongest)
    kl = tf.reduce_sum(p * (tf.nn.log_softmax(clean) - tf.math.log(q + 1e-12)), axis=-1)
    return boosted + 6.0 * kl * (1.0 - tf.reduce_sum(p * is_label, axis=-1))


def plain_loop(name, network, x, labels):
    optimizer, losses = keras.optimizers.SGD(0.05, momentum=0.9), []
    for start in range(0, len(x), BATCH):
        x_batch = tf.constant(x[start : start + BATCH] / np.float32(255))
        y_batch = tf.constant(labels[start : start + BATCH], tf.int32)
        predict = lambda z: network(z, training=False)  # noqa: E731
        if name == "trades":
            clean = predict(x_batch)
            x_adv = steps(predict, x_batch, lambda logits, clean=clean: divergence(clean, logits))
        else:
            x_adv = steps(predict, x_batch, lambda logits, y=y_batch: cross_entropy(logits, y))
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(plain_loss(name, network, x_batch, x_adv, y_batch))
            loss += tf.add_n([*(w.regularizer(w) for w in network.trainable_weights if w.regularizer), 0.0])
        weights = network.trainable_weights
        optimizer.apply(tape.gradient(loss, [w.value for w in weights]), weights)
        losses.append(float(loss))
    return losses


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))


def fitted(network, name, x, labels, **options):
    compiled = options.pop("compiled", {})
    model = AdversarialModel(network, epsilon=EPSILON, objective=name, attack=attack, **options)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), **compiled)
    seen = Losses()
    model.fit(x, labels, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[seen])
    return seen.losses


@pytest.mark.parametrize("name", ["adversarial_training", "trades", "mart"])
@pytest.mark.parametrize("make", NETWORKS)
def test_the_step_is_that_of_a_plain_loop(make, name):
    network, other = make(), make()
    other.set_weights(network.get_weights())
    before = network.get_weights()
    x, labels = images(shape=network.input_shape[1:] if getattr(network, "inputs", None) else SHAPE)
    expected = plain_loop(name, other, x, labels)
    np.testing.assert_allclose(fitted(network, name, x, labels), expected, rtol=1e-5)
    for variable, same in zip(network.variables, other.variables, strict=True):
        np.testing.assert_allclose(variable.numpy(), same.numpy(), rtol=1e-4, atol=1e-5, err_msg=variable.path)
    assert any((old != new).any() for old, new in zip(before, network.get_weights()))


def small():
    keras.utils.set_random_seed(0)
    return stock_batch_norm()


def weights_after(x, y, network=None, *, epochs=1, compiled=None, arguments=None, **options):
    network = network or small()
    model = AdversarialModel(network, epsilon="8/255", **options)
    model.compile(keras.optimizers.SGD(0.05), **(compiled or {}))
    history = model.fit(x, y, **{"batch_size": BATCH, "verbose": 0, "epochs": epochs, **(arguments or {})})
    return network.get_weights(), history.history


def assert_same_bits(weights, others):
    for weight, other in zip(weights, others, strict=True):
        np.testing.assert_array_equal(weight, other)


def test_forms_of_images_and_labels_give_the_same_bits():
    x, labels = images()
    y = np.eye(NUM_CLASSES)[labels].astype(np.float32)
    expected, history = weights_after(x, labels)
    assert history.keys() == {"loss", "accuracy", "robust_accuracy"}
    floats = x / np.float32(255)
    for given_x, given_y in [(floats, labels[:, None]), (x, y), (floats, y.astype(np.int64)), (list(x), list(labels))]:
        assert_same_bits(weights_after(given_x, given_y)[0], expected)
    dataset = tf.data.Dataset.from_tensor_slices((x, labels)).batch(BATCH)
    in_order = weights_after(x, labels, arguments={"shuffle": False})[0]
    for given_data in (dataset, InBatches(x, labels), dataset.filter(lambda x, y: True)):
        assert_same_bits(weights_after(given_data, None, arguments={"batch_size": None})[0], in_order)
    generator = iter([(x[k : k + BATCH], labels[k : k + BATCH]) for k in range(0, len(x), BATCH)])
    assert_same_bits(weights_after(generator, None, arguments={"batch_size": None})[0], in_order)


class InBatches(keras.utils.PyDataset):
    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x) // BATCH

    def __getitem__(self, k):
        part = slice(k * BATCH, (k + 1) * BATCH)
        return self.x[part], self.y[part]


def test_a_network_of_bytes_gives_the_same_bits_for_bytes_and_floats_and_nearly_those_of_one_that_is_rescaled():
    x, labels = images()
    inner = small()
    scaled = keras.Sequential([keras.Input(SHAPE), keras.layers.Rescaling(1 / 255), inner])
    initial = inner.get_weights()
    runs = []
    for given_x in (x, x.astype(np.float32)):
        inner.set_weights(initial)
        runs.append(weights_after(given_x, labels, scaled, bounds=(0, 255))[0])
    assert_same_bits(*runs)
    inner.set_weights(initial)
    for weight, other in zip(runs[0], weights_after(x, labels, inner)[0], strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def named_input():
    image = keras.Input(SHAPE, name="image")
    return keras.Model({"image": image}, {"logits": small()(image)})


def not_built():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)])


@pytest.mark.parametrize("make", [named_input, not_built])
def test_networks_of_other_forms(make):
    weights, history = weights_after(*images(), network := make(), epochs=2)
    assert history["loss"][1] < history["loss"][0]
    assert len(weights) == len(network.weights)


def test_order_and_noise_depend_on_the_seed_alone():
    x, labels = images()
    first, second = (weights_after(x, labels, epochs=2)[0] for _ in range(2))
    assert_same_bits(first, second)
    assert any((a != b).any() for a, b in zip(first, weights_after(x, labels, epochs=2, seed=1)[0]))


def test_weights_of_samples_and_classes_are_factors_of_the_loss():
    x, labels = images()
    factors = np.where(labels == 1, 3.0, 1.0)
    by_class = weights_after(x, labels, arguments={"class_weight": {1: 3.0}})[0]
    assert_same_bits(weights_after(x, labels, arguments={"sample_weight": factors})[0], by_class)
    assert any((a != b).any() for a, b in zip(by_class, weights_after(x, labels)[0]))
    dataset = tf.data.Dataset.from_tensor_slices((x, labels, factors)).batch(BATCH)
    in_order = {"shuffle": False, "sample_weight": factors}
    expected = weights_after(x, labels, arguments=in_order)[0]
    assert_same_bits(weights_after(dataset, None, arguments={"batch_size": None})[0], expected)


@pytest.mark.parametrize("how", [{"steps_per_execution": 2}, {"jit_compile": True}])
def test_how_steps_are_run_changes_no_more_than_rounding(how):
    x, labels = images(BATCH * 3 + 4)  # The last batch is smaller.
    compiled = {"metrics": ["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2, name="top")]}
    expected, history = weights_after(x, labels, epochs=2, compiled=compiled)
    weights, other = weights_after(x, labels, epochs=2, compiled={**compiled, **how})
    for weight, expected_weight in zip(weights, expected, strict=True):
        np.testing.assert_allclose(weight, expected_weight, atol=1e-4)
    assert history.keys() == other.keys() == {"loss", "accuracy", "robust_accuracy", "top"}
    for name, values in history.items():
        np.testing.assert_allclose(values, other[name], atol=1e-3)
    assert all(top >= accuracy for top, accuracy in zip(history["top"], history["accuracy"]))


def test_two_devices_are_one(mirrored):
    x, labels = images(BATCH * 4)
    arguments = {"validation_split": 0.25}
    found = {}
    for name, strategy in {"one": tf.distribute.get_strategy(), "two": mirrored}.items():
        with strategy.scope():
            keras.utils.set_random_seed(0)
            compiled = {"steps_per_execution": 2, "metrics": ["accuracy"]}
            network = regularised()
            found[name] = weights_after(
                x, labels, network, epochs=2, compiled=compiled, arguments=arguments, objective="trades"
            )
    (weights, history), (others, other_history) = found["one"], found["two"]
    assert history.keys() == other_history.keys()
    for name, values in history.items():
        np.testing.assert_allclose(other_history[name], values, rtol=1e-5, err_msg=name)
    for weight, other in zip(weights, others, strict=True):
        np.testing.assert_allclose(other, weight, atol=1e-5)


def test_two_devices_move_statistics_to_their_mean_and_draw_different_noise(mirrored):
    x, labels = images(BATCH * 4)
    with mirrored.scope():
        keras.utils.set_random_seed(0)
        layer = keras.layers.BatchNormalization(momentum=0.5)
        rest = [keras.layers.Dropout(0.5), keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)]
        network = keras.Sequential([keras.Input(SHAPE), layer, *rest])
        weights_after(x[:BATCH], labels[:BATCH], network, attack=lambda logits_fn, x, targets, *, seeds: x)
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.5 * (x[:BATCH] / 255).mean((0, 1, 2)), rtol=1e-5)
    values = mirrored.experimental_local_results(layer.moving_mean.value)
    np.testing.assert_array_equal(values[0], values[1])
    assert network.layers[1].seed_generator.state.numpy()[1] == 1


def test_parts_of_a_batch_are_the_whole_where_nothing_looks_across_it():
    x, labels = images()
    runs = []
    for parts in (1, 2):
        keras.utils.set_random_seed(0)
        compiled = {"metrics": ["accuracy"]}
        runs.append(weights_after(x, labels, regularised(), compiled=compiled, accumulation_steps=parts))
    np.testing.assert_allclose(runs[0][1]["loss"], runs[1][1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(runs[0][1]["accuracy"], runs[1][1]["accuracy"])
    for weight, other in zip(runs[0][0], runs[1][0], strict=True):
        np.testing.assert_allclose(weight, other, atol=1e-5)


def test_an_attack_with_batch_statistics_moves_none_and_leaves_dropout_off():
    network = keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Dropout(0.5, seed=0),
            keras.layers.Flatten(),
            keras.layers.Dense(NUM_CLASSES),
        ]
    )
    x = tf.constant(images(8)[0] / np.float32(255))
    labels, seeds = tf.zeros(8, tf.int32), tf.zeros((8, 2), tf.int32)
    normalised = (x - tf.reduce_mean(x, (0, 1, 2))) / tf.sqrt(tf.math.reduce_variance(x, (0, 1, 2)) + 1e-3)
    expected = {
        ("moving", False): network(x, training=False),
        ("batch", False): keras.Sequential(network.layers[2:])(normalised),
    }
    before = [variable.numpy() for variable in network.variables]
    for (statistics, noise), logits in expected.items():
        seen = []

        def attack(logits_fn, x, targets, *, seeds, seen=seen):
            seen.append(logits_fn(x))
            return x

        model = AdversarialModel(network, attack=attack, attack_batch_norm=statistics, attack_noise=noise)
        model.attacked(x, labels, tf.one_hot(labels, NUM_CLASSES), seeds)
        np.testing.assert_allclose(seen[0], logits, rtol=1e-5, atol=1e-5)
    for variable, value in zip(network.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def double_pass(logits_fn, x, x_adv, labels, targets):
    """An objective that says nothing of statistics."""
    return 0.5 * (
        tf.nn.softmax_cross_entropy_with_logits(targets, logits_fn(x_adv))
        + tf.nn.softmax_cross_entropy_with_logits(targets, logits_fn(x))
    )


def test_moving_statistics_move_once_with_the_adversarial_images():
    keras.utils.set_random_seed(0)
    layer = keras.layers.BatchNormalization(momentum=0.5)
    network = keras.Sequential([keras.Input(SHAPE), layer, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)])
    x, labels = images(BATCH)
    grey = lambda logits_fn, x, targets, *, seeds: 0.5 * x + 0.25  # noqa: E731
    weights_after(x, labels, network, objective=double_pass, attack=grey)
    mean = (0.5 * x / 255 + 0.25).mean((0, 1, 2))
    np.testing.assert_allclose(layer.moving_mean.numpy(), 0.5 * mean, rtol=1e-5)


class Renormalised(keras.layers.Layer):
    """A relative of batch normalisation that Keras does not know."""

    def build(self, shape):
        self.average = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)

    def call(self, x, training=False):
        if not training:
            return x - self.average
        mean = keras.ops.mean(x, axis=(0, 1, 2))
        self.average.assign(0.5 * self.average + 0.5 * mean)
        return x - mean


def test_relatives_of_batch_normalisation_move_once_and_follow_the_attacks_mode():
    layer = Renormalised()
    network = keras.Sequential([keras.Input(SHAPE), layer, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES)])
    x, labels = images(BATCH)
    same = lambda logits_fn, x, targets, *, seeds: x + 0.0 * logits_fn(x)[:, :1, None, None]  # noqa: E731
    for statistics in ("batch", "moving"):
        layer.average.assign(tf.zeros(3))
        weights_after(x, labels, network, objective="trades", attack=same, attack_batch_norm=statistics)
        np.testing.assert_allclose(layer.average.numpy(), 0.5 * (x / 255).mean((0, 1, 2)), rtol=1e-5)


def test_weight_decay_leaves_scales_and_what_was_named_alone():
    x, labels = images(BATCH)
    for name, leave in {"all": None, "kernels": ["kernel"]}.items():
        network = small()
        before = {variable.path: variable.numpy() for variable in network.trainable_variables}
        optimizer = keras.optimizers.AdamW(0.1, weight_decay=0.5)
        if leave:
            optimizer.exclude_from_weight_decay(var_names=leave)
        model = AdversarialModel(network, objective=lambda f, x, x_adv, labels, t: 0.0 * f(x)[:, 0], attack=None)
        model.compile(optimizer)
        model.fit(x, labels, batch_size=BATCH, verbose=0)
        shrunk = {v.path for v in network.trainable_variables if np.abs(v.numpy()).sum() < np.abs(before[v.path]).sum()}
        kinds = {path.rsplit("/", 1)[-1] for path in shrunk}
        assert kinds == ({"kernel"} if name == "all" else {"gamma"}), kinds


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": lambda x: x / np.float32(100)}, r"within the bounds \(0, 1\)"),
        ({"y": lambda y: y + 1}, "labels from 0 to 3. Received: 4"),
        ({"y": lambda y: np.append(y[:-1], 9)}, "labels from 0 to 3. Received: 9"),
        ({"x": lambda x: np.concatenate([x[:-1] / 255, 2.0 * np.ones((1, *SHAPE))])}, r"within the bounds \(0, 1\)"),
        ({"y": lambda y: y.astype(np.float32)}, "Expected labels, integers"),
        ({"y": lambda y: y[1:]}, "for each image. Received"),
        ({"y": lambda y: np.eye(5)[y]}, r"probabilities \[batch, 4\]"),
        ({"y": lambda y: 0.3 * np.eye(4)[y]}, "sum to 1. Received"),
        ({"y": lambda y: None}, "Expected arrays x and y"),
        ({"objective": lambda f, x, x_adv, labels, t: tf.reduce_mean(f(x_adv))}, r"loss of each example, \(8,\). Received: \(\)"),
        ({"objective": "trade"}, "objective out of adversarial_training, trades, mart, standard"),
        ({"epsilon": None}, "Expected a radius epsilon"),
        ({"epsilon": 8}, "such as '8/255'"),
        ({"from_logits": False}, "Expected probabilities"),
        ({"attack_target": "labels"}, "attack_target out of"),
        ({"attack": "pgd"}, r"attack as a function \(logits_fn, x, targets, \*, seeds\). Received: 'pgd'"),
        ({"attack": lambda f, x, y: x}, r"attack as a function .* Received: one \(f, x, y\)"),
        ({"objective": lambda labels, logits: labels}, r"objective as a function \(logits_fn, x, x_adv, labels, targets\)"),
        ({"objective": keras.losses.CategoricalCrossentropy()}, "objective as a function"),
        ({"x": lambda x: x[:0], "y": lambda y: y[:0]}, "at least one image. Received: none"),
        ({"dataset": lambda data: data.map(lambda x, y: {"image": x, "label": y})}, r"\(images, labels\).* Received: a dict"),
        ({"validation_data": (np.zeros((4, 9, 9, 3), np.uint8), [0, 1, 2, 3])}, r"network's shape \(8, 8, 3\). Received: \(9, 9, 3\)"),
        ({"network": lambda: keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(4, "softmax")])}, "from_logits=False"),
        ({"network": lambda: keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(1)])}, "at least two classes"),
        ({"network": lambda: keras.Sequential([keras.Input((9, 9, 3)), keras.layers.Flatten(), keras.layers.Dense(4)])}, "network's shape"),
        ({"network": lambda: keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Lambda(lambda v: tf.round(v)), keras.layers.Dense(4)])}, "gradient"),
        ({"network": lambda: keras.Model([a := keras.Input(SHAPE), b := keras.Input(SHAPE)], keras.layers.Dense(4)(keras.layers.Flatten()(a + b)))}, "2 inputs"),
        ({"network": lambda: "network.keras"}, "Expected a keras.Model"),
        ({"batch_size": 0}, "batch_size >= 1"),
        ({"class_weight": {7: 1.0}}, r"classes 0 to 3. Received: \[7\]"),
        ({"validation_split": 1.5}, "between 0 and 1"),
        ({"dataset": lambda data: data.take(0)}, "empty"),
        ({"dataset": lambda data: data.unbatch()}, "Received"),
        ({"dataset": lambda data: data.map(lambda x, y: x)}, r"\(images, labels\)"),
        ({"dataset": lambda data: data, "steps_per_epoch": 9}, r"Expected 9 batches.*repeat\(\)"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_one_line_before_the_first_step(change, message):
    x, labels = images()
    network = change.get("network", small)
    x, labels = change.get("x", lambda v: v)(x), change.get("y", lambda v: v)(labels)
    options = {name: change[name] for name in ("objective", "from_logits", "attack_target", "attack") if name in change}
    names = ("batch_size", "validation_data", "class_weight", "validation_split", "steps_per_epoch")
    arguments = {"batch_size": BATCH, "verbose": 0} | {name: change[name] for name in names if name in change}
    if "dataset" in change:
        x, labels = change["dataset"](tf.data.Dataset.from_tensor_slices((x, labels)).batch(BATCH)), None
        arguments["batch_size"] = None
    model = None
    with pytest.raises(ValueError, match=message) as raised:
        model = AdversarialModel(network(), epsilon=change.get("epsilon", "8/255"), **options)
        model.compile("sgd")
        model.fit(x, labels, **arguments)
    assert "\n" not in str(raised.value)
    assert model is None or int(model.optimizer.iterations.numpy()) == 0
