"""Models on disk as functions of what they take: SavedModels of any tool, and `.keras` files."""

import posixpath
import zipfile
from typing import Any

import keras
import tensorflow as tf

from robust_keras.models import keras_classes
from robust_keras.models.any_network import Opened, open_keras, reason
from robust_keras.saved_models import integer_inputs, safety

gfile = tf.io.gfile
# What an export writes last, and what it writes first and then removes.
CARD, UNFINISHED = "model_card.json", "unfinished"


def open_model(path: str) -> Opened:
    """Opens a SavedModel's folder or a `.keras` file, after a look at what is in there, see `safety.check`.

    Raises:
        ValueError: for a path that holds no model, half of one, one that takes anything but one batch of images, or one
            that would do more than compute.
    """
    if path.endswith(".keras") and gfile.exists(path) and not gfile.isdir(path):
        return open_keras(load_keras(path), path)
    if gfile.exists(posixpath.join(path, UNFINISHED)):
        raise ValueError(f"Expected a finished export. Received: {path}, which is under way or was interrupted")
    if gfile.exists(posixpath.join(path, "saved_model.pb")):
        return _open_saved_model(path)
    if not gfile.exists(path):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}, which does not exist")
    inner = posixpath.join(path, "saved_model")
    hint = f"; did you mean {inner}?" if gfile.exists(posixpath.join(inner, "saved_model.pb")) else ""
    raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}{hint}")


def load_keras(path: str) -> keras.Model:
    """Loads a `.keras` file, of Keras' and this package's classes alone; nothing in it is run.

    Raises:
        ValueError: for any other file.
    """
    if gfile.exists(path):
        safety.check(path, trusted=safety.is_trusted())
    try:
        return keras.models.load_model(
            path, custom_objects=keras_classes.custom_objects(), compile=False, safe_mode=True
        )
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, zipfile.BadZipFile) as error:
        raise ValueError(
            "Expected a .keras file of classes that Keras and this package have; a SavedModel, as model.export() "
            f"writes it, needs none. Received: {path} ({reason(error)})"
        ) from error


def _load(path: str) -> Any:
    safety.check(path, trusted=safety.is_trusted())
    return tf.saved_model.load(path)


def _open_saved_model(path: str) -> Opened:
    loaded = _load(path)
    if "serving_default" not in loaded.signatures:
        raise ValueError(
            f"Expected a signature serving_default, as tf.saved_model.save(..., signatures=FUNCTION) writes it. "
            f"Received: {sorted(loaded.signatures)} in {path}"
        )
    inputs = loaded.signatures["serving_default"].structured_input_signature[1]
    if len(inputs) != 1:
        raise ValueError(
            f"Expected a signature with one input, the images. Received: {', '.join(sorted(inputs))} in {path}"
        )
    ((name, spec),) = inputs.items()
    dtype, is_straight_through = spec.dtype, False
    if spec.dtype.is_integer and (floats := integer_inputs.load_with_float_input(path, "serving_default", load=_load)):
        loaded, is_straight_through, dtype = floats, True, tf.float32

    def call(x):  # A SavedModel's variables live as long as the loaded object.
        return loaded.signatures["serving_default"](**{name: tf.cast(x, dtype)})

    return Opened(call, spec.shape, spec.dtype, is_straight_through)
