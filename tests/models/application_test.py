"""Networks of keras.applications: pixels as each was trained, weights, other resolutions and classes, frozen parts."""

import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import application, fine_tuning, weights
from robust_keras.training import weight_decay
from tests.shapes_alone import shapes_alone

BYTES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
SMALL = {"input_shape": (32, 32, 3), "num_classes": 5, "weights": None}


def scaled(name):
    """What a network of the package is given for `BYTES`."""
    images = keras.Input((32, 32, 3))
    return keras.Model(images, application._PIXELS[name](images))(BYTES / np.float32(255)).numpy()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("DenseNet121", "densenet"),
        ("MobileNet", "mobilenet"),
        ("MobileNetV2", "mobilenet_v2"),
        ("ResNet50", "resnet"),
        ("ResNet50V2", "resnet_v2"),
    ],
)
def test_pixels_are_scaled_as_keras_preprocesses_them(name, module):
    expected = getattr(keras.applications, module).preprocess_input(BYTES.astype(np.float32))
    np.testing.assert_allclose(scaled(name), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["ConvNeXtTiny", "EfficientNetV2B0", "EfficientNetV2S", "MobileNetV3Small"])
def test_pixels_are_scaled_as_the_layers_of_the_application_do_it(name):
    with shapes_alone():
        given = {"weights": None, "input_shape": (32, 32, 3), "include_top": False}
        theirs = getattr(keras.applications, name)(include_preprocessing=True, **given)
    layers = list(fine_tuning.layers_of(theirs))
    first = next(k for k, layer in enumerate(layers) if hasattr(layer, "kernel"))
    own = [each for each in layers[:first] if isinstance(each, (keras.layers.Rescaling, keras.layers.Normalization))]
    expected = BYTES.astype(np.float32)
    for layer in own:
        expected = layer(expected)
    assert own
    np.testing.assert_allclose(scaled(name), expected, rtol=1e-5, atol=1e-4)


def test_every_application_exists_and_has_a_family_that_was_looked_at():
    assert all(hasattr(keras.applications, name) for name in application.NAMES)
    families = {"ConvNeXt", "DenseNet", "EfficientNetV2", "MobileNet", "ResNet"}
    assert {next(f for f in families if name.startswith(f)) for name in application.NAMES} == families


@pytest.fixture
def imagenet(monkeypatch):
    """`imagenet(name)` has 'imagenet' stand for random weights of an application, which it returns by name."""

    def pretend(name):
        make = getattr(keras.applications, name)

        def made(*, weights=None, **settings):
            network = make(weights=None, **settings)
            if weights is not None:
                rng = np.random.default_rng(5)
                for weight in network.weights:
                    weight.assign(rng.uniform(0.5, 1.0, weight.shape) * 0.05 + 0.95 * ("moving_var" in weight.path))
            return network

        made.__signature__ = inspect.signature(make)
        monkeypatch.setattr(keras.applications, name, made)
        return made(weights="imagenet", classifier_activation=None)

    return pretend


