"""Functions of one's own that gin may bind: `robust_keras.register`, and modules that commands import first."""

import functools
import importlib
import inspect
import keyword
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import gin
from robust_keras.commands import bound_functions, configuration, recipe_files

Function = TypeVar("Function", bound=Callable)

# What the caller of a function gives it: no recipe can bind these.
_GIVEN = {"learning_rate", "logits_fn", "x", "x_adv", "labels", "targets", "logits", "seeds", "images", "step"}
_GIVEN |= {"num_classes", "mean", "std", "input_shape"}
_own: dict[str, Callable] = {}


def register(function: Function | None = None, *, name: str | None = None) -> Any:
    """Lets gin bind a function of one's own: an objective, inner loss, attack, model, augmentation, schedule or
    optimiser.

    In a recipe or `--gin_param`, `@NAME()` is then the function with the settings that `NAME.setting = value` bind, as
    for the package's own; they identify a run. It may be registered again, as a cell of a notebook that runs twice
    does, as long as its parameters stay the same.

        >>> @register
        ... def negative_logit(logits, targets, *, scale=1.0):
        ...     return -scale * logits[:, 0]

        # python scripts/train.py --import=my_module --gin_file=gin/at.gin \\
        #   --gin_param="training/pgd.loss_fn = @negative_logit()" --gin_param="negative_logit.scale = 2.0"

    Args:
        function: what commands call, see `docs/extending.md`. A model is a function that makes one.
        name: what recipes call it; the function's own name by default.

    Returns:
        `function`; without one, a decorator.

    Raises:
        ValueError: for what is no function, or a name that is none or is taken.
    """
    if function is None:
        return functools.partial(register, name=name)
    if not callable(function) or isinstance(function, type):
        raise ValueError(f"Expected a function, such as one that makes a model. Received: {function!r}")
    taken = str(name or getattr(function, "__name__", ""))
    if not taken.isidentifier() or keyword.iskeyword(taken):
        raise ValueError(f"Expected a function with a name, or name=... Received: {taken!r}")
    if taken in _own:
        if inspect.signature(_own[taken]) != inspect.signature(function):
            raise ValueError(f"Expected a new name or the same parameters. Received: {taken}, registered with others")
    elif _is_taken(taken):
        raise ValueError(f"Expected a name that is not taken, as by name=... Received: {taken}, which the package has")
    else:
        given = sorted(_GIVEN & inspect.signature(function).parameters.keys())
        with gin.unlock_config():  # After a recipe was read, as in a notebook.
            gin.external_configurable(_binding(function, taken), name=taken, module="robust_keras", denylist=given)
        configuration.MAY_CHANGE[taken] = frozenset()
    _own[taken] = function
    return function


def import_modules(names: Sequence[str]) -> None:
    """Imports modules that register functions, also from the current folder.

    Raises:
        ValueError: for one that cannot be imported, with the reason in the same line.
    """
    if names and os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
            recipe_files.let_import([name])
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            hint = f"; a module's name has no ending: {name[:-3]}" if name.endswith(".py") else ""
            raise ValueError(f"Expected a module that can be imported. Received: {name} ({reason}){hint}") from error


def _is_taken(name: str) -> bool:
    try:
        gin.get_configurable(name)
    except ValueError as error:  # There is none of the name, or there are several.
        return "mbiguous" in str(error)
    return True


def _binding(function: Callable, name: str) -> Callable:
    """What gin calls: it returns the function that the name has now, with the given settings bound."""

    @functools.wraps(function)
    def bind(**settings):
        bound = functools.partial(_own[name], **settings)
        bound_functions.check_complete(bound, _GIVEN | {"num_steps"}, name=name)
        return bound

    made: Any = bind
    made.__signature__ = inspect.signature(function)
    return bind
