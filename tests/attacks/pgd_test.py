import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from cleverhans.tf2.attacks.fast_gradient_method import fast_gradient_method
from cleverhans.tf2.attacks.momentum_iterative_method import momentum_iterative_method
from cleverhans.tf2.attacks.projected_gradient_descent import projected_gradient_descent

from robust_keras import losses, noise, schedules, threats
from robust_keras.attacks import step_rules, stepwise, transfer
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.fab import fab
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square
from robust_keras.models.normalization import batch_norm_mode

RADII = {"Linf": 0.06, "L2": 0.5}
STEP_RULES = {"steepest": step_rules.steepest, "adam": step_rules.adam}
STEP_SIZES = {("Linf", "steepest"): 0.02, ("L2", "steepest"): 0.2, ("Linf", "adam"): 0.02, ("L2", "adam"): 0.03}
LOSSES = {"cross_entropy": losses.cross_entropy, "kl_divergence": losses.kl_divergence, "margin": losses.margin}


class Case(NamedTuple):
    """One row of the table of attacks."""

    norm: str
    step_rule: str
    loss: str
    num_restarts: int
    random_start: bool

    def __str__(self):
        start = f"{self.num_restarts} random" if self.random_start else "no random"
        return f"{self.norm}-{self.step_rule}-{self.loss}-{start}"

    def attack(self, **kwargs):
        arguments = {
            "threat": threats.threat(norm=self.norm, epsilon=RADII[self.norm]),
            "loss_fn": LOSSES[self.loss],
            "num_steps": 5,
            "step_size": STEP_SIZES[self.norm, self.step_rule],
            "step_rule": STEP_RULES[self.step_rule](),
            "num_restarts": self.num_restarts,
            "random_start": self.random_start,
        }
        return functools.partial(pgd, **{**arguments, **kwargs})


CASES = [
    Case(norm, rule, loss, restarts, start)
    for norm, rule, loss, (restarts, start) in itertools.product(
        RADII, STEP_RULES, LOSSES, [(1, True), (1, False), (2, True)]
    )
]


def lengths(delta, norm):
    delta = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.abs(delta).max(1) if norm == "Linf" else np.sqrt((delta**2).sum(1))


def assert_alike(actual, expected):
    """Equal but for a few pixels whose gradient is so near to zero that rounding decides its sign."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    different = np.sum(np.abs(actual - expected) > 1e-3)
    assert different <= max(3, 0.005 * actual.size), f"{different} of {actual.size} pixels differ"


def seeds_of(indices, run_seed=0):
    return noise.example_seeds(run_seed, 0, tf.constant(np.array(indices, np.int32)))


@pytest.fixture(scope="module")
def network(make_tiny_model):
    model = make_tiny_model()
    # As one operation: the attacks below run eagerly, and a layer's call takes longer than its arithmetic.
    return tf.function(lambda x: model(x, training=False), autograph=False)


@pytest.fixture(scope="module")
def labels(network, tiny_images):
    """The model's own: it starts at an accuracy of 100 %, with some of every class."""
    labels = tf.argmax(network(tiny_images), axis=-1, output_type=tf.int32)
    assert len(set(labels.numpy())) >= 3
    return labels


def targets_of(case, network, x, labels):
    # The divergence from the prediction itself has no gradient where the attack starts; from a sharper one it has.
    return tf.nn.softmax(3.0 * network(x)) if case.loss == "kl_divergence" else labels


class Outcome(NamedTuple):
    case: Case
    attack: functools.partial
    targets: tf.Tensor
    x_adv: np.ndarray


@pytest.fixture(scope="module", params=CASES, ids=str)
def outcome(request, network, tiny_images, labels):
    case = request.param
    attack, targets = case.attack(), targets_of(case, network, tiny_images, labels)
    x_adv = attack(network, tiny_images, targets, seeds=seeds_of(range(8)))
    return Outcome(case, attack, targets, x_adv)


def accuracy(network, x, labels):
    return np.mean(np.argmax(network(x), axis=-1) == labels.numpy())


def test_images_are_inside_the_ball_and_in_range(outcome, tiny_images):
    x_adv = outcome.x_adv
    assert x_adv.shape == tiny_images.shape and x_adv.dtype == tf.float32
    distances = lengths(x_adv - tiny_images, outcome.case.norm)
    assert np.all(distances <= RADII[outcome.case.norm] * (1 + 1e-5))
    # It uses the ball: five steps lead to its border, or nearly.
    assert np.all(distances > 0.8 * RADII[outcome.case.norm])
    assert tf.reduce_min(x_adv) >= 0.0 and tf.reduce_max(x_adv) <= 1.0


