"""Weights of the authors' own networks, in every form, and what is wrong with them."""

import math
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import weights as named_weights
from robust_keras.models import wide_resnet
from robust_keras.saved_models.weights_in import selection
from tests.oracles import checkpoint_inputs
from tests.saved_models.weights_in import written


def modules(weights):
    """Haiku's pair of parameters and state, of arrays by `module|name`."""
    pair = ({}, {})
    for name, array in weights.items():
        module, leaf = name.split("|")
        pair["_ema" in module].setdefault(module, {})[leaf] = array
    return pair


def check(network, dataset, logits):
    ours = network(checkpoint_inputs.images(dataset), training=False)
    np.testing.assert_allclose(ours, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.parametrize("name", checkpoint_inputs.TORCH)
def test_the_authors_pytorch_networks_give_their_logits(tmp_path, recorded, recorded_weights, imported, name):
    kind, depth, width, activation, dataset = checkpoint_inputs.TORCH[name]
    weights = recorded_weights("torch", name)
    written.save_torch(tmp_path / "model.pt", weights)
    network, found, made = imported(tmp_path / "model.pt", dataset, activation)
    check(network, dataset, recorded["torch"][f"{name}/logits"])
    assert made.name == (f"WRN-{depth}-{width}" if kind == "WideResNet" else f"PreActResNet-{depth}")
    assert sorted([*found.tensors, *found.dropped]) == sorted(weights)
    assert {each.rpartition(".")[2] for each in found.dropped} == {"num_batches_tracked"}


@pytest.mark.parametrize("name", checkpoint_inputs.HAIKU)
def test_the_authors_jax_networks_give_their_logits(tmp_path, recorded, recorded_weights, imported, name):
    _, depth, width, activation, dataset = checkpoint_inputs.HAIKU[name]
    weights = recorded_weights("haiku", name)
    written.save_npy(tmp_path / "model.npy", modules(weights))
    network, found, made = imported(tmp_path / "model.npy", dataset, activation)
    check(network, dataset, recorded["haiku"][f"{name}/logits"])
    assert made.name == f"WRN-{depth}-{width}"
    assert len(found.tensors) + len(found.dropped) == len(weights)
    counts = {value for key, value in values(network).items() if key.endswith("num_updates")}
    assert counts == {777.0}


def values(network):
    return {name: np.asarray(w).sum() for name, w in named_weights.by_name(network).items()}


@pytest.fixture
def small(recorded_weights):
    return recorded_weights("torch", "wrn_10_1")


@pytest.mark.parametrize("form", ["half", "nested", "prefixed", "compiled", "ema", "legacy", "safetensors", "own mean"])
def test_one_network_in_many_forms(tmp_path, recorded, imported, small, form):
    path, key, name = tmp_path / "file", None, "wrn_10_1"
    other = {each: array * 2 for each, array in small.items()}
    logits = recorded["torch"][f"{name}/logits"]
    if form == "half":
        written.save_torch(path, small, dtype="f2")
    elif form == "nested":
        written.save_torch(path, small, nested=lambda tensors: {"epoch": 3, "state_dict": tensors, "best": None})
    elif form == "prefixed":
        written.save_torch(path, {f"module.{each}": array for each, array in small.items()})
    elif form == "compiled":
        named = {f"module.0._orig_mod.{each}": array for each, array in small.items()}
        written.save_torch(path, named, nested=lambda tensors: {"model_state_dict": tensors})
    elif form == "ema":
        named = {f"a.{each}": array for each, array in small.items()} | {f"b.{each}": other[each] for each in other}
        written.save_torch(path, named, nested=lambda tensors: {"ema": tensors})
        key = "a"
    elif form == "legacy":
        written.save_legacy(path, {each: array for each, array in small.items() if array.dtype != np.int64})
    elif form == "safetensors":
        written.save_safetensors(path, {each: array for each, array in small.items() if array.dtype != np.int64})
    else:  # The same normalisation, with which the data set's is not used.
        mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2471, 0.2435, 0.2616])
        written.save_torch(path, small | {"mean": mean.reshape(3, 1, 1), "std": std.reshape(3, 1, 1)})
    network, _, made = imported(path, key=key)
    assert made.name == "WRN-10-1"
    ours = network(checkpoint_inputs.images("cifar10"), training=False)
    atol = (1e-2 if form == "half" else 1e-5) * np.abs(logits).max()
    np.testing.assert_allclose(ours, logits, rtol=0, atol=atol)


