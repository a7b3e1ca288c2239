import functools
import importlib
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from smooth_networks import pictures, predictions, seeds_of, smooth_network

from robust_keras import losses, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.apgd import apgd, apgd_targeted

NORMS = ("Linf", "L2", "L1")
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}
# Radii at which some of the examples below break.
RADII = {"Linf": 0.05, "L2": 0.7, "L1": 6.0}
RECORDED = dict(np.load(pathlib.Path(__file__).parent.parent / "oracles" / "apgd.npz"))


def lengths(delta, norm):
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), ORDERS[norm], axis=1)


def constant_network(x):
    """Of which no loss ever rises."""
    return tf.tile(tf.constant([[1.0, 0.0, 0.5, -1.0]]), (tf.shape(x)[0], 1)) + 0.0 * tf.reduce_sum(x)


class Case(NamedTuple):
    """One row of the table: norm, loss, and whether the radius shrinks."""

    norm: str
    loss: str = "ce"
    shrinking: bool = False

    def __str__(self):
        return f"{self.norm}-{self.loss}{'-shrinking' if self.shrinking else ''}"

    def search(self, epsilon=None, **settings):
        settings |= dict(threat=threats.threat(norm=self.norm, epsilon=epsilon or RADII[self.norm]))
        settings |= dict(shrinking_radius=True) if self.shrinking else {}
        if self.loss == "t":
            return apgd_targeted.search(**settings)
        return apgd.search(loss_fn=losses.dlr if self.loss == "dlr" else losses.cross_entropy, **settings)


# --- Against upstream's attack


def recorded_network(x):
    hidden = (tf.reshape(x, (tf.shape(x)[0], -1)) - 0.5) @ RECORDED["network/hidden"]
    return tf.tanh(hidden + RECORDED["network/hidden_bias"]) @ RECORDED["network/output"]


@pytest.mark.parametrize(
    "name, case, num_steps, goes_back",
    [
        ("Linf/ce", Case("Linf"), 30, False),
        ("L2/ce", Case("L2"), 30, True),
        ("L1/ce", Case("L1"), 50, False),
        ("Linf/dlr", Case("Linf", "dlr"), 30, True),
        ("Linf/dlr-targeted", Case("Linf", "t"), 30, False),
        ("L1/ce-shrinking", Case("L1", shrinking=True), 30, False),
    ],
)
def test_trajectory_agrees_with_upstream(name, case, num_steps, goes_back, monkeypatch):
    drawn = tf.constant(RECORDED[f"noise/{case.norm}"])
    norms = importlib.import_module("robust_keras.attacks.apgd")._NORMS
    monkeypatch.setitem(norms, case.norm, norms[case.norm]._replace(draw=lambda seeds, shape: drawn))
    x, labels = tf.constant(RECORDED["images"]), tf.constant(RECORDED["labels"])
    points, wrong = RECORDED[f"{name}/points"], RECORDED[f"{name}/wrong"]
    epsilon = float(RECORDED[f"epsilon/{case.norm}"])
    search = case.search(epsilon, num_steps=num_steps, num_restarts=2)
    assert search.num_steps == len(points)
    # The targeted record aims at the second target; this is its second restart.
    run = tf.fill(labels.shape, 3 if case.loss == "t" else 1)
    progress = stepwise.begin(search, x, labels, recorded_network(x), seeds_of(range(len(labels))), run)
    step = tf.function(functools.partial(search.step, recorded_network), autograph=False)
    state, went_back = progress.state, []
    for k in range(search.num_steps):
        state, x_adv, broken = step(x, labels, state, progress.k + k)
        np.testing.assert_allclose(x_adv, points[k], rtol=0, atol=1e-5, err_msg=f"step {k}")
        # With the larger radii, only the points of the last one count.
        expected = wrong[k] if not case.shrinking or k >= 20 else np.zeros_like(wrong[k])
        np.testing.assert_array_equal(broken, expected)
        went_back.append(np.any(np.abs(state["x_adv"] - x_adv) > 1e-4, axis=(1, 2, 3)))
    # The record tells right from wrong: steps are halved (in L1: divided by 1.5), some break, and not at once.
    first = {"Linf": 2.0, "L2": 2.0, "L1": 1.0}[case.norm] * epsilon
    assert np.all(state["step_size"] < 0.99 * first)
    assert np.any(wrong) and not np.all(wrong)
    assert np.any(went_back) == goes_back, np.sum(went_back, axis=0)


# --- When what is done


