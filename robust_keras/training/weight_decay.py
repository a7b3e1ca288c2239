"""Which weights an optimiser's weight decay leaves alone: scales and offsets of normalisation."""

import re
from typing import Any

import keras

# Names of the variables of this package's layers, and of Keras' normalisation layers and their relatives.
SCALES_AND_OFFSETS = ("scale", "offset", "gamma", "beta")
_UNNAMED = r"variable(_\d+)?"  # As Keras calls them.
NAMES = (*SCALES_AND_OFFSETS, _UNNAMED)  # Regular expressions of whole names.


def is_scale_or_offset(variable: keras.Variable) -> bool:
    """Whether a variable scales or shifts channels, by its name; without one of its own, as the layer scales of
    ConvNeXt, whether it is a number a channel.
    """
    name = variable.path.rsplit("/", 1)[-1]
    return name in SCALES_AND_OFFSETS or (len(variable.shape) == 1 and re.fullmatch(_UNNAMED, name) is not None)


def leave_out_scales(optimizer: keras.optimizers.Optimizer, network: keras.Model) -> None:
    """Tells an optimiser that decays weights to leave out scales and offsets, unless it was told what to leave out.

    `NesterovSGD` does so by itself.
    """
    inner: Any = getattr(optimizer, "inner_optimizer", optimizer)  # Of an optimiser that scales losses.
    # What `exclude_from_weight_decay` sets, for which Keras has no question.
    was_told = "_exclude_from_weight_decay" in vars(inner)
    if getattr(inner, "weight_decay", None) and not inner.built and not was_told:
        inner.exclude_from_weight_decay(var_list=[v for v in network.trainable_variables if is_scale_or_offset(v)])
