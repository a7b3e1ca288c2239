import functools
import math
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses

# Softmax probabilities 1/8, 2/8 and 5/8.
LOGITS = [[math.log(1.0), math.log(2.0), math.log(5.0)]]
SMOOTH = [[0.5, 0.25, 0.25]]
# What upstream's AutoAttack computes; `record_apgd.py` says what is in it.
UPSTREAM = dict(np.load(pathlib.Path(__file__).parent / "oracles" / "apgd.npz"))


def gradient(function, *arguments):
    tensors = [tf.constant(a, tf.float32) for a in arguments]
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = function(*tensors)
    return tape.gradient(value, tensors)


@pytest.mark.parametrize("label, expected", [(0, 2.0794415), (1, 1.3862944), (2, 0.4700036)])
def test_cross_entropy_of_a_label(label, expected):
    # ln 8, ln 4, ln 8/5.
    np.testing.assert_allclose(losses.cross_entropy(tf.constant(LOGITS), tf.constant([label])), [expected], rtol=1e-6)


def test_cross_entropy_of_probabilities():
    # 1/2 ln 8 + 1/4 ln 4 + 1/4 ln 8/5.
    np.testing.assert_allclose(losses.cross_entropy(tf.constant(LOGITS), tf.constant(SMOOTH)), [1.5037953], rtol=1e-6)
    # Not normalised: half a label is half the loss.
    half = losses.cross_entropy(tf.constant(LOGITS), tf.constant([[0.5, 0.0, 0.0]]))
    np.testing.assert_allclose(half, [1.0397208], rtol=1e-6)


def test_cross_entropy_is_per_example():
    logits = tf.constant(LOGITS * 3 + [[0.0, 0.0, 0.0]])
    loss = losses.cross_entropy(logits, tf.constant([2, 0, 1, 1]))
    np.testing.assert_allclose(loss, [0.4700036, 2.0794415, 1.3862944, 1.0986123], rtol=1e-6)


def test_cross_entropy_gradient_is_prediction_minus_target():
    grad = gradient(lambda z: losses.cross_entropy(z, tf.constant([0])), LOGITS)[0]
    np.testing.assert_allclose(grad, [[-0.875, 0.25, 0.625]], atol=1e-6)
    grad = gradient(lambda z: losses.cross_entropy(z, tf.constant(SMOOTH)), LOGITS)[0]
    np.testing.assert_allclose(grad, [[-0.375, 0.0, 0.375]], atol=1e-6)


def test_cross_entropy_of_extreme_logits_is_finite():
    loss = losses.cross_entropy(tf.constant([[0.0, 1e4], [1e4, 0.0]]), tf.constant([0, 0]))
    np.testing.assert_allclose(loss, [1e4, 0.0], rtol=1e-6)


def test_kl_divergence_of_probabilities():
    # 1/2 ln(1/2 / 1/8) + 1/4 ln(1/4 / 2/8) + 1/4 ln(1/4 / 5/8) = ln 2 + 1/4 ln 2/5.
    loss = losses.kl_divergence(tf.constant(LOGITS), tf.constant(SMOOTH))
    np.testing.assert_allclose(loss, [math.log(2.0) + 0.25 * math.log(0.4)], rtol=1e-6)
    np.testing.assert_allclose(loss, [0.4640745], rtol=1e-6)


def test_kl_divergence_direction():
    # D(targets || prediction), not D(prediction || targets).
    logits = tf.constant([[0.0, math.log(3.0)]])  # prediction 1/4, 3/4
    targets = tf.constant([[0.5, 0.5]])
    forward = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)  # 0.1438410
    reverse = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # 0.1308120
    value = float(losses.kl_divergence(logits, targets)[0])
    assert value == pytest.approx(0.1438410, abs=1e-6) == forward
    assert abs(value - reverse) > 0.01


def test_kl_divergence_of_targets_with_zeros():
    # 0 log 0 = 0: 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 5/8).
    loss = losses.kl_divergence(tf.constant(LOGITS), tf.constant([[0.0, 0.5, 0.5]]))
    np.testing.assert_allclose(loss, [0.2350018], rtol=1e-6)


def test_kl_divergence_of_a_label_is_cross_entropy():
    logits, labels = tf.constant(LOGITS * 3), tf.constant([0, 1, 2])
    np.testing.assert_allclose(losses.kl_divergence(logits, labels), [2.0794415, 1.3862944, 0.4700036], rtol=1e-6)


