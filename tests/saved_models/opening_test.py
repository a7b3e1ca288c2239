"""Paths that hold no model, half of one, or one that cannot be attacked: one line each says what to do."""

import os
import pathlib
import subprocess
import sys
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import keras_classes
from robust_keras.saved_models import export, load
from tests.saved_models.safety import hostile_models

ROOT = pathlib.Path(__file__).parents[2]


def refusal(path):
    with pytest.raises(ValueError) as caught:
        load.load_logits_fn(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and message.startswith("Expected ") and "Received: " in message
    return message


def test_a_run_is_no_model_but_has_one(tmp_path, linear):
    export.export(linear, tmp_path / "saved_model", card={})
    assert f"Received: {tmp_path}; did you mean {tmp_path}/saved_model?" in refusal(tmp_path)


def a_child_that_is_not_there(meta_graph):
    meta_graph.object_graph_def.nodes[0].children.add(local_name="more", node_id=9999)


def _of_signatures(meta_graph):
    nodes = meta_graph.object_graph_def.nodes
    variable = next(k for k, each in enumerate(nodes) if each.WhichOneof("kind") == "variable")
    found = next(child for child in nodes[0].children if child.local_name == "signatures")
    return found, nodes[found.node_id].children, variable


def signatures_that_are_a_variable(meta_graph):
    found, _, variable = _of_signatures(meta_graph)
    found.node_id = variable


def a_signature_that_is_a_variable(meta_graph):
    _, (signature,), variable = _of_signatures(meta_graph)
    signature.node_id = variable


def an_input_of_another_name(meta_graph):
    for function in meta_graph.object_graph_def.concrete_functions.values():
        fields = function.canonicalized_input_signature.tuple_value.values[1].dict_value.fields
        if "x" in fields:
            fields["y\x1b[31m"].CopyFrom(fields["x"])
            del fields["x"]


@pytest.mark.parametrize(
    "change, seen",
    [
        (a_child_that_is_not_there, "a SavedModel that TensorFlow can load"),
        (signatures_that_are_a_variable, r"Received: \[\] in "),
        (a_signature_that_is_a_variable, "with one input, the images. Received:  in "),
        (an_input_of_another_name, "a SavedModel that TensorFlow can load"),
    ],
)
def test_programs_that_only_compute_and_are_none(tmp_path, change, seen, caplog):
    path = hostile_models.save(tmp_path / "model")
    file = tmp_path / "model" / "saved_model.pb"
    program = hostile_models.message("SavedModel").FromString(file.read_bytes())
    change(program.meta_graphs[0])
    file.write_bytes(program.SerializeToString())
    with pytest.raises(ValueError, match=seen) as caught:
        load.load_logits_fn(path)(tf.zeros((1, 4, 4, 3)))
    assert str(caught.value).isprintable() and "\x1b" not in caplog.text


def test_an_unfinished_export_is_refused(tmp_path, linear):
    export.export(linear, tmp_path / "saved_model", card={})
    (tmp_path / "saved_model" / "unfinished").write_text("This export is under way, or was interrupted.\n")
    assert "Expected a finished export." in refusal(tmp_path / "saved_model")


@pytest.mark.parametrize("name", ["missing.keras", "empty.keras", "folder.keras"])
def test_a_keras_file_that_is_none(tmp_path, name):
    if name == "empty.keras":
        (tmp_path / name).write_bytes(b"")
    elif name == "folder.keras":
        (tmp_path / name).mkdir()
    assert name in refusal(tmp_path / name)


@pytest.mark.oldest
def test_a_damaged_keras_file(tmp_path, linear):
    linear.save(tmp_path / "model.keras")
    content = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "model.keras").write_bytes(content[: len(content) // 2])
    assert "model.keras" in refusal(tmp_path / "model.keras")


class Unknown(keras.layers.Layer):
    """Not registered."""

    def call(self, x):
        return x


@pytest.mark.oldest
def test_a_class_that_nobody_registered(tmp_path):
    image = keras.Input((4, 4, 3))
    path = tmp_path / "model.keras"
    keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(Unknown()(image)))).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    # As if its module were not there.
    config = members["config.json"].replace(Unknown.__module__.encode(), b"not_installed")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | {"config.json": config}).items():
            archive.writestr(name, content)
    message = refusal(path)
    assert "the class None.Unknown" in message or "the class not_installed.Unknown" in message
    assert "--import=MODULE" in message


@pytest.mark.oldest
def test_python_code_in_a_file_does_not_run(tmp_path):
    image = keras.Input((4, 4, 3))
    ran = tmp_path / "ran"
    layer = keras.layers.Lambda(lambda x, path=str(ran): [open(path, "w").close(), x][1], output_shape=(4, 4, 3))
    keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(layer(image)))).save(tmp_path / "model.keras")
    ran.unlink(missing_ok=True)
    assert "Lambda" in refusal(tmp_path / "model.keras")
    assert not ran.exists()


@pytest.mark.oldest
def test_several_inputs_of_a_keras_file(tmp_path):
    one, other = keras.Input((4, 4, 3), name="one"), keras.Input((4, 4, 3), name="other")
    logits = keras.layers.Dense(3)(keras.layers.Flatten()(keras.layers.Add()([one, other])))
    keras.Model([one, other], logits).save(tmp_path / "model.keras")
    assert "one input, the images. Received: one, other" in refusal(tmp_path / "model.keras")


@pytest.mark.oldest
def test_the_shape_of_a_keras_file(tmp_path, linear):
    linear.save(tmp_path / "model.keras")
    logits_fn = load.load_logits_fn(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"shape \(4, 4, 3\). Received: \(3, 4, 4\); do --input_layout") as caught:
        logits_fn(tf.zeros((2, 3, 4, 4)))
    assert "\n" not in str(caught.value)


@keras.saving.register_keras_serializable(package="opening_test")
class Subclass(keras.Model):
    """A model that does not say what it takes."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.flatten, self.dense = keras.layers.Flatten(), keras.layers.Dense(3)

    def call(self, x):
        return self.dense(self.flatten(x))


@pytest.mark.oldest
def test_a_subclass_of_model(tmp_path):
    model = Subclass()
    x = np.random.default_rng(0).random((2, 4, 4, 3), np.float32)
    expected = model(x)
    model.save(tmp_path / "model.keras")
    np.testing.assert_allclose(load.load_logits_fn(tmp_path / "model.keras")(x), expected, rtol=0, atol=1e-6)


# Classes of this package.


def test_a_file_of_an_older_release_loads_in_a_process_that_has_imported_nothing_else(tmp_path):
    """Such a file names modules that have moved since."""
    with zipfile.ZipFile(ROOT / "tests" / "fixtures" / "training.zip") as archive:
        archive.extract("exported.keras", tmp_path)
    program = "from robust_keras.saved_models import load; print(load.load_logits_fn('exported.keras').name)"
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("exported.keras")


@pytest.mark.oldest
def test_every_registered_class_of_a_network_is_known():
    import robust_keras.models as package

    for path in pathlib.Path(package.__file__).parent.glob("*.py"):
        __import__(f"robust_keras.models.{path.stem}")
    registered = {name: c for name, c in keras.saving.get_custom_objects().items() if ".models." in c.__module__}
    assert keras_classes.custom_objects() == {k: v for k, v in registered.items() if k.startswith("robust_keras>")}
    assert len(keras_classes.CLASSES) >= 3
