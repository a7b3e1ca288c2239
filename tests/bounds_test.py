import functools

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import bounds

BYTES = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
EXPECTED = BYTES.astype(np.float32) / np.float32(255)

# The same images, with the bounds of a model that takes them so.
SAME = {
    "bytes": (BYTES, (0, 1)),
    "bytes of a model of any range": (BYTES, (-1, 1)),
    "0 to 255": (BYTES.astype(np.float32), (0, 255)),
    "0 to 255 in half precision": (BYTES.astype(np.float16), (0, 255)),
    "0 to 255 in double precision": (BYTES.astype(np.float64), (0.0, 255.0)),
    "0 to 1": (EXPECTED, (0, 1)),
    "0 to 1 in double precision": (BYTES / 255, (0, 1)),
    "a list": (EXPECTED.tolist(), (0, 1)),
}


@pytest.mark.parametrize("name", SAME)
def test_bytes_and_floats_are_the_same_bits(name):
    images, given = SAME[name]
    x = bounds.to_unit(images, given)
    assert isinstance(x, np.ndarray) and x.dtype == np.float32
    np.testing.assert_array_equal(x, EXPECTED)
    x = bounds.to_unit(tf.constant(np.asarray(images)), given)
    assert tf.is_tensor(x) and x.dtype == tf.float32
    np.testing.assert_array_equal(x, EXPECTED)
    # A program multiplies by 1 / 255, of bytes and floats alike.
    x, of_bytes = (
        tf.function(functools.partial(bounds.to_unit, bounds=range_), autograph=False)(tf.constant(np.asarray(each)))
        for each, range_ in ((images, given), (BYTES, (0, 1)))
    )
    np.testing.assert_allclose(x, EXPECTED, rtol=0, atol=6e-8)
    if given[1] == 255:
        np.testing.assert_array_equal(x, of_bytes)


def test_other_bounds_are_a_line():
    given = np.array([[-2.0, -1.0, 6.0]])
    np.testing.assert_array_equal(bounds.to_unit(given, (-2, 6)), np.float32([[0, 0.125, 1]]))
    np.testing.assert_array_equal(bounds.from_unit(np.float32([[0, 0.125, 1]]), (-2, 6)), given)
    x = tf.constant([[0.3]])
    assert bounds.from_unit(x, (0, 1)) is x


def test_what_a_resampling_adds_is_cut():
    x = bounds.to_unit(np.float32([[-1e-7, 1 + 2e-7]]))
    np.testing.assert_array_equal(x, [[0, 1]])
    np.testing.assert_array_equal(bounds.to_unit(np.float32([[-1e-4, 255.0001]]), (0, 255)), [[0, 1]])


def test_what_is_given_stays_as_it_is():
    given = np.float32([[-1e-7, 0.5]])
    bounds.to_unit(given)
    assert given[0, 0] < 0


def test_none_and_black_images_are_images():
    assert bounds.to_unit(np.zeros((0, 2, 2, 3))).shape == (0, 2, 2, 3)
    np.testing.assert_array_equal(bounds.to_unit(np.zeros((1, 2)), (0, 255)), [[0, 0]])


REFUSED = {
    "no number": (
        np.array([[0.1, np.nan]]),
        (0, 1),
        "finite images within the bounds .* Received: values from nan to nan",
    ),
    "infinite": (np.array([[0.1, np.inf]]), (0, 1), "Received: values from 0.1 to inf"),
    "bytes as floats": (np.array([[0.0, 200.0]]), (0, 1), r"Received: values from 0 to 200; .* say bounds=\(0, 255\)"),
    "negative": (np.array([[-1.0, 1.0]]), (0, 1), "Received: values from -1 to 1$"),
    "above": (np.array([[0.0, 256.0]]), (0, 255), r"within the bounds \(0, 255\). Received: values from 0 to 256$"),
    "fractions for bytes": (
        np.array([[0.0, 0.7, 1.0]]),
        (0, 255),
        "Received: values from 0 to 1, which are nearly black there",
    ),
    "integers": (np.array([[1, 2]]), (0, 255), "bytes, uint8, or as floats. Received: int64"),
    "flags": (np.array([[True]]), (0, 1), "Received: bool"),
    "objects": (np.array([None, 0.5]), (0, 1), "Received: objects"),
    "several shapes": ([[0.0], [0.0, 1.0]], (0, 1), "images of one shape"),
    "text": (np.array([["a"]]), (0, 1), "Received: string"),
    "complex numbers": (np.array([[1j]]), (0, 1), "Received: complex128"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_the_bounds_is_refused(name):
    images, given, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        bounds.to_unit(images, given)
    assert "\n" not in str(refusal.value)
    if isinstance(images, np.ndarray) and images.dtype.kind in "fi":
        with pytest.raises(ValueError, match=message):
            bounds.to_unit(tf.constant(images), given)


@pytest.mark.parametrize("given", [(1, 0), (0, 0), (0, np.inf), (np.nan, 1), (0,), (0, 1, 2), None, "01a", 5], ids=str)
def test_bounds_that_are_none_are_refused(given):
    with pytest.raises(ValueError, match=r"Expected bounds as two finite numbers low < high.* Received: "):
        bounds.parse(given)


def test_bounds():
    assert bounds.parse([0, 255]) == (0.0, 255.0)
    assert bounds.parse(np.float32([-1, 1])) == (-1.0, 1.0)
