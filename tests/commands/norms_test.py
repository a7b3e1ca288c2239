"""What recipes say of steps holds in the norm that is bound, however it was."""

import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise
from robust_keras.attacks.attack import as_attack
from robust_keras.commands import configuration

WEIGHTS = np.random.default_rng(0).laplace(size=3072).astype(np.float32)
GREY = tf.fill((1, 32, 32, 3), 0.5)
L2 = ["NORM = 'L2'", "EPSILON = '128/255'"]


def logits_fn(x):
    """Two classes, whose difference is linear in the image."""
    return tf.reshape(x - 0.5, (-1, 3072)) @ tf.constant(np.stack([0 * WEIGHTS, WEIGHTS], axis=1))


def share_of_the_highest_margin(attack):
    """What an attack in L2 reaches of what there is."""
    run = tf.function(lambda: attack(logits_fn, GREY, [0], seeds=noise.example_seeds(0, 0, tf.range(1))))
    highest = attack.keywords["threat"].epsilon * np.linalg.norm(WEIGHTS)
    return float(losses.margin(logits_fn(run()), [0])[0]) / highest


def evaluation(file, params):
    configuration.parse([file], params)
    return configuration.resolve(configuration.evaluate).keywords


@pytest.mark.parametrize("file", ["eval/pgd40.gin", "eval/pgd20.gin", "eval/aa_mt.gin", "eval/autoattack.gin"])
def test_evaluations_step_by_the_norm(file):
    bound = evaluation(file, L2)
    pgd = bound.get("baseline") or bound["attacks"][0]
    assert pgd.keywords["threat"].norm == "L2"
    # PGD-20's steps do not shrink.
    assert share_of_the_highest_margin(pgd) > (0.95 if file == "eval/pgd20.gin" else 0.99)
    if file != "eval/pgd20.gin":
        assert as_attack(pgd).parameters["step_rule"] == "normalised, in diameters"


@pytest.mark.parametrize(
    "recipe, params",
    [("best_wrn70_16_l2.gin", []), ("at.gin", L2), ("quickstart.gin", L2), ("trades.gin", L2)],
)
def test_validations_step_by_the_norm(recipe, params):
    configuration.parse([recipe], params)
    attack = configuration.resolve(configuration.train).recipe.validation.correct_fn.keywords["attack"]
    assert attack.keywords["threat"].norm == "L2"
    assert share_of_the_highest_margin(attack) > 0.99


def test_the_released_codes_steps_are_the_norms():
    configuration.parse(["best_wrn70_16_l2.gin", "presets/released_code.gin"])
    attack = configuration.resolve(configuration.train).recipe.attack.attack_fn
    # Five steps of a fifth of the radius and five of a fiftieth, from the border; along the signs it would be under .70.
    assert share_of_the_highest_margin(functools.partial(attack, loss_fn=losses.margin)) > 0.75


def test_in_linf_they_are_what_they_were():
    bound = evaluation("eval/autoattack.gin", [])
    described = as_attack(bound["baseline"]).parameters
    assert described["step_rule"] == "adam(beta_1=0.9, beta_2=0.999, epsilon=1e-09)"
    assert described["step_size"] == "piecewise_constant(boundaries=[20, 30], values=[0.1, 0.01, 0.0001])"
    assert evaluation("eval/pgd20.gin", [])["attacks"][0].keywords["step_size"]["Linf"] == "2/255"


@pytest.mark.parametrize("file", ["eval/pgd40.gin", "eval/aa_mt.gin", "at.gin"])
def test_a_radius_of_bytes_is_refused(file):
    configuration.parse([file], ["EPSILON = 8"])
    with pytest.raises(ValueError, match="such as '8/255', of at most 1 in Linf. Received: 8"):
        configuration.resolve(configuration.train if file == "at.gin" else configuration.evaluate)
