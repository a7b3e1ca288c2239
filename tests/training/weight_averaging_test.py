import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise
from robust_keras.training import adversarial_model, objectives
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.weight_averaging import WeightAveraging, averaging_decay

pytestmark = pytest.mark.oldest

RECORDED = pathlib.Path(__file__).parents[1] / "oracles" / "tensorflow_addons.npz"
# Averaging warms up until step 3, where (1 + t) / (10 + t) reaches .307.
NUM_STEPS, TAU = 6, 0.3


def decay_formula(step, tau, warm_up):
    return min(tau, (1 + step) / (10 + step)) if warm_up else tau


@pytest.mark.parametrize("tau", [0.0, 0.5, 0.995, 0.9999])
@pytest.mark.parametrize("warm_up", [True, False])
def test_decay(tau, warm_up):
    for step in (0, 1, 7, 8, 9, 100, 1790, 1791, 1792, 10**6):
        decay = averaging_decay(tf.constant(step, tf.int64), tau=tau, warm_up=warm_up)
        assert decay.dtype == tf.float32 and decay.shape == ()
        np.testing.assert_allclose(decay, decay_formula(step, tau, warm_up), rtol=1e-6)


def test_decay_by_hand():
    decays = [float(averaging_decay(step, tau=0.5)) for step in (0, 1, 7, 8, 9)]
    np.testing.assert_allclose(decays, [0.1, 2 / 11, 8 / 17, 0.5, 0.5], rtol=1e-6)
    assert float(averaging_decay(0, tau=0.5, warm_up=False)) == 0.5


@pytest.mark.parametrize("tau", [-0.1, 1.0, 1.5, float("nan")])
def test_tau_outside_its_range(tau, tiny_model):
    with pytest.raises(ValueError, match=f"Received: {tau}"):
        WeightAveraging(tiny_model, tau=tau)


class Weights(keras.layers.Layer):
    """The variables that TensorFlow Addons' averaging was recorded on."""

    def __init__(self, values):
        super().__init__()
        for name, value in values.items():
            self.add_weight(name=name, shape=value.shape, initializer=lambda shape, dtype, value=value: value)
        self.built = True


