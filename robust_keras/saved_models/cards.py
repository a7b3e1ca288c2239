"""A model card, for programs and for people: what a network is, how it was made, and what was measured of it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from robust_keras.saved_models import measured
from robust_keras.saved_models.verifying.card import INTENDED_USE, LIMITS
from robust_keras.saved_models.verifying.card import readable as readable


def described(network: keras.Model, *, gradient: bool) -> dict[str, Any]:
    """What a card says of any network."""
    shape, num_classes = [*network.input_shape[1:]], network.output_shape[-1]
    image = {"image": f"float32 {['batch', *shape]} in [0, 1]"}
    return {
        "name": network.name,
        "num_parameters": sum(int(np.prod(weight.shape)) for weight in network.trainable_weights),
        "num_classes": num_classes,
        "inputs": {
            "serving_default": image,
            "serving_uint8": {"image": f"uint8 {['batch', *shape]}"},
            **({"gradient": {**image, "label": "int64 ['batch']"}} if gradient else {}),
        },
        "output": {
            "logits": f"float32 {['batch', num_classes]}",
            "probabilities": f"float32 {['batch', num_classes]}",
            "class": "int64 ['batch']",
        },
        "weights_sha256": measured.weights_digest(map(np.asarray, network.weights)),
        "intended_use": INTENDED_USE,
        "limits": list(LIMITS),
    }


def completed(card: Mapping[str, Any], *, num_classes: int) -> dict[str, Any]:
    """A card of a caller with the digest of its recipe.

    Raises:
        ValueError: for names of classes that are not as many as the network has.
    """
    names = card.get("class_names")
    if names is not None and len(names) != num_classes:
        raise ValueError(f"Expected {num_classes} class names, one for each output. Received: {len(names)}")
    config = card.get("config")
    digest = {"config_sha256": hashlib.sha256(config.encode()).hexdigest()} if isinstance(config, str) else {}
    return {**card, **digest}