def test_a_mean_in_the_file_is_the_networks(tmp_path, imported, small):
    mean, std = np.float32([0.1, 0.2, 0.3]), np.float32([1, 2, 3])
    written.save_torch(tmp_path / "file", small | {"mean": mean.reshape(3, 1, 1), "std": std.reshape(3, 1, 1)})
    _, _, made = imported(tmp_path / "file")
    np.testing.assert_allclose(made.settings["mean"], mean)
    np.testing.assert_allclose(made.settings["std"], std)


def test_a_network_goes_on_training_as_if_its_statistics_were_old(tmp_path, imported, small):
    written.save_torch(tmp_path / "file", small)
    network, _, _ = imported(tmp_path / "file")
    layer = network.get_layer("batchnorm")
    before = layer.moving_mean.numpy()
    layer.update_moving(before + 1.0, layer.moving_variance.numpy())
    np.testing.assert_allclose(layer.moving_mean, before + 0.01, rtol=1e-4, atol=1e-6)


WRONG = {
    "missing": (lambda w: w.pop("layer.1.block.0.conv_1.weight"), "none for layer.1.block.0.conv_1/kernel"),
    "surplus": (lambda w: w.update({"head.weight": w["logits.bias"]}), "Received: head.weight"),
    "surplus block": (
        lambda w: w.update({"layer.2.block.1.conv_0.weight": w["logits.bias"]}),
        "a WRN-10-1. Received: layer.2.block.1.conv_0.weight",
    ),
    "another shape": (
        lambda w: w.update({"batchnorm.bias": w["logits.bias"]}),
        r"batchnorm.bias of shape \(10,\).* for batchnorm/offset \(64,\)",
    ),
    "integers": (lambda w: w.update({"batchnorm.bias": np.zeros(64, np.int64)}), "batchnorm.bias of shape .*int64"),
    "infinite": (lambda w: w["logits.bias"].fill(np.inf), "finite weights.* in logits.bias"),
    "not a number": (lambda w: w["logits.weight"].fill(np.nan), "finite weights.* in logits.weight"),
    "variance": (lambda w: w["batchnorm.running_var"].fill(-1), "variances of 0 or more.* in batchnorm.running_var"),
    "a normalisation before it": (
        lambda w: w.update({"0.mean": w["logits.bias"]} | {f"1.{each}": w.pop(each) for each in list(w)}),
        "Received: 0.mean",
    ),
    "width": (lambda w: w.update({"layer.0.block.0.conv_0.weight": np.zeros((24, 16, 3, 3))}), "Received: 1 of 24"),
    "classes": (lambda w: w.update({"logits.weight": np.zeros((7, 64))}), "10 classes, for cifar10. Received: 7"),
    "no classes": (lambda w: w.update({"logits.weight": np.zeros(())}), "10 classes, for cifar10. Received: 0"),
    "name": (lambda w: w.update({"logits\n\x1b[2J.bias": w["logits.bias"]}), r"logits\\n\\x1b\[2J.bias"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_every_tensor_has_its_use_or_is_named(tmp_path, imported, small, wrong, monkeypatch):
    change, match = WRONG[wrong]
    change(small)
    written.save_torch(tmp_path / "file", small)
    with pytest.raises(ValueError, match=match) as error:
        imported(tmp_path / "file")
    assert str(error.value).startswith("Expected ") and "\n" not in str(error.value)


class Outer(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(1)

    def call(self, x):
        return self.inner(x)


def test_no_network_is_built_before_all_shapes_are_known(tmp_path, imported, small, monkeypatch):
    small["layer.0.block.0.conv_0.weight"] = np.zeros((1024, 1, 1, 1))  # Says width 64.
    small |= {f"layer.0.block.{k}.conv_0.weight": np.zeros((1, 1, 1, 1)) for k in range(1, 60)}
    written.save_torch(tmp_path / "file", small)
    monkeypatch.setattr(keras.Variable, "assign", None)
    with pytest.raises(ValueError, match="Expected tensors of a WRN-364-64"):
        imported(tmp_path / "file")

    def draw(self, shape, dtype=None):
        assert math.prod(shape) < 100_000, "weights of the network that was refused"
        return tf.zeros(shape, dtype)

    monkeypatch.setattr(wide_resnet.TruncatedNormal, "__call__", draw)
    Outer()(keras.Input((2,)))  # With such a layer, Keras makes all that it has put off.
    small |= {f"layer.0.block.{k}.conv_0.weight": np.zeros((1, 1, 1, 1)) for k in range(60, 65)}
    written.save_torch(tmp_path / "file", small)
    with pytest.raises(
        ValueError, match="Expected 1 to 64 blocks of 16 to 1024 channels in the first group. Received: 65"
    ):
        imported(tmp_path / "file")


def test_the_weights_of_one_network_are_chosen_among_several(tmp_path, imported, small):
    both = lambda tensors: {"state_dict": tensors, "ema": dict(tensors), "again": tensors}  # noqa: E731
    written.save_torch(tmp_path / "file", small, nested=both)
    with pytest.raises(ValueError, match="Expected --key out of state_dict, ema. Received: none"):
        imported(tmp_path / "file")
    with pytest.raises(ValueError, match="Expected --key out of state_dict, ema. Received: other"):
        imported(tmp_path / "file", key="other")
    assert imported(tmp_path / "file", key="ema")[1].key == "ema"


@pytest.mark.parametrize(
    "names, match",
    [
        (["module.block1.layer.0.conv1.weight"], "module.block1.layer.0.conv1.weight, as in the WideResNet of TRADES"),
        (["conv1.weight", "layer1.0.conv1.weight"], "layer1.0.conv1.weight, as in torchvision's ResNet, another"),
        (["b", "a", "d", "c"], "other names, such as a, b, c"),
        ([], "no names of tensors"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path, imported, names, match):
    written.save_torch(tmp_path / "file", {name: np.zeros(3) for name in names})
    with pytest.raises(ValueError, match=f"Expected weights of a wide_resnet.* Received: {match}"):
        imported(tmp_path / "file")


def test_haiku_needs_its_state_and_names_that_differ(tmp_path, imported, recorded_weights):
    parameters, state = modules(recorded_weights("haiku", "wrn_10_1"))
    written.save_npy(tmp_path / "file", (parameters, {}))
    with pytest.raises(ValueError, match="none for layer.0.block.0.batchnorm_0/moving_mean"):
        imported(tmp_path / "file")
    twice = parameters | {"wide_res_net/init_conv": parameters["wide_res_net/~/init_conv"]}
    written.save_npy(tmp_path / "file", (twice, state))
    with pytest.raises(ValueError, match="wide_res_net/init_conv/w twice"):
        imported(tmp_path / "file")
    averaged = {"params": parameters, "avg_params": dict(parameters), "state": state}
    written.save_npy(tmp_path / "file", (averaged, None))
    with pytest.raises(ValueError, match="--key out of 0.params, 0.avg_params. Received: none"):
        imported(tmp_path / "file")
    assert imported(tmp_path / "file", key="avg_params")[2].name == "WRN-10-1"


def test_names_are_few_and_short(tmp_path, imported, monkeypatch):
    """Names of places are made of those around them, and one dictionary of a pickle may lie in many places."""
    monkeypatch.setattr(selection, "_MOST_NAMES", 300)
    shared = {f"{k}": None for k in range(20)}
    many = {f"{k}": {} for k in range(300)}
    for content in ({f"{k}": shared for k in range(20)}, {"a": many}):
        (tmp_path / "file").write_bytes(pickle.dumps(content, 2))
        with pytest.raises(ValueError, match="Expected at most 300 names in a file. Received: more"):
            imported(tmp_path / "file")
    (tmp_path / "file").write_bytes(pickle.dumps({"a" * 201: {}}, 2))
    with pytest.raises(ValueError, match="Expected names of at most 200 characters. Received: a{200}"):
        imported(tmp_path / "file")


def test_data_sets_and_activations_that_there_are(tmp_path, imported, small):
    written.save_torch(tmp_path / "file", small)
    with pytest.raises(ValueError, match="Expected a dataset out of cifar10, cifar100, mnist. Received: svhn"):
        imported(tmp_path / "file", dataset="svhn")
    with pytest.raises(ValueError, match="Received: 'sine'"):
        imported(tmp_path / "file", activation="sine")
