"""What a run is built of: networks that can be saved, named weights, no copy too many."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.models import weights
from robust_keras.training import program, recipes, run_state
from tests.models.weights_test import nested
from tests.training.train_test import tiny_data, tiny_run, tiny_settings

FEW = {"train_steps": 2, "validate_every": 2, "checkpoint_every": 1}


class Unregistered(keras.layers.Layer):
    def call(self, x):
        return x


@keras.saving.register_keras_serializable(package="program_test")
class WithoutConfig(keras.layers.Layer):
    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return self.factor * x

    def get_config(self):  # It forgets the factor.
        return super().get_config()


class Subclassed(keras.Model):
    def __init__(self, num_classes):
        super().__init__()
        self.classifier = keras.layers.Dense(num_classes)

    def call(self, x):
        return self.classifier(tf.reduce_mean(x, axis=(1, 2)))


def network_with(layer):
    def network(*, num_classes, mean, std, input_shape):
        images = keras.Input(input_shape)
        x = layer()(keras.layers.GlobalAveragePooling2D()(images))
        return keras.Model(images, keras.layers.Dense(num_classes)(x))

    return network


def subclassed(*, num_classes, mean, std, input_shape):
    network = Subclassed(num_classes)
    network(tf.zeros((1, *input_shape)))
    return network


@pytest.mark.parametrize(
    "model",
    [
        network_with(Unregistered),
        network_with(lambda: WithoutConfig(2.0)),
        network_with(lambda: keras.layers.Lambda(lambda x: 2 * x)),
        subclassed,
    ],
)
def test_a_network_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path, model):
    with pytest.raises(ValueError, match="Expected a network that Keras can save and load") as refused:
        tiny_run(tmp_path, model=model)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_nested_models_with_equal_layers_go_on_to_the_same_result(tmp_path):
    trained = tiny_run(tmp_path / "whole", model=nested, **FEW)
    snapshot = storage.read(tmp_path / "whole" / "checkpoints", 1)
    for kind in ("weights", "momentum", "averages"):
        assert {f"{kind}/conv/kernel", f"{kind}/conv/kernel#2"} <= snapshot.arrays.keys()
    storage.write(tmp_path / "stopped" / "checkpoints", 1, snapshot.arrays, snapshot.info)
    again = tiny_run(tmp_path / "stopped", model=nested, **FEW)
    for ours, theirs in zip(again.network.weights, trained.network.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
    best = storage.read_newest(tmp_path / "whole" / "best").arrays
    for name, weight in weights.by_name(trained.best).items():
        np.testing.assert_array_equal(weight.numpy(), best[name])


def test_a_network_whose_layers_have_no_names_of_their_own_trains(tmp_path):
    model = network_with(lambda: keras.layers.Activation("silu"))
    trained = tiny_run(tmp_path, model=model, **FEW)
    x = tiny_data().validation.images / np.float32(255)
    best = storage.read_newest(tmp_path / "best")
    read = keras.models.model_from_json(best.info["description"]["architecture"])
    weights.assign(read, best.arrays)
    np.testing.assert_array_equal(read(x), trained.best(x))


def test_a_run_holds_its_network_and_its_twin_and_no_other_weights(tmp_path):
    shapes = nested(num_classes=4)
    initial = [np.zeros(weight.shape, np.float32) for weight in shapes.weights]
    references = [weakref.ref(array) for array in initial]
    given = dict(zip(weights.names(shapes), initial, strict=True))
    del initial
    before, found = set(), []

    def alive():
        gc.collect()
        return {id(each) for each in gc.get_objects() if isinstance(each, keras.Model) and each.name == shapes.name}

    def correct(logits_fn, x, labels, *, seeds):
        if not found:
            found.append((len(alive() - before), sum(reference() is not None for reference in references)))
        right = tf.equal(tf.argmax(logits_fn(x), -1, tf.int32), labels)
        return right, right

    before |= alive()
    settings = {"validation": correct, "initial_weights": lambda: {name: given.pop(name) for name in list(given)}}
    tiny_run(tmp_path / "run", model=nested, **FEW, **settings)
    assert found == [(2, 0)]


def test_what_is_built_is_what_a_run_trains(tmp_path):
    run = tiny_settings(model=nested, **FEW)
    built = program.build(run.recipe, run.layout, tiny_data())
    trained = tiny_run(tmp_path, model=nested, **FEW)
    batches = run.recipe.batches(tiny_data(), seed=0, num_steps=2)
    built.model.fit(batches, callbacks=[built.averaging], verbose=0)
    for networks in ((built.network, trained.network), (built.twin, trained.averaged)):
        for ours, theirs in zip(*(network.weights for network in networks), strict=True):
            np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-6)
    assert built.validator.on_replica.keys() == {"", "_averaged"}
    assert isinstance(run.layout, recipes.Layout)


def with_dropout(*, num_classes, mean, std, input_shape):
    """Two layers that draw random numbers, of equal paths."""
    images = x = keras.Input(input_shape)
    for name in ("first", "second"):
        inner = keras.Input(x.shape[1:])
        x = keras.Model(inner, keras.layers.Dropout(0.5, name="dropout")(inner), name=name)(x)
    x = keras.layers.Flatten()(x)
    return keras.Model(images, keras.layers.Dense(num_classes, name="logits")(x))


def test_a_network_with_dropout_goes_on_to_the_same_result(tmp_path):
    tiny_run(tmp_path / "whole", model=with_dropout, **FEW)
    first, last = (storage.read(tmp_path / "whole" / "checkpoints", step) for step in (1, 2))
    drawn = [name for name in first.arrays if name.startswith("random/")]
    assert len(drawn) == 2 and all(np.any(first.arrays[name] != last.arrays[name]) for name in drawn)
    storage.write(tmp_path / "resumed" / "checkpoints", 1, first.arrays, first.info)
    tiny_run(tmp_path / "resumed", model=with_dropout, **FEW)
    resumed = storage.read(tmp_path / "resumed" / "checkpoints", 2)
    assert resumed.arrays.keys() == last.arrays.keys()
    for name, array in last.arrays.items():
        np.testing.assert_array_equal(resumed.arrays[name], array, err_msg=name)
    # An older version did not save where the random numbers come from: its runs go on with others.
    older = {name: array for name, array in first.arrays.items() if name not in drawn}
    storage.write(tmp_path / "older" / "checkpoints", 1, older, first.info)
    tiny_run(tmp_path / "older", model=with_dropout, **FEW)
    older = storage.read(tmp_path / "older" / "checkpoints", 2).arrays
    assert older.keys() == last.arrays.keys()
    assert any(np.any(older[name] != array) for name, array in last.arrays.items())


def test_statistics_that_a_snapshot_brings_are_those_that_a_network_uses():
    network = keras.Sequential([keras.Input((2,)), keras.layers.Normalization()])
    variables = {weight.path: weight.value for weight in network.weights}
    arrays = {name: np.full(variable.shape, 3, variable.dtype.as_numpy_dtype) for name, variable in variables.items()}
    run_state.RunState(variables, {}, (network,)).restore(arrays, "here")
    np.testing.assert_allclose(network(np.full((1, 2), 3.0 + np.sqrt(3.0), np.float32)), 1.0, rtol=1e-6)
