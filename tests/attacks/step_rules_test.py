import functools

import numpy as np
import pytest
import tensorflow as tf
from smooth_networks import pictures, predictions, seeds_of, smooth_network

from robust_keras import losses, schedules, threats
from robust_keras.attacks import attack, step_rules, stepwise
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd

SHAPE = (32, 32, 3)
RADII = {"Linf": "8/255", "L2": "128/255", "L1": 12}
# As gin/eval/pgd40_attack.gin has it.
PGD_40 = dict(
    loss_fn=losses.margin,
    num_steps=40,
    step_rule=step_rules.by_norm(),
    step_size=functools.partial(schedules.piecewise_constant, boundaries=(20, 30), values=(0.1, 0.01, 1e-4)),
)


def linear(weights):
    """Logits 0 and w x: the margin of class 0 is linear in the image."""
    weights = tf.cast(weights, tf.float32)
    columns = tf.stack([tf.zeros_like(weights), weights], axis=1)
    return lambda x: tf.reshape(x - 0.5, (-1, columns.shape[0])) @ columns


def highest(weights, threat):
    """The largest margin within the radius, around grey."""
    size = np.abs(weights)
    if threat.norm == "L2":
        return threat.epsilon * np.linalg.norm(weights)
    if threat.norm == "Linf":
        return threat.epsilon * size.sum()
    return 0.5 * np.sort(size)[::-1][: round(2 * threat.epsilon)].sum()  # Each pixel has room for a half.


def last_point(search, network, x, labels, seeds):
    """Where the first run of a search ends."""
    progress = stepwise.begin(search, x, labels, network(x), seeds, tf.zeros_like(labels))

    def body(k, state):
        return k + 1, search.step(network, x, labels, state, tf.fill(tf.shape(labels), k))[0]

    return tf.while_loop(lambda k, _: k < search.num_steps - 1, body, (tf.constant(0), progress.state))[1]["x_adv"]


def attacks_on_a_linear_model(threat):
    """`(weights) -> images`: those of the recipe, of the defaults, and of MultiTargeted; traced once for all weights."""
    x, labels, seeds = tf.fill((2, *SHAPE), 0.5), tf.zeros(2, tf.int32), seeds_of(range(2))
    default = {key: PGD_40[key] for key in ("loss_fn", "num_steps")}

    def run(weights):
        network = linear(weights)
        return (
            *(pgd(network, x, labels, threat=threat, seeds=seeds, **settings) for settings in (PGD_40, default)),
            last_point(multi_targeted.search(threat=threat), network, x, labels, seeds),
        )

    return tf.function(run, autograph=False)


@pytest.mark.parametrize("norm, share", [("Linf", 0.999), ("L2", 0.995), ("L1", 0.9)])
def test_reaches_what_a_linear_model_allows(norm, share):
    # Adam walks along the gradient's sign: in L2 it reaches .80, .70 and .64 of it, in L1 .26, .17 and .10.
    threat = threats.threat(norm=norm, epsilon=RADII[norm])
    attacks = attacks_on_a_linear_model(threat)
    for law in ("normal", "laplace", "t3"):
        rng = np.random.default_rng(0)
        weights = rng.standard_t(3, 3072) if law == "t3" else getattr(rng, law)(size=3072)
        reached = attacks(tf.constant(weights, tf.float32))
        for x_adv in reached:
            margins = losses.margin(linear(weights)(x_adv), tf.zeros(2, tf.int32))
            assert np.all(margins >= share * highest(weights, threat)), law
        # The defaults are those of the recipe.
        np.testing.assert_allclose(reached[1], reached[0], rtol=0, atol=1e-6)


