"""The network that weights belong to, and the weights put into it."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import keras
import numpy as np

from robust_keras.foreign_files import printable
from robust_keras.models import norm_act, preact_resnet, wide_resnet
from robust_keras.models import weights as named_weights
from robust_keras.saved_models.safety import declared_weights
from robust_keras.saved_models.weights_in.checkpoint import why
from robust_keras.saved_models.weights_in.selection import Found
from robust_keras.saved_models.weights_in.tensors import BFLOAT16

_MOST_BLOCKS, _MOST_WIDTH = 64, 64  # In a group; WRN-106-16 has 17.
# PyTorch's moving statistics are no debiased averages: after so many updates those here are none either.
_NUM_UPDATES = 10_000
_PREACT_DEPTHS = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}


class Dataset(NamedTuple):
    """What the authors' networks do with the images of a data set.

    Attributes:
        num_classes: of its labels.
        input_shape: of an image.
        mean: per channel.
        std: per channel.
        padding: black pixels around an image.
    """

    num_classes: int
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    padding: int = 0


DATASETS = {
    "cifar10": Dataset(10, (32, 32, 3), (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
    "cifar100": Dataset(100, (32, 32, 3), (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "mnist": Dataset(10, (28, 28, 1), (0.5,), (0.5,), padding=2),
}


class Architecture(NamedTuple):
    """A network without its weights.

    Attributes:
        network: the function in `models` that makes it.
        settings: its arguments.
    """

    network: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """As papers write it, such as WRN-28-10."""
        depth = self.settings["depth"]
        return f"WRN-{depth}-{self.settings['width']}" if self.network == "wide_resnet" else f"PreActResNet-{depth}"

    def build(self) -> keras.Model:
        """The network, with weights at random."""
        if self.network == "wide_resnet":
            return wide_resnet.wide_resnet(**self.settings)
        return preact_resnet.preact_resnet(**self.settings)


def architecture(found: Found, dataset: str, activation: str) -> Architecture:
    """The network that tensors belong to, of their names and shapes.

    Args:
        found: the tensors.
        dataset: one of `DATASETS`; a mean and std in the file come first.
        activation: of the network, which no file says.

    Raises:
        ValueError: for another data set or activation, and tensors of no depth or width that there is.
    """
    if dataset not in DATASETS:
        raise ValueError(f"Expected a dataset out of {', '.join(DATASETS)}. Received: {printable(dataset)}")
    activation = norm_act.activation_named(activation)
    known = DATASETS[dataset]
    shapes = {f"{layer}/{weights[0]}": found.tensors[name].shape for name, (layer, weights) in found.ours.items()}
    is_torch = found.family.format == "torch"
    classes = _num_outputs(shapes.get("logits/kernel"), is_torch)
    if classes != known.num_classes:
        raise ValueError(f"Expected logits of {known.num_classes} classes, for {dataset}. Received: {classes}")
    normalization = {"mean": known.mean, "std": known.std, **found.normalization}
    settings = {"num_classes": classes, "activation": activation, "input_shape": known.input_shape, **normalization}
    return Architecture(found.family.network, settings | {"padding": known.padding} | _size(found, shapes, is_torch))


def _size(found: Found, shapes: Mapping[str, tuple[int, ...]], is_torch: bool) -> dict[str, Any]:
    """Depth and width."""
    pattern = r"layer\.(\d)\.block\.(\d+)\." if found.family.network == "wide_resnet" else r"layer_(\d)\.(\d+)\."
    blocks = {match.groups() for layer, _ in found.ours.values() if (match := re.match(pattern, layer))}
    counts = tuple(sum(group == str(k) for group, _ in blocks) for k in range(4))
    if found.family.network == "preact_resnet":
        if counts not in _PREACT_DEPTHS:
            raise ValueError(f"Expected the blocks of PreActResNet-18 or -34. Received: {counts} in its groups")
        return {"depth": _PREACT_DEPTHS[counts]}
    channels = _num_outputs(shapes.get("layer.0.block.0.conv_0/kernel"), is_torch)
    if not 0 < counts[0] <= _MOST_BLOCKS or channels % 16 or not 0 < channels // 16 <= _MOST_WIDTH:
        expected = f"1 to {_MOST_BLOCKS} blocks of 16 to {16 * _MOST_WIDTH} channels in the first group"
        raise ValueError(f"Expected {expected}. Received: {counts[0]} of {channels}")
    projects = channels > 16 or any(layer == "layer.0.block.0.shortcut" for layer, _ in found.ours.values())
    return {"depth": 6 * counts[0] + 4, "width": channels // 16, "projects_equal_widths": projects}


def _num_outputs(shape: tuple[int, ...] | None, is_torch: bool) -> int:
    return (shape or (0,))[0 if is_torch else -1]


def load(found: Found, made: Architecture) -> keras.Model:
    """Builds the network and gives it the tensors, each exactly once.

    Raises:
        ValueError: names a tensor that is missing, of no use, of another shape or type, damaged, or not finite.
    """
    num_bytes = sum(tensor.num_bytes for tensor in found.tensors.values())
    try:  # A few tensors can be those of a network of any depth and width.
        with declared_weights.at_most(num_bytes):
            network = made.build()
    except ValueError as error:
        raise ValueError(f"Expected tensors of a {made.name}. Received: {num_bytes:,} bytes ({error})") from error
    weights = named_weights.by_name(network)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    used = _used(found, made, shapes)
    for name, weight in weights.items():
        weight.assign(_values(used[name], found, shapes[name]) if name in used else _NUM_UPDATES)
    named_weights.refresh(network)
    return network


def _used(found: Found, made: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """The tensor's name for each of our weights."""
    used: dict[str, str] = {}
    for name, (layer, candidates) in found.ours.items():
        ours = next((f"{layer}/{each}" for each in candidates if f"{layer}/{each}" in shapes), None)
        if ours is None or ours in used:
            twice = f", like {printable(used[ours])}" if ours else ""
            raise ValueError(f"Expected tensors of a {made.name}. Received: {printable(name)}{twice}")
        theirs = found.tensors[name]
        shape = _arranged(np.broadcast_to(np.int8(0), theirs.shape), found, shapes[ours]).shape
        if shape != shapes[ours] or not _fits(theirs.storage.dtype, ours):
            received = f"{printable(name)} of shape {theirs.shape}, {theirs.storage.dtype}"
            raise ValueError(f"Expected tensors of a {made.name}. Received: {received}, for {ours} {shapes[ours]}")
        used[ours] = name
    missing = [name for name in shapes if name not in used]
    if found.family.format == "torch":
        missing = [name for name in missing if not name.endswith("/num_updates")]
    if missing:
        raise ValueError(f"Expected all tensors of a {made.name}. Received: none for {missing[0]}")
    return used


def _fits(dtype: np.dtype, ours: str) -> bool:
    return dtype.kind in "iu" if ours.endswith("/num_updates") else dtype.kind == "f" or dtype == BFLOAT16


def _arranged(array: np.ndarray, found: Found, shape: tuple[int, ...]) -> np.ndarray:
    """An array with its axes as they are here: PyTorch has output channels first, Haiku vectors with axes of one."""
    if found.family.format == "torch":
        return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    while array.ndim > len(shape) and array.shape[0] == 1:
        array = array[0]
    return array


def _values(name: str, found: Found, shape: tuple[int, ...]) -> np.ndarray:
    try:
        stored = found.tensors[name].values()
    except ValueError as error:  # Damaged bytes.
        raise ValueError(f"Expected whole tensors. Received: {printable(name)}, {why(error)}") from error
    with np.errstate(over="ignore"):
        values = np.asarray(_arranged(stored, found, shape), np.float32, order="C")
    if not np.isfinite(values).all() or (found.ours[name][1] == ("moving_variance",) and values.min() < 0):
        raise ValueError(f"Expected finite weights, and variances of 0 or more. Received: others in {printable(name)}")
    return values
