"""SavedModels that take integers, loaded so that gradients reach the pixels.

Gradients end where integers begin. In a copy of the model's program, the input and all that only rearranges it are
float32, up to the model's own cast to floats: given whole numbers, the copy computes what the model computes.
"""

import posixpath
import tempfile
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from absl import logging
from google.protobuf import descriptor_pool, message_factory

gfile = tf.io.gfile
_FLOAT = tf.float32.as_datatype_enum
_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
# Operations on a tensor of any type, by the attribute that names it: what they return is of that type too,
_REARRANGE = {
    "BroadcastTo": "T",
    "EnsureShape": "T",
    "ExpandDims": "T",
    "GatherV2": "Tparams",
    "Identity": "T",
    "Reshape": "T",
    "ResizeNearestNeighbor": "T",
    "ReverseV2": "T",
    "Slice": "T",
    "Snapshot": "T",
    "Split": "T",
    "SplitV": "T",
    "Squeeze": "T",
    "StridedSlice": "T",
    "Tile": "T",
    "Transpose": "T",
    "Unpack": "T",
}
# or it is of another one, and whoever reads it sees no difference.
_READ = {
    "Rank": "T",
    "ResizeArea": "T",
    "ResizeBicubic": "T",
    "ResizeBilinear": "T",
    "Shape": "T",
    "Size": "T",
}


class _Unsupported(ValueError):
    """An operation that computes with the integers."""


def load_with_float_input(path: str, signature: str, *, load: Callable[[str], Any]) -> Any:
    """Loads a SavedModel whose input in a signature, one integer tensor, has become float32.

    Args:
        path: the SavedModel's folder.
        signature: its name.
        load: loads a folder, as `tf.saved_model.load` does.

    Returns:
        What `load` returns; None where the model computes with the integers before it casts them, so
        that no such copy computes the same. Its gradient is then not connected.
    """
    with gfile.GFile(posixpath.join(path, "saved_model.pb"), "rb") as file:
        model = _message("tensorflow.SavedModel").FromString(file.read())
    try:
        for graph in model.meta_graphs:
            if signature in graph.signature_def:
                _retype(graph, signature)
    except _Unsupported as error:
        logging.warning("No gradient passes the integer input of %s: %s", path, error)
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name in ("variables", "assets"):
            for inner, _, files in gfile.walk(posixpath.join(path, name)):
                target = posixpath.join(folder, posixpath.relpath(inner, path))
                gfile.makedirs(target)
                for each in files:
                    gfile.copy(posixpath.join(inner, each), posixpath.join(target, each))
        with gfile.GFile(posixpath.join(folder, "saved_model.pb"), "wb") as file:
            file.write(model.SerializeToString())
        try:
            return load(folder)
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:  # The original was loaded before.
            logging.warning("No gradient passes the integer input of %s: %s", path, error)
            return None


def _message(name: str):
    return message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))


class _Body:
    """A function of the program, or its main graph.

    Attributes:
        name: of the function.
        nodes: its `NodeDef`s.
        inputs: what holds the type of each input in its attribute `type`, by name, in order.
        outputs: the same of what it returns, in order, each with the name of the tensor.
        floats: names of tensors that were integers and have become float32: an input's or a node's or, of a node that
            calls a function, `<name>:<number of the output>`.
    """

    def __init__(self, name, nodes, inputs, outputs):
        self.name, self.nodes, self.inputs, self.floats = name, nodes, inputs, set()
        self._calls = {node.name for node in nodes if node.op in _CALLS}
        self.outputs = [(output, self.tensor(name)) for output, name in outputs]

    def tensor(self, reference):
        """The name, as above, of the tensor that a node or function refers to."""
        name, *rest = reference.split(":")
        return f"{name}:{rest[-1] if rest else 0}" if name in self._calls else name


