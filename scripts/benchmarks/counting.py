"""What a network has to compute, by its layers."""

import math
from typing import NamedTuple

import keras


class Count(NamedTuple):
    """Of one image's way through a network.

    Attributes:
        flops: operations of convolutions and dense layers; a multiplication and an addition are two.
        numbers: that these layers read and write, without weights. A network whose other layers cost no way to memory
            reads and writes no more.
    """

    flops: int
    numbers: int


def count(network: keras.Model) -> Count:
    """Counts a functional network."""
    flops = numbers = 0
    for layer in network.layers:
        if isinstance(layer, keras.Model):
            inner = count(layer)
            flops, numbers = flops + inner.flops, numbers + inner.numbers
        elif getattr(layer, "kernel", None) is not None:
            is_dense = isinstance(layer, keras.layers.Dense)
            places = math.prod(layer.output.shape[1:-1]) if not is_dense or len(layer.output.shape) > 2 else 1
            flops += 2 * places * math.prod(layer.kernel.shape)
            numbers += math.prod(layer.input.shape[1:]) + math.prod(layer.output.shape[1:])
    return Count(flops, numbers)