def test_loss_rises_and_accuracy_falls(outcome, network, tiny_images, labels):
    loss_fn = LOSSES[outcome.case.loss]
    before = loss_fn(network(tiny_images), outcome.targets).numpy()
    after = loss_fn(network(outcome.x_adv), outcome.targets).numpy()
    assert np.all(after > before + 0.05)
    assert accuracy(network, tiny_images, labels) == 1.0
    assert accuracy(network, outcome.x_adv, labels) <= 0.5


def test_follows_the_seed_and_nothing_else(outcome, network, tiny_images):
    again = outcome.attack(network, tiny_images, outcome.targets, seeds=seeds_of(range(8)))
    np.testing.assert_array_equal(again, outcome.x_adv)
    # Another batch: of the same examples in other places, and of two with the seeds of another run.
    indices = [5, 2, 5, 5, 2]
    x, targets = tf.gather(tiny_images, indices), tf.gather(outcome.targets, indices)
    seeds = tf.concat([seeds_of([5, 2, 5]), seeds_of([5, 2], run_seed=1)], axis=0)
    x_adv = outcome.attack(network, x, targets, seeds=seeds).numpy()
    expected = tf.gather(outcome.x_adv, indices).numpy()
    assert_alike(x_adv[:3], expected[:3])
    if outcome.case.random_start:
        assert np.all(lengths(x_adv[3:] - expected[3:], "Linf") > 1e-3)
    else:
        assert_alike(x_adv[3:], expected[3:])


def test_a_random_start_alone_does_not_break_the_model(network, tiny_images, labels):
    # So that the falling accuracies above are the gradient's doing.
    for norm, epsilon in RADII.items():
        start = threats.threat(norm=norm, epsilon=epsilon).random_start(tiny_images, seeds_of(range(8)))
        assert accuracy(network, start, labels) >= 0.75


COMPILED = [
    Case("Linf", "steepest", "cross_entropy", 1, True),
    Case("L2", "steepest", "margin", 2, True),
    Case("Linf", "adam", "kl_divergence", 1, False),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_compiled_by_xla(case, network, tiny_images, labels):
    x, targets = tiny_images[:4], targets_of(case, network, tiny_images, labels)[:4]

    def run(x, targets, seeds):
        return case.attack(num_steps=3)(network, x, targets, seeds=seeds)

    compiled = tf.function(run, jit_compile=True, autograph=False)
    assert_alike(compiled(x, targets, seeds_of(range(4))), run(x, targets, seeds_of(range(4))))


@pytest.mark.parametrize("norm, num_restarts", [("Linf", 2), ("L2", 1)])
def test_batch_of_unknown_size_and_of_one(norm, num_restarts, network, tiny_images, labels):
    attack = Case(norm, "adam", "cross_entropy", num_restarts, True).attack(num_steps=2)
    expected = attack(network, tiny_images, labels, seeds=seeds_of(range(8)))

    def run(x, labels, seeds):
        return attack(network.python_function, x, labels, seeds=seeds)

    signature = [tf.TensorSpec((None, 8, 8, 3)), tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, 2), tf.int32)]
    free = tf.function(run, input_signature=signature, autograph=False)
    assert_alike(free(tiny_images, labels, seeds_of(range(8))), expected)
    assert_alike(free(tiny_images[:1], labels[:1], seeds_of([0])), expected[:1])
    if num_restarts == 1:
        fixed = tf.function(run, autograph=False)
        assert_alike(fixed(tiny_images[:1], labels[:1], seeds_of([0])), expected[:1])


@pytest.mark.parametrize(
    "batch_size",
    [
        2,
        1,
    ],
)
def test_compiled_attack_on_a_function_of_an_unknown_batch(batch_size, network, tiny_images, labels):
    # As a SavedModel is: the batch of its gradient is unknown even where that of the images is not.
    served = tf.function(
        network.python_function, input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32)], autograph=False
    )
    attack = Case("Linf", "steepest", "cross_entropy", 1, False).attack(num_steps=2)
    x, targets, seeds = tiny_images[:batch_size], labels[:batch_size], seeds_of(range(batch_size))
    run = tf.function(lambda x: attack(served, x, targets, seeds=seeds), autograph=False)
    assert_alike(run(x), attack(network, x, targets, seeds=seeds))


