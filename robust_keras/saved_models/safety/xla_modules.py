"""Programs of XLA inside a model: the functions of the process that they call by name.

They are StableHLO as MLIR bytecode (https://mlir.llvm.org/docs/BytecodeFormat/), as jax2tf writes it. Bytecode is not
compressed: the name of an operation stands in it, or the module does not have it. Where there are calls, their targets
are read. A custom call is the one operation of StableHLO with eight properties or more among which are texts, its
target and its settings; so texts of such properties have to be known ones, whatever operation they are of.
"""

from collections.abc import Iterator
from typing import NamedTuple

_BYTECODE = b"ML\xefR"
_CALL = b"custom_call"
# What waits for the host or another device.
_REFUSED = (b"infeed_v", b"outfeed_v", b"send_v", b"recv_v")
# Targets that XLA's passes take away: checks of shapes, dynamic shapes, and how arrays lie on devices.
_HARMLESS = {
    b"",
    b"SPMDFullToShardShape",
    b"SPMDShardToFullShape",
    b"Sharding",
    b"shape_assertion",
    b"stablehlo.dynamic_approx_top_k",
    b"stablehlo.dynamic_reduce_window",
    b"stablehlo.dynamic_rng_bit_generator",
    b"stablehlo.dynamic_top_k",
}
_PROPERTIES_OF_A_CALL = 8
_TEXT = 14  # Of the attributes of VHLO, StableHLO's stable form.
_TEXTS, _DIALECTS, _ATTRIBUTES, _OFFSETS, _PROPERTIES = 0, 1, 2, 3, 8  # Sections.
_LEAST_VERSION = 6
_PADDING = 0xCB


class _Attribute(NamedTuple):
    """Where an attribute stands, and whether its dialect has encoded it."""

    dialect: bytes
    is_encoded: bool
    start: int


def refused(module: bytes) -> list[str]:
    """What a module has that does more than compute.

    Args:
        module: the attribute of an XlaCallModule.
    """
    if not module.startswith(_BYTECODE):
        return ["a module that is no MLIR bytecode"]
    found = [name.decode().removesuffix("_v") for name in _REFUSED if name in module]
    if _CALL not in module:
        return found
    if module.count(_CALL) != module.count(_CALL + b"_v1\0") or b"call_target_name" in module:
        return [*found, "custom calls of unknown form"]
    try:
        targets = _targets(module)
    except (ValueError, IndexError):
        return [*found, "custom calls that cannot be read"]
    return [*found, *(f"custom_call of {target.decode(errors='replace')}" for target in sorted(targets - _HARMLESS))]


def _targets(module: bytes) -> set[bytes]:
    """Texts among the properties of what may be a custom call.

    Raises:
        ValueError, IndexError: for bytecode of another form.
    """
    version, position = _number(module, len(_BYTECODE))
    if version < _LEAST_VERSION:
        raise ValueError("properties by name")
    sections = _sections(module, module.index(b"\0", position) + 1)
    texts = list(_texts(module, *sections[_TEXTS]))
    dialects = list(_dialects(module, *sections[_DIALECTS], texts))
    attributes = list(_attributes(module, sections, dialects))
    position, end = sections[_PROPERTIES]
    number, position = _number(module, position)
    found = set()
    for _ in range(number):
        size, position = _number(module, position)
        properties = list(_numbers(module, position, position + size))
        position += size
        if position > end:
            raise ValueError("properties outside their section")
        if len(properties) < _PROPERTIES_OF_A_CALL:
            continue
        for each in properties[:_PROPERTIES_OF_A_CALL]:
            attribute = attributes[each]
            if attribute.dialect != b"vhlo" or not attribute.is_encoded:
                raise ValueError("an attribute that is not StableHLO's")
            kind, inside = _number(module, attribute.start)
            if kind == _TEXT:
                found.add(texts[_number(module, inside)[0]])
    return found


def _sections(module: bytes, position: int) -> dict[int, tuple[int, int]]:
    """Where each section starts and ends."""
    found: dict[int, tuple[int, int]] = {}
    while position < len(module):
        kind = module[position]
        size, position = _number(module, position + 1)
        if kind & 0x80:
            alignment, position = _number(module, position)
            while position % alignment if alignment else True:
                if module[position] != _PADDING:
                    raise ValueError("no padding")
                position += 1
        if kind & 0x7F in found or position + size > len(module):
            raise ValueError("sections that do not follow each other")
        found[kind & 0x7F] = position, position + size
        position += size
    if missing := {_TEXTS, _DIALECTS, _ATTRIBUTES, _OFFSETS, _PROPERTIES} - found.keys():
        raise ValueError(f"no sections {missing}")
    return found


def _texts(module: bytes, position: int, end: int) -> Iterator[bytes]:
    number, position = _number(module, position)
    sizes = []
    for _ in range(number):
        size, position = _number(module, position)
        sizes.append(size)
    start = end - sum(sizes)  # The last one's size is the first.
    if start < position:
        raise ValueError("texts outside their section")
    for size in reversed(sizes):
        yield module[start : start + size - 1]
        start += size


def _dialects(module: bytes, position: int, end: int, texts: list[bytes]) -> Iterator[bytes]:
    number, position = _number(module, position)
    for _ in range(number):
        name, position = _number(module, position)
        if name & 1:  # A section with its version follows.
            size, position = _number(module, position + 1)
            position += size
        if position > end:
            raise ValueError("dialects outside their section")
        yield texts[name >> 1]


def _attributes(module: bytes, sections: dict, dialects: list[bytes]) -> Iterator[_Attribute]:
    """All attributes, in order: they are listed by dialect, with the size of each."""
    position, end = sections[_OFFSETS]
    start = sections[_ATTRIBUTES][0]
    left, position = _number(module, position)
    _, position = _number(module, position)  # Of types, which follow.
    while left > 0:
        dialect, position = _number(module, position)
        number, position = _number(module, position)
        for _ in range(number):
            size, position = _number(module, position)
            yield _Attribute(dialects[dialect], bool(size & 1), start)
            start += size >> 1
        left -= number
        if position > end or not number:
            raise ValueError("attributes outside their section")


def _numbers(module: bytes, position: int, end: int) -> Iterator[int]:
    while position < end:
        number, position = _number(module, position)
        yield number


def _number(module: bytes, position: int) -> tuple[int, int]:
    """A number of MLIR, whose first byte says by its lowest bit that is set how many follow, and where it ends."""
    first = module[position]
    num_more = 8 if first == 0 else (first & -first).bit_length() - 1
    number = int.from_bytes(module[position : position + num_more + 1], "little")
    return number >> (8 if first == 0 else num_more + 1), position + num_more + 1
