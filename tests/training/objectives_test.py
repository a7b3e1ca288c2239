import functools
import inspect
import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses
from robust_keras.models.normalization import batch_norm_mode
from robust_keras.training import objectives

# What the authors' own code computes; `record_objectives.py` says what is in it.
UPSTREAM = dict(np.load(pathlib.Path(__file__).parents[1] / "oracles" / "objectives.npz"))

# Images are logits in most tests. Probabilities are p = 1/8, 2/8, 5/8 on the clean ones, q = 4/8, 3/8, 1/8 on the
# adversarial ones.
CLEAN = np.log([[1.0, 2.0, 5.0]]).astype(np.float32)
ADV = np.log([[4.0, 3.0, 1.0]]).astype(np.float32)
# D_KL(p || q) = 1/8 ln 1/4 + 1/4 ln 2/3 + 5/8 ln 5.
DIVERGENCE = 0.7312454

BOTH = pytest.mark.parametrize("objective", [objectives.trades, objectives.mart])


def one_hot(labels, num_classes=3):
    return tf.one_hot(labels, num_classes)


def on_logits(objective, clean, adv, labels, targets=None, **settings):
    """Losses and gradients for both kinds of logits, of the sum over examples."""
    clean, adv = tf.constant(clean), tf.constant(adv)
    targets = one_hot(labels, clean.shape[-1]) if targets is None else tf.constant(targets)
    with tf.GradientTape() as tape:
        tape.watch([clean, adv])
        loss = objective(tf.identity, clean, adv, tf.constant(labels), targets, **settings)
    return loss, *tape.gradient(loss, [clean, adv])


@BOTH
def test_logits_match_upstream(objective):
    name = objective.__name__
    clean, adv, labels = (UPSTREAM[f"logits/{key}"] for key in ("clean", "adv", "labels"))
    loss, clean_gradient, adv_gradient = on_logits(objective, clean, adv, labels, beta=float(UPSTREAM[f"{name}/beta"]))
    np.testing.assert_allclose(loss, UPSTREAM[f"{name}/logits/loss"], rtol=1e-5, atol=1e-5)
    # Terms of the size of the loss, up to 569 here, cancel in some gradients: 1e-6 of it is a few units of rounding.
    scale = 1.0 + 0.1 * loss[:, None]
    for key, value in (("clean", clean_gradient), ("adv", adv_gradient)):
        expected = UPSTREAM[f"{name}/logits/{key}"]
        np.testing.assert_allclose(value / scale, expected / scale, rtol=1e-5, atol=1e-5, err_msg=key)


@BOTH
def test_network_matches_upstream(objective):
    name = objective.__name__
    hidden, bias, output = weights = [
        tf.constant(UPSTREAM[f"network/{key}"]) for key in ("hidden", "hidden_bias", "output")
    ]
    x, x_adv, labels = (tf.constant(UPSTREAM[f"network/{key}"]) for key in ("x", "x_adv", "labels"))

    def logits_fn(images):
        return tf.tanh((tf.reshape(images, (len(images), -1)) - 0.5) @ hidden + bias) @ output

    # The switch of MART: half of the labels are what the network predicts.
    wrong = tf.argmax(logits_fn(x_adv), axis=-1, output_type=tf.int32) != labels
    np.testing.assert_array_equal(wrong, [False] * 6 + [True] * 6)
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss = objective(logits_fn, x, x_adv, labels, one_hot(labels, 10), beta=float(UPSTREAM[f"{name}/beta"]))
    np.testing.assert_allclose(loss, UPSTREAM[f"{name}/network/loss"], rtol=1e-5, atol=1e-5)
    for key, value in zip(("hidden", "hidden_bias", "output"), tape.gradient(loss, weights)):
        np.testing.assert_allclose(value, UPSTREAM[f"{name}/network/{key}"], rtol=1e-5, atol=1e-5, err_msg=key)


def test_recorded_logits_cover_both_sides_of_the_switch_and_saturation():
    clean, adv, labels = (UPSTREAM[f"logits/{key}"] for key in ("clean", "adv", "labels"))
    rank = (adv > adv[np.arange(36), labels][:, None]).sum(axis=1)
    np.testing.assert_array_equal(rank, np.arange(36) % 3)
    confident = np.max(tf.nn.softmax(adv), axis=-1) > 1 - 1e-6
    assert np.count_nonzero(confident & (rank == 0)) >= 2 and np.count_nonzero(confident & (rank > 0)) >= 2
    # Some are right on the clean image, and with probabilities that float32 cannot tell from 1.
    assert np.any(np.max(tf.nn.softmax(clean), axis=-1) == 1.0)
    assert 5 < np.count_nonzero(clean.argmax(1) == labels) < 31


@BOTH
def test_default_weight_is_upstreams(objective):
    default = inspect.signature(objective).parameters["beta"].default
    assert default == UPSTREAM[f"{objective.__name__}/beta"] == 6.0