# Two classes and logits that are linear in the image: the gradient has one direction everywhere.
WEIGHTS = np.random.default_rng(3).normal(size=(12, 2)).astype(np.float32)
UPHILL = np.sign(WEIGHTS[:, 1] - WEIGHTS[:, 0])  # away from class 0


def linear(x):
    return tf.reshape(x, (-1, 12)) @ WEIGHTS


GREY = tf.fill((2, 2, 2, 3), 0.5)
SEEDS = seeds_of(range(2))


@pytest.mark.parametrize("num_steps, expected", [(1, 0.03), (2, 0.06), (3, 0.09), (4, 0.1), (50, 0.1)])
@pytest.mark.parametrize("loss_fn", [losses.cross_entropy, losses.margin])
def test_takes_as_many_steps_as_it_was_told(num_steps, expected, loss_fn):
    attack = functools.partial(pgd, threat=threats.threat(norm="Linf", epsilon=0.1), random_start=False)
    x_adv = attack(linear, GREY, [0, 1], loss_fn=loss_fn, num_steps=num_steps, step_size=0.03, seeds=SEEDS)
    delta = np.reshape(x_adv - GREY, (2, 12))
    np.testing.assert_allclose(delta, [expected * UPHILL, -expected * UPHILL], atol=1e-6)


def test_l2_steps_on_a_linear_model():
    direction = (WEIGHTS[:, 1] - WEIGHTS[:, 0]) / np.linalg.norm(WEIGHTS[:, 1] - WEIGHTS[:, 0])
    attack = functools.partial(pgd, threat=threats.threat(norm="L2", epsilon=0.25), random_start=False)
    for num_steps, expected in ((1, 0.1), (2, 0.2), (3, 0.25)):
        x_adv = attack(linear, GREY, [0, 0], loss_fn=losses.margin, num_steps=num_steps, step_size="1/10", seeds=SEEDS)
        np.testing.assert_allclose(np.reshape(x_adv - GREY, (2, 12)), [expected * direction] * 2, atol=1e-6)


def test_stays_in_range_on_a_linear_model():
    x_adv = pgd(
        linear,
        tf.concat([GREY[:1] + 0.48, GREY[:1] - 0.48], axis=0),
        [0, 0],
        threat=threats.threat(norm="Linf", epsilon=0.1),
        loss_fn=losses.margin,
        num_steps=5,
        step_size=0.03,
        seeds=SEEDS,
        random_start=False,
    )
    expected = [np.where(UPHILL > 0, 1.0, 0.88), np.where(UPHILL > 0, 0.12, 0.0)]
    np.testing.assert_allclose(np.reshape(x_adv, (2, 12)), expected, atol=1e-6)


def test_step_size_may_depend_on_the_step():
    schedule = functools.partial(schedules.piecewise_constant, boundaries=[2], values=[0.1, 0.01])
    attack = functools.partial(pgd, threat=threats.threat(norm="Linf", epsilon=0.4), random_start=False)
    for num_steps, expected in ((2, 0.2), (3, 0.21), (5, 0.23)):
        x_adv = attack(
            linear, GREY, [0, 0], loss_fn=losses.margin, num_steps=num_steps, step_size=schedule, seeds=SEEDS
        )
        np.testing.assert_allclose(np.reshape(x_adv - GREY, (2, 12)), [expected * UPHILL] * 2, atol=1e-6)


def test_starts_at_a_random_point_of_the_ball():
    # A step too small to see: what is left is the start, and every example's is its own.
    for norm, epsilon in RADII.items():
        x = tf.fill((50, 2, 2, 3), 0.5)
        x_adv = pgd(
            linear,
            x,
            tf.zeros(50, tf.int32),
            threat=threats.threat(norm=norm, epsilon=epsilon),
            loss_fn=losses.margin,
            num_steps=1,
            step_size=1e-9,
            seeds=seeds_of(range(50)),
        )
        distances = lengths(x_adv - x, norm) / epsilon
        assert np.all(distances > 0.3) and np.all(distances < 1 + 1e-5) and 0.8 < distances.mean() < 0.999
        assert len(np.unique(x_adv, axis=0)) == 50
        assert abs(np.mean(x_adv - x)) < 0.1 * epsilon


