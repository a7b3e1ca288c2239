"""Functions as gin calls them, which refuse to be bound without what they need: not in the middle of the work."""

import functools
import inspect
from collections.abc import Callable, Collection

import gin


def partial(function: Callable, given: Collection[str] | None = None, *, positional: bool = False) -> Callable:
    """A function with the signature of `function` that returns it with the arguments bound that it is called with.

    Args:
        function: any.
        given: names of what its caller gives by keyword; None where what is missing may be bound later.
        positional: whether what may be given by position has to be bound too.

    Returns:
        A function of keywords, which raises ValueError where others are missing without which `function` cannot be
        called.
    """

    def bind(**kwargs):
        bound = functools.partial(function, **kwargs)
        if given is not None:
            check_complete(bound, given, positional=positional)
        return bound

    return _like(function, bind)


def complete(function: Callable) -> Callable:
    """`function`, which checks first that all is bound that it needs."""

    def call(**kwargs):
        check_complete(functools.partial(function, **kwargs), positional=True)
        return function(**kwargs)

    return _like(function, call)


def _like(function, made):
    made = functools.wraps(function)(made)
    made.__signature__ = inspect.signature(function)
    return made


def check_complete(
    bound: functools.partial, given: Collection[str] = (), *, positional: bool = False, name: str | None = None
) -> None:
    """Checks that settings without which a function cannot be called are bound.

    Args:
        bound: the function with what is bound.
        given: names of those that its caller gives.
        positional: whether those that may be given by position have to be bound too.
        name: of the function in recipes; its own by default.

    Raises:
        ValueError: naming those that are missing.
    """
    parameters = inspect.signature(bound.func).parameters.values()
    kinds = {inspect.Parameter.KEYWORD_ONLY, *([inspect.Parameter.POSITIONAL_OR_KEYWORD] if positional else [])}
    needed = {each.name for each in parameters if each.default is each.empty and each.kind in kinds}
    if missing := sorted(needed - bound.keywords.keys() - set(given)):
        scoped = f"{gin.current_scope_str()}/{name or bound.func.__name__}".lstrip("/")
        raise ValueError(f"Expected settings of {scoped}. Received: none for {', '.join(missing)}")
