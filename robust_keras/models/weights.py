"""The weights of a network by name: in snapshots, in files, and from one network to another like it."""

import collections
import re
from collections.abc import Iterator, Mapping, Sequence

import keras
import numpy as np

from robust_keras.models import passes

_NUMBERED = re.compile(r"^variable_\d+$")


def names(network: keras.Model) -> list[str]:
    """A name for each of `network.weights`, in their order, no two alike.

    It is the weight's path. Layers of nested models can bear one name, and their weights one path: the second is then
    named `path#2`, and so on. What differs in the paths of a network and of one like it is left out: the name of a
    nested Sequential model, which is there if its call built it, and the number of a weight without a name of its own,
    such as ConvNeXt's layer scales, which Keras numbers through a process.

    Raises:
        ValueError: where a layer's own name makes two alike all the same.
    """
    count: collections.Counter[str] = collections.Counter()
    found = []
    sequential = set(_nested_sequentials(network))
    for weight in network.weights:
        *outer, layer, name = weight.path.split("/")
        path = "/".join([*(each for each in outer if each not in sequential), layer, _NUMBERED.sub("variable", name)])
        count[path] += 1
        found.append(path if count[path] == 1 else f"{path}#{count[path]}")
    if alike := [name for name, times in collections.Counter(found).items() if times > 1]:
        raise ValueError(f"Expected layers whose names tell their weights apart. Received: several named {alike[0]}")
    return found


def _nested_sequentials(network: keras.Layer) -> Iterator[str]:
    for layer in getattr(network, "layers", ()):
        if isinstance(layer, keras.Sequential):
            yield layer.name
        yield from _nested_sequentials(layer)


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
    refresh(network)


def refresh(network: keras.Model) -> None:
    """Has `Normalization` layers, nested ones too, compute anew what they keep of weights that were assigned to."""
    for layer in passes.inside(network):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()
