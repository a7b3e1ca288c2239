import fractions
import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise, threats

NORMS = ("Linf", "L2", "L1")
ORDERS = {"Linf": np.inf, "L2": 2, "L1": 1}
# What upstream's AutoAttack computes; `record_apgd.py` says what is in it.
UPSTREAM = dict(np.load(pathlib.Path(__file__).parent / "oracles" / "apgd.npz"))


def image(*values):
    """[1, 1, n, 1]."""
    return tf.reshape(tf.constant(values, tf.float32), (1, 1, -1, 1))


def flat(x):
    return np.asarray(x).reshape(-1)


def lengths(delta, norm):
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), ORDERS[norm], axis=1)


@pytest.mark.parametrize("gradient", [(3.0, -4.0, 0.0), (3e-30, -4e-30, 0.0), (3e30, -4e30, 0.0)])
def test_steepest_step(gradient):
    linf = threats.threat(norm="Linf", epsilon=0.1).steepest_step(image(*gradient))
    np.testing.assert_array_equal(flat(linf), [1.0, -1.0, 0.0])
    l2 = threats.threat(norm="L2", epsilon=0.1).steepest_step(image(*gradient))
    np.testing.assert_allclose(flat(l2), [0.6, -0.8, 0.0], rtol=1e-6)
    l1 = threats.threat(norm="L1", epsilon=0.1).steepest_step(image(*gradient))
    np.testing.assert_array_equal(flat(l1), [0.0, -1.0, 0.0])


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_step_of_a_zero_gradient_is_zero(norm):
    step = threats.threat(norm=norm, epsilon=0.1).steepest_step(tf.zeros((2, 3, 3, 1)))
    np.testing.assert_array_equal(step, np.zeros((2, 3, 3, 1)))


@pytest.mark.parametrize("norm, dual", [("Linf", 1), ("L2", 2), ("L1", np.inf)])
def test_steepest_step_reaches_the_dual_norm_for_every_example(norm, dual):
    gradient = np.random.default_rng(0).normal(size=(5, 4, 4, 3)).astype(np.float32)
    gradient *= np.array([1e-20, 1e-3, 1.0, 1e3, 1e20], np.float32)[:, None, None, None]
    step = threats.threat(norm=norm, epsilon=0.1).steepest_step(tf.constant(gradient)).numpy().astype(np.float64)
    np.testing.assert_allclose(lengths(step, norm), 1.0, rtol=1e-5)
    gradient = gradient.astype(np.float64)
    rise = (gradient * step).sum((1, 2, 3))
    np.testing.assert_allclose(rise, np.linalg.norm(gradient.reshape(5, -1), dual, axis=1), rtol=1e-5)


def test_linf_project():
    x = image(0.5, 0.5, 0.5, 0.05, 0.95)
    x_adv = image(0.8, 0.45, 0.1, -0.3, 1.2)
    projected = threats.threat(norm="Linf", epsilon=0.1).project(x_adv, x)
    np.testing.assert_allclose(flat(projected), [0.6, 0.45, 0.4, 0.0, 1.0], atol=1e-7)


def test_l2_project_scales_back_to_the_ball():
    x = image(0.5, 0.5)
    threat = threats.threat(norm="L2", epsilon=0.25)
    np.testing.assert_allclose(flat(threat.project(image(0.8, 0.9), x)), [0.65, 0.7], atol=1e-6)
    # Inside it stays.
    np.testing.assert_allclose(flat(threat.project(image(0.53, 0.46), x)), [0.53, 0.46], atol=1e-7)
    np.testing.assert_array_equal(flat(threat.project(x, x)), [0.5, 0.5])


def test_l2_project_clips_to_the_range_after_scaling():
    # Scaled to (.15, .2), then 0.95 + .2 is cut to 1.
    projected = threats.threat(norm="L2", epsilon=0.25).project(image(0.8, 1.35), image(0.5, 0.95))
    np.testing.assert_allclose(flat(projected), [0.65, 1.0], atol=1e-6)


def test_l2_project_takes_each_example_alone():
    x = tf.fill((2, 1, 2, 1), 0.5)
    x_adv = tf.concat([image(0.8, 0.9), image(0.53, 0.46)], axis=0)
    projected = threats.threat(norm="L2", epsilon=0.25).project(x_adv, x).numpy()
    np.testing.assert_allclose(projected.reshape(2, 2), [[0.65, 0.7], [0.53, 0.46]], atol=1e-6)