def test_in_linf_the_rule_is_adam():
    network, x = smooth_network((6, 5, 3), 6), pictures((6, 5, 3), 4)
    run = functools.partial(
        pgd,
        network,
        x,
        predictions(network, x),
        threat=threats.threat(norm="Linf", epsilon=0.05),
        seeds=seeds_of(range(4)),
    )
    np.testing.assert_array_equal(run(**PGD_40), run(**PGD_40 | {"step_rule": step_rules.adam()}))
    settings = dict(beta_1=0.5, beta_2=0.8, epsilon=0.1)
    rules = (step_rules.by_norm(**settings), step_rules.adam(**settings))
    np.testing.assert_array_equal(*(run(**PGD_40 | {"step_rule": rule}) for rule in rules))
    assert rules[0].name == rules[1].name == "adam(beta_1=0.5, beta_2=0.8, epsilon=0.1)"


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_sizes_of_steps_by_norm_are_in_diameters(norm):
    # From the image itself: two of the first size, each a fifth of the radius, then hundredths of the diameter.
    weights = np.random.default_rng(0).normal(size=3072)
    for epsilon in (0.5, 2.0):
        threat = threats.threat(norm=norm, epsilon=epsilon)
        schedule = functools.partial(schedules.piecewise_constant, boundaries=(2,), values=(0.1, 0.01))
        for num_steps, expected in ((1, 0.2), (2, 0.4), (3, 0.42)):
            x = tf.fill((1, *SHAPE), 0.5)
            settings = dict(loss_fn=losses.margin, num_steps=num_steps, random_start=False, seeds=seeds_of([0]))
            settings |= dict(threat=threat, step_rule=step_rules.by_norm())
            x_adv = pgd(linear(weights), x, [0], step_size=schedule, **settings)
            np.testing.assert_allclose(threat.distance(x_adv, x), expected * epsilon, rtol=1e-4)
            # With a size of its own, an attack takes steps of that length.
            x_adv = pgd(linear(weights), x, [0], step_size=0.1, **settings | {"step_rule": None})
            np.testing.assert_allclose(threat.distance(x_adv, x), 0.1 * num_steps, rtol=1e-4)


def test_sizes_may_be_given_by_norm():
    weights, x = np.random.default_rng(0).normal(size=3072), tf.fill((1, *SHAPE), 0.5)
    sizes = {"Linf": "2/255", "L2": 0.25}
    for norm, expected in (("Linf", 2 / 255), ("L2", 0.25)):
        threat = threats.threat(norm=norm, epsilon=0.9)
        settings = dict(loss_fn=losses.margin, num_steps=1, random_start=False, seeds=seeds_of([0]), step_size=sizes)
        x_adv = pgd(linear(weights), x, [0], threat=threat, **settings)
        np.testing.assert_allclose(threat.distance(x_adv, x), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="a step_size for the norm L1. Received: {'Linf': '2/255', 'L2': 0.25}"):
        pgd(linear(weights), x, [0], threat=threats.threat(norm="L1", epsilon=1), **settings)


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_adams_steps_do_not_depend_on_the_scale_of_the_loss(scale):
    threat, rule = threats.threat(norm="Linf", epsilon=0.3), step_rules.adam()
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(6, 2, 4, 4, 3)).astype(np.float32)

    def directions(factor):
        state, found = rule.init(tf.zeros((2, 4, 4, 3))), []
        for k, gradient in enumerate(gradients):
            direction, state = rule.update(tf.constant(gradient * np.float32(factor)), state, tf.constant(k), threat)
            found.append(direction)
        return np.stack(found)

    np.testing.assert_allclose(directions(scale), directions(1.0), rtol=0, atol=1e-3)
    # Without any gradient there is no step.
    direction, _ = rule.update(tf.zeros((2, 4, 4, 3)), rule.init(tf.zeros((2, 4, 4, 3))), tf.constant(0), threat)
    np.testing.assert_array_equal(direction, np.zeros((2, 4, 4, 3)))


def test_each_examples_scale_is_its_own():
    rule, threat = step_rules.adam(), threats.threat(norm="Linf", epsilon=0.3)
    gradient = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)
    gradient[1] = 1e-12 * gradient[0]
    direction, _ = rule.update(tf.constant(gradient), rule.init(tf.zeros((2, 4, 4, 3))), tf.constant(0), threat)
    np.testing.assert_allclose(direction[1], direction[0], rtol=0, atol=1e-3)


