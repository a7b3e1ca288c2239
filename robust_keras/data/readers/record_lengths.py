"""How long the records of a TFRecord file say they are: TensorFlow sets aside so much memory before it reads one."""

import os
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from robust_keras import foreign_files

MOST_BYTES = 1 << 28  # Of a record.


def check(path: str) -> None:
    """Raises for a record of a local file that is longer than `MOST_BYTES`, or than the rest of the file.

    Raises:
        ValueError: see above, and for what is no regular file.
    """
    with foreign_files.open_regular(path, follow=True) as file:
        position, num_bytes = 0, os.fstat(file.fileno()).st_size
        while len(start := file.read(8)) == 8:
            # A record is a length and its checksum, then so many bytes and theirs.
            end = position + 12 + int.from_bytes(start, "little") + 4
            if end > num_bytes:
                raise ValueError(
                    f"Expected a whole TFRecord file. Received: {path} (the record at byte {position} would end "
                    f"at byte {end} of {num_bytes})"
                )
            _length(start, path)
            position = file.seek(end)


def check_compressed(file: BinaryIO, kind: str, path: str) -> None:
    """Raises for such a record of a compressed file; and for a file that has no end, or, with ZLIB, goes on after it:
    TensorFlow returns what it sees.

    Raises:
        ValueError, zlib.error: see above.
    """
    left, start = 0, b""  # Of a record, and the beginning of a length.
    for block in _unpacked(file, kind):
        position = 0
        while position < len(block):
            if left:
                passed = min(left, len(block) - position)
                left, position = left - passed, position + passed
                continue
            taken = block[position : position + 8 - len(start)]
            start, position = start + taken, position + len(taken)
            if len(start) == 8:
                left, start = 4 + _length(start, path) + 4, b""


def _unpacked(file: BinaryIO, kind: str) -> Iterable[bytes]:
    stream = zlib.decompressobj(wbits=47)  # Either kind.
    while data := file.read(1 << 16):
        while data:
            if stream.eof:
                if kind == "ZLIB":
                    raise ValueError("it goes on after its end")
                stream = zlib.decompressobj(wbits=47)
            yield from _as_far_as(stream, data)
            data = stream.unused_data
    if not stream.eof:
        raise ValueError("it is truncated")


def _as_far_as(stream, data: bytes) -> Iterator[bytes]:
    while data and not stream.eof:
        yield stream.decompress(data, 1 << 20)
        data = stream.unconsumed_tail


def _length(start: bytes, path: str) -> int:
    length = int.from_bytes(start, "little")
    if length > MOST_BYTES:
        raise ValueError(
            f"Expected records of at most {MOST_BYTES:,} bytes. Received: {foreign_files.printable(path)}, with one of "
            f"{length:,}"
        )
    return length
