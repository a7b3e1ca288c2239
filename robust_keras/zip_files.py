"""Zip archives that somebody else made, `.npz` and `.keras` files: what is in one, before anything is unpacked.

Reasons are given, without the path: whoever opened the file names it.
"""

import io
import itertools
import mmap
import os
import stat
import struct
import zipfile
from typing import IO

from robust_keras.foreign_files import printable

# What is packed takes memory that its file does not tell. Pictures are packed to half of their size, handwriting to a
# fifth, masks and drawings to a fiftieth; deflate itself packs nothing but zeros a thousand times.
MOST_TIMES = 100
# Unless all of it is small: a set of blank pictures for a trial is.
ALWAYS_UNPACKED = 1 << 28
_MOST_TIMES_DEFLATED = 1032
_END = struct.Struct("<4s8xL6x")  # Its signature, and the bytes of the directory.
_END_64 = struct.Struct("<4s36xQ8x")
_MEMBER = struct.Struct("<26xHH")  # What stands before a member: the lengths of its name, and of what follows that.
_BYTES_PER_MEMBER = 512  # Of the directory: 46 and the name.


def open_archive(file: IO[bytes], *, most_members: int = 20_000) -> zipfile.ZipFile:
    """A zip archive, whose directory is that of plain files, each of which lies in the file by itself.

    Members are stored or deflated. All of them together unpack to at most `MOST_TIMES` of the file, or to
    `ALWAYS_UNPACKED`, and to what memory there is.

    Args:
        file: open to be read.
        most_members: how many there may be.

    Raises:
        ValueError: for any other file.
    """
    num_bytes = _check_directory(file, most_members)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, EOFError, OverflowError) as error:
        raise ValueError(f"no whole zip archive: {printable(error)}") from error
    entries = archive.infolist()
    if len(entries) > most_members:
        raise ValueError(f"it holds more than {most_members:,} files")
    names = set()
    for entry in entries:
        _check_member(entry)
        if entry.filename in names:
            raise ValueError(f"it holds several files named {printable(entry.filename)}")
        names.add(entry.filename)
    _check_places(entries, archive.start_dir)
    _check_unpacked(entries, num_bytes)
    return archive


def content(archive: zipfile.ZipFile, name: str, file: IO[bytes]) -> bytes | memoryview:
    """The bytes of a member: where it is stored in a file of this machine, a view of them, of which no copy is made.

    Args:
        archive: see `open_archive`.
        name: of the member.
        file: of the archive.

    Raises:
        ValueError, zipfile.BadZipFile: for a member that is not in the file whole.
    """
    entry = archive.getinfo(name)
    if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size or not isinstance(file, io.BufferedReader):
        return archive.read(name)
    archive.open(name).close()  # Which looks at what stands before it.
    mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    begin = begin_of(file, entry)
    if begin + entry.file_size > archive.start_dir:
        raise ValueError(f"{printable(name)} lies where another part of the archive does")
    return mapped[begin : begin + entry.file_size]


def begin_of(file: IO[bytes], entry: zipfile.ZipInfo) -> int:
    """Where in an archive's file the bytes of a member begin, after a header whose length the directory does not tell.

    Raises:
        ValueError: where there is no such header.
    """
    file.seek(entry.header_offset)
    header = file.read(_MEMBER.size)
    if len(header) < _MEMBER.size or not header.startswith(b"PK\3\4"):
        raise ValueError(f"no {printable(entry.filename, most=100)} where the archive's directory says")
    return entry.header_offset + _MEMBER.size + sum(_MEMBER.unpack(header))


def _check_directory(file: IO[bytes], most_members: int) -> int:
    """Raises ValueError for a directory that is not at the end or that is large, and returns the file's size."""
    file.seek(0, os.SEEK_END)
    num_bytes = file.tell()
    file.seek(max(0, num_bytes - _END.size))
    end = file.read(_END.size)
    if len(end) < _END.size or not end.startswith(b"PK\5\6") or end[-2:] != b"\0\0":
        raise ValueError("no whole zip archive: its end is not that of one")
    directory_bytes = _END.unpack(end)[1]
    # A larger archive has a second end before the first, and a pointer of 20 bytes to it in between.
    file.seek(max(0, num_bytes - _END.size - 20 - _END_64.size))
    before = file.read(_END_64.size + 20)
    if before[-20:].startswith(b"PK\6\7"):
        if not before.startswith(b"PK\6\6") or len(before) < _END_64.size + 20:
            raise ValueError("no whole zip archive: its 64-bit end is not where it should be")
        directory_bytes = max(directory_bytes % 0xFFFFFFFF, _END_64.unpack(before[: _END_64.size])[1])
    if directory_bytes > most_members * _BYTES_PER_MEMBER:
        raise ValueError(f"it holds more than {most_members:,} files, or names that are none")
    file.seek(0)
    return num_bytes


def _check_member(entry: zipfile.ZipInfo) -> None:
    name = printable(entry.filename)
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if entry.filename != entry.orig_filename or not entry.filename:
        raise ValueError(f"it holds a file without a plain name, {printable(entry.orig_filename)}")
    if entry.flag_bits & 0x61:
        raise ValueError(f"{name} is encrypted, or a patch")
    if kind and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise ValueError(f"{name} is a link, or another kind of file")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is neither stored nor deflated")
    most = entry.compress_size
    if entry.compress_type == zipfile.ZIP_DEFLATED:
        most = _MOST_TIMES_DEFLATED * (entry.compress_size + 1)
    if entry.file_size > most:
        raise ValueError(f"{name} of {entry.compress_size} bytes cannot hold {entry.file_size}")


def _check_places(entries: list[zipfile.ZipInfo], end: int) -> None:
    """Raises ValueError where two members overlap, or one and the directory."""
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    following = [*(entry.header_offset for entry in ordered[1:]), end]
    for entry, stop in zip(ordered, following, strict=True):
        if entry.header_offset < 0 or entry.header_offset + 30 + entry.compress_size > stop:
            raise ValueError(f"{printable(entry.filename)} lies where another part of the archive does")


def _check_unpacked(entries: list[zipfile.ZipInfo], num_bytes: int) -> None:
    unpacked = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    if unpacked <= ALWAYS_UNPACKED:
        return
    if unpacked > MOST_TIMES * num_bytes:
        raise ValueError(
            f"{num_bytes:,} bytes unpack to {unpacked:,}, {unpacked // num_bytes} times as many, where at most "
            f"{MOST_TIMES} times are believed of more than {ALWAYS_UNPACKED:,}; store it without compression"
        )
    free = _free_memory()
    if free is not None and unpacked > free:
        raise ValueError(f"{num_bytes:,} bytes unpack to {unpacked:,}, and {free:,} of memory are free")


def _free_memory() -> int | None:
    """Bytes of memory that a program can take, of a Linux that says so."""
    try:
        with open("/proc/meminfo") as file:
            lines = itertools.islice(file, 100)
            return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    except (OSError, ValueError, IndexError):
        return None
