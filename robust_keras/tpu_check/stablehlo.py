"""Programs in StableHLO, read from their text: operations in order, with types, regions and where they come from.

    module = stablehlo.parse(text)
    names = [operation.name for operation, _ in stablehlo.walk(module)]

The reader knows the text that TensorFlow writes, not all of MLIR, in both its forms: the plain one, and the generic one
of programs that are not valid, as some of changing shapes; of these it reads what has to be named.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_BITS = re.compile(r"(\d+)$")
_TENSOR = re.compile(r"tensor<([^<>]*(?:<[^<>]*>[^<>]*)?)>")
_VALUE = re.compile(r"%[\w$.-]+(?:#\d+)?")
_LOCATION = re.compile(r"\s*loc\(((?:[^()]|\([^()]*\))*)\)$")
_FUNCTION = re.compile(r'func\.func (?:\w+ )?@([^(]+)\(|"func\.func".*sym_name = "([^"]+)"')
_ALIAS = re.compile(r"parameter_number = (\d+) : i64}, output_index = array<i64(?:: (\d+))?>")
_NAME = re.compile(r'"?([a-z_]+\.[\w.]+|call|return)\b')
_CALLEE = re.compile(r'(?:@|call_target_name = ")([\w.$-]+)')
# What hands its operand on, as it is or seen in another way.
_VIEWS = {f"stablehlo.{name}" for name in ("reshape", "bitcast_convert", "optimization_barrier", "set_dimension_size")}
CALL = "call"
# What must happen though nothing depends on it.
_EFFECTS = {f"stablehlo.{name}" for name in ("custom_call", "infeed", "outfeed", "send", "recv")}


class Tensor(NamedTuple):
    """A type.

    Attributes:
        shape: a tuple of ints; None where a dimension is not known.
        element: such as 'f32', 'i1' or 'complex<f32>'.
    """

    shape: tuple
    element: str

    @property
    def size(self) -> int | None:
        """Elements; None where it is not known."""
        return None if None in self.shape else math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of an element as it lies in memory: no less than a byte."""
        found = _BITS.search(self.element.strip("<>").removesuffix(">"))
        width = int(found[1]) if found else 32
        return max(8, width) * (2 if self.element.startswith("complex") else 1)

    def __str__(self):
        return "x".join([*("?" if n is None else str(n) for n in self.shape), self.element])


class Operation(NamedTuple):
    """One operation.

    Attributes:
        name: such as 'stablehlo.add', 'call' or 'return'.
        results: names of the values it makes.
        operands: names of the values it takes, in order.
        types: a `Tensor` for each result.
        text: the line that it begins with, without names of results.
        regions: the `Block`s inside it.
        source: the name of TensorFlow's operation that it is part of, '' where there is none.
    """

    name: str
    results: tuple
    operands: tuple
    types: list
    text: str
    regions: list
    source: str


class Block(NamedTuple):
    """Operations in order.

    Attributes:
        arguments: names and types of the values it is given: a dictionary.
        operations: a list of `Operation`.
    """

    arguments: dict
    operations: list


class Module(NamedTuple):
    """A program.

    Attributes:
        functions: `Block` by name; 'main' is where it begins.
        donated: for the positions of main's results that may lie where an argument lay, that argument's position.
    """

    functions: dict
    donated: dict


def parse(text: str) -> Module:
    """Reads the text of a program: a `Module`, without what nothing depends on, which no compiler keeps either."""
    lines = text.splitlines()
    locations = dict(line.split(" = ", 1) for line in lines if line.startswith("#loc"))
    functions, donated, open_blocks, open_operations = {}, {}, [], []

    def begin(arguments=""):
        open_blocks.append(Block(_arguments(arguments), []))
        return open_blocks[-1]

    for raw in lines:
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith(("module", '"builtin.module"')):
            donated = {int(output or 0): int(parameter) for parameter, output in _ALIAS.findall(line)}
        elif function := _FUNCTION.match(line):
            functions[function[1] or function[2]] = begin(line[function.end() :].partition(") ->")[0])
        elif line.startswith("^bb"):
            open_blocks[-1].arguments.update(_arguments(line))
        elif line.startswith(("cond {", "reducer(")):
            operation = open_blocks[-1].operations[-1]
            open_operations.append(operation)
            inherited = dict(zip(_carried(operation.text), operation.types))
            operation.regions.append(begin(line))
            open_blocks[-1].arguments.update(inherited)
        elif line.startswith(("} do {", "}, {")):
            closed = open_blocks.pop()
            open_operations[-1].regions.append(begin())
            if line.startswith("} do"):
                open_blocks[-1].arguments.update(closed.arguments)
        elif line.startswith("}"):
            if not open_blocks:
                continue  # Of the module.
            open_blocks.pop()
            if open_operations and len(open_operations) >= len(open_blocks):
                operation = open_operations.pop()
                body, source = _without_location(line, locations)
                types = operation.types or _types(body.rpartition(" : ")[2], len(operation.results))
                # Where an operation has regions, its types and location may stand behind them.
                closed = operation._replace(types=types, source=operation.source or source)
                open_blocks[-1].operations[-1] = closed
        else:
            operation = _operation(line, locations)
            open_blocks[-1].operations.append(operation)
            if line.endswith("({"):
                open_operations.append(operation)
                operation.regions.append(begin())
    for block in functions.values():
        _prune(block)
    return Module(functions, donated)


