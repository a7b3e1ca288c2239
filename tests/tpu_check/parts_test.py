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
from robust_keras.training import adversarial_model, objectives, recipes, validation, weight_averaging
from robust_keras.training import program as programs

LINF = threats.threat(norm="Linf", epsilon="8/255")
PGD = functools.partial(pgd, threat=LINF, loss_fn=losses.cross_entropy, step_size="2/255", num_steps=1)
LAYOUT = recipes.Layout(validation_batch_size=8)
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


def of_training(recipe, layout=LAYOUT, num_cores=2):
    layout = parts.on_one_core(layout)
    program = programs.build(recipe, layout, DATA)
    spec = recipe.batches(DATA, seed=0, num_steps=1).element_spec
    return {part.name: part for part in parts.of_training(program, recipe, layout, spec, num_cores=num_cores)}


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
    assert list(found) == ["training step", "training attack", "validation", "validation, averaged"]
    assert found["training step"].arguments[0]["image"].shape == (8, 8, 8, 3)
    assert found["training attack"].arguments[0].shape == (8, 8, 8, 3)
    image, label, seeds = found["validation"].arguments
    assert (image.shape, image.dtype, label.shape, seeds.shape) == ((4, 8, 8, 3), tf.uint8, (4,), (4, 2))
    assert [part.keeps for part in found.values()] == [True, False, False, False]
    assert problems(found) == []


def test_a_run_without_attack_and_averaging_has_fewer_parts(recipe):
    plain = recipe._replace(attack=None, averaging=None, objective=objectives.standard_training)
    assert list(of_training(plain)) == ["training step", "validation"]


def test_a_change_of_the_training_step_shows(recipe, monkeypatch):
    step = adversarial_model.AdversarialModel.train_step

    def train_step(self, batch):
        return tf.nest.map_structure(on_the_host, step(self, batch))

    monkeypatch.setattr(adversarial_model.AdversarialModel, "train_step", train_step)
    assert problems(of_training(recipe), "training step", "training attack") == ["training step"]


def test_a_change_of_the_objective_shows(recipe):
    def objective(*args):
        return on_the_host(objectives.adversarial_training(*args))

    assert problems(of_training(recipe._replace(objective=objective)), "training step") == ["training step"]


def test_a_change_of_the_training_attack_shows(recipe):
    def attack(logits_fn, x, targets, *, seeds):
        return on_the_host(PGD(logits_fn, x, targets, seeds=seeds))

    changed = recipe._replace(attack=recipes.InnerAttack(attack))
    assert problems(of_training(changed), "training step", "training attack") == ["training step", "training attack"]


def test_a_change_of_the_averaging_shows(recipe, monkeypatch):
    decay = weight_averaging.averaging_decay
    monkeypatch.setattr(
        weight_averaging, "averaging_decay", lambda *args, **kwargs: on_the_host(decay(*args, **kwargs))
    )
    assert problems(of_training(recipe), "training step") == ["training step"]


def test_a_change_of_the_validation_shows(recipe, monkeypatch):
    correct_of = validation._correct_of

    def changed(*args):
        correct = correct_of(*args)
        return lambda *given: tf.nest.map_structure(on_the_host, correct(*given))

    monkeypatch.setattr(validation, "_correct_of", changed)
    names = "training attack", "validation", "validation, averaged"
    assert problems(of_training(recipe), *names) == list(names[1:])


def test_accumulation_shows(recipe):
    """A replica takes its batch in parts: more operations, less memory, the same products."""
    at_once, in_parts = (
        readiness.check(of_training(recipe, LAYOUT._replace(accumulation_steps=n)).values(), memory_gib=16).rows[:2]
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


def test_what_stays_in_memory_counts_for_the_parts_after_it():
    state = tf.zeros((64, 64))

    def part(name, keeps):
        return parts.Part(name, lambda x, y: x + y, (state, tf.zeros(())), keeps)

    alone = readiness.check([parts.Part("small", lambda x: x + 1.0, (tf.zeros(()),))], memory_gib=16)
    after = readiness.check(
        [part("large", True), parts.Part("small", lambda x: x + 1.0, (tf.zeros(()),))], memory_gib=1e-5
    )
    assert alone.problems == [] and len(after.problems) == 2
    assert after.problems[1].startswith("small: too large, 0.00 of 1e-05 GiB on a core, at ")
    assert np.shape(after.rows) == (2, len(readiness.HEADER))
