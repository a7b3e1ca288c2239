"""SavedModels that need nothing but TensorFlow to run, with a model card."""

import contextlib
import io
import json
import platform
import posixpath

import keras
import tensorflow as tf

import robust_keras
from robust_keras import storage

gfile = tf.io.gfile
CARD = "model_card.json"


def export(network, directory, *, card):
    """Writes a network as a SavedModel with two signatures and a model card.

    `serving_default` takes `image`, float32 `[batch, height, width, channels]` in [0, 1]; `serving_uint8` takes bytes.
    Both return `logits`, float32 `[batch, num_classes]`. The batch size is free; gradients flow through the model.
    The card is written last: a folder without it is what an interrupted export left.

    Args:
        network: a float32 `keras.Model` outside any strategy.
        directory: any `tf.io.gfile` path; an unfinished export in it is replaced.
        card: a dictionary for the model card; what describes the network and the versions is added.

    Raises:
        ValueError: where the folder holds a finished export, or something that is not one.
    """
    directory = str(directory)
    card_path, unfinished_path = posixpath.join(directory, CARD), posixpath.join(directory, "unfinished")
    if is_finished(directory):
        raise ValueError(f"Expected a folder without a finished export. Received: {directory}")
    if gfile.isdir(directory) and gfile.listdir(directory) and not gfile.exists(unfinished_path):
        raise ValueError(f"Expected an empty or new folder. Received: {directory}")
    gfile.makedirs(directory)
    with gfile.GFile(unfinished_path, "w") as file:
        file.write("This export is under way, or was interrupted.\n")
    shape = network.input_shape[1:]
    archive = keras.export.ExportArchive()
    archive.track(network)
    archive.add_endpoint(
        "serving_default",
        lambda image: {"logits": network(image, training=False)},
        input_signature=[tf.TensorSpec((None, *shape), tf.float32, name="image")],
    )
    archive.add_endpoint(
        "serving_uint8",
        lambda image: {"logits": network(tf.cast(image, tf.float32) / 255.0, training=False)},
        input_signature=[tf.TensorSpec((None, *shape), tf.uint8, name="image")],
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Keras 3.5 has no other way to keep it quiet.
        archive.write_out(directory)
    described = {
        "name": network.name,
        "num_parameters": sum(int(tf.size(w.value)) for w in network.trainable_weights),
        "num_classes": network.output_shape[-1],
        "inputs": {
            "serving_default": {"image": f"float32 {['batch', *shape]} in [0, 1]"},
            "serving_uint8": {"image": f"uint8 {['batch', *shape]}"},
        },
        "output": {"logits": f"float32 {['batch', network.output_shape[-1]]}"},
        "versions": versions(),
    }
    with gfile.GFile(card_path, "w") as file:
        file.write(json.dumps(described | card, indent=2) + "\n")
    gfile.remove(unfinished_path)


def export_keras(network, path):
    """Writes a network as a `.keras` file, for fine-tuning; loading it needs this package.

    Raises:
        ValueError: where the file exists.
    """
    if gfile.exists(path):
        raise ValueError(f"Expected a new file. Received: {path}")
    network.save(path)


def network_of_run(workdir, weights="best"):
    """The network of a training run, and what its model card says of it.

    Args:
        workdir: the run's folder.
        weights: 'best' on the validation images so far, or 'last' or 'last_averaged' of the newest checkpoint.

    Returns:
        (network, card): a float32 `keras.Model` and a dictionary.

    Raises:
        ValueError: where the run has no such weights.
    """
    folder, prefix = {
        "best": ("best", ""),
        "last": ("checkpoints", "weights/"),
        "last_averaged": ("checkpoints", "averages/"),
    }[weights]
    snapshot = storage.read_newest(posixpath.join(workdir, folder))
    if snapshot is None or not any(name.startswith(prefix) for name in snapshot.arrays):
        raise ValueError(f"Expected a run that has {weights} weights. Received: {workdir}")
    description = dict(snapshot.info["description"])
    network = keras.models.model_from_json(description.pop("architecture"))
    for variable in network.weights:
        variable.assign(snapshot.arrays[prefix + variable.path])
    if weights != "best":
        description["weights"] = {"last": "raw", "last_averaged": "averaged"}[weights]
    with gfile.GFile(posixpath.join(workdir, "config.gin")) as file:
        config = file.read()
    # The newest checkpoint also knows the last validation.
    validation = {name: snapshot.info[name] for name in ("best", "last_validation") if name in snapshot.info}
    return network, {"step": snapshot.step, **description, "validation": validation, "config": config}


def is_finished(directory):
    """Whether the folder holds a finished export."""
    return gfile.exists(posixpath.join(str(directory), CARD))


def versions():
    """Versions of what numbers depend on, by package."""
    return {
        "robust_keras": robust_keras.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
