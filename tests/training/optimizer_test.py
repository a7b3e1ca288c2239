import functools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, schedules
from robust_keras.models import wide_resnet
from robust_keras.training.optimizer import NesterovSGD

pytestmark = pytest.mark.oldest

RECORDED = pathlib.Path(__file__).parents[1] / "oracles" / "tensorflow_addons.npz"
SHAPES = {"kernel": (3, 4), "bias": (5,)}


@pytest.fixture(scope="module")
def addons():
    with np.load(RECORDED) as arrays:
        return dict(arrays)


def nesterov(weights, gradients, learning_rates, momentum=0.9, weight_decay=0.0):
    """The weights after each step, in float64: the learning rate stays outside the buffer, the decay goes through it."""
    weights, buffer, after = np.float64(weights), 0.0, []
    for gradient, learning_rate in zip(np.float64(gradients), learning_rates):
        gradient = gradient + weight_decay * weights
        buffer = momentum * buffer + gradient
        weights = weights - learning_rate * (gradient + momentum * buffer)
        after.append(weights)
    return np.stack(after)


def train(optimizer, initial, gradients):
    """The weights after each step of a Keras optimiser, by name."""
    variables = [keras.Variable(value, name=name) for name, value in initial.items()]
    optimizer.build(variables)
    after = {name: [] for name in initial}
    for step in range(len(next(iter(gradients.values())))):
        optimizer.apply([tf.constant(gradients[name][step]) for name in initial], variables)
        for variable in variables:
            after[variable.name].append(variable.numpy())
    return {name: np.stack(values) for name, values in after.items()}


def random_problem(steps=6):
    rng = np.random.default_rng(0)
    initial = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    gradients = {name: rng.normal(size=(steps, *shape)).astype(np.float32) for name, shape in SHAPES.items()}
    return initial, gradients


DROP = functools.partial(schedules.piecewise_constant, boundaries=[3], values=[0.1, 0.01])
RATES = [0.1, 0.1, 0.1, 0.01, 0.01, 0.01]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_formula_with_a_rate_that_drops(momentum, weight_decay):
    initial, gradients = random_problem()
    after = train(NesterovSGD(DROP, momentum=momentum, weight_decay=weight_decay), initial, gradients)
    for name in SHAPES:
        expected = nesterov(initial[name], gradients[name], RATES, momentum, weight_decay)
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-6)


def test_defaults_are_the_papers():
    initial, gradients = random_problem()
    after = train(NesterovSGD(), initial, gradients)
    expected = nesterov(initial["kernel"], gradients["kernel"], [0.1] * 6, 0.9, 5e-4)
    np.testing.assert_allclose(after["kernel"], expected, rtol=0, atol=1e-6)
    assert np.abs(expected - nesterov(initial["kernel"], gradients["kernel"], [0.1] * 6)).max() > 1e-4


def test_two_steps_by_hand():
    # g = 1 + .5 * 2 = 2, v = 2, w = 2 - .1 * (2 + .5 * 2) = 1.7;
    # g = -1 + .5 * 1.7 = -.15, v = .5 * 2 - .15 = .85, w = 1.7 - .1 * (-.15 + .5 * .85) = 1.6725.
    optimizer = NesterovSGD(0.1, momentum=0.5, weight_decay=0.5)
    after = train(optimizer, {"kernel": np.float32([2.0])}, {"kernel": np.float32([[1.0], [-1.0]])})
    np.testing.assert_allclose(after["kernel"], [[1.7], [1.6725]], rtol=1e-6)


def test_keras_sgd_parts_ways_when_the_rate_changes():
    initial, gradients = random_problem()
    ours = train(NesterovSGD(DROP, weight_decay=0.0), initial, gradients)["kernel"]
    # Keras changes after the boundary, not at it.
    rates = keras.optimizers.schedules.PiecewiseConstantDecay([2], [0.1, 0.01])
    theirs = train(keras.optimizers.SGD(rates, momentum=0.9, nesterov=True), initial, gradients)["kernel"]
    np.testing.assert_allclose(ours[:3], theirs[:3], rtol=0, atol=1e-6)
    # Their buffer still moves as fast as before the drop.
    assert np.all(np.abs(ours[3:] - theirs[3:]).max((1, 2)) > 0.05)


def test_learning_rate_is_that_of_the_step_to_come():
    optimizer = NesterovSGD(lambda step: 0.5 * tf.cast(step, tf.float32) + 0.25)
    variable = keras.Variable(np.ones(1, np.float32), name="kernel")
    optimizer.build([variable])
    shown = []
    for _ in range(3):
        shown.append(float(optimizer.learning_rate))
        optimizer.apply([tf.constant([0.0])], [variable])
    assert shown == [0.25, 0.75, 1.25]


