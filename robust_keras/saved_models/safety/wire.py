"""Protocol buffers of strangers, walked over before they are parsed: how much memory they will take, what stands twice.

A parsed message takes many times the bytes of its small fields, and about the bytes of its large ones, such as the
values of a constant. The walk enters large messages alone, and skips large values: a gigabyte takes milliseconds. Small
messages are taken to be full of others, and are looked at themselves where that would be too much.
"""

from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pool, message, message_factory
from google.protobuf.descriptor import FieldDescriptor

MOST_DEPTH = 90  # Parsers stop at 100.
_LARGE = 4096  # Bytes; what is smaller is not entered at first.
_FIELD, _TEXT = 128, 32  # Bytes of memory that a field, or a text, is taken to need at least.
_FULL = 64  # For a byte of a message that is not entered: a field needs two, though usual ones have nine.
_ALWAYS = ("tensorflow.SavedModel", "tensorflow.MetaGraphDef")  # Are entered however small.
_VALUES = {FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING}
_FIXED = {
    FieldDescriptor.TYPE_DOUBLE,
    FieldDescriptor.TYPE_FIXED32,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_FLOAT,
    FieldDescriptor.TYPE_SFIXED32,
    FieldDescriptor.TYPE_SFIXED64,
}
_SKIPPED = _VALUES | _FIXED


def parse(content: bytes, name: str, *, most: int) -> Any:
    """A message of a kind that TensorFlow has.

    Args:
        content: its bytes.
        name: of its kind, such as 'tensorflow.SavedModel'.
        most: bytes that may be anything but large values.

    Raises:
        ValueError: for bytes that are none, or would take more memory than that allows.
    """
    descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    try:
        _check(content, descriptor, most, _LARGE)
    except ValueError:
        _check(content, descriptor, most, 0)
    try:
        return message_factory.GetMessageClass(descriptor).FromString(content)
    except message.DecodeError as error:
        raise ValueError(f"no {descriptor.name}: {error}") from error


def varint(content: bytes, position: int, end: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends.

    Raises:
        ValueError: where there is none.
    """
    value = shift = 0
    while position < end and shift < 70:
        byte = content[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value & (2**64 - 1), position
    raise ValueError("no number where one is expected")


def fields(content: bytes, position: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int, int]]:
    """The fields of a message between two places, as (number, kind, value or start, end of its bytes).

    Yields:
        Of kind 0 the number itself, of the others where the bytes of the value start.

    Raises:
        ValueError: for bytes that are no message.
    """
    end = len(content) if end is None else end
    while position < end:
        tag = content[position]
        if tag < 0x80:
            position += 1
        else:
            tag, position = varint(content, position, end)
        kind = tag & 7
        if kind == 0:
            value, position = varint(content, position, end)
            yield tag >> 3, kind, value, position
            continue
        if kind == 2:
            size = content[position] if position < end else 0x80
            if size < 0x80:
                position += 1
            else:
                size, position = varint(content, position, end)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if size > end - position:
            raise ValueError("a field that is longer than what holds it")
        yield tag >> 3, kind, position, position + size
        position += size


def _check(content: bytes, descriptor: Any, most: int, large: int) -> None:
    waiting, cost = [(descriptor, 0, len(content), 0)], 0
    while waiting:
        of, start, end, depth = waiting.pop()
        if depth > MOST_DEPTH:
            raise ValueError(f"messages inside messages, {depth} deep")
        known, seen = of.fields_by_number, set()
        for number, kind, value, after in fields(content, start, end):
            field = known.get(number)
            inner = field.message_type if field is not None and kind == 2 else None
            if inner is not None and field.has_presence:  # Neither repeated nor a map.
                if number in seen:
                    raise ValueError(f"{of.name}.{field.name} twice")
                seen.add(number)
            size = after - value if kind == 2 else 0
            if inner is not None and (size > large or inner.full_name in _ALWAYS):
                waiting.append((inner, value, after, depth + 1))
                cost += _FIELD
            elif inner is not None:
                cost += size * _FULL + _FIELD
            elif size > _LARGE and field is not None and field.type in _SKIPPED:
                cost += _FIELD
            elif field is not None and field.type in _VALUES:
                cost += size + _TEXT
            else:
                cost += max(size, _FIELD)
            if cost > most:
                raise ValueError(f"more than {most:,} bytes of anything but values")