class Recorded(keras.Model):
    """A model whose training step applies the gradients of its batch, as an `AdversarialModel` does its own."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.after_update = []
        self.built = True

    def train_step(self, gradients):
        step = tf.identity(self.optimizer.iterations.value)
        weights = self.network.trainable_weights
        self.optimizer.apply([gradients[w.name] for w in weights], weights)
        for update in self.after_update:
            update(step)
        return {"step": step}


class Snapshots(keras.callbacks.Callback):
    """The weights of networks before training and after every execution."""

    def __init__(self, **networks):
        super().__init__()
        self.networks = networks
        self.steps = []

    def record(self):
        self.steps.append({name: [w.numpy() for w in network.weights] for name, network in self.networks.items()})

    def on_train_begin(self, logs=None):
        self.record()

    def on_train_batch_end(self, batch, logs=None):
        self.record()


@pytest.mark.parametrize("tau", [0.5, 0.9])
@pytest.mark.parametrize("kind", ["dynamic", "fixed"])
def test_tensorflow_addons_moving_average(kind, tau):
    with np.load(RECORDED) as arrays:
        recorded = dict(arrays)
    case = f"moving_average/{kind}/tau_{tau}"
    np.testing.assert_allclose(
        [averaging_decay(step, tau=tau, warm_up=kind == "dynamic") for step in range(30)],
        recorded[f"{case}/decay"],
        rtol=1e-6,
    )
    names = ("matrix", "vector")
    initial, gradients = ({n: recorded[f"moving_average/{key}/{n}"] for n in names} for key in ("initial", "gradient"))
    network = Weights(initial)
    # What the twin holds before training has no part in the average.
    twin = Weights({name: np.full_like(value, 7.0) for name, value in initial.items()})
    model = Recorded(network)
    model.compile(optimizer=keras.optimizers.SGD(float(recorded["moving_average/learning_rate"])))
    history = Snapshots(live=network, average=twin)
    dataset = tf.data.Dataset.from_tensor_slices(gradients)
    averaging = WeightAveraging(twin, tau=tau, warm_up=kind == "dynamic")
    model.fit(dataset, callbacks=[averaging, history], verbose=0)
    assert len(history.steps) == 31
    for k, name in enumerate(names):
        for key, kept in (("variable", "live"), ("average", "average")):
            ours = np.stack([step[kept][k] for step in history.steps[1:]])
            np.testing.assert_allclose(ours, recorded[f"{case}/{key}/{name}"], rtol=0, atol=2e-6)


def batches(num_steps):
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 4, (num_steps, 8)).astype(np.int32)
    return tf.data.Dataset.from_tensor_slices(
        {
            "image": rng.integers(0, 256, (num_steps, 8, 8, 8, 3)).astype(np.uint8),
            "label": labels,
            "targets": np.eye(4, dtype=np.float32)[labels],
            "seeds": np.stack([noise.example_seeds(0, step, tf.range(8)) for step in range(num_steps)]),
            "is_labelled": np.ones((num_steps, 8), np.int32),
        }
    ).with_options(unsharded())


def unsharded():
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return options


def fit(make_model, strategy=None, *, averaged=True, **compiled):
    """A few real training steps: (network, twin, weights of both at every step). What is averaged needs no attack."""
    with (strategy or tf.distribute.get_strategy()).scope():
        network = make_model(seed=0, statistics_group_size=4)
        twin = make_model(seed=1, statistics_group_size=4)
        model = adversarial_model.AdversarialModel(network, objective=objectives.standard_training)
        model.compile(optimizer=NesterovSGD(0.1), **compiled)
    history = Snapshots(live=network, average=twin)
    callbacks = [WeightAveraging(twin, tau=TAU)] if averaged else []
    model.fit(batches(NUM_STEPS), callbacks=[*callbacks, history], verbose=0)
    return network, twin, history.steps


def is_trainable(network):
    trainable = {id(w) for w in network.trainable_weights}
    return [id(w) in trainable for w in network.weights]


@pytest.fixture(scope="module")
def run(make_tiny_model):
    return fit(make_tiny_model)


@pytest.fixture(scope="module")
def replicated_run(mirrored, make_tiny_model):
    return fit(make_tiny_model, mirrored)


def assert_is_replay(network, steps):
    """The averages against a NumPy replay of the live weights; batch statistics against the live ones."""
    decays = [decay_formula(t, TAU, True) for t in range(NUM_STEPS)]
    assert len(set(decays)) == 4 and decays[3:] == [TAU] * 3  # Both regimes.
    assert len(steps) == NUM_STEPS + 1
    trainable = is_trainable(network)
    assert 0 < sum(trainable) < len(trainable)
    for k, (weight, averaged) in enumerate(zip(network.weights, trainable)):
        average = np.float64(steps[0]["live"][k])
        np.testing.assert_array_equal(steps[0]["average"][k], steps[0]["live"][k], err_msg=weight.path)
        for decay, step in zip(decays, steps[1:]):
            live = step["live"][k]
            if averaged:
                average = decay * average + (1 - decay) * np.float64(live)
                np.testing.assert_allclose(step["average"][k], average, rtol=0, atol=1e-6, err_msg=weight.path)
                assert np.abs(step["average"][k] - live).max() > 1e-5, weight.path
            else:
                np.testing.assert_array_equal(step["average"][k], live, err_msg=weight.path)


def test_replay_of_a_run(run):
    network, _, steps = run
    assert_is_replay(network, steps)


def test_scale_and_offset_are_averaged_and_statistics_are_live(run):
    network, twin, steps = run
    paths = [weight.path.rsplit("/", 1)[-1] for weight in network.weights]
    kinds = dict(zip(paths, is_trainable(network)))
    assert kinds["scale"] and kinds["offset"] and not kinds["moving_mean"] and not kinds["moving_variance"]
    for name in ("moving_mean", "moving_variance", "num_updates"):
        k = paths.index(name)
        np.testing.assert_array_equal(twin.weights[k].numpy(), network.weights[k].numpy())
        assert np.any(steps[-1]["live"][k] != steps[0]["live"][k])
    assert network.weights[paths.index("num_updates")].numpy() == NUM_STEPS


def test_raw_weights_are_those_of_a_run_without_averaging(run, make_tiny_model):
    _, _, steps = run
    _, twin, without = fit(make_tiny_model, averaged=False)
    for with_averaging, alone in zip(steps, without):
        for ours, theirs in zip(with_averaging["live"], alone["live"]):
            np.testing.assert_array_equal(ours, theirs)
    # The run did train, and a twin that nobody was told of stays as it was.
    assert np.abs(steps[-1]["live"][0] - steps[0]["live"][0]).max() > 1e-3
    for weight, untouched in zip(twin.weights, make_tiny_model(seed=1).weights):
        np.testing.assert_array_equal(weight.numpy(), untouched.numpy())


def test_every_step_counts_when_one_execution_runs_several(run, make_tiny_model):
    _, _, steps = run
    _, _, few = fit(make_tiny_model, steps_per_execution=3)
    assert len(few) == 3
    for k in range(len(steps[0]["live"])):
        for kept in ("live", "average"):
            np.testing.assert_allclose(few[1][kept][k], steps[3][kept][k], rtol=0, atol=1e-5)
            np.testing.assert_allclose(few[2][kept][k], steps[6][kept][k], rtol=0, atol=1e-5)


def test_replay_on_two_replicas(replicated_run):
    network, _, steps = replicated_run
    assert_is_replay(network, steps)


def test_replicas_hold_the_same_averages(mirrored, replicated_run):
    network, twin, _ = replicated_run
    for weight in (*twin.weights, *network.weights):
        replicas = mirrored.experimental_local_results(weight.value)
        assert len(replicas) == 2 and replicas[0].device != replicas[1].device
        np.testing.assert_array_equal(replicas[0].numpy(), replicas[1].numpy(), err_msg=weight.path)


def test_two_replicas_average_as_one_device_does(run, replicated_run):
    for one, two in zip(run[2], replicated_run[2]):
        for single, double in zip(one["average"], two["average"]):
            np.testing.assert_allclose(double, single, rtol=0, atol=1e-4)


def test_later_fit_continues_or_starts_over(make_tiny_model):
    network, twin = make_tiny_model(seed=0), make_tiny_model(seed=1)
    model = adversarial_model.AdversarialModel(network, objective=objectives.standard_training)
    model.compile(optimizer=NesterovSGD(0.1))
    averaging = WeightAveraging(twin, tau=0.5)
    model.fit(batches(2), callbacks=[averaging], verbose=0)
    averages = [w.numpy() for w in twin.trainable_weights]

    averaging.start_from_model = False
    model.fit(batches(1), callbacks=[averaging], verbose=0)
    decay = 3 / 12  # Of step 2: the count goes on, and the update runs once.
    for average, before, live in zip(twin.trainable_weights, averages, network.trainable_weights):
        expected = decay * before + (1 - decay) * live.numpy()
        np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=1e-6)

    averaging.start_from_model = True
    before = [w.numpy() for w in network.trainable_weights]
    model.fit(batches(1), callbacks=[averaging], verbose=0)
    decay = 4 / 13
    for average, start, live in zip(twin.trainable_weights, before, network.trainable_weights):
        expected = decay * start + (1 - decay) * live.numpy()
        np.testing.assert_allclose(average.numpy(), expected, rtol=0, atol=1e-6)


def test_a_twin_without_weights_is_refused():
    network = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    network.compile("sgd", "mse")
    averaging = WeightAveraging(keras.Sequential([keras.layers.Dense(2)]), tau=0.9)
    with pytest.raises(ValueError, match="Expected a twin that is built"):
        network.fit(np.zeros((2, 4)), np.zeros((2, 2)), callbacks=[averaging], verbose=0)