def checkpoints(search, network=constant_network):
    """The k after which step sizes are adapted: all at once, one example for each."""
    num = search.num_steps
    x, k = pictures((4, 4, 3), 1), tf.range(num)
    x, labels = tf.tile(x, (num, 1, 1, 1)), tf.zeros(num, tf.int32)
    state = search.start(x, labels, network(x), seeds_of(range(num)), tf.zeros(num, tf.int32))
    # What a checkpoint replaces, in every norm; a start does too.
    marked = "num_changed" if "num_changed" in state else "step_size"
    state[marked] = tf.fill((num,), 12345.0)
    # No step has raised this loss.
    state |= {key: tf.fill((num,), 100.0) for key in ("loss", "loss_best", "loss_best_at_checkpoint")}
    state, *_ = search.step(network, x, labels, state, k)
    return [int(i) for i in np.flatnonzero(state[marked] != 12345.0)]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_checkpoints_of_a_hundred_steps(norm):
    # p_{j+1} = p_j + max(p_j - p_{j-1} - .03, .06), p_1 = .22 (Croce & Hein 2020, section 3.1), times 100.
    assert checkpoints(Case(norm).search(num_steps=100)) == [0, 22, 41, 57, 70, 80, 87, 93, 99]


def test_checkpoints_of_other_numbers_of_steps():
    assert checkpoints(Case("Linf").search(num_steps=1)) == [0, 1]
    assert checkpoints(Case("Linf").search(num_steps=10)) == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert checkpoints(Case("L1").search(num_steps=100)) == [0, *range(4, 101, 4)]


def test_the_radius_shrinks_after_three_and_six_tenths():
    # 30, 30 and 40 steps, each with a start of its own.
    search = Case("L1", shrinking=True).search(num_steps=100)
    assert search.num_steps == 103
    # Three tenths are rounded up: 4, 4 and 3.
    search = Case("L1", shrinking=True).search(num_steps=11, epsilon=1.0)
    network, x = smooth_network((4, 4, 3), 4), pictures((4, 4, 3), 4)
    labels = predictions(network, x)
    state = search.start(x, labels, network(x), seeds_of(range(4)), tf.zeros(4, tf.int32))
    step = tf.function(functools.partial(search.step, network), autograph=False)
    furthest = []
    for k in range(search.num_steps):
        state, x_adv, broken = step(x, labels, state, tf.fill((4,), k))
        furthest.append(lengths(x_adv - x, "L1").max())
        # Within the larger radii nothing counts.
        np.testing.assert_array_equal(broken, (predictions(network, x_adv) != labels) & (k >= 10))
    assert np.any(broken)
    np.testing.assert_allclose(furthest, [3.0] * 5 + [2.0] * 5 + [1.0] * 4, rtol=0.02)


def test_a_step_is_halved_where_the_loss_rises_too_seldom_or_has_stalled():
    # At the first checkpoint of 100 steps: 22 steps, three quarters of which are 16.5. The model's loss does not rise.
    x, labels = pictures((4, 4, 3), 4), tf.zeros(4, tf.int32)
    search = Case("L2").search(num_steps=100, epsilon=1.0)
    state = search.start(x, labels, constant_network(x), seeds_of(range(4)), tf.zeros(4, tf.int32))
    best = tf.fill((4,), 7.0)  # higher than its loss
    state |= dict(
        step_size=tf.fill((4,), 2.0),
        num_rises=tf.constant([16.0, 17.0, 17.0, 17.0]),
        loss_best=best,
        loss_best_at_checkpoint=best - [1.0, 1.0, 0.0, 0.0],
        was_reduced=tf.constant([False, False, False, True]),
        loss=best,
        x_best=1.0 - x,
        gradient_best=x,
    )
    following, x_adv, _ = search.step(constant_network, x, labels, dict(state), tf.fill((4,), 22))
    np.testing.assert_array_equal(following["step_size"], [1.0, 2.0, 1.0, 2.0])
    np.testing.assert_array_equal(following["num_rises"], [0.0] * 4)
    np.testing.assert_array_equal(following["was_reduced"], [True, False, True, False])
    np.testing.assert_array_equal(following["loss_best_at_checkpoint"], best)
    # Where it is, the next step leaves from the best point.
    for key, given, moved in (("x_adv", 1.0 - x, x_adv), ("gradient", x, tf.zeros_like(x))):
        expected = tf.where(tf.constant([True, False, True, False])[:, None, None, None], given, moved)
        np.testing.assert_array_equal(following[key], expected)
    # Another share of steps that must rise.
    search = Case("L2").search(num_steps=100, epsilon=1.0, rho=0.5)
    state |= dict(num_rises=tf.constant([11.0, 12.0, 12.0, 12.0]))
    following, *_ = search.step(constant_network, x, labels, dict(state), tf.fill((4,), 22))
    np.testing.assert_array_equal(following["step_size"], [1.0, 2.0, 1.0, 2.0])
    # Not a checkpoint.
    following, *_ = search.step(constant_network, x, labels, dict(state), tf.fill((4,), 21))
    np.testing.assert_array_equal(following["step_size"], [2.0] * 4)


