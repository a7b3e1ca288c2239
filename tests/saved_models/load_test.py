"""Any saved classifier as a function of images in [0, 1]."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.saved_models import load

pytestmark = pytest.mark.oldest

# Classifiers that other people saved: the logits are sums over rows, linear in the pixels.

MATRIX = np.random.default_rng(7).normal(size=(48, 3)).astype(np.float32)


def linear_logits(x):
    """NHWC [batch, 4, 4, 3] in [0, 1] to [batch, 3]."""
    return tf.reshape(tf.cast(x, tf.float32), (-1, 48)) @ MATRIX


class Hand(tf.Module):
    """A module of one function, with a variable in it."""

    def __init__(self, fn, *specs):
        super().__init__()
        self.one = tf.Variable(1.0)
        self.call = tf.function(lambda *inputs: fn(*inputs, self.one), input_signature=specs)


NHWC = tf.TensorSpec((None, 4, 4, 3), tf.float32, name="pixels")
NCHW = tf.TensorSpec((None, 3, 4, 4), tf.float32, name="channels_first")


def from_bytes_nchw(x, one):
    return {"scores": linear_logits(tf.transpose(x, (0, 2, 3, 1)) / 255.0) * one}


def from_minus_one_to_one(x, one):
    return {"scores": linear_logits((x + 1.0) / 2.0) * one}


def with_features(x, one):
    return {"features": tf.reshape(x, (-1, 48)), "logits": linear_logits(x) * one}


def without_logits(x, one):
    return {"a": linear_logits(x) * one, "b": -linear_logits(x)}


def probabilities(x, one):
    return {"probabilities": tf.nn.softmax(40.0 * linear_logits(x) * one)}


def two_inputs(x, y, one):
    return {"logits": linear_logits(x) + linear_logits(y) * one}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """SavedModels written by hand, by name."""
    folder = tmp_path_factory.mktemp("others")
    other = tf.TensorSpec((None, 4, 4, 3), tf.float32, name="other")
    made = {
        "scores": (from_bytes_nchw, "serving_default", NCHW),
        "signed": (from_minus_one_to_one, "serving_default", NHWC),
        "features": (with_features, "serving_default", NHWC),
        "nameless": (without_logits, "serving_default", NHWC),
        "probabilities": (probabilities, "serving_default", NHWC),
        "two inputs": (two_inputs, "serving_default", NHWC, other),
        "other signature": (with_features, "predict", NHWC),
    }
    paths = {}
    for name, (fn, signature, *specs) in made.items():
        module = Hand(fn, *specs)
        paths[name] = str(folder / name)
        tf.saved_model.save(module, paths[name], signatures={signature: module.call})
    return paths


@pytest.fixture(scope="module")
def x():
    return tf.constant(np.random.default_rng(9).random((2, 4, 4, 3)), tf.float32)


def assert_logits(logits_fn, x, expected_fn=linear_logits):
    """The same values, and the same gradients with respect to pixels in [0, 1]."""
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        logits, expected = logits_fn(x), expected_fn(x)
        one, expected_one = logits[:, 1], expected[:, 1]
    assert logits.dtype == tf.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(tape.gradient(one, x), tape.gradient(expected_one, x), rtol=0, atol=2e-5)


def test_range_layout_and_the_only_output(others, x):
    logits_fn = load.load_logits_fn(others["scores"], input_range=(0.0, 255.0), input_layout="NCHW")
    assert_logits(logits_fn, x)
    # Each of the two matters.
    wrong = load.load_logits_fn(others["scores"], input_layout="NCHW")(x)
    assert np.abs(wrong - linear_logits(x)).max() > 0.1
    with pytest.raises(ValueError, match="Expected images of the model's shape .3, 4, 4.*Received: .*--input_layout"):
        load.load_logits_fn(others["scores"], input_range=(0.0, 255.0))(x)


def test_range_that_does_not_start_at_zero(others, x):
    assert_logits(load.load_logits_fn(others["signed"], input_range=(-1, 1)), x)


def test_output_named_logits_or_as_told(others, x):
    assert_logits(load.load_logits_fn(others["features"]), x)
    features = load.load_logits_fn(others["features"], logits_output="features")
    np.testing.assert_array_equal(features(x), tf.reshape(x, (-1, 48)))
    assert_logits(load.load_logits_fn(others["nameless"], logits_output="a"), x)
    assert_logits(load.load_logits_fn(others["nameless"], logits_output="b"), x, lambda x: -linear_logits(x))


def test_several_outputs_none_named_logits(others, x):
    with pytest.raises(ValueError, match="--logits_output, one of a, b. Received: None"):
        load.load_logits_fn(others["nameless"])(x)
    with pytest.raises(ValueError, match="--logits_output, one of features, logits. Received: 'c'"):
        load.load_logits_fn(others["features"], logits_output="c")(x)


def test_probabilities_pass_as_they_are_unless_told(others, x):
    expected = tf.nn.softmax(40.0 * linear_logits(x))
    np.testing.assert_allclose(load.load_logits_fn(others["probabilities"])(x), expected, rtol=1e-4, atol=1e-30)


def test_probabilities_become_logits(others, x):
    logits_fn = load.load_logits_fn(others["probabilities"], outputs="probabilities")
    logits = logits_fn(x).numpy()
    expected = tf.nn.softmax(40.0 * linear_logits(x)).numpy()
    np.testing.assert_allclose(np.exp(logits), expected, rtol=1e-4, atol=1e-30)
    # Also where one is 0.
    assert expected.min() < 1e-30 and np.isfinite(logits).all()
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    # And where none is, the gradient of a difference is that of the logits.
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(near := 0.01 * x)
        logits, expected = logits_fn(near), 40.0 * linear_logits(near)
        ours, theirs = logits[:, 0] - logits[:, 1], expected[:, 0] - expected[:, 1]
    np.testing.assert_allclose(tape.gradient(ours, near), tape.gradient(theirs, near), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "name, match", [("two inputs", "one input, the images"), ("other signature", "signature serving_default, as .*")]
)
def test_other_signatures_are_refused(others, name, match):
    with pytest.raises(ValueError, match=f"{match}. Received: .*{name}"):
        load.load_logits_fn(others[name])


@pytest.mark.parametrize("name", ["missing", "missing.keras", "empty", "file.txt"])
def test_paths_without_a_model(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("no model")
    with pytest.raises(ValueError, match=f"SavedModel's folder or a .keras file. Received: .*{name}"):
        load.load_logits_fn(tmp_path / name)


@pytest.mark.parametrize(
    "options, received",
    [
        ({"input_layout": "CHWN"}, "'CHWN'"),
        ({"outputs": "softmax"}, "'softmax'"),
        ({"input_range": (1.0, 0.0)}, "1.0,0.0"),
        ({"input_range": (1.0, 1.0)}, "1.0,1.0"),
        ({"input_range": (0.0, float("nan"))}, "0.0,nan"),
    ],
)
def test_options_out_of_range(others, options, received):
    with pytest.raises(ValueError, match=f"Received: {received}"):
        load.load_logits_fn(others["features"], **options)


def test_keras_file_with_named_outputs(tmp_path, linear, x):
    image = keras.Input((4, 4, 3))
    path = str(tmp_path / "model.keras")
    keras.Model(image, {"logits": linear(image), "other": keras.layers.Flatten()(image)}).save(path)
    assert_logits(load.load_logits_fn(path), x, linear)


def test_keras_file_with_a_list_of_outputs(tmp_path, linear, x):
    image = keras.Input((4, 4, 3))
    path = str(tmp_path / "model.keras")
    keras.Model(image, [linear(image), -linear(image)]).save(path)
    with pytest.raises(ValueError, match="Received"):
        load.load_logits_fn(path)(x)


# A fixed batch size.


@pytest.fixture(scope="module")
def of_fixed_batch(tmp_path_factory, linear):
    """Paths by batch size and kind."""
    folder = tmp_path_factory.mktemp("fixed")
    paths = {}
    for size in (1, 4):
        spec = tf.TensorSpec((size, 4, 4, 3), tf.float32, name="pixels")
        module = Hand(with_features, spec)
        paths[size, "SavedModel"] = str(folder / f"{size}")
        tf.saved_model.save(module, paths[size, "SavedModel"], signatures={"serving_default": module.call})
        image = keras.Input(batch_shape=(size, 4, 4, 3))
        paths[size, "keras"] = str(folder / f"{size}.keras")
        keras.Model(image, linear(image)).save(paths[size, "keras"])
    return paths


@pytest.mark.parametrize("kind", ["SavedModel", "keras"])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("batch", [4, 6, *(pytest.param(batch, marks=pytest.mark.slow) for batch in (1, 8))])
def test_any_batch_in_parts_of_the_models_own(of_fixed_batch, linear, kind, size, batch):
    logits_fn = load.load_logits_fn(of_fixed_batch[size, kind])
    x = tf.constant(np.random.default_rng(batch).random((batch, 4, 4, 3)), tf.float32)
    expected_fn = linear_logits if kind == "SavedModel" else linear
    assert_logits(logits_fn, x, expected_fn)
    compiled = tf.function(logits_fn, input_signature=[tf.TensorSpec((batch, 4, 4, 3))])
    assert_logits(compiled, x, expected_fn)
    assert compiled.get_concrete_function().output_shapes == (batch, 3)
    # A batch of unknown size.
    assert_logits(tf.function(logits_fn, input_signature=[tf.TensorSpec((None, 4, 4, 3))]), x, expected_fn)


# Outputs that are no logits.


@pytest.mark.parametrize(
    "fn, received", [(lambda x, one: {"map": x * one}, r"\(2, 4, 4, 3\)"), (lambda x, one: x[:, 0, 0, :1], r", 1\)")]
)
def test_outputs_that_are_no_logits_are_refused(tmp_path, x, fn, received):
    module = Hand(fn, NHWC)
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.call})
    with pytest.raises(ValueError, match=f"at least two classes.*--logits_output.* Received: .*{received}"):
        load.load_logits_fn(tmp_path)(x)