@pytest.mark.parametrize(
    "x, x_adv, epsilon, expected",
    [
        ((0.5, 0.5, 0.5), (0.8, 0.3, 0.6), 0.3, (0.7, 0.4, 0.5)),  # sizes .3, .2, .1 less .1
        ((0.5, 0.5), (0.55, 0.4), 0.2, (0.55, 0.4)),  # inside it stays
        ((0.5, 0.5), (0.9, 0.9), 0.2, (0.6, 0.6)),
        # The first has room for .05, which leaves .15 to the second: to scale or to clip afterwards would leave less.
        ((0.95, 0.5), (1.35, 0.8), 0.2, (1.0, 0.65)),
        ((0.05, 0.5), (-0.35, 0.2), 0.2, (0.0, 0.35)),
        # Far outside of the box, but what is left of it fits.
        ((0.95, 0.5), (3.0, 0.6), 0.2, (1.0, 0.6)),
        ((1.0, 0.0), (1.5, -2.0), 0.2, (1.0, 0.0)),
        ((0.5, 0.5), (0.9, 0.5), 0.0, (0.5, 0.5)),
        # Sizes .4/3, .4/3, .6 and .4/3, room for .5 and .125 in the last two: less .1.
        (
            (0.5, 0.5, 0.5, 0.125),
            (0.5 + 0.4 / 3, 0.5 - 0.4 / 3, -0.1, 0.125 - 0.4 / 3),
            0.6,
            (0.5 + 0.1 / 3, 0.5 - 0.1 / 3, 0.0, 0.125 - 0.1 / 3),
        ),
    ],
)
def test_l1_project(x, x_adv, epsilon, expected):
    projected = threats.threat(norm="L1", epsilon=epsilon).project(image(*x_adv), image(*x))
    np.testing.assert_allclose(flat(projected), expected, atol=1e-6)


