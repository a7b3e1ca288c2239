"""A network from a `.keras` file, as the one that a run trains further."""

from collections.abc import Sequence
from typing import Any

import keras

from robust_keras import bounds as pixel_bounds
from robust_keras.models import any_network, fine_tuning
from robust_keras.saved_models.opening import load_keras


def load_network(
    *,
    path: str,
    num_classes: int,
    input_range: Sequence[float] = (0.0, 1.0),
    new_classifier: bool = False,
    frozen: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> keras.Model:
    """A network with the weights of a `.keras` file, of Keras' and this package's classes alone; nothing in it is run.

        network = load_network(path="clean.keras", num_classes=7, new_classifier=True, input_shape=(96, 96, 3))

    Args:
        path: the file.
        num_classes: number of logits.
        input_range: (low, high), the pixel values that the network takes for black and white.
        new_classifier: whether a new layer takes the place of its last one.
        frozen: which layers are not trained, see `fine_tuning.freeze`.
        input_shape: of one image, (height, width, channels), where it is another one than the file's: the network then
            has to be one whose weights do not depend on the resolution.
        mean: not used, like `std`: the network has its own.
        std: see `mean`.

    Returns:
        A `keras.Model`: images `[batch, *input_shape]` in [0, 1] to logits `[batch, num_classes]`. A softmax at the end
        is taken off.

    Raises:
        ValueError: for a file that is none, a network of several inputs, another number of classes, and images that it
            cannot take.
    """
    del mean, std
    if keras.config.dtype_policy().compute_dtype != "float32":
        raise ValueError("Expected dtype_policy = 'float32' with a network from a file. Received: another one")
    low, high = pixel_bounds.parse(input_range)
    network = _without_softmax(load_keras(str(path)), path, new_classifier=new_classifier)
    given = any_network.known_inputs(network)[0].shape[1:]
    images = keras.Input(input_shape or given, name="image")
    x = images if (low, high) == (0.0, 1.0) else keras.layers.Rescaling(high - low, low, name="pixels")(images)
    try:
        if input_shape is not None and tuple(input_shape) != tuple(given):
            network = any_network.on_input(network, keras.Input(input_shape))
        x = network(any_network.like_input(network, x))
    except ValueError as error:
        received = f"{any_network.reason(error)} in {path}"
        raise ValueError(f"Expected a network that takes images {input_shape}. Received: {received}") from error
    if new_classifier:
        x = keras.layers.Dense(num_classes, name="logits")(x)
    if len(x.shape) != 2 or x.shape[-1] != num_classes:
        raise ValueError(
            f"Expected logits of {num_classes} classes; with new_classifier=True the last layer is replaced. Received: "
            f"{tuple(x.shape)} in {path}"
        )
    made = keras.Model(images, x, name=network.name)
    fine_tuning.freeze(made, frozen)
    return made


def _without_softmax(network: keras.Model, path: Any, *, new_classifier: bool) -> keras.Model:
    """The network up to its logits, or up to what its classifier is given."""
    if len(any_network.known_inputs(network)) != 1 or len(network.outputs) != 1:
        raise ValueError(f"Expected a network that knows its one input and one output. Received: another one in {path}")
    last = network.layers[-1]
    if isinstance(last, keras.layers.Softmax) or getattr(last, "activation", None) is keras.activations.softmax:
        if not hasattr(last, "kernel"):
            network = keras.Model(network.inputs[0], last.input, name=network.name)
        else:
            last.activation = keras.activations.linear
    if not new_classifier:
        return network
    classifier = network.layers[-1]
    if not hasattr(classifier, "kernel"):
        raise ValueError(f"Expected a classifier at the end, to replace. Received: {classifier.name} in {path}")
    return keras.Model(network.inputs[0], classifier.input, name=network.name)
