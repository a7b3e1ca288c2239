import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise
from robust_keras.data import augmentation
from robust_keras.data.augmentation import crop_and_flip, random_resized_crop

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


# Random parts, resized.


def boxes(num=4000, height=40, width=40, area=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    drawn = noise.fold_in(seeds(num), noise.AUGMENTATION)
    return augmentation._boxes(drawn, (height, width), area, ratio).numpy()


@pytest.mark.parametrize("height, width", [(40, 40), (30, 60)])
def test_parts_have_areas_and_ratios_within_the_bounds(height, width):
    top, left, rows, columns = boxes(height=height, width=width).T
    assert min(top.min(), left.min()) == 0
    assert (top + rows).max() == height and (left + columns).max() == width
    # Sides are whole pixels: half a pixel of each is rounding.
    share = (rows * columns) / (height * width)
    rounding = (rows + columns) / 2 / (height * width)
    assert (share > 0.08 - rounding).all() and (share <= 1).all()
    whole = (rows == height) & (columns == width)
    assert ((columns - 0.5) / (rows + 0.5) < 4 / 3)[~whole].all() and ((columns + 0.5) / (rows - 0.5) > 3 / 4)[
        ~whole
    ].all()
    assert np.unique(np.stack([rows, columns]), axis=1).shape[1] > 100


def test_areas_are_uniform_where_all_fit():
    """Of parts that are small enough to fit at once, as many in each tenth; the chi-squared of 9 is over 28 one time in a thousand."""
    _, _, rows, columns = boxes(height=400, width=400, area=(0.1, 0.5)).T
    counts = np.histogram(rows * columns / 160_000, bins=10, range=(0.1, 0.5))[0]
    assert counts.sum() > 3990 and ((counts - 400) ** 2 / 400).sum() < 28
    ratios = np.log(columns / rows)
    assert abs(ratios.mean()) < 0.01 and abs(ratios.std() - np.log(16 / 9) / 12**0.5) < 0.01


def test_places_are_uniform():
    top, left, rows, columns = boxes(height=400, width=400, area=(0.1, 0.2)).T
    for offset, length in ((top, rows), (left, columns)):
        share = offset / (400 - length)
        assert abs(share.mean() - 0.5) < 4 * 12**-0.5 / 4000**0.5 and abs(share.std() - 12**-0.5) < 0.01


@pytest.mark.parametrize("size", [5, 12, 31])
def test_a_part_is_resized_bilinearly(size):
    originals = images(60, height=20, width=17)
    found = random_resized_crop(tf.constant(originals), seeds(60), size=size)
    assert found.dtype == tf.uint8 and found.shape == (60, size, size, 3)
    drawn = noise.fold_in(seeds(60), noise.AUGMENTATION)
    mirrored = noise.integers(noise.fold_in(drawn, 0), 1, 2)[:, 0].numpy() == 1
    assert 15 < mirrored.sum() < 45
    for k, (top, left, rows, columns) in enumerate(boxes(60, height=20, width=17)):
        part = originals[k, top : top + rows, left : left + columns]
        expected = tf.image.resize(part, (size, size), antialias=False).numpy()
        expected = expected[:, ::-1] if mirrored[k] else expected
        np.testing.assert_allclose(found[k], expected, atol=0.5 + 1e-3)


def test_by_hand():
    """Four pixels become two, each the mean of two, and a half is rounded up; two become four, between centres."""
    whole = dict(area=(1.0, 1.0), ratio=(1.0, 1.0), flip=False)
    four = np.array([[10, 13, 20, 30]], np.uint8).repeat(4, axis=0)[None, ..., None]
    found = random_resized_crop(tf.constant(four), seeds(1), size=2, **whole)
    np.testing.assert_array_equal(found[0, ..., 0], [[12, 25]] * 2)
    two = np.array([[0, 100]], np.uint8).repeat(2, axis=0)[None, ..., None]
    found = random_resized_crop(tf.constant(two), seeds(1), size=4, **whole)
    np.testing.assert_array_equal(found[0, ..., 0], [[0, 25, 75, 100]] * 4)
    originals = images(5)
    np.testing.assert_array_equal(random_resized_crop(tf.constant(originals), seeds(5), **whole), originals)
    flipped = random_resized_crop(tf.constant(images(100)), seeds(100), **{**whole, "flip": True}).numpy()
    is_flipped = (flipped == images(100)[:, :, ::-1]).all((1, 2, 3))
    assert 30 < is_flipped.sum() < 70 and ((flipped == images(100)).all((1, 2, 3)) ^ is_flipped).all()


def test_a_part_depends_on_its_own_seed_alone():
    originals, all_seeds = tf.constant(images(40)), seeds(40)
    together = random_resized_crop(originals, all_seeds, size=5).numpy()
    order = np.random.default_rng(1).permutation(40)[:17]
    chosen = random_resized_crop(tf.gather(originals, order), tf.gather(all_seeds, order), size=5)
    np.testing.assert_array_equal(chosen, together[order])
    # Of a batch whose size is not known when it is compiled.
    specs = tf.TensorSpec((None, *originals.shape[1:]), tf.uint8), tf.TensorSpec((None, 2), tf.int32)
    compiled = tf.function(lambda x, s: random_resized_crop(x, s, size=5), input_signature=specs)
    np.testing.assert_array_equal(compiled(originals, all_seeds), together)
    assert (random_resized_crop(originals, seeds(40, step=1), size=5).numpy() != together).any((1, 2, 3)).mean() > 0.8


@pytest.mark.parametrize(
    "settings",
    [{"size": 0}, {"size": 2.5}, {"size": 1025}, {"area": (0.0, 1.0)}, {"area": (0.5, 1.5)}, {"ratio": (2, 1)}],
)
def test_refuses_what_no_part_can_have(settings):
    with pytest.raises(ValueError, match="Expected a size from 1 to 1024, an area within .*Received: "):
        random_resized_crop(tf.constant(images(2)), seeds(2), **settings)
    with pytest.raises(ValueError, match="images as bytes. Received: float32"):
        random_resized_crop(tf.zeros((2, 4, 4, 3)), seeds(2))
