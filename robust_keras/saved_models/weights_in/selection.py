"""Finds the weights of one network among what a file holds, and gives each its name here."""

import collections
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from robust_keras.foreign_files import printable
from robust_keras.saved_models.weights_in import tensors
from robust_keras.saved_models.weights_in.checkpoint import Checkpoint
from robust_keras.saved_models.weights_in.families import FAMILIES, OTHERS, Family
from robust_keras.saved_models.weights_in.haiku_files import Array
from robust_keras.saved_models.weights_in.tensors import Tensor

# How deep a file may keep its weights in other things, how many names it may have there, and how long they may be: an
# object of a pickle may lie in many places, whose names are made of those around them.
_MOST_DEPTH, _MOST_NAMES, _MOST_CHARACTERS = 4, 250_000, 200
_NETWORKS = "weights of a wide_resnet or preact_resnet under the names of the authors' code"


class Found(NamedTuple):
    """The weights of one network.

    Attributes:
        family: how they are named.
        key: where in the file they are; '' where they are all of it.
        tensors: by their names in the file.
        ours: for each of these, our layer and the weights of it that it may be.
        dropped: names of those that are left out by rule.
        normalization: the means and deviations by channel where the file has them, 'mean' and 'std'.
    """

    family: Family
    key: str
    tensors: dict[str, Tensor]
    ours: dict[str, tuple[str, tuple[str, ...]]]
    dropped: list[str]
    normalization: dict[str, list[float]]


class _Candidate(NamedTuple):
    """A place in a file that holds a network's first convolution."""

    key: str
    family: Family
    prefix: str
    named: Mapping[str, Any]


def find(checkpoint: Checkpoint, key: str | None = None) -> Found:
    """The weights of the one network in a file, or of the one that `key` names.

    Args:
        checkpoint: an open file.
        key: of the weights' place, such as `state_dict` or `ema.module`.

    Raises:
        ValueError: where there is none, or several; names a tensor that is of no use, or cannot be read.
    """
    everything = _Tree(checkpoint.content)
    found = list(_candidates(checkpoint, everything))
    wanted = [each for each in found if key is None or f".{key}." in f".{each.key}."]
    if len(wanted) == 1:
        beside = sum(each.named is wanted[0].named for each in found)
        return _named(wanted[0], checkpoint.num_bytes, several=beside > 1)
    if not found:
        raise ValueError(f"Expected {_NETWORKS}. Received: {_without_network(everything)}")
    keys = printable(", ".join(each.key or "(all of the file)" for each in found))
    raise ValueError(f"Expected --key out of {keys}. Received: {'none' if key is None else printable(key)}")


class _Tree:
    """Dictionaries of a file, with their places, to a depth of `_MOST_DEPTH`.

    Attributes:
        places: (place, dictionary) for each, every dictionary once.

    Raises:
        ValueError: for too many names, and for long ones.
    """

    def __init__(self, content: Any) -> None:
        self.places: list[tuple[str, dict]] = []
        seen: set[int] = set()
        waiting, num_names = collections.deque([("", content, 0)]), 0
        while waiting:
            place, each, depth = waiting.popleft()
            if id(each) in seen or depth > _MOST_DEPTH:
                continue
            seen.add(id(each))
            if isinstance(each, dict):
                self.places.append((place, each))
                inner = list(each.items())
                num_names += len(inner)
                _check_number(num_names)
                if long := next((name for name in each if len(str(name)) > _MOST_CHARACTERS), None):
                    expected = f"names of at most {_MOST_CHARACTERS} characters"
                    raise ValueError(f"Expected {expected}. Received: {printable(long, most=_MOST_CHARACTERS)}")
            elif type(each) in (list, tuple) and len(each) <= 8:
                inner = list(enumerate(each))
            else:
                continue
            waiting += [(f"{place}.{name}".lstrip("."), value, depth + 1) for name, value in inner if _may_hold(value)]


def _check_number(num_names: int) -> None:
    if num_names > _MOST_NAMES:
        raise ValueError(f"Expected at most {_MOST_NAMES:,} names in a file. Received: more")


def _may_hold(value: Any) -> bool:
    return isinstance(value, dict) or type(value) in (list, tuple)


def _candidates(checkpoint: Checkpoint, tree: _Tree) -> Iterator[_Candidate]:
    if checkpoint.format == "haiku":
        yield from _haiku_candidates(tree)
        return
    for place, named in tree.places:
        for name in filter(lambda each: type(each) is str, named):
            for family in FAMILIES:
                if family.format == "torch" and f".{name}".endswith(f".{family.stem}"):
                    prefix = name.removesuffix(family.stem)
                    key = ".".join(filter(None, (place, prefix.rstrip("."))))
                    yield _Candidate(key, family, prefix, named)


