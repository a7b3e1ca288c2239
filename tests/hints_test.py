"""Public functions say the types of what they take and return; mypy, in scripts/test.sh, checks that they are true."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "robust_keras").rglob("*.py")}


def is_public(function):
    return not function.name.startswith("_") or function.name in ("__init__", "__call__")


def lacks_hints(function, is_method):
    """Whether a parameter, but the first of a method, or the result has no type."""
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    is_static = any(ast.unparse(each) == "staticmethod" for each in function.decorator_list)
    typed = [each.annotation for each in parameters[is_method and not is_static :]]
    return None in typed or (function.returns is None and function.name != "__init__")


def without_hints(source):
    """Names of the public functions and methods that lack hints; what a function defines inside is its own affair."""

    def found(body, prefix="", is_class=False):
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from found(node.body, f"{prefix}{node.name}.", is_class=True)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if is_public(node) and lacks_hints(node, is_class):
                    yield f"{prefix}{node.name}"
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                yield from found(node.body, prefix, is_class)

    return list(found(ast.parse(source).body))


@pytest.mark.parametrize("path", SOURCES)
def test_public_functions_have_type_hints(path):
    assert without_hints(SOURCES[path]) == []


@pytest.mark.parametrize(
    "source, found",
    [
        ("def f(x: int) -> int: ...", []),
        ("def f(x) -> int: ...", ["f"]),
        ("def f(x: int): ...", ["f"]),
        ("def f(*, x: int, **rest) -> int: ...", ["f"]),
        ("def _f(x): ...", []),
        ("if True:\n    def f(x): ...", ["f"]),
        ("class A:\n    def __init__(self, x: int): ...\n    def g(self, y) -> int: ...", ["A.g"]),
        ("class A:\n    def __init__(self, x): ...", ["A.__init__"]),
        ("class A:\n    @staticmethod\n    def g(y) -> int: ...", ["A.g"]),
        ("class _A:\n    def g(self, y): ...", []),
        ("def f() -> int:\n    def g(x): ...", []),
    ],
)
def test_missing_hints_are_seen(source, found):
    assert without_hints(source) == found
