"""Images that stay in their files: any number of them, of which no more is read than what is asked for.

    images = MappedImages([Part("/data/images.npy", offset=128, num_images=1000)], (32, 32, 3))
    images[10:20], images[np.array([3, 999, 3])]

An image array is anything with `shape` (N, height, width, channels), `dtype` uint8, `len()`, and NumPy arrays as
`images[start:stop]` and `images[indices]`, where indices are int64 `[n]`. `np.ndarray` and `np.memmap` are such arrays.
"""

import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The kernel reads this much ahead of time at one request, and drops the rest of a longer one.
_READ_AHEAD = 1 << 17


class Part(NamedTuple):
    """Consecutive images in a file.

    Attributes:
        path: of a local file.
        offset: where in it the first image begins, in bytes.
        num_images: how many there are, one right after the other.
    """

    path: str
    offset: int
    num_images: int


class MappedImages:
    """Images of several files, end to end, as one image array.

    Slices are read, images from anywhere memory-mapped: those are fetched from the disk all at once and without their
    surroundings, for which an ordinary map of a set that is larger than the memory would mostly wait.

    Args:
        parts: a sequence of `Part`s.
        image_shape: (height, width, channels).
        column_major: whether an image is stored as `[channels, width, height]`, not as `[height, width, channels]`.

    Raises:
        ValueError: for a file that is shorter than its part.
        OSError: for a file that cannot be mapped.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, parts: Sequence[Part], image_shape: tuple, *, column_major: bool = False):
        self._column_major = column_major
        self._stored_shape = tuple(image_shape[::-1] if column_major else image_shape)
        self._image_bytes = math.prod(image_shape)
        self._parts = tuple(parts)
        self._firsts = np.cumsum([0, *(part.num_images for part in parts)])
        self._maps, self._arrays = zip(*(self._mapped(part) for part in parts))
        self.shape = (int(self._firsts[-1]), *image_shape)

    def _mapped(self, part):
        with open(part.path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        num_bytes = part.num_images * self._image_bytes
        if part.offset + num_bytes > len(mapped):
            raise ValueError(
                f"Expected {part.num_images} images, {part.offset + num_bytes} bytes, in {part.path}. "
                f"Received: {len(mapped)} bytes"
            )
        if hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        array = np.frombuffer(mapped, np.uint8, num_bytes, part.offset)
        return mapped, array.reshape(part.num_images, *self._stored_shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return self._between(start, max(start, stop)) if step == 1 else self[np.arange(start, stop, step)]
        index = np.asarray(index)
        if index.dtype.kind not in "iu":
            raise IndexError(f"Expected a slice or integers. Received: {index.dtype} of shape {index.shape}")
        index = index.astype(np.int64)
        wrapped = np.where(index < 0, index + len(self), index)
        if wrapped.size and not (wrapped.min() >= 0 and wrapped.max() < len(self)):
            raise IndexError(f"Expected indices of {len(self)} images. Received: {index.min()} to {index.max()}")
        result = np.empty((*index.shape, *self._stored_shape), np.uint8)
        part_of_each = np.searchsorted(self._firsts, wrapped, side="right") - 1
        for k in np.unique(part_of_each):
            chosen = part_of_each == k
            rows = wrapped[chosen] - self._firsts[k]
            self._announce(k, rows)
            result[chosen] = self._arrays[k][rows]
            if hasattr(mmap, "MADV_DONTNEED"):  # What has been read does not count as this process's memory.
                self._maps[k].madvise(mmap.MADV_DONTNEED)
        return self._upright(result)

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype, copy=False)

    def _between(self, start, stop):
        result = np.empty((stop - start, *self._stored_shape), np.uint8)
        for k, (first, end) in enumerate(zip(self._firsts[:-1].tolist(), self._firsts[1:].tolist())):
            low, high = max(start, first), min(stop, end)
            if low < high:
                part, wanted = self._parts[k], result[low - start : high - start]
                # Read, not mapped: what a pass over all images has seen does not count as this process's memory.
                with open(part.path, "rb") as file:
                    file.seek(part.offset + (low - first) * self._image_bytes)
                    if file.readinto(wanted.reshape(-1)) < wanted.nbytes:
                        raise ValueError(f"Expected {part.num_images} images in {part.path}. Received: fewer")
        return self._upright(result)

    def _announce(self, k, rows):
        """Has the disk fetch some images of part k, and does not wait for them."""
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        begins = self._parts[k].offset + rows * self._image_bytes
        begins -= begins % mmap.PAGESIZE
        num_bytes = self._image_bytes + mmap.PAGESIZE
        announce = self._maps[k].madvise
        for position in range(0, num_bytes, _READ_AHEAD):
            length = min(_READ_AHEAD, num_bytes - position)
            for begin in begins[begins + position < len(self._maps[k])].tolist():
                announce(mmap.MADV_WILLNEED, begin + position, length)

    def _upright(self, stored):
        if not self._column_major:
            return stored
        upright = np.empty((*stored.shape[:-3], *self.shape[1:]), np.uint8)
        for channel in range(self.shape[3]):  # Three times as fast as all at once.
            upright[..., channel] = stored[..., channel, :, :].swapaxes(-1, -2)
        return upright
