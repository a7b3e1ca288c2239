"""Any saved classifier as a function from images in [0, 1] to logits."""

import functools
import hashlib
import os
import posixpath
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import bounds, foreign_files, ownership, storage
from robust_keras.models import any_network
from robust_keras.models import weights as named_weights
from robust_keras.saved_models import safety
from robust_keras.saved_models.opening import UNFINISHED, load_keras, open_model
from robust_keras.saved_models.verifying.files import BESIDE_THE_MODEL

gfile = tf.io.gfile
# Files in a model's folder that are no part of the model.
_NOT_THE_MODEL = {UNFINISHED, ownership.lock_name(), *BESIDE_THE_MODEL}
# How a command is told which output to take.
_SAY = {
    "choose": "the logits' name with --logits_output",
    "hint": "; where there are other outputs, --logits_output names one",
}


def load_logits_fn(
    path: str | os.PathLike,
    *,
    input_range: Sequence[float] = (0.0, 1.0),
    input_layout: str = "NHWC",
    outputs: str = "logits",
    logits_output: str | None = None,
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Loads a classifier that this package or any other tool saved.

    Pixels are rounded to the nearest integer for a model that takes integers, and the gradient passes the rounding and
    the model's own cast as if they were not there (a straight-through estimator, Bengio et al. 2013,
    https://arxiv.org/abs/1308.3432). A model of a fixed batch size gets any batch, in
    parts of that size.

    Args:
        path: a SavedModel's folder or a `.keras` file.
        input_range: (low, high), the pixel values that the model takes for black and white. For a model that takes
            uint8, (0, 1) stands for (0, 255).
        input_layout: 'NHWC' or 'NCHW', as the model takes images.
        outputs: 'logits', or 'probabilities', whose logarithm then serves as logits.
        logits_output: name of the output that holds them; None for the only one, or the one named 'logits'.

    Returns:
        A function: float32 images NHWC in [0, 1] to float32 logits `[batch, num_classes]`, through which gradients
        flow. Its attributes are `name`, the path; `outputs`, as given; `input_range`, as it is applied; and
        `straight_through_cast`, whether the model takes integers and gradients pass its cast.

    Raises:
        ValueError: for a path that holds no model, one that takes anything but one batch of images, an input range
            that it cannot take, or no output that can be told to be the logits.
    """
    low, high = input_range
    _check_reading(low, high, input_layout, outputs)
    path = str(path)
    model = open_model(path)
    logits_of = functools.partial(any_network.logits_of, **_SAY)
    if model.dtype.is_integer:
        low, high = any_network.integer_range(low, high, model.dtype, hint="--input_range=0,255")
    batch_size = model.shape[0] if model.shape.rank else None

    @tf.autograph.experimental.do_not_convert  # Errors keep their one line.
    def logits_fn(x):
        x = bounds.from_unit(x, (low, high))
        if model.dtype.is_integer:
            x = any_network.rounded(x)
        if input_layout == "NCHW":
            x = tf.transpose(x, (0, 3, 1, 2))
        _check_shape(x, model.shape)
        y = any_network.in_parts(lambda part: logits_of(model.call(part), logits_output), x, batch_size)
        return any_network.log_probabilities(y) if outputs == "probabilities" else y

    logits_fn.name, logits_fn.outputs = path, outputs
    logits_fn.input_range, logits_fn.straight_through_cast = (low, high), model.is_straight_through
    return logits_fn


def as_logits_fn(
    network: Any, *, bounds: Sequence[float] | None = None, from_logits: bool | None = None
) -> Callable[[tf.Tensor], tf.Tensor]:
    """Any classifier as a function from images in [0, 1] to logits: saved, in memory, or a function itself.

    Args:
        network: the path of a SavedModel or a `.keras` file, or what `any_network.as_logits_fn` takes.
        bounds: see there.
        from_logits: see there.

    Raises:
        ValueError: see there and `load_logits_fn`.
    """
    if not isinstance(network, (str, os.PathLike)):
        return any_network.as_logits_fn(network, bounds=bounds, from_logits=from_logits)
    reading = any_network.read(network, bounds=bounds, from_logits=from_logits)
    outputs = "logits" if reading.from_logits else "probabilities"
    return load_logits_fn(network, input_range=reading.bounds, outputs=outputs)


def load_weights(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights of a network that this package made, NumPy arrays by their `models.weights.names`.

    Args:
        path: folder of a training run, whose best weights so far are taken, or a `.keras` file.

    Raises:
        ValueError: where it holds no weights.
    """
    path = str(path)
    if path.endswith(".keras") and gfile.exists(path):
        return {name: weight.numpy() for name, weight in named_weights.by_name(load_keras(path)).items()}
    snapshot = storage.read_newest(posixpath.join(path, "best"))
    if snapshot is None:
        raise ValueError(f"Expected the folder of a run that has best weights, or a .keras file. Received: {path}")
    return snapshot.arrays


def fingerprint(path: str | os.PathLike) -> str:
    """SHA-256 of a canonical manifest of a model's files: each line `<sha256>  <relative path>`, sorted by path.

    The model card and what `claims.attach` adds are no part of it, nor is where a folder lies and how it is named; a
    file's own name is.

    Raises:
        ValueError: where there is nothing, or anything but regular files; links count as what they point to where
            models are trusted.
    """
    path = str(path)
    if not gfile.exists(path):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}")
    if not gfile.isdir(path):
        foreign_files.check_regular(path, follow=True)
        files = [(posixpath.basename(path), path)]
    else:
        files = [
            (name, file)
            for name, file in foreign_files.regular_files(path, follow=safety.is_trusted())
            if name not in _NOT_THE_MODEL
        ]
    manifest = "".join(f"{storage.sha256(file)}  {name}\n" for name, file in sorted(files))
    return hashlib.sha256(manifest.encode()).hexdigest()


def _check_reading(low: float, high: float, input_layout: str, outputs: str) -> None:
    if input_layout not in ("NHWC", "NCHW"):
        raise ValueError(f"Expected an input layout out of NHWC, NCHW. Received: {input_layout!r}")
    if outputs not in ("logits", "probabilities"):
        raise ValueError(f"Expected outputs out of logits, probabilities. Received: {outputs!r}")
    if not low < high:
        raise ValueError(f"Expected an input range as low,high with low < high. Received: {low},{high}")


def _check_shape(x: tf.Tensor, expected: tf.TensorShape) -> None:
    if not expected[1:].is_compatible_with(x.shape[1:]):
        raise ValueError(
            f"Expected images of the model's shape {tuple(expected[1:])}. Received: {tuple(x.shape[1:])}; do "
            "--input_layout and the data set fit the model?"
        )
