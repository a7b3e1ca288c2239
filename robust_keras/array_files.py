"""Arrays in `.npz` and `.npy` files that somebody else made: what a file says of itself is checked, then it is read.

    arrays = array_files.read("examples.npz")

NumPy reads a header as Python, makes an array of whatever shape it claims, then looks for the numbers. Here a header is
text of one form, of numbers or text alone, and claims what the file holds: an array that is stored takes no more memory
than its file, and of what is packed `zip_files` says how much is believed.
"""

import math
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from typing import IO, NamedTuple

import numpy as np

from robust_keras import zip_files
from robust_keras.foreign_files import open_regular, printable

_MOST_HEADER_BYTES = 10_000  # NumPy reads longer ones before it refuses them.
_MOST_AXES = 32
_SIZES = r"\((?:\d{1,19}L?,\s?)*(?:\d{1,19}L?)?\)"  # Python 2 wrote `3L`.
_ENTRY = rf"""['"](descr|fortran_order|shape)['"]:\s?('[^']{{1,20}}'|"[^"]{{1,20}}"|True|False|{_SIZES})"""
_HEADER = re.compile(rf"\{{\s?{_ENTRY},\s?{_ENTRY},\s?{_ENTRY},?\s?\}}\s*", re.ASCII)
_DTYPE = re.compile(r"[<>|=]?[biufcSUVO][0-9]{0,9}", re.ASCII)


class Header(NamedTuple):
    """What an array's file says at its beginning.

    Attributes:
        version: of the format, (1, 0) or (2, 0).
        shape: a tuple.
        dtype: an `np.dtype` of numbers or text.
        is_fortran: whether the first axis varies fastest.
        num_bytes: how many come before the numbers.
    """

    version: tuple[int, int]
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fortran: bool
    num_bytes: int

    @property
    def array_bytes(self) -> int:
        """How many bytes of numbers follow, by what it claims."""
        return math.prod(self.shape) * self.dtype.itemsize


def read(path: str | os.PathLike, keys: Sequence[str] | None = None, *, follow: bool = False) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name.

    Args:
        path: any `tf.io.gfile` path of a regular file.
        keys: names of those that are wanted; None for all.
        follow: whether it may be a link to one, as a path may that a user typed.

    Raises:
        ValueError: for a file that is no npz file of numbers and text, or lacks a key, or claims more than it holds.
        OSError, tf.errors.OpError: where there is none, or it cannot be read.
    """
    with open_regular(path, follow=follow) as file:
        try:
            return arrays(file, keys)
        except ValueError as error:
            raise ValueError(f"Expected a whole npz file. Received: {printable(path)} ({error})") from error


def arrays(file: IO[bytes], keys: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """As `read`, of an open file.

    Raises:
        ValueError: why it cannot be read, without its name.
    """
    with zip_files.open_archive(file) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if len(entries) < len(archive.infolist()):
            raise ValueError("it holds several arrays of one name")
        for name in entries if keys is None else keys:
            if name not in entries:
                raise ValueError(f"nothing named {name}")
            member_header(archive, entries[name])  # All of them, before the first is read.
        return {name: _member(archive, entries[name]) for name in (entries if keys is None else keys)}


def member_header(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> Header:
    """The header of an array in an npz file, which claims as many bytes as there are.

    Raises:
        ValueError: for another one.
    """
    name = printable(entry.filename)
    if not entry.filename.endswith(".npy"):
        raise ValueError(f"{name} is no array")
    try:
        with archive.open(entry) as stream:
            found = header(stream)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{name} {error}" if isinstance(error, _Bad) else f"{name}: {printable(error)}") from error
    held = entry.file_size - found.num_bytes
    if found.array_bytes != held:
        raise ValueError(f"{name} holds {held} bytes, and {found.dtype} {found.shape} is {found.array_bytes}")
    return found


def header(stream: IO[bytes]) -> Header:
    """The header at the beginning of a `.npy` file, of which nothing else is read; it may claim more than there is.

    Raises:
        ValueError: for anything else.
    """
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise _Bad(f"has the version {version}")
    length_bytes = 2 * version[0]
    length = int.from_bytes(_exactly(stream, length_bytes), "little")
    if length > _MOST_HEADER_BYTES:
        raise _Bad(f"has a header of {length} bytes")
    text = _exactly(stream, length).decode("latin1")
    match = _HEADER.fullmatch(text)
    found = dict(zip(match.groups()[::2], match.groups()[1::2], strict=True)) if match else {}
    if len(found) != 3 or found["fortran_order"] not in ("True", "False") or not found["shape"].startswith("("):
        raise _Bad(f"has a header of another form, {printable(text, most=80)}")
    shape = tuple(int(size) for size in re.findall(r"\d+", found["shape"]))
    if len(shape) > _MOST_AXES or math.prod(size for size in shape if size) >= 1 << 62:
        raise _Bad(f"claims a shape that no array has, {printable(shape, most=80)}")
    dtype = _dtype(found["descr"][1:-1])
    return Header(version, shape, dtype, found["fortran_order"] == "True", 8 + length_bytes + length)


class _Bad(ValueError):
    """What an array's file does, as the rest of a sentence that begins with its name."""


def _dtype(text: str) -> np.dtype:
    try:
        dtype = np.dtype(text) if _DTYPE.fullmatch(text) else None
    except (TypeError, ValueError):
        dtype = None
    if dtype is not None and dtype.hasobject:
        raise _Bad("holds objects, which only a pickle can")
    if dtype is None or dtype.itemsize == 0:
        raise _Bad(f"is an array of neither numbers nor text, {printable(text)}")
    return dtype


def _exactly(stream: IO[bytes], num_bytes: int) -> bytes:
    data = stream.read(num_bytes)
    if len(data) < num_bytes:
        raise _Bad("ends early: EOF in its header")
    return data


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    try:
        with archive.open(entry) as stream:
            found = np.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # At the end, the CRC-32 is compared.
                raise ValueError("it is longer than it says")
            return found
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(f"{printable(entry.filename)}: {printable(error)}") from error
    except MemoryError as error:
        raise ValueError(f"{printable(entry.filename)} of {entry.file_size:,} bytes, more than memory has") from error