def test_schedule_is_followed_inside_one_compiled_step():
    initial, gradients = random_problem()
    optimizer = NesterovSGD(DROP, weight_decay=0.1)
    variable = keras.Variable(initial["kernel"], name="kernel")
    optimizer.build([variable])
    step = tf.function(lambda gradient: optimizer.apply([gradient], [variable]))
    for gradient in gradients["kernel"]:
        step(tf.constant(gradient))
    assert step.experimental_get_tracing_count() == 1
    expected = nesterov(initial["kernel"], gradients["kernel"], RATES, 0.9, 0.1)
    np.testing.assert_allclose(variable.numpy(), expected[-1], rtol=0, atol=1e-6)


def test_decay_covers_kernels_and_the_classifiers_bias_only():
    network = wide_resnet.wide_resnet(depth=10, width=1, num_classes=3, input_shape=(8, 8, 3))
    rng = np.random.default_rng(0)
    before = {}
    for weight in network.trainable_weights:
        weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        before[weight.path] = weight.numpy()
    optimizer = NesterovSGD(0.1, weight_decay=0.5)
    optimizer.build(network.trainable_weights)
    optimizer.apply([tf.zeros(weight.shape) for weight in network.trainable_weights], network.trainable_weights)

    decayed = {path for path in before if path.endswith("/kernel")} | {"logits/bias"}
    # 1 initial, 3 shortcuts, 2 in each of 3 blocks, the classifier; 2 normalisations in each block and the last one.
    assert len(decayed) == 1 + 3 + 6 + 1 + 1 and len(before) == len(decayed) + 2 * 7
    for weight in network.trainable_weights:
        # The first step: g = wd * w and v = g, so w loses lr * 1.9 * wd of itself.
        factor = 1 - 0.1 * 1.9 * 0.5 if weight.path in decayed else 1.0
        np.testing.assert_allclose(weight.numpy(), factor * before[weight.path], rtol=1e-5, err_msg=weight.path)


def step_function(network, optimizer, l2=0.0):
    """One step on the mean cross-entropy, plus an explicit l2 / 2 * (sum of squares)."""
    convolution, dense = network.layers[1], network.layers[-1]

    @tf.function
    def step(images, labels, num_replicas=1.0):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(losses.cross_entropy(network(images, training=True), labels))
            squares = [tf.reduce_sum(w.value**2) for w in (convolution.kernel, dense.kernel, dense.bias)]
            loss = (loss + l2 / 2 * tf.add_n(squares)) / num_replicas
        optimizer.apply(tape.gradient(loss, network.trainable_weights), network.trainable_weights)

    return step


def test_decay_is_the_gradient_of_an_l2_term_in_the_loss(make_tiny_model, tiny_images):
    labels = tf.constant([0, 1, 2, 3] * 2)
    networks = {}
    for kind, in_optimizer, in_loss in (("optimizer", 0.05, 0.0), ("loss", 0.0, 0.05), ("none", 0.0, 0.0)):
        network = make_tiny_model()
        optimizer = NesterovSGD(DROP, weight_decay=in_optimizer)
        optimizer.build(network.trainable_weights)
        step = step_function(network, optimizer, in_loss)
        for _ in range(5):
            step(tiny_images, labels)
        networks[kind] = [weight.numpy() for weight in network.trainable_weights]
    for ours, explicit, undecayed in zip(*networks.values()):
        np.testing.assert_allclose(ours, explicit, rtol=0, atol=1e-5)
        assert np.abs(ours - undecayed).max() > 5e-5  # BatchNorm's too: the layers around it are others.


def addons_case(addons, case, **options):
    """Ours on the recorded gradients, and what TensorFlow Addons' SGDW left, by name."""
    learning_rate = float(addons["sgdw/learning_rate"])
    initial, gradients, theirs = (
        {name: addons[f"sgdw/{key}/{name}"] for name in ("matrix", "vector")}
        for key in ("initial", "gradient", f"{case}/variable")
    )
    ours = train(NesterovSGD(learning_rate, **options), initial, gradients)
    assert theirs["matrix"].shape == (20, 3, 4)
    return ours, theirs


def test_addons_decoupled_decay_without_momentum(addons):
    decay, learning_rate = addons["sgdw/plain_decay/weight_decay"], addons["sgdw/learning_rate"]
    assert addons["sgdw/plain_decay/momentum"] == 0 and decay > 0
    # Decoupled, the decay isn't multiplied by the learning rate; in the gradient it is.
    ours, theirs = addons_case(addons, "plain_decay", momentum=0.0, weight_decay=float(decay / learning_rate))
    other, _ = addons_case(addons, "plain_decay", momentum=0.0, weight_decay=0.0)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-6)
        assert np.abs(other[name][-1] - theirs[name][-1]).max() > 3e-4


