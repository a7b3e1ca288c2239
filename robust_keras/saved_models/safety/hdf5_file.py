"""HDF5 files of weights, read as bytes: the part of the format that Keras writes through h5py, and nothing else.

The library reads much more, whatever a file says: links to other files, data sets that are made of others', filters
that it loads as plug-ins, packed chunks. Here a file is a tree of groups, each of which is met once, and of data sets
of plain numbers that lie in it in one piece. See the HDF5 file format specification, version 3.0, sections II to IV.
"""

import math
import struct
from collections.abc import Iterator
from typing import NamedTuple

from robust_keras.foreign_files import printable

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_NOWHERE = (1 << 64) - 1
_MOST_PARTS = 1_000_000
_MOST_DEPTH = 64
_MOST_AXES = 32
_SUPERBLOCK_BYTES = 96
_GROUP, _DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE, _CONTINUATION = 0x11, 0x1, 0x3, 0x8, 0xC, 0x10
# What else an object may say: nothing, fill values, times of change, and how a tree is split.
_HARMLESS = {0x0, 0x4, 0x5, 0x12, 0x13}
_REFUSED = {
    0x2: "links to elsewhere, or in another form than Keras writes",
    0x6: "links to elsewhere, or in another form than Keras writes",
    0x7: "data in other files",
    0xB: "filters",
    0xF: "a shared table",
    0x15: "many attributes",
}
_CLASSES = {0: "integers", 1: "floats", 3: "text", 5: "opaque", 8: "enumeration"}
_FIXED_BYTES = {0: 4, 1: 12, 3: 0}  # Of what a type's class says of itself.


