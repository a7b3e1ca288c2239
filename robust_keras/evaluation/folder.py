"""The folder of an evaluation: whose it is, and what it leaves there."""

import functools
import io
import json
import posixpath
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import ownership, storage


class Folder(NamedTuple):
    """Where an evaluation writes.

    Attributes:
        workdir: any `tf.io.gfile` path.
    """

    workdir: str

    @property
    def results(self) -> str:
        """The file of the results, which is written last."""
        return posixpath.join(self.workdir, "results.json")

    @property
    def examples(self) -> str:
        """The file of images and verdicts."""
        return posixpath.join(self.workdir, "examples.npz")

    @property
    def state(self) -> str:
        """The folder of what is done so far, which lasts until the evaluation has finished."""
        return posixpath.join(self.workdir, "state")

    @property
    def subject(self) -> str:
        """The file, in `state`, that says what is evaluated."""
        return posixpath.join(self.state, "subject.json")

    def is_begun(self) -> bool:
        """Whether it holds anything of an evaluation."""
        return bool(storage.read_json(self.results) or storage.read_json(self.subject))


def finished(folder: Folder, subject: dict[str, Any], *, writes: bool = True) -> dict[str, Any] | None:
    """The results of an evaluation that has finished; None where it has not.

    Args:
        folder: a `Folder`.
        subject: what is evaluated: `model`, `dataset` and so on, as results.json has them. A model is the same one
            wherever it is, so that its `path` may differ.
        writes: whether this process writes.

    Raises:
        ValueError: for a folder of another evaluation.
    """
    results = storage.read_json(folder.results)
    for path in (folder.results, folder.subject):
        _claim(path, subject, writes=False)
    if not results:
        return None
    if writes and storage.read_json(folder.subject):  # Interrupted after its last line but one.
        tf.io.gfile.rmtree(folder.state)
    return results


def begin(folder: Folder, subject: dict[str, Any], *, writes: bool = True) -> None:
    """Says in the folder what is evaluated; arguments and errors as of `finished`."""
    _claim(folder.subject, subject, writes=writes)


def finish(folder: Folder, results: dict[str, Any], examples: dict[str, np.ndarray]) -> None:
    """Writes what came of an evaluation, and removes its state."""
    storage.write_arrays(folder.examples, examples, compressed=True)
    storage.write_json(folder.results, results)  # Written last: it marks a finished evaluation.
    tf.io.gfile.rmtree(folder.state)


def read_examples(folder: Folder) -> dict[str, np.ndarray]:
    """The arrays of a finished evaluation's examples.npz, by name."""
    with (
        tf.io.gfile.GFile(folder.examples, "rb") as file,
        np.load(io.BytesIO(file.read()), allow_pickle=False) as saved,
    ):
        return dict(saved)


def plan_of(results: dict[str, Any]) -> dict[str, Any]:
    """What ran, of a results dictionary or a subject: its attacks by number and name, and the rest of the plan."""
    records = [results.get("baseline"), *results["attacks"]]
    attacks = {f"{k} {each['name']}": each["parameters"] for k, each in enumerate(records) if each}
    return {"attacks": attacks, **{name: results[name] for name in ("norm", "epsilon", "seed")}}


def _claim(path: str, subject: dict[str, Any], *, writes: bool) -> None:
    """Claims a file that says, among other things, what is evaluated."""

    def complete(identity):
        return {**identity, "model": {**identity["model"], "path": None}}

    def parse(text):
        saved = json.loads(text)
        plan = {"plan": saved.get("plan") or plan_of(saved)} if "plan" in subject else {}
        return {**{name: saved[name] for name in subject if name != "plan"}, "model": dict(saved["model"]), **plan}

    compare = functools.partial(ownership.differences, complete=complete)
    ownership.claim(path, subject, what="this evaluation", writes=writes, parse=parse, compare=compare)
