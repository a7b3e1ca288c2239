"""What is in a model of a stranger, told without loading it."""

import collections
import os
import posixpath
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from robust_keras import foreign_files, storage
from robust_keras.saved_models.safety import bundle, graphs, keras_file, objects, saved_model

gfile = tf.io.gfile


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What is in a SavedModel's folder or a `.keras` file; nothing of it is loaded or run.

    Returns:
        JSON: `path`, `kind`, `files` (`name`, `bytes`, `sha256`), `refused`, a list of lines, empty for a model that
        only computes, and of a SavedModel `tensorflow_version`, `signatures`, `operations` (how often each is in the
        graph and all functions), `functions` (number of operations, by name), `variables` (`name`, `dtype`, `shape`,
        `bytes`) and `assets`; of a `.keras` file `classes` (how often each is named) and `variables` without a `dtype`.
        What cannot be read is left out, and `refused` says why. Names are as in the model: nothing is escaped.

    Raises:
        ValueError: where there is nothing.
    """
    path = os.fspath(path)
    if not gfile.exists(path):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {path}, which does not exist")
    of_folder = gfile.isdir(path)
    told: dict[str, Any] = {"path": path, "kind": "SavedModel" if of_folder else "file", "refused": []}
    for part in (_files, _variables, _program) if of_folder else (_file, _keras_file):
        try:
            told |= part(path)
        except ValueError as error:
            told["refused"].append(str(error))
    told["refused"] += told.pop("findings", [])
    return told


def lines(told: dict[str, Any], *, most: int = 40) -> Iterator[str]:
    """What `describe` returns as a person reads it, escaped, a line each.

    Args:
        told: see there.
        most: lines of each kind, after which they are counted.
    """
    show = foreign_files.printable
    version = told.get("tensorflow_version")
    yield f"{told['kind']} {show(told['path'])}" + (f", written by TensorFlow {show(version)}" if version else "")
    files = [
        f"{show(each['name'])}  {each['bytes']:,} bytes  SHA-256 {each['sha256']}" for each in told.get("files", [])
    ]
    signatures = [
        f"{show(name)}: {_shown(signature['inputs'])} to {_shown(signature['outputs'])}"
        for name, signature in told.get("signatures", {}).items()
    ]
    variables = [
        f"{show(each['name'])}  {each.get('dtype', '')} {each['shape']}  {each['bytes']:,} bytes"
        for each in told.get("variables", [])
    ]
    operations = [f"{count:>7,}  {show(name)}" for name, count in told.get("operations", {}).items()]
    classes = [f"{count:>7,}  {show(name)}" for name, count in told.get("classes", {}).items()]
    functions = [f"{count:>7,}  {show(name)}" for name, count in told.get("functions", {}).items()]
    parts = {
        "files": ("files", files),
        "classes": ("classes", classes),
        "signatures": ("signatures", signatures),
        "variables": ("variables", variables),
        "assets": ("assets", list(map(show, told.get("assets", [])))),
        "operations": ("kinds of operations", operations),
        "functions": ("functions, with their operations", functions),
        "refused": ("refused", [show(each, most=500) for each in told["refused"]]),
    }
    for name, found in (part for key, part in parts.items() if key in told):
        yield f"{len(found)} {name}"
        yield from (f"  {each}" for each in found[:most])
        if len(found) > most:
            yield f"  and {len(found) - most} more"


def _shown(tensors: dict[str, str]) -> str:
    return ", ".join(f"{foreign_files.printable(name)} {tensor}" for name, tensor in tensors.items()) or "nothing"


def _files(path: str) -> dict[str, Any]:
    return {"files": [_entry(name, file) for name, file in foreign_files.regular_files(path)]}


def _entry(name: str, file: str) -> dict[str, Any]:
    return {"name": name, "bytes": gfile.stat(file).length, "sha256": storage.sha256(file)}


def _file(path: str) -> dict[str, Any]:
    foreign_files.check_regular(path, follow=True)
    return {"files": [_entry(posixpath.basename(path), path)]}


def _keras_file(path: str) -> dict[str, Any]:
    if not path.endswith(".keras"):
        raise ValueError(f"Expected a SavedModel's folder or a .keras file. Received: {foreign_files.printable(path)}")
    told = {**keras_file.describe(path), "findings": []}
    try:
        keras_file.check(path)
    except ValueError as error:
        told["findings"] = [str(error)]
    return told


def _variables(path: str) -> dict[str, Any]:
    found = bundle.variables(path)
    named = [{"name": v.name, "dtype": v.dtype, "shape": list(v.shape), "bytes": v.size} for v in found]
    return {"variables": named}


def _program(path: str) -> dict[str, Any]:
    saved_model.check_files(path)
    model = saved_model.read(path)
    (meta_graph,) = model.meta_graphs
    counted: collections.Counter[str] = collections.Counter()
    for _, nodes in graphs.bodies(meta_graph.graph_def):
        counted.update(node.op for node in nodes)
    library = meta_graph.graph_def.library.function
    return {
        "tensorflow_version": meta_graph.meta_info_def.tensorflow_version,
        "signatures": {name: _signature(each) for name, each in sorted(meta_graph.signature_def.items())},
        "operations": dict(counted.most_common()),
        "functions": {function.signature.name: len(function.node_def) for function in library},
        "assets": objects.asset_names(meta_graph),
        "findings": [str(each) for each in dict.fromkeys(saved_model.findings(model, path))],
    }


def _signature(signature: Any) -> dict[str, dict[str, str]]:
    sides = {"inputs": signature.inputs, "outputs": signature.outputs}
    return {side: {name: _tensor(info) for name, info in sorted(given.items())} for side, given in sides.items()}


def _tensor(info: Any) -> str:
    try:
        dtype = tf.as_dtype(info.dtype).name
    except TypeError:
        dtype = f"type {info.dtype}"
    if info.tensor_shape.unknown_rank:
        return f"{dtype} of any shape"
    sizes = ["any" if each.size < 0 else str(each.size) for each in info.tensor_shape.dim]
    return f"{dtype} [{', '.join(sizes)}]"