def steps_of(norm, epsilon, *, num_steps, rule=None, size=None):
    settings = dict(threat=threats.threat(norm=norm, epsilon=epsilon), step_rule=rule, step_size=size)
    step_rules.resolve(num_steps=num_steps, **settings)
    return settings


def sizes(*values):
    return functools.partial(schedules.piecewise_constant, boundaries=range(1, len(values)), values=values)


@pytest.mark.parametrize(
    "norm, epsilon, num_steps, rule, size, is_short",
    [
        ("Linf", "8/255", 4, None, "2/255", False),
        ("Linf", "8/255", 3, None, "2/255", True),
        ("L2", "128/255", 10, None, "2/255", True),
        ("L2", "128/255", 10, None, {"Linf": "2/255", "L2": "15/255"}, False),
        ("L1", 12, 4, None, 3, False),
        ("L1", 12, 3, None, 3, True),
        ("L2", 1.0, 2, step_rules.steepest(), 0.4, True),
        ("L2", 1.0, 3, step_rules.steepest(), 0.4, False),
        # In diameters of the ball.
        ("L2", 1.0, 5, step_rules.by_norm(), 0.1, False),
        ("L2", 1.0, 4, step_rules.by_norm(), 0.1, True),
        ("Linf", 0.3, 2, step_rules.by_norm(), sizes(0.2, 0.05), True),
        ("Linf", 0.3, 2, step_rules.by_norm(), sizes(0.2, 0.1), False),
        ("L2", 1.0, 1, step_rules.adam(), 0.1, False),  # By the number of pixels.
        ("L2", 1.0, 4, None, None, True),
        ("L2", 1.0, 40, None, None, False),
        ("Linf", 0.0, 1, None, 1e-6, False),
        ("L2", 1.0, 1, step_rules.StepRule("of one's own", None, None), 1e-3, False),
    ],
)
def test_steps_that_cannot_reach_the_radius_are_warned_of(warned, norm, epsilon, num_steps, rule, size, is_short):
    steps_of(norm, epsilon, num_steps=num_steps, rule=rule, size=size)
    assert len(warned) == is_short
    for line in warned:
        assert line.startswith(
            f"Expected steps that together reach the radius, {norm} {epsilon}. Received: {num_steps} of "
        )
        assert "bind a larger step_size" in line and f"gin/threats/{norm.lower()}_training.gin" in line
    steps_of(norm, epsilon, num_steps=num_steps, rule=rule, size=size)
    assert len(warned) == is_short  # Once is enough.


def test_short_steps_are_warned_of_before_any_and_while_a_program_is_traced(warned):
    threat = threats.threat(norm="L2", epsilon="128/255")
    settings = dict(threat=threat, loss_fn=losses.margin, num_steps=10, step_size="2/255")
    attack.as_attack(functools.partial(pgd, **settings))
    assert len(warned) == 1
    step_rules._warn.cache_clear()
    network = linear(np.ones(3072))
    tf.function(lambda: pgd(network, tf.fill((1, *SHAPE), 0.5), [0], seeds=seeds_of([0]), **settings))()
    assert len(warned) == 2
    settings |= dict(step_size=sizes(0.1, 0.1), num_steps=2)
    tf.function(lambda: pgd(network, tf.fill((1, *SHAPE), 0.5), [0], seeds=seeds_of([0]), **settings))()
    assert len(warned) == 2  # Not of a function of the step, which may be of the program alone.
    attack.as_attack(functools.partial(multi_targeted, threat=threat, num_steps=2, step_size="1/255"))
    assert len(warned) == 3


def test_bad_settings_of_pgd_show_before_any_work():
    threat = threats.threat(norm="L2", epsilon="128/255")
    for bad in (dict(num_steps=0), dict(step_size=-1), dict(num_restarts=2, random_start=False)):
        with pytest.raises(ValueError, match=r"Expected .* Received: "):
            attack.as_attack(functools.partial(pgd, threat=threat, loss_fn=losses.margin, **{"num_steps": 1, **bad}))