def test_kl_divergence_vanishes_only_at_the_prediction():
    values = np.random.default_rng(0).normal(0.0, 3.0, (50, 7)).astype(np.float32)
    prediction = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    np.testing.assert_allclose(losses.kl_divergence(tf.constant(values), tf.constant(prediction)), 0.0, atol=1e-5)
    assert np.all(losses.kl_divergence(tf.constant(values), tf.constant(prediction[::-1].copy())).numpy() > 0.01)


def test_kl_divergence_gradient_flows_into_both_sides():
    def function(logits, targets):
        return losses.kl_divergence(logits, targets)

    logit_gradient, target_gradient = gradient(function, LOGITS, SMOOTH)
    np.testing.assert_allclose(logit_gradient, [[-0.375, 0.0, 0.375]], atol=1e-6)
    # log t + 1 - log p.
    expected = [[1 + math.log(4.0), 1.0, 1 + math.log(0.4)]]
    np.testing.assert_allclose(target_gradient, expected, rtol=1e-5)


def test_kl_divergence_gradient_through_a_softmax_target():
    # As in the outer loss of TRADES. d/dz_i = t_i (log(t_i / p_i) - KL) for t = softmax(z).
    clean = [[math.log(2.0), math.log(1.0), math.log(1.0)]]  # t = 1/2, 1/4, 1/4
    grads = gradient(lambda z, clean: losses.kl_divergence(z, tf.nn.softmax(clean)), LOGITS, clean)
    kl = 0.4640745
    expected = [[0.5 * (math.log(4.0) - kl), 0.25 * (0.0 - kl), 0.25 * (math.log(0.4) - kl)]]
    np.testing.assert_allclose(grads[1], expected, atol=1e-6)
    np.testing.assert_allclose(grads[0], [[-0.375, 0.0, 0.375]], atol=1e-6)


def test_kl_divergence_gradient_is_finite_at_targets_with_zeros():
    grads = gradient(losses.kl_divergence, LOGITS, [[0.0, 0.5, 0.5]])
    assert np.all(np.isfinite(grads[0])) and np.all(np.isfinite(grads[1]))
    np.testing.assert_allclose(grads[0], [[0.125, -0.25, 0.125]], atol=1e-6)
    # A softmax whose tail underflows to zero.
    grads = gradient(lambda z, c: losses.kl_divergence(z, tf.nn.softmax(c)), LOGITS, [[0.0, -200.0, 0.0]])
    assert np.all(np.isfinite(grads[0])) and np.all(np.isfinite(grads[1]))
    np.testing.assert_allclose(grads[0], [[0.125 - 0.5, 0.25, 0.625 - 0.5]], atol=1e-6)


@pytest.mark.parametrize(
    "logits, label, expected",
    [
        ([1.0, 3.0, 2.0], 0, 2.0),
        ([1.0, 3.0, 2.0], 1, -1.0),
        ([1.0, 3.0, 2.0], 2, 1.0),
        ([-5.0, -1.0, -3.0], 1, -2.0),  # all negative: the true class must not count as 0
        ([-5.0, -1.0, -3.0], 2, 2.0),
        ([2.0, 2.0, 1.0], 0, 0.0),  # a tie with the true class
        ([2.0, 2.0, 1.0], 2, 1.0),  # a tie between wrong classes
        ([4.0, 4.0], 1, 0.0),
        ([-1e30, -2e30], 0, -1e30),
    ],
)
def test_margin(logits, label, expected):
    np.testing.assert_allclose(losses.margin(tf.constant([logits]), tf.constant([label])), [expected], rtol=1e-6)


