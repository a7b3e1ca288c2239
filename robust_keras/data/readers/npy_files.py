"""Arrays in `.npy` files that are written row by row, and read where they lie."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from robust_keras import array_files, own_folders
from robust_keras.data.readers.tfds_sets import why


class Header(NamedTuple):
    """What a `.npy` file of format 1.0 says at its beginning.

    Attributes:
        shape: a tuple.
        dtype: an `np.dtype`.
        is_fortran: whether the first axis varies fastest.
        offset: where in the file the numbers begin.
    """

    shape: tuple
    dtype: np.dtype
    is_fortran: bool
    offset: int


def header(path: str) -> Header:
    """The header of a file; it may claim more than the file holds.

    Raises:
        ValueError: for a file that has none.
        OSError: for a file that cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            found = array_files.header(file)
            if found.version != (1, 0):
                raise ValueError(f"the format {found.version}")
        except ValueError as error:
            raise ValueError(f"Expected a whole .npy file. Received: {path} ({why(error)})") from error
        return Header(found.shape, found.dtype, found.is_fortran, found.num_bytes)


def num_whole_rows(path: str) -> int:
    """How many rows a file holds, whatever its header says of their number, as a write that was cut off leaves it.

    Raises:
        ValueError: for a file without a header, or with rows of nothing.
        OSError: for a file that cannot be opened.
    """
    found = header(path)
    row_bytes = math.prod(found.shape[1:]) * found.dtype.itemsize
    if not found.shape or row_bytes <= 0:
        raise ValueError(f"Expected rows in {path}. Received: {found.dtype} {found.shape}")
    return (os.path.getsize(path) - found.offset) // row_bytes


@contextlib.contextmanager
def appended(path: str, row_shape: tuple, dtype: np.dtype, num_rows: int = 0) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends rows to a file, after its first ones; the header gets their number at the end.

    Args:
        path: of the file, which is new unless rows of it are to stay.
        row_shape: of a row.
        dtype: of the numbers.
        num_rows: how many of its rows stay.
    """

    def write_header():
        description = np.lib.format.dtype_to_descr(dtype)
        content = {"descr": description, "fortran_order": False, "shape": (num_rows, *row_shape)}
        np.lib.format.write_array_header_1_0(file, content)  # Padded, so it has the same length for any number.

    def append(rows):
        nonlocal num_rows
        file.write(np.ascontiguousarray(rows, dtype).data)
        file.flush()  # What another file has to go with is to be there before it.
        num_rows += len(rows)

    with open(path, "r+b" if num_rows else "wb", opener=own_folders.opener) as file:
        write_header()
        file.seek(num_rows * math.prod(row_shape) * dtype.itemsize, os.SEEK_CUR)
        file.truncate()
        yield append
        file.seek(0)
        write_header()
        file.flush()
        os.fsync(file.fileno())  # A marker is not to be older than what it marks.
