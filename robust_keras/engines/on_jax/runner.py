"""Trains and evaluates what is in this folder. Needs JAX, from 0.7.2 on, and NumPy; nothing else.

    python run.py --steps=30 --evaluate --time     # takes steps, attacks the images held out, says how long steps take
    python run.py --steps=30 --evaluate --out=DIR  # and leaves a run's folder, with which train.py and export.py go on

`robust_keras` made the folder with scripts/export_program.py, and copied this file, which imports nothing of it:

    manifest.json          what the rest is: names, shapes, types, hashes, the recipe
    step.stablehlo         a training step: attack, gradients, update; step.mlir is its text, for people
    correct*.stablehlo     which images are classified right, clean and under attack, by weights and by averages
    state.npz              what a step starts from and replaces: weights, momentum, averages, statistics, counters
    batches.npz            the batches of the next steps, as the run has them
    images.npz             the images held out

It computes on the first device that JAX drives; JAX_PLATFORMS chooses among kinds.
A program is code, of whoever made the folder. It can compute and nothing else: it is StableHLO, which knows neither
files nor networks, and is refused if it calls what is outside of it. The rest is JSON, and arrays without pickles.
Exit codes: 1 files, memory or devices; 2 another folder than the manifest says, or flags; 3 a loss that is not finite.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from typing import Any

FORMAT = "robust_keras program"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
UNSAVED = "unsaved/"  # What the names of counters begin with that a run makes anew.
BEST = "best/"
_FAILED, _REFUSED, _NON_FINITE = 1, 2, 3
_NAME = re.compile(r"[a-z_]+")
_READ: dict[type, tuple] = {  # Of a manifest.
    bool: ("has_all_images",),
    int: ("step", "num_steps", "train_steps", "batch_size", "num_images", "log_every", "validate_every"),
    str: ("best_metric", "recipe"),
    list: ("learning_rates",),
    dict: ("programs", "arrays", "files", "kept", "info"),
}
_ELEMENTS = {"bool": "i1", "float16": "f16", "float32": "f32", "float64": "f64"}


def _exit(code, line):
    print(f"error: {' '.join(str(line).split())}", file=sys.stderr, flush=True)
    sys.exit(code)


try:
    import jax
    import numpy as np
    from jax.extend.core import Primitive
    from jax.extend.mlir.dialects import stablehlo
    from jax.interpreters import mlir
except ImportError as error:
    if __name__ != "__main__":
        raise
    _exit(_REFUSED, f"Expected JAX 0.7.2 or newer, and NumPy. Received: {error}")

_call = Primitive("travelled_program")
_call.multiple_results = True


@_call.def_abstract_eval
def _abstract(*arguments, artifact, outputs):
    del arguments, artifact
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in outputs]


def _lower(context, *operands, artifact, outputs):
    del outputs
    module = stablehlo.deserialize_portable_artifact(context.module_context.context, artifact)
    types = list(_main(module).type.results)
    name = mlir.merge_mlir_modules(context.module_context.module, "travelled", module)
    attributes = {"callee": mlir.ir.FlatSymbolRefAttr.get(name)}
    return list(mlir.ir.Operation.create("func.call", results=types, operands=operands, attributes=attributes).results)


mlir.register_lowering(_call, _lower)


def _main(module):
    return next(each for each in module.body.operations if each.attributes["sym_name"].value == "main")


def run(
    folder: str, *, num_steps: int | None = None, evaluate: bool = False, timed: bool = False, out: str | None = None
) -> None:
    """Trains, evaluates and writes as the flags say.

    Args:
        folder: that export_program.py made.
        num_steps: to take; None for all that there are batches for.
        evaluate: whether to attack the images held out at the end.
        timed: whether to say how long steps take.
        out: a new folder for a run's, or None.

    Raises:
        ValueError: for a folder that is not as its manifest says, and steps that it has no batches for.
        FloatingPointError: for a loss or a weight that is not finite; nothing is written then.
    """
    manifest = read_manifest(folder)
    num_steps = manifest["num_steps"] if num_steps is None else num_steps
    if not 0 <= num_steps <= manifest["num_steps"]:
        raise ValueError(f"Expected 0 to {manifest['num_steps']} steps, which have batches. Received: {num_steps}")
    if timed and num_steps < 2:
        raise ValueError(f"Expected two steps or more to time: the first one compiles. Received: {num_steps}")
    if out is not None and os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"Expected an empty or new folder for --out. Received: {out}")
    with _x64():
        print(f"Computing on {jax.local_devices()[0].device_kind}, by JAX {jax.__version__}", flush=True)
        state, logs, seconds = _trained(folder, manifest, num_steps)
        if timed:
            _say_how_long(seconds, manifest["batch_size"])
        metrics = _evaluated(folder, manifest, state) if evaluate else {}
        state = jax.device_get(state)
    step = manifest["step"] + num_steps
    if metrics:
        print(f"Step {step}: {', '.join(f'{name} {100 * value:.2f} %' for name, value in metrics.items())}", flush=True)
    if out is None:
        print("Nothing is kept without --out=DIR")
        return
    if broken := [name for name, array in state.items() if not np.isfinite(array).all()]:
        raise FloatingPointError(f"Expected finite weights. Received: {broken[0]} with others")
    print(f"Snapshot: {_write_run(out, manifest, state, _rows(manifest, logs, seconds), metrics, step)}")


def read_manifest(folder: str) -> dict[str, Any]:
    """The manifest of a folder.

    Raises:
        ValueError: for another folder, and a manifest that lacks what is read here.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        if (manifest["format"], manifest["format_version"]) != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"format {manifest['format']!r:.40} {manifest['format_version']!r:.40}")
        for name, kind in [(name, kind) for kind, names in _READ.items() for name in names]:
            if not isinstance(manifest[name], kind):
                raise ValueError(f"{name} {manifest[name]!r:.40}")
        _check_programs(manifest)
    except FileNotFoundError:
        raise ValueError(f"Expected a folder that export_program.py has finished. Received: {folder}") from None
    except (ValueError, KeyError, TypeError) as error:
        received = f"nothing named {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"Expected a {FORMAT}, version {FORMAT_VERSION}, in {path}. Received: {received}") from error
    return manifest


