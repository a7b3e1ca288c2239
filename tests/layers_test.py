"""The layering of DESIGN.md, read from the source."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Imports go strictly down. The integer is the layer of DESIGN.md; the decimal orders the modules of a layer that build
# on one another, and is no higher than that needs (a test below sees to it). `scripts` is `robust_keras.scripts` when
# installed.
LEVELS = {
    "robust_keras": 0.0,
    "robust_keras.activations": 0.0,
    "robust_keras.comparison": 0.0,
    "robust_keras.costs": 0.0,
    "robust_keras.data": 0.0,
    "robust_keras.data.duplicates": 0.0,
    "robust_keras.data.mapped": 0.0,
    "robust_keras.data.pickles": 0.0,
    "robust_keras.distribution": 0.0,
    "robust_keras.losses": 0.0,
    "robust_keras.noise": 0.0,
    "robust_keras.schedules": 0.0,
    "robust_keras.snapshots": 0.0,
    "robust_keras.stablehlo": 0.0,
    "robust_keras.study": 0.0,
    "robust_keras.averaging": 0.1,  # distribution
    "robust_keras.data.published": 0.1,  # snapshots
    "robust_keras.data.augmentation": 0.1,  # noise
    "robust_keras.data.shards": 0.1,  # data.mapped
    "robust_keras.fitting": 0.1,  # distribution
    "robust_keras.liveness": 0.1,  # stablehlo
    "robust_keras.lowering": 0.1,  # stablehlo
    "robust_keras.normalization": 0.1,  # distribution
    "robust_keras.optimizers": 0.1,  # distribution
    "robust_keras.planning": 0.1,  # costs
    "robust_keras.recording": 0.1,  # distribution, snapshots
    "robust_keras.threats": 0.1,  # noise
    "robust_keras.data.tfds_sets": 0.2,  # data.published
    "robust_keras.data.archives": 0.3,  # data.mapped, data.tfds_sets
    "robust_keras.data.pictures": 0.3,  # data.mapped, data.tfds_sets
    "robust_keras.data.record_sets": 0.3,  # data.tfds_sets, snapshots
    "robust_keras.data.tfrecords": 0.4,  # data.pictures, data.published, data.tfds_sets
    "robust_keras.data.formats": 0.5,  # data.archives, data.shards, data.tfrecords
    "robust_keras.data.sources": 0.6,  # data.formats
    "robust_keras.data.mixing": 0.7,  # data.sources, noise
    "robust_keras.data.pseudo_labels": 0.7,  # data.duplicates, data.record_sets, data.sources
    "robust_keras.models": 1.0,
    "robust_keras.objectives": 1.0,
    "robust_keras.searches": 1.0,
    "robust_keras.attacks": 1.1,  # searches
    "robust_keras.loading": 1.1,  # models
    "robust_keras.autoattack": 2.0,
    "robust_keras.autoattack.apgd": 2.0,
    "robust_keras.autoattack.fab": 2.0,
    "robust_keras.autoattack.square": 2.0,
    "robust_keras.autoattack.ensemble": 2.1,  # its siblings
    "robust_keras.diagnosis": 3.0,
    "robust_keras.export": 3.0,
    "robust_keras.packing": 3.0,
    "robust_keras.reporting": 3.0,
    "robust_keras.training": 3.0,
    "robust_keras.verdicts": 3.0,
    "robust_keras.evaluation": 3.1,  # diagnosis, packing, verdicts
    "robust_keras.configurables": 4.0,
    "robust_keras.scripts": 5.0,
    "robust_keras.scripts.launcher": 5.0,
    "robust_keras.scripts.benchmark_attacks": 5.1,  # launcher, as all of them
    "robust_keras.scripts.benchmark_scoring": 5.1,
    "robust_keras.scripts.benchmark_workers": 5.1,
    "robust_keras.scripts.check_tpu": 5.1,
    "robust_keras.scripts.evaluate": 5.1,
    "robust_keras.scripts.export": 5.1,
    "robust_keras.scripts.report": 5.1,
    "robust_keras.scripts.train": 5.1,
    "robust_keras.scripts.pseudo_label": 5.2,  # train
    "robust_keras.scripts.reproduce": 5.2,  # evaluate, train
    "robust_keras.scripts.self_test": 5.2,  # evaluate, train
}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("robust_keras", *parts) if parts[0] == "scripts" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    module_name(path): path.read_text()
    for folder in ("robust_keras", "scripts")
    for path in (ROOT / folder).rglob("*.py")
}
LIBRARY = {name: source for name, source in SOURCES.items() if not name.startswith("robust_keras.scripts")}


@functools.cache
def nodes(source):
    return list(ast.walk(ast.parse(source)))


def is_import_call(function):
    return getattr(function, "attr", getattr(function, "id", None)) in ("import_module", "__import__")


def imports(module, source, modules=LEVELS):
    """What a module imports, at its top or later, as full names: of our modules the module, else what was written."""

    def ours(name):
        while name not in modules and "." in name:
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
    """Imports that do not go down."""
    return sorted(name for name in our_imports(module, source) if LEVELS[name] >= LEVELS[module])


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


def test_every_module_has_a_level():
    assert set(SOURCES) == set(LEVELS)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module):
    assert violations(module, SOURCES[module]) == []


@pytest.mark.parametrize("module", SOURCES)
def test_levels_within_a_layer_are_as_low_as_they_can_be(module):
    same_layer = [LEVELS[m] for m in our_imports(module, SOURCES[module]) if int(LEVELS[m]) == int(LEVELS[module])]
    # A package's own `__init__` is imported by whatever imports from it.
    expected = round(max(same_layer, default=int(LEVELS[module]) - 0.1) + 0.1, 1)
    assert LEVELS[module] == expected


def test_training_knows_no_attack_objective_model_or_evaluation():
    reached, pending = set(), ["robust_keras.training"]
    while pending:
        module = pending.pop()
        reached.add(module)
        pending += our_imports(module, SOURCES[module]) - reached
    assert "robust_keras.normalization" in reached and "robust_keras.data.sources" in reached
    for name in ("attacks", "objectives", "models", "evaluation", "configurables"):
        assert f"robust_keras.{name}" not in reached


def test_gin_is_known_to_configurables_alone():
    assert [module for module in LIBRARY if uses(SOURCES[module], "gin")] == ["robust_keras.configurables"]


def test_flags_are_known_to_scripts_alone():
    assert [module for module in LIBRARY if uses(SOURCES[module], "absl", "flags")] == []
    assert [module for module in LIBRARY if uses(SOURCES[module], "absl", "app")] == []
    assert uses(SOURCES["robust_keras.scripts.train"], "absl", "flags")


def test_no_assert_statement():
    assert {module: lines for module, source in SOURCES.items() if (lines := assertions(source))} == {}


def test_no_module_is_longer_than_500_lines():
    assert {module: n for module, source in SOURCES.items() if (n := len(source.splitlines())) > 500} == {}


def test_no_module_is_called_utils_or_common():
    stems = {name.rpartition(".")[2] for name in SOURCES}
    assert not stems & {"utils", "util", "common", "helpers", "misc"}


def test_gin_folder_is_no_package():
    # It would shadow gin-config.
    assert list((ROOT / "gin").rglob("*.gin"))
    assert not list((ROOT / "gin").rglob("*.py"))


# The checks see what they are there for.
@pytest.mark.parametrize(
    "module, source, found",
    [
        ("losses", "from robust_keras import training", ["robust_keras.training"]),
        ("losses", "def f():\n    from robust_keras.attacks import pgd", ["robust_keras.attacks"]),
        ("losses", "import robust_keras.models as m", ["robust_keras.models"]),
        (
            "losses",
            "if True:\n    from robust_keras import noise, threats",
            ["robust_keras.noise", "robust_keras.threats"],
        ),
        ("losses", "from . import attacks", ["robust_keras.attacks"]),
        ("losses", "from .data.sources import load", ["robust_keras.data.sources"]),
        ("data.pickles", "from ..training import train", ["robust_keras.training"]),
        ("data.pickles", "from .sources import load", ["robust_keras.data.sources"]),
        ("losses", "import importlib\nimportlib.import_module('robust_keras.models')", ["robust_keras.models"]),
        ("training", "from robust_keras import evaluation", ["robust_keras.evaluation"]),
        ("training", "from robust_keras import configurables", ["robust_keras.configurables"]),
        ("configurables", "from robust_keras.scripts import launcher", ["robust_keras.scripts.launcher"]),
        ("models", "from robust_keras.models import wide_resnet", ["robust_keras.models"]),
        ("attacks", "from robust_keras import losses, noise\nfrom robust_keras.threats import parse_fraction", []),
        ("attacks", "import tensorflow as tf\nimport trainings", []),
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
