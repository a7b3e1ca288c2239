"""The networks of `keras.applications`, with their ImageNet weights or new ones, from images in [0, 1] to logits."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras

from robust_keras.models import fine_tuning, weights

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALLEST = 32


def _standardised(images):
    scale = [1.0 / std for std in _IMAGENET_STD]
    offset = [-mean / std for mean, std in zip(_IMAGENET_MEAN, _IMAGENET_STD)]
    return _rescaled(images, scale, offset)


def _centred(images):
    return _rescaled(images, 2.0, -1.0)


def _centred_at_128(images):
    return _rescaled(images, 255.0 / 128.0, -1.0)


def _blue_first(images):
    return _rescaled(keras.ops.flip(images, axis=-1), 255.0, [-103.939, -116.779, -123.68])


def _rescaled(images, scale, offset):
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="pixels")(images)


# What each was trained on: the `preprocess_input` of its module, or the layers that it has for that.
_PIXELS = {
    **{f"ConvNeXt{size}": _standardised for size in ("Tiny", "Small", "Base", "Large", "XLarge")},
    **{f"DenseNet{depth}": _standardised for depth in (121, 169, 201)},
    **{f"EfficientNetV2B{k}": _standardised for k in range(4)},
    **{f"EfficientNetV2{size}": _centred_at_128 for size in "SML"},
    **{f"MobileNet{version}": _centred for version in ("", "V2", "V3Small", "V3Large")},
    **{f"ResNet{depth}": _blue_first for depth in (50, 101, 152)},
    **{f"ResNet{depth}V2": _centred for depth in (50, 101, 152)},
}
NAMES = tuple(_PIXELS)


def application(
    *,
    name: str,
    num_classes: int,
    weights: str | None = "imagenet",
    frozen: str | None = None,
    input_shape: tuple[int, int, int] = (224, 224, 3),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> keras.Model:
    """A network of `keras.applications` of any resolution, with a classifier of `num_classes`.

        network = application(name="ConvNeXtTiny", num_classes=10, input_shape=(64, 64, 3), frozen="stem|stage_[012]")

    Pixels are scaled inside, as each of them was trained, and other weights than the classifier's do not depend on the
    resolution. Under Keras' policy 'mixed_bfloat16' the layers that see pixels and the classifier stay float32.

    Args:
        name: one of `NAMES`, those whose classifier takes means over pixels and whose scaling of them is known.
        num_classes: number of logits.
        weights: 'imagenet', which Keras downloads once; a file of these weights (with the classifier of 1,000 classes),
            as Keras has them; or None for new ones. The classifier is new where there are not 1,000 classes.
        frozen: which layers are not trained, see `fine_tuning.freeze`.
        input_shape: of one image, (height, width, 3), each side at least 32.
        mean: not used, like `std`: the network has its own.
        std: see `mean`.

    Returns:
        A functional `keras.Model`: images `[batch, *input_shape]` in [0, 1] to float32 logits `[batch, num_classes]`.

    Raises:
        ValueError: for another name, shape or number of classes, and weights that could not be had.
    """
    del mean, std
    if not isinstance(name, str) or name not in _PIXELS:
        raise ValueError(f"Expected an application out of {', '.join(NAMES)}. Received: {name!r}")
    if num_classes < 2:
        raise ValueError(f"Expected num_classes >= 2. Received: {num_classes!r}")
    if len(input_shape) != 3 or input_shape[-1] != 3 or min(input_shape[:2]) < _SMALLEST:
        raise ValueError(f"Expected images (height, width, 3), sides of at least {_SMALLEST}. Received: {input_shape}")
    images = keras.Input(input_shape, name="image")
    make = getattr(keras.applications, name)
    settings: dict[str, Any] = {"classes": num_classes, "classifier_activation": None}
    if "include_preprocessing" in inspect.signature(make).parameters:
        settings["include_preprocessing"] = False
    # Not by `input_tensor`, which ConvNeXts of Keras 3.5 pass over.
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")  # With another one, Keras 3.5 puts casts of pixels into the network.
    try:
        made = make(weights=None, input_shape=tuple(input_shape), **settings)
    finally:
        keras.config.set_dtype_policy(policy)
    network = fine_tuning.placed_on(_PIXELS[name](images), images, made)
    if weights is not None:
        _assign(network, name, weights, has_their_classes=num_classes == 1000)
    fine_tuning.freeze(network, frozen)
    return network


def _assign(network: keras.Model, name: str, source: str, *, has_their_classes: bool) -> None:
    """Gives a network the weights that Keras has of it, but for a classifier of other classes."""
    try:
        theirs = weights.by_name(getattr(keras.applications, name)(weights=source))
    except Exception as error:  # Keras says so of downloads that fail.
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected weights of {name}, 'imagenet' or a file of Keras'. Received: {reason}") from error
    classifier = [layer for layer in fine_tuning.layers_of(network) if hasattr(layer, "kernel")][-1]
    new = set() if has_their_classes else {id(weight) for weight in classifier.weights}
    for key, weight in weights.by_name(network).items():
        if id(weight) not in new:
            weight.assign(theirs[key])
    weights.refresh(network)