def _check_programs(manifest):
    """Raises ValueError, KeyError or TypeError for programs of other arrays than there are."""
    programs, arrays = manifest["programs"], manifest["arrays"]
    if "step" not in programs or not all(map(_NAME.fullmatch, programs)):
        raise ValueError(f"programs {', '.join(programs):.40}")
    for name in ("rows", "best", "last_validation", "description"):
        manifest["info"][name]
    for name in [*manifest["kept"].values(), *(each for entry in programs.values() for each in entry["state"])]:
        arrays["state"][name]
    for name, entry in programs.items():
        for each, (dtype, *shape) in entry["batch"].items():
            # The batches lie one after another; of the images held out, as many as in a batch are taken at once.
            wanted = [manifest["num_steps"], *shape] if name == "step" else [manifest["num_images"], *shape[1:]]
            if arrays["batches" if name == "step" else "images"][each] != [dtype, *wanted]:
                raise ValueError(f"other shapes of {each} for {name}")


def read_arrays(folder: str, manifest: dict, kind: str) -> "dict[str, np.ndarray]":
    """The arrays of 'state', 'batches' or 'images', by name.

    Raises:
        ValueError: for others than the manifest says.
    """
    path = _checked_file(folder, manifest, f"{kind}.npz")
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(each.file_size for each in file.zip.infolist()) > 100 * os.path.getsize(path) + (1 << 28):
                raise ValueError("more than a file of its size is believed to hold")
            arrays = dict(file)
    except (ValueError, TypeError, EOFError, MemoryError, RecursionError, zipfile.BadZipFile) as error:
        raise ValueError(f"Expected arrays of numbers in {path}. Received: {error}") from error
    found = {name: [array.dtype.name, *array.shape] for name, array in arrays.items()}
    if found != manifest["arrays"][kind]:
        raise ValueError(f"Expected arrays as the manifest has them in {path}. Received: others")
    return arrays


