"""SavedModels that need nothing but TensorFlow to run, with a model card."""

import contextlib
import io
import os
import platform
import posixpath
import sys
from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

import robust_keras
from robust_keras import ownership, storage
from robust_keras.models import weights as named_weights
from robust_keras.saved_models.opening import CARD, UNFINISHED, network_of

gfile = tf.io.gfile
# Where a run keeps weights: in which folder's newest snapshot, with which prefix to their names.
_KEPT = {"best": ("best", ""), "last": ("checkpoints", "weights/"), "last_averaged": ("checkpoints", "averages/")}


def export(network: keras.Model, directory: str | os.PathLike, *, card: Mapping[str, Any]) -> None:
    """Writes a network as a SavedModel with two signatures and a model card.

    `serving_default` takes `image`, float32 `[batch, height, width, channels]` in [0, 1]; `serving_uint8` takes bytes.
    Both return `logits`, float32 `[batch, num_classes]`. The batch size is free; gradients flow through the model.
    The card is written last: a folder without it is what an interrupted export left.

    Args:
        network: a float32 `keras.Model` outside any strategy.
        directory: any `tf.io.gfile` path; an unfinished export in it is replaced.
        card: for the model card, as JSON can hold it; what describes the network and the versions is added.

    Raises:
        ValueError: where the folder holds a finished export, or something that is not one, or another export is at work
            in it.
    """
    directory = str(directory)
    if is_finished(directory):
        raise ValueError(f"Expected a folder without a finished export. Received: {directory}")
    unfinished_path = posixpath.join(directory, UNFINISHED)
    with ownership.lock(directory, what="an export"):
        if set(gfile.listdir(directory)) - {ownership.lock_name()} and not gfile.exists(unfinished_path):
            raise ValueError(f"Expected an empty or new folder. Received: {directory}")
        storage.write_text(unfinished_path, "This export is under way, or was interrupted.\n")
        for name in ("variables", "assets"):  # Of an interrupted one.
            if gfile.isdir(posixpath.join(directory, name)):
                gfile.rmtree(posixpath.join(directory, name))
        _write_saved_model(network, directory)
        storage.write_json(posixpath.join(directory, CARD), _described(network) | dict(card))
        gfile.remove(unfinished_path)


def export_keras(network: keras.Model, path: str) -> None:
    """Writes a network as a `.keras` file, for fine-tuning; loading it needs this package.

    Raises:
        ValueError: where the file exists.
    """
    if gfile.exists(path):
        raise ValueError(f"Expected a new file. Received: {path}")
    network.save(path)


def network_of_run(workdir: str, weights: str = "best") -> tuple[keras.Model, dict[str, Any]]:
    """The network of a training run, and what its model card says of it.

    Args:
        workdir: the run's folder.
        weights: 'best' on the validation images so far, or 'last' or 'last_averaged' of the newest checkpoint.

    Returns:
        (network, card): a float32 `keras.Model` and a dictionary, in which `config` is the run's gin configuration,
        None where it was started from Python.

    Raises:
        ValueError: where the run has no such weights, or they are not those of its architecture.
    """
    if weights not in _KEPT:
        raise ValueError(f"Expected weights out of {', '.join(_KEPT)}. Received: {weights!r}")
    folder, prefix = _KEPT[weights]
    snapshot = storage.read_newest(posixpath.join(workdir, folder))
    if snapshot is None or not any(name.startswith(prefix) for name in snapshot.arrays):
        raise ValueError(f"Expected a run that has {weights} weights. Received: {workdir}")
    description = snapshot.info.get("description")
    if not isinstance(description, dict) or "architecture" not in description:
        raise ValueError(f"Expected the weights of a run in {posixpath.join(workdir, folder)}. Received: others")
    description = dict(description)
    weight_bytes = sum(array.nbytes for array in snapshot.arrays.values())
    network = network_of(description.pop("architecture"), weight_bytes, workdir)
    arrays = {name.removeprefix(prefix): array for name, array in snapshot.arrays.items() if name.startswith(prefix)}
    named_weights.assign(network, arrays)
    if weights != "best":
        description["weights"] = {"last": "raw", "last_averaged": "averaged"}[weights]
    # The newest checkpoint also knows the last validation.
    validation = {name: snapshot.info[name] for name in ("best", "last_validation") if name in snapshot.info}
    config = storage.read_text(posixpath.join(workdir, "config.gin")) or None
    return network, {"step": snapshot.step, **description, "validation": validation, "config": config}


def is_finished(directory: str | os.PathLike) -> bool:
    """Whether the folder holds a finished export."""
    return gfile.exists(posixpath.join(str(directory), CARD))


def versions() -> dict[str, str]:
    """Versions of what numbers depend on, by package."""
    return {
        "robust_keras": robust_keras.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        **({"jax": sys.modules["jax"].__version__} if "robust_keras.engines.on_jax.strategy" in sys.modules else {}),
    }


def _write_saved_model(network: keras.Model, directory: str) -> None:
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


def _described(network: keras.Model) -> dict[str, Any]:
    """What a model card says of any network."""
    shape = network.input_shape[1:]
    return {
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
