"""Files that somebody else made: what they are, before anything opens them, and what of them reaches a screen.

A file of a model, a data set or a run that came from elsewhere may be a link to a private file, a pipe that never
answers, a device without end, or a name that steers a terminal. What a user typed may be a link; what lies in a folder
that the user typed may not. On file systems other than the local one, such as gs://, there are files alone.
"""

import itertools
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from typing import BinaryIO

import tensorflow as tf

from robust_keras.shown_text import printable as printable  # Here too: what is read is shown.

gfile = tf.io.gfile
MOST_FILES = 10_000  # Below one folder.
_KINDS = {
    stat.S_ISLNK: "a symbolic link",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def local_path(path: str | os.PathLike) -> str | None:
    """The path as `open` takes it, or None for one on another file system, such as 'gs://bucket/file'."""
    path = os.fspath(path).removeprefix("file://")
    return None if re.match(r"[a-zA-Z][\w+.\-]*://", path) else path


def check_regular(path: str | os.PathLike, *, follow: bool = False, most_bytes: int | None = None) -> None:
    """Raises unless a path is a regular file, or nothing at all.

    Args:
        path: any `tf.io.gfile` path.
        follow: whether it may be a link to a regular file, as a path may that a user typed.
        most_bytes: how large it may be.

    Raises:
        ValueError: for a folder, a link, a pipe, a socket, a device, or a larger file; nothing is opened.
    """
    if (local := local_path(path)) is None:
        path = os.fspath(path)
        if most_bytes is not None and gfile.exists(path) and gfile.stat(path).length > most_bytes:
            raise ValueError(_too_large(path, gfile.stat(path).length, most_bytes))
        return
    try:
        status = os.stat(local) if follow else os.lstat(local)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"Expected a regular file. Received: {printable(local)}, {kind(status.st_mode)}")
    if most_bytes is not None and status.st_size > most_bytes:
        raise ValueError(_too_large(local, status.st_size, most_bytes))


def open_regular(path: str | os.PathLike, *, follow: bool = False, most_bytes: int | None = None) -> BinaryIO:
    """Opens a regular file to read its bytes; what it is cannot change between the look and the opening.

    Args:
        path: any `tf.io.gfile` path.
        follow: see `check_regular`, like `most_bytes`.

    Raises:
        ValueError: see `check_regular`.
        OSError, tf.errors.OpError: where there is none, or it cannot be read.
    """
    if (local := local_path(path)) is None:
        check_regular(path, most_bytes=most_bytes)
        return gfile.GFile(path, "rb")
    check_regular(path, follow=follow, most_bytes=most_bytes)
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(local, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"Expected a regular file. Received: {printable(local)}, {kind(status.st_mode)}")
    return os.fdopen(descriptor, "rb")


def regular_files(folder: str | os.PathLike, *, follow: bool = False) -> Iterator[tuple[str, str]]:
    """The files below a folder, sorted, as (relative path with slashes, path).

    Args:
        folder: any `tf.io.gfile` path.
        follow: whether links to files and folders count as what they point to.

    Raises:
        ValueError: for anything below it that is neither a regular file nor a folder, and for more than `MOST_FILES`.
    """
    folder = os.fspath(folder)
    found = list(itertools.islice(_below(folder, follow), MOST_FILES + 1))
    if len(found) > MOST_FILES:
        raise ValueError(f"Expected at most {MOST_FILES:,} files in a folder. Received: more in {folder}")
    for relative in sorted(found):
        yield relative, posixpath.join(folder, relative)


def kind(mode: int) -> str:
    """What a file's mode says it is, in words."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return next((name for test, name in _KINDS.items() if test(mode)), "another kind of file")


def _below(folder: str, follow: bool) -> Iterator[str]:
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        for name, mode in _entries(posixpath.join(folder, inside), follow):
            relative = posixpath.join(inside, name)
            if stat.S_ISDIR(mode):
                waiting.append(relative)
            elif stat.S_ISREG(mode):
                yield relative
            else:
                received = f"{printable(relative)}, {kind(mode)}"
                raise ValueError(f"Expected regular files below a folder. Received: {received}")


def _entries(folder: str, follow: bool) -> Iterator[tuple[str, int]]:
    """Names in a folder, and their modes."""
    if (local := local_path(folder)) is not None:
        with os.scandir(local) as entries:
            for entry in entries:
                yield entry.name, entry.stat(follow_symlinks=follow).st_mode
        return
    for name in gfile.listdir(folder):
        name = name.rstrip("/")
        yield name, stat.S_IFDIR if gfile.isdir(posixpath.join(folder, name)) else stat.S_IFREG


def _too_large(path: str, size: int, most: int) -> str:
    return f"Expected a file of at most {most:,} bytes. Received: {printable(path)} of {size:,}"