@pytest.mark.parametrize("beta", [0, 1.0, 2.5])
def test_trades_by_hand(beta):
    loss, clean_gradient, adv_gradient = on_logits(objectives.trades, CLEAN, ADV, [2], beta=beta)
    # The cross-entropy, ln 8/5, is that of the clean images.
    np.testing.assert_allclose(loss, [0.4700036 + beta * DIVERGENCE], rtol=1e-5)
    # p - t, and through the target p of the divergence p (ln(p / q) - KL).
    through_target = [
        0.125 * (math.log(1 / 4) - DIVERGENCE),
        0.25 * (math.log(2 / 3) - DIVERGENCE),
        0.625 * (math.log(5.0) - DIVERGENCE),
    ]
    np.testing.assert_allclose(clean_gradient, [[0.125, 0.25, -0.375]] + beta * np.array([through_target]), atol=1e-5)
    # q - p.
    np.testing.assert_allclose(adv_gradient, beta * np.array([[0.375, 0.125, -0.5]]), atol=1e-5)


@pytest.mark.parametrize(
    "label, boosted, others",
    [
        # -ln q_y - ln(1 + 1e-4 - max), and 1 - p_y.
        (0, math.log(2.0) - math.log(0.6251), 0.875),  # the most probable class; the runner-up's q is 3/8
        (1, math.log(8 / 3) - math.log(0.5001), 0.75),  # not the most probable one, whose q is 1/2
        (2, math.log(8.0) - math.log(0.5001), 0.375),
    ],
)
@pytest.mark.parametrize("beta", [0, 1.0, 2.5])
def test_mart_by_hand(label, boosted, others, beta):
    loss = on_logits(objectives.mart, CLEAN, ADV, [label], beta=beta)[0]
    np.testing.assert_allclose(loss, [boosted + beta * DIVERGENCE * others], rtol=1e-5)


def test_mart_gradients_by_hand():
    _, clean_gradient, adv_gradient = on_logits(objectives.mart, CLEAN, ADV, [2], beta=2.0)
    p, q = np.array([0.125, 0.25, 0.625]), np.array([0.5, 0.375, 0.125])
    # Through p of the divergence, and through the factor 1 - p_y.
    through_target = 0.375 * p * (np.log(p / q) - DIVERGENCE)
    through_factor = DIVERGENCE * 0.625 * (p - [0, 0, 1])
    np.testing.assert_allclose(clean_gradient, [2.0 * (through_target + through_factor)], atol=1e-5)
    # q - t; through the strongest wrong class, 0; and q - p.
    boost = 0.5 / 0.5001 * ([1, 0, 0] - q)
    np.testing.assert_allclose(adv_gradient, [q - [0, 0, 1] + boost + 2.0 * 0.375 * (q - p)], atol=1e-5)


def test_mart_of_two_classes():
    # p = 3/4, 1/4; q = 1/2 - 1/6, 1/2 + 1/6. The only wrong class is the strongest one: 1 - q_k is q_y.
    clean, adv = np.log([[3.0, 1.0]]).astype(np.float32), np.log([[1.0, 2.0]]).astype(np.float32)
    loss = on_logits(objectives.mart, clean, adv, [0], beta=4.0)[0]
    divergence = 0.75 * math.log(9 / 4) + 0.25 * math.log(3 / 8)
    np.testing.assert_allclose(loss, [math.log(3.0) - math.log(1 / 3 + 1e-4) + divergence], rtol=1e-5)


@pytest.mark.parametrize("targets", [[[0.1, 0.1, 0.8]], [[0.7, 0.0, 0.3]]])  # smoothed, and mixed with another label
@pytest.mark.parametrize("objective, probabilities", [(objectives.trades, [1, 2, 5]), (objectives.mart, [4, 3, 1])])
def test_targets_enter_the_cross_entropy_only(objective, probabilities, targets):
    hard = on_logits(objective, CLEAN, ADV, [2])[0]
    soft = on_logits(objective, CLEAN, ADV, [2], targets=targets)[0]
    negative_log = -np.log(np.array(probabilities) / 8)
    np.testing.assert_allclose(soft - hard, [targets[0] @ negative_log - negative_log[2]], rtol=1e-4)


@BOTH
def test_loss_is_per_example(objective):
    clean, adv = np.concatenate([CLEAN, ADV, CLEAN]), np.concatenate([ADV, ADV, ADV[:, ::-1]])
    loss = on_logits(objective, clean, adv, [2, 0, 1])[0]
    assert loss.shape == (3,) and loss.dtype == tf.float32
    alone = [on_logits(objective, clean[i : i + 1], adv[i : i + 1], [label])[0] for i, label in enumerate([2, 0, 1])]
    np.testing.assert_allclose(loss, np.concatenate(alone), rtol=1e-6)


@BOTH
def test_half_precision_logits_give_float32_losses(objective):
    clean, adv = CLEAN.astype(np.float16), ADV.astype(np.float16)
    expected = on_logits(objective, clean.astype(np.float32), adv.astype(np.float32), [2])[0]
    loss = objective(tf.identity, tf.constant(clean), tf.constant(adv), tf.constant([2]), one_hot([2]))
    assert loss.dtype == tf.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


EXTREMES = np.float32(100.0) * np.array([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [0, 0, 0]], np.float32)


