"""What an evaluation found of a network's weights, for its model card.

Two exports of the same weights are no equal files: names in their graphs count up. What counts are the weights, so the
evaluated model has to lie where the evaluation says, unchanged, and hold the weights that are exported.
"""

import hashlib
import os
import posixpath
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from robust_keras import storage
from robust_keras.saved_models import load
from robust_keras.saved_models.opening import check, load_keras

gfile = tf.io.gfile
# What a card takes over of results.json, next to the accuracies.
_TOLD = ("confidence_interval_95", "attacks", "robust_accuracy_after", "seed", "warnings", "dataset", "versions")
_ACCURACIES = ("clean_accuracy", "robust_accuracy")


def weights_digest(arrays: Iterable[np.ndarray]) -> str:
    """SHA-256 of the arrays of floats among them, in whatever order and whatever their names, each once: Keras writes
    the weights of a SavedModel twice.
    """
    floats = [each for each in map(np.ascontiguousarray, arrays) if each.dtype.kind == "f"]
    lines = {f"{each.dtype}{each.shape} {hashlib.sha256(each.tobytes()).hexdigest()}\n" for each in floats}
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def of(network: keras.Model, evaluation: str | os.PathLike) -> dict[str, Any]:
    """What a card says of an evaluation of these weights.

    Args:
        network: what is exported.
        evaluation: the folder that `scripts/evaluate.py` wrote.

    Raises:
        ValueError: for a folder without whole results, where the evaluated model is no longer what and where it was,
            and where its weights are others.
    """
    path = posixpath.join(os.fspath(evaluation), "results.json")
    results = storage.read_object(path)
    if results is None:
        raise ValueError(f"Expected the folder of a finished evaluation. Received: {evaluation}")
    _check(results, path)
    model = results["model"]
    if not gfile.exists(model["path"]):
        raise ValueError(
            f"Expected the evaluated model, to compare its weights. Received: {path}, of {model['path']}, which does "
            "not exist"
        )
    if load.fingerprint(model["path"]) != model["sha256"]:
        raise ValueError(f"Expected the model as it was evaluated. Received: {model['path']}, which has changed since")
    if _weights_of(model["path"], network) != weights_digest(_arrays(network)):
        raise ValueError(f"Expected an evaluation of the weights that are exported. Received: {path}, of others")
    told = {name: results[name] for name in _TOLD if name in results}
    counts = {"num_examples": results["num_examples"], **{name: results[name] for name in _ACCURACIES}}
    threat = {name: results[name] for name in ("norm", "epsilon", "epsilon_fraction")}
    return {**counts, **threat, **told, "model_sha256": model["sha256"], "results_sha256": storage.sha256(path)}


def _check(results: dict[str, Any], path: str) -> None:
    model, interval = results.get("model"), results.get("confidence_interval_95")
    accuracies = [results.get(name) for name in _ACCURACIES]
    if isinstance(interval, list) and len(interval) == 2:
        accuracies += interval
    is_whole = (
        isinstance(model, dict)
        and isinstance(model.get("path"), str)
        and isinstance(results.get("num_examples"), int)
        and all(isinstance(each, (int, float)) and 0 <= each <= 1 for each in accuracies)
        and len(accuracies) == 4
        and isinstance(results.get("norm"), str)
        and isinstance(results.get("epsilon_fraction"), str)
        and isinstance(results.get("epsilon"), float)
        and all(isinstance(results.get(name), list) for name in ("attacks", "warnings"))
        and all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in results["attacks"])
    )
    if not is_whole:
        raise ValueError(f"Expected the results of an evaluation of a saved model. Received: {path}")


def _arrays(network: keras.Model) -> Iterable[np.ndarray]:
    return (np.asarray(weight) for weight in network.weights)


def _weights_of(path: str, network: keras.Model) -> str | None:
    """The digest of a saved model's weights; None where their shapes are not the network's."""
    if not gfile.isdir(path):
        return weights_digest(_arrays(load_keras(path)))
    check(path)  # The index of its variables may be a stranger's.
    reader = tf.train.load_checkpoint(posixpath.join(path, "variables", "variables"))
    types = reader.get_variable_to_dtype_map()
    floats = {name: shape for name, shape in reader.get_variable_to_shape_map().items() if types[name].is_floating}
    # Before anything is read: what somebody else wrote may claim to be huge.
    if set(map(tuple, floats.values())) != {tuple(each.shape) for each in network.weights if _is_float(each)}:
        return None
    return weights_digest(reader.get_tensor(name) for name in floats)


def _is_float(weight: Any) -> bool:
    return tf.as_dtype(weight.dtype).is_floating