def test_margin_of_probabilities_is_that_of_the_most_probable_class():
    logits = tf.constant([[1.0, 3.0, 2.0]] * 3)
    targets = tf.constant([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(losses.margin(logits, targets), [-1.0, 2.0, 1.0])


def test_margin_is_positive_exactly_where_misclassified():
    logits = np.random.default_rng(0).normal(size=(200, 5)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 5, 200)
    margin = losses.margin(tf.constant(logits), tf.constant(labels)).numpy()
    np.testing.assert_array_equal(margin > 0, logits.argmax(1) != labels)


def test_margin_gradient():
    grad = gradient(lambda z: losses.margin(z, tf.constant([2])), [[1.0, 3.0, 2.0]])[0]
    np.testing.assert_array_equal(grad, [[0.0, 1.0, -1.0]])


@pytest.mark.parametrize(
    "logits, label, expected",
    [
        ([1.0, 3.0, 2.0, -1.0], 0, 1.0),  # (3 - 1) / (3 - 1)
        ([1.0, 3.0, 2.0, -1.0], 1, -0.5),  # (2 - 3) / (3 - 1)
        ([1.0, 3.0, 2.0, -1.0], 2, 0.5),
        ([1.0, 3.0, 2.0, -1.0], 3, 2.0),
        ([1.0, 3.0, 2.0], 1, -0.5),
        ([-5.0, -1.0, -3.0], 0, 1.0),
        ([2.0, 2.0, 1.0], 0, 0.0),
        ([1.0, 4.0], 0, 3.0),  # two classes: the margin
        ([1.0, 4.0], 1, -3.0),
    ],
)
def test_dlr(logits, label, expected):
    np.testing.assert_allclose(losses.dlr(tf.constant([logits]), tf.constant([label])), [expected], rtol=1e-6)


def test_dlr_gradient():
    # Of (z_2 - z_1) / (z_1 - z_0).
    grad = gradient(lambda z: losses.dlr(z, tf.constant([1])), [[1.0, 3.0, 2.0, -1.0]])[0]
    np.testing.assert_allclose(grad, [[-0.25, -0.25, 0.5, 0.0]], atol=1e-6)


@pytest.mark.parametrize(
    "logits, label, target, expected_margin, expected_dlr",
    [
        ([1.0, 3.0, 2.0, -1.0], 1, 2, -1.0, -1 / 3),  # (2 - 3) / (3 - (1 - 1) / 2)
        ([1.0, 3.0, 2.0, -1.0], 1, 3, -4.0, -4 / 3),
        ([1.0, 3.0, 2.0, -1.0], 0, 1, 2.0, 2 / 3),
        ([0.0, 4.0, 1.0, 2.0, -2.0], 1, 0, -4.0, -8 / 7),  # -4 / (4 - (1 + 0) / 2)
        ([0.0, 4.0, 1.0, 2.0, -2.0], 4, 3, 4.0, 8 / 7),
        ([1.0, 3.0, 2.0], 1, 0, -2.0, -2.0),  # three classes and two: the margin
        ([1.0, 3.0, 2.0], 0, 2, 1.0, 1.0),
        ([1.0, 4.0], 1, 0, -3.0, -3.0),
    ],
)
def test_targeted_losses(logits, label, target, expected_margin, expected_dlr):
    arguments = tf.constant([logits]), tf.constant([label]), tf.constant([target])
    np.testing.assert_allclose(losses.targeted_margin(*arguments), [expected_margin], rtol=1e-6)
    np.testing.assert_allclose(losses.targeted_dlr(*arguments), [expected_dlr], rtol=1e-6)


def test_targeted_margin_gradient():
    grad = gradient(lambda z: losses.targeted_margin(z, tf.constant([2]), tf.constant([0])), [[1.0, 3.0, 2.0]])[0]
    np.testing.assert_array_equal(grad, [[1.0, 0.0, -1.0]])


def test_losses_of_probabilities_are_those_of_the_most_probable_class():
    logits = tf.constant([[0.0, 4.0, 1.0, 2.0, -2.0]] * 2)
    targets, classes = tf.constant([[0.1, 0.5, 0.2, 0.1, 0.1], [0.2, 0.1, 0.1, 0.1, 0.5]]), tf.constant([0, 3])
    np.testing.assert_allclose(losses.dlr(logits, targets), [-2 / 3, 2.0], rtol=1e-6)
    np.testing.assert_allclose(losses.targeted_margin(logits, targets, classes), [-4.0, 4.0], rtol=1e-6)
    np.testing.assert_allclose(losses.targeted_dlr(logits, targets, classes), [-8 / 7, 8 / 7], rtol=1e-6)


@pytest.mark.parametrize("num_classes", [4, 10])
def test_dlr_does_not_change_with_scale_and_shift(num_classes):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, num_classes)).astype(np.float32)
    labels, classes = rng.integers(0, num_classes, 50), rng.integers(0, num_classes, 50)
    for changed in (64.0 * logits, logits + 5.0, logits / 64.0 - 1.0):
        np.testing.assert_allclose(losses.dlr(changed, labels), losses.dlr(logits, labels), rtol=1e-3, atol=1e-4)
        actual, expected = (losses.targeted_dlr(z, labels, classes) for z in (changed, logits))
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-4)
    # What it is there for: the margin and the cross-entropy do change.
    assert np.all(np.abs(losses.margin(64.0 * logits, labels)) > 10 * np.abs(losses.margin(logits, labels)))


