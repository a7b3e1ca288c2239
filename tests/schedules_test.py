import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import schedules


# The paper's 200 epochs at batch 128: .1, ten times less at 1/2 and at 3/4 of 78,000 steps.
@pytest.mark.parametrize(
    "step, expected",
    [
        (0, 0.1),
        (1, 0.1),
        (38_999, 0.1),
        (39_000, 0.01),
        (58_499, 0.01),
        (58_500, 0.001),
        (77_999, 0.001),
        (100_000, 0.001),
    ],
)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_multistep_of_the_paper(step, expected, dtype):
    rate = schedules.multistep(tf.constant(step, dtype), base=0.1, num_steps=78_000)
    assert rate.dtype == tf.float32 and rate.shape == ()
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


@pytest.mark.parametrize("step, expected", [(0, 0.4), (12_999, 0.4), (13_000, 0.04), (19_499, 0.04)])
def test_multistep_with_one_drop_at_two_thirds(step, expected):
    rate = schedules.multistep(tf.constant(step), base=0.4, num_steps=19_500, drops=(2 / 3,))
    np.testing.assert_allclose(rate, expected, rtol=1e-6)


def test_multistep_with_another_factor():
    rates = [float(schedules.multistep(tf.constant(k), base=1.0, num_steps=8, factor=0.5)) for k in range(8)]
    assert rates == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_multistep_without_drops():
    assert float(schedules.multistep(tf.constant(7), base=0.5, num_steps=8, drops=())) == 0.5


def test_piecewise_constant():
    def at(step):
        return schedules.piecewise_constant(tf.constant(step), boundaries=[20, 30], values=[0.1, 0.01, 1e-4])

    np.testing.assert_allclose([at(k) for k in (0, 19, 20, 29, 30, 39)], [0.1, 0.1, 0.01, 0.01, 1e-4, 1e-4], rtol=1e-6)


def test_piecewise_constant_of_a_vector_of_steps():
    steps = tf.constant([[39, 0], [20, 19], [29, 30]])
    rates = schedules.piecewise_constant(steps, boundaries=(20, 30), values=(0.1, 0.01, 1e-4))
    assert rates.dtype == tf.float32
    np.testing.assert_allclose(rates, [[1e-4, 0.1], [0.01, 0.1], [0.01, 1e-4]], rtol=1e-6)
    rates = schedules.multistep(tf.constant([3, 4, 6], tf.int64), base=1.0, num_steps=8, factor=0.5)
    np.testing.assert_array_equal(rates, [1.0, 0.5, 0.25])


def test_piecewise_constant_of_a_python_step():
    np.testing.assert_allclose(schedules.piecewise_constant(5, boundaries=(5,), values=(0.1, 0.01)), 0.01, rtol=1e-6)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_compiles_inside_a_loop(jit_compile):
    @tf.function(jit_compile=jit_compile, autograph=False)
    def total():
        def body(k, total):
            return k + 1, total + schedules.piecewise_constant(k, boundaries=[5], values=[0.1, 0.01])

        return tf.while_loop(lambda k, _: k < 10, body, (tf.constant(0), 0.0), maximum_iterations=10)[1]

    np.testing.assert_allclose(total(), 0.55, rtol=1e-5)


@pytest.mark.parametrize("boundaries, values", [([5], [0.1]), ([5], [0.1, 0.01, 0.001]), ([], []), ([1, 2], [0.1])])
def test_lengths_that_do_not_fit(boundaries, values):
    with pytest.raises(ValueError, match=f"Received: {len(values)} and {len(boundaries)}"):
        schedules.piecewise_constant(0, boundaries=boundaries, values=values)


@pytest.mark.parametrize("step, expected", [(0, 0.1), (25, 0.0853553), (50, 0.05), (75, 0.0146447), (100, 0.0)])
def test_cosine(step, expected):
    rate = schedules.cosine(tf.constant(step, tf.int64), num_steps=100)
    assert rate.dtype == tf.float32 and float(rate) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("step, expected", [(0, 0.1), (50, 0.01), (100, 0.001)])
def test_exponential_ends_where_multistep_does(step, expected):
    assert float(schedules.exponential(tf.constant(step), num_steps=100)) == pytest.approx(expected, rel=1e-5)
    assert float(schedules.exponential(tf.constant(50), num_steps=100, base=2.0, final_factor=0.25)) == pytest.approx(1)


def test_warm_up_rises_to_the_schedule_which_fits_the_rest():
    schedule = functools.partial(schedules.multistep, base=0.4, drops=(0.5,))
    rates = [
        float(schedules.warm_up(tf.constant(step), num_steps=12, schedule=schedule, fraction=1 / 3))
        for step in range(12)
    ]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3] + [0.4] * 4 + [0.04] * 4)


def test_no_warm_up_is_the_schedule():
    for step in (0, 3, 7):
        rate = schedules.warm_up(step, num_steps=8, schedule=schedules.cosine, fraction=0)
        assert float(rate) == float(schedules.cosine(step, num_steps=8))


@pytest.mark.parametrize("fraction", [-0.1, 1, float("nan")])
def test_warm_up_is_a_fraction(fraction):
    with pytest.raises(ValueError, match="Expected a warm-up of a fraction in .0, 1. of the steps. Received: "):
        schedules.warm_up(0, num_steps=8, schedule=schedules.cosine, fraction=fraction)
