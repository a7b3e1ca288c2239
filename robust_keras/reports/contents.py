"""What a report is of: folders of runs and evaluations, read into plain records. Nothing in them is run.

They may be somebody else's: what is read is checked, what lies in them and is a link is not followed, and of data sets
none is loaded but by the function that a caller gives.
"""

import os
import posixpath
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import array_files, foreign_files, storage
from robust_keras.evaluation import report, security_file
from robust_keras.evaluation.examples import as_floats
from robust_keras.reports import class_names as names_of_classes
from robust_keras.reports import curves

gfile = tf.io.gfile
# Takes the `dataset` of results and returns its images and labels, or raises ValueError where they are not at hand.
LoadImages = Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]
# Arrays of examples.npz, the kinds of their numbers, and whether every version has written them.
_ARRAYS = {
    "label": ("iu", True),
    "clean_prediction": ("iu", True),
    "robust": ("b", True),
    "broken_by": ("iu", False),
    "adversarial": ("f", False),
    "adversarial_prediction": ("iu", False),
    "clean_margin": ("f", False),
}


class Evaluation(NamedTuple):
    """A finished evaluation.

    Attributes:
        folder: as it was given, or below a run's that was.
        results: what results.json holds.
        examples: arrays of examples.npz, of which an older version lacks some; None where there is no such file.
        security: what security.json holds; None where there is none.
        class_names: in order; empty where they are not known.
        clean: float32 `[n, height, width, channels]` in [0, 1], the images that were attacked, or None.
        no_clean: why they are not there.
        config: of config.gin.
        date: when results.json was written, by the file system.
    """

    folder: str
    results: dict[str, Any]
    examples: dict[str, np.ndarray] | None
    security: dict[str, Any] | None
    class_names: tuple[str, ...]
    clean: np.ndarray | None
    no_clean: str
    config: str
    date: str


class Run(NamedTuple):
    """A training run, which may be under way.

    Attributes:
        folder: as it was given.
        curve: columns of metrics.csv, see `curves.read`.
        best_step: after which step the weights are that were kept as the best; None where none were.
        config: of config.gin.
        card: the model card of its export; empty without one.
        evaluations: of its models, those in folders of its own.
        unfinished: names of folders in it whose evaluation has not finished.
        date: when metrics.csv was written last, by the file system.
    """

    folder: str
    curve: dict[str, np.ndarray]
    best_step: int | None
    config: str
    card: dict[str, Any]
    evaluations: tuple[Evaluation, ...]
    unfinished: tuple[str, ...]
    date: str


class Contents(NamedTuple):
    """All that a report is of.

    Attributes:
        runs: those that were given.
        evaluations: those that were given, or are in the folder of a run that was, then the baselines.
        differences: by 'clean' and 'robust', how the evaluations differ from their baselines, as a line; empty without.
        num_baselines: how many of the evaluations are baselines, the last ones.
    """

    runs: tuple[Run, ...]
    evaluations: tuple[Evaluation, ...]
    differences: dict[str, str]
    num_baselines: int


def read(folders: Sequence[str], *, baselines: Sequence[str] = (), load_images: LoadImages | None = None) -> Contents:
    """Reads folders.

    Args:
        folders: of runs, with metrics.csv, or of finished evaluations, with results.json.
        baselines: folders of evaluations that those in `folders` are compared with, one for each; see
            `evaluation.report.compare_evaluations`.
        load_images: see `LoadImages`; None where no images are to be shown.

    Raises:
        ValueError: for a folder of neither, files that hold something else, or baselines that do not pair up.
    """
    differences = report.differences(folders, baselines)
    runs, evaluations = [], []
    for folder in folders:
        is_run = gfile.exists(posixpath.join(folder, "metrics.csv"))
        if not is_run and not gfile.exists(posixpath.join(folder, "results.json")):
            raise ValueError(
                "Expected the folder of a run, with metrics.csv, or of a finished evaluation, with results.json. "
                f"Received: {folder}, with neither"
            )
        if gfile.exists(posixpath.join(folder, "results.json")):
            evaluations.append(_evaluation(folder, load_images))
        if is_run:
            runs.append(_run(folder, load_images))
            evaluations.extend(runs[-1].evaluations)
    others = [_evaluation(folder, load_images) for folder in baselines]
    return Contents(tuple(runs), (*evaluations, *others), differences, len(others))


