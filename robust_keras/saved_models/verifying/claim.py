"""What is claimed of a model, and whether that agrees with itself, with its examples and with the cards."""

import hashlib
import json
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from robust_keras.saved_models.verifying.attacks import Ball
from robust_keras.saved_models.verifying.files import CLAIMS, EXAMPLES, fingerprint, read_arrays, read_json

MOST_OF_A_KIND = 128  # Of the bundled images: broken ones, and robust ones.


class Claim(NamedTuple):
    """A claim and what it rests on.

    Attributes:
        told: `claims.json`: what results.json said, and `model_sha256`.
        verdicts: int32 `[num_examples]` of the evaluation: 0 wrong before any attack, k broken by the k-th, -1 robust.
        positions: int32 `[n]`, which of them are bundled, see `sample`.
        labels: int32 `[n]`.
        clean: `[n, ...]`, uint8, or float32 in [0, 1].
        adversarial: float32 `[num_broken, ...]`, of the broken ones, which come first.
        logits: float32 `[n, classes]`, of the clean ones.
    """

    told: dict[str, Any]
    verdicts: np.ndarray
    positions: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    adversarial: np.ndarray
    logits: np.ndarray

    @property
    def images(self) -> np.ndarray:
        """The clean ones as float32 in [0, 1]."""
        return as_floats(self.clean)

    @property
    def ball(self) -> "Ball":
        """The threat model."""
        return Ball(self.told["norm"], self.told["epsilon"])


def as_floats(images: np.ndarray) -> np.ndarray:
    """Bytes as float32 in [0, 1]."""
    return images / np.float32(255) if images.dtype == np.uint8 else images.astype(np.float32)


def sample(verdicts: np.ndarray, model_sha256: str, dataset: Any) -> np.ndarray:
    """Which examples are bundled: the first broken and the first robust ones in an order that nobody chooses."""
    drawn = hashlib.sha256(f"{model_sha256} {json.dumps(dataset, sort_keys=True)}".encode()).digest()
    order = np.random.RandomState(np.frombuffer(drawn, "<u4")).permutation(len(verdicts))
    broken, robust = order[verdicts[order] > 0], order[verdicts[order] == -1]
    return np.concatenate([broken[:MOST_OF_A_KIND], robust[:MOST_OF_A_KIND]]).astype(np.int32)


def read_claim(folder: pathlib.Path) -> Claim | None:
    """What is claimed; None where nothing is.

    Raises:
        ValueError: for files of another form.
    """
    if not (folder / CLAIMS).exists():
        return None
    told = read_json(folder / CLAIMS)
    arrays = read_arrays(folder / EXAMPLES, set(Claim._fields) - {"told"})
    claim = Claim(told, **arrays)
    num, broken = (
        len(claim.positions),
        int((claim.verdicts[claim.positions.clip(0, len(claim.verdicts) - 1)] > 0).sum()),
    )
    shapes = {"positions": (num,), "labels": (num,), "clean": (num, *claim.clean.shape[1:])}
    shapes |= {"adversarial": (broken, *claim.clean.shape[1:]), "logits": (num, *claim.logits.shape[1:])}
    kinds = dict.fromkeys(("verdicts", "positions", "labels"), "i") | {"adversarial": "f", "logits": "f"}
    if (
        any(getattr(claim, name).shape != shape for name, shape in shapes.items())
        or any(getattr(claim, name).dtype.kind != kind for name, kind in kinds.items())
        or not (claim.clean.dtype == np.uint8 or claim.clean.dtype == np.float32)
        or claim.verdicts.ndim != 1
        or claim.logits.ndim != 2
        or not num
    ):
        raise ValueError(f"{EXAMPLES} has arrays of another form")
    return claim


def check_claim(claim: Claim, folder: pathlib.Path) -> str:
    """Whether a claim agrees with itself, with its examples and with the model beside it."""
    told, verdicts = claim.told, claim.verdicts
    try:
        num, attacks, after = told["num_examples"], told["attacks"], told["robust_accuracy_after"]
        numerator, _, denominator = str(told["epsilon_fraction"]).partition("/")
        standing = [float(((verdicts == -1) | (verdicts > k)).mean()) for k in range(1, len(attacks) + 1)]
        low, high = wilson_interval(int((verdicts == -1).sum()), len(verdicts))
        agree = {
            "the number of examples": num == len(verdicts),
            "the clean accuracy": told["clean_accuracy"] == float((verdicts != 0).mean()),
            "the robust accuracy": told["robust_accuracy"] == float((verdicts == -1).mean()),
            "the accuracy after each attack": [each["robust_accuracy"] for each in after] == standing,
            "the names of the attacks": [each["attack"] for each in after] == [each["name"] for each in attacks],
            "what attacks broke": all(
                each["examples_broken"] >= (verdicts == k).sum() for k, each in enumerate(attacks, 1)
            ),
            "the verdicts": verdicts.min() >= -1 and verdicts.max() <= len(attacks),
            "the 95 % interval": np.allclose(told["confidence_interval_95"], (low, high), rtol=0, atol=1e-6),
            "the norm": told["norm"] in ("Linf", "L2", "L1"),
            "the radius": math.isclose(float(numerator) / float(denominator or 1), told["epsilon"], rel_tol=1e-6)
            and 0 < told["epsilon"] <= {"Linf": 1.0}.get(told["norm"], math.inf),
            "which examples are bundled": np.array_equal(
                claim.positions, sample(verdicts, told["model_sha256"], told["dataset"])
            ),
            "the classes": 0 <= claim.labels.min() and claim.labels.max() < claim.logits.shape[1],
            "the model": told["model_sha256"] == fingerprint(folder),
        }
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{CLAIMS} is of another form: {error}") from error
    if wrong := [name for name, is_right in agree.items() if not is_right]:
        raise ValueError(f"not as the rest of the claim says: {', '.join(wrong)}")
    warnings = f"; warnings: {', '.join(map(str, told['warnings']))}" if told.get("warnings") else ""
    names = ", ".join(str(each["name"]) for each in attacks)
    return (
        f"{told['norm']} {told['epsilon_fraction']}, {num} examples: {100 * told['clean_accuracy']:.2f} % clean, at "
        f"most {100 * told['robust_accuracy']:.2f} % robust after {names}{warnings}"
    )


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a proportion, as results.json has it."""
    z, p, n = 1.959963984540054, num_successes / num_trials, num_trials
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def upper_bound(num_successes: int, num_trials: int) -> float:
    """The one-sided 95 % Clopper-Pearson bound of a proportion: 1 - .05^(1 / n) for none of n."""
    low, high = num_successes / num_trials, 1.0
    for _ in range(60):
        p = 0.5 * (low + high)
        terms = (math.comb(num_trials, k) * p**k * (1 - p) ** (num_trials - k) for k in range(num_successes + 1))
        low, high = (p, high) if sum(terms) > 0.05 else (low, p)
    return high
