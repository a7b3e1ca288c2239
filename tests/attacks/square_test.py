import functools
import importlib
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise, threats
from robust_keras.attacks import stepwise
from robust_keras.attacks.square import square

module = importlib.import_module("robust_keras.attacks.square")  # The package has the public function by its name.

RECORDED = np.load(pathlib.Path(__file__).parent.parent / "oracles" / "square.npz")
RADII = {"Linf": 8 / 255, "L2": 0.5, "L1": 3.0}
NORMS = list(RADII)
TILE_NORMS = {"L2": module.L2, "L1": module.L1}
SMALLEST = {"Linf": 1, "L2": 3, "L1": 3}


def threat_of(norm, epsilon=None):
    return threats.threat(norm=norm, epsilon=epsilon or RADII[norm])


def seeds_of(indices, run_seed=0):
    return noise.example_seeds(run_seed, 0, tf.constant(np.array(indices, np.int32)))


def images(batch, shape=(8, 8, 3), seed=0):
    return tf.constant(np.clip(np.random.default_rng(seed).uniform(-0.1, 1.1, (batch, *shape)), 0, 1), tf.float32)


def staircase(shape=(8, 8, 3), num_classes=4, seed=0):
    """A linear model of images rounded to 16 levels: flat everywhere, so that a gradient shows nothing."""
    weights = np.random.default_rng(seed).normal(size=(int(np.prod(shape)), num_classes)).astype(np.float32)

    def logits_fn(x):
        return tf.reshape(tf.round(x * 15.0) / 15.0 - 0.5, (-1, weights.shape[0])) @ weights

    return logits_fn


def labels_of(logits_fn, x):
    return tf.argmax(logits_fn(x), axis=-1, output_type=tf.int32)


def constant(margin):
    """A model that says class 0 by `margin`, whatever it sees."""
    return lambda x: tf.zeros_like(x[:, 0, 0, :1]) + tf.constant([[margin, 0.0]])


def distances(x_adv, x, norm):
    delta = np.abs(np.asarray(x_adv, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
    return {"Linf": delta.max(1), "L2": np.sqrt((delta**2).sum(1)), "L1": delta.sum(1)}[norm]


def assert_allowed(x_adv, x, norm, epsilon=None):
    assert x_adv.shape == x.shape and x_adv.dtype == tf.float32
    assert tf.reduce_min(x_adv) >= 0.0 and tf.reduce_max(x_adv) <= 1.0
    assert np.all(distances(x_adv, x, norm) <= (epsilon or RADII[norm]) * (1 + 5e-6) + 1e-7)


def begin(search, x, seeds=None, run=0):
    labels = tf.zeros(len(x), tf.int32)
    seeds = seeds_of(range(len(x))) if seeds is None else seeds
    return stepwise.begin(search, x, labels, tf.zeros((len(x), 2)), seeds, labels + run)


def take(search, logits_fn, x, num_steps, progress=None, labels=None):
    """What `num_steps` steps lead to, from the start where no progress is given; the labels are 0 by default."""
    labels = tf.zeros(len(x), tf.int32) if labels is None else labels

    # Eagerly: a trace takes longer than some steps.
    return stepwise.advance(search, logits_fn, x, labels, progress or begin(search, x), num_steps)


# What upstream computes.


def expand_changes(key, num):
    at, values = RECORDED[f"{key}/at"], RECORDED[f"{key}/value"]
    return values[np.searchsorted(at, np.arange(num), side="right") - 1]


def test_share_of_the_image_is_upstreams():
    # On an image so large that the side tells the share.
    sides = module.window_sides(10_000, 10_000, num_steps=10_002)
    np.testing.assert_allclose(np.square(sides[1:]) / 1e8, expand_changes("share", 10_001), rtol=2e-3)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("height, width", [(32, 32), (28, 28), (8, 8), (40, 24)])
def test_sides_are_upstreams(norm, height, width):
    sides = module.window_sides(height, width, num_steps=10_002, smallest=SMALLEST[norm])
    assert sides[0] == 0
    np.testing.assert_array_equal(sides[1:], expand_changes(f"side/{norm}/{height}x{width}", 10_001))


@pytest.mark.parametrize("norm", TILE_NORMS)
@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 7, 10, 11, 21])
def test_patterns_are_upstreams(norm, side):
    np.testing.assert_allclose(module.eta(side, TILE_NORMS[norm]), RECORDED[f"eta/{norm}/{side}"], rtol=0, atol=1e-6)


