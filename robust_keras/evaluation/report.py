"""Results of evaluations as they are read from files, as a table, and how they compare."""

import math
import posixpath
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from robust_keras import array_files, foreign_files, shown_text, storage
from robust_keras.evaluation import comparison

HEADER = ("model", "examples", "threat model", "attacks", "clean", "robust (upper bound)", "95 % interval")


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
        try:
            _check(found)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            named = f" ({foreign_files.printable(error)})" if isinstance(error, ValueError) else ""
            raise ValueError(
                f"Expected the results of an evaluation in {path}. Received: something else{named}"
            ) from error
        results.append({**found, "workdir": workdir})
    return results


def _check(found: dict[str, Any]) -> None:
    """Raises where results are not of the kinds that docs/evaluation.md says; older ones lack some of them."""
    low, high = found["confidence_interval_95"]
    after = [(each["attack"], each["robust_accuracy"]) for each in found.get("robust_accuracy_after", [])]
    baseline = [found["baseline"]] if found.get("baseline") else []
    records = [*found["attacks"], *baseline]
    texts = [found["norm"], found["epsilon_fraction"], found["model"]["path"], *(name for name, _ in after)]
    texts += [*(each["name"] for each in records), *found.get("warnings", []), found["model"].get("sha256") or ""]
    shares = [found["clean_accuracy"], found["robust_accuracy"], low, high, *(share for _, share in after)]
    shares += [each["robust_accuracy"] for each in baseline]
    in_bytes = found.get("robust_accuracy_uint8")
    shares += [] if in_bytes is None else [in_bytes]
    objects = [found.get(name) or {} for name in ("dataset", "versions", "diagnosis")]
    objects += [each.get("parameters", {}) for each in records]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, dict) for each in objects):
        raise TypeError
    if not all(isinstance(share, float) and math.isfinite(share) and 0 <= share <= 1 for share in shares):
        raise ValueError("an accuracy that is none")
    if type(found["num_examples"]) is not int or not 1 <= found["num_examples"] <= 1 << 40:
        raise ValueError(f"num_examples = {found['num_examples']}")


def lines(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Text cells, a line an evaluation, the first of which is `HEADER`; as they are in files."""
    found: list[tuple[str, ...]] = [HEADER]
    for result in results:
        low, high = result["confidence_interval_95"]
        found.append(
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
    return found


def table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row per evaluation. Robust accuracy is an upper bound of the true one."""
    return markdown(lines(results))


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


def markdown(lines: Sequence[Sequence[str]], *, most: int = 200) -> str:
    """A Markdown table of lines of text cells, the first of which is the header; what would steer it is escaped.

    Args:
        lines: see above.
        most: characters of a cell, after which it is cut.
    """
    lines = [[shown_text.table_cell(cell, most=most) for cell in line] for line in lines]
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


def differences(workdirs: Sequence[str], baselines: Sequence[str]) -> dict[str, str]:
    """What `compare_evaluations` finds, a line each for people: of models at chance no robust difference is told.

    Args:
        workdirs: see there, like `baselines`; none of the latter for no comparison.

    Raises:
        ValueError: see there.
    """
    if not baselines:
        return {}
    told = {name: comparison.summary(found) for name, found in compare_evaluations(workdirs, baselines).items()}
    if named := at_chance([*workdirs, *baselines]):
        told["robust"] = f"no difference can be told: at chance on clean images {', '.join(named)}"
    return told


def at_chance(workdirs: Iterable[str]) -> list[str]:
    """Those of finished evaluations whose model is at chance on clean images: what it withstands says nothing."""
    found = ((workdir, examples(workdir)) for workdir in workdirs)
    return [path for path, of in found if comparison.is_at_chance(of["clean_prediction"], of["label"])]
