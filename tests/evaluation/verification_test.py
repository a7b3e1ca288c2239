import numpy as np
import pytest
import tensorflow as tf

from robust_keras import threats
from robust_keras.evaluation import verification

pytestmark = pytest.mark.oldest

LINF = threats.threat(norm="Linf", epsilon="8/255")
# The last one leaves an incomplete batch.
BYTES = np.array([100, 128, 129, 140, 250], np.uint8)
LABELS = np.array([0, 1, 1, 1, 1], np.int32)


def make_images(values=BYTES):
    return np.broadcast_to(np.asarray(values)[:, None, None, None], (len(values), 2, 2, 3)).astype(np.uint8).copy()


def predict_fn(x):
    """Class 1 over 127.5."""
    feature = x[:, 0, 0, :1] * 255.0 - 127.5
    return tf.concat([-feature, feature], axis=1)


def make_judge(predict_fn=predict_fn, threat=LINF, batch_size=2, images=None):
    return verification.Judge(predict_fn, make_images() if images is None else images, LABELS, threat, batch_size)


def proposed(values):
    """Images of bytes, as floats."""
    return np.float32(np.broadcast_to(np.array(values)[:, None, None, None], (len(values), 2, 2, 3)) / 255)


def test_judge_batches():
    sizes = []

    def counting(x):
        sizes.append(x.shape[0])
        return predict_fn(x)

    indices = np.array([4, 1, 0, 3, 2])
    judged = make_judge(counting).judge(indices, proposed([243, 127, 108, 135, 127.4]))
    np.testing.assert_array_equal(judged.wrong, [False, True, False, False, True])
    np.testing.assert_array_equal(judged.wrong_uint8, judged.wrong)
    # One size, as they are and rounded, also for the last one alone.
    assert sizes == [2] * 6


def test_judge_of_nothing():
    judged = make_judge().judge(np.zeros(0, int), np.zeros((0, 2, 2, 3), np.float32))
    assert [each.shape for each in judged] == [(0,)] * 4


@pytest.mark.parametrize("value", [120.0 - 0.01, 136.0 + 0.01, np.nan, np.inf])
def test_one_pixel_outside_the_ball_breaks_nothing_and_is_counted(value):
    # Both are wrong to the model, the second image where it counts.
    images = proposed([127.4, 127.4])
    images[1, 1, 1, 2] = value / 255
    judge = make_judge()
    wrong, wrong_uint8, non_finite, outside = judge.judge(np.array([1, 1]), images)
    np.testing.assert_array_equal(wrong, [True, False])
    np.testing.assert_array_equal(wrong_uint8, [True, False])
    np.testing.assert_array_equal(non_finite, [False, not np.isfinite(value)])
    np.testing.assert_array_equal(outside, [False, np.isfinite(value)])
    assert not judge.non_finite  # The model was not asked.
    images[1, 1, 1, 2] = 136 / 255
    np.testing.assert_array_equal(judge.judge(np.array([1, 1]), images), [[1, 1], [1, 1], [0, 0], [0, 0]])


def test_outside_the_range():
    upwards = make_images([250, 0])
    judge = verification.Judge(predict_fn, upwards, np.array([0, 1]), LINF, 2)
    np.testing.assert_array_equal(judge.judge(np.array([0, 1]), proposed([255.01, -0.01])).outside, [True, True])
    judged = judge.judge(np.array([0, 1]), proposed([255.0, 0.0]))
    np.testing.assert_array_equal(judged, [[1, 1], [1, 1], [0, 0], [0, 0]])


@pytest.mark.parametrize("norm, factor", [("L2", 1 / np.sqrt(12)), ("L1", 1 / 12)])
def test_distance_is_that_of_the_norm(norm, factor):
    threat = threats.threat(norm=norm, epsilon=0.3)
    judge = make_judge(threat=threat)
    clean = make_images()[1:2] / np.float32(255)
    assert not judge.judge(np.array([1]), clean + np.float32(0.3 * factor)).outside[0]
    assert judge.judge(np.array([1]), clean + np.float32(0.301 * factor)).outside[0]


def test_rounded_to_bytes():
    # 128 becomes 127.4 and 127; 129 becomes 127.6 and 128.
    wrong, wrong_uint8, *_ = make_judge().judge(np.array([1, 2]), proposed([127.4, 127.6]))
    np.testing.assert_array_equal(wrong, [True, False])
    np.testing.assert_array_equal(wrong_uint8, [True, False])
    # 127.51 is right, and rounds to 128, right; at 127.499 the threshold is passed, and rounds to 127.
    judged = make_judge(lambda x: predict_fn(x + 0.4 / 255)).judge(np.array([1]), proposed([127.05]))
    np.testing.assert_array_equal([*judged.wrong, *judged.wrong_uint8], [True, True])
    judged = make_judge(lambda x: predict_fn(x - 0.3 / 255)).judge(np.array([1]), proposed([127.7]))
    np.testing.assert_array_equal([*judged.wrong, *judged.wrong_uint8], [True, False])


def test_no_number_is_not_right():
    def undefined(x):
        return tf.where(x[:, 0, 0, :1] > 0.9, np.nan, predict_fn(x))

    judge = make_judge(undefined)
    assert not judge.judge(np.array([3]), proposed([141])).wrong.any() and not judge.non_finite
    np.testing.assert_array_equal(judge.judge(np.array([4, 3]), proposed([249, 141])).wrong, [True, False])
    assert judge.non_finite is True
    judge.judge(np.array([3]), proposed([141]))
    assert judge.non_finite is True
