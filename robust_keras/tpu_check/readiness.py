"""Whether parts of a program are ready for a core: what keeps each from it, and the operations and memory it takes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from robust_keras.tpu_check import liveness, lowering, stablehlo
from robust_keras.tpu_check.parts import Part

HEADER = ("on a core", "operations", "FLOP", "GiB", "GiB in tiles")


class Readiness(NamedTuple):
    """What `check` finds.

    Attributes:
        rows: of a table below `HEADER`, text, one a part.
        problems: lines, what there is to mend; none where all is ready.
        kept_gib: of the variables that are there while any of the parts runs: GiB, and in tiles.
    """

    rows: list[tuple[str, ...]]
    problems: list[str]
    kept_gib: tuple[float, float]


def check(parts: Iterable[Part], *, memory_gib: float) -> Readiness:
    """Lowers each part, and looks for what a TPU would not take.

    Args:
        parts: what a core runs, one after another. Variables of all that `keeps` them are there while any of them runs.
        memory_gib: of a core.

    Returns:
        A `Readiness`.
    """
    found = [_look(part) for part in parts]
    kept = _Variables()
    for each in found:
        if each.part.keeps:
            kept |= each.variables
    rows, problems = [], []
    for each in found:
        problems += each.problems
        others = [kept[key] for key in kept.keys() - each.variables.keys()]
        gib = [memory.peak / 2**30 + there for memory, there in zip(each.memories, _gib(others))]
        if gib and gib[-1] > memory_gib:
            at = each.memories[-1].at.source or each.memories[-1].at.name
            problems.append(f"{each.part.name}: too large, {gib[-1]:.2f} of {memory_gib:g} GiB on a core, at {at}")
        rows.append((each.part.name, *(each.counts or ("", "")), *([f"{size:.3f}" for size in gib] or ("", ""))))
    return Readiness(rows, problems, _gib(kept.values()))


def _gib(tensors):
    packed, tiled = (sum(map(bytes_of, tensors)) for bytes_of in (liveness.packed_bytes, liveness.tiled_bytes))
    return packed / 2**30, tiled / 2**30


_Variables = dict[Any, stablehlo.Tensor]


class _Looked(NamedTuple):
    """What a part's program is.

    Attributes:
        part: of it.
        problems: lines; where there are some, what follows is empty.
        counts: operations and FLOP, text.
        memories: `liveness.Memory`, packed and in the tiles of a TPU.
        variables: see `lowering.Program`.
    """

    part: Part
    problems: list[str]
    counts: tuple[str, ...] = ()
    memories: Sequence[liveness.Memory] = ()
    variables: _Variables = {}


def _look(part: Part) -> _Looked:
    program = lowering.lower(part.function, *part.arguments)
    problems = [f"{part.name}: {problem}" for problem in lowering.problems(program)]
    if problems or program.module is None:
        return _Looked(part, problems)
    flops, is_all = lowering.flops(program.module)
    num_operations = sum(1 for _ in stablehlo.walk(program.module))
    counts = f"{num_operations:,}", f"{flops:.4g}{'' if is_all else ' a turn'}"
    memories = [liveness.peak_memory(program.module, padded=padded) for padded in (False, True)]
    return _Looked(part, [], counts, memories, program.variables)
