"""Arrays of a file, known by shape and read one at a time."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

BFLOAT16 = np.dtype(tf.bfloat16.as_numpy_dtype)
# No size in a file is larger, so that products of a few of them stay quick.
_MOST_ELEMENTS = 2**40


class Storage(NamedTuple):
    """A run of numbers in a file.

    Attributes:
        key: tells the storages of a file apart.
        dtype: of the numbers.
        num_bytes: how many there are.
        read: returns the bytes from one place to another.
    """

    key: str
    dtype: np.dtype
    num_bytes: int
    read: Callable[[int, int], bytes]


class Tensor(NamedTuple):
    """An array in a storage, as a file says; `check` comes before anything else that is done with it.

    Attributes:
        storage: where its numbers are.
        first: the place of its first number there.
        shape: sizes of its axes.
        strides: how many numbers lie between neighbours along each.
    """

    storage: Storage
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def end(self) -> int:
        """The place behind its last number."""
        return self.first + 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides))

    @property
    def num_bytes(self) -> int:
        """Of its numbers, without what may lie between them."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def values(self) -> np.ndarray:
        """The numbers, in memory, of the type that they are stored in."""
        dtype = self.storage.dtype
        data = self.storage.read(self.first * dtype.itemsize, self.end * dtype.itemsize)
        steps = [stride * dtype.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(np.frombuffer(data, dtype), self.shape, steps, writeable=False)


def packed(storage: Storage, shape: tuple[int, ...]) -> Tensor:
    """A tensor from the first number of a storage on, its last axis fastest."""
    return Tensor(storage, 0, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


def in_memory(array: np.ndarray, key: str) -> Tensor:
    """A tensor of an array that has been read already."""
    flat = np.ascontiguousarray(array).reshape(-1)
    storage = Storage(key, array.dtype, array.nbytes, lambda begin, end: flat.view(np.uint8)[begin:end].tobytes())
    return packed(storage, array.shape)


def check(tensor: Tensor) -> None:
    """Compares the sizes of a tensor with its storage.

    Raises:
        ValueError: for one that is empty, has negative or overlapping strides, or does not fit; says what it is.
    """
    storage, first, shape, strides = tensor
    if not isinstance(storage, Storage):
        raise ValueError("which has no storage")
    if not _are_sizes(shape, 1) or not _are_sizes(strides, 0) or not _are_sizes((first,), 0):
        raise ValueError("whose shape, strides and offset are no sizes")
    if len(shape) != len(strides):
        raise ValueError(f"of shape {shape} with strides {strides}")
    behind = 1  # Sorted by stride, no axis reaches into the next.
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape) if size > 1):
        if stride < behind:
            raise ValueError(f"of shape {shape} whose numbers overlap, with strides {strides}")
        behind = stride * size
    if tensor.end * storage.dtype.itemsize > storage.num_bytes:
        raise ValueError(f"of shape {shape}, {storage.dtype}, in a storage of {storage.num_bytes:,} bytes")


def overlapping(tensors: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Names of two tensors that share numbers; None where no two do."""
    places = sorted((each.storage.key, each.first, each.end, name) for name, each in tensors.items())
    for (key, _, end, name), (next_key, begin, _, next_name) in itertools.pairwise(places):
        if key == next_key and begin < end:
            return name, next_name
    return None


def _are_sizes(sizes: Any, least: int) -> bool:
    return (
        isinstance(sizes, tuple)
        and len(sizes) <= 8
        and all(type(size) is int and least <= size < _MOST_ELEMENTS for size in sizes)
    )
