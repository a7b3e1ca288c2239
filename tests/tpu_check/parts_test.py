"""What is checked is what training and evaluation run: a change of theirs shows in what is lowered."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import as_attack
from robust_keras.attacks.pgd import pgd
from robust_keras.data import training_batches
from robust_keras.evaluation import batching
from robust_keras.evaluation.evaluate import correct_under_attack
from robust_keras.tpu_check import lowering, parts, readiness
from robust_keras.training import adversarial_model, objectives, recipes, steps, validation, weight_averaging
from robust_keras.training import program as programs

LINF = threats.threat(norm="Linf", epsilon="8/255")
PGD = functools.partial(pgd, threat=LINF, loss_fn=losses.cross_entropy, step_size="2/255", num_steps=1)
LAYOUT = recipes.Layout(validation_batch_size=8)
HALVES = ["training step, gradients", "training step, update"]
DATA = parts.black_images("made", (8, 8, 3), 4, has_extra=False)


@pytest.fixture
def recipe(make_tiny_model):
    return recipes.Recipe(
        data=lambda data_dir: DATA,
        model=lambda **given: make_tiny_model(statistics_group_size=4),
        batches=functools.partial(training_batches.batches, batch_size=16, group_size=4),
        objective=objectives.adversarial_training,
        attack=recipes.InnerAttack(PGD),
        optimizer=recipes.Optimizer(lambda step, num_steps: tf.constant(0.1)),
        validation=recipes.Validation(functools.partial(correct_under_attack, attack=PGD)),
        train_steps=10,
        seed=0,
        averaging=recipes.Averaging(0.9),
    )


@pytest.fixture(autouse=True, params=[2])
def cores(request):
    """In the scope of so many, as the command has it."""
    with parts.Cores(request.param).scope():
        yield request.param


def of_training(recipe, layout=LAYOUT):
    layout = layout.on_one_device()
    program = programs.build(recipe, layout, DATA)
    spec = recipe.batches(DATA, seed=0, num_steps=1).element_spec
    return {part.name: part for part in parts.of_training(program, recipe, layout, spec)}


def of_evaluation(model, *attacks):
    found = parts.of_evaluation(model, [as_attack(each) for each in attacks], (8, 8, 3), 4, batch_size=4)
    return {part.name: part for part in found}


def problems(found, *looked_at):
    """Which of these parts, by default of all, have a call of the host in them."""
    names = []
    for name in looked_at or found:
        said = lowering.problems(lowering.lower(found[name].function, *found[name].arguments))
        assert all("EagerPyFunc" in line for line in said)
        names += [name] if said else []
    return names


def on_the_host(tensor):
    """The same tensor, by a detour that no TPU takes."""
    return tf.ensure_shape(tf.py_function(lambda values: values, [tensor], tensor.dtype), tensor.shape)


def test_parts_have_the_shapes_of_a_core(recipe):
    found = of_training(recipe)
    assert list(found) == [*HALVES, "training attack", "validation", "validation, averaged"]
    assert found[HALVES[0]].arguments[1]["image"].shape == (8, 8, 8, 3)
    assert found["training attack"].arguments[0].shape == (8, 8, 8, 3)
    image, label, seeds = found["validation"].arguments
    assert (image.shape, image.dtype, label.shape, seeds.shape) == ((4, 8, 8, 3), tf.uint8, (4,), (4, 2))
    assert [part.keeps for part in found.values()] == [True, True, False, False, False]
    assert problems(found) == []


def test_a_run_without_attack_and_averaging_has_fewer_parts(recipe):
    plain = recipe._replace(attack=None, averaging=None, objective=objectives.standard_training)
    assert list(of_training(plain)) == [*HALVES, "validation"]


def test_a_change_of_the_training_step_shows(recipe, monkeypatch):
    begin = adversarial_model.AdversarialModel.begin_step

    def begin_step(self, batch):
        begun = begin(self, batch)
        return begun._replace(averaged=tf.nest.map_structure(on_the_host, begun.averaged))

    monkeypatch.setattr(adversarial_model.AdversarialModel, "begin_step", begin_step)
    assert problems(of_training(recipe), *HALVES, "training attack") == HALVES[:1]


def test_a_change_of_the_update_shows(recipe, monkeypatch):
    update = steps._update
    monkeypatch.setattr(steps, "_update", lambda *args: tf.nest.map_structure(on_the_host, update(*args)))
    assert problems(of_training(recipe), *HALVES) == HALVES[1:]


@pytest.mark.parametrize("cores", [1], indirect=True)
def test_the_halves_are_the_programs_of_the_strategy_jax(recipe):
    """However the process has named and ordered them: so they are found in the cache of what is compiled."""
    jax = pytest.importorskip("jax")
    from robust_keras.engines.on_jax import programs as on_jax
    from robust_keras.engines.on_jax.execution import Steps
    from robust_keras.engines.on_jax.strategy import JaxStrategy

    layout = LAYOUT.on_one_device()
    program, spec = programs.build(recipe, layout, DATA), recipe.batches(DATA, seed=0, num_steps=1).element_spec
    first, second, *_ = parts.of_training(program, recipe, layout, spec)
    halves = [on_jax.lower(part.function, *part.arguments) for part in (first, second)]
    strategy = JaxStrategy(jax.devices()[:1])
    with strategy.scope():
        made = Steps(program.model, strategy, spec, 1)
    assert [half.name for half in halves] == [made._begin.name, made._update.name]


def test_a_change_of_the_objective_shows(recipe):
    def objective(*args):
        return on_the_host(objectives.adversarial_training(*args))

    assert problems(of_training(recipe._replace(objective=objective)), *HALVES) == HALVES[:1]


def test_a_change_of_the_training_attack_shows(recipe):
    def attack(logits_fn, x, targets, *, seeds):
        return on_the_host(PGD(logits_fn, x, targets, seeds=seeds))

    changed = recipe._replace(attack=recipes.InnerAttack(attack))
    assert problems(of_training(changed), *HALVES, "training attack") == [HALVES[0], "training attack"]


def test_a_change_of_the_averaging_shows(recipe, monkeypatch):
    decay = weight_averaging.averaging_decay
    monkeypatch.setattr(
        weight_averaging, "averaging_decay", lambda *args, **kwargs: on_the_host(decay(*args, **kwargs))
    )
    assert problems(of_training(recipe), *HALVES) == HALVES[1:]


def test_a_change_of_the_validation_shows(recipe, monkeypatch):
    of_bytes = validation._of_bytes

    def changed(*args):
        seen = of_bytes(*args)
        return lambda *given: tf.nest.map_structure(on_the_host, seen(*given))

    monkeypatch.setattr(validation, "_of_bytes", changed)
    names = "training attack", "validation", "validation, averaged"
    assert problems(of_training(recipe), *names) == list(names[1:])


def test_accumulation_shows(recipe):
    """A replica takes its batch in parts: more operations, less memory, the same products."""
    at_once, in_parts = (
        readiness.check(of_training(recipe, LAYOUT._replace(accumulation_steps=n)).values(), memory_gib=16).rows[:3:2]
        for n in (1, 2)
    )
    assert at_once != in_parts
    for row, other in zip(at_once, in_parts):
        assert row[0] == other[0]
    # Of the attack alone, on a part of the batch.
    assert float(in_parts[1][2]) == pytest.approx(float(at_once[1][2]) / 2, rel=1e-3)
    assert float(in_parts[0][2]) == pytest.approx(float(at_once[0][2]), rel=1e-3)


def test_a_change_of_an_attacks_step_shows(tiny_model, monkeypatch):
    searched = functools.partial(apgd, threat=LINF, num_steps=2)
    rows = ["prediction", "attack pgd", "attack apgd-ce, start", "attack apgd-ce, steps"]
    assert list(of_evaluation(tiny_model, PGD, searched)) == rows
    assert problems(of_evaluation(tiny_model, PGD, searched)) == []
    advance = stepwise.advance

    def changed(*args):
        return tf.nest.map_structure(on_the_host, advance(*args))

    monkeypatch.setattr(stepwise, "advance", changed)
    assert problems(of_evaluation(tiny_model, PGD, searched)) == rows[3:]
    monkeypatch.undo()
    sized = batching.sized
    monkeypatch.setattr(batching, "sized", lambda *args: lambda x: on_the_host(sized(*args)(x)))
    assert problems(of_evaluation(tiny_model, PGD, searched)) == [rows[1], rows[3]]


def test_variables_that_stay_in_memory_count_for_all_parts():
    state, other = tf.Variable(tf.zeros((64, 64))), tf.Variable(tf.zeros((64, 64)))
    small = parts.Part("small", lambda x: x + 1.0, (tf.zeros(()),))
    large = parts.Part("large", lambda x: state + other + x, (tf.zeros(()),), keeps=True)
    half = parts.Part("half", lambda x: state + x, (tf.zeros(()),))
    alone = readiness.check([small, half], memory_gib=16)
    together = readiness.check([small, large, half], memory_gib=1e-5)
    assert alone.problems == [] and alone.kept_gib == (0.0, 0.0)
    assert len(together.problems) == 3
    assert together.problems[0].startswith("small: too large, 0.00 of 1e-05 GiB on a core, at ")
    assert np.shape(together.rows) == (3, len(readiness.HEADER))
    size = 64 * 64 * 4 / 2**30
    assert together.kept_gib == (2 * size, 4 * size)  # In tiles of 8 by 128.
    # Two variables, and the sum of the one and a number, or of both: nobody keeps a variable twice.
    assert [float(row[3]) for row in together.rows] == [round(2 * size, 3)] + 2 * [round(3 * size, 3)]