def words_of(signs):
    """Random words that stand for signs: the top bit says whether one is negative."""
    return tf.constant(np.where(np.asarray(signs) < 0, 0x80000000, 0).astype(np.uint32))


@pytest.mark.parametrize("norm", NORMS)
def test_start_is_upstreams(norm, monkeypatch):
    recorded = {key: RECORDED[f"{norm}/{key}"] for key in ("x", "start_signs", "images")}
    words = recorded["start_signs"]
    if norm != "Linf":
        # A word for the transposition comes before those for the signs of the channels.
        transposed = np.where(RECORDED[f"{norm}/start_transposed"], 1, -1)
        words = np.concatenate([np.tile(transposed[None, :, None], (2, 1, 1)), words], axis=-1)
    words = words_of(words.reshape(2, -1))
    monkeypatch.setattr(noise, "bits", lambda seeds, num: words if num == words.shape[1] else words[:, :num])
    # Not as it was, or will be, compiled for other tests.
    monkeypatch.setattr(module, "_words", module._words.__wrapped__)
    search = square.search(threat=threat_of(norm, float(RECORDED[f"{norm}/epsilon"])))
    x = tf.constant(recorded["x"])
    progress = begin(search, x)
    state, x_adv, _ = search.step(constant(1.0), x, tf.zeros(2, tf.int32), progress.state, progress.k)
    np.testing.assert_allclose(x_adv, recorded["images"][0], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(state["x_best"], x_adv)


@pytest.mark.parametrize("query", range(4))
@pytest.mark.parametrize("norm", NORMS)
def test_proposals_are_upstreams(norm, query):
    def recorded(key):
        return RECORDED[f"{norm}/{key}"]

    draws = module.Draws(
        top=tf.tile(recorded("top")[query][None], (2, 1)),
        left=tf.tile(recorded("left")[query][None], (2, 1)),
        transposed=tf.fill(2, norm != "Linf" and bool(recorded("transposed")[query])),
        signs=tf.constant(recorded("signs")[query]),
    )
    side = int(recorded("side"))
    propose = module.linf_proposal if norm == "Linf" else functools.partial(module.tile_proposal, norm=TILE_NORMS[norm])
    before, expected = recorded("images")[query : query + 2]
    # Sides of which only one is wanted: that is what a schedule is.
    x_adv = propose(
        tf.constant(recorded("x")),
        tf.constant(before),
        draws,
        tf.fill(2, side),
        [0, 11, side, 3],
        epsilon=float(recorded("epsilon")),
    )
    assert np.abs(before - expected).max() > 0.005
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5)


# The law of the draws.


