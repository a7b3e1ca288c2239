"""Verdicts that were read from files: whether the images that were kept still do what the files say.

Somebody else can have written them. That an attack broke an image is checked by the model, in one pass; that it broke
none of the others is not to be seen without attacking them again.
"""

import posixpath
from collections.abc import Sequence
from typing import Any

import numpy as np

from robust_keras import foreign_files, threats
from robust_keras.engines import replicas
from robust_keras.evaluation import results as evaluation
from robust_keras.evaluation import verification
from robust_keras.evaluation.examples import as_floats
from robust_keras.evaluation.plan import Plan
from robust_keras.evaluation.saved_state import Verdicts

_BATCH = 128
_ARRAYS = ("index", "label", "clean_prediction", "robust", "broken_by", "adversarial")


def check_state(found: Verdicts, judge: verification.Judge) -> None:
    """Refuses the state of an evaluation whose images do not break what it says is broken.

    Raises:
        ValueError: naming the folder and the first image.
    """
    shown = np.zeros_like(found.broken)
    for position, indices, images in found.kept():
        holds = judge.holds(indices, images)
        if not holds.all():
            _refuse(found.directory, f"image {indices[~holds][0]}, which attack {position + 1} did not break", ~holds)
        shown[position, indices] = True
    if (lacking := found.broken & ~shown).any():
        position, index = np.argwhere(lacking)[0]
        _refuse(found.directory, f"image {index} as broken by attack {position + 1}, without what broke it", lacking)


def check_finished(
    workdir: str,
    results: dict[str, Any],
    arrays: dict[str, np.ndarray],
    given: tuple[np.ndarray, np.ndarray],
    logits_fn: Any,
    plan: Plan,
) -> int:
    """Refuses a finished evaluation that is none of this model.

    Args:
        workdir: its folder.
        results: of results.json.
        arrays: of examples.npz.
        given: images and labels, as `examples.first` returns them.
        logits_fn: the model.
        plan: what was to run.

    Returns:
        How many adversarial images were kept, all of which still break the model.

    Raises:
        ValueError: naming the folder and what does not hold.
    """
    images, labels = given
    attacks = [attack.name for attack in plan.attacks[plan.first :]]
    _check_forms(workdir, arrays, images, labels, len(attacks))
    broken_by, robust, kept = arrays["broken_by"], arrays["robust"], arrays["adversarial"]
    size = getattr(logits_fn, "batch_size", None) or min(_BATCH, len(labels))
    predict_fn, size = replicas.over_replicas(logits_fn), size * replicas.num_replicas()
    clean = verification.first_look(predict_fn, images, size)
    judge = verification.Judge(predict_fn, images, labels, plan.threat, size)
    broken = np.flatnonzero(broken_by > 0)
    holds = {
        "as right, or wrong, before any attack": np.where(
            broken_by == 0,
            verification.is_wrong_or_nearly(clean, labels),
            verification.is_right_or_nearly(clean, labels),
        ),
        "with another prediction": verification.is_right_or_nearly(clean, arrays["clean_prediction"]),
        "as robust, and as broken": robust == (broken_by < 0),
        "with another image where nothing broke it": np.isclose(kept, as_floats(images), atol=1e-6, rtol=0)
        .reshape(len(labels), -1)
        .all(axis=1)
        | (broken_by > 0),
        "as broken, which it is not by what was kept": np.ones(len(labels), bool),
    }
    if len(broken):
        holds["as broken, which it is not by what was kept"][broken] = judge.holds(broken, kept[broken])
    for how, right in holds.items():
        if not right.all():
            _refuse(workdir, f"image {np.flatnonzero(~right)[0]} {how}", ~right)
    _check_numbers(workdir, results, broken_by, plan.threat, attacks)
    return len(broken)


def _check_forms(
    workdir: str, arrays: dict[str, np.ndarray], images: np.ndarray, labels: np.ndarray, most: int
) -> None:
    path = posixpath.join(workdir, "examples.npz")
    if lacking := [name for name in _ARRAYS if name not in arrays]:
        raise ValueError(f"Expected the examples of an evaluation in {path}. Received: none named {lacking[0]}")
    for name in _ARRAYS:
        shape, kinds = (
            (images.shape, "f") if name == "adversarial" else (labels.shape, "b" if name == "robust" else "iu")
        )
        if arrays[name].shape != shape or arrays[name].dtype.kind not in kinds:
            received = f"{name}, {arrays[name].dtype} {arrays[name].shape}"
            raise ValueError(f"Expected the examples of this evaluation in {path}. Received: {received}")
    other = (arrays["label"] != labels) | (arrays["index"] != np.arange(len(labels)))
    other |= (arrays["broken_by"] < -1) | (arrays["broken_by"] > most)
    if other.any():
        _refuse(workdir, f"image {np.flatnonzero(other)[0]} of another label, place, or attack", other)


def _check_numbers(
    workdir: str, results: dict[str, Any], broken_by: np.ndarray, threat: threats.Threat, attacks: Sequence[str]
) -> None:
    """Compares what results.json says with what is to be counted."""
    right, robust = broken_by != 0, broken_by < 0
    after = [float((right & ~((broken_by > 0) & (broken_by <= k + 1))).mean()) for k in range(len(attacks))]
    counted = {
        "num_examples": len(broken_by),
        "clean_accuracy": float(right.mean()),
        "robust_accuracy": float(robust.mean()),
        "robust_accuracy_after": [
            {"attack": name, "robust_accuracy": accuracy} for name, accuracy in zip(attacks, after)
        ],
        "norm": threat.norm,
        "epsilon": threat.epsilon,
        "confidence_interval_95": evaluation.wilson_interval(int(robust.sum()), len(robust)),
    }
    for name, value in counted.items():
        if name in results and results[name] != value:
            said = foreign_files.printable(f"{name} = {results[name]}")
            raise ValueError(
                f"Expected {name} = {value}, as the kept images say, in {posixpath.join(workdir, 'results.json')}. "
                f"Received: {said}"
            )


def _refuse(folder: str | None, what: str, others: np.ndarray) -> None:
    more = f", and {others.sum() - 1} more" if others.sum() > 1 else ""
    raise ValueError(
        f"Expected verdicts of this model in {folder}; remove that folder to evaluate anew. Received: {what}{more}"
    )
