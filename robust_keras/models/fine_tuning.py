"""What a pre-trained network's fine-tuning needs of it: layers that stay as they are, and pixels that stay float32."""

import re
from collections.abc import Iterator
from typing import Any

import keras


def freeze(network: keras.Model, frozen: str | None) -> None:
    """Makes layers untrainable. Stock normalisation among them stays in inference, as Keras has it.

    Args:
        network: any.
        frozen: a regular expression that is searched for in the layers' names, also of layers inside others, such as
            'stem|stage_[012]'; None for no layer.

    Raises:
        ValueError: where it is no expression, is in no layer's name, or leaves nothing to train.
    """
    if frozen is None:
        return
    try:
        pattern = re.compile(frozen)
    except re.error as error:
        raise ValueError(f"Expected a regular expression of layers to freeze. Received: {frozen!r}, {error}") from error
    layers = [layer for layer in layers_of(network) if layer.weights]
    found = [layer for layer in layers if pattern.search(layer.name)]
    if not found:
        names = ", ".join(layer.name for layer in layers)
        raise ValueError(f"Expected a part of the layers' names, {names[:200]} .... Received: {frozen!r}")
    for layer in found:
        layer.trainable = False
    if not network.trainable_weights:
        raise ValueError(f"Expected frozen layers that leave some to train. Received: {frozen!r}, which is all of them")


def layers_of(network: keras.Model) -> Iterator[Any]:
    """The innermost layers of a network, in order."""
    for layer in network.layers:
        yield from layers_of(layer) if isinstance(layer, keras.Model) else [layer]


def placed_on(x: Any, images: Any, network: keras.Model) -> keras.Model:
    """A functional network like another in float32, with new weights and Keras' policy, of `x`, made of `images`.

    The layers up to the first kernel, and from the last one, stay in float32: bfloat16 would move pixels by up to half
    a byte. All layers, also of Sequential parts, are the network's own: a model inside would cast what it is given to
    the policy, whatever that of its layers.
    """
    layers = [layer for layer in layers_of(network) if not isinstance(layer, keras.layers.InputLayer)]
    kernels = [k for k, layer in enumerate(layers) if hasattr(layer, "kernel")]
    spared = {layer.name for layer in [*layers[: kernels[0] + 1], *layers[kernels[-1] :]]}

    def copied(layer):
        if isinstance(layer, keras.Sequential):
            return keras.Sequential([copied(each) for each in layer.layers], name=layer.name)
        config = layer.get_config()
        if isinstance(layer, keras.Layer):  # And no bare operation, such as a sum.
            config["dtype"] = "float32" if layer.name in spared else keras.config.dtype_policy().name
        return type(layer).from_config(config)

    def called(layer, *args, **kwargs):
        args = tuple(x if each is images else each for each in args)
        if not isinstance(layer, keras.Sequential):
            return layer(*args, **kwargs)
        (y,) = args
        for each in layer.layers:
            y = each(y)
        return y

    return keras.models.clone_model(network, input_tensors=images, clone_function=copied, call_function=called)