def test_addons_nesterov_at_a_constant_rate(addons):
    assert addons["sgdw/nesterov/weight_decay"] == 0
    momentum = float(addons["sgdw/nesterov/momentum"])
    ours, theirs = addons_case(addons, "nesterov", momentum=momentum, weight_decay=0.0)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_addons_decoupled_decay_with_momentum_is_not_ours(addons):
    decay, learning_rate = addons["sgdw/nesterov_decay/weight_decay"], addons["sgdw/learning_rate"]
    momentum = float(addons["sgdw/nesterov_decay/momentum"])
    ours, theirs = addons_case(addons, "nesterov_decay", momentum=momentum, weight_decay=float(decay / learning_rate))
    for name in ours:
        assert np.abs(ours[name] - theirs[name]).max() > 1e-3
        # The decay passes through the buffer, which is the one difference.
        expected = nesterov(
            addons[f"sgdw/initial/{name}"],
            addons[f"sgdw/gradient/{name}"],
            [learning_rate] * 20,
            momentum,
            decay / learning_rate,
        )
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=1e-5)


def test_two_replicas_sum_their_gradients(mirrored, make_tiny_model, tiny_images):
    labels = tf.constant([0, 1, 2, 3, 3, 2, 1, 0])

    def after(strategy, num_steps=3):
        num_replicas = strategy.num_replicas_in_sync
        with strategy.scope():
            network = make_tiny_model(statistics_group_size=4)
            optimizer = NesterovSGD(DROP, weight_decay=0.05)
            optimizer.build(network.trainable_weights)
        step = step_function(network, optimizer)

        def share(values):
            size = 8 // num_replicas
            return strategy.experimental_distribute_values_from_function(
                lambda context: tf.identity(values[context.replica_id_in_sync_group * size :][:size])
            )

        @tf.function
        def run(images, labels):
            strategy.run(step, args=(images, labels, float(num_replicas)))

        for _ in range(num_steps):
            run(share(tiny_images), share(labels))
        replicas = [strategy.experimental_local_results(w.value) for w in network.trainable_weights]
        assert all(len(values) == num_replicas for values in replicas)
        for values in replicas:
            np.testing.assert_array_equal(values[0], values[-1])
        return [values[0].numpy() for values in replicas]

    one, two = after(tf.distribute.get_strategy()), after(mirrored)
    untrained = [w.numpy() for w in make_tiny_model().trainable_weights]
    for single, double, start in zip(one, two, untrained):
        np.testing.assert_allclose(double, single, rtol=0, atol=1e-5)
        assert np.abs(single - start).max() > 1e-3


def test_config_round_trip():
    optimizer = NesterovSGD(0.25, momentum=0.5, weight_decay=0.125)
    restored = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert isinstance(restored, NesterovSGD)
    initial, gradients = random_problem()
    expected = nesterov(initial["kernel"], gradients["kernel"], [0.25] * 6, 0.5, 0.125)
    np.testing.assert_allclose(train(restored, initial, gradients)["kernel"], expected, rtol=0, atol=1e-5)


def test_a_variable_without_a_gradient_stays_as_it_is():
    ours, other = (keras.Variable([1.0, 2.0], name=name) for name in ("kernel", "unused"))
    optimizer = NesterovSGD(0.5, momentum=0.0, weight_decay=0.0)
    optimizer.apply([tf.constant([1.0, 0.0]), None], [ours, other])
    np.testing.assert_array_equal(ours.numpy(), [0.5, 2.0])
    np.testing.assert_array_equal(other.numpy(), [1.0, 2.0])
    assert int(optimizer.iterations) == 1


def test_a_constraint_holds_after_the_step():
    variable = keras.Variable([1.0, 2.0], name="kernel")
    variable.constraint = keras.constraints.NonNeg()
    NesterovSGD(1.0, momentum=0.0, weight_decay=0.0).apply([tf.constant([3.0, 1.0])], [variable])
    np.testing.assert_array_equal(variable.numpy(), [0.0, 1.0])


def test_other_variables_and_what_would_change_the_formula_are_refused():
    one, other = (keras.Variable([1.0], name=name) for name in ("kernel", "bias"))
    optimizer = NesterovSGD()
    optimizer.build([one])
    with pytest.raises(ValueError, match="Expected a gradient for each of the variables"):
        optimizer.apply([tf.zeros(1)], [other])
    with pytest.raises(ValueError, match="Expected a gradient for each of the variables"):
        optimizer.apply([tf.zeros(1), tf.zeros(1)])
    with pytest.raises(ValueError, match="Expected NesterovSGD without .*Received: clipnorm=1.0, use_ema=True"):
        NesterovSGD(clipnorm=1.0, use_ema=True)
