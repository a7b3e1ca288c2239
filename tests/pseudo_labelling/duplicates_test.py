import functools
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data import sources
from robust_keras.pseudo_labelling import duplicates

_TFDS_DIR = pathlib.Path(__file__).parents[2].parent / "shared" / "tfds"
needs_cifar10 = pytest.mark.skipif(not (_TFDS_DIR / "cifar10").is_dir(), reason="no prepared CIFAR-10")

NUM = 150
SHAPES = [(16, 16, 3), (16, 24, 3), (24, 16, 1)]
DIRECTIONS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]


def scenes(num=NUM, shape=(16, 16, 3), seed=0, cells=7):
    """Smooth random images, uint8: noise on a coarse grid, mostly grey, enlarged; none is like another."""
    height, width, channels = shape
    rng = np.random.default_rng(seed)
    noise = rng.normal(128, 50, (num, cells, cells, 1)) + rng.normal(0, 12, (num, cells, cells, channels))
    enlarged = tf.image.resize(noise, (height, width), method="bicubic").numpy()
    return np.clip(np.rint(enlarged), 0, 255).astype(np.uint8)


def mirrored(images):
    return images[:, :, ::-1]


def shifted(images, row, column, mode):
    height, width = images.shape[1:3]
    padded = np.pad(images, [(0, 0), (2, 2), (2, 2), (0, 0)], mode=mode)
    return padded[:, 2 - row : 2 - row + height, 2 - column : 2 - column + width]


def recompressed(images):
    return np.stack([tf.io.decode_jpeg(tf.io.encode_jpeg(x, quality=75)).numpy() for x in images])


def scaled(images, gain, offset=0):
    return np.clip(np.rint(images * gain + offset), 0, 255).astype(np.uint8)


COPIES = {
    "recompressed": recompressed,
    "recompressed mirror": lambda x: recompressed(mirrored(x)),
    "brightened": lambda x: scaled(x, 1.03),
    "paler": lambda x: scaled(x, 0.7, 40),
}
for _row, _column in DIRECTIONS:
    for _mode in ("constant", "edge"):
        _shift = functools.partial(shifted, row=2 * _row, column=2 * _column, mode=_mode)
        COPIES[f"shifted by {2 * _row}, {2 * _column}, {_mode}"] = _shift
COPIES["mirror shifted by -2, 2"] = lambda x: mirrored(shifted(x, -2, 2, "constant"))
COPIES["shifted by 1, -1"] = lambda x: shifted(x, 1, -1, "edge")


@functools.cache
def make_index(shape=(16, 16, 3)):
    return duplicates.build_index(scenes(shape=shape))