def numpy_adam(x, target, step_sizes, beta_1, beta_2, epsilon, radius, norm):
    """Ascent of -(x - target)^2 in float64, after Kingma & Ba 2015, algorithm 1."""
    x0, first, second = x.copy(), np.zeros_like(x), np.zeros_like(x)
    for t, step_size in enumerate(step_sizes, start=1):
        gradient = -2 * (x - target)
        first = beta_1 * first + (1 - beta_1) * gradient
        second = beta_2 * second + (1 - beta_2) * gradient**2
        x = x + step_size * (first / (1 - beta_1**t)) / (np.sqrt(second / (1 - beta_2**t)) + epsilon)
        delta = x - x0
        if norm == "Linf":
            delta = np.clip(delta, -radius, radius)
        else:
            length = np.sqrt((delta**2).sum(axis=1, keepdims=True))
            delta = delta * np.minimum(1.0, radius / length)
        x = np.clip(x0 + delta, 0.0, 1.0)
    return x


@pytest.mark.parametrize(
    "norm, radius, betas, epsilon",
    [
        ("Linf", 0.5, {}, 1e-9),
        ("Linf", 0.12, {}, 1e-9),  # so that the projection acts
        ("L2", 0.3, {}, 1e-9),
        ("Linf", 0.5, {"beta_1": 0.5, "beta_2": 0.8}, 0.1),
    ],
)
@pytest.mark.parametrize("step_sizes", [[0.1] * 5, [0.1, 0.1, 0.01, 0.01, 0.01]])
def test_adam_agrees_with_numpy(norm, radius, betas, epsilon, step_sizes):
    rng = np.random.default_rng(0)
    x, target = rng.uniform(0.2, 0.8, (3, 12)), rng.uniform(0.2, 0.8, (3, 12))
    schedule = functools.partial(schedules.piecewise_constant, boundaries=[2], values=[step_sizes[0], step_sizes[-1]])
    x_adv = pgd(
        lambda x: tf.reshape(x, (-1, 12)),
        tf.constant(x.reshape(3, 2, 2, 3), tf.float32),
        tf.constant(target, tf.float32),
        threat=threats.threat(norm=norm, epsilon=radius),
        loss_fn=lambda logits, targets: -tf.reduce_sum(tf.square(logits - targets), axis=-1),
        num_steps=5,
        step_size=schedule,
        seeds=seeds_of(range(3)),
        step_rule=step_rules.adam(**betas, epsilon=epsilon) if betas else step_rules.adam(),
        random_start=False,
    )
    expected = numpy_adam(
        x, target, step_sizes, betas.get("beta_1", 0.9), betas.get("beta_2", 0.999), epsilon, radius, norm
    )
    np.testing.assert_allclose(np.reshape(x_adv, (3, 12)), expected, atol=2e-5)


# A weak attack, whose result depends on where it started.
WEAK = Case("L2", "steepest", "cross_entropy", 1, True)


def test_more_restarts_are_never_worse(network, labels, tiny_images):
    x = tf.concat([tiny_images] * 4, axis=0)
    targets, seeds = tf.concat([labels] * 4, axis=0), seeds_of(range(32))
    threat = threats.threat(norm="L2", epsilon=0.13)
    broken, loss = [], []
    for num_restarts in (1, 2, 4):
        attack = WEAK.attack(num_restarts=num_restarts, num_steps=1, step_size=0.05, threat=threat)
        logits = network(attack(network, x, targets, seeds=seeds)).numpy()
        broken.append(logits.argmax(1) != targets.numpy())
        loss.append(losses.cross_entropy(logits, targets).numpy())
    for fewer, more in ((0, 1), (1, 2)):
        assert np.all(broken[more] >= broken[fewer])
        alike = broken[more] == broken[fewer]
        assert np.all(loss[more][alike] >= loss[fewer][alike] - 1e-6)
        assert np.mean(loss[more] > loss[fewer] + 1e-5) > 0.2


def test_restarts_keep_what_is_misclassified_and_then_the_highest_loss():
    # Steps that go nowhere leave the starts to choose from. The loss is the second pixel, the prediction is wrong where
    # the first pixel is above 1/2: of several restarts these two disagree.
    seen = []

    def logits_fn(x):
        seen.append(np.array(x))
        first, second = x[:, 0, 0, 0], x[:, 0, 1, 0]
        return tf.stack([tf.fill(tf.shape(first), 0.5), first, second - 10.0], axis=-1)

    still = step_rules.StepRule("still", lambda x: (), lambda gradient, state, *_: (tf.zeros_like(gradient), state))
    x_adv = pgd(
        logits_fn,
        tf.fill((60, 1, 2, 1), 0.5),
        tf.zeros(60, tf.int32),
        threat=threats.threat(norm="Linf", epsilon=0.4),
        loss_fn=lambda logits, targets: logits[:, 2],
        num_steps=1,
        step_size=0.1,
        step_rule=still,
        num_restarts=3,
        seeds=seeds_of(range(60)),
    ).numpy()
    candidates = np.stack(seen[1::2])  # a restart calls the model for its step and for its result
    assert len(seen) == 6 and len(np.unique(candidates)) == candidates.size
    wrong, loss = candidates[:, :, 0, 0, 0] > 0.5, candidates[:, :, 0, 1, 0]
    best = np.argmax(np.where(wrong, 100.0, 0.0) + loss, axis=0)
    assert np.mean(best != loss.argmax(0)) > 0.1  # the two rules do disagree
    assert set(best) == {0, 1, 2}
    np.testing.assert_array_equal(x_adv, candidates[best, np.arange(60)])


