"""The index of a model's variables: a stranger's file too, whose shapes TensorFlow allocates before it looks further.

It is a table of LevelDB's format without compression (TensorFlow's `tensor_bundle.proto` says what it holds): blocks
of (key, value), and at the end an index of the blocks.
"""

import math
import posixpath
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import wire

INDEX = "variables/variables.index"
_MOST_BYTES = 2**26
_ENTRY = 16  # Bytes that an entry is taken to need at least.
_MOST_DIMENSIONS = 254  # Of a tensor.
# What TensorFlow writes: the kind on the wire by the number of a field. Of others it might read more than is seen here.
_HEADER = {1: 0, 2: 0, 3: 2}
_VARIABLE, _SLICES = {1: 0, 2: 2, 3: 0, 4: 0, 5: 0, 6: 5, 7: 2}, 7
_SHAPE, _DIMENSIONS = {2: 2}, 2
_DIMENSION = {1: 0, 2: 2}
_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
_MOST_TEXTS = 2**27  # Elements of texts, each of which takes 24 bytes and more.
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
        others = [name for name, _ in foreign_files.regular_files(path) if name.startswith("variables/variables")]
        if others:  # TensorFlow would look for variables of its first format there.
            raise ValueError(f"Expected {INDEX} beside variables. Received: {printable(others[0])} without it")
        return []
    with foreign_files.open_regular(index, most_bytes=_MOST_BYTES) as file:
        content = file.read()
    try:
        read, num_shards = parse(content)
        _check(read, _sizes(path, num_shards))
        _check_objects(path, read, num_shards)
    except ValueError as error:
        raise ValueError(f"Expected an index of variables. Received: {printable(index)}: {error}") from error
    return read


def parse(content: bytes) -> tuple[list[Variable], int]:
    """What the bytes of an index say: variables, and in how many files they are.

    Raises:
        ValueError: for bytes that are none.
    """
    header, *found = _entries(content)
    if header[0]:
        raise ValueError("no header")
    num_shards = _read(header[1], _HEADER).get(1, 0)
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
    if (texts := sum(math.prod(each.shape) for each in read if each.dtype == "string")) > _MOST_TEXTS:
        raise ValueError(f"{texts:,} texts")
    total = sum(each.size for each in read)
    if total > sum(sizes):
        raise ValueError(f"variables of {total:,} bytes in files of {sum(sizes):,}")


def _check_objects(path: str, read: list[Variable], num_shards: int) -> None:
    """Sizes of the message about objects that stands among the variables."""
    for each in read:
        if each.name == _OBJECTS and each.dtype == "string" and each.shape == ():
            if each.size > _MOST_BYTES:
                raise ValueError(f"objects of {each.size:,} bytes")
            file = posixpath.join(path, f"variables/variables.data-{each.shard:05d}-of-{num_shards:05d}")
            with foreign_files.open_regular(file) as stream:
                stream.seek(each.offset)
                content = stream.read(each.size)
            size, position = wire.varint(content, 0, len(content))
            position += 4  # A checksum of the size.
            wire.parse(content[position : position + size], "tensorflow.TrackableObjectGraph", most=_MOST_BYTES)


def _variable(name: bytes, value: bytes) -> Variable:
    found = _read(value, _VARIABLE, repeated=_SLICES)
    dimensions = _read(found.get(2, b""), _SHAPE, repeated=_DIMENSIONS).get(_DIMENSIONS, [])
    sizes = [_read(dimension, _DIMENSION).get(1, 0) for dimension in dimensions]
    try:
        dtype = tf.as_dtype(found.get(1, 0)).name
    except TypeError as error:
        raise ValueError(f"a variable of type {found.get(1, 0)}") from error
    place = [found.get(number, 0) for number in (3, 4, 5)]
    return Variable(name.decode(errors="replace"), dtype, tuple(sizes), place[0], place[1], place[2], _SLICES in found)


def _read(content: bytes, kinds: dict[int, int], *, repeated: int = 0) -> dict[int, Any]:
    """The fields of a message, of which one may stand more than once.

    Raises:
        ValueError: for other fields, and for one that stands twice.
    """
    found: dict[int, Any] = {}
    for number, kind, value, end in wire.fields(content):
        if kinds.get(number) != kind or (number in found and number != repeated):
            raise ValueError(f"a field {number} of kind {kind} that is unknown, or stands twice")
        given = value if kind == 0 else content[value:end]
        found[number] = [*found.get(number, []), given] if number == repeated else given
    return found


def _entries(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a table, in order."""
    if len(content) < _FOOTER or not content.endswith(_MAGIC):
        raise ValueError("no table")
    footer = content[-_FOOTER:]
    _, position = wire.varint(footer, 0, _FOOTER)  # Of another index, which is skipped.
    _, position = wire.varint(footer, position, _FOOTER)
    num_bytes, last = 0, None
    for most, handle in _of_block(content, footer[position:]):
        num_bytes += _ENTRY
        for key, value in _of_block(content, handle):
            num_bytes += len(key) + len(value) + _ENTRY
            if num_bytes > _MOST_BYTES:
                raise ValueError("a table that unpacks to more than it may")
            if key > most or (last is not None and key <= last):
                raise ValueError("keys that do not rise")
            last = key
            yield key, value


def _of_block(content: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Its entries. Some are listed as places where reading may start; they have to be read alike from the start."""
    offset, position = wire.varint(handle, 0, len(handle))
    size, _ = wire.varint(handle, position, len(handle))
    if offset + size + _TRAILER > len(content) or size < 8:
        raise ValueError("a block outside the file")
    if content[offset + size] != 0:
        raise ValueError("a compressed block")
    number = int.from_bytes(content[offset + size - 4 : offset + size], "little")
    end, position, key = offset + size - 4 - 4 * number, offset, b""
    if not 0 < number <= size // 4 - 1:
        raise ValueError("a block of no entries")
    starts = [offset + start for (start,) in struct.iter_unpack("<I", content[end : offset + size - 4])]
    if starts[0] != offset or starts != sorted(set(starts)):
        raise ValueError("entries in no order")
    starts.reverse()
    while position < end:
        is_start = bool(starts) and starts[-1] == position
        if is_start:
            starts.pop()
        shared, position = wire.varint(content, position, end)
        own, position = wire.varint(content, position, end)
        length, position = wire.varint(content, position, end)
        if shared > (0 if is_start else len(key)) or own + length > end - position:
            raise ValueError("an entry outside its block")
        key = key[:shared] + content[position : position + own]
        position += own
        yield key, content[position : position + length]
        position += length
    if starts and starts != [end]:
        raise ValueError("an entry that starts inside another")