def search(images, shape=(16, 16, 3)):
    """(neighbors, cosines, similarities, exact) of all images."""
    neighbors, cosines = (x.numpy() for x in duplicates.nearest(make_index(shape), images))
    return neighbors, cosines, *duplicates.similarity(make_index(shape), images, neighbors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("copy", [lambda x: x, mirrored], ids=["same", "mirror"])
def test_exact_copies_are_exact(shape, copy):
    neighbors, cosines, similarities, exact = search(copy(scenes(shape=shape)), shape)
    np.testing.assert_array_equal(neighbors, np.arange(NUM))
    np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
    np.testing.assert_array_equal(similarities, 1.0)
    assert exact.all() and exact.dtype == bool
    assert neighbors.dtype == np.int32 and cosines.dtype == similarities.dtype == np.float32


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", COPIES)
def test_altered_copies_are_found_and_are_not_exact(shape, kind):
    neighbors, cosines, similarities, exact = search(COPIES[kind](scenes(shape=shape)), shape)
    np.testing.assert_array_equal(neighbors, np.arange(NUM))
    assert cosines.min() >= duplicates.COARSE_THRESHOLD
    assert similarities.min() >= 0.9 > duplicates.THRESHOLD and not exact.any()


@pytest.mark.parametrize("row, column", [(0, 1), (-1, 0), (1, 2), (-2, -1)])
def test_copies_one_pixel_off_every_crop_are_found(row, column):
    images = scenes(40, (32, 32, 3), seed=7, cells=5)
    index = duplicates.build_index(images)
    copies = shifted(images, row, column, "edge")
    neighbors, cosines = (x.numpy() for x in duplicates.nearest(index, copies))
    np.testing.assert_array_equal(neighbors, np.arange(40))
    assert duplicates.COARSE_THRESHOLD <= cosines.min() and cosines.max() < 0.9999
    assert duplicates.similarity(index, copies, neighbors)[0].min() >= 0.9


@pytest.mark.parametrize("shape", SHAPES)
def test_other_images_are_not_found(shape):
    others = scenes(400, shape, seed=1)
    _, cosines, similarities, exact = search(others, shape)
    assert (cosines >= duplicates.COARSE_THRESHOLD).mean() < 0.02
    assert similarities.max() < duplicates.THRESHOLD and not exact.any()
    # Nor is one upside down.
    assert search(scenes(shape=shape)[:, ::-1], shape)[2].max() < duplicates.THRESHOLD


def test_a_changed_pixel_is_no_exact_copy():
    images = scenes()
    images[:, 5, 5, 1] ^= 1
    _, _, similarities, exact = search(images)
    assert not exact.any() and similarities.min() > 0.99 and similarities.max() < 1


def test_nearest_is_the_largest_cosine_over_crops_and_mirrors():
    """Against cosine transforms as sums over pixels, one at a time."""
    tests, images = scenes(4, (9, 12, 3), seed=2), scenes(5, (9, 12, 3), seed=3)
    index = duplicates.build_index(tests)
    frequencies = [(i, j, k) for i in range(5) for j in range(5) for k in range(3) if i + j <= (2 if k else 4)]

    def descriptor(crop):
        height, width, channels = crop.shape
        values = [1.0]
        for i, j, k in frequencies:
            weight = (i * i + j * j) ** 0.25 if i + j else 1 / 8
            weight *= 1.5 if k and i + j else 1.0
            for num, frequency in ((height, i), (width, j), (channels, k)):
                weight *= (2 / num if frequency else 1 / num) ** 0.5
            total = sum(
                crop[r, c, s]
                * np.cos(np.pi * i * (r + 0.5) / height)
                * np.cos(np.pi * j * (c + 0.5) / width)
                * np.cos(np.pi * k * (s + 0.5) / channels)
                for r in range(height)
                for c in range(width)
                for s in range(channels)
            )
            values.append(weight * total / (height * width) ** 0.5)
        return np.array(values) / np.linalg.norm(values)

    offsets = [(2, 2), (0, 0), (0, 2), (0, 4), (2, 0), (2, 4), (4, 0), (4, 2), (4, 4), (1, 1), (1, 3), (3, 1), (3, 3)]
    crops = np.array(
        [
            [descriptor(side[i : i + 5, j : j + 8].astype(float)) for i, j in offsets for side in (test, test[:, ::-1])]
            for test in tests
        ]
    )
    for image, neighbor, cosine in zip(images, *duplicates.nearest(index, images)):
        expected = (crops @ descriptor(image[2:-2, 2:-2].astype(float))).max(axis=1)
        assert neighbor == expected.argmax()
        np.testing.assert_allclose(cosine, expected.max(), atol=1e-5)


def test_tiles_make_no_difference(monkeypatch):
    images = scenes(seed=1)
    expected = [x.numpy() for x in duplicates.nearest(make_index(), images)]
    monkeypatch.setattr(duplicates, "_TILE", 7)  # Which does not divide the number of test images.
    assert NUM % 7
    index = duplicates.build_index(scenes())
    for ours, theirs in zip(duplicates.nearest(index, images), expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_array_equal(duplicates.nearest(index, scenes())[0], np.arange(NUM))


def test_similarity_is_the_measure_it_states():
    """Against sums over pixels, one at a time."""
    tests, images = scenes(3, (9, 11, 3), seed=4), scenes(3, (9, 11, 3), seed=5)
    images[2] = shifted(tests[2:], 1, -2, "constant")[0]
    images[1] = 128 + images[1] // 64  # Hardly above the noise.

    def correlation(a, b, row, column):
        """Pixel (r, c) of b is that of (r + row, c + column) of a."""
        products, squares_a, squares_b, count = 0, 0, 0, 0
        for r in range(1, 8):
            for c in range(1, 10):
                if 1 <= r + row < 8 and 1 <= c + column < 10:
                    for s in range(3):
                        for i, j in ((1, 0), (0, 1)):
                            in_a = a[r + row + i, c + column + j, s] - a[r + row - i, c + column - j, s]
                            in_b = b[r + i, c + j, s] - b[r - i, c - j, s]
                            products += in_a * in_b
                            squares_a += in_a**2
                            squares_b += in_b**2
                            count += 1
        return products / ((squares_a + 2 * count) * (squares_b + 2 * count)) ** 0.5

    shifts = [(i, j) for i in range(-2, 3) for j in range(-2, 3)]
    expected = [
        max(correlation(a, side, *shift) for shift in shifts for side in (b, b[:, ::-1]))
        for a, b in zip(images.astype(float), tests.astype(float))
    ]
    similarities, exact = duplicates.similarity(duplicates.build_index(tests), images, np.arange(3))
    np.testing.assert_allclose(similarities, expected, rtol=1e-6)
    assert expected[2] > 0.99 and not exact.any()
    assert "\n" not in duplicates.MEASURE


def test_sums_do_not_overflow():
    rows, columns = np.indices((100, 100))
    image = (255 * ((rows // 2 + columns // 2) % 2)).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    copy = image.copy()
    copy[0, 0, 0, 0] ^= 255
    similarities, exact = duplicates.similarity(duplicates.build_index(image), copy, [0])
    assert 0.999 < similarities[0] < 1 and not exact[0]


def test_flat_images_duplicate_what_they_equal_alone():
    levels = [0, 1, 100, 128, 254, 255]
    flat = np.concatenate([np.full((1, 16, 16, 3), level, np.uint8) for level in levels])
    coloured = np.zeros((2, 16, 16, 3), np.uint8)
    coloured[0, ..., 2] = coloured[1, ..., 0] = 200
    tests = np.concatenate([scenes(20), flat, coloured])
    index = duplicates.build_index(tests)

    neighbors, cosines = duplicates.nearest(index, tests)
    # To float32, all white is as near to white as to almost white.
    np.testing.assert_array_equal(np.delete(neighbors, 25), np.delete(np.arange(28), 25))
    assert neighbors[25] in (24, 25)
    np.testing.assert_allclose(cosines, 1.0, atol=1e-5)
    similarities, exact = duplicates.similarity(index, tests, neighbors)
    assert exact.all() and np.all(similarities == 1)

    rng = np.random.default_rng(0)
    near = np.concatenate(
        [
            np.full((1, 16, 16, 3), 90, np.uint8),
            flat[2:5] + rng.integers(0, 2, (3, 16, 16, 3), np.uint8),
            coloured // 2,
        ]
    )
    neighbors, cosines = duplicates.nearest(index, near)
    assert np.all(neighbors.numpy() >= 20) and np.isfinite(cosines).all()
    similarities, exact = duplicates.similarity(index, near, neighbors)
    assert not exact.any() and np.abs(similarities).max() < 0.3

    # Against images with contrast, and the other way round.
    similarities, exact = duplicates.similarity(index, scenes(6, seed=1), np.arange(20, 26))
    assert not exact.any() and np.all(similarities == 0)
    index = duplicates.build_index(scenes(20))
    similarities, exact = duplicates.similarity(index, flat, np.arange(6))
    assert not exact.any() and np.all(similarities == 0)
    _, cosines = duplicates.nearest(index, flat)
    assert np.isfinite(cosines).all() and np.max(cosines) < duplicates.COARSE_THRESHOLD


@pytest.mark.parametrize("jit_compile", [True, False])
def test_an_image_does_not_depend_on_its_batch(jit_compile):
    index = make_index()
    nearest = tf.function(functools.partial(duplicates.nearest, index), jit_compile=jit_compile)
    images = np.concatenate([recompressed(scenes(40)), scenes(24, seed=1)])
    together = [x.numpy() for x in nearest(images)]
    replaced = images.copy()
    replaced[1::2] = np.where(np.arange(32)[:, None, None, None] % 2, 255, scenes(32, seed=6))
    for before, after in zip(together, nearest(replaced)):
        np.testing.assert_array_equal(after[::2], before[::2])
    order = np.random.default_rng(0).permutation(64)
    neighbors, cosines = nearest(images[order])
    np.testing.assert_array_equal(neighbors, together[0][order])
    np.testing.assert_allclose(cosines, together[1][order], atol=1e-6)

    # More than are compared at once.
    images, neighbors = np.concatenate([images, images[order]]), np.concatenate([together[0], together[0][order]])
    similarities, exact = duplicates.similarity(index, images, neighbors)
    np.testing.assert_array_equal(similarities[64:], similarities[:64][order])
    for i in (0, 41, 63, 64, 127):
        alone, exactly = duplicates.similarity(index, images[i : i + 1], neighbors[i : i + 1])
        assert alone[0] == similarities[i] and exactly[0] == exact[i]


def test_compiled_equals_eager_whatever_the_type():
    images = np.concatenate([recompressed(scenes(20)), scenes(20, seed=1)])
    neighbors, cosines = duplicates.nearest(make_index(), images)
    floats = images / np.float32(255)
    compiled = tf.function(functools.partial(duplicates.nearest, make_index()), jit_compile=True)
    dynamic = tf.function(functools.partial(duplicates.nearest, make_index())).get_concrete_function(
        tf.TensorSpec((None, 16, 16, 3), tf.uint8)
    )
    for found in (
        compiled(images),
        dynamic(tf.constant(images)),
        duplicates.nearest(make_index(), floats),
        duplicates.nearest(make_index(), tf.constant(floats, tf.float64)),
        compiled(floats),
    ):
        np.testing.assert_array_equal(found[0], neighbors)
        np.testing.assert_allclose(found[1], cosines, atol=1e-5)


def test_no_images_at_all():
    similarities, exact = duplicates.similarity(make_index(), scenes()[:0], np.zeros(0, np.int32))
    assert similarities.shape == exact.shape == (0,)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 7, 8, 3), np.uint8),
        np.zeros((2, 8, 7, 3), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 0), np.uint8),
    ],
)
def test_test_images_that_do_not_fit(images):
    with pytest.raises(ValueError, match=r"Expected test images, uint8 .*Received: \w+ \(") as error:
        duplicates.build_index(images)
    assert str(images.shape) in str(error.value)


