"""An evaluation's security.json: robust accuracy against the radius, and the sanity checks of Carlini et al. (2019)."""

import math
import os
from typing import Any, NamedTuple

from robust_keras import storage

FORMAT = 1
# Of the checks, by name: what they look for. https://arxiv.org/abs/1902.06705
CHECKS = {
    "unbounded_attack_wins": "An attack without a limit breaks every image",
    "more_steps_no_worse": "More steps break no fewer images",
    "larger_radius_no_better": "A larger radius leaves no more images right",
    "black_box_weaker": "Attacks without gradients are no stronger than those with them",
    "random_noise_weaker": "Random noise is weaker than the attack",
}


class Point(NamedTuple):
    """A point of a curve.

    Attributes:
        epsilon: the radius.
        epsilon_fraction: the same as typed.
        robust_accuracy: in [0, 1].
    """

    epsilon: float
    epsilon_fraction: str
    robust_accuracy: float


class Check(NamedTuple):
    """A sanity check.

    Attributes:
        name: see `CHECKS`.
        passed: None where it was not measured.
        told: a sentence with the numbers, or the reason.
    """

    name: str
    passed: bool | None
    told: str


class Security(NamedTuple):
    """What the file holds.

    Attributes:
        norm: of the radii.
        num_examples: on how many images.
        attack: what attacked them.
        curve: points in the order of their radii.
        random_noise: the same of noise in place of an attack.
        checks: in order.
        told: a sentence.
    """

    norm: str
    num_examples: int
    attack: str
    curve: tuple[Point, ...]
    random_noise: tuple[Point, ...]
    checks: tuple[Check, ...]
    told: str


def read(path: str | os.PathLike) -> Security | None:
    """What the file holds; None where there is none.

    Raises:
        ValueError: for a file of another form.
    """
    found = storage.read_object(path)
    if found is None:
        return None
    try:
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']!r}"[:80])
        return Security(
            norm=_text(found["norm"]),
            num_examples=int(found["num_examples"]),
            attack=_text(found["attack"]),
            curve=_points(found["curve"]),
            random_noise=_points(found["random_noise"]),
            checks=tuple(_check(each) for each in found["checks"]),
            told=_text(found["told"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        received = storage.why(error)
        raise ValueError(
            f"Expected a security curve of format {FORMAT} in {os.fspath(path)}. Received: {received}"
        ) from error


def _points(found: Any) -> tuple[Point, ...]:
    points = [Point(_number(p["epsilon"]), _text(p["epsilon_fraction"]), _number(p["robust_accuracy"])) for p in found]
    if not all(point.epsilon >= 0 and 0 <= point.robust_accuracy <= 1 for point in points):
        raise ValueError("a radius or an accuracy out of range")
    return tuple(sorted(points))


def _check(found: Any) -> Check:
    if found["passed"] is not None and not isinstance(found["passed"], bool):
        raise ValueError("a check that neither passed nor failed")
    return Check(_text(found["name"]), found["passed"], _text(found["told"]))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError("something else than numbers")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("something else than text")
    return value
