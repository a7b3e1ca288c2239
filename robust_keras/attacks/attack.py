"""An attack of an evaluation as one record: its name, threat model and settings, and how it runs.

    as_attack(functools.partial(apgd.apgd, threat=linf, num_steps=50)).name  # 'apgd-ce'

Attacks are plain functions with bound settings. What has to know more about them than how they are called reads the
record; `as_attack` alone looks into functions.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import threats
from robust_keras.attacks import step_rules, stepwise


class Attack(NamedTuple):
    """An attack whose settings are bound.

    Attributes:
        name: as results spell it, such as 'apgd-ce'.
        threat: the threat model that it is bound to; None for a function that was given none.
        parameters: its settings, defaults too, as JSON can hold them; the threat model is not among them.
        run: `(logits_fn, x, labels, *, seeds) -> x_adv`.
        search: the `stepwise.Search` that `run` takes through all of its steps; None for any other function.
        loss_fn: `(logits, labels) -> [batch]`, a loss whose gradient it follows, of several the first; None where it
            follows none, or none that is known.
    """

    name: str
    threat: threats.Threat | None
    parameters: dict[str, Any]
    run: Callable
    search: stepwise.Search | None = None
    loss_fn: Callable | None = None


def as_attack(given: Attack | Callable) -> Attack:
    """The record of an attack.

    Args:
        given: an attack function with its settings bound by keyword (a `functools.partial`, as gin makes them), any
            other function `(logits_fn, x, labels, *, seeds) -> x_adv` that has a name, or a record. A setting named
            `threat` is taken for the threat model, one named `loss_fn` for the loss that is ascended. A function's own
            `search` or `check` is called with the settings.

    Returns:
        An `Attack`.

    Raises:
        ValueError: for what cannot be called or has no name, for settings that are bound by position or missing, and
            for those that the attack refuses.
    """
    if isinstance(given, Attack):
        return given
    function, settings = given, {}
    if isinstance(given, functools.partial):
        function, settings = given.func, given.keywords
        if given.args:
            raise ValueError(f"Expected an attack with settings bound by keyword. Received: {given.args!r}")
    name = getattr(function, "__name__", None) or getattr(function, "name", None)
    if not callable(function) or name is None:
        raise ValueError(f"Expected an attack, a function with a name. Received: {function!r}")
    if missing := _required(function) - settings.keys():
        raise ValueError(f"Expected settings of {name}. Received: none for {', '.join(sorted(missing))}")
    _check_call(function, name)
    settings = {**_defaults(function), **settings}
    if not callable(settings.get("loss_fn", callable)):
        raise ValueError(f"Expected a loss_fn of {name}, a function. Received: {settings['loss_fn']!r}")
    build, check = getattr(function, "search", None), getattr(function, "check", None)
    search = build(**settings) if build else None
    if check:
        check(**settings)
    parameters = {
        key: value(settings["threat"]) if isinstance(value, step_rules.ByNorm) else value
        for key, value in settings.items()
        if key != "threat"
    }
    return Attack(
        name=search.name if search else name,
        threat=settings.get("threat"),
        parameters={key: _described(value) for key, value in parameters.items()},
        run=given,
        search=search,
        loss_fn=search.loss_fn if search else settings.get("loss_fn"),
    )


def checked(x_adv: Any, x: tf.Tensor, name: str) -> tf.Tensor:
    """What an attack made of the images `x`, once it is seen to be images like them, as far as a program knows shapes.

    Args:
        x_adv: whatever it returned.
        x: float32 `[batch, ...]`.
        name: of the attack, for the message.

    Raises:
        ValueError: for no tensor, or one of another type or shape.
    """
    if x_adv is None or not hasattr(x_adv, "shape") or not hasattr(x_adv, "dtype"):
        received = "None" if x_adv is None else f"a {type(x_adv).__name__}"
    elif tf.as_dtype(x_adv.dtype) != x.dtype or not x.shape.is_compatible_with(x_adv.shape):
        received = f"{tf.as_dtype(x_adv.dtype).name} {tuple(x_adv.shape)}"
    else:
        return x_adv
    raise ValueError(f"Expected {x.dtype.name} images {tuple(x.shape)} from the attack {name}. Received: {received}")


def _defaults(function):
    return {name: each.default for name, each in _parameters(function) if each.default is not inspect.Parameter.empty}


def _required(function):
    """Names of the settings without which the function cannot be called; `seeds` are given with the images."""
    of_settings = (each for each in _parameters(function) if each[1].kind is inspect.Parameter.KEYWORD_ONLY)
    return {name for name, each in of_settings if each.default is inspect.Parameter.empty} - {"seeds"}


def _check_call(function, name):
    """Raises ValueError where a function does not take seeds, as far as its signature is known."""
    kinds = {key: each.kind for key, each in _parameters(function)}
    if kinds and "seeds" not in kinds and inspect.Parameter.VAR_KEYWORD not in kinds.values():
        raise ValueError(
            f"Expected an attack (logits_fn, x, labels, *, seeds). Received: {name}({', '.join(kinds)}), without seeds"
        )


def _parameters(function):
    try:
        return inspect.signature(function).parameters.items()
    except ValueError:  # Some built-in functions have none.
        return ()


def _described(value):
    """A setting as JSON can hold it, alike in every process."""
    if isinstance(value, np.generic):
        return _described(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON knows no such numbers.
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if type(value) in (list, tuple):
        return [_described(each) for each in value]
    if type(value) is dict:
        return {str(key): _described(each) for key, each in value.items()}
    if isinstance(value, functools.partial):
        settings = ", ".join(f"{key}={_described(bound)}" for key, bound in value.keywords.items() if key != "threat")
        return _described(value.func) + (f"({settings})" if settings else "")
    return getattr(value, "name", None) or getattr(value, "__name__", None) or type(value).__name__
