"""What of a SavedModel runs as TensorFlow loads it, in either form: it reads its own variables, and ends."""

from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from robust_keras.saved_models.safety import operations, wire
from robust_keras.saved_models.safety.graphs import Finding
from robust_keras.saved_models.safety.paths import Program, tensors

# Of the first form: what is run if it is there, and what says how variables are initialised.
_INITIALIZERS = ("saved_model_main_op", "legacy_init_op", "table_initializer", "init_op", "local_init_op")
INITIALIZER = "__saved_model_init_op"
_CONTEXTS = {"cond_context": "tensorflow.CondContextDef", "while_context": "tensorflow.WhileContextDef"}
# What TensorFlow makes Python objects of, in collections of its first version, and what says where values are.
_VARIABLES = (
    "global_step",
    "local_variables",
    "metric_variables",
    "model_variables",
    "moving_average_variables",
    "trainable_variables",
    "variables",
)
COLLECTIONS = dict.fromkeys(_VARIABLES, "tensorflow.VariableDef") | _CONTEXTS
_MOST_BYTES = 2**24  # Of a collection.
# Of the second form: a child of an object with such a name takes the place of the loader's own method.
_METHODS = {*dir(tf.saved_model.experimental.TrackableResource), *dir(tf.Module)} - {"__call__"}
_METHODS_OF_VARIABLES = _METHODS | set(dir(tf.Variable))
_LOOPS = {"For", "NextIteration", "StatelessWhile", "While"}
_MOST_CALLS = 500  # Some are usual. Where each function calls the next one twice, twenty never end.


def findings(meta_graph: Any, program: Program) -> Iterator[Finding]:
    """What is refused of what runs as a model is loaded: loops, and checkpoints but for reading its own."""
    functions, run = _functions(meta_graph), _initializers(meta_graph)
    restored = [name for name in [meta_graph.saver_def.restore_op_name] if name]
    found = program.operations_behind(restored) & operations.CHECKPOINT.keys() - operations.READS
    found |= program.operations_behind(run, functions) & operations.CHECKPOINT.keys()
    run += [*restored, *_of_variables(meta_graph)]
    for op in program.operations_behind(run, functions):
        if op in _LOOPS or op.startswith("Xla"):  # They may hold a loop that is not seen here.
            found.add(op)
    for op in sorted(found):
        yield Finding(op, "what runs as the model is loaded")
    calls = program.calls_behind(run, functions)
    if calls > _MOST_CALLS:
        yield Finding(f"{calls:,} calls of functions", "what runs as the model is loaded")


def messages(name: str, collection: Any) -> list[Any]:
    """What stands in a collection of bytes.

    Raises:
        ValueError: for a collection that is not one of `COLLECTIONS`, or that is too large.
    """
    if sum(map(len, collection.bytes_list.value)) > _MOST_BYTES:
        raise ValueError(f"Expected a collection {name} of at most {_MOST_BYTES:,} bytes. Received: more")
    return [wire.parse(text, COLLECTIONS[name], most=_MOST_BYTES) for text in collection.bytes_list.value]


def _functions(meta_graph: Any) -> set[str]:
    nodes, functions = meta_graph.object_graph_def.nodes, set()
    for each in nodes:
        methods = _METHODS_OF_VARIABLES if each.WhichOneof("kind") == "variable" else _METHODS
        numbers = {child.node_id for child in each.children if child.local_name in methods}
        for saveable in each.saveable_objects.values():
            numbers |= {saveable.save_function, saveable.restore_function}
        for number in numbers:
            if 0 <= number < len(nodes):
                functions.update(nodes[number].function.concrete_functions)
                functions.add(nodes[number].bare_concrete_function.concrete_function_name)
    return functions - {""}


def _initializers(meta_graph: Any) -> list[str]:
    found = []
    for name in _INITIALIZERS:
        if name in meta_graph.collection_def:
            found += meta_graph.collection_def[name].node_list.value
    if INITIALIZER in meta_graph.signature_def:
        for info in meta_graph.signature_def[INITIALIZER].outputs.values():
            found += tensors(info)
    return found


def _of_variables(meta_graph: Any) -> list[str]:
    """How variables are initialised; those of local ones run, and the loader follows the others."""
    found = []
    for name in _VARIABLES:
        if name in meta_graph.collection_def:
            for each in messages(name, meta_graph.collection_def[name]):
                found += [each.initializer_name, each.initial_value_name, each.snapshot_name]
    return [name for name in found if name]