def test_restarts_of_probabilities(network, labels, tiny_images):
    # What they move away from is the most probable class.
    one_hot = tf.one_hot(labels, 4)
    attack = WEAK.attack(num_restarts=2, num_steps=2)
    expected = attack(network, tiny_images, labels, seeds=seeds_of(range(8)))
    assert_alike(attack(network, tiny_images, one_hot, seeds=seeds_of(range(8))), expected)


def test_arrays_with_restarts(network, labels, tiny_images):
    attack = WEAK.attack(num_restarts=2, num_steps=1)
    expected = attack(network, tiny_images, labels, seeds=seeds_of(range(8)))
    assert_alike(attack(network, tiny_images.numpy(), labels.numpy(), seeds=seeds_of(range(8))), expected)


def test_no_gradient_flows_through_the_images(network, labels, tiny_images):
    for num_restarts in (1, 2):
        x = tf.identity(tiny_images)
        with tf.GradientTape() as tape:
            tape.watch(x)
            x_adv = WEAK.attack(num_restarts=num_restarts, num_steps=1)(network, x, labels, seeds=seeds_of(range(8)))
            total = tf.reduce_sum(x_adv)
        assert tape.gradient(total, x) is None


@pytest.mark.parametrize("num_restarts", [1, 2])
def test_batch_mode_leaves_the_moving_statistics(make_tiny_model, tiny_images, labels, num_restarts):
    model = make_tiny_model(statistics_group_size=4)
    attack = Case("Linf", "steepest", "cross_entropy", num_restarts, True).attack(num_steps=2)
    before = [v.numpy().copy() for v in model.non_trainable_variables]

    def run(mode):
        with batch_norm_mode(mode):
            return attack(lambda x: model(x, training=True), tiny_images, labels, seeds=seeds_of(range(8)))

    graph = tf.function(lambda: run("batch"), autograph=False)
    in_batch_mode = run("batch")
    assert_alike(graph(), in_batch_mode)
    for variable, value in zip(model.non_trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    # The mode does change the attack, and training=True without it does change the statistics.
    assert np.abs(run("moving") - in_batch_mode).max() > 0.01
    run("batch_and_update")
    assert np.abs(model.non_trainable_variables[0].numpy() - before[0]).max() > 1e-4


def test_float32_whatever_the_logits_are(network, labels, tiny_images):
    x_adv = WEAK.attack()(lambda x: tf.cast(network(x), tf.bfloat16), tiny_images, labels, seeds=seeds_of(range(8)))
    assert x_adv.dtype == tf.float32
    assert np.all(lengths(x_adv - tiny_images, "L2") <= RADII["L2"] * (1 + 1e-5))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 0}, "num_steps and num_restarts >= 1. Received: 0, 1"),
        ({"num_steps": -1}, "num_steps and num_restarts >= 1. Received: -1, 1"),
        ({"num_restarts": 0}, "num_steps and num_restarts >= 1. Received: 2, 0"),
        (
            {"num_restarts": 2, "random_start": False},
            "random_start=True .* Received: num_restarts=2, random_start=False",
        ),
        ({"step_size": 0}, "step_size > 0. Received: 0"),
        ({"step_size": "-2/255"}, "step_size > 0. Received: '-2/255'"),
        ({"step_size": "abc"}, "Expected step_size as a finite number .* Received: 'abc'"),
        ({"step_size": float("nan")}, "Expected step_size as a finite number .* Received: nan"),
    ],
)
def test_errors(arguments, message):
    valid = {"num_steps": 2, "step_size": 0.1, "loss_fn": losses.margin, "seeds": SEEDS}
    threat = threats.threat(norm="Linf", epsilon=0.1)
    with pytest.raises(ValueError, match=message):
        pgd(linear, GREY, [0, 0], threat=threat, **{**valid, **arguments})