def test_smallest_images():
    images = scenes(10, (8, 8, 1), cells=6)
    neighbors, _ = duplicates.nearest(duplicates.build_index(images), mirrored(images))
    np.testing.assert_array_equal(neighbors, np.arange(10))


def test_pool_images_that_do_not_fit():
    for images in (scenes(2).astype(np.int32), scenes(2, (16, 15, 3)), scenes(2, (16, 16, 1)), scenes(2)[0]):
        with pytest.raises(ValueError, match=r"Expected images, uint8 or floats, of shape \[batch, 16, 16, 3\]. Rec"):
            duplicates.nearest(make_index(), images)
    for images in (scenes(2).astype(np.float32), scenes(2, (16, 15, 3)), scenes(2)[0]):
        with pytest.raises(ValueError, match=r"Expected images, uint8 \[n, 16, 16, 3\]. Received: "):
            duplicates.similarity(make_index(), images, [0, 1])
    for neighbors in ([0, 1, 2], [0.0, 1.0], [[0], [1]]):
        with pytest.raises(ValueError, match=r"Expected neighbors, integers of shape \(2,\). Received: "):
            duplicates.similarity(make_index(), scenes(2), neighbors)
    for neighbors in ([0, NUM], [-1, 0]):
        with pytest.raises(ValueError, match=f"Expected neighbors from 0 to {NUM - 1}. Received: "):
            duplicates.similarity(make_index(), scenes(2), neighbors)


