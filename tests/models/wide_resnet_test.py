import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import wide_resnet
from robust_keras.models.normalization import BatchNorm, batch_norm_mode
from tests.shapes_alone import shapes_alone

CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)}


def tiny(**kwargs):
    return wide_resnet.wide_resnet(**{"depth": 10, "width": 1, "num_classes": 5, "input_shape": (8, 8, 3), **kwargs})


def randomize(model, seed=0):
    """Gives every weight a random value (a fresh network's logits are all zero) and returns them by path."""
    rng = np.random.default_rng(seed)
    values = {}
    for w in model.weights:
        name = w.path.rsplit("/", 1)[-1]
        if name in ("scale", "moving_variance"):
            value = rng.uniform(0.5, 1.5, w.shape)
        elif name == "kernel":
            value = rng.normal(0.0, 1.0 / math.sqrt(math.prod(w.shape[:-1])), w.shape)
        else:
            value = rng.normal(0.0, 0.2, w.shape)
        w.assign(value)
        values[w.path] = value
    return values


def images(num=4, size=8):
    return np.random.default_rng(7).random((num, size, size, 3)).astype(np.float32)


# Shapes alone: the largest has a gigabyte of weights.
@pytest.mark.parametrize("depth, width, expected", [(28, 10, 36_479_194), (34, 20, 184_531_674), (70, 16, 266_796_506)])
def test_number_of_parameters(depth, width, expected):
    with shapes_alone():
        model = wide_resnet.wide_resnet(depth=depth, width=width, num_classes=10, **CIFAR10)
    assert sum(math.prod(w.shape) for w in model.trainable_weights) == expected


def test_number_of_parameters_by_hand():
    # WRN-10-1 with 5 classes, convolutions and the scale and offset of each BatchNorm.
    stem = 3 * 3 * 3 * 16
    first = 2 * 16 + 9 * 16 * 16 + 2 * 16 + 9 * 16 * 16 + 16 * 16
    second = 2 * 16 + 9 * 16 * 32 + 2 * 32 + 9 * 32 * 32 + 16 * 32
    third = 2 * 32 + 9 * 32 * 64 + 2 * 64 + 9 * 64 * 64 + 32 * 64
    expected = stem + first + second + third + 2 * 64 + 64 * 5 + 5
    assert sum(w.numpy().size for w in tiny().trainable_weights) == expected


def block(group, number, *, shortcut):
    parts = ["batchnorm_0", "conv_0", "batchnorm_1", "conv_1"] + (["shortcut"] if shortcut else [])
    return {f"layer.{group}.block.{number}.{part}" for part in parts}


@pytest.mark.parametrize("width", [1, 2])
def test_layers_with_weights_are_named_as_in_the_published_pytorch_weights(width):
    # The first block of every group projects its shortcut, also where the widths match.
    expected = {"init_conv", "batchnorm", "logits"}
    for group in range(3):
        expected |= block(group, 0, shortcut=True) | block(group, 1, shortcut=False)
    model = tiny(depth=16, width=width)
    assert {layer.name for layer in model.layers if layer.weights} == expected
    shapes = {layer.name: tuple(layer.kernel.shape) for layer in model.layers if hasattr(layer, "kernel")}
    assert shapes["layer.0.block.0.shortcut"] == (1, 1, 16, 16 * width)
    assert shapes["layer.1.block.0.shortcut"] == (1, 1, 16 * width, 32 * width)
    assert shapes["layer.2.block.1.conv_1"] == (3, 3, 64 * width, 64 * width)
    assert shapes["logits"] == (64 * width, 5)
    assert {layer.name for layer in model.layers if getattr(layer, "use_bias", False)} == {"logits"}


def test_initial_weights_are_normal_of_one_over_the_root_of_the_fan_in_cut_at_two():
    keras.utils.set_random_seed(0)
    kernels = {layer.name: layer.kernel.numpy() for layer in tiny(width=2).layers if hasattr(layer, "kernel")}
    kernels.pop("logits")
    assert len(kernels) == 1 + 3 * 3
    scaled = {name: k.ravel() * math.sqrt(math.prod(k.shape[:3])) for name, k in kernels.items()}
    for values in scaled.values():
        assert np.abs(values).max() <= 2.0 + 1e-5
        # Standard deviation of the cut normal: sqrt(1 - 4 phi(2) / (2 Phi(2) - 1)) = .8796; five standard errors
        # (its kurtosis is 2.4).
        assert values.std() == pytest.approx(0.8796, rel=5 * math.sqrt(1.4 / 4 / values.size))
        assert abs(values.mean()) < 5 * 0.8796 / math.sqrt(values.size)
    every = np.concatenate(list(scaled.values()))
    assert every.std() == pytest.approx(0.8796, rel=0.01)
    assert np.abs(every).max() > 1.99  # cut at two, not clipped or cut before
    # No two convolutions start alike.
    starts = {tuple(values[:20]) for values in scaled.values()}
    assert len(starts) == len(scaled)


