"""SavedModels, looked at before TensorFlow loads them: their files, and the program in them, read as bytes."""

import posixpath
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.foreign_files import printable
from robust_keras.saved_models.safety import bundle, graphs, objects, paths, wire
from robust_keras.saved_models.safety.graphs import Finding

PROGRAM = "saved_model.pb"
_MOST_BYTES = 2**31 - 1  # Of a protocol buffer.
_MOST_STRUCTURE = 2**28
# Further files that TensorFlow reads, what they are, and how large they may be.
_FURTHER = {
    "debug/saved_model_debug_info.pb": ("tensorflow.GraphDebugInfo", 2**26),
    "fingerprint.pb": ("tensorflow.FingerprintDef", 2**16),
}
_OTHER_PROGRAMS = ("saved_model.pbtxt", "saved_model.cpb")


def check(path: str) -> None:
    """Refuses a SavedModel that would do anything but compute.

    Args:
        path: its folder.

    Raises:
        ValueError: naming the first operation or file that is refused.
    """
    check_files(path)
    bundle.variables(path)
    found = list(dict.fromkeys(findings(read(path), path)))
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"Expected a model of operations that only compute. Received: {found[0]} of {printable(path)}{more}"
        )


def check_files(path: str) -> None:
    """Refuses links, pipes and the like below a model's folder, a program in text, and files too large to be read.

    Raises:
        ValueError: naming the file.
    """
    try:
        names = [name for name, _ in foreign_files.regular_files(path)]
    except ValueError as error:
        is_link = "a symbolic link" in str(error)  # As in the cache of a hub.
        raise ValueError(f"{error}; `cp -rL` makes a copy without links" if is_link else str(error)) from error
    for name in names:
        if name in _OTHER_PROGRAMS:
            raise ValueError(f"Expected a SavedModel with {PROGRAM} alone. Received: {name} in {printable(path)}")
    for name, (kind, most) in _FURTHER.items():
        file = posixpath.join(path, name)
        if tf.io.gfile.exists(file):
            with foreign_files.open_regular(file, most_bytes=most) as stream:
                content = stream.read()
            try:
                wire.parse(content, kind, most=most)
            except ValueError as error:
                raise ValueError(f"Expected a {kind}. Received: {printable(file)}: {error}") from error


def read(path: str) -> Any:
    """The program of a SavedModel, a `SavedModel` message.

    Raises:
        ValueError: for a file that is none, or holds several.
    """
    file = posixpath.join(path, PROGRAM)
    with foreign_files.open_regular(file, most_bytes=_MOST_BYTES) as stream:
        content = stream.read()
    try:
        return parse(content)
    except ValueError as error:
        raise ValueError(f"Expected a SavedModel of one graph. Received: {printable(file)}: {error}") from error


def parse(content: bytes) -> Any:
    """`read` of the bytes of a program.

    Raises:
        ValueError: saying what it is instead.
    """
    model = wire.parse(content, "tensorflow.SavedModel", most=_MOST_STRUCTURE)
    if len(model.meta_graphs) != 1:
        raise ValueError(f"{len(model.meta_graphs)} graphs")
    return model


def findings(model: Any, path: str) -> Iterator[Finding]:
    """All that is refused of a `SavedModel` message.

    Args:
        model: see `read`.
        path: the folder with its assets.
    """
    (meta_graph,) = model.meta_graphs
    program = paths.Program(meta_graph)
    yield from graphs.findings(meta_graph.graph_def)
    yield from program.findings()
    yield from objects.findings(meta_graph, program)
    for name in objects.asset_names(meta_graph):
        if not tf.io.gfile.exists(posixpath.join(path, "assets", name)):
            yield Finding(f"a file {name!r} that is not there", "the assets")