# Attacks that are searches: they return misclassified images, and the clean ones where there are none.
SEARCHES = {
    "multi_targeted": (multi_targeted, "Linf", dict(num_steps=4, num_restarts=1, num_targets=2)),
    "multi_targeted-L2": (
        multi_targeted,
        "L2",
        dict(num_steps=4, num_restarts=1, num_targets=2, step_rule=step_rules.steepest(), step_size=0.2),
    ),
    "apgd-ce": (apgd, "Linf", dict(num_steps=5)),
    "apgd-dlr-L2": (apgd, "L2", dict(num_steps=5, loss_fn=losses.dlr)),
    "apgd-t": (apgd_targeted, "Linf", dict(num_steps=5, num_targets=2)),
    "apgd-ce-L1": (apgd, "L1", dict(num_steps=10, shrinking_radius=True)),
    "fab-L2": (fab, "L2", dict(num_steps=3, num_restarts=1)),
    "fab-t": (fab, "Linf", dict(num_steps=3, num_restarts=1, num_targets=2, targeted=True)),
    "square": (square, "Linf", dict(num_queries=60)),
}
SEARCH_RADII = {**RADII, "L1": 4.0}


@pytest.mark.parametrize("name", SEARCHES)
def test_searches(name, network, tiny_images, labels):
    attack, norm, settings = SEARCHES[name]
    epsilon = SEARCH_RADII[norm]
    attack = functools.partial(attack, network, threat=threats.threat(norm=norm, epsilon=epsilon), **settings)
    compiled = tf.function(lambda x, labels, seeds: attack(x, labels, seeds=seeds), autograph=False)
    x_adv = compiled(tiny_images, labels, seeds_of(range(8)))
    assert x_adv.shape == tiny_images.shape and x_adv.dtype == tf.float32
    distances = np.linalg.norm(
        np.reshape(x_adv - tiny_images, (8, -1)), {"Linf": np.inf, "L2": 2, "L1": 1}[norm], axis=1
    )
    assert np.all(distances <= epsilon * (1 + 1e-5))
    assert tf.reduce_min(x_adv) >= 0.0 and tf.reduce_max(x_adv) <= 1.0
    broken = np.argmax(network(x_adv), axis=-1) != labels.numpy()
    np.testing.assert_array_equal(broken, distances > 0)
    assert accuracy(network, x_adv, labels) <= 0.5
    np.testing.assert_array_equal(compiled(tiny_images, labels, seeds_of(range(8))), x_adv)
    # Other places and neighbours change nothing.
    indices = [5, 2, 5, 0, 7, 2, 1, 1]
    again = compiled(tf.gather(tiny_images, indices), tf.gather(labels, indices), seeds_of(indices))
    assert_alike(again, tf.gather(x_adv, indices))
    # Other seeds do, but for the attack that starts at the image itself and draws nothing.
    other = compiled(tiny_images, labels, seeds_of(range(8), run_seed=1))
    assert np.any(other != x_adv) == (not name.startswith("fab"))


@pytest.mark.parametrize("num_classes, num_targets", [(2, 1), (3, 2), (10, 9), (100, 9)])
def test_multi_targeted_takes_every_target_and_then_again(num_classes, num_targets):
    search = multi_targeted.search(threat=threats.threat(norm="Linf", epsilon=0.1), num_restarts=3)
    assert search.name == "multi-targeted" and search.num_runs(num_classes) == 3 * num_targets
    run = np.arange(3 * num_targets, dtype=np.int32)
    clean_logits = np.random.default_rng(0).normal(size=(len(run), num_classes)).astype(np.float32)
    labels = run % num_classes
    x = tf.fill((len(run), 2, 2, 3), 0.5)
    state = stepwise.begin(
        search, x, labels, tf.constant(clean_logits), seeds_of([0] * len(run)), tf.constant(run)
    ).state
    falling = [[c for c in row if c != label] for row, label in zip(np.argsort(-clean_logits), labels)]
    np.testing.assert_array_equal(state["target_classes"], [row[r % num_targets] for row, r in zip(falling, run)])
    assert len(np.unique(state["x_adv"], axis=0)) == len(run)