def read_program(folder: str, manifest: dict, name: str) -> Callable:
    """A program as a function of lists of arrays inside `jax.jit`: `(state, batch) -> (state, values)`.

    Raises:
        ValueError: for another program than the manifest says, and one that calls what is outside of it.
    """
    path = _checked_file(folder, manifest, f"{name}.stablehlo")
    with open(path, "rb") as file:
        artifact = file.read()
    entry, arrays = manifest["programs"][name], manifest["arrays"]
    state = [arrays["state"][each] for each in entry["state"]]
    given = [*state, *entry["batch"].values()]
    returned = [*(state if name == "step" else []), *entry["values"].values()]
    with mlir.make_ir_context() as context:
        try:
            module = stablehlo.deserialize_portable_artifact(context, artifact)
        except ValueError as error:
            raise ValueError(f"Expected a StableHLO program in {path}. Received: {error}") from error
        check_operations(module)
        types = _main(module).type
        found = [[str(each) for each in types.inputs], [str(each) for each in types.results]]
    if found != [[tensor_type(*each) for each in given], [tensor_type(*each) for each in returned]]:
        raise ValueError(f"Expected a program of the manifest's arrays in {path}. Received: one of others")
    outputs = tuple((tuple(shape), np.dtype(dtype)) for dtype, *shape in returned)

    def call(state, batch):
        results = _call.bind(*state, *batch, artifact=artifact, outputs=outputs)
        split = len(results) - len(entry["values"])
        return results[:split], results[split:]

    return call


def check_operations(module: Any) -> None:
    """Refuses a program that does anything but compute.

    Raises:
        ValueError: naming the operations.
    """
    others = set()

    def look(operation):
        dialect, _, name = operation.name.partition(".")
        if name == "custom_call":
            others.add(f"{operation.name} {operation.attributes['call_target_name']}")
        elif dialect not in ("stablehlo", "func", "builtin") or name in ("infeed", "outfeed", "send", "recv"):
            others.add(operation.name)
        return mlir.ir.WalkResult.ADVANCE

    module.operation.walk(look)
    if others:
        raise ValueError(f"Expected operations of StableHLO that compute. Received: {', '.join(sorted(others))}")


def tensor_type(dtype: str, *shape: int) -> str:
    """StableHLO's name of arrays of a NumPy type, by its name, and a shape."""
    element = _ELEMENTS.get(dtype) or dtype.replace("uint", "ui").replace("int", "i")
    return f"tensor<{'x'.join([*map(str, shape), element])}>"


def _checked_file(folder, manifest, name):
    """The path of a file that is as it was when the folder was made."""
    path = os.path.join(folder, name)
    if _sha256(path) != manifest["files"].get(name):
        raise ValueError(f"Expected the SHA-256 that the manifest has of {path}. Received: another")
    return path


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _trained(folder, manifest, num_steps):
    """The state after some steps, what each of them returned, and the seconds that it took."""
    state = read_arrays(folder, manifest, "state")
    entry, logs, seconds = manifest["programs"]["step"], [], []
    if num_steps == 0:
        return state, logs, seconds
    batches = read_arrays(folder, manifest, "batches")
    step = jax.jit(read_program(folder, manifest, "step"), donate_argnums=0)
    held = jax.device_put([state[name] for name in entry["state"]])
    for k in range(num_steps):
        began = time.perf_counter()
        held, values = step(held, [batches[name][k] for name in entry["batch"]])
        values = dict(zip(entry["values"], map(float, values)))  # Waits for it.
        seconds.append(time.perf_counter() - began)
        logs.append(values)
        loss, number = values["loss"], manifest["step"] + k + 1
        if not math.isfinite(loss):
            raise FloatingPointError(f"Expected a finite loss. Received: {loss} at step {number}")
        if _is_due(manifest, k + 1) or k + 1 == num_steps:
            print(f"Step {number}: loss {loss:.6f}", flush=True)
    return {**state, **dict(zip(entry["state"], held))}, logs, seconds


def _say_how_long(seconds, batch_size):
    print(f"The first step, which is compiled, took {seconds[0]:.1f} s", flush=True)
    middle = statistics.median(seconds[1:])
    print(f"A step of {batch_size} images takes {1000 * middle:.1f} ms, the median of {len(seconds) - 1}:", end=" ")
    print(f"{batch_size / middle:.1f} images/s", flush=True)


