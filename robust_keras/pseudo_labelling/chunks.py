"""The scores of a pool in files, one for each chunk of it, each with a marker: a chunk without one is not scored."""

import posixpath
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import ownership, storage
from robust_keras.pseudo_labelling.record_sets import writing

_IDENTITY = "identity.json"  # Of the pool, the classifier and the settings that the scores are of.


def claim(directory: str, identity: dict[str, Any]) -> None:
    """Makes a folder that of the scores of this pool.

    Raises:
        ValueError: for the scores of another one, naming what differs.
    """
    path = posixpath.join(directory, _IDENTITY)
    with writing(path):
        ownership.claim(path, identity, what="scores of this pool")


def is_claimed(directory: str) -> bool:
    """Whether a folder is one of scores."""
    return tf.io.gfile.exists(posixpath.join(directory, _IDENTITY))


def identity(directory: str) -> dict[str, Any]:
    """What the scores of a folder are of.

    Raises:
        ValueError: for a folder that has none.
    """
    found = storage.read_json(posixpath.join(directory, _IDENTITY))
    if type(found) is not dict or not all(type(found.get(key)) is int for key in ("num_images", "chunk_size")):
        raise ValueError(f"Expected a folder with scores. Received: {directory}")
    return found


def count(identity: dict[str, Any]) -> int:
    """The number of chunks of a pool."""
    return -(-identity["num_images"] // identity["chunk_size"])


def missing(directory: str) -> list[int]:
    """The chunks that are not scored yet."""
    present = set(tf.io.gfile.listdir(directory))
    chunks = range(count(identity(directory)))
    absent = [chunk for chunk in chunks if storage.marker_path(_stem("", chunk)) not in present]
    # A marker may be one that is being written, or half of one; they are read once all are there.
    return absent or [chunk for chunk in chunks if not is_scored(directory, chunk)]


def is_scored(directory: str, chunk: int) -> bool:
    """Whether a chunk has its marker, and a whole one."""
    return storage.is_committed(_stem(directory, chunk))


def write(directory: str, chunk: int, arrays: dict[str, np.ndarray], *, images_sha256: str) -> None:
    """Writes the scores of a chunk.

    Raises:
        ValueError: for a disk that is full or refuses.
    """
    with writing(stem := _stem(directory, chunk)):
        storage.commit(stem, arrays, {"images_sha256": images_sha256})


def read(directory: str, chunk: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The scores of a chunk, and what its marker says beside.

    Raises:
        ValueError: for a damaged one, which will then be scored again.
    """
    try:
        return storage.read_committed(_stem(directory, chunk))
    except ValueError as error:
        storage.withdraw(_stem(directory, chunk))
        raise ValueError(f"{error}; the command of the worker whose it is scores these images again") from error


def _stem(directory: str, chunk: int) -> str:
    return posixpath.join(directory, f"chunk-{chunk:08d}")