def test_multi_targeted_learning_rates():
    # .1, then .01 from half of the 200 steps and 1e-4 from three quarters, on one batch of examples at other steps.
    k = [0, 50, 99, 100, 149, 150, 199]
    x, labels = tf.fill((len(k), 2, 2, 3), 0.5), tf.zeros(len(k), tf.int32)
    settings = dict(threat=threats.threat(norm="Linf", epsilon=0.5), random_start=False, num_restarts=1)
    for step_rule in (step_rules.steepest(), None):
        search = multi_targeted.search(**settings, step_rule=step_rule)
        assert search.num_steps == 201  # 200 steps lead to 201 points
        state = search.start(x, labels, linear(x), seeds_of(range(len(k))), labels)
        state, x_adv, _ = search.step(linear, x, labels, state, tf.constant(k))
        np.testing.assert_array_equal(x_adv, x)
        moved = np.reshape(state["x_adv"] - x, (len(k), 12)) * UPHILL
        if step_rule:
            np.testing.assert_allclose(moved, np.outer([0.1, 0.1, 0.1, 0.01, 0.01, 1e-4, 1e-4], np.ones(12)), atol=1e-7)
        else:  # Adam's first step is one of signs too.
            np.testing.assert_allclose(moved[0], 0.1, atol=1e-6)
    search = multi_targeted.search(**settings, step_rule=step_rules.steepest(), num_steps=8, step_size="1/50")
    state = search.start(x, labels, linear(x), seeds_of(range(len(k))), labels)
    state, *_ = search.step(linear, x, labels, state, tf.zeros_like(labels))
    np.testing.assert_allclose(np.reshape(state["x_adv"] - x, (len(k), 12)) * UPHILL, 0.02, atol=1e-6)


@pytest.mark.parametrize("rule", [None, "steepest"])
def test_multi_targeted_walks_as_pgd_on_the_margin_of_its_target(rule, network, tiny_images, labels):
    threat, num_steps = threats.threat(norm="Linf", epsilon=0.06), 6
    step_rule = STEP_RULES[rule]() if rule else None
    search = multi_targeted.search(
        threat=threat, num_steps=num_steps, step_rule=step_rule, random_start=False, num_restarts=1
    )
    state = search.start(tiny_images, labels, network(tiny_images), seeds_of(range(8)), tf.fill((8,), 1))
    classes = state["target_classes"]
    points = []
    for k in range(search.num_steps):
        state, x_adv, broken = search.step(network, tiny_images, labels, state, tf.fill((8,), k))
        points.append(x_adv)
        np.testing.assert_array_equal(broken, np.argmax(network(x_adv), axis=-1) != labels)
    np.testing.assert_array_equal(points[0], tiny_images)
    run = functools.partial(
        pgd,
        network,
        tiny_images,
        labels,
        threat=threat,
        loss_fn=lambda logits, labels: losses.targeted_margin(logits, labels, classes),
        step_size=functools.partial(schedules.piecewise_constant, boundaries=(3, 4), values=(0.1, 0.01, 1e-4)),
        step_rule=step_rule or step_rules.adam(),
        seeds=seeds_of(range(8)),
        random_start=False,
    )
    for num in (1, 4, 6):
        assert_alike(points[num], run(num_steps=num))
    assert np.abs(points[4] - points[3]).max() > 1e-4


def test_multi_targeted_breaks_no_less_than_pgd(network):
    x = tf.constant(np.random.default_rng(5).random((64, 8, 8, 3)), tf.float32)
    labels = tf.argmax(network(x), axis=-1, output_type=tf.int32)
    threat = threats.threat(norm="Linf", epsilon=0.012)
    schedule = functools.partial(schedules.piecewise_constant, boundaries=(5, 7), values=(0.1, 0.01, 1e-4))
    both = dict(threat=threat, num_steps=10, step_rule=step_rules.steepest(), step_size=schedule, random_start=False)
    untargeted = pgd(network, x, labels, loss_fn=losses.margin, seeds=seeds_of(range(64)), **both)
    attack = functools.partial(multi_targeted, network, num_restarts=1, **both)
    targeted = tf.function(lambda: attack(x, labels, seeds=seeds_of(range(64))), autograph=False)()
    broken_by_pgd = np.argmax(network(untargeted), axis=-1) != labels.numpy()
    broken = np.argmax(network(targeted), axis=-1) != labels.numpy()
    assert 0 < broken_by_pgd.sum() < 64 and broken.sum() < 64
    assert broken.sum() >= broken_by_pgd.sum()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_steps": 0}, "num_steps, num_restarts and num_targets >= 1. Received: 0, 10, 9"),
        ({"num_restarts": 0}, "Received: 200, 0, 9"),
        ({"num_targets": 0}, "Received: 200, 10, 0"),
        ({"random_start": False}, "random_start=True .* Received: num_restarts=10, random_start=False"),
        ({"step_size": 0}, "step_size > 0. Received: 0"),
        ({"step_size": "abc"}, "Expected step_size as a finite number .* Received: 'abc'"),
    ],
)
def test_multi_targeted_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        multi_targeted.search(threat=threats.threat(norm="Linf", epsilon=0.1), **arguments)