@pytest.mark.parametrize("height, width, side", [(32, 32, 29), (32, 32, 3), (40, 24, 20), (8, 8, 1), (5, 9, 4)])
def test_windows_are_uniform_and_never_at_the_end(height, width, side):
    num = 4000
    words = noise.bits(seeds_of(range(num)), 8)
    draws = module.draw(words, tf.fill(num, side), height, width)
    for first, size in ((draws.top, height), (draws.left, width)):
        counts = np.array([np.bincount(first[:, i], minlength=size) for i in range(2)])
        assert np.all(counts[:, size - side :] == 0)
        expected = num / (size - side)
        assert np.all(np.abs(counts[:, : size - side] - expected) < 5 * np.sqrt(expected))
    assert np.mean(draws.top[:, 0] == draws.top[:, 1]) < 2 / (height - side) or height - side == 1
    for coin in (np.array(draws.transposed), *(np.array(draws.signs).T == 1.0)):
        assert abs(coin.mean() - 0.5) < 0.04
    assert set(np.unique(draws.signs)) == {-1.0, 1.0} and draws.signs.shape == (num, 3)
    # No two coins are one, and none comes with a place.
    together = np.corrcoef(np.concatenate([draws.transposed[:, None], draws.signs, draws.top, draws.left], axis=1).T)
    assert np.nanmax(np.abs(together - np.eye(8))[~np.isnan(together)]) < 0.08


def test_a_window_as_large_as_the_image_starts_at_0():
    draws = module.draw(noise.bits(seeds_of(range(100)), 8), tf.fill(100, 24), 40, 24)
    assert np.all(draws.left == 0) and np.max(draws.top) == 15


def test_each_example_has_the_window_of_its_own_step():
    # Nothing is accepted after the start, so that a proposal shows one window.
    search = square.search(threat=threat_of("Linf"))
    x = tf.fill((9, 32, 32, 3), 0.5)
    progress = take(search, constant(1.0), x, 1)
    ks = np.array([1, 11, 12, 51, 52, 202, 502, 1002, 5000], np.int32)
    _, x_adv, _ = search.step(constant(1.0), x, tf.zeros(9, tf.int32), progress.state, tf.constant(ks))
    windows = set()
    for example, side in enumerate([29, 29, 20, 20, 14, 10, 7, 5, 3]):
        assert module.window_sides(32, 32, num_steps=5001)[ks[example]] == side
        # A window shows in the columns that had the other sign; in 29 x 3 of them some do, in 3 x 3 nearly always.
        changed = np.any(np.abs(x_adv[example] - progress.state["x_best"][example]) > 1e-6, axis=-1)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert len(rows) == side == rows[-1] - rows[0] + 1
        assert columns[-1] - columns[0] < side
        windows.add((rows[0], columns[0]))
    assert len(windows) > 5


def test_each_query_draws_anew():
    search = square.search(threat=threat_of("Linf"))
    x = tf.fill((3, 16, 16, 3), 0.5)
    state, proposals = take(search, constant(1.0), x, 1).state, []
    for k in range(51, 57):
        state, x_adv, _ = search.step(constant(1.0), x, tf.zeros(3, tf.int32), state, tf.fill(3, k))
        proposals.append(np.reshape(x_adv, (3, -1)))
    assert all(len(np.unique(of_one, axis=0)) == 6 for of_one in np.stack(proposals, axis=1))


def test_starts_with_stripes():
    x = tf.fill((20, 16, 12, 3), 0.5)
    x_adv = take(square.search(threat=threat_of("Linf")), constant(1.0), x, 1).state["x_best"].numpy()
    np.testing.assert_allclose(np.abs(x_adv - 0.5), RADII["Linf"], atol=1e-6)
    np.testing.assert_array_equal(x_adv, np.tile(x_adv[:, :1], (1, 16, 1, 1)))
    signs = np.sign(x_adv[:, 0] - 0.5)
    assert abs(signs.mean()) < 0.1 and abs((signs[:, 1:] * signs[:, :-1]).mean()) < 0.15
    assert len(np.unique(signs.reshape(20, -1), axis=0)) == 20
    assert np.abs(signs.mean((0, 1))).max() < 0.25 and np.abs((signs[..., 0] * signs[..., 1]).mean()) < 0.25


