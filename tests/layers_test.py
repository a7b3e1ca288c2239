"""The layering of DESIGN.md, read from the source."""

import ast
import collections
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# What each room of the package may import: rooms below it, never its own floor. The modules of the ground floor are rooms
# of their own.
GROUND = {
    "array_files",
    "bounds",
    "compilation",
    "failures",
    "foreign_files",
    "noise",
    "losses",
    "own_folders",
    "ownership",
    "pickled_names",
    "pickles",
    "run_metrics",
    "schedules",
    "shown_text",
    "storage",
    "threats",
    "zip_files",
}
MAY_IMPORT = {
    "array_files": {"foreign_files", "zip_files"},
    "bounds": set(),
    "compilation": set(),
    "failures": {"own_folders"},
    "foreign_files": {"shown_text"},
    "noise": set(),
    "losses": set(),
    "own_folders": {"foreign_files"},
    "ownership": {"foreign_files", "own_folders", "storage"},
    "pickled_names": set(),
    "pickles": {"foreign_files", "pickled_names"},
    "run_metrics": set(),
    "schedules": set(),
    "shown_text": set(),
    "storage": {"array_files", "foreign_files", "own_folders"},
    "threats": {"compilation", "noise"},
    "zip_files": {"foreign_files"},
    "engines": GROUND,
    "models": GROUND | {"engines"},
    "attacks": GROUND | {"models"},
    "data.readers": GROUND,
    "data": GROUND | {"data.readers"},
    "training": GROUND | {"engines", "models", "data", "attacks"},
    "saved_models": GROUND | {"models"},
    "evaluation": GROUND | {"engines", "models", "attacks", "saved_models"},
    "pseudo_labelling": GROUND | {"engines", "data", "data.readers"},
    "reports": GROUND | {"evaluation"},
    "study": GROUND | {"engines", "evaluation", "training", "models", "attacks", "saved_models"},
    "tpu_check": GROUND | {"training", "evaluation", "attacks", "data", "models", "engines"},  # What it checks.
    "commands": None,  # All of them.
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path.read_text() for path in (ROOT / "robust_keras").rglob("*.py")}
SCRIPTS = {module_name(path): path.read_text() for path in (ROOT / "scripts").rglob("*.py")}
ON_JAX = "robust_keras.engines.on_jax"
LIBRARY = {name: source for name, source in SOURCES.items() if not name.startswith("robust_keras.commands")}


def room(module):
    """The folder of a module, or the module itself on the ground floor; '' for the package."""
    inner = module.removeprefix("robust_keras").lstrip(".")
    return next((name for name in sorted(MAY_IMPORT, key=len, reverse=True) if f"{inner}.".startswith(f"{name}.")), "")


@functools.cache
def nodes(source):
    return list(ast.walk(ast.parse(source)))


def is_import_call(function):
    return getattr(function, "attr", getattr(function, "id", None)) in ("import_module", "__import__")


def imports(module, source):
    """What a module imports, at its top or later, as full names: of our modules the module, else what was written."""

    def ours(name):
        while name not in SOURCES and "." in name:
            name = name.rpartition(".")[0]
        return name

    found = set()
    for node in nodes(source):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and is_import_call(node.func):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        else:
            continue
        found |= {ours(name) if name.split(".")[0] == "robust_keras" else name for name in names}
    return found


def our_imports(module, source):
    return {name for name in imports(module, source) if name.split(".")[0] == "robust_keras"}


def violations(module, source):
    """Imports that the rules do not allow."""
    here = room(module)
    allowed = MAY_IMPORT.get(here)
    return sorted(
        name
        for name in our_imports(module, source)
        if name != module and allowed is not None and room(name) not in {here, *allowed} and name != "robust_keras"
    )


