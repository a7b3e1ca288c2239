"""PreActResNets: the released PyTorch code's layers, names and sizes, and a network written out in NumPy."""

import math

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import preact_resnet
from robust_keras.models.normalization import BatchNorm, batch_norm_mode
from robust_keras.saved_models import export, load
from robust_keras.training import weight_decay
from tests.models.wide_resnet_test import CIFAR10, images, randomize, same_convolution
from tests.shapes_alone import shapes_alone

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # He et al. 2016, table 1.


def network(depth=18, **kwargs):
    given = {"depth": depth, "num_classes": 5, "input_shape": (8, 8, 3), **kwargs}
    return preact_resnet.preact_resnet(**given)


def without_weights(depth, **kwargs):
    with shapes_alone():
        return network(depth, **kwargs)


@pytest.fixture(scope="module")
def small():
    """PreActResNet-18 on 8 x 8 images with random weights, and these by path."""
    made = network(statistics_group_size=2, **CIFAR10)
    return made, randomize(made)


# By hand, of 10 classes: stem 27 * 64; a block of two 3 x 3 convolutions from c to w channels has 9cw + 9ww of these,
# 9cw of a shortcut that changes the shape, and 2c + 2w of scales and offsets; then 2 * 512, and 512 * 10 + 10.
# 18: 1,728 + 147,968 + 590,720 + 2,361,088 + 9,440,768 + 1,024 + 5,130. With shortcuts of 1 x 1, as pytorch-cifar has
# them, it would be 8 / 9 of 9 (64 * 128 + 128 * 256 + 256 * 512) = 1,376,256 fewer, its 11,172,170 with a last norm.
# 50: blocks of 1 x 1, 3 x 3 and 1 x 1 to 4w have cw + 9ww + 4ww, a shortcut 4cw, and 2c + 2w + 2w.
@pytest.mark.parametrize(("depth", "expected"), [(18, 12_548_426), (34, 22_656_586), (50, 23_513_162)])
def test_number_of_parameters(depth, expected):
    made = without_weights(depth, num_classes=10, input_shape=(32, 32, 3))
    assert sum(math.prod(w.shape) for w in made.trainable_weights) == expected
    assert 12_548_426 - 1_376_256 == 11_172_170


@pytest.mark.parametrize("depth", BLOCKS)
def test_layers_with_weights_are_named_as_in_the_released_pytorch_code(depth):
    parts = ["batchnorm_0", "conv_2d_1", "batchnorm_1", "conv_2d_2"]
    parts += ["batchnorm_2", "conv_2d_3"] if depth == 50 else []
    expected = {"conv_2d", "batchnorm", "logits"}
    for group, num_blocks in enumerate(BLOCKS[depth]):
        expected |= {f"layer_{group}.{block}.{part}" for block in range(num_blocks) for part in parts}
        # Where the shape stays, as in the first group of two convolutions a block, nothing is projected.
        expected |= {f"layer_{group}.0.shortcut"} if group or depth == 50 else set()
    made = without_weights(depth)
    layers = [layer for layer in made.layers if layer.weights]
    assert {layer.name for layer in layers} == expected
    assert {layer.name for layer in layers if getattr(layer, "use_bias", False)} == {"logits"}
    # Weighted layers in a row, without shortcuts: what the depth counts.
    assert len([layer for layer in layers if hasattr(layer, "kernel") and "shortcut" not in layer.name]) == depth


def test_kernels_are_those_of_the_released_code():
    shapes = {layer.name: tuple(layer.kernel.shape) for layer in without_weights(18).layers if hasattr(layer, "kernel")}
    assert shapes["conv_2d"] == (3, 3, 3, 64)
    assert shapes["layer_1.0.shortcut"] == shapes["layer_1.0.conv_2d_1"] == (3, 3, 64, 128)
    assert shapes["layer_3.1.conv_2d_2"] == (3, 3, 512, 512)
    shapes = {layer.name: tuple(layer.kernel.shape) for layer in without_weights(50).layers if hasattr(layer, "kernel")}
    assert shapes["layer_1.0.shortcut"] == (1, 1, 256, 512)
    assert [shapes[f"layer_1.0.conv_2d_{k}"] for k in (1, 2, 3)] == [
        (1, 1, 256, 128),
        (3, 3, 128, 128),
        (1, 1, 128, 512),
    ]


@pytest.mark.parametrize(("depth", "expansion"), [(18, 1), (50, 4)])
def test_resolution_halves_from_group_to_group(depth, expansion):
    made = without_weights(depth, input_shape=(32, 32, 3))
    for group, (side, width) in enumerate([(32, 64), (16, 128), (8, 256), (4, 512)]):
        block = made.get_layer(f"layer_{group}.1.add")
        assert tuple(block.output.shape) == (None, side, side, width * expansion)
    assert tuple(made.output.shape) == (None, 5)


