"""What a text in gin's language says, read without touching gin's configuration."""

import tokenize
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from gin import config_parser


class Reference(str):
    """`@scope/name` or `@scope/name()`, as written, without the package."""


class Macro(str):
    """`%NAME`, as written."""


class Bound(NamedTuple):
    """A binding.

    Attributes:
        value: what it binds; macros have their values, and references are their text.
        macro: the macro that is bound, `NAME`, where the whole value is one.
        functions: references without parentheses in it.
        undefined: macros in it that have no value.
    """

    value: Any
    macro: str | None = None
    functions: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()


class _Delegate(config_parser.ParserDelegate):
    def configurable_reference(self, scoped_configurable_name, evaluate):
        return Reference(f"@{_short(scoped_configurable_name)}{'()' if evaluate else ''}")

    def macro(self, macro_name):
        return Macro(f"%{macro_name}")


def statements(text: str, name: str = "") -> Iterator[NamedTuple]:
    """The statements of a text: `config_parser.BindingStatement` and so on, macros and references as `Macro` and
    `Reference`.

    Args:
        text: in gin's language.
        name: of the file, for messages.

    Raises:
        ValueError: naming the file and the line, for what is not in gin's language.
    """
    try:
        yield from config_parser.ConfigParser(text, _Delegate())
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        what = error.msg if isinstance(error, SyntaxError) else str(error.args[0])
        raise ValueError(
            f"Expected gin bindings{f' in {name}' if name else ''}. Received: {' '.join(what.split())}"
            + (f", line {line}" if line else "")
        ) from error


def bindings(text: str, name: str = "") -> dict[str, Bound]:
    """What a text binds, by name, such as 'training/pgd.num_steps' or that of a macro, without the package's name.

    Raises:
        ValueError: see `statements`; and for a macro that refers to itself.
    """
    bound = {}
    for statement in statements(text, name):
        if isinstance(statement, config_parser.BindingStatement):
            scope = f"{statement.scope}/" if statement.scope else ""
            argument = f".{statement.arg_name}" if statement.arg_name else ""
            bound[f"{scope}{_short(statement.selector)}{argument}"] = statement.value
    try:
        return {key: _bound(value, bound) for key, value in bound.items()}
    except RecursionError:
        where = f" in {name}" if name else ""
        raise ValueError(f"Expected macros that have values{where}. Received: one that leads to itself") from None


def _bound(value: Any, macros: Mapping[str, Any]) -> Bound:
    leaves = list(_leaves(value))
    return Bound(
        plain(value, macros),
        str(value[1:]) if isinstance(value, Macro) else None,
        tuple(str(leaf) for leaf in leaves if isinstance(leaf, Reference) and not leaf.endswith("()")),
        tuple(str(leaf[1:]) for leaf in leaves if isinstance(leaf, Macro) and leaf[1:] not in macros),
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple)):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def plain(value: Any, macros: Mapping[str, Any] | None = None) -> Any:
    """A value as JSON can hold it, with the values of macros."""
    if isinstance(value, Macro) and value[1:] in (macros or {}):
        return plain(macros[value[1:]], macros)
    if isinstance(value, (list, tuple)):
        return [plain(entry, macros) for entry in value]
    if isinstance(value, dict):
        return {str(plain(key, macros)): plain(entry, macros) for key, entry in value.items()}
    return value if value is None or isinstance(value, (str, bool, int, float)) else repr(value)


def split(name: str) -> tuple[str, str, str]:
    """The scope, the configurable and the argument of a binding's name; a macro has no argument."""
    scope, _, rest = name.rpartition("/")
    selector, _, argument = rest.rpartition(".")
    return (scope, selector, argument) if selector else (scope, argument, "")


def _short(selector: str) -> str:
    scope, slash, name = selector.rpartition("/")
    return scope + slash + name.removeprefix("robust_keras.")
