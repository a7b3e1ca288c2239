"""What stands around the graph of a SavedModel: its objects, assets and collections."""

import posixpath
from collections.abc import Iterator
from typing import Any

from robust_keras.saved_models.safety import at_load, graphs, operations, paths
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
_OF_FILES = operations.CHECKPOINT.keys() | operations.ASSET.keys()
_ASSETS = "saved_model_assets"


def findings(meta_graph: Any, program: Program) -> Iterator[Finding]:
    """What is refused of a `MetaGraphDef`, but for the operations themselves."""
    yield from _of_objects(meta_graph)
    yield from _of_collections(meta_graph)
    yield from _of_assets(meta_graph)
    yield from at_load.findings(meta_graph, program)
    for name, signature in meta_graph.signature_def.items():
        given = [*signature.outputs.values(), *signature.inputs.values()]
        tensors = [tensor for info in given for tensor in paths.tensors(info)]
        if name != at_load.INITIALIZER:
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
        elif kind == "bytes_list" and name not in at_load.COLLECTIONS:
            yield Finding("serialised objects", f"collection {name}")
        elif kind == "bytes_list":
            at_load.messages(name, collection)
            for text in collection.bytes_list.value:
                yield from graphs.nested(text, f"collection {name}")


def _of_assets(meta_graph) -> Iterator[Finding]:
    for name in asset_names(meta_graph):
        is_inside = name and "\0" not in name and "\\" not in name and "://" not in name
        if not is_inside or posixpath.isabs(name) or ".." in name.split("/"):
            yield Finding(f"a file {name!r}", "the assets")