@BOTH
def test_extreme_logits_are_finite(objective):
    for size in (1.0, 10.0):
        clean, adv = np.repeat(size * EXTREMES, 5, axis=0), np.tile(size * EXTREMES, (5, 1))
        for label in range(3):
            for array in on_logits(objective, clean, adv, [label] * 25):
                assert np.isfinite(array).all()


def test_mart_of_extreme_logits():
    # Wrong with certainty on the adversarial image: ln 1e4 for the strongest wrong class and ln 1e12 in the divergence.
    loss, clean_gradient, adv_gradient = on_logits(
        objectives.mart, EXTREMES[[2, 1]], EXTREMES[[0, 0]], [1, 1], beta=6.0
    )
    np.testing.assert_allclose(loss, [200 + 9.2103404 + 6 * 27.6310211, 200 + 9.2103404], rtol=1e-5)
    np.testing.assert_allclose(clean_gradient, np.zeros((2, 3)), atol=1e-6)
    # That of the divergence vanishes below its floor.
    np.testing.assert_allclose(adv_gradient, [[7.0, -1.0, 0.0], [1.0, -1.0, 0.0]] - np.array([[6.0, 0, 0], [0, 0, 0]]))


def test_mart_does_not_lose_small_probabilities():
    # 1 - p_y is 2 e^-20 (4e-9), which float32 takes for 0; the divergence is large.
    clean = np.array([[20.0, 0.0, 0.0]], np.float32)
    adv = np.array([[-15.0, 0.0, -5.0]], np.float32)
    without, with_divergence = (on_logits(objectives.mart, clean, adv, [0], beta=beta)[0] for beta in (0.0, 1e9))
    # q_0 = e^-15 / (1 + e^-5 + e^-15) to 1e-5, and p_0 all but 1.
    expected = 1e9 * 2 * math.exp(-20.0) * (15.0 + math.log1p(math.exp(-5.0)))
    np.testing.assert_allclose(with_divergence - without, [expected], rtol=1e-4)


@pytest.mark.parametrize(
    "objective, passes, updates",
    [
        (objectives.adversarial_training, "a", "a"),
        (objectives.standard_training, "c", "c"),
        (objectives.trades, "ca", "a"),
        (objectives.mart, "ca", "a"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(objective, passes, updates, training, make_tiny_model, tiny_images):
    images = {"c": tiny_images, "a": tf.reverse(tiny_images, axis=[2]) ** 2}
    labels = tf.constant([0, 1, 2, 3] * 2)
    network, expected = make_tiny_model(), make_tiny_model()
    seen = []

    def logits_fn(x):
        seen.append(next(key for key, value in images.items() if value is x))
        return network(x, training=training)

    loss = objective(logits_fn, images["c"], images["a"], labels, one_hot(labels, 4))
    assert sorted(seen) == sorted(passes)

    # Both passes are normalised with the statistics of their own batch.
    logits = {}
    for key in "ca":
        with batch_norm_mode("batch"):
            logits[key] = expected(images[key])
        assert np.abs(logits[key] - expected(images[key], training=False)).max() > 0.1
    on_given = objective(
        lambda x: logits["c" if x is images["c"] else "a"], *images.values(), labels, one_hot(labels, 4)
    )
    np.testing.assert_allclose(loss, on_given, rtol=1e-5)

    # One of them updates the moving ones, once.
    before = [v.numpy() for v in expected.non_trainable_variables]
    with batch_norm_mode("batch_and_update"):
        expected(images[updates])
    for value, new, old in zip(network.non_trainable_variables, expected.non_trainable_variables, before):
        np.testing.assert_allclose(value.numpy(), new.numpy(), rtol=1e-5, err_msg=value.path)
        assert np.abs(new.numpy() - old).max() > 1e-3


def test_cross_entropies():
    targets = tf.constant([[0.1, 0.1, 0.8]])
    for objective, logits in ((objectives.adversarial_training, ADV), (objectives.standard_training, CLEAN)):
        loss = on_logits(objective, CLEAN, ADV, [2], targets=targets)[0]
        np.testing.assert_allclose(loss, losses.cross_entropy(logits, targets), rtol=1e-6)


@BOTH
@pytest.mark.parametrize("beta", [-1.0, -1e-9, math.nan, math.inf])
def test_refuses_a_weight_before_any_pass(objective, beta):
    def logits_fn(x):
        pytest.fail("A pass ran.")

    with pytest.raises(ValueError, match=rf"Expected a finite weight beta >= 0. Received: {beta!r}"):
        objective(logits_fn, CLEAN, ADV, [2], one_hot([2]), beta=beta)


@BOTH
def test_compiles(objective):
    clean, adv, labels = (UPSTREAM[f"logits/{key}"] for key in ("clean", "adv", "labels"))
    function = functools.partial(objective, tf.identity)
    compiled = tf.function(function, jit_compile=True, autograph=False)
    arguments = [tf.constant(array) for array in (clean, adv, labels)] + [one_hot(labels, 10)]
    np.testing.assert_allclose(compiled(*arguments), function(*arguments), rtol=1e-5, atol=1e-5)
