"""The index of a model's variables: a stranger's file too, whose shapes TensorFlow allocates before it looks further.

It is a table of LevelDB's format without compression (TensorFlow's `tensor_bundle.proto` says what it holds): blocks
of (key, value), and at the end an index of the blocks.
"""

import math
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import wire

INDEX = "variables/variables.index"
_MOST_BYTES = 2**26
_ENTRY = 16  # Bytes that an entry is taken to need at least.
_MOST_DIMENSIONS = 254  # Of a tensor.
_FOOTER, _MAGIC = 48, (0xDB4775248B80FB57).to_bytes(8, "little")
_TRAILER = 5  # After each block: how it is compressed, and a checksum.


class Variable(NamedTuple):
    """What the index says of a variable; one in parts has no values itself."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    is_in_parts: bool


def variables(path: str) -> list[Variable]:
    """The variables of a SavedModel, or none where it has none, checked against the files that hold them.

    Args:
        path: the model's folder.

    Raises:
        ValueError: for an index that is none, or one that promises more than the files hold.
    """
    index = posixpath.join(path, INDEX)
    if not tf.io.gfile.exists(index):
        return []
    with foreign_files.open_regular(index, most_bytes=_MOST_BYTES) as file:
        content = file.read()
    try:
        read, num_shards = parse(content)
        _check(read, _sizes(path, num_shards))
    except ValueError as error:
        raise ValueError(f"Expected an index of variables. Received: {printable(index)}: {error}") from error
    return read


def parse(content: bytes) -> tuple[list[Variable], int]:
    """What the bytes of an index say: variables, and in how many files they are.

    Raises:
        ValueError: for bytes that are none.
    """
    header, *found = _entries(content)
    num_shards = _numbers(header[1]).get(1, 0) if header[0] == b"" else 0
    return [_variable(name, value) for name, value in found], num_shards


def _sizes(path: str, num_shards: int) -> list[int]:
    if not 1 <= num_shards <= foreign_files.MOST_FILES:
        raise ValueError(f"{num_shards} files of variables")
    names = [f"variables/variables.data-{k:05d}-of-{num_shards:05d}" for k in range(num_shards)]
    gfile = tf.io.gfile
    missing = [name for name in names if not gfile.exists(posixpath.join(path, name))]
    if missing:
        raise ValueError(f"no {missing[0]}")
    return [gfile.stat(posixpath.join(path, name)).length for name in names]


def _check(read: list[Variable], sizes: list[int]) -> None:
    for each in read:
        name = printable(each.name)
        if not 0 <= each.shard < len(sizes) or each.offset + each.size > sizes[each.shard]:
            raise ValueError(f"{name} of {each.size:,} bytes lies outside its file")
        if len(each.shape) > _MOST_DIMENSIONS:
            raise ValueError(f"{name} of {len(each.shape):,} dimensions")
        if each.dtype in ("variant", "resource"):
            raise ValueError(f"{name} is a {each.dtype}")
        # Numbers above 2^63 stand for negative ones.
        least, most = math.prod(each.shape) * max(tf.as_dtype(each.dtype).size, 1), each.size
        if least > (sum(sizes) if each.is_in_parts else most):
            raise ValueError(f"{name} of shape {list(each.shape)} in {most:,} bytes")
    total = sum(each.size for each in read)
    if total > sum(sizes):
        raise ValueError(f"variables of {total:,} bytes in files of {sum(sizes):,}")


def _variable(name: bytes, value: bytes) -> Variable:
    numbers, texts = _numbers(value), _texts(value)
    sizes = [_numbers(dimension).get(1, 0) for dimension in _texts(texts.get(2, [b""])[-1]).get(2, [])]
    try:
        dtype = tf.as_dtype(numbers.get(1, 0)).name
    except TypeError as error:
        raise ValueError(f"a variable of type {numbers.get(1, 0)}") from error
    place = [numbers.get(number, 0) for number in (3, 4, 5)]
    return Variable(name.decode(errors="replace"), dtype, tuple(sizes), place[0], place[1], place[2], 7 in texts)


def _numbers(content: bytes) -> dict[int, int]:
    """The last value of each field that is a number."""
    return {number: value for number, kind, value, _ in wire.fields(content) if kind == 0}


def _texts(content: bytes) -> dict[int, list[bytes]]:
    """The values of each field that is bytes."""
    found: dict[int, list[bytes]] = {}
    for number, kind, start, end in wire.fields(content):
        if kind == 2:
            found.setdefault(number, []).append(content[start:end])
    return found


def _entries(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table, in order."""
    if len(content) < _FOOTER or not content.endswith(_MAGIC):
        raise ValueError("no table")
    footer = content[-_FOOTER:]
    _, position = wire.varint(footer, 0, _FOOTER)  # Of another index, which is skipped.
    _, position = wire.varint(footer, position, _FOOTER)
    num_bytes = 0
    for _, handle in _of_block(content, footer[position:]):
        num_bytes += _ENTRY
        for key, value in _of_block(content, handle):
            num_bytes += len(key) + len(value) + _ENTRY
            if num_bytes > _MOST_BYTES:
                raise ValueError("a table that unpacks to more than it may")
            yield key, value


def _of_block(content: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    offset, position = wire.varint(handle, 0, len(handle))
    size, _ = wire.varint(handle, position, len(handle))
    if offset + size + _TRAILER > len(content) or size < 4:
        raise ValueError("a block outside the file")
    if content[offset + size] != 0:
        raise ValueError("a compressed block")
    restarts = int.from_bytes(content[offset + size - 4 : offset + size], "little")
    end, position, key = offset + size - 4 - 4 * restarts, offset, b""
    while position < end:
        shared, position = wire.varint(content, position, end)
        own, position = wire.varint(content, position, end)
        length, position = wire.varint(content, position, end)
        if shared > len(key) or own + length > end - position:
            raise ValueError("an entry outside its block")
        key = key[:shared] + content[position : position + own]
        position += own
        yield key, content[position : position + length]
        position += length
