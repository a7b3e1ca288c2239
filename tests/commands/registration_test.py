"""Functions of one's own in recipes: registered, bound, imported by commands, part of what a run is."""

import itertools
import os
import subprocess
import sys
import types

import pytest
from absl import flags
from command_line import arguments, call, refused, rows

import robust_keras as rk
from robust_keras.commands import (
    check_tpu,
    configuration,
    evaluate,
    export,
    export_program,
    pseudo_label,
    registration,
    reproduce,
    train,
)

MODULE = """
import robust_keras as rk
import tensorflow as tf

@rk.register
def logit_squeezing(logits_fn, x, x_adv, labels, targets, *, weight=0.5):
    logits = logits_fn(x_adv)
    return rk.losses.cross_entropy(logits, targets) + weight * tf.reduce_mean(tf.square(logits), axis=-1)
"""

NUMBERS = itertools.count()


@pytest.fixture
def name():
    """One that no other test registers."""
    return f"own_{next(NUMBERS)}"


def test_a_registered_function_is_bound_like_the_packages_own(name):
    @rk.register(name=name)
    def loss(logits, targets, *, weight=2.0, power=1):
        return weight * logits[:, 0] ** power

    configuration.parse(["gin/at.gin"], [f"training/pgd.loss_fn = @{name}()", f"{name}.weight = 3.0"])
    trained = configuration.resolve(configuration.train)
    bound = trained.recipe.attack.attack_fn.keywords["loss_fn"]
    assert bound.func is loss and bound.keywords == {"weight": 3.0}
    config = configuration.operative_config()
    assert f"training/{name}.weight = 3.0" in config and f"#   training/{name}.power" in config
    # Another value is another run, and so is another function.
    for given in ([f"training/pgd.loss_fn = @{name}()"], []):
        configuration.parse(["gin/at.gin"], given)
        configuration.resolve(configuration.train)
        assert configuration.differences(config, configuration.operative_config())
    with pytest.raises(ValueError, match="Expected a valid configuration"):
        configuration.parse(["gin/at.gin"], [f"training/pgd.loss_fn = @{name}()", f"{name}.targets = 3.0"])


def test_a_missing_setting_shows_before_any_work(name):
    @rk.register(name=name)
    def schedule(step, *, num_steps, peak):
        return peak

    configuration.parse(["gin/at.gin"], [f"train.learning_rate = @{name}()"])
    with pytest.raises(ValueError, match=f"settings of {name}. Received: none for peak"):
        configuration.resolve(configuration.train)


def test_a_cell_may_run_twice(name):
    def first(x, *, a=1):
        return 1

    def second(x, *, a=1):
        return 2

    def other(x, *, b=1):
        return 3

    assert rk.register(first, name=name) is first
    rk.register(second, name=name)
    configuration.parse(["gin/at.gin"], [f"train.objective = @{name}()"])
    assert configuration.resolve(configuration.train).recipe.objective(None) == 2
    with pytest.raises(ValueError, match=f"the same parameters. Received: {name}, registered with others"):
        rk.register(other, name=name)


@pytest.mark.parametrize("taken", ["pgd", "wide_resnet", "train", "adam", "evaluate", "macro"])
def test_names_of_the_package_are_taken(taken):
    with pytest.raises(ValueError, match=f"a name that is not taken.* Received: {taken}"):
        rk.register(lambda logits, targets: logits, name=taken)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda logits, targets: logits, "a function with a name, or name=... Received: '<lambda>'"),
        (5, "Expected a function, .*Received: 5"),
        (type("Net", (), {}), "such as one that makes a model. Received: <class"),
    ],
    ids=["lambda", "number", "class"],
)
def test_what_is_no_function_is_refused(function, message):
    with pytest.raises(ValueError, match=message):
        rk.register(function)


# Commands.


@pytest.mark.parametrize("command", [train, evaluate, check_tpu, pseudo_label, reproduce, export, export_program])
def test_commands_import_modules_first(command):
    values = flags.FlagValues()
    command.define_flags(values)
    assert values["import"].value == []


def test_a_run_with_a_loss_of_ones_own(monkeypatch, capsys, images, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    (tmp_path / "squeezing.py").write_text(MODULE)
    own = ["--import=squeezing", "--gin_param=train.objective = @logit_squeezing()"]
    few = {"TRAIN_STEPS": "2", "train.validate_every": "2"}
    call(monkeypatch, train, *arguments(images, tmp_path / "run", **few), *own)
    assert len(rows(tmp_path / "run")) == 2
    assert "logit_squeezing.weight = 0.5" in (tmp_path / "run" / "config.gin").read_text()
    capsys.readouterr()
    said = refused(
        monkeypatch,
        capsys,
        train,
        *arguments(images, tmp_path / "run", **few),
        *own,
        "--gin_param=logit_squeezing.weight = 1.0",
    )
    assert "logit_squeezing.weight = 0.5, not 1.0" in said


@pytest.mark.parametrize(
    "module, text, reason",
    [
        ("missing", None, r"missing \(ModuleNotFoundError: No module named 'missing'\)"),
        ("broken", "def (", r"broken \(SyntaxError: "),
        ("failing", "raise RuntimeError('one\\ntwo')", r"failing \(RuntimeError: one two\)"),
        (
            "clash",
            "import robust_keras as rk\nrk.register(lambda x: x, name='pgd')",
            "clash .*a name that is not taken",
        ),
        ("module.py", "", "a module's name has no ending: module"),
    ],
)
def test_a_module_that_cannot_be_imported_is_one_line(monkeypatch, capsys, tmp_path, images, module, text, reason):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    if text is not None:
        (tmp_path / f"{module.removesuffix('.py')}.py").write_text(text)
    said = refused(monkeypatch, capsys, train, *arguments(images, tmp_path / "run"), f"--import={module}")
    assert said.startswith("error: Expected a module that can be imported. Received: ")
    with pytest.raises(ValueError, match=reason):
        registration.import_modules([module])
    assert not (tmp_path / "run").exists()


def test_files_still_import_nothing(tmp_path):
    (tmp_path / "own.gin").write_text("import shutil\ninclude 'at.gin'\n")
    with pytest.raises(ValueError, match="Expected bindings and includes alone"):
        configuration.parse([tmp_path / "own.gin"])


# The package's face.


def test_names_load_on_first_use():
    program = """
import sys, robust_keras as rk
assert "tensorflow" not in sys.modules and "keras" not in sys.modules
assert set(rk.__all__) <= set(dir(rk)) and {"losses", "training"} <= set(dir(rk))
assert "tensorflow" not in sys.modules
from robust_keras import *
for name in rk.__all__:
    assert getattr(rk, name) is globals()[name]
assert rk.attacks.pgd.__name__ == "pgd" and rk.evaluate.__doc__ and rk.threat(norm="L2", epsilon=1).norm == "L2"
try:
    rk.nothing
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ)
    assert done.stdout == "module 'robust_keras' has no attribute 'nothing'\n", done.stderr
    assert isinstance(rk.attacks, types.ModuleType)
