"""Models on disk as functions of what they take: SavedModels of any tool, and `.keras` files."""

import contextlib
import logging
import posixpath
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.models import keras_classes
from robust_keras.models.any_network import Opened, open_keras, reason
from robust_keras.saved_models import integer_inputs, safety
from robust_keras.saved_models.safety import declared_weights, keras_config, keras_file

gfile = tf.io.gfile
# What an export writes last, and what it writes first and then removes.
CARD, UNFINISHED = "model_card.json", "unfinished"


def open_model(path: str) -> Opened:
    """Opens a SavedModel's folder or a `.keras` file, after a look at what is in there, see `safety.check`.

    Raises:
        ValueError: see `check`, and for a model that takes anything but one batch of images.
    """
    _check_is_model(path)
    return open_keras(load_keras(path), path) if _is_keras(path) else _open_saved_model(path)


def check(path: str) -> None:
    """Refuses what `open_model` would not open, without loading it.

    Raises:
        ValueError: for a path that holds no model, half of one, or one that would do more than compute.
    """
    _check_is_model(path)
    safety.check(path, trusted=safety.is_trusted())


def _check_is_model(path: str) -> None:
    if _is_keras(path):
        return
    if gfile.exists(posixpath.join(path, UNFINISHED)):
        raise ValueError(f"Expected a finished export. Received: {path}, which is under way or was interrupted")
    if not gfile.exists(posixpath.join(path, "saved_model.pb")):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}{_hint(path)}")


def _is_keras(path: str) -> bool:
    return path.endswith(".keras") and gfile.exists(path) and not gfile.isdir(path)


def _hint(path: str) -> str:
    if not gfile.exists(path):
        return ", which does not exist"
    inner = posixpath.join(path, "saved_model")
    return f"; did you mean {inner}?" if gfile.exists(posixpath.join(inner, "saved_model.pb")) else ""


def load_keras(path: str) -> keras.Model:
    """Loads a `.keras` file, of Keras' and this package's classes alone, after a look at what is in there.

    Raises:
        ValueError: for any other file, see `safety.check`.
    """
    is_trusted = safety.is_trusted()
    if not path.endswith(".keras") or gfile.isdir(path) or not gfile.exists(path):
        raise ValueError(f"Expected a .keras file. Received: {foreign_files.printable(path)}")
    safety.check(path, trusted=is_trusted)
    bounded = contextlib.nullcontext() if is_trusted else declared_weights.at_most(keras_file.weight_bytes(path))
    try:
        with bounded:
            return keras.models.load_model(
                path, custom_objects=keras_classes.custom_objects(), compile=False, safe_mode=not is_trusted
            )
    except Exception as error:  # What a file says can be wrong in many ways.
        raise ValueError(
            "Expected a .keras file of classes that Keras and this package have; a SavedModel, as model.export() "
            f"writes it, needs none. Received: {path} ({reason(error)})"
        ) from error


def network_of(architecture: Any, weight_bytes: int, where: str) -> keras.Model:
    """A network of an architecture that a file has as JSON, after a look at it; its weights are new.

    Args:
        architecture: as `model.to_json()` makes it.
        weight_bytes: of the weights that the file has for it.
        where: the file, for messages.

    Raises:
        ValueError: for other classes than are known, and weights that are larger than those there are.
    """
    where, bounded = foreign_files.printable(where), contextlib.ExitStack()
    try:
        with bounded:
            if not safety.is_trusted():
                keras_config.check(architecture if isinstance(architecture, str) else "")
                bounded.enter_context(declared_weights.at_most(weight_bytes))
            return keras.models.model_from_json(architecture, custom_objects=keras_classes.custom_objects())
    except Exception as error:  # As above.
        raise ValueError(
            "Expected a network of classes that are registered, with their module imported. "
            f"Received: {where} ({reason(error)})"
        ) from error


def _load(path: str) -> Any:
    safety.check(path, trusted=safety.is_trusted())
    try:
        with _escaped_logs():
            return tf.saved_model.load(path)
    except Exception as error:  # As above: operations that only compute may be put together to nothing.
        why = foreign_files.printable(reason(error), most=400)
        raise ValueError(f"Expected a SavedModel that TensorFlow can load. Received: {path} ({why})") from error


@contextlib.contextmanager
def _escaped_logs() -> Iterator[None]:
    """Inside, names out of a model that TensorFlow warns of steer no terminal."""

    def escape(record: logging.LogRecord) -> bool:
        record.msg, record.args = foreign_files.printable(record.getMessage(), most=1000), ()
        return True

    loggers = tf.get_logger(), logging.getLogger("absl")
    for logger in loggers:
        logger.addFilter(escape)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(escape)


def _input_of(loaded: Any, path: str) -> tuple[str, tf.TensorSpec]:
    """The name and the form of a loaded model's one input."""
    found = getattr(loaded, "signatures", None)
    signatures = found if isinstance(found, Mapping) else {}
    if "serving_default" not in signatures:
        raise ValueError(
            f"Expected a signature serving_default, as tf.saved_model.save(..., signatures=FUNCTION) writes it. "
            f"Received: {sorted(signatures)} in {path}"
        )
    _, inputs = getattr(signatures["serving_default"], "structured_input_signature", None) or ((), {})
    inputs = inputs if isinstance(inputs, Mapping) else {}
    if len(inputs) != 1 or not all(isinstance(each, tf.TensorSpec) for each in inputs.values()):
        given = foreign_files.printable(", ".join(sorted(inputs)))
        raise ValueError(f"Expected a signature with one input, the images. Received: {given} in {path}")
    ((name, spec),) = inputs.items()
    return name, spec


def _open_saved_model(path: str) -> Opened:
    loaded = _load(path)
    name, spec = _input_of(loaded, path)
    dtype, is_straight_through = spec.dtype, False
    # Of what a trusted model does beyond computing, _load told already; its copy does the same.
    load = tf.saved_model.load if safety.is_trusted() else _load
    if spec.dtype.is_integer and (floats := integer_inputs.load_with_float_input(path, "serving_default", load=load)):
        loaded, is_straight_through, dtype = floats, True, tf.float32

    def call(x):  # A SavedModel's variables live as long as the loaded object.
        return loaded.signatures["serving_default"](**{name: tf.cast(x, dtype)})

    return Opened(call, spec.shape, spec.dtype, is_straight_through)
