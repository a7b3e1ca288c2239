"""Sanity checks of attacks: what they must show where they find what is there to be found.

Carlini et al. 2019, "On Evaluating Adversarial Robustness" (https://arxiv.org/abs/1902.06705, section 3.2 and 5): an
attack without bounds always wins, more steps and larger radii are no worse, and who sees less of the model breaks less.
Where one of them fails, gradients are masked or the attack is broken, and a measured robust accuracy says little.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from robust_keras.evaluation.warnings import sign_test

_LEVEL = 0.05  # Of the sign tests of a check, together.
_GRADIENTS = "attacks with gradients"
NAMES = (
    "unbounded_attack_wins",
    "more_steps_no_worse",
    "larger_radius_no_better",
    "black_box_weaker",
    "random_noise_weaker",
)


class Broken(NamedTuple):
    """What each attack broke, each by itself: bool `[num_images]`, or a row of them for each radius.

    Attributes:
        correct: which images are right before any attack.
        radii: in rising order, as text with the norm.
        at: the place among them of the radius under evaluation.
        by_gradient: `[num_radii, num_images]`, by gradient steps that start at the images themselves.
        by_noise: the same, by random noise of this radius.
        by_steps: by PGD at the evaluated radius, by its number of steps.
        by_black_box: by Square at the evaluated radius; None where it is not made for such images.
    """

    correct: np.ndarray
    radii: Sequence[str]
    at: int
    by_gradient: np.ndarray
    by_noise: np.ndarray
    by_steps: dict[int, np.ndarray]
    by_black_box: np.ndarray | None

    def by_white_box(self, k: int) -> np.ndarray:
        """By all gradient steps within the k-th radius, smaller ones included."""
        pgd = list(self.by_steps.values()) if k >= self.at else []
        return np.any([*self.by_gradient[: k + 1], *pgd], axis=0)


class _Pair(NamedTuple):
    """Two attacks of which the first is to be no stronger."""

    names: tuple[str, str]
    broken: tuple[np.ndarray, np.ndarray]


def checks(broken: Broken) -> list[dict[str, Any]]:
    """The checks in the order of `NAMES`: `{"name", "passed", "told"}`, `passed` None for what cannot be said.

    Args:
        broken: a `Broken`.
    """
    if not broken.correct.any():
        reason = f"not measured: none of the {len(broken.correct)} images is right before any attack"
        return [{"name": name, "passed": None, "told": reason} for name in NAMES]
    here = broken.radii[broken.at]
    steps = sorted(broken.by_steps)
    by_steps = [
        _Pair((f"PGD of {few} steps at {here}", f"PGD of {many} steps"), (broken.by_steps[few], broken.by_steps[many]))
        for few, many in itertools.combinations(steps, 2)
    ]
    by_radius = [
        _Pair(
            (f"gradient steps within {small}", f"those within {large}"),
            (broken.by_gradient[k], broken.by_gradient[k + 1]),
        )
        for k, (small, large) in enumerate(itertools.pairwise(broken.radii))
    ]
    noise = [
        _Pair((f"random noise within {radius}", _GRADIENTS), (broken.by_noise[k], broken.by_white_box(k)))
        for k, radius in enumerate(broken.radii)
    ]
    if (black_box := broken.by_black_box) is not None:
        noise.append(_Pair((f"random noise within {here}", "Square"), (broken.by_noise[broken.at], black_box)))
        weaker = _compared([_Pair((f"Square within {here}", _GRADIENTS), (black_box, broken.by_white_box(broken.at)))])
    else:
        weaker = None, "not measured: Square attacks images of height, width and channels alone"
    found = _unbounded(broken), _compared(by_steps), _compared(by_radius), weaker, _compared(noise)
    return [{"name": name, "passed": passed, "told": told} for name, (passed, told) in zip(NAMES, found)]


def told(checked: Sequence[dict[str, Any]]) -> str:
    """All checks in a sentence or two."""
    failed, passed = ([each["name"] for each in checked if each["passed"] is verdict] for verdict in (False, True))
    unknown = len(checked) - len(failed) - len(passed)
    text = f"Of {len(checked)} sanity checks {len(passed)} passed and {len(failed)} failed"
    text += f" ({', '.join(failed)})" if failed else ""
    text += f"; {unknown} could not be made." if unknown else "."
    if failed:
        text += " The attacks miss what is there: the true robust accuracy may be far below the measured."
    return text


def _unbounded(broken):
    num, stand = int(broken.correct.sum()), broken.correct & ~broken.by_gradient.any(axis=0)
    if stand.any():
        return False, (
            f"{stand.sum()} of {num} images that are right stood against gradient steps at every radius up to "
            f"{broken.radii[-1]}; none may."
        )
    return True, f"Gradient steps broke all {num} images that are right, within {broken.radii[-1]}; none may stand."


def _compared(pairs):
    """Whether in no pair the first attack is the stronger one by more than chance, and the nearest to it, told."""
    if not any(rows.any() for pair in pairs for rows in pair.broken):
        return None, f"not measured: neither {' nor '.join(pairs[-1].names)} broke any image"
    alone = [((one & ~other).sum(), (other & ~one).sum()) for one, other in (pair.broken for pair in pairs)]
    chances = [sign_test(int(one), int(other)) for one, other in alone]
    k, level = int(np.argmin(chances)), _LEVEL / len(pairs)
    (first, second), (one, other) = pairs[k].names, pairs[k].broken
    passed = chances[k] >= level
    several = f", the closest of {len(pairs)} comparisons" if len(pairs) > 1 else ""
    return passed, (
        f"{first[0].upper()}{first[1:]} broke {one.sum()} images, {alone[k][0]} of them alone, and {second} "
        f"{other.sum()}, {alone[k][1]} alone{several}: p = {chances[k]:.2g} of a sign test, which fails under "
        f"{level:.2g}."
    )