@pytest.mark.parametrize("norm", TILE_NORMS)
def test_starts_with_tiles_that_differ(norm):
    delta = module.tiles(seeds_of(range(30)), (15, 15, 3), epsilon=1.0, norm=TILE_NORMS[norm]).numpy()
    grid = delta.reshape(30, 5, 3, 5, 3, 3).transpose(0, 1, 3, 5, 2, 4)
    assert abs(np.mean(grid[..., 1, 1] > 0) - 0.5) < 0.05
    flipped = np.sign(grid[..., 0, 2] * grid[..., 1, 1]) > 0  # the upper right corner goes with the larger bump
    assert 0.4 < flipped.mean() < 0.6
    assert np.all(flipped == flipped[:, :, :, :1])  # the channels of a tile are transposed together


# What is accepted.


@pytest.mark.parametrize("norm", NORMS)
def test_keeps_the_best(norm):
    x, logits_fn = images(8), staircase()
    labels = labels_of(logits_fn, x)
    search = square.search(threat=threat_of(norm, 0.2 * RADII[norm]))
    state, margins = begin(search, x).state, []
    for k in range(14):
        before = state
        state, x_adv, broken = search.step(logits_fn, x, labels, before, tf.fill(8, k))
        is_label = np.arange(4) == labels.numpy()[:, None]
        logits = logits_fn(x_adv).numpy()
        margin = logits[is_label] - np.where(is_label, -np.inf, logits).max(1)
        np.testing.assert_array_equal(broken, labels_of(logits_fn, x_adv) != labels)
        better = (margin < before["margin"]) | (margin <= 0)
        np.testing.assert_array_equal(state["margin"], np.where(better, margin, before["margin"]))
        np.testing.assert_array_equal(
            state["x_best"], np.where(better[:, None, None, None], x_adv, before["x_best"]).astype(np.float32)
        )
        margins.append(np.mean(better))
    assert margins[0] == 1.0 and 0.02 < np.mean(margins[1:]) < 0.9


@pytest.mark.parametrize("margin, moves", [(1.0, False), (0.0, True), (-1.0, True)])
def test_an_equal_margin_is_taken_only_where_misclassified(margin, moves):
    # 0 is a tie, which goes to the label: upstream's criterion takes it, and no verdict follows.
    x = images(4)
    search = square.search(threat=threat_of("Linf"))
    progress = take(search, constant(margin), x, 1)
    later = take(search, constant(margin), x, 3, progress)
    assert np.all(distances(later.state["x_best"], progress.state["x_best"], "Linf") > 0.01) == moves
    assert bool(np.all(progress.broken)) == bool(np.any(later.broken)) == (margin < 0)


# The attack.


@pytest.mark.parametrize("norm", NORMS)
def test_breaks_a_model_without_gradients(norm):
    x, logits_fn = images(32), staircase()
    labels = labels_of(logits_fn, x)
    _, loss, gradient = stepwise.value_and_gradient(logits_fn, x, lambda logits: tf.reduce_max(logits, axis=-1))
    assert not np.any(gradient)
    attack = functools.partial(square, threat=threat_of(norm, 2 * RADII[norm]))

    def run(num_queries):
        limited = functools.partial(attack, num_queries=num_queries, seeds=seeds_of(range(32)))
        return tf.function(functools.partial(limited, logits_fn, x, labels), autograph=False)()

    accuracies = []
    for num_queries in (1, 100):
        x_adv = run(num_queries)
        assert_allowed(x_adv, x, norm, 2 * RADII[norm])
        broken = np.asarray(labels_of(logits_fn, x_adv) != labels)
        accuracies.append(1 - broken.mean())
        # What nothing broke is the clean image.
        np.testing.assert_array_equal(np.any(x_adv != x, axis=(1, 2, 3)), broken)
    assert accuracies[1] <= 0.6 and accuracies[1] <= accuracies[0] - 0.2


@pytest.mark.parametrize("norm", NORMS)
def test_every_proposal_is_allowed(norm):
    x, logits_fn = images(8), staircase()
    search = square.search(threat=threat_of(norm))
    state, labels = begin(search, x).state, labels_of(logits_fn, x)
    for k in range(12):
        state, x_adv, _ = search.step(logits_fn, x, labels, state, tf.fill(8, k))
        assert_allowed(x_adv, x, norm)
        # It uses the ball.
        assert distances(x_adv, x, norm).mean() > 0.5 * RADII[norm]