def _haiku_candidates(tree: _Tree) -> Iterator[_Candidate]:
    """Parameters, each with the file's state: modules of dictionaries, by names such as `net/~/init_conv`."""
    parameters, states, num_names = [], {}, 0
    for place, modules in tree.places:
        num_names += sum(len(content) for content in modules.values() if isinstance(content, dict))
        _check_number(num_names)
        flat = _flat(modules)
        for family in FAMILIES:
            stems = [name for name in flat if family.format == "haiku" and f"/{name}".endswith(f"/{family.stem}")]
            parameters += [(place, family, stem.removesuffix(family.stem), flat) for stem in stems]
        if any(re.search("/(mean|var)_ema/average$", name) for name in flat):
            states[place] = flat
    if len(states) > 1:
        raise ValueError(f"Expected one state of statistics. Received: {printable(', '.join(states))}")
    state = next(iter(states.values()), {})
    for place, family, prefix, flat in parameters:
        yield _Candidate(place, family, prefix, collections.ChainMap(flat, state))


def _flat(modules: dict) -> dict[str, Any]:
    """Values by `module/name`, without the `~` that Haiku puts between a module and those of its constructor."""
    flat: dict[str, Any] = {}
    for module, content in modules.items():
        for name, value in content.items() if isinstance(content, dict) else ():
            bare = "/".join(part for part in f"{module}/{name}".split("/") if part != "~")
            if bare in flat:
                raise ValueError(f"Expected names of modules that tell them apart. Received: {printable(bare)} twice")
            flat[bare] = value
    return flat


def _named(chosen: _Candidate, num_bytes: int, *, several: bool) -> Found:
    """Gives every tensor its use.

    Raises:
        ValueError: for one that has none, or whose numbers cannot be what it says.
    """
    found = Found(chosen.family, chosen.key, {}, {}, [], {})
    for name, value in chosen.named.items():
        bare = str(name).removeprefix(chosen.prefix)
        if several and not (type(name) is str and name.startswith(chosen.prefix)):
            continue  # Of another network in the same dictionary.
        tensor = _checked(name, value)
        use = chosen.family.weight(bare) if str(name).startswith(chosen.prefix) else None
        if use is not None and use[1]:
            found.tensors[name], found.ours[name] = tensor, use
        elif use is not None:
            found.dropped.append(name)
        elif bare in ("mean", "std") and str(name).startswith(chosen.prefix):
            found.normalization[bare] = _numbers(tensor)
        else:
            raise ValueError(f"Expected tensors of a {chosen.family.network}. Received: {printable(name)}")
    if pair := tensors.overlapping(found.tensors):
        raise ValueError(f"Expected tensors apart from each other. Received: {' and '.join(map(printable, pair))}")
    # Parts of an archive can lie on each other.
    if sum(tensor.num_bytes for tensor in found.tensors.values()) > num_bytes:
        raise ValueError(f"Expected tensors of at most {num_bytes:,} bytes, the file's. Received: more")
    return found


def _checked(name: Any, value: Any) -> Tensor:
    content = getattr(value, "content", None) if isinstance(value, Array) else value
    if isinstance(content, (np.ndarray, np.generic)):
        content = tensors.in_memory(np.asarray(content), str(name))
    if type(name) is not str or not isinstance(content, Tensor):
        raise ValueError(f"Expected tensors by name. Received: {printable(name)}, a {type(content).__name__}")
    try:
        tensors.check(content)
    except ValueError as error:
        raise ValueError(f"Expected tensors as large as they say. Received: {printable(name)}, {error}") from error
    return content


def _numbers(tensor: Tensor) -> list[float]:
    if tensor.num_bytes > 64 or any(size > 1 for size in tensor.shape[1:]):
        raise ValueError(f"Expected one mean and deviation for each channel. Received: shape {tensor.shape}")
    numbers = [float(value) for value in tensor.values().reshape(-1)]
    if not np.isfinite(numbers).all():
        raise ValueError(f"Expected finite means and deviations. Received: {numbers}")
    return numbers


def _without_network(tree: _Tree) -> str:
    """What there is in a file without a network that is known."""
    names = [name for _, named in tree.places for name in named if type(name) is str]
    for name in names:
        for pattern, told in OTHERS:
            if re.search(rf"(^|\.){pattern}$", name):
                return f"{printable(name)}, as in {told}"
    return f"other names, such as {printable(', '.join(sorted(names)[:3]))}" if names else "no names of tensors"
