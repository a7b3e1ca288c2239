"""The operations of a SavedModel's graph and functions, each against the list of those that only compute."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import operations


class Finding(NamedTuple):
    """What is refused, and where it stands."""

    what: str
    where: str

    def __str__(self):
        return f"{printable(self.what)} in {printable(self.where)}"


def bodies(graph_def: Any) -> Iterator[tuple[str, Any]]:
    """The main graph and each function of a `GraphDef`, as (where it is, its `NodeDef`s)."""
    yield "the main graph", graph_def.node
    for function in graph_def.library.function:
        yield f"function {function.signature.name}", function.node_def


def findings(graph_def: Any) -> Iterator[Finding]:
    """Operations that are not on the list."""
    functions = {function.signature.name for function in graph_def.library.function}
    known = operations.COMPUTE | operations.CHECKPOINT.keys() | operations.ASSET.keys() | functions
    for where, nodes in bodies(graph_def):
        for node in nodes:
            if node.op not in known:
                yield Finding(node.op, where)
