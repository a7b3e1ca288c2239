"""What XLA makes of a function, and what in it a TPU would not take.

    program = lowering.lower(model.train_step, batch)
    for problem in lowering.problems(program):
        print(problem)
    flops, is_all = lowering.flops(program.module)

Nothing is run and no TPU is needed: TensorFlow lowers the function for the CPU, and since that takes more than a TPU
does, the program is searched for the rest.
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras.engines import lowering as engine
from robust_keras.tpu_check import stablehlo

# The cores are of 32 bits, and take 64 as pairs. Of few numbers (step counters, shapes, the state of a generator) that
# costs nothing; a batch's is work twice over.
_FEW = 8
_HOST = {f"stablehlo.{name}" for name in ("infeed", "outfeed", "send", "recv")}
_KNOWN_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "TopK", "mhlo.topk"}


class Program(NamedTuple):
    """A function as XLA takes it.

    Attributes:
        module: a `stablehlo.Module`; None where TensorFlow could not make it.
        refusals: why it could not, a line each.
        operations: TensorFlow's operations, by name.
        variables: the `stablehlo.Tensor` of each variable that it takes, by the variable's `ref()`.
    """

    module: stablehlo.Module | None
    refusals: tuple
    operations: dict
    variables: dict


def lower(fn: Callable, *args: Any) -> Program:
    """Traces a function and makes its StableHLO.

    Args:
        fn: a function of tensors, as `tf.function(autograph=False)` takes it; it may read and assign variables.
        *args: what to call it with: nests of tensors, whose values don't matter.

    Returns:
        A `Program`. What TensorFlow cannot lower is in its `refusals`.

    Raises:
        ValueError: as the function does while it is traced, for arguments of unknown shape, and with TensorFlow 2.18,
            which makes no StableHLO.
    """
    try:
        traced = engine.trace(fn, *args)
        module = stablehlo.parse(traced.program("stablehlo"))
    except engine.Refused as error:
        return Program(None, error.lines, dict(error.operations), {})
    captured = list(module.functions["main"].arguments.values())[len(tf.nest.flatten(args)) :]
    pairs = zip(traced.captured, captured, strict=True)
    variables = {each.ref(): tensor for each, tensor in pairs if isinstance(each, tf.Variable)}
    return Program(module, (), traced.operations, variables)


def problems(program: Program) -> list[str]:
    """What keeps a program from a TPU, or from running well there.

    These are: what TensorFlow's bridge refuses; shapes that depend on values, with a bound or without; lists that have
    no elements, as a `TensorArray` of dynamic size has when compiled; calls of the host, and of kernels that a TPU
    lacks; doubles; 64-bit integers, but of at most 8 numbers; and random numbers without a seed, which no run repeats.

    Args:
        program: a `Program`.

    Returns:
        A list of lines, each with TensorFlow's operation, its name, the type and the line of Python if it is known.
        Of a thing that spreads only the beginning is there.
    """
    if program.module is None:
        return list(program.refusals)
    found: dict[tuple, str] = {}
    for k, tensor in enumerate(program.module.functions["main"].arguments.values()):
        for what, is_one in _FAULTS.items():
            if is_one(tensor):
                found[what, k] = f"{what}: argument {k}, {tensor}"
    for operation, given in stablehlo.walk(program.module):
        faults = [fault] if (fault := _fault_of_kind(operation)) else []
        faults += [
            f for f, is_one in _FAULTS.items() if any(map(is_one, operation.types)) and not any(map(is_one, given))
        ]
        for what in faults:
            types = ", ".join(map(str, operation.types))
            found.setdefault((what, operation.source), f"{what}: {_blamed(program, what, operation)}, {types}")
    return list(found.values())


def flops(module: stablehlo.Module) -> tuple[int, bool]:
    """Floating-point operations of a program's convolutions and matrix products: (flops, whether that is all).

    A multiplication and an addition are two. Products with the zeros around an image count, as in `costs`; those with
    the zeros that a stride's gradient puts between pixels don't. A loop counts as often as it runs; one whose end is
    not in the program counts once, and then that is not all. Of branches the one with the most counts.
    """
    return _block_flops(module, module.functions["main"], {})


def trip_count(module: stablehlo.Module, block: stablehlo.Block, loop: stablehlo.Operation) -> int | None:
    """How often a loop of a block runs, where it counts by ones from a constant to a constant; else None."""
    outside, body = stablehlo.definitions(block), stablehlo.definitions(loop.regions[1])
    starts = [_constant(outside, name) for name in loop.operands]
    names, unchanged = list(loop.regions[1].arguments), stablehlo.unchanged(loop)
    ends = loop.regions[1].operations[-1].operands
    counts = []
    for condition, called in _conditions(module, loop.regions[0], list(loop.regions[0].arguments)):
        inside = stablehlo.definitions(condition)
        for operation in condition.operations:
            if operation.name != "stablehlo.compare" or not re.search(r"\bLT\b", operation.text):
                continue
            low, high = (stablehlo.seen_through(inside, name) for name in operation.operands)
            k = called.index(low) if low in called else None
            limit = _constant(inside, high)
            if high in called and called.index(high) in unchanged:
                limit = starts[called.index(high)]
            if k is not None and None not in (starts[k], limit) and _adds_one(body, ends[k], names[k]):
                counts.append(max(0, limit - starts[k]))
    return min(counts, default=None)


_NO_ELEMENTS = "a list without elements, as of a TensorArray with dynamic_size=True"
# By what is wrong with a type, whether a `stablehlo.Tensor` is such a one.
_FAULTS = {
    "a shape that depends on values": lambda tensor: None in tensor.shape,
    _NO_ELEMENTS: lambda tensor: (
        tensor.shape[:1] == (0,) and not (len(tensor.shape) == 1 and tensor.element in ("i32", "i64"))
    ),
    "double precision": lambda tensor: tensor.element in ("f64", "complex<f64>"),
    "64-bit integers": lambda tensor: tensor.element in ("i64", "ui64") and (tensor.size or _FEW) > _FEW,
}


def _fault_of_kind(operation):
    """What is wrong with an operation whatever its type; None where nothing is."""
    if operation.name in _HOST:
        return "a call of the host"
    if operation.name == "stablehlo.custom_call":
        target = stablehlo.callee(operation)
        if "callback" in target:
            return f"a call of the host, {target}"
        if target not in _KNOWN_CALLS:
            return f"a kernel that a TPU lacks, {target}"
    if operation.name == "stablehlo.rng":
        return "random numbers without a seed"
    return None


def _blamed(program, what, operation):
    """TensorFlow's operation that made one of the program's, its name, and the line of Python."""
    if what == _NO_ELEMENTS:  # What is written to such a list is nowhere in the program.
        for each in program.operations.values():
            if each.type == "TensorListSetItem" and each.get_attr("resize_if_index_out_of_bounds"):
                return engine.named(each)
    made_by = program.operations.get(operation.source)
    return engine.named(made_by) if made_by is not None else f"{operation.name} {operation.source}".strip()


def _block_flops(module, block, tensors):
    total, is_all = 0, True
    tensors = {**tensors, **block.arguments}
    for operation in block.operations:
        tensors.update(zip(operation.results, operation.types))
        inner = [_block_flops(module, region, tensors) for region in operation.regions]
        if operation.name == stablehlo.CALL:
            inner = [_block_flops(module, module.functions[stablehlo.callee(operation)], {})]
        if operation.name in _PRODUCTS:
            total += _PRODUCTS[operation.name](operation, *(tensors[name] for name in operation.operands))
        elif operation.name == "stablehlo.while" and inner[1][0]:
            turns = trip_count(module, block, operation)
            total += inner[1][0] * (1 if turns is None else turns)
            is_all &= inner[1][1] and turns is not None
        elif inner:
            total += max(count for count, _ in inner)
            is_all &= all(known for _, known in inner)
    return total, is_all


def _conditions(module, block, names):
    """The block of a loop's condition and those it calls, each with its names for what the loop carries."""
    yield block, names
    for operation in block.operations:
        if operation.name == stablehlo.CALL and list(operation.operands) == names:
            function = module.functions[stablehlo.callee(operation)]
            yield from _conditions(module, function, list(function.arguments))