@pytest.mark.parametrize("norm", NORMS)
def test_leaves_what_is_fooled_already(norm):
    x, logits_fn = images(4), staircase()
    labels = (labels_of(logits_fn, x) + 1) % 4
    x_adv = square(logits_fn, x, labels, threat=threat_of(norm), num_queries=2, seeds=seeds_of(range(4)))
    np.testing.assert_array_equal(x_adv, x)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 100])
def test_classes(num_classes):
    x, logits_fn = images(8), staircase(num_classes=num_classes)
    labels = labels_of(logits_fn, x)
    x_adv = square(logits_fn, x, labels, threat=threat_of("Linf", 0.15), num_queries=15, seeds=seeds_of(range(8)))
    assert_allowed(x_adv, x, "Linf", 0.15)
    assert np.mean(labels_of(logits_fn, x_adv) == labels) <= 0.75


@pytest.mark.parametrize("shape", [(40, 24, 3), (24, 40, 3), (28, 28, 1), (8, 8, 3), (3, 3, 1), (1, 4, 2), (9, 1, 1)])
@pytest.mark.parametrize("norm", NORMS)
def test_shapes(norm, shape):
    x = images(6, shape)
    search = square.search(threat=threat_of(norm))
    start = take(search, constant(1.0), x, 1).state["x_best"]
    assert_allowed(start, x, norm)
    assert np.all(distances(start, x, norm) > 0)
    logits_fn = staircase(shape, num_classes=3)
    labels = labels_of(logits_fn, x)
    progress = take(search, logits_fn, x, 4, labels=labels)
    assert_allowed(progress.state["x_best"], x, norm)
    assert np.any(progress.state["x_best"] != start)
    assert np.all(np.isfinite(progress.state["margin"]))


@pytest.mark.parametrize("shape, side, place", [((40, 24), 8, (0, 0)), ((24, 40), 4, (2, 2)), ((8, 8), 1, (1, 1))])
def test_tiles_are_whole_and_fit(shape, side, place):
    delta = module.tiles(seeds_of([0]), (*shape, 1), epsilon=1.0, norm=module.L2)[0, :, :, 0].numpy()
    (height, width), (top, left) = shape, place
    rows, columns = (height - top) // side, (width - left) // side
    covered = np.zeros(shape, bool)
    covered[top : top + rows * side, left : left + columns * side] = True
    np.testing.assert_array_equal(delta != 0, covered)
    tiles = delta[top : top + rows * side, left : left + columns * side].reshape(rows, side, columns, side)
    np.testing.assert_allclose(np.sum(tiles**2, axis=(1, 3)), 1.0, rtol=1e-5)


# Randomness, and the batch around an example.


