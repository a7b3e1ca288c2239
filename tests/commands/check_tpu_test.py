"""The check of recipes for TPU cores: what is ready, what is not, and what it says then."""

import re
import sys

import command_line  # noqa: F401  Registers the small network.
import keras
import pytest
import tensorflow as tf

import gin
from robust_keras.commands import bound_functions, check_tpu, configuration
from robust_keras.models import wide_resnet
from robust_keras.training import objectives

GIN = configuration.gin_directory()
# base.gin is what they share; an evaluation is checked after a recipe, or alone.
RECIPES = sorted(path.name for path in GIN.glob("*.gin") if not path.name.startswith("base"))
EVALUATIONS = sorted(f"eval/{path.name}" for path in GIN.glob("eval/*.gin") if path.name != "pgd40_attack.gin")
SMALL = ("DEPTH = 10", "WIDTH = 1")
FAST = (*SMALL, "training/pgd.num_steps = 2", "pgd40/pgd.num_steps = 2", "TAU = 0.9")


@keras.saving.register_keras_serializable(package="check_tpu_test")
class Masked(keras.layers.Layer):
    def call(self, x):
        return x + tf.reduce_sum(tf.boolean_mask(x, x[:, 0] > 0))


@keras.saving.register_keras_serializable(package="check_tpu_test")
class OnTheHost(keras.layers.Layer):
    def call(self, x):
        return tf.ensure_shape(tf.py_function(lambda values: values, [x], tf.float32), x.shape)


def _network_with(layer):
    def network(*, inner, num_classes, mean, std, input_shape):
        made = inner(num_classes=num_classes, mean=mean, std=std, input_shape=input_shape)
        return keras.Model(made.input, layer()(made.output))

    return network


@pytest.fixture(scope="module")
def bad_models():
    for layer in (Masked, OnTheHost):
        network = bound_functions.partial(_network_with(layer))
        with gin.unlock_config():  # Another test may have used it.
            gin.external_configurable(network, f"with_{layer.__name__}", module="check_tpu_test")


@pytest.fixture(scope="module")
def own_objective():
    def own(logits_fn, x, x_adv, labels, targets):
        return objectives.adversarial_training(logits_fn, x, x_adv, labels, targets)

    with gin.unlock_config():
        gin.external_configurable(bound_functions.partial(own), "own", module="check_tpu_test")


def call(monkeypatch, *args):
    """Runs the command: its exit code."""
    monkeypatch.setattr(sys, "argv", ["check_tpu", *map(str, args)])
    try:
        check_tpu.command()
    except SystemExit as exit:
        return exit.code
    return 0


def params(*bindings):
    return [f"--gin_param={binding}" for binding in bindings]


def test_a_recipe_is_ready(monkeypatch, capsys):
    assert call(monkeypatch, "--gin_file=gin/quickstart.gin", *params(*FAST)) == 0
    said = capsys.readouterr()
    assert said.err.count("\n") == 0 and "error" not in said.err
    network = wide_resnet.wide_resnet(depth=10, width=1, num_classes=10)
    parameters = sum(int(tf.size(weight.value)) for weight in network.trainable_weights)
    assert f"{parameters:,} parameters" in said.out
    assert "batches of 32 images, 32 on each of 1 cores" in said.out
    rows = re.findall(r"^\| ([a-z, ]+?) +\| +([\d,]+) +\| +(\S+) ", said.out, re.M)
    parts = ["training step, gradients", "training step, update", "training attack", "validation"]
    assert [name for name, *_ in rows] == [*parts, "validation, averaged"]
    by_architecture = float(re.search(r"(\S+) FLOP a step", said.out)[1])
    # The stem's gradient by the image is in the architecture's count, and not needed for the weights.
    assert float(rows[0][2]) == pytest.approx(by_architecture, rel=0.01)
    assert said.out.endswith("ready: cores of 16 GiB\n")


@pytest.mark.slow
def test_a_pre_activation_resnet_is_ready(monkeypatch, capsys):
    files = ["--gin_file=gin/quickstart.gin", "--gin_file=gin/models/preact_resnet_18.gin"]
    small = params(
        "BATCH_SIZE = 4", "STATISTICS_GROUP_SIZE = 4", "training/pgd.num_steps = 1", "pgd40/pgd.num_steps = 1"
    )
    assert call(monkeypatch, *files, *small) == 0
    said = capsys.readouterr().out
    assert "12,548,426 parameters" in said and "FLOP a step" not in said and said.endswith("ready: cores of 16 GiB\n")


@pytest.mark.parametrize(
    ("model", "operation"), [("with_Masked", "Where .*boolean_mask/Where"), ("with_OnTheHost", "EagerPyFunc")]
)
def test_what_is_in_the_way_is_named(monkeypatch, capsys, bad_models, model, operation):
    bindings = params(*FAST[2:], f"train.model = @{model}()", f"{model}.inner = @small_network()")
    assert call(monkeypatch, "--gin_file=gin/quickstart.gin", *bindings) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    for part in ("training step, gradients", "training attack", "validation"):
        assert any(re.match(rf"{part}: .*{operation}.* \(.*check_tpu_test.py:\d+\)", line) for line in lines), lines
    assert "not ready" in said.out