def _adds_one(body, name, argument):
    made = body.get(stablehlo.seen_through(body, name))
    if made is None or made.name != "stablehlo.add":
        return False
    one, other = (stablehlo.seen_through(body, operand) for operand in made.operands)
    return one == argument and _constant(body, other) == 1


def _constant(made, name):
    operation = made.get(stablehlo.seen_through(made, name))
    found = operation and re.match(r"stablehlo\.constant dense<(-?\d+)>", operation.text)
    return int(found[1]) if found else None


def _convolution_flops(operation, image, kernel):
    _, of_kernel, of_result = re.search(r"dim_numbers = \[(.*?)\]x\[(.*?)\]->\[(.*?)\]", operation.text).groups()
    result = dict(zip(of_result.split(", "), operation.types[0].shape))
    sides = dict(zip(of_kernel.split(", "), kernel.shape))
    window = {
        key: [int(number) for number in re.findall(r"-?\d+", found[1])]
        for key in ("stride", "pad", "lhs_dilate", "rhs_dilate")
        if (found := re.search(rf"{key} = (\[\[.*?\]\]|\[.*?\])", operation.text))
    }
    products = result["b"] * result["f"] * sides["i"]
    for d in range(len(image.shape) - 2):
        stride, gap, spread = (window[key][d] if key in window else 1 for key in ("stride", "lhs_dilate", "rhs_dilate"))
        low = window["pad"][2 * d] if "pad" in window else 0
        places, taps = result[str(d)], sides[str(d)]
        # Where a tap meets a pixel, or the zeros around, and not one of the zeros between pixels.
        products *= sum((p * stride - low + t * spread) % gap == 0 for p in range(places) for t in range(taps))
    return 2 * products


def _product_flops(operation, left, right):
    del right
    found = re.search(r"contracting_dims = \[([\d, ]*)\]", operation.text)
    axes = [int(axis) for axis in found[1].split(", ") if axis] if found else [len(left.shape) - 1]
    return 2 * operation.types[0].size * math.prod(left.shape[axis] for axis in axes)


_PRODUCTS = {
    "stablehlo.convolution": _convolution_flops,
    "stablehlo.dot": _product_flops,
    "stablehlo.dot_general": _product_flops,
}
