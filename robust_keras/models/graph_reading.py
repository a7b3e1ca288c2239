"""The graph of a function of images, flat and in order, as far as it is understood."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import compilation

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# Operations of one or two tensors, element by element, on floats.
ELEMENTWISE = {
    *("Add", "AddV2", "Sub", "Mul", "RealDiv", "Maximum", "Minimum", "SquaredDifference", "BiasAdd"),
    *("Neg", "Square", "Sqrt", "Rsqrt", "Exp", "Tanh", "Sigmoid", "Erf", "Erfc", "Softplus", "Softsign"),
    *("Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Pow"),
}
# Operations without state that are called again as they are.
_UNDERSTOOD = ELEMENTWISE | {
    *("Const", "Identity", "IdentityN", "NoOp", "ReadVariableOp", "Shape", "Size", "Rank", "Fill", "Range"),
    *("Conv2D", "DepthwiseConv2dNative", "MatMul", "BatchMatMulV2", "FusedBatchNormV3"),
    *("MaxPool", "AvgPool", "Mean", "Sum", "Max", "Min", "Prod", "Softmax", "LogSoftmax", "Log"),
    *("Reshape", "Squeeze", "ExpandDims", "Transpose", "Pad", "PadV2", "MirrorPad", "ConcatV2", "Pack", "AddN"),
    *("EnsureShape", "StridedSlice", "Slice", "Tile", "Cast", "StopGradient", "Split", "SplitV", "Unpack", "GatherV2"),
    *("Abs", "ClipByValue", "ResizeBilinear", "ResizeNearestNeighbor", "ArgMax"),
    # Of what a signature checks its images by; nothing reads an Assert, so that it is left out.
    *("Assert", "All", "Equal", "GreaterEqual", "Less", "LessEqual", "LogicalAnd", "LogicalOr"),
}
# How many of the last inputs of an operation with a list of inputs come after the list.
_LISTS = {"ConcatV2": 1, "Pack": 0, "AddN": 0, "IdentityN": 0}


class Unsupported(ValueError):
    """A graph holds what is not understood; says what, in a few words."""


class Node(NamedTuple):
    """An operation.

    Attributes:
        name: unique in the graph.
        op: TensorFlow's name of the operation.
        inputs: references `<name>:<number of the output>`.
        attributes: as `tf.raw_ops` takes them.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Graph(NamedTuple):
    """What depends on the images.

    Attributes:
        nodes: in an order in which they can run.
        places: the place of each in it, by name.
        known: values that do not depend on the images, by reference.
        input: the reference of the images.
        output: the reference of the result.
    """

    nodes: list[Node]
    places: dict[str, int]
    known: dict[str, Any]
    input: str
    output: str


def read(function: Callable, spec: tf.TensorSpec) -> Graph:
    """Traces a function of one tensor that returns one, and reads its graph; values of variables are those of now.

    Raises:
        Unsupported: for operations that are not understood, and gradients of the graph's own.
    """
    with compilation.plain(), tf.init_scope():
        concrete = tf.function(function, autograph=False).get_concrete_function(spec)
    definition = concrete.graph.as_graph_def()
    library = {each.signature.name: each for each in definition.library.function}
    placeholders = [each.name.partition(":")[0] for each in concrete.inputs]
    names = {name: f"{name}:0" for name in placeholders}
    nodes: list[Node] = []
    _flatten(definition.node, "", names, library, nodes)
    nodes, real = _without_own_gradients(nodes)
    images, *given = [f"{name}:0" for name in placeholders]
    output = real(_resolved(concrete.outputs[0].name, names))
    known: dict[str, Any] = dict(zip(given, concrete.captured_inputs))
    depends, left = {images.partition(":")[0]}, []
    for node in _ordered(nodes, output):
        if any(reference.partition(":")[0] in depends for reference in node.inputs):
            depends.add(node.name)
            left.append(node)
        else:
            with tf.init_scope():
                values = call(node, [known[reference] for reference in node.inputs])
            known |= {f"{node.name}:{k}": value for k, value in enumerate(values)}
    read_there = {output, *(reference for node in left for reference in node.inputs)}
    known = {reference: value for reference, value in known.items() if reference in read_there}
    return Graph(left, {node.name: k for k, node in enumerate(left)}, known, images, output)


def call(node: Node, arguments: Sequence[Any]) -> Sequence[Any]:
    """The outputs of an operation: at once where nothing of its arguments is being traced."""
    if node.op == "NoOp":
        return ()
    if node.op == "Shape" and tf.TensorShape(arguments[0].shape).is_fully_defined():
        return [tf.constant(list(arguments[0].shape), node.attributes.get("out_type", tf.int32))]
    if node.op == "Const":
        return [tf.constant(node.attributes["value"])]
    outputs = raw(node.op, arguments, node.attributes)
    return outputs if isinstance(outputs, (list, tuple)) else [outputs]


def raw(op: str, arguments: Sequence[Any], attributes: Mapping[str, Any]) -> Any:
    """Calls an operation of `tf.raw_ops`, whose inputs are its first parameters."""
    function, names = _signature(op)
    if op in _LISTS:
        after = _LISTS[op]
        arguments = [list(arguments[: len(arguments) - after]), *arguments[len(arguments) - after :]]
    settings = {name: value for name, value in attributes.items() if name in names[len(arguments) :]}
    return function(**dict(zip(names, arguments)), **settings)


def is_float32(node: Node) -> bool:
    """Whether an operation is one on float32."""
    return node.attributes.get("T", tf.float32) == tf.float32


@functools.cache
def _signature(op):
    function = getattr(tf.raw_ops, op)
    return function, [name for name in inspect.signature(function).parameters if name != "name"]