def test_too_little_memory_is_found(monkeypatch, capsys):
    arguments = ["--gin_file=gin/quickstart_plain.gin", *params(*SMALL, "pgd40/pgd.num_steps = 2")]
    assert call(monkeypatch, *arguments, "--memory_gib=0.01") == 1
    lines = capsys.readouterr().err.splitlines()
    first = r"training step, gradients: too large, 0\.\d+ of 0\.01 GiB on a core, at \S+"
    assert any(re.match(first, line) for line in lines)


def test_eight_cores_take_an_eighth_and_hold_all_weights(monkeypatch, capsys):
    arguments = ["--gin_file=gin/quickstart.gin", *params(*FAST, "STATISTICS_GROUP_SIZE = 4")]
    said = []
    for num_cores in (1, 8):
        assert call(monkeypatch, *arguments, f"--num_cores={num_cores}") == 0
        said.append(capsys.readouterr().out)
    flops = [float(re.search(r"^\| training step, gradients +\| \S+ +\| (\S+)", out, re.M)[1]) for out in said]
    assert flops[0] == pytest.approx(8 * flops[1], rel=1e-3)
    assert len({re.search(r"^of it weights, .*", out, re.M)[0] for out in said}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gin_file=gin/at.gin", "--num_cores=3"], "whole groups of 4 images over 3 cores. Received: one of 128"),
        (["--gin_file=gin/at.gin", "--num_cores=64"], "over 64 cores. Received: one of 128"),
        (["--gin_file=gin/at.gin", "--num_cores=0"], "over 0 cores"),
        (
            ["--gin_file=gin/eval/pgd40.gin", "--num_cores=32", "--gin_param=evaluate.batch_size = 48"],
            "evaluation's batch",
        ),
        (["--gin_file=gin/at.gin", "--memory_gib=-1"], "memory_gib"),
        (["--gin_file=gin/at.gin", "--gin_param=EPSLON = 1"], "EPSLON"),
        (["--gin_file=gin/no_such.gin"], "no_such.gin"),
        (["--gin_file=gin/base.gin"], "Expected"),
    ],
)
def test_bad_input_is_refused(monkeypatch, capsys, arguments, message):
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and message in said and "Traceback" not in said


def test_an_evaluation_is_checked_alone_and_after_a_recipe(monkeypatch, capsys):
    small = (*SMALL, "pgd40/pgd.num_steps = 2", "evaluate.batch_size = 32")
    fast = params(*small, "training/pgd.num_steps = 2")
    assert call(monkeypatch, "--gin_file=gin/eval/aa_mt_mini.gin", *fast) == 0
    alone = capsys.readouterr().out
    for row in ("attack pgd ", "attack apgd-ce, start", "attack apgd-ce, steps", "attack multi-targeted, steps"):
        assert f"| {row}" in alone
    assert "batches of 128 images, 4 on each of 32 cores" in alone
    files = ["--gin_file=gin/quickstart_plain.gin", "--gin_file=gin/eval/pgd20.gin"]
    assert call(monkeypatch, *files, *params(*small)) == 0
    after = capsys.readouterr().out
    assert "batches of 32 images, 32 on each of 1 cores" in after and "| attack pgd " in after
    assert "training attack" in alone and "training attack" not in after


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_ready(recipe):
    assert check_tpu.run(gin_files=[recipe], gin_params=SMALL) == []


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_every_evaluation_is_ready(evaluation, norm):
    bindings = (*SMALL, f"NORM = '{norm}'", "EPSILON = '128/255'", "evaluate.batch_size = 8")
    assert check_tpu.run(gin_files=["quickstart_plain.gin", evaluation], gin_params=bindings) == []


@pytest.mark.parametrize(
    "recipe, bindings",
    [
        ("quickstart.gin", ["train.objective = @own()", "training/pgd.num_steps = 1"]),
        pytest.param(
            "quickstart_plain.gin",
            ["train.attack = @multi_targeted()", "multi_targeted.threat = @threat()"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_the_costs_do_not_know_is_checked_all_the_same(monkeypatch, capsys, own_objective, recipe, bindings):
    code = call(monkeypatch, f"--gin_file=gin/{recipe}", *params("pgd40/pgd.num_steps = 1", *SMALL, *bindings))
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "FLOP a step" not in said.out and said.out.endswith("ready: cores of 16 GiB\n")


def test_the_shape_of_images_of_ones_own(tmp_path):
    for k in range(6):
        path = tmp_path / f"{k % 3}" / f"{k}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(tf.io.encode_png(tf.zeros((9 + k, 12, 3), tf.uint8)).numpy())
    names = {"dataset": f"images:{tmp_path}", "image_size": 8, "short_side": 9}
    data = check_tpu._data(names, None)
    assert data.labelled.images.shape == (3, 8, 8, 3) and data.image_shape == (8, 8, 3)
