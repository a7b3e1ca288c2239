"""What a text in gin's language says, read without touching gin's configuration."""

import functools
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gin import config_parser
from robust_keras.foreign_files import printable

MOST_VALUES = 1_000_000  # That macros of macros come to.


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


def statements(text: str, name: str = "") -> tuple[NamedTuple, ...]:
    """The statements of a text: `config_parser.BindingStatement` and so on, macros and references as `Macro` and
    `Reference`.

    Args:
        text: in gin's language.
        name: of the file, for messages.

    Raises:
        ValueError: naming the file and the line, for what is not in gin's language.
    """
    try:
        return _statements(text)
    except (SyntaxError, ValueError, TypeError, tokenize.TokenError, RecursionError, MemoryError) as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        what = error.msg if isinstance(error, SyntaxError) else str(error) or "something too deep"
        where = f" in {printable(name)}" if name else ""
        raise ValueError(
            f"Expected gin bindings{where}. Received: {printable(' '.join(what.split()))}"
            + (f", line {line}" if line else "")
        ) from error


@functools.lru_cache(maxsize=128)  # Recipes share their files, and each text is read for several questions.
def _statements(text: str) -> tuple[NamedTuple, ...]:
    return tuple(config_parser.ConfigParser(text, _Delegate()))


def bindings(text: str, name: str = "") -> dict[str, Bound]:
    """What a text binds, by name, such as 'training/pgd.num_steps' or that of a macro, without the package's name.

    Raises:
        ValueError: see `statements`; and for a macro that refers to itself.
    """
    bound = {}
    for statement in statements(text, name):
        if isinstance(statement, config_parser.BindingStatement):
            bound[_name(statement)] = statement.value
    where = f" in {printable(name)}" if name else ""
    try:
        counts: dict[str, int] = {}
        if sum(_num_values(value, bound, counts) for value in bound.values()) > MOST_VALUES:
            raise ValueError(f"Expected at most {MOST_VALUES:,} values{where}. Received: macros that come to more")
        return {key: _bound(value, bound) for key, value in bound.items()}
    except RecursionError:
        raise ValueError(f"Expected macros that have values{where}. Received: one that leads to itself") from None


def left_over(texts: Sequence[str]) -> set[str]:
    """Names of the bindings that may be unused since a later text replaced what referred to them.

    Where a recipe binds `evaluate.baseline = @pgd40/pgd()` and the settings of `pgd40/pgd`, and a later text binds
    `evaluate.baseline = None`, these settings are left over; one that is bound together with it, or after it, is not.

    Args:
        texts: in the order in which they are read.

    Raises:
        ValueError: see `statements`.
    """
    bound: dict[str, tuple[int, Any]] = {}
    pending: list[tuple[str, int]] = []  # What was referred to, until which text.
    for index, text in enumerate(texts):
        for statement in statements(text):
            if isinstance(statement, config_parser.BindingStatement):
                name = _name(statement)
                pending += [(leaf, index) for leaf in _leaves(bound.get(name, (index, None))[1])]
                bound[name] = index, statement.value
    found: set[str] = set()
    while pending:
        leaf, until = pending.pop()
        for name, (index, value) in bound.items():
            if index < until and name not in found and _refers(leaf, name):
                found.add(name)
                pending += [(inner, until) for inner in _leaves(value)]
    return found


def _refers(leaf: Any, name: str) -> bool:
    """Whether a value that refers to something takes the binding `name` into account."""
    if isinstance(leaf, Macro):
        return name == leaf[1:]
    if not isinstance(leaf, Reference):
        return False
    scope, selector, argument = split(name)
    used_scope, _, used_selector = leaf[1:].removesuffix("()").rpartition("/")
    return bool(argument) and selector == used_selector and f"{used_scope}/".startswith(f"{scope}/" if scope else "")


def _name(statement: config_parser.BindingStatement) -> str:
    scope = f"{statement.scope}/" if statement.scope else ""
    return f"{scope}{_short(statement.selector)}{f'.{statement.arg_name}' if statement.arg_name else ''}"


def _num_values(value: Any, macros: Mapping[str, Any], counts: dict[str, int]) -> int:
    """How many values it comes to with those of macros, whose numbers are kept in `counts`."""
    if isinstance(value, Macro) and (name := value[1:]) in macros:
        if name not in counts:
            counts[name] = _num_values(macros[name], macros, counts)
        return counts[name]
    if isinstance(value, (dict, list, tuple)):
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return 1 + sum(_num_values(part, macros, counts) for part in parts)
    return 1


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


def plain(value: Any, macros: Mapping[str, Any] = types.MappingProxyType({})) -> Any:
    """A value as JSON can hold it, with the values of macros."""
    if isinstance(value, Macro) and value[1:] in macros:
        return plain(macros[value[1:]], macros)
    if isinstance(value, (list, tuple)):
        return [plain(entry, macros) for entry in value]
    if isinstance(value, dict):
        return {str(plain(key, macros)): plain(entry, macros) for key, entry in value.items()}
    return value if value is None or isinstance(value, (str, bool, int, float)) else repr(value)


def split(name: str) -> tuple[str, str, str]:
    """The scope, the configurable and the argument of a binding's name; a macro has no argument."""
    scope, _, parameter = name.rpartition("/")
    selector, _, argument = parameter.rpartition(".")
    return (scope, selector, argument) if selector else (scope, argument, "")


def _short(selector: str) -> str:
    scope, slash, name = selector.rpartition("/")
    return scope + slash + name.removeprefix("robust_keras.")