def walk(
    module: Module, block: Block | None = None, tensors: dict[str, Tensor] | None = None
) -> Iterator[tuple[Operation, list[Tensor]]]:
    """All operations of a block, of what is inside of them and of what they call, in order, with their operands' types.

    Args:
        module: a `Module`.
        block: one of its blocks; main by default.
        tensors: the types of the values outside of the block that are read in it, by name.

    Yields:
        (operation, types): an `Operation` and a list of `Tensor`.
    """
    block = block or module.functions["main"]
    tensors = {**(tensors or {}), **block.arguments}
    for operation in block.operations:
        yield operation, [tensors[name] for name in operation.operands if name in tensors]
        tensors.update(zip(operation.results, operation.types))
        if operation.name == CALL:
            yield from walk(module, module.functions[callee(operation)])
        for region in operation.regions:
            yield from walk(module, region, tensors)


def definitions(block: Block) -> dict[str, Operation]:
    """The operation that makes a value, by the value's name."""
    return {name: operation for operation in block.operations for name in operation.results}


def is_view(operation: Operation) -> bool:
    """Whether an operation hands its operand on, as it is or with another shape."""
    if operation.name == "stablehlo.convert":
        return "->" not in operation.text  # One type.
    if operation.name == "stablehlo.transpose":
        axes = re.search(r"dims = \[([\d, ]*)\]", operation.text)
        return axes is not None and axes[1] == ", ".join(map(str, range(axes[1].count(",") + 1)))
    return operation.name in _VIEWS or operation.name == "mhlo.copy"


def seen_through(made: dict[str, Operation], name: str) -> str:
    """The value that a value is a view of; `made` are `definitions`."""
    while (operation := made.get(name)) is not None and is_view(operation):
        name = operation.operands[0]
    return name


def unchanged(loop: Operation) -> set[int]:
    """The positions of the values that every turn of a loop hands on as they are."""
    body = loop.regions[1]
    made = definitions(body)
    pairs = zip(body.arguments, body.operations[-1].operands)
    return {k for k, (name, returned) in enumerate(pairs) if seen_through(made, returned) == name}


def callee(operation: Operation) -> str:
    """The name of the function, or of the kernel, that a call calls."""
    found = _CALLEE.search(operation.text)
    if found is None:
        raise ValueError(f"Expected a call. Received: {operation.text}")
    return found[1]


def _prune(block):
    """Takes out what nothing depends on, and returns the names of the values that are used."""
    kept, used = [], set()
    for operation in reversed(block.operations):
        if operation.name == "return" or _has_effect(operation) or not used.isdisjoint(operation.results):
            kept.append(operation)
            used.update(operation.operands)
            for region in operation.regions:
                used |= _prune(region)
    block.operations[:] = reversed(kept)
    return used


def _has_effect(operation):
    inside = (inner for region in operation.regions for inner in region.operations)
    return operation.name in _EFFECTS or any(map(_has_effect, inside))


def _operation(line, locations):
    body, source = _without_location(line, locations)
    opens = body.endswith("({")
    left, _, right = body.partition(" = ") if body.startswith("%") else ("", "", body)
    types = "" if opens else right.rpartition(" : ")[2]
    name = _NAME.match(right)[1]
    count = re.search(r":(\d+)$", left)
    if count:
        results = tuple(f"{left[: count.start()]}#{k}" for k in range(int(count[1])))
    else:
        results = tuple(_VALUE.findall(left))
    operands = tuple(_VALUE.findall(right))
    if right.startswith("stablehlo.while"):
        operands = operands[1::2]  # %iterArg = %value
    name = {"stablehlo.return": "return", "func.return": "return", "func.call": CALL}.get(name, name)
    return Operation(name, results, operands, _types(types, len(results)), right, [], source)


def _carried(text):
    """Names for the values that a loop carries."""
    return _VALUE.findall(text)[0::2] if text.startswith("stablehlo.while") else []


def _types(text, count):
    found = [_tensor(inside) for inside in _TENSOR.findall(text.rpartition("->")[2])]
    return found[-count:] if count else []


def _arguments(text):
    return {name: _tensor(inside) for name, inside in re.findall(rf"(%\w+): {_TENSOR.pattern}", text)}


def _tensor(text):
    *shape, element = text.partition(", ")[0].split("x") if "complex" not in text else _complex(text)
    return Tensor(tuple(None if side == "?" else int(side) for side in shape), element)


def _complex(text):
    shape, _, element = text.partition("complex")
    return [*filter(None, shape.split("x")), f"complex{element}"]


def _without_location(line, locations):
    found = _LOCATION.search(line)
    return (line[: found.start()], _source(found[1], locations)) if found else (line, "")


def _source(location, locations):
    """The name inside a location: of 'fused[#loc1, #loc2]' the first one's."""
    for _ in range(9):
        if not (reference := re.search(r"#loc\d*", location)):
            break
        location = location.replace(reference[0], locations.get(reference[0], ""), 1)
        if quoted := re.search(r'"([^"]*)"', location):
            return quoted[1]
    quoted = re.search(r'"([^"]*)"', location)
    return quoted[1] if quoted else ""
