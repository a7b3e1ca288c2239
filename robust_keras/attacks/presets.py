"""Attacks by name, with all of their settings: what `robust_keras.evaluate` runs, and the recipes in `gin/eval/`.

preset = choose("aa+mt", threat=threat)
preset.attacks  # in the order in which they run
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from robust_keras import losses, schedules, threats
from robust_keras.attacks import step_rules
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import Attack
from robust_keras.attacks.autoattack import custom, plus, rand, standard
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd


class Preset(NamedTuple):
    """What an evaluation runs.

    Attributes:
        attacks: functions with bound settings, or `attack.Attack`s, in order.
        baseline: a weaker attack to compare with, which does not count; None for none.
    """

    attacks: tuple[Attack | Callable, ...]
    baseline: Callable | None = None


def pgd40(*, threat: threats.Threat) -> Callable:
    """PGD-40 on the margin, the paper's measure while training; see `gin/eval/pgd40_attack.gin`."""
    step_size = functools.partial(schedules.piecewise_constant, boundaries=(20, 30), values=(0.1, 0.01, 0.0001))
    return functools.partial(
        pgd, threat=threat, loss_fn=losses.margin, num_steps=40, step_rule=step_rules.by_norm(), step_size=step_size
    )


def pgd20(*, threat: threats.Threat) -> Callable:
    """PGD-20 on the cross-entropy, the weak attack of much of the literature; see `gin/eval/pgd20.gin`."""
    step_size = {"Linf": "2/255", "L2": "15/255", "L1": 1}
    return functools.partial(pgd, threat=threat, loss_fn=losses.cross_entropy, num_steps=20, step_size=step_size)


def aa_mt(*, threat: threats.Threat) -> tuple[Callable, ...]:
    """AA+MT, the paper's protocol (section 3.1); `gin/eval/aa_mt.gin` says which choices are this project's."""
    ascend = functools.partial(apgd, threat=threat, num_steps=100, num_restarts=5)
    return (
        functools.partial(ascend, loss_fn=losses.cross_entropy),
        functools.partial(ascend, loss_fn=losses.dlr),
        functools.partial(multi_targeted, threat=threat, num_steps=200, num_restarts=10, num_targets=9),
    )


# Lists of attacks, beside which the recipes run PGD-40; and single ones, with upstream's settings where it has them.
_LISTS: dict[str, Callable] = {"standard": standard, "plus": plus, "rand": rand, "aa+mt": aa_mt}
_SINGLE: dict[str, Callable] = {
    **{
        name: lambda name=name, *, threat: custom(threat=threat, attacks=[name])[0]
        for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
    },
    "multi-targeted": lambda *, threat: aa_mt(threat=threat)[2],
    "pgd40": pgd40,
    "pgd20": pgd20,
}


def choose(attacks: str | Attack | Callable | Sequence, *, threat: threats.Threat) -> Preset:
    """Attacks as people name them.

    Args:
        attacks: 'standard', 'plus' or 'rand' (the versions of AutoAttack), 'aa+mt', or any of, or a list of: 'apgd-ce',
            'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square', 'multi-targeted', 'pgd40', 'pgd20', and functions as
            `attack.as_attack` takes them, which are bound to the threat model where they take one and have none.
        threat: a `threats.Threat`.

    Returns:
        A `Preset`, with PGD-40 as baseline for the lists that have a name.

    Raises:
        ValueError: for an unknown name, or none at all.
    """
    if isinstance(attacks, str) and attacks in _LISTS:
        return Preset(_LISTS[attacks](threat=threat), pgd40(threat=threat))
    given = [attacks] if isinstance(attacks, (str, Attack)) or callable(attacks) else attacks
    if not isinstance(given, Sequence) or not given:
        raise ValueError(f"Expected attacks, as a name, a function or a list of them. Received: {attacks!r}")
    return Preset(tuple(_single(each, threat) for each in given))


def _single(given: Any, threat: threats.Threat) -> Any:
    if isinstance(given, str):
        if given not in _SINGLE:
            alone = ", alone, " + ", ".join(_LISTS)
            raise ValueError(f"Expected attacks out of {', '.join(_SINGLE)} or{alone}. Received: {given!r}")
        return _SINGLE[given](threat=threat)
    if isinstance(given, Attack) or not callable(given):
        return given
    function, settings = given, {}
    if isinstance(given, functools.partial) and not given.args:
        function, settings = given.func, given.keywords
    if inner := getattr(function, "inner", None):  # One of `on_models`.
        return functools.partial(inner, **{"threat": threat, **settings})
    takes = "threat" in inspect.signature(function).parameters
    return functools.partial(given, threat=threat) if takes and "threat" not in settings else given
