"""Snapshots of a run: arrays by name, in one `.npz` file that a marker commits.

`<directory>/step-00000600.npz` holds the arrays; `<directory>/step-00000600.json`, written last, holds what else is
known and the SHA-256 of the arrays' file. A snapshot without a valid marker does not exist: it is what an interrupted
write left behind. Nothing is renamed, so any `tf.io.gfile` path works; nothing is pickled, so any snapshot is safe to
read.
"""

import datetime
import hashlib
import json
import os
import posixpath
import re
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from absl import logging

from robust_keras import array_files, foreign_files, own_folders

gfile = tf.io.gfile
MOST_TEXT = 1 << 28  # Bytes of a text file.
_MARKER = re.compile(r"step-(\d{8})\.json")
_DATA = re.compile(r"step-(\d{8})\.npz")
# What says that a file is missing or cut off. Others, such as a file system that does not answer, say nothing of it.
_DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    FileNotFoundError,
    tf.errors.NotFoundError,
    tf.errors.OutOfRangeError,
    tf.errors.DataLossError,
)


class Snapshot(NamedTuple):
    """A verified snapshot.

    Attributes:
        step: after how many steps it was taken.
        info: a dictionary, as given to `write`.
        arrays: NumPy arrays by name.
    """

    step: int
    info: dict
    arrays: dict


def write(directory: str | os.PathLike, step: int, arrays: dict[str, np.ndarray], info: dict, *, keep: int = 2) -> None:
    """Writes a snapshot, then removes older ones but the newest `keep` in all, any of later steps, and what
    interrupted writes left behind.

    Args:
        directory: any `tf.io.gfile` path.
        step: int.
        arrays: NumPy arrays by name.
        info: what else to keep, as JSON can hold it.
        keep: how many to keep.
    """
    own_folders.make(directory)
    commit(stem_of(directory, step), arrays, info)
    # Later steps are what a run left behind that was resumed from before them.
    taken = steps(directory)
    older = [s for s in taken if s <= step]
    for unwanted in older[:-keep] + [s for s in taken if s > step]:
        withdraw(stem_of(directory, unwanted))
    kept = {_data_path(stem_of("", s)) for s in steps(directory)}
    for name in gfile.listdir(directory):
        if _DATA.fullmatch(name) and name not in kept:
            own_folders.remove(posixpath.join(str(directory), name))


def commit(stem: str, arrays: dict[str, np.ndarray], info: dict) -> None:
    """Writes arrays to `<stem>.npz`, then the marker `<stem>.json` without which they do not exist.

    Args:
        stem: any `tf.io.gfile` path, without an ending.
        arrays: NumPy arrays by name.
        info: what else to keep, as JSON can hold it.
    """
    withdraw(stem)  # An older write, before its data changes.
    marker = {"sha256": write_arrays(_data_path(stem), arrays), "info": info}
    write_text(marker_path(stem), json.dumps(marker, indent=1))


def is_committed(stem: str) -> bool:
    """Whether there is a marker, and a whole one."""
    try:
        return "sha256" in (read_object(marker_path(stem)) or {})
    except ValueError:
        return False


def withdraw(stem: str) -> None:
    """Removes the marker, if there is one."""
    if gfile.exists(marker_path(stem)):
        own_folders.remove(marker_path(stem))


def marker_path(stem: str) -> str:
    """Where `commit` writes the marker."""
    return f"{stem}.json"


def read_committed(stem: str) -> tuple[dict[str, np.ndarray], dict]:
    """Reads and verifies what `commit` wrote.

    Returns:
        (arrays, info).

    Raises:
        ValueError: where it is incomplete or its SHA-256 differs.
        tf.errors.OpError: where it cannot be read now.
    """
    data_path = _data_path(stem)
    try:
        marker = read_object(marker_path(stem)) or {}
        if not isinstance(marker.get("sha256"), str) or not isinstance(marker.get("info"), dict):
            raise ValueError(f"no whole marker in {marker_path(stem)}")
        if sha256(data_path) != marker["sha256"]:
            raise ValueError("its SHA-256 differs from the marker's")
        with foreign_files.open_regular(data_path) as file:
            return array_files.arrays(file), marker["info"]
    except _DAMAGE as error:
        raise ValueError(f"Expected an intact snapshot at {data_path}. Received: {why(error)}") from error


