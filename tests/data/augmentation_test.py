import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise
from robust_keras.data.augmentation import crop_and_flip

SIZE, PADDING, NUM = 6, 2, 1000


def images(num=NUM, height=SIZE, width=SIZE, channels=3, seed=0):
    """No pixel is 0, so padding shows."""
    return np.random.default_rng(seed).integers(1, 256, (num, height, width, channels)).astype(np.uint8)


def seeds(num=NUM, step=0):
    return noise.example_seeds(0, step, tf.range(num))


def found_crops(originals, outputs, padding):
    """(row, column, flipped) of each output in its zero-padded original, by search: [batch, 3]."""
    height, width = originals.shape[1:3]
    padded = np.pad(originals, [(0, 0), (padding, padding), (padding, padding), (0, 0)])
    found = np.full((len(originals), 3), -1)
    for row in range(2 * padding + 1):
        for column in range(2 * padding + 1):
            window = padded[:, row : row + height, column : column + width]
            for flipped, candidate in enumerate((window, window[:, :, ::-1])):
                found[(outputs == candidate).all((1, 2, 3))] = row, column, flipped
    return found


@pytest.fixture(scope="module")
def crops():
    originals = images()
    outputs = crop_and_flip(tf.constant(originals), seeds(), padding=PADDING)
    assert outputs.dtype == tf.uint8 and outputs.shape == originals.shape
    return found_crops(originals, outputs.numpy(), PADDING)


def test_each_is_a_window_of_the_padded_image_or_its_mirror(crops):
    assert crops.min() >= 0


def test_every_offset_occurs_as_often(crops):
    num_offsets = (2 * PADDING + 1) ** 2
    counts = np.zeros((2 * PADDING + 1, 2 * PADDING + 1))
    np.add.at(counts, (crops[:, 0], crops[:, 1]), 1)
    expected = NUM / num_offsets
    # Chi-squared with 24 degrees of freedom is over 51 once in a thousand.
    assert counts.min() > 0 and ((counts - expected) ** 2 / expected).sum() < 51


def test_half_are_flipped_whatever_the_offset(crops):
    # Four standard deviations.
    assert abs(crops[:, 2].mean() - 0.5) < 4 * 0.5 / NUM**0.5
    for axis in (0, 1):
        for offset in range(2 * PADDING + 1):
            flipped = crops[crops[:, axis] == offset, 2]
            assert abs(flipped.mean() - 0.5) < 4 * 0.5 / len(flipped) ** 0.5


def test_never_flips_when_told_not_to(crops):
    originals = images()
    outputs = crop_and_flip(tf.constant(originals), seeds(), padding=PADDING, flip=False).numpy()
    unflipped = found_crops(originals, outputs, PADDING)
    assert np.all(unflipped[:, 2] == 0)
    # The offsets are those with flips.
    np.testing.assert_array_equal(unflipped[:, :2], crops[:, :2])


def test_default_is_the_papers_padding_of_four_with_flips():
    originals = images(400, 32, 32)
    found = found_crops(originals, crop_and_flip(tf.constant(originals), seeds(400)).numpy(), 4)
    assert found.min() >= 0
    assert set(found[:, 0]) == set(found[:, 1]) == set(range(9)) and set(found[:, 2]) == {0, 1}


def test_images_that_are_not_square():
    originals = images(200, height=3, width=7, channels=1)
    found = found_crops(originals, crop_and_flip(tf.constant(originals), seeds(200), padding=1).numpy(), 1)
    assert found.min() >= 0 and set(found[:, 0]) == set(found[:, 1]) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_without_padding_and_flip_nothing_changes(dtype):
    originals = images(50).astype(dtype)
    outputs = crop_and_flip(tf.constant(originals), seeds(50), padding=0, flip=False)
    assert outputs.dtype == dtype
    np.testing.assert_array_equal(outputs, originals)


def test_without_padding_flips_alone():
    originals = images(100)
    outputs = crop_and_flip(tf.constant(originals), seeds(100), padding=0).numpy()
    found = found_crops(originals, outputs, 0)
    assert found.min() >= 0 and set(found[:, 2]) == {0, 1}


def test_an_example_depends_on_its_own_seed_alone():
    originals, all_seeds = tf.constant(images(40)), seeds(40)
    together = crop_and_flip(originals, all_seeds, padding=PADDING).numpy()
    order = np.random.default_rng(1).permutation(40)[:17]
    chosen = crop_and_flip(tf.gather(originals, order), tf.gather(all_seeds, order), padding=PADDING)
    np.testing.assert_array_equal(chosen, together[order])
    alone = crop_and_flip(originals[7:8], all_seeds[7:8], padding=PADDING)
    np.testing.assert_array_equal(alone[0], together[7])
    compiled = tf.function(lambda x, s: crop_and_flip(x, s, padding=PADDING))(originals, all_seeds)
    np.testing.assert_array_equal(compiled, together)
    # Equal seeds, equal crops, whatever the image; other seeds, others.
    same_seed = tf.repeat(all_seeds[:1], 40, axis=0)
    found = found_crops(originals.numpy(), crop_and_flip(originals, same_seed, padding=PADDING).numpy(), PADDING)
    assert len(np.unique(found, axis=0)) == 1
    later = crop_and_flip(originals, seeds(40, step=1), padding=PADDING).numpy()
    assert (later != together).any((1, 2, 3)).mean() > 0.8