def circle(graph):
    """The names of a circle of a graph, `{name: names}`; empty where there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        done.add(name)
        return next((found for each in sorted(graph[name]) if (found := visit(each, [*path, name]))), [])

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def uses(source, package, attribute=None):
    """Whether a source imports a package, or one attribute or sub-module of it."""
    wanted = f"{package}.{attribute}" if attribute else package
    if any(f"{name}.".startswith(f"{wanted}.") for name in imports("", source)):
        return True
    return bool(attribute) and any(
        isinstance(node, ast.Attribute) and node.attr == attribute and ast.unparse(node) == wanted
        for node in nodes(source)
    )


def assertions(source):
    return [node.lineno for node in nodes(source) if isinstance(node, ast.Assert)]


def test_every_module_stands_in_a_room():
    assert {module for module in SOURCES if not room(module)} == {"robust_keras"}
    assert {room(module) for module in SOURCES} - {""} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    assert violations(module, SOURCES[module]) == []


def test_rooms_form_no_circle():
    assert circle({name: set(MAY_IMPORT) - {name} if may is None else may for name, may in MAY_IMPORT.items()}) == []


def test_modules_form_no_circle():
    # A package's own `__init__` is imported by whatever imports from it.
    graph = {module: our_imports(module, source) - {module, "robust_keras"} for module, source in SOURCES.items()}
    assert circle(graph) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_nothing_below_the_commands_imports_them():
    below = {module: our_imports(module, source) for module, source in LIBRARY.items() if module != "robust_keras"}
    assert not [module for module, imported in below.items() if "robust_keras.commands" in " ".join(imported)]


def test_gin_is_known_to_commands_alone():
    assert [module for module in LIBRARY if uses(SOURCES[module], "gin")] == []
    assert uses(SOURCES["robust_keras.commands.configuration"], "gin")


def test_flags_are_known_to_commands_alone():
    assert [module for module in LIBRARY if uses(SOURCES[module], "absl", "flags")] == []
    assert [module for module in LIBRARY if uses(SOURCES[module], "absl", "app")] == []
    assert uses(SOURCES["robust_keras.commands.train"], "absl", "flags")


def test_jax_is_known_to_its_engine_alone():
    assert [module for module in SOURCES if uses(SOURCES[module], "jax") and not module.startswith(ON_JAX)] == []
    # It may be missing: what needs it to be imported is imported once a strategy asks for it.
    needs_jax = {module for module in SOURCES if "jax" in imported_at_once(SOURCES[module])}
    assert needs_jax and f"{ON_JAX}.devices" not in needs_jax
    others = {module: imported_at_once(SOURCES[module]) & needs_jax for module in set(SOURCES) - needs_jax}
    assert {module: found for module, found in others.items() if found} == {}


def imported_at_once(source):
    """What is imported as soon as a source is: packages, and modules of ours."""
    at_once = [node for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = imports("", "\n".join(map(ast.unparse, at_once)))
    return names | {name.split(".")[0] for name in names}


def test_no_assert_statement():
    assert {module: lines for module, source in SOURCES.items() if (lines := assertions(source))} == {}


def test_no_module_is_longer_than_400_lines():
    sources = {**SOURCES, **SCRIPTS}
    assert {module: n for module, source in sources.items() if (n := len(source.splitlines())) > 400} == {}


def functions_that_are_too_long(source):
    """Names of functions of more than 60 lines, docstring and all."""
    return [node.name for node in nodes(source) if is_function(node) and node.end_lineno - node.lineno >= 60]


def functions_of_too_many_parameters(source):
    """Names of functions with more than 8 parameters, but for public ones that take their settings by keyword."""
    found = []
    for node in filter(is_function, nodes(source)):
        by_position = [each.arg for each in node.args.posonlyargs + node.args.args if each.arg not in ("self", "cls")]
        by_keyword = (not node.name.startswith("_") or node.name in ("__call__", "__init__")) and len(by_position) <= 3
        if len(by_position) + len(node.args.kwonlyargs) > 8 and not by_keyword:
            found.append(node.name)
    return found


def is_function(node):
    return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


@pytest.mark.parametrize("find", [functions_that_are_too_long, functions_of_too_many_parameters])
def test_functions_are_short(find):
    sources = {**SOURCES, **SCRIPTS}
    assert {name: found for name, source in sources.items() if (found := find(source))} == {}


def test_long_functions_are_seen():
    assert functions_that_are_too_long("def f():\n" + 59 * "    1\n") == []
    assert functions_that_are_too_long("def f():\n" + 60 * "    1\n") == ["f"]
    assert functions_of_too_many_parameters("def _f(a, b, c, d, *, e, f, g, h): ...") == []
    assert functions_of_too_many_parameters("def _f(a, b, c, d, *, e, f, g, h, i): ...") == ["_f"]
    assert functions_of_too_many_parameters("def f(a, b, c, *, d, e, f, g, h, i): ...") == []
    assert functions_of_too_many_parameters("def f(a, b, c, d, e, f, g, h, i): ...") == ["f"]


def test_no_module_is_called_utils_or_common():
    stems = {name.rpartition(".")[2] for name in SOURCES}
    assert not stems & {"utils", "util", "common", "helpers", "misc"}


def test_gin_folder_is_no_package():
    # It would shadow gin-config.
    assert list((ROOT / "gin").rglob("*.gin"))
    assert not list((ROOT / "gin").rglob("*.py"))


def private_interfaces(source):
    """What a source uses of other packages that they call private."""
    others = {name.split(".")[0] for name in imports("", source)} | {
        alias.asname for node in nodes(source) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names
    }
    names = {ast.unparse(node) for node in nodes(source) if isinstance(node, ast.Attribute)} | imports("", source)
    public = r"__(name|doc|file|version)__|_(fields|field_defaults|asdict|replace)"  # The latter of a NamedTuple.
    private = re.compile(rf"([\w.]*\.)?(src|(?!({public})(\.|$))_\w+)(\.[\w.]*)?")
    return sorted(name for name in names if name.split(".")[0] in others - {"robust_keras"} and private.fullmatch(name))


def test_no_private_interface_of_another_package_is_used():
    assert {module: found for module, source in SOURCES.items() if (found := private_interfaces(source))} == {}


@pytest.mark.parametrize(
    "source, found",
    [
        (
            "import tensorflow as tf\ntf.__internal__.tracking.x()",
            ["tf.__internal__", "tf.__internal__.tracking", "tf.__internal__.tracking.x"],
        ),
        ("import gin\ngin.config._CONFIG", ["gin.config._CONFIG"]),
        ("import pickle\nclass A(pickle._Unpickler): pass", ["pickle._Unpickler"]),
        ("from keras.src import backend", ["keras.src.backend"]),
        ("import tensorflow as tf\nself._x = tf.__version__", []),
    ],
)
def test_private_interfaces_are_seen(source, found):
    assert private_interfaces(source) == found


# The checks see what they are there for.
@pytest.mark.parametrize(
    "module, source, found",
    [
        ("losses", "from robust_keras.training import train", ["robust_keras.training.train"]),
        ("losses", "def f():\n    from robust_keras.attacks.pgd import pgd", ["robust_keras.attacks.pgd"]),
        ("losses", "import robust_keras.models.wide_resnet as m", ["robust_keras.models.wide_resnet"]),
        (
            "losses",
            "if True:\n    from robust_keras import noise, threats",
            ["robust_keras.noise", "robust_keras.threats"],
        ),
        ("noise", "from .data.sources import load", ["robust_keras.data.sources"]),
        ("data.readers.formats", "from ...training.train import train", ["robust_keras.training.train"]),
        ("data.readers.formats", "from ..sources import load", ["robust_keras.data.sources"]),
        ("losses", "import importlib\nimportlib.import_module('robust_keras.models')", ["robust_keras.models"]),
        ("training.train", "from robust_keras.evaluation import evaluate", ["robust_keras.evaluation.evaluate"]),
        ("training.train", "from robust_keras.commands import configuration", ["robust_keras.commands.configuration"]),
        ("models.passes", "from robust_keras.attacks import pgd", ["robust_keras.attacks.pgd"]),
        ("attacks.pgd", "from robust_keras import losses, noise\nfrom robust_keras.threats import parse_fraction", []),
        ("attacks.pgd", "import tensorflow as tf\nimport trainings", []),
        ("commands.train", "from robust_keras.training import train", []),
    ],
)
def test_violations_are_seen(module, source, found):
    assert violations(f"robust_keras.{module}", source) == found


@pytest.mark.parametrize(
    "source",
    ["import gin", "import gin.tf", "from gin import config", "def f():\n    import gin as g", "__import__('gin')"],
)
def test_gin_is_seen(source):
    assert uses(source, "gin")
    assert not uses("import ginger\ngin = 1", "gin")


@pytest.mark.parametrize(
    "source",
    [
        "from absl import flags",
        "import absl.flags",
        "from absl.flags import FLAGS",
        "import absl.logging\nabsl.flags.FLAGS",
    ],
)
def test_flags_are_seen(source):
    assert uses(source, "absl", "flags")
    assert not uses("import absl.logging\nfrom absl import logging\nflags = 1", "absl", "flags")


def test_assert_is_seen():
    assert assertions("x = 1\nassert x\n") == [2]
    assert assertions("x = 'assert x'  # assert\n") == []


def test_files_of_tests_have_names_of_their_own():
    names = collections.Counter(path.name for path in (ROOT / "tests").rglob("*_test.py"))
    assert [name for name, count in names.items() if count > 1] == []  # Pytest would take one for the other.
