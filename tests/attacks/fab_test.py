import functools
import importlib
import math
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from smooth_networks import pictures, predictions, seeds_of, smooth_network

from robust_keras import threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.fab import fab, project

NORMS = ("Linf", "L2", "L1")
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}
RECORDED = dict(np.load(pathlib.Path(__file__).parent.parent / "oracles" / "fab.npz"))


class Ball(NamedTuple):
    """As much of a threat model as the attack needs."""

    norm: str
    epsilon: float

    def distance(self, x_adv, x):
        return tf.norm(tf.reshape(x_adv - x, (tf.shape(x)[0], -1)), ord=ORDERS[self.norm], axis=-1)


def lengths(delta, norm):
    return np.linalg.norm(np.reshape(delta, (len(delta), -1)), ORDERS[norm], axis=1)


# Of images, labels and seeds.
SIGNATURE = [tf.TensorSpec((None, 8, 8, 3)), tf.TensorSpec((None,), tf.int32), tf.TensorSpec((None, 2), tf.int32)]
# Radii at which some of the examples below break and some do not.
RADII = {"Linf": 0.02, "L2": 0.3, "L1": 1.5}


# --- Projections


def recorded_hyperplanes(dimension):
    points, weights, offset = (RECORDED[f"projection/{dimension}/{key}"] for key in ("points", "weights", "offset"))
    gap = (weights.astype(np.float64) * points).sum(axis=1) - offset
    return points, weights, gap


def moves_of(points, weights, gap, norm):
    gap = tf.constant(np.reshape(gap, (-1,) + (1,) * (points.ndim - 1)), tf.float32)
    return project(tf.constant(points, tf.float32), tf.constant(weights, tf.float32), gap, norm).numpy()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimension", [27, 192])
