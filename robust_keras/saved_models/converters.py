"""Networks for runtimes without TensorFlow: TFLite files for LiteRT, and ONNX files.

They take `image` and return what a SavedModel does, of any batch, but check no images: who calls them does.
"""

import os
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from robust_keras import own_folders
from robust_keras.saved_models import signatures

gfile = tf.io.gfile
# How far converted logits may be from the network's, relative to the largest: runtimes add in other orders.
TOLERANCE = 1e-4
_NUM_COMPARED = 8


def export_tflite(network: keras.Model, path: str | os.PathLike) -> float:
    """Writes a network as a TFLite file, by TensorFlow's converter.

    Args:
        network: a float32 `keras.Model`.
        path: of a new file.

    Returns:
        How far its logits are from the network's on images at random, relative to the largest.

    Raises:
        ValueError: where the file exists, the network cannot be converted, or logits differ by more than `TOLERANCE`.
    """
    _check_new(path)
    function, _ = _traced(network)
    # Of variables that are tracked as Keras' own, the converter would make ones that start empty.
    owner = tf.Module()
    owner.function, owner.weights = function, [variable.value for variable in network.variables]
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()], owner)
    try:
        content = converter.convert()
    except Exception as error:  # The converter's own, which is none of Python's kinds.
        raise ValueError(f"Expected a network that TFLite has. Received: {_first_line(error)}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # LiteRT is its successor, a package of its own.
        run = tf.lite.Interpreter(model_content=content).get_signature_runner()
    return _written(content, path, _difference(network, lambda images: run(image=images)["logits"], path))


def export_onnx(network: keras.Model, path: str | os.PathLike) -> float:
    """Writes a network as an ONNX file, by tf2onnx; see `export_tflite`.

    Raises:
        ValueError: see there, and where the packages of the extra `onnx` are missing.
    """
    _check_new(path)
    try:
        import onnx
        import onnxruntime
        import tf2onnx
    except ImportError as error:
        raise ValueError(
            f"Expected what ONNX needs, as pip install 'robust_keras[onnx]' brings it. Received: {error}"
        ) from error
    function, spec = _traced(network)
    try:
        model, _ = tf2onnx.convert.from_function(function, input_signature=[spec])
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"Expected a network that ONNX has. Received: {_first_line(error)}") from error
    # What the graph captured and is no variable, such as a Normalization's mean, would be an input of the model.
    concrete = function.get_concrete_function()
    captured = dict(zip((each.name for each in concrete.inputs[1:]), concrete.captured_inputs))
    is_read = {name for node in model.graph.node for name in node.input}
    for each in [each for each in model.graph.input if each.name in captured]:
        model.graph.input.remove(each)
        if each.name in is_read:
            model.graph.initializer.append(onnx.numpy_helper.from_array(captured[each.name].numpy(), each.name))
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    logits_fn = lambda images: session.run(["logits"], {"image": images})[0]  # noqa: E731
    return _written(content, path, _difference(network, logits_fn, path))


def _traced(network):
    """A function with its signature, which no batch but an empty one keeps from being converted."""
    spec = tf.TensorSpec((None, *network.input_shape[1:]), tf.float32, name="image")

    def classifier(image):
        return signatures.answers(tf.cast(network(image, training=False), tf.float32))

    return tf.function(classifier, input_signature=[spec], autograph=False), spec


def _check_new(path: str | os.PathLike) -> None:
    if gfile.exists(path):
        raise ValueError(f"Expected a new file. Received: {path}")


def _difference(network: keras.Model, logits_fn: Callable[[np.ndarray], np.ndarray], path: str | os.PathLike) -> float:
    images = np.random.default_rng(0).random((_NUM_COMPARED, *network.input_shape[1:]), np.float32)
    wanted = np.asarray(network(images, training=False))
    difference = float(np.abs(logits_fn(images) - wanted).max() / np.abs(wanted).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"Expected logits of {path} within {TOLERANCE:g} of the network's, relative to the largest. Received: "
            f"{difference:.2g}"
        )
    return difference


def _written(content: bytes, path: str | os.PathLike, difference: float) -> float:
    if folder := os.path.dirname(path):
        own_folders.make(folder)
    with own_folders.open_file(path, "wb") as file:
        file.write(content)
    return difference


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