def test_weights_of_imagenet_give_the_logits_that_keras_gives(imagenet):
    theirs = imagenet("MobileNetV3Small")
    ours = application.application(name="MobileNetV3Small", num_classes=1000)
    x = np.random.default_rng(1).integers(0, 256, (2, 224, 224, 3)).astype(np.float32)
    expected = theirs(x, training=False).numpy()  # It scales bytes itself.
    assert np.abs(expected).std() > 0
    np.testing.assert_allclose(ours(x / 255, training=False), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_another_resolution_and_other_classes_keep_all_but_the_classifier(imagenet):
    theirs = weights.by_name(imagenet("MobileNetV2"))
    ours = weights.by_name(application.application(name="MobileNetV2", **{**SMALL, "weights": "imagenet"}))
    assert theirs.keys() == ours.keys()
    new = [name for name, weight in ours.items() if weight.shape != theirs[name].shape]
    assert new == ["predictions/kernel", "predictions/bias"]
    for name in theirs.keys() - set(new):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def convnext():
    return application.application(name="ConvNeXtTiny", **SMALL)


def test_weights_have_the_same_names_in_every_network_of_a_process(convnext):
    again = application.application(name="ConvNeXtTiny", **SMALL)
    read = keras.models.model_from_json(again.to_json())
    assert weights.names(convnext) == weights.names(again) == weights.names(read)
    weights.assign(read, {name: weight.numpy() for name, weight in weights.by_name(convnext).items()})


def test_weight_decay_leaves_layer_scales_alone(convnext):
    left = {w.path for w in convnext.trainable_weights if weight_decay.is_scale_or_offset(w)}
    scales = {w.path for w in convnext.trainable_weights if "layer_scale" in w.path}
    assert len(scales) == 3 + 3 + 9 + 3 and scales < left
    # Kernels and biases are left.
    rest = {w.path.rsplit("/", 1)[-1] for w in convnext.trainable_weights if w.path not in left}
    assert rest == {"kernel", "bias"}


def test_parts_are_frozen_and_unfrozen(convnext):
    frozen = application.application(name="ConvNeXtTiny", frozen="stem|downsampling|stage_[012]", **SMALL)
    trained = {w.path.split("/")[-2].split("_block")[0] for w in frozen.trainable_weights}
    assert trained == {"convnext_tiny_stage_3", "convnext_tiny_head_layernorm", "convnext_tiny_head_dense"}
    assert weights.names(frozen) == weights.names(convnext)


def test_frozen_normalisation_stays_in_inference():
    network = application.application(name="MobileNetV2", frozen="^(?!predictions)", **SMALL)
    assert [w.path for w in network.trainable_weights] == ["predictions/kernel", "predictions/bias"]
    x = BYTES / np.float32(255)
    np.testing.assert_allclose(network(x, training=True), network(x, training=False), atol=1e-6)


@pytest.mark.parametrize("name", [pytest.param("ConvNeXtTiny", marks=pytest.mark.slow), "MobileNetV3Small", "ResNet50"])
def test_pixels_and_logits_are_float32_in_mixed_precision(mixed_bfloat16, name):
    network = application.application(name=name, **SMALL)
    layers = list(fine_tuning.layers_of(network))
    first = next(layer for layer in layers if hasattr(layer, "kernel"))
    assert {layer.compute_dtype for layer in layers} == {"float32", "bfloat16"}
    stem = keras.Model(network.input, first.output)
    moved = np.full((1, 32, 32, 3), 0.75, np.float32)
    assert np.abs(stem(moved + np.float32(1e-4)) - stem(moved)).max() > 0  # Bfloat16 has steps of .004 there.
    assert network(moved).dtype == tf.float32
    logits = next(layer for layer in reversed(layers) if hasattr(layer, "kernel"))
    logits.kernel.assign(tf.zeros_like(logits.kernel.value))
    logits.bias.assign([1.0 + 2**-12] * 5)  # Which bfloat16 rounds to 1.
    np.testing.assert_array_equal(network(moved), np.full((1, 5), 1.0 + 2**-12, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "VGG16"}, "Expected an application out of ConvNeXtTiny, .* Received: 'VGG16'"),
        ({"name": ["ConvNeXtTiny"]}, "Expected an application out of"),
        ({"num_classes": 1}, "num_classes >= 2. Received: 1"),
        ({"input_shape": (28, 28, 3)}, r"sides of at least 32. Received: \(28, 28, 3\)"),
        ({"input_shape": (32, 32, 1)}, r"\(height, width, 3\)"),
        ({"weights": "nowhere.weights.h5"}, "Expected weights of MobileNetV2, 'imagenet' or a file of Keras'"),
        ({"frozen": "no_such"}, "Expected a part of the layers' names, Conv1, .* Received: 'no_such'"),
        ({"frozen": "("}, r"regular expression of layers to freeze. Received: '\('"),
        ({"frozen": ""}, "leave some to train. Received: ''"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(changes, message):
    with pytest.raises(ValueError, match=message) as refused:
        application.application(**{"name": "MobileNetV2", **SMALL, **changes})
    assert "\n" not in str(refused.value)
