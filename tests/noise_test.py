import math
import statistics

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise

MASK = 0xFFFFFFFF


def reference_threefry(key, counter):
    """Threefry-2x32-20 on Python integers, after Salmon et al. 2011."""
    rotations = [13, 15, 26, 6, 17, 29, 16, 24]
    keys = [key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + keys[0]) & MASK, (counter[1] + keys[1]) & MASK
    for n in range(20):
        x = (x + y) & MASK
        r = rotations[n % 8]
        y = (((y << r) | (y >> (32 - r))) & MASK) ^ x
        if n % 4 == 3:
            injection = n // 4 + 1
            x = (x + keys[injection % 3]) & MASK
            y = (y + keys[(injection + 1) % 3] + injection) & MASK
    return x, y


def u32(*values):
    return tuple(tf.constant([v], tf.uint32) for v in values)


def some_seeds(num, run_seed=0):
    """Seeds made without the library."""
    words = np.random.default_rng(run_seed).integers(-(2**31), 2**31, (num, 2))
    return tf.constant(words, tf.int32)


# From kat_vectors of Random123 1.14, "threefry2x32 20": counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((MASK, MASK), (MASK, MASK), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_threefry_known_answers(counter, key, expected):
    words = noise.threefry(u32(*key), u32(*counter))
    assert [int(w.numpy()[0]) for w in words] == list(expected)
    assert reference_threefry(key, counter) == expected


def test_threefry_agrees_with_the_reference_on_random_input():
    inputs = np.random.default_rng(0).integers(0, 2**32, (50, 4))
    columns = [tf.constant(column, tf.uint32) for column in inputs.T]
    words = np.stack(noise.threefry(columns[:2], columns[2:]), axis=1)
    expected = [reference_threefry((int(a), int(b)), (int(c), int(d))) for a, b, c, d in inputs]
    np.testing.assert_array_equal(words, expected)


def test_threefry_broadcasts():
    key = (tf.constant([[1], [2]], tf.uint32), tf.constant([[3], [4]], tf.uint32))
    counter = (tf.constant([[5, 6, 7]], tf.uint32), tf.constant([[8]], tf.uint32))
    x, y = noise.threefry(key, counter)
    assert x.shape == y.shape == (2, 3)
    assert (int(x[1, 2]), int(y[1, 2])) == reference_threefry((2, 4), (7, 8))


# Runs resume in the middle and results are recomputed years later: the order of the words must stay.
@pytest.mark.parametrize("num", [1, 2, 5, 6])
def test_bits_are_the_blocks_first_words_and_then_their_second_words(num):
    blocks = [reference_threefry((7, 2**32 - 9), (i, 0)) for i in range(math.ceil(num / 2))]
    expected = [b[0] for b in blocks] + [b[1] for b in blocks]
    words = noise.bits(tf.constant([[7, -9]], tf.int32), num)
    assert words.dtype == tf.uint32 and words.shape == (1, num)
    np.testing.assert_array_equal(words[0], expected[:num])


