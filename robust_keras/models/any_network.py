"""Any network as evaluation and attacks see it: a function from images in [0, 1] to logits.

logits_fn = as_logits_fn(network, bounds=(0, 255), from_logits=False)
logits_fn(x)  # float32 [batch, height, width, channels] in [0, 1] to float32 [batch, num_classes]
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from robust_keras import bounds as pixel_bounds
from robust_keras import threats
from robust_keras.models.normalization import MOVING, batch_norm_mode

_LEAST_CONTRAST = 0.05  # Between black and white, after the layers that a network begins with.


class Opened(NamedTuple):
    """A network with one input.

    Attributes:
        call: float32 images in the network's own range, layout and batch size to its outputs.
        shape: of the images it takes, with the batch.
        dtype: of the images it takes; where it takes integers, `call` is to be given whole numbers.
        is_straight_through: whether it takes integers and gradients pass its cast of them.
    """

    call: Callable[[tf.Tensor], Any]
    shape: tf.TensorShape
    dtype: tf.DType
    is_straight_through: bool


class Reading(NamedTuple):
    """A network and how it is read. What trains one says it of itself, as `AdversarialModel.reading` does.

    Attributes:
        network: a `keras.Model`, a function, or whatever else was given.
        bounds: `(low, high)`, the pixel values that it takes for black and white.
        from_logits: whether it returns logits.
        threat: what it is trained against; None where nothing says so.
    """

    network: Any
    bounds: tuple[float, float]
    from_logits: bool
    threat: threats.Threat | None = None

    def against(self, norm: str | None, epsilon: float | str | None) -> threats.Threat:
        """The threat model of a norm and a radius: those given, else the network's own.

        Raises:
            ValueError: for a norm or a radius that nothing gives; the network's own radius is none in another norm.
        """
        own = self.threat
        if own is not None and epsilon is None and norm in (None, own.norm):
            return own
        norm = own.norm if own is not None and norm is None else norm
        if norm is None or epsilon is None:
            raise ValueError(
                "Expected a threat model, such as norm='Linf', epsilon='8/255'. Received: "
                f"norm={norm!r}, epsilon={epsilon!r}"
            )
        return threats.threat(norm=norm, epsilon=epsilon)


def read(network: Any, *, bounds: Sequence[float] | None = None, from_logits: bool | None = None) -> Reading:
    """How a network is read: as it says itself, else as given, else as one of images in [0, 1] that returns logits.

    Raises:
        ValueError: for what contradicts the network's own, and bounds that are none.
    """
    own = getattr(network, "reading", None)
    given = None if bounds is None else pixel_bounds.parse(bounds)
    if not isinstance(own, Reading):
        return Reading(network, given or (0.0, 1.0), True if from_logits is None else from_logits)
    for name, value in (("bounds", given), ("from_logits", from_logits)):
        if value is not None and value != getattr(own, name):
            of = type(network).__name__
            raise ValueError(f"Expected {name}={getattr(own, name)}, as the {of} says. Received: {name}={value}")
    return own


def as_logits_fn(
    network: keras.Model | Callable, *, bounds: Sequence[float] | None = None, from_logits: bool | None = None
) -> Callable[[tf.Tensor], tf.Tensor]:
    """A network as evaluation sees it: with its moving statistics, without dropout and augmentation.

    Args:
        network: a `keras.Model`, or any function of images, float32 `[batch, ...]`, through which gradients flow.
        bounds: `(low, high)`, the pixel values that it takes for black and white; see `read`. For a Keras model that
            takes uint8, (0, 1) stands for (0, 255): pixels are rounded, and gradients pass the rounding.
        from_logits: whether it returns logits; False where it returns probabilities, whose logarithm then serves.

    Returns:
        A function: float32 images in [0, 1] to float32 logits `[batch, num_classes]`. Its attributes are those of the
        functions of `saved_models.load.load_logits_fn`, and `batch_size` where `network` has one, being a function.

    Raises:
        ValueError: see `read`; for what cannot be called, several inputs, or outputs that are not
            `[batch, num_classes]` of two classes or more; what shows in the outputs alone, when it is called.
    """
    network, (low, high), from_logits, _ = read(network, bounds=bounds, from_logits=from_logits)
    is_keras = isinstance(network, keras.Layer)
    opened = open_keras(network) if is_keras else _open_function(network)
    if opened.dtype.is_integer:
        low, high = integer_range(low, high, opened.dtype, hint="bounds=(0, 255)")
    if is_keras:
        _warn_of_bounds(network, low, high)
    has_logarithms = not is_keras and getattr(network, "outputs", None) == "probabilities"

    @tf.autograph.experimental.do_not_convert  # Errors keep their one line.
    def logits_fn(x):
        x = pixel_bounds.from_unit(x, (low, high))
        if opened.dtype.is_integer:
            x = rounded(x)
        if not opened.shape[1:].is_compatible_with(x.shape[1:]):
            expected, received = tuple(opened.shape[1:]), tuple(x.shape[1:])
            raise ValueError(f"Expected images of the network's shape {expected}. Received: {received}")
        y = in_parts(lambda part: logits_of(opened.call(part)), x, opened.shape[0] if opened.shape.rank else None)
        return y if from_logits or has_logarithms else log_probabilities(y)

    made: Any = logits_fn
    made.name = getattr(network, "name", None) or getattr(network, "__name__", type(network).__name__)
    made.outputs = "logits" if from_logits and not has_logarithms else "probabilities"
    made.input_range = low, high
    made.straight_through_cast = opened.is_straight_through
    if not is_keras and hasattr(network, "batch_size"):
        made.batch_size = network.batch_size
    return made


def _warn_of_bounds(network: keras.Layer, low: float, high: float) -> None:
    """Warns where the layers that a network begins with leave hardly anything of the difference of black and white."""
    black, white = np.asarray(low, np.float64), np.asarray(high, np.float64)
    for layer in _first_layers(network):
        if isinstance(layer, keras.layers.Rescaling):
            black, white = (value * np.asarray(layer.scale) + np.asarray(layer.offset) for value in (black, white))
        elif isinstance(layer, keras.layers.Normalization) and not layer.invert and layer.mean is not None:
            mean, variance = np.ravel(layer.mean), np.ravel(layer.variance)
            black, white = ((value - mean) / np.sqrt(variance) for value in (black, white))
    if (left := np.max(np.abs(white - black))) < _LEAST_CONTRAST:
        warnings.warn(
            f"With bounds=({low:g}, {high:g}) the first layers of {network.name!r} make black and white {left:.2g} "
            "apart; where it takes 0 to 255, say bounds=(0, 255)",
            stacklevel=3,
        )


def _first_layers(network: keras.Layer) -> Iterator[keras.Layer]:
    """The layers that a functional or Sequential model begins with, as long as they rescale or augment."""
    for layer in getattr(network, "layers", ()) if known_inputs(network) else ():
        if isinstance(layer, keras.Model):
            yield from _first_layers(layer)
            return
        if isinstance(layer, (keras.layers.Rescaling, keras.layers.Normalization)):
            yield layer
        elif not (isinstance(layer, keras.layers.InputLayer) or type(layer).__name__.startswith("Random")):
            return


def open_keras(model: keras.Layer, path: str = "") -> Opened:
    """A Keras model, in inference, as `Opened`.

    Args:
        model: a `keras.Model`, or a layer.
        path: where it was read from, for messages.

    Raises:
        ValueError: for a model of several inputs, outputs that can be no logits, or another backend of Keras.
    """
    if (backend := keras.config.backend()) != "tensorflow":
        raise ValueError(f"Expected Keras on TensorFlow; set KERAS_BACKEND=tensorflow. Received: Keras on {backend}")
    inputs = known_inputs(model)
    if not inputs:
        return Opened(functools.partial(evaluated, model), tf.TensorShape(None), tf.float32, False)
    if len(inputs) != 1:
        names = ", ".join(each.name for each in inputs)
        where = path or model.name
        raise ValueError(f"Expected a model with one input, the images. Received: {names} in {where}")
    shape, dtype = tf.TensorShape(inputs[0].shape), tf.as_dtype(inputs[0].dtype)
    if dtype.is_integer:  # A model converts what it is given to its inputs' type.
        model = on_input(model, keras.Input(batch_shape=inputs[0].shape, dtype="float32"))
    return Opened(functools.partial(evaluated, model), shape, dtype, dtype.is_integer)


def evaluated(model: keras.Layer, images: tf.Tensor) -> Any:
    """The outputs of a model of one input as evaluation has them: in inference, with moving statistics."""
    with batch_norm_mode(MOVING):
        return run(model, images, training=False)


def known_inputs(model: keras.Layer) -> Sequence[Any]:
    """The symbolic inputs of a model that knows them: not one that is built by its first call, or a subclass."""
    try:
        return getattr(model, "inputs", None) or ()
    except ValueError:  # Of a Sequential model in Keras 3.5.
        return ()


def run(model: keras.Layer, images: tf.Tensor, *, training: bool) -> Any:
    """The outputs of a model of one input, which may stand alone or in a list or dictionary."""
    return model(like_input(model, images), training=training)


def like_input(model: keras.Layer, images: Any) -> Any:
    """Images alone, or in a list or a dictionary, as a model of one input takes them."""
    # A Sequential model that nobody has called knows of no input in Keras 3.5.
    is_plain = isinstance(model, keras.Sequential) or not known_inputs(model)
    return images if is_plain else tf.nest.map_structure(lambda _: images, model.input)


def on_input(model: keras.Model, images: Any) -> keras.Model:
    """A model of the same layers, which knows its input, on another `keras.Input`."""
    if isinstance(model, keras.Sequential):  # Which Keras 3.5 cannot clone onto another input.
        return keras.Sequential([images, *model.layers], name=model.name)
    given = like_input(model, images)
    return keras.models.clone_model(model, input_tensors=given, clone_function=lambda layer: layer)


def _open_function(function: Any) -> Opened:
    if not callable(function):
        hint = "; saved_models.load.load_logits_fn opens files" if isinstance(function, str) else ""
        raise ValueError(f"Expected a keras.Model or a function from images to logits{hint}. Received: {function!r}")
    is_straight_through = bool(getattr(function, "straight_through_cast", False))
    return Opened(function, tf.TensorShape(None), tf.float32, is_straight_through)


def try_out(logits_fn: Callable, x: tf.Tensor, *, needs_gradients: bool = False) -> tf.Tensor:
    """Calls a function of `as_logits_fn` on some images, now, so that what is wrong with it shows in one line.

    Args:
        logits_fn: images to logits.
        x: float32 `[batch, ...]` in [0, 1].
        needs_gradients: whether to refuse logits that do not depend on the images by operations that have gradients.

    Returns:
        float32 logits `[batch, num_classes]`.

    Raises:
        ValueError: where it does not take the images, or does not return logits of each.
    """
    try:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(x)
            logits = logits_fn(x)
            total = tf.reduce_sum(logits)
        gradient = tape.gradient(total, x)
    except (TypeError, AttributeError, ValueError, LookupError, NotImplementedError, tf.errors.OpError) as error:
        if isinstance(error, ValueError) and str(error).startswith("Expected "):
            raise
        raise ValueError(
            f"Expected a network that takes images, float32 {tuple(x.shape)}, alone. Received: {reason(error)}"
        ) from error
    if logits.shape[0] != x.shape[0]:
        raise ValueError(f"Expected logits of each of {x.shape[0]} images. Received: {tuple(logits.shape)}")
    if needs_gradients and gradient is None:
        raise ValueError(
            "Expected a network through which gradients flow; of attacks, square alone needs none. Received: none from "
            "the logits to the images"
        )
    return logits


def sized(logits_fn: Callable, num_classes: int) -> Callable:
    """`logits_fn` in float32 and with a static shape: a loaded model may not tell how many classes it has."""

    def sized_logits_fn(x):
        return tf.ensure_shape(tf.cast(logits_fn(x), tf.float32), (x.shape[0], num_classes))

    return sized_logits_fn


def reason(error: Exception) -> str:
    """What went wrong, on one line, without the configuration of all around it that Keras adds."""
    text = str(error).rpartition("Exception encountered: ")[2].split("Full object config:")[0]
    return " ".join(text.split())[:300] or type(error).__name__  # A MemoryError has nothing to say.


def logits_of(
    outputs: Any,
    name: str | None = None,
    *,
    choose: str = "one output, the logits, as of lambda x: network(x)['NAME']",
    hint: str = "; one output p of two classes is [1 - p, p]",
) -> tf.Tensor:
    """The output of a model that holds the logits, float32 `[batch, num_classes]`.

    Args:
        outputs: a tensor, or several in a list or a dictionary.
        name: of the output; None for the only one, or the one named 'logits'.
        choose: what to expect where it cannot be told, for messages.
        hint: of how to name another output, for messages.

    Raises:
        ValueError: for several outputs of which none can be told, or one that can be no logits.
    """
    if isinstance(outputs, (list, tuple)):
        outputs = {str(k): output for k, output in enumerate(outputs)}
    if isinstance(outputs, dict):
        if name is None:
            name = "logits" if "logits" in outputs else next(iter(outputs)) if len(outputs) == 1 else None
        if name not in outputs:
            raise ValueError(f"Expected {choose}, one of {', '.join(sorted(outputs))}. Received: {name!r}")
        outputs = outputs[name]
    if not tf.is_tensor(outputs):
        raise ValueError(
            f"Expected a network of TensorFlow operations, which returns a tensor. Received: {type(outputs).__name__}"
        )
    if outputs.shape.rank not in (None, 2) or outputs.shape[-1] == 1:
        raise ValueError(
            f"Expected logits [batch, classes] of at least two classes{hint}. Received: an output of shape "
            f"{tuple(outputs.shape)}"
        )
    return tf.cast(outputs, tf.float32)


def log_probabilities(probabilities: tf.Tensor) -> tf.Tensor:
    """Their logarithm, finite where one is 0."""
    return tf.math.log(tf.maximum(probabilities, np.finfo(np.float32).tiny))


def integer_range(low: float, high: float, dtype: tf.DType, *, hint: str) -> tuple[float, float]:
    """The range of a model that takes integers; `hint` says how to give one.

    Raises:
        ValueError: for one in which an image would be black and white.
    """
    if dtype == tf.uint8 and (low, high) == (0.0, 1.0):
        return 0.0, 255.0
    if high - low <= 1 or low < dtype.min or high > dtype.max:
        raise ValueError(
            f"Expected a range of pixel values for a model that takes {dtype.name}, such as {hint}. "
            f"Received: {low},{high}"
        )
    return low, high


@tf.custom_gradient
def rounded(x: tf.Tensor) -> tf.Tensor:
    """Whole numbers; the gradient passes as if they were not rounded (Bengio et al. 2013)."""
    return tf.round(x), lambda upstream: upstream


def in_parts(fn: Callable, x: tf.Tensor, size: int | None) -> tf.Tensor:
    """`fn(x)` in parts of `size` examples; the last one is filled up with copies of the first example."""
    if size is None or x.shape[0] == size:
        return fn(x)
    num = tf.shape(x)[0] if x.shape[0] is None else x.shape[0]
    filled = tf.concat([x, tf.repeat(x[:1], -num % size, axis=0)], axis=0)
    parts = tf.reshape(filled, (-1, size, *x.shape[1:]))
    y = tf.map_fn(fn, parts, fn_output_signature=tf.float32)
    return tf.reshape(y, (-1, y.shape[-1]))[:num]
