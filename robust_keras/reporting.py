"""Tables from result files."""

import json
import posixpath

import tensorflow as tf


def read_results(workdirs):
    """The results of finished evaluations: a list of dictionaries, each with its `workdir`.

    Raises:
        ValueError: for a folder without results.json.
    """
    results = []
    for workdir in workdirs:
        path = posixpath.join(workdir, "results.json")
        if not tf.io.gfile.exists(path):
            raise ValueError(f"Expected the folder of a finished evaluation. Received: {workdir}, without results.json")
        with tf.io.gfile.GFile(path) as file:
            results.append({**json.loads(file.read()), "workdir": workdir})
    return results


def table(results):
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
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