def write_arrays(path: str | os.PathLike, arrays: dict[str, np.ndarray], *, compressed: bool = False) -> str:
    """Writes NumPy arrays by name to an `.npz` file at any `tf.io.gfile` path, and returns its SHA-256.

    Raises:
        ValueError: for an array of objects, which only a pickle could hold.
    """
    if objects := [name for name, array in arrays.items() if np.asarray(array).dtype.hasobject]:
        raise ValueError(f"Expected arrays of numbers or text. Received: objects in {', '.join(objects)}")
    with own_folders.open_file(path, "wb") as file:
        stream = _HashingStream(file)
        (np.savez_compressed if compressed else np.savez)(stream, **arrays)  # type: ignore[arg-type]
    return stream.digest()


def stem_of(directory: str | os.PathLike, step: int) -> str:
    """Where the snapshot of a step is, without an ending."""
    return posixpath.join(str(directory), f"step-{step:08d}")


def steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the snapshots that have a marker, in rising order."""
    try:
        names = gfile.listdir(str(directory))
    except tf.errors.NotFoundError:
        return []
    matches = (_MARKER.fullmatch(name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def read_newest(directory: str | os.PathLike) -> Snapshot | None:
    """The newest intact snapshot, or None; a damaged one is passed over with a warning that names it."""
    for step in reversed(steps(directory)):
        try:
            return read(directory, step)
        except ValueError as error:
            logging.warning("Passing over a damaged snapshot: %s", error)
    return None


def read(directory: str | os.PathLike, step: int) -> Snapshot:
    """Reads and verifies one snapshot.

    Raises:
        ValueError: where it is incomplete or its SHA-256 differs.
    """
    arrays, info = read_committed(stem_of(directory, step))
    return Snapshot(step, info, arrays)


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with foreign_files.open_regular(path, follow=True) as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def modified(path: str | os.PathLike) -> datetime.datetime:
    """When a file was last written, by the file system, in UTC."""
    return datetime.datetime.fromtimestamp(gfile.stat(path).mtime_nsec / 1e9, datetime.timezone.utc)


def read_text(path: str | os.PathLike) -> str:
    """What a text file holds; nothing where there is none.

    Raises:
        ValueError: where it is no text.
    """
    try:
        with foreign_files.open_regular(path, most_bytes=MOST_TEXT) as file:
            return file.read().decode()
    except (FileNotFoundError, NotADirectoryError, tf.errors.NotFoundError):
        return ""
    except tf.errors.FailedPreconditionError:
        if gfile.isdir(path):
            raise
        return ""  # What should be its folder is a file.
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected text in {os.fspath(path)}. Received: {error}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file."""
    with own_folders.open_file(path) as file:
        file.write(text)


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; None where there is none, or an empty one, which an interrupted write left behind.

    Raises:
        ValueError: naming the file, where it is no JSON.
    """
    try:
        text = read_text(path)
        return json.loads(text) if text else None
    except RecursionError as error:
        raise ValueError(f"Expected JSON in {os.fspath(path)}. Received: too many levels of it") from error
    except ValueError as error:
        raise ValueError(f"Expected JSON in {os.fspath(path)}. Received: {error}") from error


def read_object(path: str | os.PathLike) -> dict[str, Any] | None:
    """What a JSON file holds that is an object, as all of ours are; None as of `read_json`.

    Raises:
        ValueError: naming the file, where it is no JSON, or another kind of it.
    """
    return None if (found := read_json(path)) is None else as_object(found, path)


def as_object(value: Any, path: str | os.PathLike) -> dict[str, Any]:
    """`value`, which a JSON file holds.

    Raises:
        ValueError: naming the file, where it is no object.
    """
    if not isinstance(value, dict):
        raise ValueError(f"Expected a JSON object, {{...}}, in {os.fspath(path)}. Received: {json.dumps(value)[:40]}")
    return value


def why(error: BaseException) -> str:
    """What went wrong with a file, on one line; of what it holds, no more than that it is something else."""
    if isinstance(error, KeyError):
        return f"nothing named {error.args[0]}" if len(str(error.args[0]).split()) == 1 else str(error.args[0])
    if isinstance(error, (LookupError, TypeError, AttributeError)):
        return "something else"
    return " ".join(str(getattr(error, "message", error)).split()) or type(error).__name__


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes a JSON file, which ends with a line break: without one it is not whole."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def _data_path(stem: str) -> str:
    return f"{stem}.npz"


class _HashingStream:
    """A write-only stream: `zipfile` then never seeks back, so what is hashed is what is stored."""

    def __init__(self, file):
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, data):
        self._hash.update(data)
        self._file.write(bytes(data))
        return len(data)

    def read(self, *args):  # np.savez takes only objects that can read, and never does.
        raise OSError("write-only")

    def flush(self):
        self._file.flush()

    def digest(self):
        return self._hash.hexdigest()