def _run(folder: str, load_images: LoadImages | None) -> Run:
    inner = [posixpath.join(folder, name.rstrip("/")) for name in sorted(gfile.listdir(folder))]
    inner = [path for path in inner if _is_own_folder(path)]
    finished = [path for path in inner if gfile.exists(posixpath.join(path, "results.json"))]
    steps = storage.steps(posixpath.join(folder, "best"))
    path = posixpath.join(folder, "metrics.csv")
    return Run(
        folder=folder,
        curve=curves.read(path),
        best_step=steps[-1] if steps else None,
        config=storage.read_text(posixpath.join(folder, "config.gin")),
        card=_card(folder),
        evaluations=tuple(_evaluation(path, load_images) for path in finished),
        unfinished=tuple(
            posixpath.basename(path)
            for path in inner
            if path not in finished and gfile.exists(posixpath.join(path, "state", "subject.json"))
        ),
        date=_date(path),
    )


def _is_own_folder(path: str) -> bool:
    """Whether it is a folder, and no link to one elsewhere."""
    local = foreign_files.local_path(path)
    return gfile.isdir(path) and not (local is not None and os.path.islink(local))


def _card(folder: str) -> dict[str, Any]:
    export = posixpath.join(folder, "saved_model")
    return (storage.read_object(posixpath.join(export, "model_card.json")) or {}) if _is_own_folder(export) else {}


def _evaluation(folder: str, load_images: LoadImages | None) -> Evaluation:
    (results,) = report.read_results([folder])
    examples = _examples(folder, results)
    clean, no_clean = _clean(results, examples, load_images)
    return Evaluation(
        folder=folder,
        results=results,
        examples=examples,
        security=_security(folder, results),
        class_names=_class_names(folder, results),
        clean=clean,
        no_clean=no_clean,
        config=storage.read_text(posixpath.join(folder, "config.gin")),
        date=_date(posixpath.join(folder, "results.json")),
    )


def _examples(folder: str, results: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The arrays that are known here, which agree with each other and with the results."""
    path = posixpath.join(folder, "examples.npz")
    if not gfile.exists(path):
        return None
    found = {name: array for name, array in array_files.read(path).items() if name in _ARRAYS}
    num = results["num_examples"]
    for name, (kinds, is_everywhere) in _ARRAYS.items():
        if name not in found:
            if is_everywhere:
                raise ValueError(f"Expected the examples of an evaluation in {path}. Received: nothing named {name}")
            continue
        array = found[name]
        is_image = name == "adversarial"
        if array.dtype.kind not in kinds or len(array) != num or (array.ndim != 1 and not is_image):
            received = f"{name}, {array.dtype} {array.shape}"
            raise ValueError(f"Expected arrays of {num} examples, as in results.json, in {path}. Received: {received}")
    right = found["clean_prediction"] == found["label"]
    for name, share in (("clean_accuracy", right.mean()), ("robust_accuracy", found["robust"].mean())):
        if not np.isclose(share, results[name], atol=1e-9):
            raise ValueError(
                f"Expected the {name} of results.json, {results[name]:.4f}, in {path}. Received: {share:.4f}"
            )
    return found


def _security(folder: str, results: dict[str, Any]) -> dict[str, Any] | None:
    """What security.json holds, which is of the model, the images and the threat model of the results."""
    known = {name: results.get(name) for name in ("norm", "epsilon", "seed")}
    known |= {name: (results.get(of) or {}).get("sha256") for name, of in (("model", "model"), ("images", "dataset"))}
    return security_file.read(folder, {name: value for name, value in known.items() if value is not None})


def _clean(
    results: dict[str, Any], examples: dict[str, np.ndarray] | None, load_images: LoadImages | None
) -> tuple[np.ndarray | None, str]:
    """The images that were attacked, where they are at hand and are those, and why they are not."""
    if examples is None or "adversarial" not in examples or "broken_by" not in examples:
        return None, "the folder has no examples.npz, or one of an older version"
    if load_images is None:
        return None, "this report was made without the data set"
    try:
        images, labels = load_images(results.get("dataset") or {})
    except ValueError as error:
        return None, f"the images that were evaluated are not at hand ({storage.why(error)})"
    adversarial, stand = examples["adversarial"], examples["broken_by"] < 1
    clean = as_floats(images)
    if (
        clean.shape != adversarial.shape
        or not np.array_equal(labels, examples["label"])
        or not np.allclose(clean[stand], adversarial[stand], atol=1e-5)
    ):
        return None, "the images at hand are others than those that were evaluated"
    return clean, ""


def _class_names(folder: str, results: dict[str, Any]) -> tuple[str, ...]:
    """Of the run's model card, where its model is the one that was evaluated; else of a data set that is known."""
    run = posixpath.dirname(folder.rstrip("/"))
    evaluated = posixpath.split(posixpath.dirname(results["model"]["path"].rstrip("/")))[1]
    if run and evaluated == posixpath.basename(os.path.abspath(run)):
        names = _card(run).get("class_names")
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return names_of_classes.BY_DATASET.get((results.get("dataset") or {}).get("name", ""), ())


def _date(path: str) -> str:
    return storage.modified(path).strftime("%Y-%m-%d %H:%M UTC")