def test_l1_steps_follow_the_sparsity_of_the_best_point():
    # At the first checkpoint of 100 steps, with a best point that differs in 6 of 48 pixels.
    x, labels = tf.fill((4, 4, 4, 3), 0.5), tf.zeros(4, tf.int32)
    search = Case("L1").search(num_steps=100, epsilon=3.0)
    state = search.start(x, labels, constant_network(x), seeds_of(range(4)), tf.zeros(4, tf.int32))
    x_best = tf.reshape(0.5 + 0.25 * tf.cast(tf.range(48) < 6, tf.float32), (1, 4, 4, 3))
    state |= dict(
        x_adv=x,
        x_best=tf.tile(x_best, (4, 1, 1, 1)),
        gradient_best=x,
        loss_best=tf.fill((4,), 7.0),  # higher than the model's
        step_size=tf.constant([1.5, 1.5, 0.4, 3.0]),
        num_changed=tf.constant([10.0, 6.3, 6.0, 6.4]),
    )
    following, x_adv, _ = search.step(constant_network, x, labels, dict(state), tf.fill((4,), 4))
    np.testing.assert_array_equal(x_adv, x)
    # Under 95 % of the last count: as large a step as the first, from the best point; else less, a tenth of it at least.
    np.testing.assert_allclose(following["step_size"], [3.0, 1.0, 0.3, 3.0], rtol=1e-6)
    went_back = np.any(following["x_adv"] != x, axis=(1, 2, 3))
    np.testing.assert_array_equal(went_back, [True, False, False, True])
    np.testing.assert_array_equal(following["gradient"], np.where(went_back[:, None, None, None], x, 0.0))
    np.testing.assert_array_equal(following["num_changed"], [6.0] * 4)
    np.testing.assert_allclose(following["share"], 6 / 48 / 1.5, rtol=1e-6)


# --- Runs


def test_names():
    assert Case("Linf").search().name == "apgd-ce"
    assert Case("Linf", "dlr").search().name == "apgd-dlr"
    assert Case("Linf", "t").search().name == "apgd-t"
    bound = functools.partial(losses.dlr)  # as gin binds it
    assert apgd.search(threat=threats.threat(norm="L2", epsilon=1), loss_fn=bound).name == "apgd-dlr"