@needs_cifar10
def test_copies_of_cifar10_are_found_among_others():
    images = sources.load("cifar10", "test", data_dir=str(_TFDS_DIR)).images
    tests, others = images[:8000], images[8000:]
    index = duplicates.build_index(tests)
    nearest = tf.function(functools.partial(duplicates.nearest, index), jit_compile=True)
    chosen = np.random.default_rng(0).choice(8000, 25, replace=False)
    # Not on the grid of blocks on which these images were compressed before.
    uneven = recompressed(np.pad(tests[chosen], [(0, 0), (5, 11), (3, 13), (0, 0)], mode="edge"))[:, 5:37, 3:35]
    copies = [tests[chosen], mirrored(tests[chosen]), uneven, *(copy(tests[chosen]) for copy in COPIES.values())]
    pool = np.concatenate([*copies, others])
    found = [nearest(pool[start : start + 250]) for start in range(0, len(pool) - len(pool) % 250, 250)]
    neighbors, cosines = (np.concatenate(x) for x in zip(*found))
    pool, num = pool[: len(neighbors)], 25 * len(copies)
    candidates = np.flatnonzero(cosines >= duplicates.COARSE_THRESHOLD)
    similarities, exact = duplicates.similarity(index, pool[candidates], neighbors[candidates])
    duplicated = candidates[similarities >= duplicates.THRESHOLD]
    np.testing.assert_array_equal(duplicated[duplicated < num], np.arange(num))
    np.testing.assert_array_equal(neighbors[:num], np.tile(chosen, len(copies)))
    np.testing.assert_array_equal(candidates[exact], np.arange(50))
    # CIFAR-10 has near duplicates of its own.
    assert (candidates >= num).mean() > 0 and np.mean(cosines[num:] >= duplicates.COARSE_THRESHOLD) < 0.06
    assert 0 < (duplicated >= num).sum() < 0.015 * (len(pool) - num)