def test_initial_weights_follow_the_seed():
    def first_kernel(seed):
        keras.utils.set_random_seed(seed)
        return tiny().get_layer("layer.2.block.0.conv_1").kernel.numpy()

    np.testing.assert_array_equal(first_kernel(1), first_kernel(1))
    assert np.abs(first_kernel(1) - first_kernel(2)).max() > 0.01


def test_logits_are_zero_at_first():
    model = tiny()
    np.testing.assert_array_equal(model(images(), training=False), np.zeros((4, 5)))
    np.testing.assert_array_equal(model(images(), training=True), np.zeros((4, 5)))
    assert not model.get_layer("logits").kernel.numpy().any() and not model.get_layer("logits").bias.numpy().any()


def test_every_batch_norm_is_as_in_the_paper():
    norms = [layer for layer in tiny(depth=16, statistics_group_size=4).layers if isinstance(layer, BatchNorm)]
    assert len(norms) == 2 * 6 + 1
    assert {(norm.epsilon, norm.decay, norm.statistics_group_size) for norm in norms} == {(1e-5, 0.99, 4)}


def same_convolution(x, kernel, stride):
    """Convolution padded as TensorFlow pads 'SAME', from its definition: what is odd of the padding goes after."""
    size = kernel.shape[0]
    pads = []
    for length in x.shape[1:3]:
        total = max((math.ceil(length / stride) - 1) * stride + size - length, 0)
        pads.append((total // 2, total - total // 2))
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(0, 0), *pads, (0, 0)]), (size, size), (1, 2))
    return np.einsum("nhwcij,ijco->nhwo", windows[:, ::stride, ::stride], kernel)


