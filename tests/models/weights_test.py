"""Names of weights: those of old snapshots where they tell them apart, and never two alike."""

import keras
import numpy as np
import pytest

from robust_keras.models import weights, wide_resnet


def nested(*, num_classes=3, mean=None, std=None, input_shape=(8, 8, 3), layer="conv"):
    """Two sub-models whose layers bear the same names."""
    images = x = keras.Input(input_shape)
    for name in ("first", "second"):
        inner = keras.Input(x.shape[1:])
        x = keras.Model(inner, keras.layers.Conv2D(3, 3, padding="same", name=layer)(inner), name=name)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, keras.layers.Dense(num_classes, name="logits")(x), name="nested")


def test_names_are_paths_where_these_differ():
    network = wide_resnet.wide_resnet(depth=10, width=1, num_classes=3)
    assert weights.names(network) == [weight.path for weight in network.weights]


def test_nested_models_with_equal_layers_lose_no_weight():
    network = nested()
    named = weights.by_name(network)
    assert list(named) == [
        *("conv/kernel", "conv/bias"),
        *("conv/kernel#2", "conv/bias#2"),
        *("logits/kernel", "logits/bias"),
    ]
    assert [id(weight) for weight in named.values()] == [id(weight) for weight in network.weights]
    read = keras.models.model_from_json(network.to_json())
    weights.assign(read, {name: weight.numpy() for name, weight in named.items()})
    for ours, theirs in zip(read.weights, network.weights, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_a_nested_sequential_model_that_its_call_builds_is_named_as_when_it_is_read():
    images = keras.Input((4,))
    inner = keras.Sequential([keras.layers.Dense(3, name="first"), keras.layers.Dense(3, name="second")], name="inner")
    network = keras.Model(images, inner(images))
    read = keras.models.model_from_json(network.to_json())
    assert weights.names(network) == weights.names(read)
    assert weights.names(read) == ["first/kernel", "first/bias", "second/kernel", "second/bias"]


class Unnamed(keras.layers.Layer):
    def build(self, input_shape):
        for _ in range(2):
            self.add_weight(shape=(1,))

    def call(self, x):
        return x


def test_weights_that_have_no_name_are_not_numbered_through_a_process():
    images = keras.Input((4,))
    for _ in range(2):
        network = keras.Model(images, Unnamed(name="unnamed")(images))
        assert weights.names(network) == ["unnamed/variable", "unnamed/variable#2"]


class Odd(keras.layers.Layer):
    def build(self, input_shape):
        for name in ("kernel", "kernel", "kernel#2"):
            self.add_weight(name=name, shape=(1,))

    def call(self, x):
        return x


def test_names_that_are_alike_all_the_same_are_refused():
    images = keras.Input((4,))
    network = keras.Model(images, Odd(name="odd")(images))
    with pytest.raises(ValueError, match="tell their weights apart. Received: several named odd/kernel#2"):
        weights.names(network)


def test_arrays_of_another_network_are_refused():
    network = nested()
    arrays = {name: weight.numpy() for name, weight in weights.by_name(network).items()}
    with pytest.raises(ValueError, match=r"Received: conv/bias#2 of shape None, not \(3,\)"):
        weights.assign(network, {name: array for name, array in arrays.items() if name != "conv/bias#2"})
    with pytest.raises(ValueError, match=r"Received: conv/bias of shape \(4,\), not \(3,\)"):
        weights.assign(network, {**arrays, "conv/bias": np.zeros(4)})
