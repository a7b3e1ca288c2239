"""What an evaluated model of the study came to, and what of it is compared."""

import csv
import io
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from robust_keras import storage
from robust_keras.evaluation import comparison, contrast, report

# Attacks beside AA+MT by which a model can be evaluated too, and their gin files.
ATTACKS = {"pgd20": "eval/pgd20.gin", "pgd40": "eval/pgd40.gin"}
PLATEAU = 0.01  # So near to its best, a validation is on the plateau.


class Measured(NamedTuple):
    """One evaluated model.

    Attributes:
        seed: of its training run.
        clean: accuracy in percent, like the next two.
        pgd40: under PGD-40; None where the evaluation had no baseline.
        robust: under all attacks.
        is_at_chance: whether no more clean images are right than a guesser's, see `comparison.is_at_chance`: it has
            learned nothing, and what it withstands says nothing.
        stands: bool `[num_examples]`, which examples are right under all attacks.
        curve: rows of the run's metrics.csv with a validation: dictionaries of floats.
        right: the same as `stands` of the 'clean' images, and under each of `ATTACKS` that was run alone.
        validation: robust accuracy of its weights on the validation images, a fraction; None where not known.
        chosen_of: of how many trained models validation has chosen it to be evaluated; 1 where all are.
    """

    seed: int
    clean: float
    pgd40: float | None
    robust: float
    is_at_chance: bool
    stands: np.ndarray
    curve: list[dict[str, float]]
    right: Mapping[str, np.ndarray] = {}
    validation: float | None = None
    chosen_of: int = 1


class Measure(NamedTuple):
    """What a claim compares.

    Attributes:
        title: for people.
        unit: of differences.
        values: of a `Measured`: `[num_examples]`, or `[1]` of the model as a whole; hundredths of the unit are wholes.
        attack: a key of `ATTACKS` that it needs beside AA+MT; '' for none.
    """

    title: str
    unit: str
    values: Callable[[Measured], np.ndarray]
    attack: str = ""


def read(
    evaluation: str,
    *,
    seed: int,
    training: str,
    attacks: Mapping[str, str] | None = None,
    validation: float | None = None,
    chosen_of: int = 1,
) -> Measured:
    """What a finished evaluation and its training run have on disk.

    Args:
        evaluation: the folder with results.json and examples.npz.
        seed: of the training run.
        training: the run's folder, with metrics.csv.
        attacks: folders of evaluations by one of `ATTACKS` alone, by name.
        validation: see `Measured`, like `chosen_of`.

    Raises:
        ValueError: for an evaluation that is not finished.
    """
    (results,) = report.read_results([evaluation])
    metrics = storage.read_text(posixpath.join(training, "metrics.csv"))
    lines = [line for line in csv.DictReader(io.StringIO(metrics)) if line["val_robust"]]
    curve = [{name: float(value) for name, value in line.items() if value} for line in lines]
    pgd40 = results.get("baseline", {}).get("robust_accuracy")
    examples = report.examples(evaluation)
    right = {"clean": examples["clean_prediction"] == examples["label"]}
    right |= {name: report.examples(folder)["robust"] for name, folder in (attacks or {}).items()}
    return Measured(
        seed=seed,
        clean=100 * results["clean_accuracy"],
        pgd40=None if pgd40 is None else 100 * pgd40,
        robust=100 * results["robust_accuracy"],
        is_at_chance=comparison.is_at_chance(examples["clean_prediction"], examples["label"]),
        stands=examples["robust"],
        curve=curve,
        right=right,
        validation=validation,
        chosen_of=chosen_of,
    )


def _drop(attack: str) -> Callable[[Measured], np.ndarray]:
    return lambda model: model.stands.astype(float) - model.right[attack]


def _validated(model: Measured) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the training after which it was validated, and robust accuracies of the weights that it exports."""
    steps = np.array([line["step"] for line in model.curve])
    robust = np.array([line.get("val_robust_averaged", line["val_robust"]) for line in model.curve])
    return steps / steps[-1], robust


def _best_at(model: Measured) -> np.ndarray:
    shares, robust = _validated(model)
    return shares[[robust.argmax()]]


def _plateau(model: Measured) -> np.ndarray:
    """How long validations next to the best one stay near it."""
    shares, robust = _validated(model)
    best = int(robust.argmax())
    far = np.flatnonzero(robust < robust[best] - PLATEAU)
    before, after = np.r_[-1, far[far < best]], np.r_[far[far > best], len(robust)]
    return shares[[after.min() - 1]] - shares[before.max() + 1]


def _early(model: Measured) -> np.ndarray:
    shares, robust = _validated(model)
    return robust[[int(np.argmax(shares >= 0.5))]]


MEASURES = {
    "robust": Measure("robust accuracy (AA+MT)", "points", lambda model: model.stands),
    "clean": Measure("clean accuracy", "points", lambda model: model.right["clean"]),
    "drop20": Measure("accuracy under AA+MT less that under PGD-20", "points", _drop("pgd20"), "pgd20"),
    "drop40": Measure("accuracy under AA+MT less that under PGD-40", "points", _drop("pgd40"), "pgd40"),
    "best_at": Measure("share of the training after which validation is at its best", "% of the training", _best_at),
    "plateau": Measure(
        "share of the training in which validation stays within a point of its best", "% of the training", _plateau
    ),
    "early": Measure("robust accuracy on validation after half of the training", "points", _early),
}


def values(measure: str, models: Sequence[Measured]) -> np.ndarray:
    """A key of `MEASURES` of some models: `[num_models, num_examples]`, or `[num_models, 1]` of models as a whole."""
    return np.stack([np.asarray(MEASURES[measure].values(model), float) for model in models])


def group(models: Sequence[Measured], measure: str, sign: int) -> contrast.Group:
    """Models of one configuration, as `contrast.compare` takes them."""
    validation = [each.validation for each in models if each.validation is not None]
    known = validation if len(validation) == len(models) else None
    return contrast.Group(values(measure, models), sign, max(each.chosen_of for each in models), known)