@pytest.mark.parametrize("num_classes", [4, 10])
@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_dlr_of_tiny_and_huge_logits(num_classes, scale):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, num_classes)).astype(np.float32)
    labels, classes = rng.integers(0, num_classes, 50), rng.integers(0, num_classes, 50)
    for loss in (losses.dlr, functools.partial(losses.targeted_dlr, target_classes=classes)):
        np.testing.assert_allclose(loss(scale * logits, labels), loss(logits, labels), rtol=1e-5)
        actual, expected = (gradient(functools.partial(loss, targets=labels), z)[0] for z in (scale * logits, logits))
        np.testing.assert_allclose(scale * actual, expected, rtol=1e-4, atol=1e-4)
    # Of logits that are all one, the loss is 0 and shows where to go.
    zeros = np.zeros((2, num_classes), np.float32)
    np.testing.assert_array_equal(losses.dlr(zeros, [0, 1]), [0.0, 0.0])
    slope = gradient(lambda z: losses.dlr(z, [0, 1]), zeros)[0].numpy()
    assert np.all(np.isfinite(slope)) and slope[0, 0] < 0 and slope[1, 1] < 0


@pytest.mark.parametrize(
    "num_classes, loss", [(3, "dlr"), (4, "dlr"), (10, "dlr"), (4, "dlr-targeted"), (10, "dlr-targeted")]
)
def test_dlr_agrees_with_upstream(num_classes, loss):
    logits, labels, classes = (UPSTREAM[f"losses/{num_classes}/{key}"] for key in ("logits", "labels", "targets"))

    def function(z):
        return losses.dlr(z, labels) if loss == "dlr" else losses.targeted_dlr(z, labels, classes)

    expected = UPSTREAM[f"losses/{num_classes}/{loss}/value"], UPSTREAM[f"losses/{num_classes}/{loss}/gradient"]
    np.testing.assert_allclose(function(tf.constant(logits)), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradient(function, logits)[0], expected[1], rtol=1e-5, atol=1e-5)


def towards_class_0(loss):
    def towards(logits, targets):
        return loss(logits, targets, tf.zeros(logits.shape[0], tf.int32))

    towards.__name__ = loss.__name__
    return towards


ALL = pytest.mark.parametrize(
    "loss",
    [
        losses.cross_entropy,
        losses.kl_divergence,
        losses.margin,
        losses.dlr,
        towards_class_0(losses.targeted_margin),
        towards_class_0(losses.targeted_dlr),
    ],
)


@ALL
@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64])
def test_losses_are_float32_whatever_the_logits(loss, dtype):
    # 1000 - 1/8 = 999.875 is no float16 (multiples of 1/2 there) and no bfloat16 (multiples of 4).
    logits = tf.constant([[1024.0, 0.125]], dtype)
    value = loss(logits, tf.constant([1]))
    assert value.dtype == tf.float32
    np.testing.assert_allclose(value, [1023.875], rtol=1e-7)
    half_targets = loss(logits, tf.constant([[0.0, 1.0]], tf.float16))
    assert half_targets.dtype == tf.float32
    np.testing.assert_allclose(half_targets, [1023.875], rtol=1e-7)