def test_projections_agree_with_upstream(norm, dimension):
    points, weights, gap = recorded_hyperplanes(dimension)
    moves = moves_of(points, weights, gap, norm)
    np.testing.assert_allclose(moves, RECORDED[f"projection/{dimension}/{norm}"], rtol=0, atol=1e-5)
    # The same as images, but for the order in which XLA adds.
    shape = (len(points), dimension // 3, 1, 3)
    as_images = moves_of(points.reshape(shape), weights.reshape(shape), gap, norm)
    np.testing.assert_allclose(as_images.reshape(moves.shape), moves, rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimension", [27, 192])
def test_projections_reach_the_hyperplane_inside_the_box(norm, dimension):
    points, weights, gap = recorded_hyperplanes(dimension)
    moves = moves_of(points, weights, gap, norm).astype(np.float64)
    assert np.all(points + moves >= -1e-7) and np.all(points + moves <= 1 + 1e-7)
    left = gap + (weights.astype(np.float64) * moves).sum(axis=1)
    beyond = np.arange(len(points)) % 5 == 2
    assert np.all(np.abs(left)[~beyond] < 1e-6 * np.abs(weights).sum(axis=1)[~beyond])
    # Beyond the box: as far as it goes, without crossing.
    assert np.all((left * np.sign(gap))[beyond] > 0)
    corner = (points + moves)[beyond]
    assert np.all(np.minimum(corner, 1 - corner) < 1e-7)
    still = np.abs(weights) <= (0.0 if norm == "Linf" else 1e-8)
    assert still.any() and np.all(moves[still] == 0)


# The second entry has room for 0.1, the first for 0.5, the third for 1.
@pytest.mark.parametrize(
    "norm, gap, expected",
    [
        ("Linf", 0.63, [-0.09, -0.09, -0.09]),
        ("Linf", 1.6, [-0.28, -0.1, -0.28]),  # 1.6 - 2 * 0.1, over 4 + 1
        ("Linf", 2.9, [-0.5, -0.1, -0.7]),
        ("L2", 0.84, [-0.16, -0.08, -0.04]),  # 0.84 / (16 + 4 + 1) is 0.04
        ("L2", 1.6, [-4 * 1.4 / 17, -0.1, -1.4 / 17]),
        ("L1", 1.6, [-0.4, 0.0, 0.0]),
        ("L1", 2.1, [-0.5, -0.05, 0.0]),
        ("L1", 3.3, [-0.5, -0.1, -1.0]),
    ],
)
def test_projections_by_hand(norm, gap, expected):
    points, weights = np.array([[0.5, 0.1, 1.0]]), np.array([[4.0, 2.0, 1.0]])
    np.testing.assert_allclose(moves_of(points, weights, [gap], norm), [expected], atol=1e-6)
    # The same the other way up, and with other signs.
    np.testing.assert_allclose(-moves_of(1 - points, weights, [-gap], norm), [expected], atol=1e-6)
    np.testing.assert_allclose(-moves_of(1 - points, -weights, [gap], norm), [expected], atol=1e-6)


def test_l1_shares_among_equals():
    points, weights = np.array([[0.5, 0.2, 0.8, 0.9]]), np.array([[2.0, 1.0, 1.0, 0.5]])
    # 1 from the first, 0.5 of the 1 that the next two have, nothing from the last.
    np.testing.assert_allclose(moves_of(points, weights, [1.5], "L1"), [[-0.5, -0.1, -0.4, 0.0]], atol=1e-6)
    # Exactly at the edge, and nowhere to go.
    np.testing.assert_allclose(moves_of(points, weights, [1.0], "L1"), [[-0.5, 0.0, 0.0, 0.0]], atol=1e-6)


@pytest.mark.parametrize("norm, expected", [("Linf", -0.5), ("L2", 0.0), ("L1", 0.0)])
def test_tiny_weights_move_in_linf_alone(norm, expected):
    moves = moves_of(np.array([[0.5, 0.5, 0.5]]), np.array([[1.0, 1e-9, 0.0]]), [2.0], norm)
    np.testing.assert_array_equal(moves, [[-0.5, expected, 0.0]])


@pytest.mark.parametrize("norm", NORMS)
def test_nothing_moves_without_gap_or_weights(norm):
    points = np.array([[0.5, 0.0, 1.0], [0.5, 0.0, 1.0]])
    np.testing.assert_array_equal(
        moves_of(points, np.array([[1.0, -2.0, 0.0], [0, 0, 0]]), [0.0, 1.0], norm), 0 * points
    )


# --- Against upstream's attack


def recorded_network(x):
    hidden = (tf.reshape(x, (tf.shape(x)[0], -1)) - 0.5) @ RECORDED["network/hidden"]
    return tf.tanh(hidden + RECORDED["network/hidden_bias"]) @ RECORDED["network/output"]


@pytest.mark.parametrize("start", ["start", "random"])
@pytest.mark.parametrize("name", ["fab", "fab-t"])
@pytest.mark.parametrize("norm", NORMS)
def test_trajectory_agrees_with_upstream(norm, name, start, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("robust_keras.attacks.fab"),
        "start_noise",
        lambda seeds, shape, norm: tf.constant(RECORDED[f"noise/{norm}"]),
    )
    x, labels = tf.constant(RECORDED["images"][:-1]), tf.constant(RECORDED["labels"][:-1])
    epsilon = float(RECORDED[f"epsilon/{norm}"])
    recorded = {key: RECORDED[f"{norm}/{name}/{start}/{key}"] for key in ("images", "wrong", "distance")}
    search = fab.search(threat=Ball(norm, epsilon), targeted=name == "fab-t", num_restarts=5)
    assert search.name == name and search.num_runs(5) == (20 if name == "fab-t" else 5)
    # The second target, in the first or third restart.
    run = tf.fill((5,), (5 if name == "fab-t" else 0) + (2 if start == "random" else 0))
    progress = stepwise.begin(search, x, labels, recorded_network(x), seeds_of(range(5)), run)
    step = tf.function(functools.partial(search.step, recorded_network), autograph=False)
    state, broken = progress.state, np.zeros(5, bool)
    for k in range(20):
        state, x_adv, now = step(x, labels, state, progress.k + k)
        broken |= now.numpy()
        assert np.all(lengths(x_adv - x, norm) <= epsilon * (1 + 1e-6))
        assert np.all(now | (lengths(x_adv - x, norm) == 0))
        if k + 1 in (1, 2, 5, 20):
            proposed = recorded["images"][(1, 2, 5, 20).index(k + 1)]
            wrong = recorded["wrong"][k][:, None, None, None]
            expected = np.where(wrong, x + 0.9 * (proposed - x), proposed)
            np.testing.assert_allclose(state["image"], expected, rtol=0, atol=1e-5)
            within = recorded["wrong"][k] & (lengths(proposed - x, norm) <= epsilon)
            np.testing.assert_array_equal(now, within)
            np.testing.assert_allclose(x_adv[within], proposed[within], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(broken, recorded["distance"] <= epsilon)
    assert broken.any() and not broken.all()


@pytest.mark.parametrize("norm, targeted", [("Linf", True), ("L2", False), ("L1", True)])
def test_verdicts_agree_with_upstream(norm, targeted):
    x, labels = tf.constant(RECORDED["images"]), tf.constant(RECORDED["labels"])
    epsilon = float(RECORDED[f"epsilon/{norm}"])
    attack = functools.partial(fab, threat=Ball(norm, epsilon), num_steps=20, num_restarts=1, targeted=targeted)
    x_adv = tf.function(lambda x: attack(recorded_network, x, labels, seeds=seeds_of(range(6))))(x)
    # Some target class is the nearest one's, so that the untargeted record serves for both.
    expected = np.append(RECORDED[f"{norm}/fab/start/distance"] <= epsilon, True)
    np.testing.assert_array_equal(predictions(recorded_network, x_adv) != labels, expected)
    np.testing.assert_array_equal(lengths(x_adv - x, norm) > 0, np.append(expected[:-1], False))


# --- As an attack


class Case(NamedTuple):
    norm: str
    targeted: bool
    shape: tuple = (8, 8, 3)
    num_classes: int = 10

    def __str__(self):
        kind = "fab-t" if self.targeted else "fab"
        return f"{self.norm}-{kind}-{'x'.join(map(str, self.shape))}-{self.num_classes}"

    def attack(self, network, jit_compile=None, **kwargs):
        """`(x, labels, seeds, epsilon) -> x_adv`, for any batch where it is not compiled."""
        settings = dict(targeted=self.targeted, num_steps=4, num_restarts=2, num_targets=2) | kwargs

        @functools.partial(tf.function, jit_compile=jit_compile, autograph=False, reduce_retracing=True)
        def run(x, labels, seeds, epsilon):
            return fab(network, x, labels, threat=Ball(self.norm, epsilon), seeds=seeds, **settings)

        return lambda x, labels, seeds, epsilon=RADII[self.norm]: run(x, labels, seeds, tf.constant(epsilon)).numpy()


CASES = [Case(norm, targeted) for norm in NORMS for targeted in (False, True)]
SIZES = [
    Case("Linf", True, num_classes=2),
    Case("L2", True, num_classes=3),
    Case("L1", True, num_classes=100),
    Case("Linf", False, num_classes=2),
    Case("L1", False, num_classes=3),
    Case("L2", False, num_classes=100),
    Case("Linf", False, (40, 24, 3)),
    Case("L2", True, (40, 24, 3)),
    Case("L1", False, (28, 28, 1)),
    Case("Linf", True, (28, 28, 1)),
]


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_breaks_within_the_ball_and_the_range(case):
    network, x = smooth_network(case.shape, case.num_classes), pictures(case.shape, 8)
    labels = predictions(network, x)
    attack = case.attack(network)
    x_adv = attack(x, labels, seeds_of(range(8)))
    assert x_adv.shape == x.shape and x_adv.dtype == np.float32
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    distance, wrong = lengths(x_adv - x, case.norm), np.array(predictions(network, x_adv) != labels)
    assert np.all(distance <= RADII[case.norm] * (1 + 1e-6))
    np.testing.assert_array_equal(wrong, distance > 0)
    assert 0 < wrong.sum()
    # With no radius worth the name nothing breaks, and with all the box there is everything does.
    np.testing.assert_array_equal(attack(x, labels, seeds_of(range(8)), epsilon=1e-6), x)
    far = attack(x, labels, seeds_of(range(8)), epsilon=1e6)
    assert np.all(predictions(network, far) != labels)
    # It looks for the nearest: a few per cent of the box's diagonal.
    assert np.median(lengths(far - x, "L2")) < 0.1 * math.prod(case.shape) ** 0.5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_follows_the_seed_and_nothing_else(case):
    network, x = smooth_network(case.shape, case.num_classes), pictures(case.shape, 8)
    labels, indices = predictions(network, x), [5, 2, 5, 0]
    search = fab.search(threat=Ball(case.norm, RADII[case.norm]), targeted=case.targeted, num_restarts=2)

    # Traced once: the same program for either batch.
    @functools.partial(tf.function, autograph=False, input_signature=[*SIGNATURE, tf.TensorSpec((None,), tf.int32)])
    def walk(x, labels, seeds, run):
        progress = stepwise.begin(search, x, labels, network(x), seeds, run)
        return stepwise.advance(search, network, x, labels, progress, 4).state["image"]

    def images(indices, run_seed=0, run=3 if case.targeted else 1):
        runs = tf.fill((len(indices),), run)
        return walk(tf.gather(x, indices), tf.gather(labels, indices), seeds_of(indices, run_seed), runs).numpy()

    all_images = images(range(8))
    np.testing.assert_array_equal(images(range(8)), all_images)
    np.testing.assert_allclose(images(indices), all_images[indices], rtol=0, atol=1e-6)
    different = np.abs(images(indices, run_seed=1) - all_images[indices])
    assert np.all(different.reshape(4, -1).max(axis=1) > 1e-4)
    # Without a random start the seed does not matter.
    np.testing.assert_array_equal(images(indices, run=0), images(indices, run_seed=1, run=0))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_starts(norm, targeted):
    network, x = smooth_network((8, 8, 3), 10), tf.fill((6, 8, 8, 3), 0.5) + 0.01 * pictures((8, 8, 3), 6)
    labels, clean_logits = predictions(network, x), network(x)
    search = fab.search(threat=Ball(norm, 0.3), targeted=targeted, num_restarts=3, num_targets=4)
    assert search.num_runs(10) == (12 if targeted else 3) and search.num_runs(2) == 3
    assert search.num_runs(3) == (6 if targeted else 3)
    # Examples of one batch in different runs.
    run = tf.constant([0, 1, 2, 3, 7, 9] if targeted else [0, 1, 2, 0, 1, 0])
    state = stepwise.begin(search, x, labels, clean_logits, seeds_of(range(6)), run).state
    distance = lengths(state["image"] - x, norm)
    np.testing.assert_allclose(distance, 0.15 * (run.numpy() % 3 > 0), atol=1e-5)
    np.testing.assert_array_equal(state["image"][0], x[0])
    if targeted:
        order = [[c for c in row if c != label] for row, label in zip(np.argsort(-clean_logits), labels)]
        np.testing.assert_array_equal(state["target"], [row[r // 3] for row, r in zip(order, run)])


def test_a_batch_of_nothing_but_mistakes():
    for case in (Case("Linf", True), Case("L2", False)):
        network, x = smooth_network(case.shape, case.num_classes), pictures(case.shape, 3)
        labels = (predictions(network, x) + 1) % 10
        x_adv = case.attack(network, num_restarts=1, num_targets=1)(x, labels, seeds_of(range(3)))
        np.testing.assert_array_equal(x_adv, x)


def test_no_gradient_and_no_number():
    x, labels = pictures((8, 8, 3), 3), tf.zeros(3, tf.int32)
    constant = tf.constant([[1.0, 0.0, 0.5]])
    for case, logits_fn in (
        (Case("Linf", False), lambda x: tf.repeat(constant, 3, axis=0)),  # unconnected
        (Case("L2", True), lambda x: constant + 0.0 * tf.reduce_sum(x, axis=(1, 2, 3))[:, None]),
    ):
        x_adv = case.attack(logits_fn, num_restarts=1)(x, labels, seeds_of(range(3)))
        np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize(
    "norm, expected",
    [("Linf", [0.125, 0.125, 0.125, 0.125]), ("L2", [0.9 / 6.48, 0.9 / 6.48, 0, 0]), ("L1", [0.5 / 2.4, 0, 0, 0])],
)
def test_goes_to_the_class_nearest_in_its_norm(norm, expected):
    # Each class is the nearest in one norm: the sum, the Euclidean length and the largest of its slopes are.
    slopes = tf.constant([[0, 0, 0, 0], [1, 1, 1, 1], [1.8, 1.8, 0, 0], [2.4, 0, 0, 0]], tf.float32)
    x, labels = tf.fill((1, 4), 0.5), tf.zeros(1, tf.int32)
    search = fab.search(threat=Ball(norm, 0.1), alpha_max=0.0, eta=1.0, beta=1.0)
    state, *_ = search.step(
        lambda x: (x - 0.5) @ tf.transpose(slopes) - [0.0, 0.5, 0.5, 0.5], x, labels, {"image": x}, labels
    )
    np.testing.assert_allclose(state["image"] - x, [expected], atol=1e-6)


def test_boundaries_of_infinite_slope_do_not_count():
    # The root's at 0 is; the third class is farther in every norm but for that.
    def logits_fn(x):
        return tf.stack([0.0 * x[:, 0], tf.sqrt(x[:, 0]) - 0.1, x[:, 1] - 0.5], axis=1)

    for norm in NORMS:
        threat = Ball(norm, 0.1)
        search = fab.search(threat=threat, alpha_max=0.0, eta=1.0)
        state, _, broken = search.step(
            logits_fn, tf.zeros((1, 3)), tf.zeros(1, tf.int32), {"image": tf.zeros((1, 3))}, 0
        )
        np.testing.assert_allclose(state["image"], [[0.0, 0.5, 0.0]], atol=1e-6)
        assert not broken[0]


# --- As a program


def convolutional(num_classes):
    rng = np.random.default_rng(0)
    kernel = tf.Variable(rng.normal(0.0, 0.4, (3, 3, 3, 6)), dtype=tf.float32)
    dense = tf.Variable(rng.normal(0.0, 0.15, (96, num_classes)), dtype=tf.float32)

    def network(x):
        return tf.reshape(tf.nn.silu(tf.nn.conv2d(x, kernel, 2, "SAME")), (-1, 96)) @ dense

    return network


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A signature as `loading` finds it in a SavedModel: its batch is free, its gradient forgets every size."""
    module = tf.Module()
    network = convolutional(10)
    module.variables_of_network = [cell.cell_contents for cell in network.__closure__]
    call = tf.function(network, input_signature=[tf.TensorSpec((None, 8, 8, 3), tf.float32, "x")], autograph=False)
    path = str(tmp_path_factory.mktemp("model"))
    tf.saved_model.save(module, path, signatures={"serving_default": call.get_concrete_function()})
    loaded = tf.saved_model.load(path)
    signature = loaded.signatures["serving_default"]
    (name,) = signature.structured_outputs

    def logits_fn(x):
        return signature(x=x)[name]

    logits_fn.loaded = loaded
    return logits_fn


@pytest.mark.parametrize("jit_compile, case", [(None, CASES[0]), *((True, case) for case in CASES[3:5])], ids=str)
def test_from_a_saved_model_and_compiled_by_xla(jit_compile, case, served):
    network, x = convolutional(10), pictures((8, 8, 3), 4)
    arguments = (x, predictions(network, x), seeds_of(range(4)), 2 * RADII[case.norm])
    expected = case.attack(network, num_steps=3)(*arguments)
    assert 0 < np.sum(np.any(expected != x, axis=(1, 2, 3)))
    x_adv = case.attack(served, jit_compile, num_steps=3)(*arguments)
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_shapes_are_static(case):
    network, x = convolutional(10), pictures((8, 8, 3), 4)
    labels, classes = predictions(network, x), tf.range(4)
    search = fab.search(threat=Ball(case.norm, RADII[case.norm]), targeted=case.targeted)
    state = {"image": x, "target": classes} if case.targeted else {"image": x}
    step = tf.function(functools.partial(search.step, network), jit_compile=True, autograph=False)
    hlo = step.experimental_get_compiler_ir(x, labels, state, classes)(stage="hlo")
    assert "while" in hlo and "<=" not in hlo and "set-dimension-size" not in hlo


def test_the_program_does_not_grow_with_the_classes():
    def num_nodes(num_classes):
        network = convolutional(num_classes)
        search = fab.search(threat=Ball("L2", 0.5))
        images, labels = tf.TensorSpec((4, 8, 8, 3)), tf.TensorSpec((4,), tf.int32)
        step = tf.function(lambda x, y: search.step(network, x, y, {"image": x}, y), autograph=False)
        graph = step.get_concrete_function(images, labels).graph.as_graph_def()
        return len(graph.node) + sum(len(function.node_def) for function in graph.library.function)

    assert num_nodes(100) == num_nodes(3) < 1000


def test_batch_of_unknown_size_and_of_one():
    network, x = convolutional(10), pictures((8, 8, 3), 4)
    arguments = (x, predictions(network, x), seeds_of(range(4)))
    expected = Case("L2", False).attack(network, num_steps=2)(*arguments)
    attack = functools.partial(fab, network, threat=Ball("L2", RADII["L2"]), num_steps=2, num_restarts=2)
    free = tf.function(lambda x, y, seeds: attack(x, y, seeds=seeds), input_signature=SIGNATURE, autograph=False)
    np.testing.assert_allclose(free(*arguments), expected, rtol=0, atol=1e-6)
    one = [argument[:1] for argument in arguments]
    np.testing.assert_allclose(free(*one), expected[:1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(attack(one[0], one[1], seeds=one[2]), expected[:1], rtol=0, atol=1e-6)  # eagerly


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_steps=0), "num_steps, num_restarts and num_targets >= 1. Received: 0, 5, 9"),
        (dict(num_restarts=0), "Received: 100, 0, 9"),
        (dict(num_targets=0, targeted=True), "Received: 100, 5, 0"),
        (dict(alpha_max=1.5), "alpha_max and beta in .0, 1. and eta > 0. Received: 1.5, 0.9 and 1.05"),
        (dict(beta=-0.1), "Received: 0.1, -0.1 and 1.05"),
        (dict(eta=0), "Received: 0.1, 0.9 and 0"),
        (dict(threat=Ball("L3", 0.1)), "Expected a norm out of Linf, L2, L1. Received: 'L3'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        fab.search(**{**dict(threat=threats.threat(norm="Linf", epsilon=0.1)), **settings})