def reference_network(x, values, depth, mean, std, activation):
    """A Wide ResNet with its moving statistics, after the text of `released_code_facts.md`."""

    def norm_act(x, name):
        p = {k: values[f"{name}/{k}"] for k in ("scale", "offset", "moving_mean", "moving_variance")}
        return activation((x - p["moving_mean"]) / np.sqrt(p["moving_variance"] + 1e-5) * p["scale"] + p["offset"])

    x = same_convolution((x - np.array(mean)) / np.array(std), values["init_conv/kernel"], 1)
    for group in range(3):
        for number in range((depth - 4) // 6):
            name = f"layer.{group}.block.{number}"
            stride = 2 if group > 0 and number == 0 else 1
            activated = norm_act(x, f"{name}.batchnorm_0")
            if number == 0:
                x = same_convolution(activated, values[f"{name}.shortcut/kernel"], stride)
            h = same_convolution(activated, values[f"{name}.conv_0/kernel"], stride)
            x = x + same_convolution(norm_act(h, f"{name}.batchnorm_1"), values[f"{name}.conv_1/kernel"], 1)
    features = norm_act(x, "batchnorm").mean((1, 2))
    return features @ values["logits/kernel"] + values["logits/bias"]


@pytest.mark.parametrize(
    "depth, width, size, name, activation",
    [
        (10, 1, 8, "relu", lambda x: np.maximum(x, 0.0)),
        (16, 2, 7, "silu", lambda x: x / (1 + np.exp(-x))),  # an odd size pads otherwise
    ],
)
def test_agrees_with_a_numpy_network(depth, width, size, name, activation):
    model = tiny(depth=depth, width=width, input_shape=(size, size, 3), activation=name, **CIFAR10)
    values = randomize(model)
    x = images(3, size)
    expected = reference_network(x.astype(np.float64), values, depth, **CIFAR10, activation=activation)
    assert np.abs(expected).std() > 0.1
    np.testing.assert_allclose(model(x, training=False), expected, rtol=1e-4, atol=1e-4)


def test_pixels_are_normalised_inside():
    model = tiny(**CIFAR10)
    stem = keras.Model(model.input, model.get_layer("normalization").output)
    pixel = np.float32([0.4914 + 0.2471, 0.4822 - 0.2435, 0.4465])
    np.testing.assert_allclose(stem(np.broadcast_to(pixel, (1, 8, 8, 3)))[0, 0, 0], [1.0, -1.0, 0.0], atol=1e-6)
    unchanged = tiny()
    stem = keras.Model(unchanged.input, unchanged.get_layer("normalization").output)
    np.testing.assert_allclose(stem(images()), images(), atol=1e-7)


@pytest.mark.parametrize("size, sizes", [(32, (32, 16, 8)), (8, (8, 4, 2)), (7, (7, 4, 2)), (28, (28, 14, 7))])
def test_resolution_halves_in_the_second_and_third_group(size, sizes):
    model = tiny(input_shape=(size, size, 3), width=2)
    for group, (length, channels) in enumerate(zip(sizes, (32, 64, 128))):
        for part in ("conv_0", "conv_1", "shortcut"):
            output = model.get_layer(f"layer.{group}.block.0.{part}").output
            assert tuple(output.shape) == (None, length, length, channels)
    assert tuple(model.output.shape) == (None, 5)


def test_grey_images():
    model = tiny(input_shape=(8, 8, 1), mean=(0.5,), std=(0.5,))
    assert model(tf.zeros((2, 8, 8, 1))).shape == (2, 5)


def test_padding_is_black_and_comes_before_the_normalisation():
    inside = tiny(padding=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    outside = tiny(input_shape=(12, 12, 3), mean=(0.5,) * 3, std=(0.5,) * 3)
    for network in (inside, outside):
        randomize(network)
    x = images()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(inside(x), outside(padded), rtol=1e-6)
    assert np.abs(inside(x) - tiny(padding=0)(x)).max() > 0.01


def test_a_shortcut_of_equal_widths_need_not_be_projected():
    randomize(plain := tiny(projects_equal_widths=False))
    randomize(projected := tiny())
    first = "layer.0.block.0"
    assert f"{first}.shortcut" not in [layer.name for layer in plain.layers]
    assert f"{first}.shortcut" in [layer.name for layer in projected.layers]
    # It is then what the block is given, before its normalisation.
    layers = [plain.get_layer(name).output for name in (f"{first}.add", f"{first}.conv_1", "init_conv")]
    total, convolved, given = keras.Model(plain.input, layers)(images())
    np.testing.assert_allclose(total, convolved + given, rtol=1e-6)
    wider = [tiny(width=2, projects_equal_widths=projects) for projects in (True, False)]
    assert [w.path for w in wider[0].weights] == [w.path for w in wider[1].weights]


def test_statistics_group_size_reaches_the_layers():
    model = tiny(statistics_group_size=2)
    randomize(model)
    with batch_norm_mode("batch"):
        together, apart = model(images(4)), np.concatenate([model(images(4)[:2]), model(images(4)[2:])])
    np.testing.assert_allclose(together, apart, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="statistics_group_size=2"), batch_norm_mode("batch"):
        model(images(3))


def test_pixels_and_logits_are_float32_in_mixed_precision(mixed_bfloat16):
    model = tiny()
    compute = {layer.name: layer.compute_dtype for layer in model.layers}
    spared = {"normalization", "init_conv", "pool", "logits"}
    assert {name for name, dtype in compute.items() if dtype == "float32"} == spared
    assert set(compute.values()) == {"float32", "bfloat16"} and model.input.dtype == "float32"
    assert model(images()).dtype == tf.float32
    assert {w.dtype for w in model.weights} == {"float32"}
    logits = model.get_layer("logits")
    logits.kernel.assign(np.full(logits.kernel.shape, 1.0))
    logits.bias.assign([1.0 + 2**-12] * 5)  # which bfloat16 rounds to 1
    fractions = model(images()).numpy() * 2**8 % 1
    assert np.any(fractions != 0)


def test_round_trip_through_a_file(tmp_path):
    model = tiny(activation="gelu", statistics_group_size=2, depth=16, **CIFAR10)
    randomize(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model(images(), training=False).numpy()
    assert np.abs(expected).std() > 0.1
    np.testing.assert_array_equal(loaded(images(), training=False), expected)
    # Group size and decay are in the file too.
    for m in (model, loaded):
        m(images(), training=True)
    assert not np.allclose(model(images(), training=False), expected)
    np.testing.assert_array_equal(loaded(images(), training=False), model(images(), training=False))
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]


@pytest.mark.parametrize("depth", [4, 9, 11, 12, 20, 0, -2, 16.0, "16"])
def test_depth_other_than_6n_plus_4(depth):
    with pytest.raises(ValueError, match=f"depth of 6n \\+ 4.*Received: {depth!r}"):
        tiny(depth=depth)


@pytest.mark.parametrize("depth", [10, 16, 22, 28])
def test_blocks_of_a_depth(depth):
    with shapes_alone():
        model = tiny(depth=depth)
    # All convolutions but the shortcuts, and the classifier.
    counted = [layer for layer in model.layers if hasattr(layer, "kernel") and "shortcut" not in layer.name]
    assert len(counted) == depth - 2


@pytest.mark.parametrize("width", [0, -1, 1.5, "2"])
def test_width_below_one(width):
    with pytest.raises(ValueError, match=f"width.*>= 1. Received: {width!r}"):
        tiny(width=width)


def test_other_errors():
    with pytest.raises(ValueError, match=r"num_classes >= 2\. Received: 1"):
        tiny(num_classes=1)
    with pytest.raises(ValueError, match=r"Expected an activation .* Received: 'selu'"):
        tiny(activation="selu")
    with pytest.raises(ValueError, match="one mean and std for each of 3 channels"):
        tiny(mean=(0.5,))
    with pytest.raises(ValueError, match="one mean and std for each of 1 channels"):
        tiny(input_shape=(8, 8, 1), mean=(0.5,), std=(0.5, 0.5))
