"""Exports: SavedModels that need only TensorFlow, and `.keras` files."""

import json
import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import attacks
from robust_keras.models import activations, normalization, wide_resnet
from robust_keras.saved_models import claims, export, load, measured

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
names = {"logits", "probabilities", "class"}
assert set(floats.structured_outputs) == set(bytes_.structured_outputs) == names
for signature, dtype in ((floats, tf.float32), (bytes_, tf.uint8)):
    assert signature.structured_input_signature[1] == {"image": tf.TensorSpec((None, 8, 8, 3), dtype, "image")}
results["float"] = floats(image=x)["logits"]
results["uint8"] = bytes_(image=tf.constant(images))["logits"]
results["in_parts"] = tf.concat([floats(image=part)["logits"] for part in (x[:1], x[1:])], axis=0)
results["probabilities"], results["class"] = (floats(image=x)[name] for name in ("probabilities", "class"))

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


@pytest.fixture(scope="module")
def resnet(randomised):
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
def branches(randomised):
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
    np.testing.assert_allclose(fresh["float"], live, rtol=0, atol=1e-6)


def test_both_signatures_agree_whatever_the_batch(fresh):
    np.testing.assert_allclose(fresh["uint8"], fresh["float"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fresh["in_parts"], fresh["float"], rtol=0, atol=1e-6)


def test_weights_are_written_once(exported, resnet):
    names = [name for name, _ in tf.train.list_variables(os.path.join(exported, "variables", "variables"))]
    assert len(names) == len(resnet.weights) + 1  # And what binds them to objects.


def test_probabilities_and_classes_are_those_of_the_logits(fresh):
    odds = np.exp(fresh["float"])
    np.testing.assert_allclose(fresh["probabilities"], odds / odds.sum(-1, keepdims=True), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(fresh["class"], fresh["float"].argmax(-1))
    assert fresh["class"].dtype == np.int64 and len(set(fresh["class"])) > 1


def test_pgd_through_a_reloaded_network_is_that_through_the_live_one(exported, resnet, images):
    x, labels = images / np.float32(255), np.arange(5)
    ours, reloaded = (
        attacks.pgd(network, x, labels, norm="Linf", epsilon="8/255", num_steps=5)
        for network in (resnet, load.load_logits_fn(exported))
    )
    assert np.abs(ours - x).max() > 0.01
    np.testing.assert_allclose(reloaded, ours, rtol=0, atol=1e-6)


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


def test_model_card(exported, resnet):
    with open(os.path.join(exported, "model_card.json")) as file:
        card = json.load(file)
    # Convolutions, then scale and offset of each normalisation, then the classifier.
    num_parameters = 9 * 3 * 16
    for before, width in ((16, 16), (16, 32), (32, 64)):
        num_parameters += before * width + 9 * before * width + 9 * width * width + 2 * before + 2 * width
    num_parameters += 2 * 64 + 64 * NUM_CLASSES + NUM_CLASSES
    assert card.pop("weights_sha256") == measured.weights_digest(map(np.asarray, resnet.weights))
    assert "images of the kind" in card.pop("intended_use") and "upper bound" in card.pop("limits")[0]
    assert card == {
        "name": "wide_resnet_10_1",
        "num_parameters": num_parameters,
        "num_classes": NUM_CLASSES,
        "inputs": {
            "serving_default": {"image": "float32 ['batch', 8, 8, 3] in [0, 1]"},
            "serving_uint8": {"image": "uint8 ['batch', 8, 8, 3]"},
        },
        "output": {
            "logits": "float32 ['batch', 5]",
            "probabilities": "float32 ['batch', 5]",
            "class": "int64 ['batch']",
        },
        "versions": {"robust_keras": "of the run"},
        "dataset": "digits",
        "step": 12,
    }


def test_versions(monkeypatch):
    monkeypatch.delitem(sys.modules, "robust_keras.engines.on_jax.strategy", raising=False)  # Of other tests.
    assert export.versions().keys() == {"robust_keras", "tensorflow", "keras", "python"}
    assert export.versions()["tensorflow"] == tf.__version__


# What is not overwritten.


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


def test_a_saved_model_of_other_people_is_refused(linear, tmp_path):
    theirs = tmp_path / "theirs"
    linear.export(theirs)
    before = content_of(theirs)
    with pytest.raises(ValueError, match="empty or new folder. Received"):
        export.export(linear, theirs, card={})
    assert content_of(theirs) == before


def interrupted_export(monkeypatch, network, directory, save):
    """An export that ends with `save(module, path, **options)`, where the SavedModel is written."""

    def interrupted(module, path, **options):
        save(module, path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", interrupted)
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
    interrupted_export(monkeypatch, linear, directory, tf.saved_model.save)
    assert (directory / "saved_model.pb").exists()
    assert_exports_over(linear, directory)


def test_an_export_interrupted_after_its_card_is_no_finished_one(tmp_path, monkeypatch, linear):
    def interrupted(directory, **options):
        pathlib.Path(directory, "claims").mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(claims, "attach", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export.export(linear, tmp_path, card={"step": 1})
    assert (tmp_path / "model_card.json").exists() and not export.is_finished(tmp_path)
    with pytest.raises(ValueError, match="finished export"):
        load.load_logits_fn(tmp_path)
    assert_exports_over(linear, tmp_path)
    assert json.loads((tmp_path / "model_card.json").read_text())["step"] == 2 and not (tmp_path / "claims").exists()


def test_an_export_interrupted_in_its_variables_is_replaced(tmp_path, monkeypatch, linear):
    directory = tmp_path / "new"

    def variables_only(module, path, **options):
        os.makedirs(os.path.join(path, "variables"))
        pathlib.Path(path, "variables", "variables.data-00000-of-00001").write_bytes(b"half")

    interrupted_export(monkeypatch, linear, directory, variables_only)
    assert_exports_over(linear, directory)


def test_an_unfinished_export_of_release_0_1_is_replaced(tmp_path, linear):
    """It had this file, and a SavedModel in two parts."""
    (tmp_path / "unfinished").write_text("This export is under way, or was interrupted.\n")
    (tmp_path / "variables").mkdir()
    (tmp_path / "variables" / "variables.data-00001-of-00002").write_bytes(b"half")
    assert_exports_over(linear, tmp_path)
    assert {path.name for path in tmp_path.rglob("*.data*")} == {"variables.data-00000-of-00001"}
    assert not (tmp_path / "unfinished").exists() and not (tmp_path / "in_use.json").exists()


def test_another_export_at_work_is_refused(tmp_path, linear):
    program = """
import sys, time
from robust_keras import ownership
with ownership.lock(sys.argv[1], what="an export"):
    print("locked", flush=True)
    time.sleep(300)
"""
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "locked\n"
            with pytest.raises(ValueError, match="in use by process .* an export"):
                export.export(linear, tmp_path, card={})
        finally:
            other.kill()
    # What a killed process has left behind is in nobody's way.
    export.export(linear, tmp_path, card={})
    assert export.is_finished(tmp_path)


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