@ALL
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.uint8])
def test_labels_of_any_integer_type(loss, dtype):
    labels = tf.constant([2, 0], dtype)
    expected = loss(tf.constant(LOGITS * 2), tf.constant([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(loss(tf.constant(LOGITS * 2), labels), expected, rtol=1e-6)


@ALL
def test_losses_compile(loss):
    logits, targets = tf.constant(LOGITS * 2), tf.constant([SMOOTH[0], [0.0, 1.0, 0.0]])
    compiled = tf.function(loss, jit_compile=True, autograph=False)
    np.testing.assert_allclose(compiled(logits, targets), loss(logits, targets), rtol=1e-5)


def test_as_probabilities():
    logits = tf.zeros((2, 3))
    np.testing.assert_array_equal(losses.as_probabilities([2, 0], logits), [[0, 0, 1], [1, 0, 0]])
    given = [[0.5, 0.25, 0.25], [0.0, 0.9, 0.1]]
    np.testing.assert_array_equal(losses.as_probabilities(given, logits), np.float32(given))
    assert losses.as_probabilities([2, 0], logits).dtype == tf.float32


def test_as_labels():
    labels = losses.as_labels(tf.constant([[0.2, 0.5, 0.3], [0.4, 0.4, 0.2]]))
    assert labels.dtype == tf.int32
    np.testing.assert_array_equal(labels, [1, 0])
    labels = losses.as_labels(tf.constant([7, 3], tf.int64))
    assert labels.dtype == tf.int32
    np.testing.assert_array_equal(labels, [7, 3])


@ALL
def test_labels_of_one_column_are_labels(loss):
    # As `keras.datasets` gives them.
    logits, labels = tf.constant(np.random.default_rng(0).normal(size=(5, 4)), tf.float32), np.array([2, 0, 1, 3, 3])
    value = loss(logits, labels[:, None])
    assert value.shape == (5,)
    np.testing.assert_array_equal(value, loss(logits, labels))
    for dtype in (np.float32, np.float64, np.int32, np.int64, np.uint8):
        np.testing.assert_array_equal(value, loss(logits, np.eye(4, dtype=dtype)[labels]))


def test_one_hot_rows_of_integers_are_labels_in_a_program():
    as_labels = tf.function(losses.as_labels, autograph=False)
    np.testing.assert_array_equal(as_labels(tf.constant([[0, 1, 0], [0, 0, 1]])), [1, 2])
    with pytest.raises(ValueError, match="Expected labels"):  # What they are is not known.
        tf.function(losses.as_labels, autograph=False).get_concrete_function(tf.TensorSpec((None, None), tf.int32))


BAD_LABELS = [
    tf.zeros((3, 2), tf.int32),
    tf.ones((3, 2), tf.int32),
    tf.constant([[0, 2], [1, 0], [0, 1]], tf.uint8),
    tf.constant([[-1, 1], [1, 0], [0, 1]]),
    tf.zeros((3, 1, 1), tf.int32),
    tf.constant(1),
    tf.zeros(3),
    tf.zeros((3, 1)),
    tf.zeros((3, 1, 2)),
    tf.zeros(3, tf.bool),
]


@pytest.mark.parametrize("labels", BAD_LABELS, ids=lambda x: f"{x.dtype.name}-{x.shape}")
def test_labels_of_another_shape_are_refused(labels):
    with pytest.raises(ValueError, match=rf"labels, integers \[batch\] or .* Received: {labels.dtype.name} \("):
        losses.as_labels(labels)
    with pytest.raises(ValueError, match="Expected (labels|probabilities).* Received: "):
        losses.is_wrong(tf.zeros((3, 2)), labels)


@ALL
@pytest.mark.parametrize("labels", BAD_LABELS, ids=lambda x: f"{x.dtype.name}-{x.shape}")
def test_losses_refuse_labels_of_another_shape(loss, labels):
    with pytest.raises(ValueError, match="Expected (labels|probabilities).* Received: "):
        loss(tf.zeros((3, 2)), labels)


@ALL
@pytest.mark.parametrize(
    "targets", [[1], [[1]], [1, 0], [[0.5, 0.5]], [[0.5, 0.5, 0.0]] * 3, [[0, 1, 0]] * 3, [[0, 1]]], ids=str
)
def test_nothing_is_broadcast(loss, targets):
    for function in (loss, losses.is_wrong):
        with pytest.raises(ValueError, match="Expected (labels of 3 examples|probabilities).* Received: "):
            function(tf.zeros((3, 2)), tf.constant(targets))


def test_is_wrong():
    logits = tf.constant(
        [[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [np.nan, 0.0], [1.0, np.nan], [np.inf, 0.0], [1.0, -np.inf]]
    )
    expected = [False, True, False, True, True, True, True]
    labels = np.zeros(7, np.int64)
    for same in (labels, labels[:, None], np.eye(2)[labels]):
        np.testing.assert_array_equal(losses.is_wrong(logits, same), expected)
    np.testing.assert_array_equal(losses.is_wrong(logits.numpy(), labels), expected)  # of arrays
    np.testing.assert_array_equal(losses.is_wrong(tf.cast(logits, tf.float16), labels), expected)
