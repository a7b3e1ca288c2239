"""Any saved classifier as a function from images in [0, 1] to logits."""

import hashlib
import posixpath

import keras
import numpy as np
import tensorflow as tf

from robust_keras import storage

gfile = tf.io.gfile


def load_logits_fn(path, *, input_range=(0.0, 1.0), input_layout="NHWC", outputs="logits", logits_output=None):
    """Loads a classifier that this package or any other tool saved.

    Args:
        path: a SavedModel's folder or a `.keras` file.
        input_range: (low, high), the pixel values that the model takes for black and white.
        input_layout: 'NHWC' or 'NCHW', as the model takes images.
        outputs: 'logits', or 'probabilities', whose logarithm then serves as logits.
        logits_output: name of the output that holds them; None for the only one, or the one named 'logits'.

    Returns:
        A function: float32 images NHWC in [0, 1] to float32 logits, through which gradients flow.

    Raises:
        ValueError: for a path that holds no model, or no output that can be told to be the logits.
    """
    if input_layout not in ("NHWC", "NCHW"):
        raise ValueError(f"Expected an input layout out of NHWC, NCHW. Received: {input_layout!r}")
    if outputs not in ("logits", "probabilities"):
        raise ValueError(f"Expected outputs out of logits, probabilities. Received: {outputs!r}")
    low, high = input_range
    if not low < high:
        raise ValueError(f"Expected an input range as low,high with low < high. Received: {low},{high}")
    path = str(path)
    if path.endswith(".keras") and gfile.exists(path):
        model = keras.models.load_model(path, compile=False)
        call = lambda x: model(x, training=False)  # noqa: E731
    elif gfile.exists(posixpath.join(path, "saved_model.pb")):
        call = _signature(tf.saved_model.load(path), path)
    else:
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}")

    @tf.autograph.experimental.do_not_convert  # Errors keep their one line.
    def logits_fn(x):
        if (low, high) != (0.0, 1.0):
            x = low + x * (high - low)
        if input_layout == "NCHW":
            x = tf.transpose(x, (0, 3, 1, 2))
        y = tf.cast(_pick(call(x), logits_output), tf.float32)
        return tf.math.log(tf.maximum(y, np.finfo(np.float32).tiny)) if outputs == "probabilities" else y

    logits_fn.name, logits_fn.outputs = path, outputs
    return logits_fn


def load_weights(path):
    """The weights of a network that this package made, NumPy arrays by name.

    Args:
        path: folder of a training run, whose best weights so far are taken, or a `.keras` file.

    Raises:
        ValueError: where it holds no weights.
    """
    path = str(path)
    if path.endswith(".keras") and gfile.exists(path):
        return {weight.path: weight.numpy() for weight in keras.models.load_model(path, compile=False).weights}
    snapshot = storage.read_newest(posixpath.join(path, "best"))
    if snapshot is None:
        raise ValueError(f"Expected the folder of a run that has best weights, or a .keras file. Received: {path}")
    return snapshot.arrays


def fingerprint(path):
    """SHA-256 of a canonical manifest of a model's files: each line `<sha256>  <relative path>`, sorted by path.

    The model card is no part of it.

    Raises:
        ValueError: where there is nothing.
    """
    path = str(path)
    if not gfile.exists(path):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}")
    if not gfile.isdir(path):
        files = [(posixpath.basename(path), path)]
    else:
        files = [
            (posixpath.relpath(posixpath.join(folder, name), path), posixpath.join(folder, name))
            for folder, _, names in gfile.walk(path)
            for name in names
            if name != "model_card.json"
        ]
    manifest = "".join(f"{storage.sha256(file)}  {name}\n" for name, file in sorted(files))
    return hashlib.sha256(manifest.encode()).hexdigest()


def _signature(loaded, path):
    if "serving_default" not in loaded.signatures:
        raise ValueError(f"Expected a signature serving_default. Received: {sorted(loaded.signatures)} in {path}")
    signature = loaded.signatures["serving_default"]
    inputs = signature.structured_input_signature[1]
    if len(inputs) != 1:
        raise ValueError(f"Expected a signature with one input. Received: {sorted(inputs)} in {path}")
    (name,) = inputs

    def call(x):
        if not inputs[name].shape.is_compatible_with(x.shape):
            raise ValueError(
                f"Expected images of the model's shape {tuple(inputs[name].shape[1:])} and a free batch. "
                f"Received: {tuple(x.shape)}; see --input_layout"
            )
        return signature(**{name: tf.cast(x, inputs[name].dtype)})

    call.loaded = loaded  # A SavedModel's variables live as long as the loaded object.
    return call


def _pick(outputs, name):
    if isinstance(outputs, (list, tuple)):
        outputs = {str(k): output for k, output in enumerate(outputs)}
    if not isinstance(outputs, dict):
        return outputs
    if name is None:
        name = "logits" if "logits" in outputs else next(iter(outputs)) if len(outputs) == 1 else None
    if name not in outputs:
        raise ValueError(
            f"Expected the logits' name with --logits_output, one of {', '.join(sorted(outputs))}. Received: {name!r}"
        )
    return outputs[name]
