"""The weights of a network by name: in snapshots, in files, and from one network to another like it."""

import collections
from collections.abc import Mapping, Sequence

import keras
import numpy as np


def names(network: keras.Model) -> list[str]:
    """A name for each of `network.weights`, in their order, no two alike.

    It is the weight's path. Layers of nested models can bear one name, and their weights one path: the second is then
    named `path#2`, and so on.

    Raises:
        ValueError: where a layer's own name makes two alike all the same.
    """
    count: collections.Counter[str] = collections.Counter()
    found = []
    for weight in network.weights:
        count[weight.path] += 1
        found.append(weight.path if count[weight.path] == 1 else f"{weight.path}#{count[weight.path]}")
    if alike := [name for name, times in collections.Counter(found).items() if times > 1]:
        raise ValueError(f"Expected layers whose names tell their weights apart. Received: several named {alike[0]}")
    return found


def by_name(network: keras.Model) -> dict[str, keras.Variable]:
    """The weights of a network by their `names`."""
    return dict(zip(names(network), network.weights, strict=True))


def random_states(network: keras.Model) -> list[keras.Variable]:
    """What layers such as Dropout draw their next random numbers from, in the layers' order.

    Keras numbers these through a process, so that their names tell nothing.
    """
    weights = {id(weight) for weight in network.weights}
    return [variable for variable in network.variables if id(variable) not in weights]


def assign(network: keras.Model, arrays: Mapping[str, np.ndarray], known: Sequence[str] | None = None) -> None:
    """Gives a network weights by name.

    Args:
        network: any.
        arrays: NumPy arrays by name, one for each of its weights.
        known: the names of its weights, in their order; None for its own.

    Raises:
        ValueError: for a missing or unknown name, or an array of another shape.
    """
    weights = dict(zip(known or names(network), network.weights, strict=True))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    given = {name: tuple(array.shape) for name, array in arrays.items()}
    if shapes != given:
        name = min(name for name in shapes.keys() | given.keys() if shapes.get(name) != given.get(name))
        raise ValueError(
            f"Expected weights of this network. Received: {name} of shape {given.get(name)}, not {shapes.get(name)}"
        )
    for name, weight in weights.items():
        weight.assign(arrays[name])
