"""Tables of evaluations, and how they compare."""

import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import array_files, foreign_files, shown_text, storage
from robust_keras.evaluation import comparison

# What every results.json has, and of which kind, as far as it is read here.
_KINDS = {
    "model": dict,
    "num_examples": int,
    "norm": str,
    "epsilon_fraction": str,
    "attacks": list,
    "clean_accuracy": float,
    "robust_accuracy": float,
    "confidence_interval_95": list,
}


def read_results(workdirs: Sequence[str]) -> list[dict[str, Any]]:
    """The results of finished evaluations: a list of dictionaries, each with its `workdir`.

    Raises:
        ValueError: for a folder without results.json, or with one that holds no results.
    """
    results = []
    for workdir in workdirs:
        path = posixpath.join(workdir, "results.json")
        found = storage.read_object(path)
        if found is None:
            raise ValueError(f"Expected the folder of a finished evaluation. Received: {workdir}, without results.json")
        if not _is_whole(found):
            raise ValueError(f"Expected the results of an evaluation in {path}. Received: something else")
        results.append({**found, "workdir": workdir})
    return results


def _is_whole(found):
    return (
        all(isinstance(found.get(name), kind) for name, kind in _KINDS.items())
        and all(isinstance(attack, dict) and "name" in attack for attack in found["attacks"])
        and [type(bound) for bound in found["confidence_interval_95"]] == [float, float]
        and "path" in found["model"]
    )


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row per evaluation. Robust accuracy is an upper bound of the true one."""
    rows = [("model", "examples", "threat model", "attacks", "clean", "robust (upper bound)", "95 % interval")]
    for result in results:
        low, high = result["confidence_interval_95"]
        rows.append(
            (
                result["model"]["path"],
                str(result["num_examples"]),
                f"{result['norm']} {result['epsilon_fraction']}",
                ", ".join(attack["name"] for attack in result["attacks"]),
                f"{100 * result['clean_accuracy']:.2f} %",
                f"{100 * result['robust_accuracy']:.2f} %",
                f"{100 * low:.2f} to {100 * high:.2f} %",
            )
        )
    return markdown(rows)


def examples(workdir: str) -> dict[str, np.ndarray]:
    """The arrays of an evaluation's examples but the images.

    Raises:
        ValueError: where examples.npz does not hold them.
    """
    path = posixpath.join(workdir, "examples.npz")
    try:
        with foreign_files.open_regular(path) as file:
            return array_files.arrays(file, ("index", "label", "clean_prediction", "robust"))
    except (ValueError, FileNotFoundError, tf.errors.NotFoundError) as error:
        raise ValueError(f"Expected the examples of an evaluation in {path}. Received: {storage.why(error)}") from error


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of lines of text cells, the first of which is the header; what would steer it is escaped."""
    lines = [[shown_text.table_cell(cell) for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows)


def compare_evaluations(workdirs: Sequence[str], baselines: Sequence[str]) -> dict[str, comparison.Comparison]:
    """Compares models with others on the same images, pair by pair.

    Args:
        workdirs: folders of finished evaluations, one for each seed of a configuration.
        baselines: those of the configuration to compare with, in the same order.

    Returns:
        `{"clean": Comparison, "robust": Comparison}`.

    Raises:
        ValueError: for folders that do not pair up, or evaluations of other images.
    """
    if len(workdirs) != len(baselines):
        raise ValueError(f"Expected a baseline for each of {len(workdirs)} evaluations. Received: {len(baselines)}")
    read_results([*workdirs, *baselines])  # All are there, and finished.
    sides = [[examples(workdir) for workdir in side] for side in (workdirs, baselines)]
    first = sides[0][0]
    for workdir, found in zip([*workdirs, *baselines], sides[0] + sides[1]):
        if not all(np.array_equal(found[name], first[name]) for name in ("index", "label")):
            raise ValueError(f"Expected evaluations of the images of {workdirs[0]}. Received: others in {workdir}")
    right = {"clean": lambda one: one["clean_prediction"] == one["label"], "robust": lambda one: one["robust"]}
    return {
        name: comparison.compare(*(np.stack([is_right(one) for one in side]) for side in sides))
        for name, is_right in right.items()
    }


def at_chance(workdirs: Iterable[str]) -> list[str]:
    """Those of finished evaluations whose model is at chance on clean images: what it withstands says nothing."""
    found = ((workdir, examples(workdir)) for workdir in workdirs)
    return [path for path, of in found if comparison.is_at_chance(of["clean_prediction"], of["label"])]