def reference(x, values, depth, activation):
    """The network with moving statistics, after `_PreActBlock` of the released code and, of 50 layers, He et al."""

    def norm_act(x, name):
        p = {k: values[f"{name}/{k}"] for k in ("scale", "offset", "moving_mean", "moving_variance")}
        return activation((x - p["moving_mean"]) / np.sqrt(p["moving_variance"] + 1e-5) * p["scale"] + p["offset"])

    def convolution(x, name, stride=1):
        return same_convolution(x, values[f"{name}/kernel"], stride)

    x = convolution((x - np.array(CIFAR10["mean"])) / np.array(CIFAR10["std"]), "conv_2d")
    for group, num_blocks in enumerate(BLOCKS[depth]):
        for block in range(num_blocks):
            name, stride = f"layer_{group}.{block}", 2 if group and not block else 1
            activated = norm_act(x, f"{name}.batchnorm_0")
            if f"{name}.shortcut/kernel" in values:
                x = convolution(activated if depth == 50 else x, f"{name}.shortcut", stride)
            if depth == 50:
                h = convolution(activated, f"{name}.conv_2d_1")
                h = convolution(norm_act(h, f"{name}.batchnorm_1"), f"{name}.conv_2d_2", stride)
                x = x + convolution(norm_act(h, f"{name}.batchnorm_2"), f"{name}.conv_2d_3")
            else:
                h = convolution(activated, f"{name}.conv_2d_1", stride)
                x = x + convolution(norm_act(h, f"{name}.batchnorm_1"), f"{name}.conv_2d_2")
    return norm_act(x, "batchnorm").mean((1, 2)) @ values["logits/kernel"] + values["logits/bias"]


def test_agrees_with_a_numpy_network(small):
    made, values = small
    expected = reference(images(3).astype(np.float64), values, 18, lambda x: np.maximum(x, 0.0))
    assert np.abs(expected).std() > 0.1
    np.testing.assert_allclose(made(images(3), training=False), expected, rtol=1e-3, atol=1e-3)


def test_fifty_layers_agree_with_a_numpy_network():
    made = network(50, input_shape=(7, 7, 3), activation="silu", **CIFAR10)  # An odd size pads otherwise.
    values = randomize(made)
    expected = reference(images(2, 7).astype(np.float64), values, 50, lambda x: x / (1 + np.exp(-x)))
    assert np.abs(expected).std() > 0.1
    np.testing.assert_allclose(made(images(2, 7), training=False), expected, rtol=1e-3, atol=1e-3)


def test_every_batch_norm_is_the_packages(small):
    norms = [layer for layer in small[0].layers if isinstance(layer, BatchNorm)]
    assert len(norms) == 2 * 8 + 1
    assert {(norm.epsilon, norm.decay, norm.statistics_group_size) for norm in norms} == {(1e-5, 0.99, 2)}
    with batch_norm_mode("batch"):
        together, apart = (
            small[0](images(4)),
            np.concatenate([small[0](images(4)[:2]), small[0](images(4)[2:])]),
        )
    np.testing.assert_allclose(together, apart, rtol=1e-3, atol=1e-4)


def test_weight_decay_leaves_its_scales_and_offsets_alone(small):
    left = [w.path for w in small[0].trainable_weights if weight_decay.is_scale_or_offset(w)]
    assert len(left) == 2 * 17 and all(path.split("/")[0].endswith(("_0", "_1", "batchnorm")) for path in left)


def test_logits_are_zero_at_first():
    np.testing.assert_array_equal(network()(images()), np.zeros((4, 5)))


def test_pixels_and_logits_are_float32_in_mixed_precision(mixed_bfloat16):
    made = network()
    compute = {layer.name: layer.compute_dtype for layer in made.layers}
    spared = {"image", "normalization", "conv_2d", "pool", "logits"}
    assert {name for name, dtype in compute.items() if dtype == "float32"} - {"image"} == spared - {"image"}
    assert made(images()).dtype == tf.float32


def test_it_is_saved_exported_and_read_again(small, tmp_path):
    made, _ = small
    expected = made(images(), training=False).numpy()
    made.save(tmp_path / "model.keras")
    export.export(made, tmp_path / "saved_model", card={})
    for path, atol in ((tmp_path / "model.keras", 1e-5), (tmp_path / "saved_model", 1e-4)):
        found = load.load_logits_fn(path)(tf.constant(images()))
        np.testing.assert_allclose(found, expected, rtol=0, atol=atol * np.abs(expected).max())


@pytest.mark.parametrize("depth", [0, 10, 17, 20, 101, 18.0, "18", True])
def test_another_depth(depth):
    with pytest.raises(ValueError, match=f"depth out of 18, 34, 50. Received: {depth!r}"):
        network(depth)


def test_other_errors():
    with pytest.raises(ValueError, match=r"num_classes >= 2\. Received: 1"):
        network(num_classes=1)
    with pytest.raises(ValueError, match="one mean and std for each of 1 channels"):
        network(input_shape=(8, 8, 1))
    with pytest.raises(ValueError, match=r"Expected an activation .* Received: 'selu'"):
        network(activation="selu")