def _evaluated(folder, manifest, state):
    """Accuracies on the images held out, by their columns of metrics.csv."""
    images, num_images, metrics = read_arrays(folder, manifest, "images"), manifest["num_images"], {}
    for name in sorted(each for each in manifest["programs"] if each != "step"):
        entry = manifest["programs"][name]
        correct, held = jax.jit(read_program(folder, manifest, name)), [state[each] for each in entry["state"]]
        size, ending, right = entry["batch"]["image"][1], name.removeprefix("correct"), []
        for start in range(0, num_images, size):
            taken = np.arange(start, start + size) % num_images  # The last batch is filled up, and cut again.
            _, values = correct(held, [images[each][taken] for each in entry["batch"]])
            right.append(np.stack(jax.device_get(values))[:, : num_images - start])
        means = np.concatenate(right, axis=1).mean(axis=1)
        metrics |= {f"val_{each}{ending}": float(mean) for each, mean in zip(entry["values"], means)}
    return metrics


def _is_due(manifest, count, every="log_every"):
    """Whether there is something to do after `count` of these steps, as `every` says, or because the run ends."""
    step = manifest["step"] + count
    return count > 0 and (step % manifest[every] == 0 or step == manifest["train_steps"])


def _rows(manifest, logs, seconds):
    """Rows of metrics.csv for the steps that were taken."""
    rows = []
    for count, values in enumerate(logs, 1):
        row = {"step": manifest["step"] + count, **values, "learning_rate": manifest["learning_rates"][count - 1]}
        if count > 1:
            row["examples_per_second"] = (count - 1) * manifest["batch_size"] / sum(seconds[1:count])
        if _is_due(manifest, count) or count == len(logs):
            rows.append(row)
    return rows


def _write_run(out, manifest, state, rows, metrics, step):
    """Writes the folder of a run after `step`, as robust_keras does, and returns the path of its snapshot."""
    info, best_metric = manifest["info"], manifest["best_metric"]
    arrays = {name: array for name, array in state.items() if not name.startswith(UNSAVED)}
    if metrics and manifest["has_all_images"]:
        validation = {"step": step, "metrics": metrics}
        info["last_validation"] = validation
        rows[-1:] = [{**row, **metrics} for row in rows[-1:]]
        if info["best"] is None or metrics[best_metric] > info["best"]["metrics"][best_metric]:
            info["best"] = validation
            arrays |= {BEST + kept: state[name] for kept, name in manifest["kept"].items()}
    elif rows and _is_due(manifest, step - manifest["step"], "validate_every"):  # train.py begins with it.
        row = rows.pop()
        info["unfinished"] = {"step": step, "logs": {name: row[name] for name in ("loss", "labelled_fraction")}}
    info["rows"] = [*info["rows"], *rows]
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "config.gin"), "w", encoding="utf-8") as file:
        file.write(manifest["recipe"])
    if best := {name.removeprefix(BEST): each for name, each in arrays.items() if name.startswith(BEST)}:
        about = {"best": info["best"], "description": info["description"]}
        _write_snapshot(os.path.join(out, "best"), info["best"]["step"], best, about)
    return _write_snapshot(os.path.join(out, "checkpoints"), step, arrays, info)


def _write_snapshot(folder, step, arrays, info):
    """Writes arrays, then the marker without which they do not exist."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, f"step-{step:08d}.npz")
    np.savez(path, **arrays)
    with open(os.path.join(folder, f"step-{step:08d}.json"), "w", encoding="utf-8") as file:
        json.dump({"sha256": _sha256(path), "info": info}, file, indent=1)
    return path


def _x64():
    """A context in which JAX has types of 64 bits, of which counters of steps are."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return importlib.import_module("jax.experimental").enable_x64()  # Before JAX 0.8.


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        _exit(_REFUSED, message)


def main() -> None:
    """Runs the command as it was typed."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="Steps to take; all that the folder has batches for by default.")
    parser.add_argument("--evaluate", action="store_true", help="Attack the images held out at the end.")
    parser.add_argument("--time", action="store_true", help="Say how long a step takes.")
    parser.add_argument("--out", help="A new folder for what a run leaves.")
    given = parser.parse_args()
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        run(folder, num_steps=given.steps, evaluate=given.evaluate, timed=given.time, out=given.out)
    except ValueError as error:
        _exit(_REFUSED, error)
    except FloatingPointError as error:
        _exit(_NON_FINITE, error)
    except (OSError, RuntimeError) as error:  # JAX's are of the latter kind.
        _exit(_FAILED, str(error).splitlines()[0])


if __name__ == "__main__":
    main()
