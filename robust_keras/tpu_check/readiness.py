"""Whether parts of a program are ready for a core: what keeps each from it, and the operations and memory it takes."""

from collections.abc import Iterable
from typing import NamedTuple

from robust_keras.tpu_check import liveness, lowering, stablehlo
from robust_keras.tpu_check.parts import Part

HEADER = ("on a core", "operations", "FLOP", "GiB", "GiB in tiles")


class Readiness(NamedTuple):
    """What `check` finds.

    Attributes:
        rows: of a table below `HEADER`, text, one a part.
        problems: lines, what there is to mend; none where all is ready.
    """

    rows: list[tuple[str, ...]]
    problems: list[str]


def check(parts: Iterable[Part], *, memory_gib: float) -> Readiness:
    """Lowers each part, and looks for what a TPU would not take.

    Args:
        parts: what a core runs, one after another. Arguments of one that `keeps` them are there while the others run.
        memory_gib: of a core.

    Returns:
        A `Readiness`.
    """
    rows: list[tuple[str, ...]] = []
    problems: list[str] = []
    resident = _Bytes(0, 0)
    for part in parts:
        row, found, arguments = _checked(part, resident, memory_gib)
        resident = arguments if part.keeps else resident
        rows.append(row)
        problems += found
    return Readiness(rows, problems)


class _Bytes(NamedTuple):
    """Bytes of the same values, packed and in the tiles of a TPU's memory."""

    packed: int
    tiled: int


def _checked(part: Part, resident: _Bytes, memory_gib: float) -> tuple[tuple[str, ...], list[str], _Bytes]:
    """A row, problems, and the bytes of the arguments; of `resident` ones no less than that is there anyway."""
    program = lowering.lower(part.function, *part.arguments)
    problems = [f"{part.name}: {problem}" for problem in lowering.problems(program)]
    if problems or program.module is None:
        return (part.name, "", "", "", ""), problems, _Bytes(0, 0)
    flops, is_all = lowering.flops(program.module)
    num_operations = sum(1 for _ in stablehlo.walk(program.module))
    memories = [liveness.peak_memory(program.module, padded=padded) for padded in (False, True)]
    gib = [(m.peak + max(0, there - m.arguments)) / 2**30 for m, there in zip(memories, resident)]
    if gib[-1] > memory_gib:
        at = memories[-1].at.source or memories[-1].at.name
        problems.append(f"{part.name}: too large, {gib[-1]:.2f} of {memory_gib:g} GiB on a core, at {at}")
    row = (
        part.name,
        f"{num_operations:,}",
        f"{flops:.4g}{'' if is_all else ' a turn'}",
        *(f"{each:.3f}" for each in gib),
    )
    return row, problems, _Bytes(*(m.arguments for m in memories))