def _retype(graph, signature):
    """Makes the integer input of a signature float32 in a `MetaGraphDef`.

    Raises:
        _Unsupported: for an operation that computes with the integers.
    """
    bodies, concrete = {}, graph.object_graph_def.concrete_functions
    for function in graph.graph_def.library.function:
        name, arguments = (
            function.signature.name,
            {argument.name: argument for argument in function.signature.input_arg},
        )
        returned = [(output, function.ret[output.name]) for output in function.signature.output_arg]
        bodies[name] = _Body(name, function.node_def, arguments, returned)
    (given,) = graph.signature_def[signature].inputs.values()
    if graph.object_graph_def.nodes:
        start = bodies[_function_of(graph.object_graph_def, signature)]
        start.floats |= {name for name, argument in start.inputs.items() if tf.as_dtype(argument.type).is_integer}
    else:  # A model of TensorFlow 1 has no objects, and computes in the main graph; of others nobody reads that.
        placeholders = {node.name: node.attr["dtype"] for node in graph.graph_def.node if node.op == "Placeholder"}
        bodies[""] = start = _Body("", graph.graph_def.node, placeholders, [])
        start.floats.add(start.tensor(given.name))
    given.dtype = _FLOAT
    _propagate(bodies)
    for name, body in bodies.items():
        floats = body.floats & body.inputs.keys()
        integers = {name for name, argument in body.inputs.items() if tf.as_dtype(argument.type).is_integer}
        if name in concrete:
            if any(tensor in body.floats for _, tensor in body.outputs):
                raise _Unsupported(f"{name} returns it")
            # The names in specs are as typed in Python.
            _retype_specs(concrete[name].canonicalized_input_signature, floats, is_all=floats == integers)
        for each in floats:
            body.inputs[each].type = _FLOAT


def _function_of(objects, signature):
    """The name of a signature's function in a `SavedObjectGraph`."""
    children = {child.local_name: child.node_id for child in objects.nodes[0].children}
    signatures = {child.local_name: child.node_id for child in objects.nodes[children["signatures"]].children}
    node = objects.nodes[signatures[signature]]
    return node.bare_concrete_function.concrete_function_name or node.function.concrete_functions[0]


def _propagate(bodies):
    """Lets what is float spread, until nothing changes: to what is computed of it, into functions and to their callers.

    Raises:
        _Unsupported: for an operation that computes with the integers.
    """
    readers, callers = defaultdict(list), defaultdict(list)
    for body in bodies.values():
        for node in body.nodes:
            if node.op in _CALLS:
                callers[node.attr["f"].func.name].append((body, node))
            for k, reference in enumerate(node.input):
                if not reference.startswith("^"):  # Of which it is only said that it comes first.
                    readers[body.name, body.tensor(reference)].append((node, k))
    pending = [(body, tensor) for body in bodies.values() for tensor in body.floats]

    def spread(body, tensor):
        if tensor not in body.floats:
            body.floats.add(tensor)
            pending.append((body, tensor))

    while pending:
        body, tensor = pending.pop()
        for node, k in readers[body.name, tensor]:
            if node.op in _CALLS:
                callee = bodies[node.attr["f"].func.name]
                node.attr["Tin"].list.type[k] = _FLOAT
                spread(callee, list(callee.inputs)[k])
            elif _compute(node, k):
                spread(body, node.name)
        for k, (output, returned) in enumerate(body.outputs):
            if returned == tensor:
                output.type = _FLOAT
                for caller, node in callers[body.name]:
                    node.attr["Tout"].list.type[k] = _FLOAT
                    spread(caller, f"{node.name}:{k}")
        if tensor in body.inputs:
            for caller, node in callers[body.name]:
                given = caller.tensor(node.input[list(body.inputs).index(tensor)])
                if given not in caller.floats and given not in caller.inputs:
                    raise _Unsupported(f"{given} is computed of something else")
                spread(caller, given)


def _compute(node, k) -> bool:
    """Lets an operation take floats as its `k`-th input; whether floats take the place of what it returns too."""
    if node.op == "Cast":
        node.attr["SrcT"].type = _FLOAT
        if not tf.as_dtype(node.attr["DstT"].type).is_integer:
            return False
        node.attr["DstT"].type = _FLOAT
        return True
    attribute = _REARRANGE.get(node.op) or _READ.get(node.op)
    if attribute is None or k != (1 if node.op == "Split" else 0):
        raise _Unsupported(f"{node.op} ({node.name}) computes with it")
    node.attr[attribute].type = _FLOAT
    return node.op in _REARRANGE


def _retype_specs(value, names, *, is_all):
    """Makes the specs of a function's inputs that became float say so, in a `StructuredValue`."""
    kind = value.WhichOneof("kind")
    if kind == "tensor_spec_value":
        spec = value.tensor_spec_value
        if tf.as_dtype(spec.dtype).is_integer and (is_all or spec.name in names):
            spec.dtype = _FLOAT
    elif kind in ("tuple_value", "list_value"):
        for each in getattr(value, kind).values:
            _retype_specs(each, names, is_all=is_all)
    elif kind == "dict_value":
        for each in value.dict_value.fields.values():
            _retype_specs(each, names, is_all=is_all)
