"""The folder of an evaluation: whose it is, and what it leaves there."""

import functools
import json
import posixpath
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import array_files, own_folders, ownership, storage
from robust_keras.evaluation import report
from robust_keras.evaluation import results as evaluation


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
        return any(storage.read_object(path) is not None for path in (self.results, self.subject))


def finished(
    folder: Folder, subject: dict[str, Any], *, writes: bool = True, digest: Callable[[], str] | None = None
) -> dict[str, Any] | None:
    """The results of an evaluation that has finished; None where it has not.

    Args:
        folder: a `Folder`.
        subject: what is evaluated: `model`, `dataset` and so on, as results.json has them. A model is the same one
            wherever it is, so that its `path` may differ, and so are images under another `name`, such as that of a
            file that was moved, where the folder says what their digest is; results of older versions do not.
        writes: whether this process writes.
        digest: of the images and labels, where it is not in the subject; they are loaded if it is needed.

    Raises:
        ValueError: for a folder of another evaluation, or with files that hold none.
    """
    results = storage.read_object(folder.results)
    _claim(folder.results, subject, writes=False, digest=digest)
    _claim(folder.subject, subject, writes=False, digest=digest, state=folder.state)
    if results is None:
        return None
    report.read_results([folder.workdir])  # They are whole.
    try:
        evaluation.summary(results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"Expected the results of an evaluation in {folder.results}. Received: others") from error
    if writes and tf.io.gfile.exists(folder.subject):  # Interrupted after its last line but one.
        own_folders.remove_folder(folder.state)
    return results


def begin(folder: Folder, subject: dict[str, Any], *, writes: bool = True) -> None:
    """Says in the folder what is evaluated; arguments and errors as of `finished`."""
    _claim(folder.subject, subject, writes=writes, state=folder.state)


def finish(folder: Folder, results: dict[str, Any], examples: dict[str, np.ndarray]) -> None:
    """Writes what came of an evaluation, and removes its state."""
    storage.write_arrays(folder.examples, examples, compressed=True)
    storage.write_json(folder.results, results)  # Written last: it marks a finished evaluation.
    own_folders.remove_folder(folder.state)


def read_examples(folder: Folder) -> dict[str, np.ndarray]:
    """The arrays of a finished evaluation's examples.npz, by name."""
    return array_files.read(folder.examples)


def told_of_finished(folder: Folder, num_kept: int | None) -> str:
    """What to say of results that were read, of which `kept_verdicts` has counted what was kept; None for nothing."""
    checked = (
        "The images of this evaluation are not here, so nothing of it was checked"
        if num_kept is None
        else f"The {num_kept} adversarial images that were kept still break the model; that the rest withstood the "
        "attacks is what the file says"
    )
    return f"Already finished: {folder.results}; these numbers are read from this file, no attack was run. {checked}"


def plan_of(results: dict[str, Any]) -> dict[str, Any]:
    """What ran, of a results dictionary or a subject: its attacks by number and name, and the rest of the plan."""
    records = [results.get("baseline"), *results["attacks"]]
    attacks = {f"{k} {each['name']}": each["parameters"] for k, each in enumerate(records) if each}
    return {"attacks": attacks, **{name: results[name] for name in ("norm", "epsilon", "seed")}}


def _claim(
    path: str,
    subject: dict[str, Any],
    *,
    writes: bool,
    digest: Callable[[], str] | None = None,
    state: str | None = None,
) -> None:
    """Claims a file that says, among other things, what is evaluated; an older one has the digest in its `state`."""

    def parse(text):
        saved = storage.as_object(json.loads(text), path)
        plan = {"plan": saved.get("plan") or plan_of(saved)} if "plan" in subject else {}
        objects = {name: storage.as_object(saved[name], path) for name in ("model", "dataset")}
        return {**{name: saved[name] for name in subject if name != "plan"}, **objects, **plan}

    compare = functools.partial(_differences, digest=digest, state=state)
    ownership.claim(path, subject, what="this evaluation", writes=writes, parse=parse, compare=compare)


def _differences(
    saved: dict[str, Any], given: dict[str, Any], *, digest: Callable[[], str] | None, state: str | None
) -> list[str]:
    """What differs, wherever the model is, and whatever the name of the same images is."""
    was, now = saved["dataset"], given["dataset"]
    if was.get("name") != now["name"] and (before := was.get("sha256") or _images_of(state)):
        if before == (now.get("sha256") or (digest and digest())):
            was = {**was, "name": now["name"]}
    if not (was.get("sha256") and now.get("sha256")):  # One of them does not say.
        was, now = ({**each, "sha256": None} for each in (was, now))

    def complete(identity):
        return {**identity, "model": {**identity["model"], "path": None}}

    return ownership.differences({**saved, "dataset": was}, {**given, "dataset": now}, complete=complete)


def _images_of(state: str | None) -> str | None:
    """The digest of the images that an interrupted evaluation's state is of."""
    newest = storage.read_newest(state) if state else None
    identity = newest.info.get("identity") if newest else None
    return identity.get("images") if isinstance(identity, dict) else None
