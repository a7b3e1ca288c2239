"""Export and loading: SavedModels that need only TensorFlow, and any saved classifier as a function of images."""

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.models import activations, normalization, wide_resnet
from robust_keras.saved_models import export, load

pytestmark = pytest.mark.oldest

SIZE, NUM_CLASSES = 8, 5

# Runs outside the repository with nothing of it, or of Keras, within reach.
FRESH = """
import sys
for name in ("robust_keras", "keras", "tf_keras"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf

inputs, output, resnet, branches = sys.argv[1:]
images = np.load(inputs)["images"]
x = tf.constant(images, tf.float32) / 255.0
results = {}

loaded = tf.saved_model.load(resnet)
floats, bytes_ = loaded.signatures["serving_default"], loaded.signatures["serving_uint8"]
assert list(floats.structured_outputs) == list(bytes_.structured_outputs) == ["logits"]
for signature, dtype in ((floats, tf.float32), (bytes_, tf.uint8)):
    assert signature.structured_input_signature[1] == {"image": tf.TensorSpec((None, 8, 8, 3), dtype, "image")}
results["float"] = floats(image=x)["logits"]
results["uint8"] = bytes_(image=tf.constant(images))["logits"]
results["in_parts"] = tf.concat([floats(image=part)["logits"] for part in (x[:1], x[1:])], axis=0)

other = tf.saved_model.load(branches)
for name, model, logits in (("resnet", loaded, (0, 4)), ("branches", other, range(6))):
    signature = model.signatures["serving_default"]
    for k in logits:
        with tf.GradientTape() as tape:
            tape.watch(x)
            logit = tf.reduce_sum(signature(image=x)["logits"][:, k])
        results[f"{name}/{k}"] = tape.gradient(logit, x)
np.savez(output, **{name: value.numpy() for name, value in results.items()})
"""


def randomised(network, seed=0):
    """Weights and statistics at random: logits and gradients are zero as training starts."""
    rng = np.random.default_rng(seed)
    for weight in network.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("scale", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif kind == "kernel":
            weight.assign(rng.normal(0.0, np.prod(weight.shape[:-1]) ** -0.5, weight.shape))
        elif kind != "num_updates":
            weight.assign(rng.normal(0.0, 0.3, weight.shape))
    return network


@pytest.fixture(scope="module")
def resnet():
    return randomised(
        wide_resnet.wide_resnet(
            depth=10,
            width=1,
            num_classes=NUM_CLASSES,
            activation="silu",
            mean=(0.4, 0.5, 0.6),
            std=(0.2, 0.25, 0.3),
            input_shape=(SIZE, SIZE, 3),
            statistics_group_size=4,
        )
    )


@pytest.fixture(scope="module")
def branches():
    """One logit for each activation."""
    x = image = keras.Input((SIZE, SIZE, 3))
    x = normalization.BatchNorm()(keras.layers.Conv2D(6, 3)(x))
    features = [keras.layers.Flatten()(activations.Activation(name)(x)) for name in activations.NAMES]
    return randomised(keras.Model(image, keras.layers.Concatenate()([keras.layers.Dense(1)(f) for f in features])))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(3).integers(0, 256, (5, SIZE, SIZE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, resnet):
    path = str(tmp_path_factory.mktemp("export") / "saved_model")
    export.export(resnet, path, card={"dataset": "digits", "step": 12, "versions": {"robust_keras": "of the run"}})
    return path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, exported, branches, images):
    """What a process without this package computes with the exported models."""
    folder = tmp_path_factory.mktemp("fresh")
    export.export(branches, folder / "branches", card={})
    np.savez(folder / "inputs.npz", images=images)
    arguments = [str(folder / "inputs.npz"), str(folder / "outputs.npz"), exported, str(folder / "branches")]
    result = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, *arguments], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    with np.load(folder / "outputs.npz") as arrays:
        return dict(arrays)


def live_gradient(network, x, k):
    with tf.GradientTape() as tape:
        tape.watch(x)
        logit = tf.reduce_sum(network(x, training=False)[:, k])
    return tape.gradient(logit, x).numpy()


def test_logits_without_this_package_are_the_live_ones(fresh, resnet, images):
    live = resnet(images / np.float32(255), training=False).numpy()
    assert live.shape == (5, NUM_CLASSES) and np.abs(live).max() > 0.1 and live.std(0).min() > 1e-3
    # Not those of the batch's statistics.
    with normalization.batch_norm_mode("batch"):
        assert np.abs(live[:4] - resnet(images[:4] / np.float32(255))).max() > 1e-2
    assert fresh["float"].dtype == np.float32
    np.testing.assert_allclose(fresh["float"], live, rtol=0, atol=1e-5)


