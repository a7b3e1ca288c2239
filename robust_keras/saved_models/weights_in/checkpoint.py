"""Opens a file of weights, of whichever format it is, and reads what it holds."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.foreign_files import printable
from robust_keras.saved_models.weights_in import haiku_files, safetensors_files, torch_files

_FORMATS = "a checkpoint of PyTorch (.pt), Haiku (.npy) or safetensors"
_WEIGHTS_ALONE = "; weights are read, as torch.save(model.state_dict(), FILE) writes them, and no model of classes"


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        format: 'torch', 'haiku' or 'safetensors'.
        content: containers of names, numbers, tensors and arrays; tensors are read while the file is open.
        num_bytes: the file's size.
        sha256: of the file.
    """

    format: str
    content: Any
    num_bytes: int
    sha256: str


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Checkpoint]:
    """Opens a file of weights; what it holds can be read inside the context.

    Args:
        path: any `tf.io.gfile` path.

    Yields:
        A `Checkpoint`.

    Raises:
        ValueError: for what is no such file, is damaged, or names anything that is not allowed; none of it was run.
        OSError: where it cannot be read.
    """
    path = os.fspath(path)
    if not tf.io.gfile.exists(path):
        raise ValueError(f"Expected {_FORMATS}. Received: {printable(path)}, which does not exist")
    with foreign_files.open_regular(path, follow=True) as file:
        digest, num_bytes = _digest(file)
        format_, read = _format(file, num_bytes, path)
        file.seek(0)
        try:
            content = read(file, num_bytes)
        except Exception as error:  # A damaged or hostile file can fail in any way.
            hint = _WEIGHTS_ALONE if format_ == "torch" and "the name" in str(error) else ""
            raise ValueError(f"Expected {_FORMATS}. Received: {printable(path)}, {why(error)}{hint}") from error
        yield Checkpoint(format_, content, num_bytes, digest)


def why(error: Exception) -> str:
    """What an error in a file's content says, on one line."""
    told = str(error) if isinstance(error, ValueError) else ""
    return printable(" ".join(told.split()) or f"damaged ({type(error).__name__})", most=300)


def _digest(file: BinaryIO) -> tuple[str, int]:
    digest, num_bytes = hashlib.sha256(), 0
    while part := file.read(2**20):
        digest.update(part)
        num_bytes += len(part)
    return digest.hexdigest(), num_bytes


def _format(file: BinaryIO, num_bytes: int, path: str) -> tuple[str, Callable[[BinaryIO, int], Any]]:
    """The format of a file and its reader, of how it begins: names lie."""
    file.seek(0)
    begin = file.read(64)
    if begin.startswith(b"PK\x03\x04"):
        return "torch", torch_files.read_zip
    if torch_files.is_legacy(begin):
        return "torch", torch_files.read_legacy
    if begin.startswith(haiku_files.NPY):
        return "haiku", haiku_files.read_npy
    if begin[:1] == b"\x80":
        return "haiku", haiku_files.read_pickle
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") <= safetensors_files.MOST_HEADER_BYTES:
        return "safetensors", safetensors_files.read
    received = "which is empty" if not num_bytes else f"which begins with {begin[:8]!r}"
    raise ValueError(f"Expected {_FORMATS}. Received: {printable(path)}, {received}")
