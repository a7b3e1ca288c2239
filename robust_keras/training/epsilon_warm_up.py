"""A radius that grows over the first steps of training, for networks that learn nothing under attacks of the full one.

Step k of N, from 0, attacks within min(1, (k + 1) / N) of the radius (Debenedetti et al. 2022,
https://arxiv.org/abs/2209.07399, let it grow by the epoch).
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from robust_keras import threats


def checked(num_steps: int, attack: Callable | None) -> int:
    """`num_steps`, where the radius of `attack` can grow.

    Args:
        num_steps: N; 0 for a radius that does not grow.
        attack: `(logits_fn, x, targets, *, seeds) -> x_adv`.

    Raises:
        ValueError: for a number that is none, and for an attack that is not known to take its radius from a bound
            `threat` alone, as `pgd` does: searches such as APGD plan ahead with it, and an attack inside has its own.
    """
    if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 0:
        raise ValueError(f"Expected epsilon_warmup_steps as an integer >= 0. Received: {num_steps!r}")
    if num_steps and not _has_radius_of_its_threat(attack):
        name = getattr(attack, "func", attack)
        raise ValueError(
            "Expected an attack that takes its radius from a bound threat alone, such as functools.partial(pgd, "
            f"threat=...), for epsilon_warmup_steps={num_steps}. Received: {getattr(name, '__name__', name)}"
        )
    return num_steps


def attack_of(step: tf.Tensor, num_steps: int, attack: Callable) -> Callable:
    """The attack of a step, in the part of its ball that is reached.

    Args:
        step: int scalar, from 0.
        num_steps: N, at least 1.
        attack: one that `checked` lets pass.
    """
    share = tf.minimum(tf.cast(step + 1, tf.float32) / num_steps, 1.0)
    given: Any = attack
    return functools.partial(given, threat=threats.part_of(given.keywords["threat"], share))


def _has_radius_of_its_threat(attack):
    if not isinstance(attack, functools.partial) or hasattr(attack.func, "search"):
        return False
    others = [value for name, value in attack.keywords.items() if name != "threat"]
    nested = [getattr(value, "keywords", {}).get("threat") for value in others]
    has_others = any(isinstance(value, threats.Threat) for value in [*others, *nested])
    return isinstance(attack.keywords.get("threat"), threats.Threat) and not has_others