@pytest.mark.parametrize("dimension", [27, 192])
def test_l1_project_agrees_with_upstream(dimension):
    x, delta, expected = (
        UPSTREAM[f"projection/{dimension}/{key}"].reshape(-1, dimension // 3, 1, 3)
        for key in ("x", "delta", "projected")
    )
    threat = threats.threat(norm="L1", epsilon=float(UPSTREAM[f"projection/{dimension}/epsilon"]))
    np.testing.assert_allclose(threat.project(x + delta, x), x + expected, rtol=0, atol=1e-5)
    assert np.all(np.abs(delta - expected).max((1, 2, 3)) > 0.005)
    # One example's amount is not another's.
    np.testing.assert_allclose(threat.project((x + delta)[1:2], x[1:2]), (x + expected)[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "scale, epsilon, grid",
    [
        (0.02, 0.5, None),
        (0.3, 0.5, None),
        (3.0, 5.0, None),
        (100.0, 1e-3, None),
        (1.0, 0.75, 8),  # many sizes and amounts alike
        (1.0, 2.0, 4),
    ],
)
def test_l1_project_agrees_with_bisection(scale, epsilon, grid):
    rng = np.random.default_rng(0)
    shape = (2000, 1, 6, 1) if grid else (40, 6, 5, 3)
    x = np.clip(rng.uniform(-0.2, 1.2, shape), 0, 1).astype(np.float32)
    x_adv = x + (rng.normal(0.0, scale, x.shape) * (rng.random(x.shape) < 0.7)).astype(np.float32)
    if grid:
        x, x_adv = np.round(grid * x) / grid, np.round(grid * x_adv) / grid
    delta = x_adv.astype(np.float64) - x
    length, room = np.abs(delta), np.where(delta > 0, 1.0 - x.astype(np.float64), x)

    def shrunk(amount):
        return np.clip(length - amount, 0.0, room)

    def total(sizes):
        return sizes.sum((1, 2, 3), keepdims=True)

    low, high = np.zeros((len(x), 1, 1, 1)), length.max((1, 2, 3), keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        outside = total(shrunk(middle)) > epsilon
        low, high = np.where(outside, middle, low), np.where(outside, high, middle)
    expected = x + np.sign(delta) * shrunk(np.where(total(shrunk(0.0)) > epsilon, high, 0.0))
    projected = threats.threat(norm="L1", epsilon=epsilon).project(x_adv, x).numpy()
    np.testing.assert_allclose(projected, expected, rtol=0, atol=1e-6 * max(1.0, scale))
    assert projected.min() >= 0 and projected.max() <= 1
    assert np.all(lengths(projected - x, "L1") <= epsilon + 1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_project_lands_inside_and_is_idempotent(norm):
    rng = np.random.default_rng(0)
    x = tf.constant(rng.random((20, 4, 4, 3)), tf.float32)
    x_adv = x + tf.constant(rng.normal(0.0, 0.5, x.shape), tf.float32)
    threat = threats.threat(norm=norm, epsilon=0.3)
    projected = threat.project(x_adv, x)
    assert np.all(lengths(projected - x, norm) <= 0.3 * (1 + 1e-5))
    assert tf.reduce_min(projected) >= 0.0 and tf.reduce_max(projected) <= 1.0
    np.testing.assert_allclose(threat.project(projected, x), projected, atol=1e-6)


def test_distance():
    x, x_adv = tf.zeros((2, 1, 2, 1)), tf.concat([image(0.3, -0.4), image(0.0, 0.1)], axis=0)
    linf = threats.threat(norm="Linf", epsilon=1.0).distance(x_adv, x)
    np.testing.assert_allclose(linf, [0.4, 0.1], rtol=1e-6)
    l2 = threats.threat(norm="L2", epsilon=1.0).distance(x_adv, x)
    np.testing.assert_allclose(l2, [0.5, 0.1], rtol=1e-6)
    l1 = threats.threat(norm="L1", epsilon=1.0).distance(x_adv, x)
    np.testing.assert_allclose(l1, [0.7, 0.1], rtol=1e-6)


def test_linf_distance_of_arrays():
    x = np.zeros((2, 1, 2, 1), np.float32)
    np.testing.assert_allclose(threats.threat(norm="Linf", epsilon=1.0).distance(x + 0.25, x), [0.25, 0.25])


# In the middle of [0, 1], with a radius that clipping does not touch.
NUM, EPSILON = 4000, 0.4


def starts(norm, shape=(1, 1, 3), step=0):
    x = tf.fill((NUM, *shape), 0.5)
    seeds = noise.example_seeds(0, step, tf.range(NUM))
    return threats.threat(norm=norm, epsilon=EPSILON).random_start(x, seeds).numpy() - 0.5


def test_linf_random_start_is_uniform_in_the_cube():
    delta = starts("Linf").reshape(NUM, 3)
    assert np.abs(delta).max() <= EPSILON * (1 + 1e-6)
    for pixel in range(3):
        counts = np.histogram(delta[:, pixel], bins=16, range=(-EPSILON, EPSILON))[0]
        # 15 degrees of freedom: beyond 55 once in 10^6.
        assert np.sum((counts - NUM / 16) ** 2) / (NUM / 16) < 55
    correlation = np.corrcoef(delta.T)
    assert np.abs(correlation - np.eye(3)).max() < 5 / math.sqrt(NUM)


def test_l2_random_start_is_uniform_in_the_ball():
    delta = starts("L2").reshape(NUM, 3) / EPSILON
    radius = lengths(delta, "L2")
    assert radius.max() <= 1 + 1e-5
    # Mean radius d / (d + 1), variance d / (d + 2) - (d / (d + 1))^2; five standard errors.
    assert abs(radius.mean() - 3 / 4) < 5 * math.sqrt((3 / 5 - 9 / 16) / NUM)
    # The share of the volume within the radius is uniform; so is every coordinate of the direction in three dimensions.
    for uniform in (radius**3, *(delta / radius[:, None] / 2 + 0.5).T):
        counts = np.histogram(uniform, bins=16, range=(0.0, 1.0 + 1e-5))[0]
        assert np.sum((counts - NUM / 16) ** 2) / (NUM / 16) < 55
    assert np.abs(np.corrcoef(delta.T) - np.eye(3)).max() < 5 / math.sqrt(NUM)
    # The radius is drawn apart from the direction.
    assert np.abs(np.corrcoef(radius, delta[:, 0])[0, 1]) < 5 / math.sqrt(NUM)


def test_l1_random_start_is_uniform_in_the_cross_polytope():
    delta = starts("L1").reshape(NUM, 3).astype(np.float64) / EPSILON
    total = lengths(delta, "L1")
    assert total.max() <= 1 + 1e-5
    shares = np.abs(delta) / total[:, None]
    # The share of the volume within the radius is uniform. On the face of a sign every pixel's share s of the total is
    # that of a point of a triangle: (1 - s)^2 is uniform.
    for uniform in (total**3, *((1 - shares) ** 2).T):
        counts = np.histogram(uniform, bins=16, range=(0.0, 1.0 + 1e-5))[0]
        assert np.sum((counts - NUM / 16) ** 2) / (NUM / 16) < 55
    # All eight signs alike: beyond 42 once in 10^6.
    counts = np.bincount((delta > 0) @ [1, 2, 4], minlength=8)
    assert np.sum((counts - NUM / 8) ** 2) / (NUM / 8) < 42
    assert np.abs(np.corrcoef(delta.T) - np.eye(3)).max() < 5 / math.sqrt(NUM)
    # The total is drawn apart from the shares.
    assert np.abs(np.corrcoef(total, shares[:, 0])[0, 1]) < 5 / math.sqrt(NUM)


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_random_start_of_a_large_image_is_near_the_sphere(norm):
    x = tf.fill((64, 16, 16, 3), 0.5)
    threat = threats.threat(norm=norm, epsilon=EPSILON)
    radius = lengths(threat.random_start(x, noise.example_seeds(0, 0, tf.range(64))) - x, norm)
    # P(radius < .99 epsilon) = .99^768 = 4e-4.
    assert np.mean(radius) == pytest.approx(EPSILON * 768 / 769, rel=1e-3)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_stays_in_the_ball_and_in_range(norm):
    x = tf.constant(np.random.default_rng(0).integers(0, 2, (50, 4, 4, 3)), tf.float32)  # every pixel at an end
    start = threats.threat(norm=norm, epsilon=0.3).random_start(x, noise.example_seeds(0, 0, tf.range(50)))
    assert start.shape == x.shape and start.dtype == tf.float32
    assert tf.reduce_min(start) >= 0.0 and tf.reduce_max(start) <= 1.0
    assert np.all(lengths(start - x, norm) <= 0.3 * (1 + 1e-5))
    assert np.all(lengths(start - x, norm) > 0.01)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_follows_the_seed_alone(norm):
    threat = threats.threat(norm=norm, epsilon=0.3)
    x, seeds = tf.fill((4, 3, 3, 1), 0.5), noise.example_seeds(0, 0, tf.range(4))
    start = threat.random_start(x, seeds).numpy()
    np.testing.assert_array_equal(threat.random_start(x[:2], tf.gather(seeds, [2, 0])), start[[2, 0]])
    assert len({row.tobytes() for row in start}) == 4
    assert not np.any(start == threat.random_start(x, noise.example_seeds(0, 1, tf.range(4))).numpy())


def test_l2_random_start_is_finite_with_the_largest_random_number():
    # At index 36,389 of run seed 0 one of the 768 uniform numbers is the last one, 1 - 2^-24.
    seeds = noise.example_seeds(0, 0, [36_389])
    assert noise.uniform(noise.fold_in(seeds, 0), (16, 16, 3)).numpy().max() == 1 - 2**-24
    start = threats.threat(norm="L2", epsilon="128/255").random_start(tf.fill((1, 16, 16, 3), 0.5), seeds)
    assert np.all(np.isfinite(start))


@pytest.mark.parametrize("norm", NORMS)
def test_radius_zero_leaves_the_image(norm):
    threat = threats.threat(norm=norm, epsilon=0)
    x = tf.constant(np.random.default_rng(0).random((3, 2, 2, 1)), tf.float32)
    np.testing.assert_array_equal(threat.random_start(x, noise.example_seeds(0, 0, tf.range(3))), x)
    np.testing.assert_allclose(threat.project(x + 0.3, x), x, atol=1e-7)


@pytest.mark.parametrize("norm", NORMS)
def test_compiled_by_xla(norm):
    threat = threats.threat(norm=norm, epsilon="8/255")
    x = tf.constant(np.random.default_rng(0).random((4, 3, 3, 2)), tf.float32)
    gradient = tf.constant(np.random.default_rng(1).normal(0.0, 1e-25, x.shape), tf.float32)
    seeds = noise.example_seeds(0, 0, tf.range(4))

    def everything(x, gradient, seeds):
        start = threat.random_start(x, seeds)
        step = threat.steepest_step(gradient)
        moved = threat.project(start + 0.1 * step, x)
        return start, step, moved, threat.distance(moved, x)

    compiled = tf.function(everything, jit_compile=True, autograph=False)(x, gradient, seeds)
    for actual, expected, tolerance in zip(compiled, everything(x, gradient, seeds), (1e-4, 1e-5, 1e-4, 1e-5)):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lengths(compiled[1], norm), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    "typed, value",
    [
        ("8/255", 8 / 255),
        ("2/255", 2 / 255),
        ("128/255", 128 / 255),
        ("8.8/255", 44 / 1275),
        ("0.3", 0.3),
        ("1e-3", 1e-3),
        ("1", 1.0),
        (0.25, 0.25),
        (1, 1.0),
        (np.float64(8 / 255), 8 / 255),
        (np.float32(0.25), 0.25),
        (np.int64(1), 1.0),
        (fractions.Fraction(1, 4), 0.25),
        (".5", 0.5),
        ("1.", 1.0),
        ("+2e-3/0.5", 0.004),
    ],
)
def test_parse_fraction_is_exact(typed, value):
    parsed = threats.parse_fraction(typed, "epsilon")
    assert type(parsed) is float and parsed == value
    threat = threats.threat(norm="Linf", epsilon=typed)
    assert threat.epsilon == value
    assert threat.epsilon_fraction == str(typed)


BAD_NUMBERS = ["abc", "", "8/0", "8/", "/8", "8/255/2", "nan", "inf", float("nan"), float("inf"), None, [1.0]]
# What Python takes for numbers.
BAD_NUMBERS += [
    True,
    False,
    np.bool_(True),
    "1_0/255",
    " 8/255 ",
    "8 / 255",
    "8/255\n",
    "8/-255",
    "٨/255",
    "0x8",
    "1e-9999",
]
BAD_NUMBERS += ["NaN", "-inf", "8/inf", "infinity", "True", 1j, b"8/255"]
OVERFLOWING = [pytest.param("1e400", id="'1e400'"), pytest.param(10**400, id="10**400")]


@pytest.mark.parametrize("value", BAD_NUMBERS + OVERFLOWING)
def test_parse_fraction_refuses(value):
    with pytest.raises(ValueError, match=r"Expected the_name as a finite number .* Received: "):
        threats.parse_fraction(value, "the_name")
    with pytest.raises(ValueError, match=r"Expected epsilon .* Received: "):
        threats.threat(norm="L2", epsilon=value)


@pytest.mark.parametrize("epsilon", [-0.1, "-8/255"])
def test_negative_radius(epsilon):
    with pytest.raises(ValueError, match=f"epsilon >= 0. Received: {epsilon!r}"):
        threats.threat(norm="L2", epsilon=epsilon)


@pytest.mark.parametrize(
    "norm, epsilon, message",
    [
        ("Linf", 8, "such as '8/255', of at most 1 in Linf. Received: 8$"),
        ("Linf", 1.5, "such as '1.5/255', of at most 1 "),
        ("Linf", "300/255", r"pixel range \[0, 1\], of at most 1 in Linf. Received: '300/255'"),
        ("L2", 128, "such as '128/255', of at most 27.7128 in L2. Received: 128$"),
        ("L1", 3060, "such as '3060/255', of at most 1536 in L1. Received: 3060$"),
    ],
)
def test_a_radius_that_cannot_be_meant(norm, epsilon, message):
    with pytest.raises(ValueError, match=message):
        threats.threat(norm=norm, epsilon=epsilon)
    largest = {"Linf": 1.0, "L2": 27, "L1": 1500}[norm]
    assert threats.threat(norm=norm, epsilon=largest).epsilon == largest


@pytest.mark.parametrize("norm, epsilon, diameter", [("Linf", 1.0, 1), ("L2", 4.5, 4.24264), ("L1", 18.5, 18)])
def test_a_radius_beyond_the_images_diameter(norm, epsilon, diameter):
    x = tf.fill((2, 3, 2, 3), 0.5)
    threat = threats.threat(norm=norm, epsilon=epsilon)
    threats.check_images(x, threats.threat(norm=norm, epsilon=diameter - 0.001))
    if norm == "Linf":  # Which `threat` refuses itself.
        threats.check_images(x, threat)
        return
    message = rf"at most {diameter:g}, the diameter in {norm} of images of shape \(3, 2, 3\). Received: {epsilon}"
    with pytest.raises(ValueError, match=message):
        threats.check_images(x, threat)
    with pytest.raises(ValueError, match=message):
        tf.function(lambda x: threats.check_images(x, threat))(x)


@pytest.mark.parametrize("norm", ["linf", "L3", "", None, 2])
def test_unknown_norm(norm):
    with pytest.raises(ValueError, match=r"Linf.*L2.* Received: "):
        threats.threat(norm=norm, epsilon=0.1)


def test_threat_describes_itself():
    threat = threats.threat(norm="L2", epsilon="128/255")
    assert (threat.norm, threat.epsilon, threat.epsilon_fraction) == ("L2", 128 / 255, "128/255")


@pytest.mark.parametrize(
    "x, message",
    [
        (np.full((2, 2, 2, 3), 255.0), "finite images in .0, 1.. Received: values from 255 to 255"),
        (np.full((2, 2, 2, 3), 1.001), "Received: values from 1.001 to 1.001"),
        (np.full((2, 2, 2, 3), -0.5), "Received: values from -0.5 to -0.5"),
        (np.where(np.arange(24).reshape(2, 2, 2, 3) == 5, np.nan, 0.5), "finite images"),
        (np.where(np.arange(24).reshape(2, 2, 2, 3) == 5, np.inf, 0.5), "finite images .* to inf"),
        (np.zeros((2, 2, 2, 3), np.uint8), "float images in .0, 1.; divide bytes by 255. Received: images of uint8"),
        (np.zeros((2, 2, 2, 3), np.int64), "images of int64"),
        (np.zeros(3, np.float32), r"images .batch, .*. Received: shape \(3,\)"),
    ],
)
def test_images_that_are_none(x, message):
    with pytest.raises(ValueError, match=message) as caught:
        threats.check_images(x)
    assert "\n" not in str(caught.value)


def test_images_are_made_float32():
    x = np.random.default_rng(0).random((2, 2, 2, 3))
    for given in (x, x.astype(np.float32), tf.constant(x), x + 1e-7 * (x - 0.5), 0 * x, 0 * x + 1, x[:0]):
        checked = threats.check_images(given)
        assert checked.dtype == tf.float32
        np.testing.assert_array_equal(checked, np.float32(given))
    # In a program there are no values to look at.
    program = tf.function(threats.check_images, autograph=False)
    np.testing.assert_array_equal(program(tf.fill((2, 3), 255.0)), np.full((2, 3), 255.0))
    with pytest.raises(ValueError, match="uint8"):
        program(tf.zeros((2, 3), tf.uint8))


def test_l1_sparse_step_takes_the_largest_hundredth():
    gradient = np.random.default_rng(0).normal(size=(3, 10, 10, 4)).astype(np.float32)
    step = threats.l1_sparse_step(tf.constant(gradient)).numpy().reshape(3, -1)
    flat = gradient.reshape(3, -1)
    expected = np.zeros_like(flat)
    for row, values in zip(expected, flat):
        largest = np.argsort(-np.abs(values))[:4]
        row[largest] = np.sign(values[largest]) / 4
    np.testing.assert_allclose(step, expected, rtol=1e-6)
    # Of few pixels it takes one, as the steepest step does, and of no gradient none.
    few = tf.constant(gradient[:, :2, :2])
    np.testing.assert_array_equal(threats.l1_sparse_step(few), threats.l1_steepest_step(few))
    np.testing.assert_array_equal(threats.l1_sparse_step(0.0 * few), tf.zeros_like(few))


def test_inwards():
    x_adv = image(0.0, 0.0, 1.0, 1.0, 0.5)
    gradient = image(-1.0, 2.0, 3.0, -4.0, 5.0)
    expected = {"L1": [0.0, 2.0, 0.0, -4.0, 5.0]}
    for norm in NORMS:
        inwards = threats.inwards(gradient, x_adv, threats.threat(norm=norm, epsilon=0.5))
        np.testing.assert_array_equal(flat(inwards), expected.get(norm, flat(gradient)))


@pytest.mark.parametrize("largest", [2e-38, 1e-30, 1e-11, 3e-4, 1e-3, 1.0, 7e5, 1e12, 2e12, 1e30, 3e38])
def test_ordinary_scale_is_a_power_of_two(largest):
    size = tf.constant(largest, tf.float32)
    scale = float(threats.ordinary_scale(size, at_least=2.0**-10))
    assert np.log2(scale) == np.round(np.log2(scale))
    if 2.0**-10 <= largest <= 2.0**40:
        assert scale == 1.0
    else:
        assert 0.99 <= scale * largest <= 4.0
    assert float(threats.ordinary_scale(tf.constant(0.0), at_least=2.0**-10)) == 1.0