def test_transfer_attacks_the_surrogate_and_asks_no_other():
    def untouchable(x):
        raise AssertionError("asked")

    asked = []

    def surrogate(x):
        asked.append(x)
        return linear(x)

    threat = threats.threat(norm="Linf", epsilon=0.1)
    attack = functools.partial(pgd, threat=threat, loss_fn=losses.margin, num_steps=2, step_size=0.01)
    x_adv = transfer.transfer(untouchable, GREY, [0, 1], threat=threat, surrogate=surrogate, attack=attack, seeds=SEEDS)
    assert len(asked) == 2
    # With these seeds too: the start is a random one.
    np.testing.assert_array_equal(x_adv, attack(linear, GREY, [0, 1], seeds=SEEDS))


# cleverhans, an implementation by other people.
ORDERS = {"Linf": np.inf, "L2": 2}


@pytest.fixture(scope="module")
def guesses(labels):
    """The model's labels, and two that are wrong."""
    return tf.tensor_scatter_nd_update(labels, [[0], [3]], (tf.gather(labels, [0, 3]) + 1) % 4)


@pytest.mark.parametrize("norm", RADII)
def test_one_step_is_cleverhans_fast_gradient_method(norm, network, guesses, tiny_images):
    epsilon = RADII[norm]
    expected = fast_gradient_method(
        network, tiny_images, epsilon, ORDERS[norm], clip_min=0.0, clip_max=1.0, y=guesses, sanity_checks=False
    )
    attack = Case(norm, "steepest", "cross_entropy", 1, False).attack(num_steps=1, step_size=epsilon)
    x_adv = attack(network, tiny_images, guesses, seeds=seeds_of(range(8)))
    assert lengths(expected - tiny_images, norm).min() > 0.5 * epsilon
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", RADII)
def test_many_steps_are_cleverhans_projected_gradient_descent(norm, network, guesses, tiny_images):
    epsilon, step_size = RADII[norm], RADII[norm] / 4
    # cleverhans clips to [0, 1] before it scales back to the L2 ball as well as after. Away from 0 and 1 that is the
    # same; its momentum method, below, clips only after.
    x = 0.2 + 0.6 * tiny_images if norm == "L2" else tiny_images
    expected = projected_gradient_descent(
        network,
        x,
        epsilon,
        step_size,
        7,
        ORDERS[norm],
        clip_min=0.0,
        clip_max=1.0,
        y=guesses,
        rand_init=False,
        sanity_checks=False,
    )
    attack = Case(norm, "steepest", "cross_entropy", 1, False).attack(num_steps=7, step_size=step_size)
    x_adv = attack(network, x, guesses, seeds=seeds_of(range(8)))
    assert lengths(expected - x, norm).min() > 0.5 * epsilon
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5)


def momentum(decay):
    """Gradients divided by their mean absolute value, accumulated (Dong et al. 2017): made of public parts."""

    def update(gradient, state, step, threat):
        (velocity,) = state
        scale = tf.reduce_mean(tf.abs(gradient), axis=[1, 2, 3], keepdims=True)
        velocity = decay * velocity + gradient / tf.maximum(scale, 1e-12)
        return threat.steepest_step(velocity), (velocity,)

    return step_rules.StepRule(f"momentum({decay})", lambda x: (tf.zeros_like(x),), update)


@pytest.mark.parametrize("norm", RADII)
def test_another_step_rule_is_cleverhans_momentum_iterative_method(norm, network, guesses, tiny_images):
    epsilon, step_size = RADII[norm], RADII[norm] / 4
    expected = momentum_iterative_method(
        network,
        tiny_images,
        eps=epsilon,
        eps_iter=step_size,
        nb_iter=7,
        norm=ORDERS[norm],
        clip_min=0.0,
        clip_max=1.0,
        y=guesses,
        decay_factor=0.9,
        sanity_checks=False,
    )
    attack = Case(norm, "steepest", "cross_entropy", 1, False).attack(num_steps=7, step_size=step_size)
    x_adv = attack(network, tiny_images, guesses, seeds=seeds_of(range(8)), step_rule=momentum(0.9))
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5)
    # It is not what plain steps give.
    assert np.abs(attack(network, tiny_images, guesses, seeds=seeds_of(range(8))) - expected).max() > 1e-3
