"""AutoAttack's lists of attacks, with the parameters of the reference implementation.

    evaluate(logits_fn, source, attacks=standard(threat=linf), threat=linf)

Each function returns attacks with bound arguments, in the order in which they run.
"""

import functools
from collections.abc import Callable, Sequence

from robust_keras import losses, threats
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.fab import fab
from robust_keras.attacks.square import square


def standard(*, threat: threats.Threat) -> tuple[Callable, ...]:
    """The standard version: 'apgd-ce', 'apgd-t', 'fab-t' and 'square', the measure that RobustBench reports.

    With L1, APGD-CE restarts five times, APGD-T aims at five classes, and both shrink their radius.
    """
    if threat.norm == "L1":
        ce = functools.partial(apgd, threat=threat, num_restarts=5, shrinking_radius=True)
        targeted = functools.partial(apgd_targeted, threat=threat, num_targets=5, shrinking_radius=True)
    else:
        ce = functools.partial(apgd, threat=threat)
        targeted = functools.partial(apgd_targeted, threat=threat)
    return ce, targeted, _fab_targeted(threat), functools.partial(square, threat=threat)


def plus(*, threat: threats.Threat) -> tuple[Callable, ...]:
    """The version 'plus': more restarts, and all six attacks."""
    return (
        functools.partial(apgd, threat=threat, num_restarts=5),
        functools.partial(apgd, threat=threat, loss_fn=losses.dlr, num_restarts=5),
        functools.partial(fab, threat=threat, num_restarts=5),
        functools.partial(square, threat=threat),
        functools.partial(apgd_targeted, threat=threat),
        _fab_targeted(threat),
    )


def rand(*, threat: threats.Threat) -> tuple[Callable, ...]:
    """The version 'rand', for randomised models: 'apgd-ce' and 'apgd-dlr', each gradient a mean of twenty."""
    return (
        functools.partial(apgd, threat=threat, eot_steps=20),
        functools.partial(apgd, threat=threat, loss_fn=losses.dlr, eot_steps=20),
    )


def custom(*, threat: threats.Threat, attacks: Sequence[str] | None) -> tuple[Callable, ...]:
    """The version 'custom': attacks by name, in the given order, with the reference implementation's defaults.

    Args:
        threat: a `threats.Threat`.
        attacks: names out of 'apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square'.

    Raises:
        ValueError: for an unknown name, or none at all.
    """
    apgd_ce, apgd_dlr, fab_untargeted, square_, apgd_t, fab_t = plus(threat=threat)
    known = {
        "apgd-ce": apgd_ce,
        "apgd-dlr": apgd_dlr,
        "apgd-t": apgd_t,
        "fab": fab_untargeted,
        "fab-t": fab_t,
        "square": square_,
    }
    if isinstance(attacks, str) or not attacks or not set(attacks) <= known.keys():
        raise ValueError(f"Expected a list of attacks out of {', '.join(known)}. Received: {attacks!r}")
    return tuple(known[name] for name in attacks)


def autoattack(
    *, threat: threats.Threat, version: str = "standard", attacks: Sequence[str] | None = None
) -> tuple[Callable, ...]:
    """One of the versions above by name.

    Args:
        threat: a `threats.Threat`.
        version: 'standard', 'plus', 'rand' or 'custom'.
        attacks: names of attacks, with 'custom' alone.

    Raises:
        ValueError: for an unknown version or attack, or for attacks with another version than 'custom'.
    """
    versions = {"standard": standard, "plus": plus, "rand": rand}
    if version == "custom":
        return custom(threat=threat, attacks=attacks)
    if version not in versions:
        raise ValueError(f"Expected a version out of {', '.join(versions)}, custom. Received: {version!r}")
    if attacks is not None:
        raise ValueError(f"Expected attacks with the version 'custom' alone. Received: {attacks!r} with {version!r}")
    return versions[version](threat=threat)


def _fab_targeted(threat):
    return functools.partial(fab, threat=threat, targeted=True, num_restarts=1)
