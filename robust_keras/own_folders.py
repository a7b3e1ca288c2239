"""Writing and removing in folders that may be a stranger's: no write follows a link, no removal leaves its folder.

A run goes on in a folder that somebody else may have made. The folder that a user typed may be a link; where one lies
below it, whatever were written there would go elsewhere: onto a private file, or into another folder. All writes and
removals of this package go through here, or are preceded by `check` where TensorFlow or Keras writes. On file systems
other than the local one, such as gs://, there are no links.
"""

import collections
import contextlib
import os
import pathlib
import shutil
import stat
import threading
from collections.abc import Iterator
from typing import IO

import tensorflow as tf

from robust_keras import foreign_files

gfile = tf.io.gfile
_typed: collections.Counter[str] = collections.Counter()  # Real paths of the folders that commands are at work in.
_typed_guard = threading.Lock()


@contextlib.contextmanager
def within(folder: str | os.PathLike) -> Iterator[None]:
    """Inside the context, no part of a path below a folder may be a link, while the folder itself may; elsewhere only
    the last part may not.
    """
    real = os.path.realpath(foreign_files.local_path(folder) or folder)
    with _typed_guard:
        _typed[real] += 1
    try:
        yield
    finally:
        with _typed_guard:
            _typed[real] -= 1
            if not _typed[real]:
                del _typed[real]


def check(path: str | os.PathLike, *, typed: bool = False) -> None:
    """Raises unless a path can be written to, or removed, without leaving the folder that was typed.

    Args:
        path: of a file or a folder, which need not be there.
        typed: whether it may be what a user typed, and so a link where it is not below a folder that was.

    Raises:
        ValueError: for a link, or anything else but files and folders.
    """
    if (local := foreign_files.local_path(path)) is None:
        return
    parts = [pathlib.Path(os.path.abspath(local)), *pathlib.Path(os.path.abspath(local)).parents]
    with _typed_guard:
        folders = set(_typed)
    found = (k for k in reversed(range(len(parts))) if folders and os.path.realpath(parts[k]) in folders)
    for part in reversed(parts[: next(found, 0 if typed else 1)]):
        try:
            mode = os.lstat(part).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ValueError(
                "Expected files and folders alone where this command writes; only the folder that is typed may be a "
                f"link. Received: {foreign_files.printable(part)}, {foreign_files.kind(mode)}"
            )


def open_file(path: str | os.PathLike, mode: str = "w") -> IO:
    """Opens a file to write to it.

    Args:
        path: any `tf.io.gfile` path.
        mode: 'w', 'wb' or 'a'; text is UTF-8, and its line breaks stay as they are.

    Raises:
        ValueError: see `check`.
        OSError, tf.errors.OpError: where it cannot be written.
    """
    if (local := foreign_files.local_path(path)) is None:
        return gfile.GFile(path, mode)
    options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    return open(local, mode, opener=opener, **options)  # type: ignore[call-overload]


def opener(path: str, flags: int) -> int:
    """What `open` takes as its `opener`, to follow no link and wait for no pipe.

    Raises:
        ValueError: see `check`.
    """
    check(path)
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"Expected a regular file to write to. Received: {foreign_files.printable(path)}")
    return descriptor


def make(folder: str | os.PathLike) -> None:
    """Makes a folder, and those above it, unless there is one.

    Raises:
        ValueError: see `check`.
    """
    check(folder, typed=True)
    gfile.makedirs(folder)


def remove(path: str | os.PathLike) -> None:
    """Removes a file.

    Raises:
        ValueError: see `check`.
    """
    check(path)
    gfile.remove(path)


def remove_folder(folder: str | os.PathLike) -> None:
    """Removes a folder with all that is in it; of links in it, the links alone.

    Raises:
        ValueError: see `check`.
    """
    check(folder)
    if (local := foreign_files.local_path(folder)) is not None:
        shutil.rmtree(local)
    else:
        gfile.rmtree(folder)
