"""The operations of a SavedModel's graph and functions, each against the list of those that only compute."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import operations, wire, xla_modules

MOST_FILLED_BYTES = 4 * 2**30  # Of constants that are one value, written once.
_MOST_DIMENSIONS = 254  # Of a tensor.
_MOST_NESTED_BYTES = 16 * 2**20
_KNOWN = operations.COMPUTE | operations.CHECKPOINT.keys() | operations.ASSET.keys()
_CAMEL = re.compile(r"_*[A-Z][A-Za-z0-9]*(>\w+)?")
# A gradient that Python had registered for a function or an operation of one's own.
_GRADIENT = re.compile(r"(Stateful)?PartitionedCall-\d+|CustomGradient-\d+")
_NESTED = ("tensorflow.GraphDef", "tensorflow.FunctionDef", "tensorflow.FunctionDefLibrary")
# Serialised graphs begin with one of these bytes: the tags of their fields.
_TAGS = {bytes([number << 3 | kind]) for number in range(1, 9) for kind in (0, 2)}
_STRING = tf.string.as_datatype_enum
# The typed field in which a constant's values stand; those of smaller types are in `int_val` or `float8_val`.
_FIELDS = {
    tf.bfloat16: "half_val",
    tf.bool: "bool_val",
    tf.complex64: "scomplex_val",
    tf.complex128: "dcomplex_val",
    tf.float16: "half_val",
    tf.float32: "float_val",
    tf.float64: "double_val",
    tf.int64: "int64_val",
    tf.string: "string_val",
    tf.uint32: "uint32_val",
    tf.uint64: "uint64_val",
}
_FIELD_OF = {dtype.as_datatype_enum: name for dtype, name in _FIELDS.items()}
_OF_ANY_DTYPE = {"dtype", "tensor_shape", "version_number"}
_OF_HANDLES = {tf.resource.as_datatype_enum, tf.variant.as_datatype_enum}


class Finding(NamedTuple):
    """What is refused, and where it stands."""

    what: str
    where: str

    def __str__(self):
        return f"{printable(self.what)} in {printable(self.where)}"


def may_be_operation(name: str) -> bool:
    """Whether a name is one that TensorFlow, or a plugin, may give to an operation, as functions seldom have."""
    return bool(_CAMEL.fullmatch(name))


def bodies(graph_def: Any) -> Iterator[tuple[str, Any]]:
    """The main graph and each function of a `GraphDef`, as (where it is, its `NodeDef`s)."""
    yield "the main graph", graph_def.node
    for function in graph_def.library.function:
        yield f"function {function.signature.name}", function.node_def


def findings(graph_def: Any) -> Iterator[Finding]:
    """What is refused in a `GraphDef`, its functions and all that stands in their attributes."""
    return _Reader(graph_def.library).findings(graph_def)


class _Reader:
    """Reads bodies of a program.

    Attributes:
        functions: names of its functions.
        gradients: names by which its own gradients are called.
    """

    def __init__(self, library):
        self.functions = {function.signature.name for function in library.function}
        self.gradients = {each.registered_op_type for each in library.registered_gradients}
        self._filled = 0

    def findings(self, graph_def) -> Iterator[Finding]:
        yield from self._of_library(graph_def.library)
        for where, nodes in bodies(graph_def):
            if len({node.name for node in nodes}) != len(nodes):
                yield Finding("a name that two nodes have", where)
            for node in nodes:
                if node.op not in _KNOWN and (node.op not in self.functions or may_be_operation(node.op)):
                    yield Finding(node.op or "an operation without a name", where)
                yield from self._of_attributes(node.attr, where)
                if node.op == "XlaCallModule":
                    for what in xla_modules.refused(node.attr["module"].s):
                        yield Finding(f"XlaCallModule with {what}", where)

    def _of_library(self, library) -> Iterator[Finding]:
        names = [function.signature.name for function in library.function]
        for name in sorted(name for name in self.functions if hasattr(tf.raw_ops, name)):
            yield Finding(f"a function called {name}, as an operation is,", "the functions")
        if len(names) != len(self.functions):
            yield Finding("a name that two functions have", "the functions")
        if "" in self.functions:
            yield Finding("a function without a name", "the functions")
        given = [(each.function_name, each.gradient_func) for each in library.gradient]
        for name in {name for pair in given for name in pair} - self.functions:
            yield Finding(f"a gradient of {name}, which is no function of the model,", "the functions")
        for each in library.registered_gradients:
            if each.gradient_func not in self.functions:
                yield Finding(f"a gradient {each.gradient_func}, which is no function of the model,", "the functions")
        for function in library.function:
            where = f"function {function.signature.name}"
            yield from self._of_attributes(function.attr, where)
            for argument in function.arg_attr.values():
                yield from self._of_attributes(argument.attr, where)
            for attribute in function.signature.attr:
                yield from self._of_values([attribute.default_value], where)

    def _of_attributes(self, attributes, where) -> Iterator[Finding]:
        for name, value in attributes.items():
            if name == "_gradient_op_type":
                kind = value.s.decode(errors="replace")
                if not (_GRADIENT.fullmatch(kind) or kind in self.gradients or kind in operations.COMPUTE):
                    yield Finding(f"a gradient of {kind}", where)
            else:
                yield from self._of_values([value], where)

    def _of_values(self, values: Iterable[Any], where: str) -> Iterator[Finding]:
        for value in values:
            kind = value.WhichOneof("value")
            if kind == "placeholder":  # Of a function without one form: what it calls would not be seen here.
                yield Finding("an attribute that callers give", where)
            elif kind == "s":
                yield from self._of_text([value.s], where)
            elif kind == "tensor":
                yield from self.of_tensor(value.tensor, where)
            elif kind == "func":
                yield from self._of_functions([value.func], where)
            elif kind == "list":
                yield from self._of_text(value.list.s, where)
                yield from self._of_functions(value.list.func, where)
                for tensor in value.list.tensor:
                    yield from self.of_tensor(tensor, where)

    def _of_functions(self, functions, where) -> Iterator[Finding]:
        for function in functions:
            if function.name and function.name not in self.functions:
                yield Finding(f"a call of {function.name}, which is no function of the model,", where)
            yield from self._of_attributes(function.attr, where)

    def of_tensor(self, tensor: Any, where: str) -> Iterator[Finding]:
        """What is refused of a constant: handles, shapes that are none or would fill memory, graphs in its strings."""
        if tensor.dtype % 100 in _OF_HANDLES or tensor.resource_handle_val or tensor.variant_val:
            yield Finding("a constant of handles", where)
            return
        given = {field.name for field, _ in tensor.ListFields()} - _OF_ANY_DTYPE
        allowed = {_FIELD_OF[tensor.dtype]} if tensor.dtype in _FIELD_OF else {"int_val", "float8_val"}
        if len(given) > 1 or given - allowed - ({"tensor_content"} if tensor.dtype != _STRING else set()):
            yield Finding(f"a constant of type {tensor.dtype} in {' and '.join(sorted(given))}", where)
            return
        sizes = [dimension.size for dimension in tensor.tensor_shape.dim]
        if tensor.tensor_shape.unknown_rank or len(sizes) > _MOST_DIMENSIONS or any(size < 0 for size in sizes):
            yield Finding(f"a constant of shape {sizes[:_MOST_DIMENSIONS]}", where)
        elif not tensor.tensor_content:
            before, self._filled = self._filled, self._filled + math.prod(sizes) * 8
            if before <= MOST_FILLED_BYTES < self._filled:
                yield Finding(f"constants of {self._filled:,} bytes, such as one of shape {sizes}", where)
        yield from self._of_text(tensor.string_val, where)

    def _of_text(self, texts, where) -> Iterator[Finding]:
        for text in texts:
            if len(text) >= 12 and text[:1] in _TAGS:
                yield from nested(text, where)


def nested(text: bytes, where: str) -> Iterator[Finding]:
    """Operations of a graph or function that bytes of a model are, where they are one, that do more than compute."""
    if len(text) > _MOST_NESTED_BYTES:
        return
    for kind in _NESTED:
        try:
            graph = wire.parse(text, kind, most=_MOST_NESTED_BYTES)
        except ValueError:
            continue
        found = [graph] if kind.endswith("FunctionDef") else getattr(graph, "function", [])
        nodes = [node for function in found for node in function.node_def]
        if kind.endswith("GraphDef"):
            nodes = [node for _, nodes in bodies(graph) for node in nodes]
        for op in {node.op for node in nodes} - operations.COMPUTE:
            if may_be_operation(op):
                yield Finding(f"{op} of a graph that stands in a text", where)
