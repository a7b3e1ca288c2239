"""SavedModels that need nothing but TensorFlow to run, with model cards."""

import os
import platform
import posixpath
import sys
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import robust_keras
from robust_keras import own_folders, ownership, storage
from robust_keras.models import weights as named_weights
from robust_keras.saved_models import cards, claims, measured, signatures
from robust_keras.saved_models.opening import CARD, UNFINISHED, network_of
from robust_keras.saved_models.verifying.files import OURS

gfile = tf.io.gfile
# Where a run keeps weights: in which folder's newest snapshot, with which prefix to their names.
_KEPT = {"best": ("best", ""), "last": ("checkpoints", "weights/"), "last_averaged": ("checkpoints", "averages/")}

# What an export consists of.
_WRITTEN = ("variables", "assets", "claims", *OURS)


def export(
    network: keras.Model,
    directory: str | os.PathLike,
    *,
    card: Mapping[str, Any],
    gradient: bool = False,
    evaluation: str | None = None,
    load_images: Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]] | None = None,
) -> None:
    """Writes a network as a SavedModel that checks what it is given, with model cards, a manifest and its checker.

    `serving_default` takes `image`, float32 `[batch, height, width, channels]` in [0, 1]; `serving_uint8` takes bytes.
    Both return `logits` and `probabilities`, float32 `[batch, num_classes]`, and `class`, int64 `[batch]`. The batch
    size is free; gradients flow through the model. `signatures` has the details.
    What says that an export is under way is removed last.

    Args:
        network: a float32 `keras.Model` outside any strategy.
        directory: any `tf.io.gfile` path; an unfinished export in it is replaced.
        card: for the model cards, as JSON can hold it; what describes the network and the versions is added.
        gradient: whether to add a signature that returns gradients by the images, see `signatures.gradients`.
        evaluation: folder of a finished evaluation of these weights, whose numbers then stand in the cards and are
            claimed, see `claims.attach`.
        load_images: of the evaluation, see there.

    Raises:
        ValueError: where the folder holds a finished export, or something that is not one, another export is at work
            in it, or the evaluation is not of these weights; see `measured.of`.
    """
    directory = str(directory)
    if is_finished(directory):
        raise ValueError(f"Expected a folder without a finished export. Received: {directory}")
    described = {**cards.described(network, gradient=gradient), "versions": versions()}
    described |= cards.completed(card, num_classes=described["num_classes"])
    if evaluation is not None:
        described["evaluation"] = measured.of(network, evaluation)
        load_images = _loaded(evaluation, load_images)
    unfinished_path = posixpath.join(directory, UNFINISHED)
    with ownership.lock(directory, what="an export"):
        if set(gfile.listdir(directory)) - {ownership.lock_name()} and not gfile.exists(unfinished_path):
            raise ValueError(f"Expected an empty or new folder. Received: {directory}")
        storage.write_text(unfinished_path, "This export is under way, or was interrupted.\n")
        _remove_unfinished(directory)
        _write_saved_model(network, directory, gradient)
        storage.write_json(posixpath.join(directory, CARD), described)
        storage.write_text(posixpath.join(directory, "MODEL_CARD.md"), cards.readable(described))
        try:
            claims.attach(directory, evaluation=evaluation, load_images=load_images)
        except ValueError:  # Nobody is to take it for a model of which that is claimed.
            _remove_unfinished(directory)
            raise
        own_folders.remove(unfinished_path)


def export_keras(network: keras.Model, path: str) -> None:
    """Writes a network as a `.keras` file, for fine-tuning; loading it needs this package.

    Raises:
        ValueError: where the file exists.
    """
    if gfile.exists(path):
        raise ValueError(f"Expected a new file. Received: {path}")
    own_folders.check(path)
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
    network, description = network_of_snapshot(snapshot, posixpath.join(workdir, folder), prefix=prefix)
    if weights != "best":
        description["weights"] = {"last": "raw", "last_averaged": "averaged"}[weights]
    # The newest checkpoint also knows the last validation.
    validation = {name: snapshot.info[name] for name in ("best", "last_validation") if name in snapshot.info}
    config = storage.read_text(posixpath.join(workdir, "config.gin")) or None
    return network, {"step": snapshot.step, **description, "validation": validation, "config": config}


def network_of_snapshot(
    snapshot: storage.Snapshot, where: str, *, prefix: str = ""
) -> tuple[keras.Model, dict[str, Any]]:
    """The network of a snapshot of a training run, and what the run says of it but its architecture.

    Args:
        snapshot: of the run's best weights, or of its state.
        where: it lies, for messages.
        prefix: of the names of the weights, in a state 'weights/' or 'averages/'.

    Raises:
        ValueError: where these are no weights of a run, or not those of its architecture.
    """
    description = snapshot.info.get("description")
    if not isinstance(description, dict) or "architecture" not in description:
        raise ValueError(f"Expected the weights of a run in {where}. Received: others")
    description = dict(description)
    weight_bytes = sum(array.nbytes for array in snapshot.arrays.values())
    network = network_of(description.pop("architecture"), weight_bytes, where)
    arrays = {name.removeprefix(prefix): array for name, array in snapshot.arrays.items() if name.startswith(prefix)}
    named_weights.assign(network, arrays)
    return network, description


def is_finished(directory: str | os.PathLike) -> bool:
    """Whether the folder holds a finished export."""
    card, unfinished = (posixpath.join(str(directory), name) for name in (CARD, UNFINISHED))
    return gfile.exists(card) and not gfile.exists(unfinished)


def versions() -> dict[str, str]:
    """Versions of what numbers depend on, by package."""
    return {
        "robust_keras": robust_keras.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
        **({"jax": sys.modules["jax"].__version__} if "robust_keras.engines.on_jax.strategy" in sys.modules else {}),
    }


def _loaded(evaluation: str, load_images: Callable | None) -> Callable:
    """`load_images` of an evaluation after it was called: what is missing shows before anything is written."""
    dataset = (storage.read_object(posixpath.join(evaluation, "results.json")) or {}).get("dataset")
    if load_images is None or not dataset:
        raise ValueError(f"Expected an evaluation of a named data set, and load_images. Received: {evaluation}")
    images = load_images(dataset)
    return lambda _: images


def _remove_unfinished(directory: str) -> None:
    for name in _WRITTEN:
        path = posixpath.join(directory, name)
        own_folders.check(path)  # TensorFlow would write through a link.
        if gfile.isdir(path):
            own_folders.remove_folder(path)
        elif gfile.exists(path):
            own_folders.remove(path)


def _write_saved_model(network: keras.Model, directory: str, gradient: bool) -> None:
    """Not by `keras.export`, which writes every weight twice."""

    def images(dtype):
        return tf.TensorSpec((None, *network.input_shape[1:]), dtype, name="image")

    takes: dict[str, tuple] = {
        "serving_default": (signatures.floats(network), [images(tf.float32)]),
        "serving_uint8": (signatures.bytes_(network), [images(tf.uint8)]),
    }
    if gradient:
        labels = tf.TensorSpec((None,), tf.int64, name="label")
        takes["gradient"] = signatures.gradients(network), [images(tf.float32), labels]
    functions = {
        name: tf.function(function, input_signature=specs, autograph=False) for name, (function, specs) in takes.items()
    }
    saved = tf.Module()
    saved.weights = [variable.value for variable in network.variables]
    saved.functions = functions
    tf.saved_model.save(saved, directory, signatures=functions)