class Dataset(NamedTuple):
    """An array in an HDF5 file."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int


def datasets(content: bytes | memoryview) -> list[Dataset]:
    """The arrays of a file of weights.

    Args:
        content: of the whole file.

    Raises:
        ValueError: why it is not what Keras writes, naming the data set or group.
    """
    try:
        return list(_File(content).datasets())
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"its weights are no whole HDF5 file: {error}") from error


class _File:
    def __init__(self, content: bytes | memoryview) -> None:
        self._content = memoryview(content)
        self._taken: dict[int, tuple[int, str]] = {}  # Where parts begin: where they end, and whose they are.
        self._num_parts = 0
        self._heaps: dict[int, dict[int, int]] = {}  # Texts of attributes by place: how long each is.

    def datasets(self) -> Iterator[Dataset]:
        """All of them, by a walk that meets each object once."""
        waiting = [("/", self._root(), 0)]
        while waiting:
            name, address, depth = waiting.pop()
            if depth > _MOST_DEPTH:
                raise ValueError(f"{printable(name)} lies deeper than {_MOST_DEPTH} groups")
            messages = list(self._messages(address, name))
            kinds = {kind for kind, _ in messages}
            for kind, body in messages:
                if kind == _ATTRIBUTE:
                    self._check_attribute(body, name)
            if _GROUP in kinds and not kinds & {_DATASPACE, _DATATYPE, _LAYOUT}:
                found = self._members(messages, name)
                waiting += [(f"{name.rstrip('/')}/{inner}", place, depth + 1) for inner, place in found]
            else:
                yield self._dataset(messages, name)
        self._check_apart()

    def _root(self) -> int:
        content = self._content
        version, _, _, _, _, offset_bytes, length_bytes = struct.unpack_from("<7B", content, 8)
        if content[:8] != _SIGNATURE or version != 0 or (offset_bytes, length_bytes) != (8, 8):
            raise ValueError("its weights are no HDF5 file as Keras writes it")
        base, _, end, driver = struct.unpack_from("<4Q", content, 24)
        if base != 0 or end > len(content) or driver != _NOWHERE:
            raise ValueError("its weights are no whole HDF5 file")
        return struct.unpack_from("<Q", content, 64)[0]

    def _piece(self, address: int, num_bytes: int, name: str) -> memoryview:
        if address + num_bytes > len(self._content):
            raise ValueError(f"{printable(name)} lies outside of the HDF5 file")
        return self._content[address : address + num_bytes]

    def _take(self, address: int, num_bytes: int, name: str) -> memoryview:
        """A part of the file that is nobody else's."""
        piece = self._piece(address, num_bytes, name)
        if address in self._taken:
            raise ValueError(f"{printable(name)} is another name of something else, or a part of itself")
        self._taken[address] = address + num_bytes, name
        self._count()
        return piece

    def _count(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MOST_PARTS:
            raise ValueError(f"the HDF5 file has more than {_MOST_PARTS:,} parts")

    def _check_apart(self) -> None:
        previous_end = _SUPERBLOCK_BYTES
        for begin in sorted(self._taken):
            end, name = self._taken[begin]
            if begin < previous_end:
                raise ValueError(f"{printable(name)} lies where another part of the HDF5 file does")
            previous_end = end

    def _messages(self, address: int, name: str) -> Iterator[tuple[int, memoryview]]:
        """What an object says of itself: (kind, content)."""
        version, count, _, num_bytes = struct.unpack_from("<BxHLL", self._piece(address, 16, name))
        if version != 1:
            raise ValueError(f"{printable(name)} is in another form than Keras writes")
        blocks = [self._take(address, 16 + num_bytes, name)[16:]]
        for block in blocks:
            length, at = len(block), 0
            while at + 8 <= length and count > 0:
                kind, size, flags = struct.unpack_from("<HHB", block, at)
                body = block[at + 8 : at + 8 + size]
                count -= 1
                self._count()
                if len(body) < size:
                    raise ValueError(f"{printable(name)} is cut off")
                if kind in _REFUSED or flags & 2:
                    raise ValueError(f"{printable(name)} has {_REFUSED.get(kind, 'a shared type')}")
                if kind == _CONTINUATION:
                    place, extent = struct.unpack_from("<QQ", body)
                    blocks.append(self._take(place, extent, name))
                elif kind in (_GROUP, _DATASPACE, _DATATYPE, _LAYOUT, _ATTRIBUTE):
                    yield kind, body
                elif kind not in _HARMLESS:
                    raise ValueError(f"{printable(name)} says what Keras never writes, {kind:#x}")
                at += 8 + size

    def _members(self, messages: list[tuple[int, memoryview]], name: str) -> Iterator[tuple[str, int]]:
        """(name, address) of what is in a group."""
        tree, heap = struct.unpack_from("<QQ", self._only(messages, _GROUP, name))
        signature, size, _, names = struct.unpack_from("<4s4xQQQ", self._take(heap, 32, name))
        if signature != b"HEAP":
            raise ValueError(f"{printable(name)} has no names")
        texts = self._take(names, size, name)
        seen = set()
        for leaf in self._leaves(tree, name):
            signature, count = struct.unpack_from("<4s2xH", self._piece(leaf, 8, name))
            if signature != b"SNOD":
                raise ValueError(f"{printable(name)} has no table of what is in it")
            entries = self._take(leaf, 8 + 40 * count, name)[8:]
            for offset, address, cache in struct.iter_unpack("<QQL20x", entries):
                inner = _text(texts, offset)
                if cache not in (0, 1):
                    raise ValueError(f"{printable(name)} has a link, {printable(inner)}")
                if inner in seen or inner in ("", ".", "..") or "/" in inner:
                    raise ValueError(f"{printable(name)} has two of one name, or none: {printable(inner)}")
                seen.add(inner)
                yield inner, address

    def _leaves(self, address: int, name: str) -> Iterator[int]:
        waiting: list[tuple[int, int | None]] = [(address, None)]
        while waiting:
            address, expected = waiting.pop()
            signature, kind, level, count = struct.unpack_from("<4sBBH", self._piece(address, 24, name))
            if signature != b"TREE" or kind != 0 or level != (level if expected is None else expected):
                raise ValueError(f"{printable(name)} has no tree of what is in it")
            pointers = struct.unpack_from(f"<{2 * count + 1}Q", self._take(address, 16 * count + 32, name), 24)
            for child in pointers[1::2]:
                if level:
                    waiting.append((child, level - 1))
                else:
                    yield child

    def _only(self, messages: list[tuple[int, memoryview]], kind: int, name: str) -> memoryview:
        found = [body for each, body in messages if each == kind]
        if len(found) != 1:
            raise ValueError(f"{printable(name)} is neither a group nor a data set")
        return found[0]

    def _dataset(self, messages: list[tuple[int, memoryview]], name: str) -> Dataset:
        shape = _shape(self._only(messages, _DATASPACE, name), name)
        item_bytes, _ = _type(self._only(messages, _DATATYPE, name), name)
        layout = self._only(messages, _LAYOUT, name)
        num_bytes = math.prod(shape) * item_bytes
        version, kind = struct.unpack_from("<BB", layout)
        if version != 3 or kind not in (0, 1):
            raise ValueError(f"{printable(name)} is packed in chunks, or made of other data sets")
        if kind == 0:
            held = struct.unpack_from("<H", layout, 2)[0]
            self._inside(layout, 4, held, name)
        else:
            address, held = struct.unpack_from("<QQ", layout, 2)
            if address == _NOWHERE:
                held = 0
            elif held:
                self._take(address, held, name)
        if num_bytes > held:
            raise ValueError(
                f"{printable(name)} of {shape} is {num_bytes:,} bytes, and the file holds {held:,} of them"
            )
        return Dataset(name[1:], shape, num_bytes)

    def _inside(self, body: memoryview, start: int, num_bytes: int, name: str) -> memoryview:
        if start + num_bytes > len(body):
            raise ValueError(f"{printable(name)} is cut off")
        return body[start : start + num_bytes]

    def _check_attribute(self, body: memoryview, name: str) -> None:
        """Raises ValueError for other attributes than single numbers or texts."""
        version, _, name_bytes, type_bytes, space_bytes = struct.unpack_from("<BBHHH", body)
        if version not in (1, 3) or body[1]:
            raise ValueError(f"{printable(name)} has an attribute in another form than Keras writes")
        at = 8 if version == 1 else 9  # With the character set of its name.
        sizes = (name_bytes, type_bytes, space_bytes)
        padded = [-(-size // 8) * 8 if version == 1 else size for size in sizes]
        starts = [at, at + padded[0], at + padded[0] + padded[1]]
        of_type, of_space = (self._inside(body, starts[k], sizes[k], name) for k in (1, 2))
        shape = _shape(of_space, name)
        item_bytes, is_elsewhere = _type(of_type, name, text_elsewhere=True)
        values = self._inside(body, sum(padded) + at, math.prod(shape) * item_bytes, name)
        if is_elsewhere:
            for length, address, index in struct.iter_unpack("<LQL", values):
                self._check_text(address, index, length, name)

    def _check_text(self, address: int, index: int, length: int, name: str) -> None:
        if (address, index, length) == (0, 0, 0):
            return
        if address not in self._heaps:
            self._heaps[address] = dict(self._texts(address, name))
        if length > self._heaps[address].get(index, -1):
            raise ValueError(f"{printable(name)} has a text that is not in the file")

    def _texts(self, address: int, name: str) -> Iterator[tuple[int, int]]:
        """(number, bytes) of what is in a heap of texts, which ends with what is free."""
        signature, version, size = struct.unpack_from("<4sB3xQ", self._piece(address, 16, name))
        if signature != b"GCOL" or version != 1:
            raise ValueError(f"{printable(name)} has a text that is not in the file")
        heap, at = self._take(address, size, name), 16
        while at + 16 <= size:
            number, held = struct.unpack_from("<H6xQ", heap, at)
            self._count()
            at += held if number == 0 else 16 + -(-held // 8) * 8
            if at > size or (number == 0 and at != size):
                raise ValueError(f"{printable(name)} has texts that do not fit into their place")
            if number:
                yield number, held


def _shape(body: memoryview, name: str) -> tuple[int, ...]:
    version, rank, flags = struct.unpack_from("<BBB", body)
    if version not in (1, 2) or rank > _MOST_AXES or flags & ~1 or (version == 2 and body[3] > 2):
        raise ValueError(f"{printable(name)} has a shape in another form than Keras writes")
    if version == 2 and body[3] == 2:
        return (0,)  # Of nothing.
    return struct.unpack_from(f"<{rank}Q", body, 8 if version == 1 else 4)


def _type(body: memoryview, name: str, *, text_elsewhere: bool = False) -> tuple[int, bool]:
    """(bytes of an item, whether it is text that lies in the file's heap)."""
    first, bits, item_bytes = struct.unpack_from("<B3sL", body)
    kind, version = first & 15, first >> 4
    if version not in (1, 2, 3) or not item_bytes:
        raise ValueError(f"{printable(name)} is of a type in another form than Keras writes")
    if kind == 9 and text_elsewhere and bits[0] & 15 == 1 and item_bytes == 16:
        _type(body[8:], name)
        return item_bytes, True
    if kind not in _CLASSES or item_bytes > 1 << 16 or (kind in (0, 1) and item_bytes > 16):
        raise ValueError(f"{printable(name)} is of neither numbers nor text, but of the class {kind} of types")
    if kind == 8:
        _type(body[8:], name)
    if len(body) < 8 + _FIXED_BYTES.get(kind, 0):
        raise ValueError(f"{printable(name)} is cut off")
    return item_bytes, False


def _text(heap: memoryview, offset: int) -> str:
    """What stands at a place of a heap of names, up to its zero."""
    end = bytes(heap[offset : offset + 1024]).find(b"\0")
    if end < 0:
        raise ValueError("a group has a name without an end")
    return bytes(heap[offset : offset + end]).decode("utf-8", "backslashreplace")
