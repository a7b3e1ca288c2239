"""Where the paths come from that a program gives to operations on files.

A saver may read and write what it is told to by whoever calls it, and a table its asset. A path that the program
itself has made up, or takes from an image's caller, is refused.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras.saved_models.safety import operations, wire
from robust_keras.saved_models.safety.graphs import Finding

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_PASSED_ON = {"Identity", "StopGradient", "ShardedFilename"}
# What a saver adds to the name of a checkpoint: '_temp/part', or one of TensorFlow 1 with a number.
_ADDED = re.compile(rb"[\w.-]*(/[\w-]+)?")
_MOST_STEPS = 5_000_000  # From node to node, together: some seconds.
_MAIN = ""
_SAVER, _ASSET = "the caller of the saver", "an asset"


class _Body(NamedTuple):
    """The main graph, whose name is empty, or a function: its nodes, and the places of its arguments, by name."""

    name: str
    nodes: dict[str, Any]
    arguments: dict[str, int]

    def where(self) -> str:
        return f"function {self.name}" if self.name else "the main graph"


class Program:
    """A `MetaGraphDef` as bodies that call each other.

    Attributes:
        bodies: by name.
    """

    def __init__(self, meta_graph: Any):
        graph, objects = meta_graph.graph_def, meta_graph.object_graph_def
        self._objects = objects
        self._steps = 0
        self.bodies = {_MAIN: _Body(_MAIN, {node.name: node for node in graph.node}, {})}
        for function in graph.library.function:
            nodes = {node.name: node for node in function.node_def}
            arguments = {argument.name: k for k, argument in enumerate(function.signature.input_arg)}
            self.bodies[function.signature.name] = _Body(function.signature.name, nodes, arguments)
        self._saver = _name(meta_graph.saver_def.filename_tensor_name)
        self._assets = {_name(asset.tensor_info.name) for asset in assets(meta_graph)}
        self._is_called_by_gradients = {each.gradient_func for each in graph.library.gradient}
        self._is_called_by_gradients |= {each.gradient_func for each in graph.library.registered_gradients}
        self._called: dict[str, Counter[str]] = defaultdict(Counter)
        self._callers: dict[str, list[tuple[_Body, Any, bool]]] = defaultdict(list)
        for body in self.bodies.values():
            for node in body.nodes.values():
                self._called[body.name].update(called(node, self.bodies))
                for function in set(called(node, self.bodies)):
                    is_plain = node.op in _CALLS or node.op == function
                    self._callers[function].append((body, node, is_plain))

    def findings(self) -> Iterator[Finding]:
        """Operations on files whose path is not the saver's or an asset's."""
        for body in self.bodies.values():
            for node in body.nodes.values():
                for inputs, allowed in ((operations.CHECKPOINT, _SAVER), (operations.ASSET, _ASSET)):
                    for k in inputs.get(node.op, ()):
                        is_read = node.op in operations.READS
                        for origin in sorted(self._origins(body, node, k, is_read) - {allowed}):
                            yield Finding(f"{node.op} of {origin}", body.where())

    def _reached(self, names: set[str]) -> set[str]:
        """Functions, and those that they call."""
        found, waiting = set(), set(names)
        while waiting:
            name = waiting.pop()
            if name in self.bodies and name not in found:
                found.add(name)
                self._step_on(len(self._called[name]) + len(self.bodies[name].nodes))
                waiting |= self._called[name].keys()
        return found

    def _nodes_behind(self, references: Iterable[str]) -> list[Any]:
        """Nodes that have to run for some tensors of the main graph."""
        nodes, found, waiting = self.bodies[_MAIN].nodes, {}, [_name(each) for each in references]
        while waiting:
            name = waiting.pop()
            if name in nodes and name not in found:
                found[name] = nodes[name]
                self._step_on(len(nodes[name].input))
                waiting += [_name(each) for each in nodes[name].input]
        return list(found.values())

    def operations_behind(self, references: Iterable[str], functions: Iterable[str] = ()) -> set[str]:
        """Operations that have to run for some tensors of the main graph, or in functions, and in what they call."""
        found = self._nodes_behind(references)
        names = {*functions, *(function for node in found for function in called(node, self.bodies))}
        inside = {node.op for name in self._reached(names) for node in self.bodies[name].nodes.values()}
        return inside | {node.op for node in found}

    def calls_behind(self, references: Iterable[str], functions: Iterable[str] = ()) -> float:
        """How many calls of functions that takes: of large ones more each, infinitely many where one calls itself."""
        first = Counter(functions)
        for node in self._nodes_behind(references):
            first.update(called(node, self.bodies))
        calls: dict[str, float] = {}
        entered: set[str] = set()
        waiting = [(name, False) for name in first]
        while waiting:
            name, is_left = waiting.pop()
            if is_left:
                inside = sum(times * calls[each] for each, times in self._called[name].items())
                calls[name] = 1 + len(self.bodies[name].nodes) // 1000 + inside
                entered.remove(name)
            elif name in entered:
                return math.inf
            elif name not in self.bodies:
                calls[name] = 0
            elif name not in calls:
                entered.add(name)
                self._step_on(len(self._called[name]))
                waiting += [(name, True), *((each, False) for each in self._called[name])]
        return sum(times * calls[name] for name, times in first.items())

    def _origins(self, body: _Body, node: Any, k: int, is_read: bool) -> set[str]:
        """Where the `k`-th input of a node comes from, in words; what is read is the path itself, nothing beside it."""
        found: set[str] = set()
        seen: set[tuple[str, str]] = set()
        waiting = [(body.name, _given(node, k))]
        while waiting:
            each = waiting.pop()
            if each in seen:
                continue
            seen.add(each)
            origin, more = self._step(*each, is_read)
            found |= origin
            waiting += more
        return found

    def _step(self, name: str, reference: str, is_read: bool) -> tuple[set[str], list[tuple[str, str]]]:
        """Where a tensor of a body comes from, as far as one node says: words, or further tensors."""
        body, tensor = self.bodies[name], _name(reference)
        if name == _MAIN and tensor and tensor in (self._saver, *self._assets):
            return {_SAVER if tensor == self._saver else _ASSET}, []
        if tensor in body.arguments and name != _MAIN:
            return self._of_argument(body, body.arguments[tensor])
        node = body.nodes.get(tensor)
        if node is None:
            return {"nowhere"}, []
        self._step_on(len(node.input))
        inputs = [each for each in node.input if not each.startswith("^")]
        if node.op == "ShardedFilename" and is_read:
            return {"a text joined to a path"}, []
        if node.op in _PASSED_ON:
            return set(), [(name, each) for each in inputs[:1]]
        if node.op == "Pack":
            return set(), [(name, each) for each in inputs]
        if node.op in ("Select", "SelectV2"):
            return set(), [(name, each) for each in inputs[1:]]
        if node.op == "StringJoin" and inputs:
            is_plain = (
                not is_read and not node.attr["separator"].s and all(self._is_added(body, each) for each in inputs[1:])
            )
            return set() if is_plain else {"a text joined to a path"}, [(name, inputs[0])]
        if node.op == "PlaceholderWithDefault" and name == _MAIN and self._is_model(body, node):
            return {_SAVER}, []
        if node.op == "ReadVariableOp" and name == _MAIN:
            return self._of_variable(body, _name(node.input[0]))
        if node.op == "Const":
            return {"a constant"}, []
        return {f"what {node.op} gives"}, []

    def _step_on(self, number: int) -> None:
        self._steps += number + 1
        if self._steps > _MOST_STEPS:
            raise ValueError("Expected a program whose paths can be followed. Received: one with too many ways")

    def _is_model(self, body: _Body, node: Any) -> bool:
        """Whether it is what savers of TensorFlow 1 are given where nobody says a name."""
        for _ in range(2):  # Its default may have one itself.
            node = body.nodes.get(_name(_given(node, 0)))
            if node is None or node.op != "PlaceholderWithDefault":
                break
        return node is not None and _text(node) == b"model"

    def _of_variable(self, body: _Body, handle: str) -> tuple[set[str], list[tuple[str, str]]]:
        """What is assigned to a variable of the main graph, as the paths of assets are."""
        found, more = set(), []
        self._step_on(sum(len(node.input) for node in body.nodes.values()))
        for node in body.nodes.values():
            given = [_name(each) for each in node.input]
            if handle in given and node.op == "AssignVariableOp" and given[0] == handle:
                more.append((body.name, _given(node, 1)))
            elif handle in given and node.op not in ("ReadVariableOp", "VarIsInitializedOp"):
                found.add(f"what {node.op} gives")
        return found if more else {"a variable"}, more

    def _of_argument(self, body: _Body, k: int) -> tuple[set[str], list[tuple[str, str]]]:
        found, more = set(), []
        if body.name in self._is_called_by_gradients:
            found.add("a gradient's input")
        for caller, node, is_plain in self._callers[body.name]:
            self._step_on(len(node.input))
            if is_plain:
                more.append((caller.name, _given(node, k)))
            else:
                found.add(f"what {node.op} gives")
        if body.name in self._objects.concrete_functions:
            bound = self._objects.concrete_functions[body.name].bound_inputs
            position = k - (len(body.arguments) - len(bound))
            number = bound[position] if position >= 0 else -1
            kind = self._objects.nodes[number].WhichOneof("kind") if 0 <= number < len(self._objects.nodes) else None
            found.add(_ASSET if kind == "asset" else "an input" if position < 0 else f"a {kind}")
        return found, more

    def _is_added(self, body: _Body, reference: str) -> bool:
        """Whether a text is one that savers add to a path, and does not lead elsewhere."""
        waiting, seen = [_name(reference)], set()
        while waiting:
            tensor = waiting.pop()
            node = body.nodes.get(tensor)
            if node is None:
                return False
            if tensor in seen:
                continue
            seen.add(tensor)
            self._step_on(len(node.input))
            if node.op in ("Select", "SelectV2"):
                waiting += [_name(each) for each in node.input[1:3]]
            elif not _ADDED.fullmatch(_text(node) or b"/"):
                return False
        return True


def assets(meta_graph: Any) -> list[Any]:
    """The assets of a model: in the form of TensorFlow 1 they are in a collection.

    Raises:
        ValueError: for a collection of something else.
    """
    found = list(meta_graph.asset_file_def)
    if "saved_model_assets" in meta_graph.collection_def:
        for each in meta_graph.collection_def["saved_model_assets"].any_list.value:
            found.append(wire.parse(each.value, "tensorflow.AssetFileDef", most=2**20))
    return found


def tensors(info: Any) -> list[str]:
    """The names of a `TensorInfo`."""
    if info.WhichOneof("encoding") == "coo_sparse":
        sparse = info.coo_sparse
        return [sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name]
    if info.WhichOneof("encoding") == "composite_tensor":
        return [name for each in info.composite_tensor.components for name in tensors(each)]
    return [info.name]


def called(node: Any, functions: Any) -> list[str]:
    """Functions that a node calls, each as often as it names it."""
    names = [node.op] if node.op in functions else []
    waiting = list(node.attr.values())
    while waiting:
        value = waiting.pop()
        given = [value.func] if value.HasField("func") else value.list.func
        for function in given:
            names += [function.name] if function.name else []
            waiting += function.attr.values()
    return names


def _text(node: Any) -> bytes | None:
    """The text that a constant is, or None of one that is not one text in the one field that everybody reads."""
    tensor = node.attr["value"].tensor
    sizes = [dimension.size for dimension in tensor.tensor_shape.dim]
    is_one = len(tensor.string_val) == 1 and all(size == 1 for size in sizes) and not tensor.tensor_shape.unknown_rank
    is_text = {node.attr["dtype"].type, tensor.dtype} == {tf.string.as_datatype_enum} and not tensor.tensor_content
    return tensor.string_val[0] if node.op == "Const" and is_one and is_text else None


def _given(node: Any, k: int) -> str:
    """The `k`-th tensor that a node is given."""
    inputs = [each for each in node.input if not each.startswith("^")]
    return inputs[k] if k < len(inputs) else ""


def _name(reference: str) -> str:
    return reference.lstrip("^").split(":")[0]