def test_both_signatures_agree_whatever_the_batch(fresh):
    np.testing.assert_allclose(fresh["uint8"], fresh["float"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fresh["in_parts"], fresh["float"], rtol=0, atol=1e-5)


def test_gradients_through_a_reloaded_resnet(fresh, resnet, images):
    x = tf.constant(images, tf.float32) / 255.0
    for k in (0, NUM_CLASSES - 1):
        live = live_gradient(resnet, x, k)
        assert np.abs(live).max() > 1e-2
        np.testing.assert_allclose(fresh[f"resnet/{k}"], live, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", activations.NAMES)
def test_gradients_through_every_activation(fresh, branches, images, activation):
    assert len(activations.NAMES) == 6
    k = activations.NAMES.index(activation)
    live = live_gradient(branches, tf.constant(images, tf.float32) / 255.0, k)
    assert np.abs(live).max() > 1e-2
    np.testing.assert_allclose(fresh[f"branches/{k}"], live, rtol=0, atol=1e-5)


def test_model_card(exported):
    with open(os.path.join(exported, "model_card.json")) as file:
        card = json.load(file)
    # Convolutions, then scale and offset of each normalisation, then the classifier.
    num_parameters = 9 * 3 * 16
    for before, width in ((16, 16), (16, 32), (32, 64)):
        num_parameters += before * width + 9 * before * width + 9 * width * width + 2 * before + 2 * width
    num_parameters += 2 * 64 + 64 * NUM_CLASSES + NUM_CLASSES
    assert card == {
        "name": "wide_resnet_10_1",
        "num_parameters": num_parameters,
        "num_classes": NUM_CLASSES,
        "inputs": {
            "serving_default": {"image": "float32 ['batch', 8, 8, 3] in [0, 1]"},
            "serving_uint8": {"image": "uint8 ['batch', 8, 8, 3]"},
        },
        "output": {"logits": "float32 ['batch', 5]"},
        "versions": {"robust_keras": "of the run"},
        "dataset": "digits",
        "step": 12,
    }


def test_versions():
    assert export.versions().keys() == {"robust_keras", "tensorflow", "keras", "python"}
    assert export.versions()["tensorflow"] == tf.__version__


# What is not overwritten.


@pytest.fixture(scope="module")
def linear():
    """The smallest network."""
    image = keras.Input((4, 4, 3))
    return randomised(keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image))))


def content_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in pathlib.Path(folder).rglob("*") if path.is_file()}


def test_a_finished_export_is_refused(exported, linear):
    before = content_of(exported)
    assert export.is_finished(exported)
    with pytest.raises(ValueError, match=f"without a finished export. Received: {exported}"):
        export.export(linear, exported, card={})
    assert content_of(exported) == before


def test_a_folder_of_other_things_is_refused(tmp_path, linear):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"empty or new folder. Received: {tmp_path}"):
        export.export(linear, tmp_path, card={})
    assert content_of(tmp_path) == {pathlib.Path("notes.txt"): b"mine"}
    assert not export.is_finished(tmp_path) and not export.is_finished(tmp_path / "missing")


def test_a_path_that_is_a_file_is_refused(tmp_path, linear):
    (tmp_path / "model").write_text("mine")
    with pytest.raises((ValueError, OSError, tf.errors.OpError)):
        export.export(linear, tmp_path / "model", card={})
    assert (tmp_path / "model").read_text() == "mine"


def test_a_saved_model_of_other_people_is_refused(others, linear, tmp_path):
    theirs = shutil.copytree(others["scores"], tmp_path / "theirs")
    before = content_of(theirs)
    with pytest.raises(ValueError, match="Received"):
        export.export(linear, theirs, card={})
    assert content_of(theirs) == before


def interrupted_export(monkeypatch, network, directory, write_out):
    """An export that ends with `write_out(archive, path)`, where the archive is written."""

    def interrupted(archive, path, **options):
        write_out(archive, path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(keras.export.ExportArchive()), "write_out", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export.export(network, directory, card={})
    assert not export.is_finished(directory)


def assert_exports_over(network, directory):
    export.export(network, directory, card={"step": 2})
    assert export.is_finished(directory)
    x = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    np.testing.assert_allclose(load.load_logits_fn(directory)(x), network(x), rtol=0, atol=1e-5)


def test_an_export_interrupted_before_its_card_is_replaced(tmp_path, monkeypatch, linear):
    directory = tmp_path / "new"
    whole = type(keras.export.ExportArchive()).write_out
    interrupted_export(monkeypatch, linear, directory, lambda archive, path: whole(archive, path))
    assert (directory / "saved_model.pb").exists()
    assert_exports_over(linear, directory)


def test_an_export_interrupted_in_its_variables_is_replaced(tmp_path, monkeypatch, linear):
    directory = tmp_path / "new"

    def variables_only(archive, path):
        os.makedirs(os.path.join(path, "variables"))
        pathlib.Path(path, "variables", "variables.data-00000-of-00001").write_bytes(b"half")

    interrupted_export(monkeypatch, linear, directory, variables_only)
    assert_exports_over(linear, directory)


def test_keras_file(tmp_path, resnet, images):
    path = str(tmp_path / "model.keras")
    export.export_keras(resnet, path)
    loaded = keras.models.load_model(path)
    x = tf.constant(images[:4], tf.float32) / 255.0
    live = resnet(x, training=False)
    np.testing.assert_allclose(loaded(x, training=False), live, rtol=0, atol=1e-6)
    for weight, original in zip(loaded.weights, resnet.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), original.numpy())
    # Fine-tuning goes on with the same groups.
    groups = [layer.statistics_group_size for layer in loaded.layers if isinstance(layer, normalization.BatchNorm)]
    assert groups == [4] * 7
    # Evaluation takes it too, with the moving statistics.
    np.testing.assert_allclose(load.load_logits_fn(path)(x), live, rtol=0, atol=1e-5)
    before = pathlib.Path(path).read_bytes()
    with pytest.raises(ValueError, match=f"new file. Received: {path}"):
        export.export_keras(resnet, path)
    assert pathlib.Path(path).read_bytes() == before


