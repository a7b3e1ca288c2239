"""Arrays in `.npz` files: what they are without reading them, where they can be memory-mapped, and block by block.

An array that is stored uncompressed, as by `np.savez`, lies in one piece in the file.
"""

import contextlib
import json
import math
import mmap
import os
import zipfile
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from robust_keras import array_files, own_folders, storage, zip_files
from robust_keras.data.readers.tfds_sets import why
from robust_keras.foreign_files import local_path, open_regular

_CHUNK = 1 << 20
# So much is checked in a moment; what is larger is checked once.
_CHECKED_EVERY_TIME = 1 << 28


class Member(NamedTuple):
    """An array in an npz file.

    Attributes:
        file_name: its name in the archive.
        shape: a tuple.
        dtype: an `np.dtype`.
        is_fortran: whether the first axis varies fastest.
        header_bytes: how many come before the numbers.
        offset: where in the file the numbers begin, if they can be memory-mapped there: of a local file, uncompressed,
            in C order and the machine's byte order; otherwise None.
    """

    file_name: str
    shape: tuple
    dtype: np.dtype
    is_fortran: bool
    header_bytes: int
    offset: int | None


def members(path: str, keys: Sequence[str]) -> tuple[dict[str, Member], list[str]]:
    """What an npz file holds, of which only the headers are read.

    Args:
        path: a path that `tf.io.gfile` can open.
        keys: names of arrays.

    Returns:
        (members, names): a dictionary with the `Member` of each key that is there, and the names of all arrays.

    Raises:
        ValueError: for a file that is no whole npz file, and for an array of objects, which only a pickle can hold.
    """
    with _whole(path) as file, zip_files.open_archive(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("it holds several arrays of one name")
        is_local = local_path(path) is not None
        return {key: _member(file, archive, entries[key], is_local) for key in keys if key in entries}, list(entries)


def load(path: str, keys: Sequence[str]) -> list[np.ndarray]:
    """The arrays of some keys, read into memory.

    Raises:
        ValueError: for a file that is no whole npz file, and for an array of objects.
    """
    with _whole(path) as file:
        found = array_files.arrays(file, keys)
        return [found[key] for key in keys]


def blocks(
    path: str, member: Member, folder: str, num_rows: int, *, first: int = 0
) -> Generator[np.ndarray, None, None]:
    """The rows of an array, `num_rows` at a time, in little memory; the last block may be smaller.

    Args:
        path: of the npz file.
        member: a `Member` of it.
        folder: where a file of the array's size may be kept until the generator is closed, if the array is in Fortran
            order.
        num_rows: rows of a block.
        first: how many rows to leave out at the beginning.

    Yields:
        Arrays of the member's dtype in the machine's byte order.

    Raises:
        ValueError: for an array that is damaged.
        OSError: for a full disk.
    """
    row_shape = member.shape[1:]
    native = member.dtype.newbyteorder("=")
    if not member.is_fortran:
        row_bytes = math.prod(row_shape) * member.dtype.itemsize
        for data in _numbers(path, member, num_rows * row_bytes, first * row_bytes):
            yield np.frombuffer(data, member.dtype).reshape(-1, *row_shape).astype(native, copy=False)
        return
    unpacked = os.path.join(folder, "fortran_order")
    try:
        with open(unpacked, "w+b", opener=own_folders.opener) as file:
            for data in _numbers(path, member, _CHUNK):
                file.write(data)
            file.flush()
            yield from _rows_of_columns(file, member, first, num_rows)
    finally:
        if os.path.exists(unpacked):  # No longer open or mapped, or some systems would refuse.
            os.remove(unpacked)


def _rows_of_columns(file, member: Member, first: int, num_rows: int) -> Iterator[np.ndarray]:
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        rows = np.frombuffer(mapped, member.dtype).reshape(member.shape, order="F")
        try:
            for start in range(first, len(rows), num_rows):
                yield rows[start : start + num_rows].astype(member.dtype.newbyteorder("="), order="C")
        finally:
            del rows  # A map that something refers to cannot be closed.


def verify(path: str, arrays: Sequence[Member], note: str) -> None:
    """Compares arrays with the CRC-32 in the file, as reading them would; of a large file only once.

    Args:
        path: of a local npz file.
        arrays: a list of `Member`s.
        note: path of a file that remembers it until the size or the time of change of the npz file differ. Where it
            cannot be written, a large file is checked every time.

    Raises:
        ValueError: for an array that is damaged.
    """
    num_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    status = os.stat(path)
    checked = {"num_bytes": status.st_size, "mtime_nsec": status.st_mtime_ns}
    names = [array.file_name for array in arrays]
    if num_bytes > _CHECKED_EVERY_TIME:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            remembered = storage.read_object(note) or {}
            if set(names) <= set(remembered.pop("arrays")) and remembered == checked:
                return
        print(f"Checking {path}, {num_bytes / 1e9:.1f} GB", flush=True)
    with tqdm(desc="checking", unit="B", unit_scale=True, total=num_bytes, delay=5, mininterval=1) as bar:
        for array in arrays:
            for data in _numbers(path, array, _CHUNK):
                bar.update(len(data))
    if num_bytes > _CHECKED_EVERY_TIME:
        folder = os.path.dirname(os.path.abspath(note))
        with contextlib.suppress(OSError, ValueError), own_folders.within(os.path.dirname(folder)):
            own_folders.make(folder)
            storage.write_text(note, json.dumps({"arrays": names, **checked}))


@contextlib.contextmanager
def _whole(path):
    """The open file; whatever is raised for what is no archive of plain arrays becomes an error of one line."""
    try:
        with open_regular(path, follow=True) as file:
            yield file
    except Exception as error:
        raise ValueError(f"Expected a whole npz file. Received: {path} ({why(error)})") from error


def _member(file, archive, entry, is_local):
    _, shape, dtype, is_fortran, header_bytes = found = array_files.member_header(archive, entry)
    is_fortran = is_fortran and len(shape) > 1
    offset = None
    if is_local and entry.compress_type == zipfile.ZIP_STORED and not is_fortran and dtype.isnative:
        offset = zip_files.begin_of(file, entry) + header_bytes
        num_bytes = file.seek(0, os.SEEK_END)
        if offset + found.array_bytes > num_bytes:
            raise ValueError(f"{entry.filename} ends at byte {offset + found.array_bytes} of {num_bytes}")
    return Member(entry.filename, shape, dtype, is_fortran, header_bytes, offset)


def _numbers(path, member, num_bytes, first=0):
    """The bytes of an array from `first` on, `num_bytes` at a time; before the last, zipfile compares the CRC-32."""
    left = math.prod(member.shape) * member.dtype.itemsize - first
    with _whole(path) as file, zip_files.open_archive(file) as archive, archive.open(member.file_name) as stream:

        def read(size):
            data = stream.read(size)
            if len(data) < size:
                raise ValueError(f"{member.file_name} ends early")
            return data

        before = member.header_bytes + first
        for start in range(0, before, _CHUNK):  # What is compressed has to be read all the same.
            read(min(_CHUNK, before - start))
        while left:
            yield (data := read(min(num_bytes, left)))
            left -= len(data)