def _flatten(definitions, prefix, names, library, nodes):
    """Adds operations to `nodes`, those of called functions among them, under names that start with `prefix`; `names`
    has what references mean, and learns.
    """
    for each in _sorted(definitions):
        if each.op == "Placeholder" and each.name in names:
            continue
        inputs = [name for name in each.input if not name.startswith("^")]
        references = [_resolved(name, names) for name in inputs]
        if each.op in _CALLS:
            function = library.get(each.attr["f"].func.name)
            if function is None:
                raise Unsupported(f"a function that is not there, {each.attr['f'].func.name}")
            inner = {given.name: reference for given, reference in zip(function.signature.input_arg, references)}
            _flatten(function.node_def, f"{prefix}{each.name}/", inner, library, nodes)
            for k, output in enumerate(function.signature.output_arg):
                names[f"{each.name}:{k}"] = _resolved(function.ret[output.name], inner)
            continue
        if each.op not in _UNDERSTOOD:
            raise Unsupported(f"the operation {each.op}")
        names[each.name] = f"{prefix}{each.name}"
        nodes.append(Node(prefix + each.name, each.op, tuple(references), _attributes(each)))


def _resolved(reference, names):
    """The flat reference of one in a graph (`name`, `name:1`) or in a function (`argument`, `name:output:0`)."""
    name, *rest = reference.split(":")
    if len(rest) == 2 and rest[0].startswith(("batch_", "reserve_")):
        raise Unsupported(f"the output {reference}")
    number = rest[-1] if rest else "0"
    if f"{name}:{number}" in names:
        return names[f"{name}:{number}"]
    if name not in names:
        return f"{name}:{number}"
    known = names[name]
    return known if ":" in known else f"{known}:{number}"


def _attributes(definition):
    """Attributes as `tf.raw_ops` takes them; those that start with an underscore are kept for gradients alone."""
    found = {}
    for name, value in definition.attr.items():
        kind = value.WhichOneof("value")
        if kind == "type":
            found[name] = tf.as_dtype(value.type)
        elif kind == "list":
            found[name] = list(value.list.i) or [tf.as_dtype(t) for t in value.list.type] or list(value.list.f)
        elif kind == "tensor":
            found[name] = value.tensor
        elif kind == "shape":
            found[name] = tf.TensorShape(value.shape)
        elif kind in ("i", "f", "b", "s"):
            found[name] = getattr(value, kind)
    if definition.op == "Const":
        found["value"] = tf.make_ndarray(definition.attr["value"].tensor)
    return found


def _sorted(definitions):
    """Definitions of a body, each after those that it reads."""
    by_name = {each.name: each for each in definitions}
    done: dict[str, Any] = {}
    waiting = list(reversed(list(definitions)))
    while waiting:
        each = waiting[-1]
        before = [by_name[name] for name in (i.lstrip("^").partition(":")[0] for i in each.input) if name in by_name]
        missing = [other for other in before if other.name not in done]
        if missing and each.name not in done:
            waiting += missing
        else:
            done[waiting.pop().name] = each
    return done.values()


def _without_own_gradients(nodes):
    """The operations without those that only pass values on, and how references then read: `(nodes, alias)`.

    Raises:
        Unsupported: for gradients of the graph's own but that of SiLU, which is the one of its operations.
    """
    made_by = {node.name: node for node in nodes}
    alias: dict[str, str] = {}

    def real(reference):
        while reference in alias:
            reference = alias[reference]
        return reference

    for node in nodes:
        if node.op == "Identity" or (node.op == "IdentityN" and "_gradient_op_type" not in node.attributes):
            alias |= {f"{node.name}:{k}": reference for k, reference in enumerate(node.inputs)}
        elif node.op == "IdentityN" and _is_silu([real(each) for each in node.inputs], made_by, real):
            alias |= {f"{node.name}:{k}": reference for k, reference in enumerate(node.inputs)}
        elif "_gradient_op_type" in node.attributes:
            raise Unsupported(f"a gradient of its own, of {node.name}")
    kept = [node for node in nodes if f"{node.name}:0" not in alias]
    return [node._replace(inputs=tuple(map(real, node.inputs))) for node in kept], real


def _is_silu(inputs, made_by, real):
    """Whether these are `x * sigmoid(beta * x)`, x and perhaps beta, a constant of 1."""

    def operation(reference, op):
        node = made_by.get(reference.partition(":")[0])
        return [real(each) for each in node.inputs] if node is not None and node.op == op else []

    y, x = [*inputs, "", ""][:2]
    factors = operation(y, "Mul")
    if x not in factors:
        return False
    (other,) = [each for each in factors if each != x] or [x]
    (inner,) = operation(other, "Sigmoid") or [""]
    if inner == x:
        return True
    scaled = operation(inner, "Mul")
    if x not in scaled:
        return False
    (beta,) = [each for each in scaled if each != x] or [x]
    node = made_by.get(beta.partition(":")[0])
    return node is not None and node.op == "Const" and bool((node.attributes["value"] == 1).all())


def _ordered(nodes, output):
    """The operations that an output needs, each after those that it reads."""
    made_by = {node.name: node for node in nodes}
    done: dict[str, Node] = {}
    waiting = [output.partition(":")[0]]
    while waiting:
        node = made_by.get(waiting[-1])
        missing = (
            [n for n in (i.partition(":")[0] for i in node.inputs) if n in made_by and n not in done] if node else []
        )
        if missing:
            waiting += missing
            continue
        if node is not None:
            done[node.name] = node
        waiting.pop()
    return list(done.values())
