"""What stands around the graph of a SavedModel: its objects, assets, collections, and what of all runs at load."""

import posixpath
from collections.abc import Iterator
from typing import Any

from robust_keras.saved_models.safety import graphs, operations, paths
from robust_keras.saved_models.safety.graphs import Finding
from robust_keras.saved_models.safety.paths import Program

_KINDS = {
    "asset",
    "bare_concrete_function",
    "captured_tensor",
    "constant",
    "function",
    "resource",
    "user_object",
    "variable",
    None,
}
# Classes of TensorFlow's own that know how to make themselves of a file.
_REGISTERED = {"", "tf.StaticHashTable", "tf.TrackableConstant"}
# What TensorFlow makes Python objects of, in collections of its first version, and what says where values are.
_COLLECTIONS_OF_BYTES = {
    "cond_context",
    "global_step",
    "local_variables",
    "metric_variables",
    "model_variables",
    "moving_average_variables",
    "trainable_variables",
    "variables",
    "while_context",
}
_INITIALIZERS = ("saved_model_main_op", "legacy_init_op", "table_initializer", "init_op", "local_init_op")
_LOADED_BY = ("_create_resource", "_initialize")
_LOOPS = {"For", "NextIteration", "StatelessWhile", "While", "XlaWhile"}
_OF_FILES = operations.CHECKPOINT.keys() | operations.ASSET.keys()
_ASSETS, _INITIALIZER = "saved_model_assets", "__saved_model_init_op"


def findings(meta_graph: Any, program: Program) -> Iterator[Finding]:
    """What is refused of a `MetaGraphDef`, but for the operations themselves."""
    yield from _of_objects(meta_graph)
    yield from _of_collections(meta_graph)
    yield from _of_assets(meta_graph)
    functions, tensors = _run_at_load(meta_graph)
    restored = [name for name in (meta_graph.saver_def.restore_op_name,) if name]
    refused = (program.operations_behind(tensors, functions) & operations.CHECKPOINT.keys()) | (
        program.operations_behind(restored) & operations.CHECKPOINT.keys() - operations.READS
    )
    refused |= program.operations_behind([*tensors, *restored], functions) & _LOOPS
    for op in sorted(refused):
        yield Finding(op, "what runs as the model is loaded")
    for name, signature in meta_graph.signature_def.items():
        given = [*signature.outputs.values(), *signature.inputs.values()]
        tensors = [tensor for info in given for tensor in _tensors(info)]
        if name != _INITIALIZER:
            for op in sorted(program.operations_behind(tensors) & _OF_FILES):
                yield Finding(op, f"signature {name}")


def asset_names(meta_graph: Any) -> list[str]:
    """The files below `assets/` that a model names."""
    return sorted({asset.filename for asset in paths.assets(meta_graph)})


def _of_objects(meta_graph) -> Iterator[Finding]:
    num_assets = len(meta_graph.asset_file_def)
    for k, each in enumerate(meta_graph.object_graph_def.nodes):
        where = f"object {k}"
        kind = each.WhichOneof("kind")
        if kind not in _KINDS:
            yield Finding(f"a {kind}", where)
        if each.registered_name not in _REGISTERED:
            yield Finding(f"an object of class {each.registered_name}", where)
        if each.registered_saver:
            yield Finding(f"a saver {each.registered_saver}", where)
        if kind == "asset" and not 0 <= each.asset.asset_file_def_index < num_assets:
            yield Finding(f"asset {each.asset.asset_file_def_index} of {num_assets}", where)
        if kind in ("function", "bare_concrete_function"):
            spec = getattr(each, kind).function_spec
            yield from _of_structures([spec.fullargspec, spec.input_signature], where)
    for name, function in meta_graph.object_graph_def.concrete_functions.items():
        structures = [function.canonicalized_input_signature, function.output_signature]
        yield from _of_structures(structures, f"function {name}")


def _of_structures(waiting, where) -> Iterator[Finding]:
    """Specs whose bounds are constants, in `StructuredValue`s."""
    while waiting:
        value = waiting.pop()
        kind = value.WhichOneof("kind")
        if kind == "bounded_tensor_spec_value":
            yield Finding("a bounded tensor spec", where)
        elif kind in ("tuple_value", "list_value"):
            waiting += getattr(value, kind).values
        elif kind == "dict_value":
            waiting += value.dict_value.fields.values()
        elif kind == "named_tuple_value":
            waiting += [pair.value for pair in value.named_tuple_value.values]
        elif kind == "type_spec_value":
            waiting.append(value.type_spec_value.type_state)


def _of_collections(meta_graph) -> Iterator[Finding]:
    for name, collection in meta_graph.collection_def.items():
        kind = collection.WhichOneof("kind")
        if kind == "any_list" and name != _ASSETS:
            yield Finding("messages", f"collection {name}")
        elif kind == "bytes_list" and name not in _COLLECTIONS_OF_BYTES:
            yield Finding("serialised objects", f"collection {name}")
        elif kind == "bytes_list":
            for text in collection.bytes_list.value:
                yield from graphs.nested(text, f"collection {name}")


def _of_assets(meta_graph) -> Iterator[Finding]:
    for name in asset_names(meta_graph):
        is_inside = name and "\0" not in name and "\\" not in name and "://" not in name
        if not is_inside or posixpath.isabs(name) or ".." in name.split("/"):
            yield Finding(f"a file {name!r}", "the assets")


def _run_at_load(meta_graph) -> tuple[set[str], list[str]]:
    """Functions and tensors of the main graph that run while a model is loaded."""
    nodes, functions, tensors = meta_graph.object_graph_def.nodes, set(), []
    for each in nodes:
        called = {child.node_id for child in each.children if child.local_name in _LOADED_BY}
        called |= {saveable.restore_function for saveable in each.saveable_objects.values()}
        for number in called:
            if 0 <= number < len(nodes):
                functions.update(nodes[number].function.concrete_functions)
                functions.add(nodes[number].bare_concrete_function.concrete_function_name)
    functions.discard("")
    for name in _INITIALIZERS:
        if name in meta_graph.collection_def:
            tensors += meta_graph.collection_def[name].node_list.value
    for name, signature in meta_graph.signature_def.items():
        if name == _INITIALIZER:
            tensors += [tensor for info in signature.outputs.values() for tensor in _tensors(info)]
    return functions, tensors


def _tensors(info: Any) -> list[str]:
    if info.WhichOneof("encoding") == "coo_sparse":
        sparse = info.coo_sparse
        return [sparse.values_tensor_name, sparse.indices_tensor_name, sparse.dense_shape_tensor_name]
    if info.WhichOneof("encoding") == "composite_tensor":
        return [name for each in info.composite_tensor.components for name in _tensors(each)]
    return [info.name]
