"""Image arrays that are parts of others and copy nothing: some of the images, or the middle of each.

An image array is what `mapped` says. A view of one on disk reads what is asked of it and no more.
"""

import abc
from typing import Any

import numpy as np


class View(abc.ABC):
    """An image array that is part of another.

    Attributes:
        shape: (N, height, width, channels).
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, images: Any, shape: tuple) -> None:
        self._images, self.shape = images, tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The images of a slice, or of integers `[n]`, as an array."""

    def __array__(self, dtype=None, copy=None):
        return self[:].astype(dtype or self.dtype, copy=False)


class Selected(View):
    """Some images, in an order of their own.

    Args:
        images: an image array.
        indices: int64 `[n]`, which of them.
    """

    def __init__(self, images: Any, indices: np.ndarray) -> None:
        if isinstance(images, Selected):
            images, indices = images._images, images._indices[indices]
        self._indices = indices
        super().__init__(images, (len(indices), *images.shape[1:]))

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self._images[self._indices[index]]


def middle(images: Any, size: int | None) -> Any:
    """The middle square of each image, of height and width `size`; `images` where they are that, or it is None."""
    return images if size is None or images.shape[1:3] == (size, size) else _Middle(images, size)


class _Middle(View):
    def __init__(self, images: Any, size: int) -> None:
        num_images, height, width, channels = images.shape
        self._top, self._left, self._size = (height - size) // 2, (width - size) // 2, size
        super().__init__(images, (num_images, size, size, channels))

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        rows, columns = (slice(begin, begin + self._size) for begin in (self._top, self._left))
        return self._images[index][..., rows, columns, :]