# Networks out of a run.


@pytest.fixture
def run(tmp_path, linear):
    """A run's folder: every weight is 1 in the best snapshot, 2 in the newest, 3 in its average."""
    description = {"architecture": linear.to_json(), "weights": "averaged", "dataset": "digits"}
    best = {"step": 40, "metrics": {"val_robust_averaged": 0.5}}
    last = {"step": 60, "metrics": {"val_robust_averaged": 0.4}}

    def filled(prefix, value):
        return {f"{prefix}{w.path}": np.full(w.shape, value, np.float32) for w in linear.weights}

    workdir = tmp_path / "run"
    storage.write(workdir / "best", 40, filled("", 1), {"best": best, "description": description})
    arrays = {"step": np.int64(60), **filled("weights/", 2), **filled("averages/", 3), **filled("momentum/", 4)}
    info = {"rows": [], "best": best, "last_validation": last, "description": description}
    storage.write(workdir / "checkpoints", 60, {**arrays, **filled("best/", 1)}, info)
    (workdir / "config.gin").write_text("TAU = 0.995\n")
    return str(workdir)


@pytest.mark.parametrize(
    "weights, value, step, kind",
    [("best", 1, 40, "averaged"), ("last", 2, 60, "raw"), ("last_averaged", 3, 60, "averaged")],
)
def test_network_of_a_run(run, weights, value, step, kind):
    network, card = export.network_of_run(run, weights)
    for weight in network.weights:
        np.testing.assert_array_equal(weight.numpy(), np.full(weight.shape, value))
    assert (card["step"], card["weights"], card["dataset"]) == (step, kind, "digits")
    assert card["config"] == "TAU = 0.995\n" and card["validation"]["best"]["step"] == 40
    assert "architecture" not in card
    json.dumps(card)


def test_network_of_a_run_without_such_weights(run, tmp_path):
    with pytest.raises(ValueError, match=f"best weights. Received: {tmp_path}"):
        export.network_of_run(str(tmp_path))
    checkpoints = os.path.join(run, "checkpoints")
    newest = storage.read_newest(checkpoints)
    arrays = {name: array for name, array in newest.arrays.items() if not name.startswith("averages/")}
    storage.write(checkpoints, 60, arrays, newest.info)
    with pytest.raises(ValueError, match="last_averaged weights"):
        export.network_of_run(run, "last_averaged")
    export.network_of_run(run, "last")


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


@pytest.mark.parametrize("name, match", [("two inputs", "one input"), ("other signature", "signature serving_default")])
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


# Fingerprints.


def test_fingerprint_by_hand(tmp_path):
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "index").write_bytes(b"one")
    (tmp_path / "saved_model.pb").write_bytes(b"two")
    lines = [f"{hashlib.sha256(b'two').hexdigest()}  saved_model.pb\n"]
    lines += [f"{hashlib.sha256(b'one').hexdigest()}  variables/index\n"]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert load.fingerprint(tmp_path) == load.fingerprint(f"{tmp_path}/") == expected
    in_memory = "ram://export_test/model"
    tf.io.gfile.makedirs(f"{in_memory}/variables")
    for name, content in (("variables/index", b"one"), ("saved_model.pb", b"two")):
        with tf.io.gfile.GFile(f"{in_memory}/{name}", "wb") as file:
            file.write(content)
    assert load.fingerprint(in_memory) == expected


def test_fingerprint_is_of_the_model_and_not_of_its_card(exported, tmp_path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    original = load.fingerprint(exported)
    assert load.fingerprint(copy) == original
    (copy / "model_card.json").write_text("{}")
    assert load.fingerprint(copy) == original
    (copy / "model_card.json").unlink()
    assert load.fingerprint(copy) == original
    variables = copy / "variables" / "variables.data-00000-of-00001"
    content = bytearray(variables.read_bytes())
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    assert load.fingerprint(copy) != original
    content[len(content) // 2] ^= 1
    variables.write_bytes(content)
    assert load.fingerprint(copy) == original
    variables.rename(copy / "variables" / "other")
    assert load.fingerprint(copy) != original


def test_fingerprint_of_a_file(tmp_path):
    path = tmp_path / "model.keras"
    path.write_bytes(b"one")
    line = f"{hashlib.sha256(b'one').hexdigest()}  model.keras\n"
    assert load.fingerprint(path) == hashlib.sha256(line.encode()).hexdigest()
    path.write_bytes(b"two")
    assert load.fingerprint(path) != hashlib.sha256(line.encode()).hexdigest()


def test_fingerprint_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="Received: .*missing"):
        load.fingerprint(tmp_path / "missing")
