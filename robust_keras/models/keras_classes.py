"""The Keras classes of this package that saved networks name."""

import keras

from robust_keras.models import activations, normalization, wide_resnet

CLASSES = (activations.Activation, normalization.BatchNorm, wide_resnet.TruncatedNormal)


def custom_objects() -> dict[str, type]:
    """The classes by the names under which files know them, as Keras' functions that load a model take them.

    A file also holds the module that a class was in when it was written, which may since have moved.
    """
    return {keras.saving.get_registered_name(each): each for each in CLASSES}