@pytest.mark.parametrize("num_classes, num_targets", [(2, 1), (3, 2), (10, 9), (100, 9)])
def test_runs_are_restarts_of_one_target_after_another(num_classes, num_targets):
    untargeted, targeted = (Case("Linf", loss).search(num_restarts=3) for loss in ("ce", "t"))
    assert untargeted.num_runs(num_classes) == 3
    assert targeted.num_runs(num_classes) == 3 * num_targets
    assert Case("Linf", "t").search(num_targets=5).num_runs(num_classes) == min(num_targets, 5)
    run = np.arange(3 * num_targets)
    x = tf.tile(pictures((3, 2, 1), 1), (len(run), 1, 1, 1))
    clean_logits = np.random.default_rng(0).normal(size=(len(run), num_classes)).astype(np.float32)
    labels = np.arange(len(run)) % num_classes
    begun = stepwise.begin(
        targeted,
        x,
        tf.constant(labels, tf.int32),
        tf.constant(clean_logits),
        seeds_of([0] * len(run)),
        tf.constant(run, tf.int32),
    )
    falling = [[c for c in row if c != label] for row, label in zip(np.argsort(-clean_logits), labels)]
    expected = [row[r // 3] for row, r in zip(falling, run)]
    np.testing.assert_array_equal(begun.state["target_classes"], expected)
    # Every run starts elsewhere.
    assert len(np.unique(begun.state["x_adv"], axis=0)) == len(run)


@pytest.mark.parametrize("norm", NORMS)
def test_starts_at_the_border_of_the_ball(norm):
    x = tf.fill((20, 6, 5, 3), 0.5)
    epsilon = {"Linf": 0.1, "L2": 0.5, "L1": 2.0}[norm]
    search = Case(norm).search(epsilon)
    zeros = tf.zeros(20, tf.int32)
    start = search.start(x, zeros, tf.zeros((20, 4)), seeds_of(range(20)), zeros)["x_adv"] - x
    np.testing.assert_allclose(lengths(start, norm), epsilon, rtol=1e-4)
    assert abs(np.mean(np.sign(start))) < 0.2 and len(np.unique(start, axis=0)) == 20
    shape = {"Linf": 0.5, "L2": 0.8, "L1": None}[norm]  # mean size over largest or root of mean square
    if shape:
        mean = np.abs(start).mean((1, 2, 3)) / (
            np.abs(start).max((1, 2, 3)) if norm == "Linf" else start.numpy().std((1, 2, 3))
        )
        np.testing.assert_allclose(mean.mean(), shape, atol=0.03)
    else:  # few pixels: those of the largest noise
        assert np.mean(np.abs(start) > 1e-4) < 0.3


def test_gradients_are_averaged_over_draws():
    weights = np.random.default_rng(0).normal(size=(4, 48)).astype(np.float32)
    calls = []

    def network(x):  # Each call has weights of its own.
        calls.append(len(calls))
        first = tf.linalg.matvec(tf.reshape(x, (-1, 48)), weights[calls[-1] % 4])
        return tf.stack([tf.zeros_like(first), first + calls[-1], tf.zeros_like(first) - 100.0], axis=1)

    x, labels = pictures((4, 4, 3), 3), tf.zeros(3, tf.int32)
    threat = threats.threat(norm="L2", epsilon=0.1)
    for eot_steps in (1, 4):
        search = apgd.search(threat=threat, loss_fn=losses.margin, eot_steps=eot_steps)
        state = search.start(x, labels, tf.zeros((3, 3)), seeds_of(range(3)), labels)
        calls.clear()
        state, x_adv, broken = search.step(network, x, labels, state, labels)
        assert len(calls) == eot_steps
        expected = np.mean(weights[:eot_steps], axis=0)
        np.testing.assert_allclose(np.reshape(state["gradient"], (3, 48)), [expected] * 3, atol=1e-5)
        # Loss and verdict are those of the last draw.
        last = np.reshape(x_adv, (3, 48)) @ weights[eot_steps - 1] + eot_steps - 1
        np.testing.assert_allclose(state["loss_best"], last, atol=1e-4)
        np.testing.assert_array_equal(broken, last > 0)


CASES = [Case("Linf"), Case("L2", "t"), Case("L1", shrinking=True)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_examples_at_other_steps_and_runs_change_nothing(case):
    network, x = smooth_network((6, 5, 3), 6), pictures((6, 5, 3), 8)
    labels, run = predictions(network, x), tf.constant([0, 1, 1, 0, 1, 0, 3, 2] if case.loss == "t" else [0, 1] * 4)
    search = case.search(num_steps=10, num_restarts=2)
    state = stepwise.begin(search, x, labels, network(x), seeds_of(range(8)), run).state
    step = tf.function(functools.partial(search.step, network), autograph=False)
    states, images, verdicts = [state], [], []
    for k in range(search.num_steps):
        state, x_adv, broken = step(x, labels, states[-1], tf.fill((8,), k))
        states.append(state), images.append(x_adv), verdicts.append(broken)
    assert np.any(verdicts)
    # Each example at a step of its own.
    own = [0, 9, 3, 10, 1, 5, 6, 10]

    def at(values, shift=0):
        return tf.stack([values[k + shift][i] for i, k in enumerate(own)])

    mixed = {key: at([state[key] for state in states]) for key in state}
    following, x_adv, broken = step(x, labels, mixed, tf.constant(own))
    np.testing.assert_allclose(x_adv, at(images), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(broken, at(verdicts))
    for key, values in following.items():
        np.testing.assert_allclose(values, at([state[key] for state in states], 1), rtol=1e-5, atol=1e-5, err_msg=key)
    # And alone, or next to nothing but itself.
    for i in (2, 6):
        copies = {key: tf.repeat(values[i : i + 1], 8, axis=0) for key, values in mixed.items()}
        same = [tf.repeat(values[i : i + 1], 8, axis=0) for values in (x, labels)]
        _, x_adv, _ = step(*same, copies, tf.fill((8,), own[i]))
        np.testing.assert_allclose(x_adv, tf.repeat(images[own[i]][i : i + 1], 8, axis=0), rtol=0, atol=1e-6)


# --- As an attack

SIZES = [
    (Case("Linf"), (28, 28, 1), 10),
    (Case("L2", "dlr"), (40, 24, 3), 2),
    (Case("L1", "t", True), (28, 28, 1), 100),
    (Case("Linf", "t"), (40, 24, 3), 3),
]


@pytest.mark.parametrize("case, shape, num_classes", SIZES, ids=str)
def test_breaks_within_the_ball_and_the_range(case, shape, num_classes):
    network, x = smooth_network(shape, num_classes), pictures(shape, 8)
    labels = predictions(network, x)
    # The last two are misclassified from the beginning.
    labels = tf.where(tf.range(8) < 6, labels, (labels + 1) % num_classes)
    attack = (
        apgd_targeted
        if case.loss == "t"
        else functools.partial(apgd, loss_fn=losses.dlr if case.loss == "dlr" else losses.cross_entropy)
    )
    attack = functools.partial(attack, num_steps=6, num_restarts=2, shrinking_radius=case.shrinking)
    attack = functools.partial(attack, **(dict(num_targets=2) if case.loss == "t" else {}))
    threat = threats.threat(norm=case.norm, epsilon=RADII[case.norm])

    @functools.partial(tf.function, autograph=False)
    def run(x, seeds):
        return attack(network, x, labels, threat=threat, seeds=seeds)

    x_adv = run(x, seeds_of(range(8))).numpy()
    assert x_adv.shape == x.shape and x_adv.dtype == np.float32
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    distance, wrong = lengths(x_adv - x, case.norm), np.array(predictions(network, x_adv) != labels)
    assert np.all(distance <= threat.epsilon * (1 + 1e-5))
    np.testing.assert_array_equal(wrong[:6], distance[:6] > 0)
    assert wrong[:6].any()
    np.testing.assert_array_equal(x_adv[6:], x[6:])
    # It follows the seed.
    np.testing.assert_array_equal(run(x, seeds_of(range(8))), x_adv)
    assert np.abs(run(x, seeds_of(range(8), run_seed=1)) - x_adv).max() > 1e-3


def test_a_batch_of_nothing_but_mistakes():
    network, x = smooth_network((4, 4, 3), 4), pictures((4, 4, 3), 3)
    labels = (predictions(network, x) + 1) % 4
    threat = threats.threat(norm="L2", epsilon=1.0)
    for attack in (apgd, apgd_targeted):
        x_adv = attack(network, x, labels, threat=threat, num_steps=1, seeds=seeds_of(range(3)))
        np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_compiled_by_xla(case):
    network, x = smooth_network((6, 5, 3), 6), pictures((6, 5, 3), 4)
    labels = predictions(network, x)
    search = case.search(num_steps=8)
    begun = stepwise.begin(search, x, labels, network(x), seeds_of(range(4)), tf.zeros_like(labels)).state
    step = functools.partial(search.step, network)
    plain, compiled = (tf.function(step, jit_compile=jit, autograph=False) for jit in (None, True))
    states = [begun, begun]
    for k in range(5):
        results = [run(x, labels, state, tf.fill((4,), k)) for run, state in zip((plain, compiled), states)]
        states = [result[0] for result in results]
        np.testing.assert_allclose(results[1][1], results[0][1], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(results[1][2], results[0][2])
    assert np.abs(results[0][1] - begun["x_adv"]).max() > 0.01
    # Bounded shapes, which TPUs refuse or pad, are written <=.
    hlo = compiled.experimental_get_compiler_ir(x, labels, begun, tf.fill((4,), 0))(stage="optimized_hlo")
    assert "fusion" in hlo and "<=" not in hlo and "set-dimension-size" not in hlo


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "num_steps, num_restarts and eot_steps >= 1. Received: 0, 1, 1"),
        (dict(num_restarts=0), "Received: 100, 0, 1"),
        (dict(eot_steps=-1), "Received: 100, 1, -1"),
        (dict(shrinking_radius=True), "Expected the norm L1 with shrinking_radius. Received: Linf"),
        (dict(shrinking_radius=True, threat=threats.threat(norm="L2", epsilon=1)), "shrinking_radius. Received: L2"),
        (
            dict(shrinking_radius=True, threat=threats.threat(norm="L1", epsilon=1), num_steps=2),
            "num_steps >= 3 with shrinking_radius. Received: 2",
        ),
    ],
)
@pytest.mark.parametrize("attack", [apgd, apgd_targeted])
def test_refuses(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        attack.search(**{**dict(threat=threats.threat(norm="Linf", epsilon=0.1)), **settings})


@pytest.mark.parametrize("num_targets", [0, -1])
def test_refuses_no_targets(num_targets):
    with pytest.raises(ValueError, match=f"num_targets.* Received: .*{num_targets}"):
        apgd_targeted.search(threat=threats.threat(norm="Linf", epsilon=0.1), num_targets=num_targets)
