"""What an export's signatures take and refuse, called as TensorFlow calls a SavedModel."""

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import rewriting, wide_resnet
from robust_keras.saved_models import export, load, signatures

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def resnet(randomised):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    shape = {"input_shape": (8, 8, 3), "statistics_group_size": 4}
    return randomised(wide_resnet.wide_resnet(depth=10, width=1, num_classes=5, mean=mean, std=std, **shape))


@pytest.fixture(scope="module")
def exported(tmp_path_factory, resnet):
    path = str(tmp_path_factory.mktemp("signatures") / "saved_model")
    export.export(resnet, path, card={}, gradient=True)
    return path


@pytest.fixture(scope="module")
def served(exported):
    loaded = tf.saved_model.load(exported)
    return lambda name, **inputs: loaded.signatures[name](**{key: tf.constant(x) for key, x in inputs.items()})


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(0).random((4, 8, 8, 3), np.float32)


@pytest.mark.parametrize("shape", [(1, 28, 28, 3), (2, 8, 8, 1), (8, 8, 3), (2, 192), (1, 1, 8, 8, 3)])
@pytest.mark.parametrize("name, dtype", [("serving_default", np.float32), ("serving_uint8", np.uint8)])
def test_images_of_another_size_are_refused(served, name, dtype, shape):
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        served(name, image=np.zeros(shape, dtype))
    assert f"[{','.join(map(str, shape))}] is not compatible with expected shape [?,8,8,3]" in str(caught.value)


@pytest.mark.parametrize("name", ["serving_default", "gradient"])
@pytest.mark.parametrize(
    "spoil, received",
    [
        (lambda x: 255 * x, r"\[0.*\] \[to\] \[25\d"),
        (lambda x: 2 * x - 1, r"\[-0.9.*\] \[to\] \[0.9"),
        (lambda x: np.where(np.arange(x.size).reshape(x.shape) == 301, np.nan, x), r"\[-?nan\]"),
        (lambda x: np.where(x == x.max(), np.inf, x), r"\[to\] \[inf\]"),
        (lambda x: x + 2e-4 + (x == x.max()) * (1 - x), r"\[to\] \[1.0002\]"),
    ],
)
def test_values_of_another_range_are_refused(served, x, name, spoil, received):
    inputs = {"image": spoil(x).astype(np.float32)} | ({"label": np.zeros(4, np.int64)} if name == "gradient" else {})
    with pytest.raises(
        tf.errors.InvalidArgumentError,
        match=rf"Expected images in \[0, 1\]; serving_uint8 takes bytes. Received: values from\].*{received}",
    ):
        served(name, **inputs)


def test_values_a_rounding_outside_pass(served, resnet, x):
    x = np.clip(x, 0.1, 0.9)
    x[0, 0, 0], x[1, 0, 0] = -0.9 * signatures.ROUNDING, 1 + 0.9 * signatures.ROUNDING
    np.testing.assert_allclose(served("serving_default", image=x)["logits"], resnet(x, training=False), atol=1e-6)


@pytest.mark.parametrize("name, dtype", [("serving_default", np.float32), ("serving_uint8", np.uint8)])
def test_an_empty_batch_gives_an_empty_result(served, name, dtype):
    found = served(name, image=np.zeros((0, 8, 8, 3), dtype))
    assert {key: tuple(each.shape) for key, each in found.items()} == {
        "logits": (0, 5),
        "probabilities": (0, 5),
        "class": (0,),
    }


def test_another_type_is_refused(served, x):
    for name, image in (("serving_default", x.astype(np.uint8)), ("serving_uint8", x)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected to be a"):
            served(name, image=image)


def test_gradients_are_those_of_each_images_cross_entropy(served, resnet, x):
    labels = np.array([0, 4, 2, 2])
    with tf.GradientTape() as tape:
        tape.watch(images := tf.constant(x))
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, resnet(images, training=False))
    found = served("gradient", image=x, label=labels)
    np.testing.assert_allclose(found["loss"], loss, atol=1e-6)
    wanted = tape.gradient(loss, images).numpy()
    assert np.abs(wanted).max() > 1e-2
    np.testing.assert_allclose(found["gradient"], wanted, atol=1e-6)
    empty = served("gradient", image=x[:0], label=labels[:0])
    assert empty["gradient"].shape == (0, 8, 8, 3) and empty["loss"].shape == (0,)


@pytest.mark.parametrize("labels, message", [([0, 1, 2, 5], r"labels from 0 to 4. Received:\] \[0 1 2 5\]")])
def test_labels_that_are_no_classes_are_refused(served, x, labels, message):
    with pytest.raises(tf.errors.InvalidArgumentError, match=message):
        served("gradient", image=x, label=np.array(labels))


def test_without_being_asked_for_there_is_no_gradient(tmp_path, linear):
    export.export(linear, tmp_path / "plain", card={})
    assert set(tf.saved_model.load(tmp_path / "plain").signatures) == {"serving_default", "serving_uint8"}


def test_attacks_can_search_an_exports_graph(exported, resnet, x):
    """Its checks of images and its other outputs stand in no way of the rewriting."""
    search_fn = tf.function(rewriting.rewritten(load.load_logits_fn(exported)), autograph=False)
    np.testing.assert_allclose(search_fn(tf.constant(x)), resnet(x, training=False), atol=1e-5)


def test_xla_compiles_an_export(exported, resnet, x):
    compiled = tf.function(load.load_logits_fn(exported), jit_compile=True, autograph=False)
    np.testing.assert_allclose(compiled(tf.constant(x)), resnet(x, training=False), atol=1e-5)