@pytest.mark.parametrize("norm", NORMS)
def test_follows_the_seed_and_nothing_else(norm):
    x, logits_fn = images(6), staircase()
    search = square.search(threat=threat_of(norm))

    def run(indices, run_seed=0, run=0):
        batch = tf.gather(x, indices)
        progress = begin(search, batch, seeds_of(indices, run_seed), run)
        return take(search, logits_fn, batch, 6, progress, labels=labels_of(logits_fn, batch)).state["x_best"].numpy()

    expected = run([0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(run([0, 1, 2, 3, 4, 5]), expected)
    np.testing.assert_allclose(run([4, 1, 4]), expected[[4, 1, 4]], atol=1e-6)
    # Another seed and another run of the same are others.
    for other in (run([0, 1, 2, 3, 4, 5], run_seed=1), run([0, 1, 2, 3, 4, 5], run=1)):
        assert np.all(distances(other, expected, "Linf") > 1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_examples_at_different_steps_of_one_batch(norm):
    x, logits_fn = images(6), staircase()
    labels = labels_of(logits_fn, x)
    search = square.search(threat=threat_of(norm), num_queries=8)
    ahead = take(search, logits_fn, x[:3], 5, begin(search, x[:3]), labels[:3])
    new = begin(search, x[3:], seeds_of([3, 4, 5]))
    mixed = tf.nest.map_structure(lambda a, b: tf.concat([a, b], axis=0), ahead, new)
    mixed = take(search, logits_fn, x, 4, mixed, labels)
    for part, alone in (
        (slice(0, 3), take(search, logits_fn, x[:3], 9, begin(search, x[:3]), labels[:3])),
        (slice(3, 6), take(search, logits_fn, x[3:], 4, new, labels[3:])),
    ):
        np.testing.assert_array_equal(mixed.k[part], alone.k)
        np.testing.assert_array_equal(mixed.broken[part], alone.broken)
        np.testing.assert_allclose(mixed.state["x_best"][part], alone.state["x_best"], atol=1e-6)
    # Steps past the end are allowed, and change no verdict.
    later = take(search, logits_fn, x, 3, mixed, labels)
    np.testing.assert_array_equal(later.broken[:3], mixed.broken[:3])
    np.testing.assert_array_equal(later.found[:3], mixed.found[:3])


def test_restarts_are_runs():
    search = square.search(threat=threat_of("L2"), num_restarts=3, num_queries=70)
    assert (search.name, search.num_steps) == ("square", 71)
    assert search.num_runs(10) == search.num_runs(2) == 3
    assert square.search(threat=threat_of("L2")).num_steps == 5001
    assert square.search(threat=threat_of("L2")).num_runs(10) == 1


# Compilation.


@pytest.mark.parametrize("norm", ["Linf", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("L2", "L1"))])
def test_compiled_by_xla(norm):
    x, logits_fn = images(8, (12, 10, 3)), staircase((12, 10, 3))
    labels, seeds = labels_of(logits_fn, x), seeds_of(range(8))
    threat = threat_of(norm)

    def run(x, labels, seeds):
        return square(logits_fn, x, labels, threat=threat, num_queries=8, num_restarts=2, seeds=seeds)

    compiled = tf.function(run, jit_compile=True, autograph=False)
    expected = run(x, labels, seeds)
    x_adv = compiled(x, labels, seeds)
    np.testing.assert_array_equal(labels_of(logits_fn, x_adv), labels_of(logits_fn, expected))
    # For L1, rounding grows as windows are scaled up and projected again.
    np.testing.assert_allclose(x_adv, expected, rtol=0, atol=1e-5 if norm == "L1" else 1e-6)
    assert np.any(labels_of(logits_fn, x_adv) != labels)
    hlo = compiled.experimental_get_compiler_ir(x, labels, seeds)(stage="hlo")
    assert "while" in hlo and "<=" not in hlo and "set-dimension-size" not in hlo


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_queries": 0}, "num_queries and num_restarts >= 1. Received: 0, 1"),
        ({"num_restarts": 0}, "num_queries and num_restarts >= 1. Received: 5000, 0"),
        ({"p_init": 0.0}, r"p_init in \(0, 1\]. Received: 0.0"),
        ({"p_init": 1.5}, r"p_init in \(0, 1\]. Received: 1.5"),
        ({"threat": threat_of("L2")._replace(norm="L7")}, "a norm out of Linf, L2, L1. Received: 'L7'"),
    ],
)
def test_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        square.search(**{"threat": threat_of("L2"), **settings})


def test_images_of_another_rank():
    x = tf.zeros((2, 12))
    with pytest.raises(ValueError, match=r"\[batch, height, width, channels\]. Received: \(2, 12\)"):
        square(lambda x: x[:, :3], x, [0, 0], threat=threat_of("Linf"), seeds=seeds_of([0, 1]))