FUNCTIONS = {
    "bits": lambda seeds: noise.bits(seeds, 7),
    "fold_in": lambda seeds: noise.fold_in(seeds, 5),
    "uniform": lambda seeds: noise.uniform(seeds, (3, 3, 2)),
    "uniform_ball": lambda seeds: noise.uniform(seeds, (5,), -8 / 255, 8 / 255),
    "normal": lambda seeds: noise.normal(seeds, (3, 3, 2)),
    "integers": lambda seeds: noise.integers(seeds, 4, 9),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_depends_on_nothing_but_the_examples_own_seed(name):
    function, seeds = FUNCTIONS[name], some_seeds(6)
    # The inverse error function rounds differently in vector and in scalar instructions, by where a number lies.
    tolerance = 1e-6 if name == "normal" else 0
    together = function(seeds).numpy()
    assert len(together) == 6
    order = [4, 0, 5, 2, 1, 3]
    np.testing.assert_allclose(function(tf.gather(seeds, order)), together[order], rtol=tolerance)
    np.testing.assert_allclose(function(tf.gather(seeds, [3, 3])), together[[3, 3]], rtol=tolerance)
    for i in range(6):
        np.testing.assert_allclose(function(seeds[i : i + 1])[0], together[i], rtol=tolerance)
    # Every example is different, and both words of a seed count.
    assert len({row.tobytes() for row in together}) == 6
    for word in ([1, 0], [0, 1]):
        assert not np.array_equal(function(seeds[:1] + tf.constant(word)).numpy()[0], together[0])


@pytest.mark.parametrize("name", ["bits", "fold_in", "uniform", "integers"])
def test_same_bits_compiled_by_xla(name):
    function, seeds = FUNCTIONS[name], some_seeds(6)
    compiled = tf.function(function, jit_compile=True, autograph=False)
    np.testing.assert_array_equal(compiled(seeds), function(seeds))


def test_nearly_the_same_compiled_by_xla():
    # XLA may fuse the multiplication and the addition of an interval, and has an inverse error function of its own.
    seeds = some_seeds(4)

    def both(seeds):
        return noise.uniform(seeds, (500,), -8 / 255, 8 / 255), noise.normal(seeds, (500,))

    uniform, normal = tf.function(both, jit_compile=True, autograph=False)(seeds)
    expected_uniform, expected_normal = both(seeds)
    np.testing.assert_allclose(uniform, expected_uniform, rtol=0, atol=4e-9)
    np.testing.assert_allclose(normal, expected_normal, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_same_inside_a_while_loop(jit_compile):
    seeds = some_seeds(3)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def loop(seeds):
        def body(k, collected):
            drawn = noise.uniform(noise.fold_in(seeds, k), (4,))
            return k + 1, tf.tensor_scatter_nd_update(collected, [[k]], drawn[None])

        return tf.while_loop(lambda k, _: k < 4, body, (tf.constant(0), tf.zeros((4, 3, 4))), maximum_iterations=4)[1]

    collected = loop(seeds).numpy()
    for k in range(4):
        np.testing.assert_array_equal(collected[k], noise.uniform(noise.fold_in(seeds, k), (4,)))
    assert len(np.unique(collected)) == collected.size


def test_fold_in_makes_unrelated_seeds():
    seeds = some_seeds(5)
    folded = {k: noise.fold_in(seeds, k) for k in (0, 1, 2, -1, 2**31 - 1)}
    for k, new in folded.items():
        assert new.dtype == tf.int32 and new.shape == (5, 2)
        np.testing.assert_array_equal(new, noise.fold_in(seeds, tf.constant(k)))
    rows = {tuple(row) for new in (seeds, *folded.values()) for row in new.numpy()}
    assert len(rows) == 5 * 6
    # Not what the seed's own stream gives: a restart's noise must not repeat the augmentation's.
    stream = set(tf.bitcast(noise.bits(seeds, 2000), tf.int32).numpy().ravel())
    assert not stream & {word for new in folded.values() for word in new.numpy().ravel()}
    # The order of folds counts.
    one_two, two_one = noise.fold_in(folded[1], 2), noise.fold_in(folded[2], 1)
    assert not np.array_equal(one_two, two_one)


def test_uses_of_a_seed_are_distinct():
    assert len({noise.AUGMENTATION, noise.ATTACK, noise.VALIDATION}) == 3


def test_example_seeds_differ_in_run_step_index_and_copy():
    seeds = [
        noise.example_seeds(run, step, tf.range(6), copy).numpy()
        for run in range(5)
        for step in range(5)
        for copy in range(4)
    ]
    rows = np.concatenate(seeds)
    assert rows.dtype == np.int32 and rows.shape == (600, 2)
    assert len({tuple(row) for row in rows}) == 600


def test_example_seeds_are_a_function_of_one_examples_numbers():
    indices = tf.constant([49_999, 0, 7])
    together = noise.example_seeds(3, 77_999, indices, copies=tf.constant([1, 0, 3])).numpy()
    for row, index, copy in zip(together, (49_999, 0, 7), (1, 0, 3)):
        np.testing.assert_array_equal(row, noise.example_seeds(3, 77_999, [index], copy)[0])
    wide = noise.example_seeds(3, tf.constant(77_999, tf.int64), tf.cast(indices, tf.int64), copies=[1, 0, 3])
    np.testing.assert_array_equal(wide, together)
    np.testing.assert_array_equal(noise.example_seeds(3, 0, [7]), noise.example_seeds(3, 0, [7], copies=0))


NUM = 60_000


def chi_squared(counts):
    expected = counts.sum() / len(counts)
    return np.sum((counts - expected) ** 2) / expected


def test_uniform_distribution():
    values = noise.uniform(some_seeds(300), (10, 20)).numpy()
    assert values.shape == (300, 10, 20) and values.dtype == np.float32
    assert values.min() >= 0.0 and values.max() < 1.0
    assert values.min() < 1e-3 and values.max() > 1 - 1e-3
    # Five standard errors of the mean 1/2 and the variance 1/12 (kurtosis 9/5).
    assert abs(values.mean() - 0.5) < 5 * math.sqrt(1 / 12 / NUM)
    assert abs(values.var() - 1 / 12) < 5 * (1 / 12) * math.sqrt(0.8 / NUM)
    # 63 degrees of freedom: beyond 130 once in 10^6.
    assert chi_squared(np.bincount((values * 64).astype(int).ravel(), minlength=64)) < 130
    assert np.all((values * 2**24) % 1 == 0)


def test_uniform_numbers_are_uncorrelated():
    values = noise.uniform(noise.example_seeds(0, 0, tf.range(300)), (200,)).numpy() - 0.5
    bound = 5 / math.sqrt(NUM)
    for a, b in [
        (values[:, :-1], values[:, 1:]),  # neighbouring pixels
        (values[:, :100], values[:, 100:]),  # the two words of a block
        (values[:-1], values[1:]),  # neighbouring examples
        (values, noise.uniform(noise.example_seeds(0, 1, tf.range(300)), (200,)).numpy() - 0.5),  # neighbouring steps
        (values, noise.uniform(noise.example_seeds(1, 0, tf.range(300)), (200,)).numpy() - 0.5),  # neighbouring runs
    ]:
        assert abs(np.mean(a * b) * 12) < bound


def test_uniform_interval():
    seeds = some_seeds(300)
    unit = noise.uniform(seeds, (200,)).numpy().astype(np.float64)
    values = noise.uniform(seeds, (200,), -8 / 255, 8 / 255).numpy()
    np.testing.assert_allclose(values, -8 / 255 + unit * 16 / 255, rtol=0, atol=1e-8)
    assert values.min() < -7.99 / 255 and values.max() > 7.99 / 255


def constant_bits(word):
    return lambda seeds, num: tf.fill((tf.shape(seeds)[0], num), tf.constant(word, tf.uint32))


@pytest.mark.parametrize(
    "low, high",
    [
        (0.0, 1.0),
        (-8 / 255, 8 / 255),
        (-0.3, 0.3),
        (1.0, 2.0),
    ],
)
def test_uniform_interval_is_open_above(monkeypatch, low, high):
    monkeypatch.setattr(noise, "bits", constant_bits(MASK))
    assert noise.uniform(some_seeds(1), (1,), low, high).numpy()[0, 0] < np.float32(high)
    monkeypatch.setattr(noise, "bits", constant_bits(0))
    assert noise.uniform(some_seeds(1), (1,), low, high).numpy()[0, 0] == np.float32(low)


def test_normal_distribution():
    values = noise.normal(some_seeds(300), (10, 20)).numpy()
    assert values.shape == (300, 10, 20) and values.dtype == np.float32
    assert abs(values.mean()) < 5 / math.sqrt(NUM)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / NUM)
    assert abs(np.mean(values**3)) < 5 * math.sqrt(15 / NUM)
    assert abs(np.mean(values**4) - 3) < 5 * math.sqrt(96 / NUM)
    # Equally likely cells of the normal distribution.
    edges = [statistics.NormalDist().inv_cdf(k / 64) for k in range(1, 64)]
    assert chi_squared(np.bincount(np.searchsorted(edges, values.ravel()), minlength=64)) < 130


def test_normal_is_the_inverse_of_the_distribution_function():
    seeds = some_seeds(1)
    cells = noise.uniform(seeds, (1000,)).numpy()[0].astype(np.float64) * 2**24
    expected = [statistics.NormalDist().inv_cdf((cell + 0.5) / 2**24) for cell in cells]
    np.testing.assert_allclose(noise.normal(seeds, (1000,))[0], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "word",
    [
        0,
        MASK,
    ],
)
@pytest.mark.parametrize("jit_compile", [False, True])
def test_normal_is_finite_in_the_last_cells(monkeypatch, word, jit_compile):
    monkeypatch.setattr(noise, "bits", constant_bits(word))
    draw = tf.function(lambda seeds: noise.normal(seeds, (2,)), jit_compile=jit_compile, autograph=False)
    # Phi^-1(2^-25) = -5.4199.
    np.testing.assert_allclose(np.abs(draw(some_seeds(1))), 5.42, atol=0.05)


@pytest.mark.parametrize("bound", [1, 2, 9, 10, 100])
def test_integers_distribution(bound):
    values = noise.integers(some_seeds(300), 200, bound).numpy()
    assert values.dtype == np.int32 and values.shape == (300, 200)
    counts = np.bincount(values.ravel(), minlength=bound)
    assert len(counts) == bound and values.min() >= 0
    # Beyond that once in 10^6 or less, for k - 1 degrees of freedom (Wilson-Hilferty).
    k = max(bound - 1, 1)
    assert chi_squared(counts) < k * (1 - 2 / (9 * k) + 4.8 * math.sqrt(2 / (9 * k))) ** 3


@pytest.mark.parametrize(
    "bound",
    [
        32_768,
        40_000,
        65_535,
    ],
)
def test_integers_of_a_large_bound(bound):
    values = noise.integers(some_seeds(100), 100, bound).numpy()
    assert values.min() >= 0 and values.max() < bound
    assert values.max() > 0.99 * bound
