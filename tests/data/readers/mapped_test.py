"""Images in files as one array: the right ones, and no others."""

import mmap
import os
import tracemalloc

import numpy as np
import pytest

from robust_keras.data.readers import mapped

_SHAPE = (2, 3, 1)
_IMAGES = np.random.RandomState(0).randint(0, 256, (13, *_SHAPE)).astype(np.uint8)


def _parts(folder, counts=(5, 0, 1, 7), offsets=(0, 3, 128, 5000)):
    """The images in files of their own, each after and before other bytes."""
    parts, first = [], 0
    for k, (count, offset) in enumerate(zip(counts, offsets)):
        path = folder / f"{k}.bin"
        path.write_bytes(b"x" * offset + _IMAGES[first : first + count].tobytes() + b"y" * k)
        parts.append(mapped.Part(str(path), offset, count))
        first += count
    return [part for part in parts if part.num_images or part.offset]


@pytest.fixture
def images(tmp_path):
    return mapped.MappedImages(_parts(tmp_path), _SHAPE)


@pytest.mark.parametrize(
    "index",
    [
        *(slice(*ends) for ends in [(None,), (4, 7), (0, 5), (6, 6), (9, 2), (-3, None), (10, 99), (50, 60)]),
        *(slice(*ends) for ends in [(None, None, 3), (None, None, -1), (7, 1, -2)]),
        np.array([12, 0, 5, 5, 4, 6]),
        np.array([-1, -13, 3]),
        np.array([], np.int64),
        np.array([[1, 2], [11, 0]]),
        np.array([3, 8], np.uint8),
        np.array([3, 8], np.uint64),
        np.int64(5),
        -1,
    ],
)
def test_indices_mean_what_they_mean_to_numpy(images, index):
    found, expected = images[index], _IMAGES[index]
    np.testing.assert_array_equal(found, expected)
    assert type(found) is np.ndarray and found.dtype == np.uint8 and found.shape == expected.shape
    found[...] = 0  # A copy, which can be changed.
    np.testing.assert_array_equal(images[index], expected)


def test_is_an_image_array(images):
    assert images.shape == (13, *_SHAPE) and images.dtype == np.uint8 and len(images) == 13
    np.testing.assert_array_equal(np.asarray(images), _IMAGES)
    np.testing.assert_array_equal(np.asarray(images, np.float32), _IMAGES.astype(np.float32))


@pytest.mark.parametrize(
    "index, match",
    [
        (np.array([0, 13]), "indices of 13 images. Received: 0 to 13"),
        (np.array([-14, 2]), "indices of 13 images. Received: -14 to 2"),
        (np.array([True] * 13), "integers. Received: bool"),
        (np.array([0.0]), "integers. Received: float64"),
    ],
)
def test_refuses_indices(images, index, match):
    with pytest.raises(IndexError, match=match):
        images[index]


def test_column_major(tmp_path):
    # Pixel (row 1, column 2, channel 0) of 2 x 3 x 2: the channel's first column is its first two bytes.
    (tmp_path / "file").write_bytes(b"-" + bytes(range(24)))
    images = mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 1, 2)], (2, 3, 2), column_major=True)
    assert images.shape == (2, 2, 3, 2)
    for found in (images[:], images[np.array([0, 1])], np.stack([images[0], images[1]])):
        for n, row, column, channel in np.ndindex(2, 2, 3, 2):
            assert found[n, row, column, channel] == 12 * n + 6 * channel + 2 * column + row
        assert found.flags.c_contiguous


def test_refuses_a_file_that_is_too_short(tmp_path):
    (tmp_path / "file").write_bytes(bytes(17))
    with pytest.raises(ValueError, match=r"Expected 3 images, 18 bytes, in .*file. Received: 17 bytes"):
        mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 0, 3)], _SHAPE)


def test_reads_no_more_than_is_asked_for(tmp_path):
    with open(tmp_path / "file", "wb") as file:
        file.truncate(300_000 * 3072)  # 0.9 GB, of which the disk holds nothing.
    tracemalloc.start()
    try:
        images = mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 0, 300_000)], (32, 32, 3))
        images[1000:1100], images[np.arange(0, 300_000, 3000)]
        assert tracemalloc.get_traced_memory()[1] < 2e6
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads what Linux says of memory")
def test_a_pass_over_all_images_does_not_stay_in_memory(tmp_path):
    def mapped_bytes():
        with open("/proc/self/status") as file:
            return 1024 * int(next(line for line in file if line.startswith("RssFile")).split()[1])

    with open(tmp_path / "file", "wb") as file:
        file.truncate(40_000 * 3072)  # 0.1 GB.
    images = mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 0, 40_000)], (32, 32, 3), column_major=True)
    before = mapped_bytes()
    for start in range(0, 40_000, 1000):
        images[start : start + 1000]
    assert mapped_bytes() - before < 2e7
    for start in range(0, 40_000, 1000):  # Images from anywhere are mapped, but for the moment.
        images[np.arange(start, start + 1000)]
    assert mapped_bytes() - before < 2e7


def test_a_file_that_shrinks_is_an_error_where_it_is_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(10 * 12))
    images = mapped.MappedImages([mapped.Part(str(path), 0, 10)], (2, 2, 3))
    path.write_bytes(bytes(9 * 12))
    assert images[:9].shape == (9, 2, 2, 3)
    with pytest.raises(ValueError, match="Expected 10 images in .*file. Received: fewer"):
        images[5:]


@pytest.mark.parametrize("index", [np.array([0, 8, 2, 9]), np.arange(3, 9)])
@pytest.mark.parametrize("width", [5, 700, 200_000])
def test_the_disk_is_told_of_what_is_asked_for(tmp_path, monkeypatch, index, width):
    if not hasattr(mmap, "MADV_WILLNEED"):
        pytest.skip("no such call on this system")
    told = []

    class Map(mmap.mmap):
        def madvise(self, what, start=0, length=None):
            if what == mmap.MADV_WILLNEED:
                super().madvise(what, start, length)
                assert start % mmap.PAGESIZE == 0 and length <= 1 << 17
                told.append(range(start, start + length))

    monkeypatch.setattr(mapped.mmap, "mmap", Map)
    with open(tmp_path / "file", "wb") as file:
        file.truncate(9000 + 10 * width)
    images = mapped.MappedImages([mapped.Part(str(tmp_path / "file"), 9000, 10)], (1, width, 1))
    images[index]
    asked = np.arange(10)[index].tolist()
    for row in range(10):
        first = 9000 + row * width
        bytes_of_row = np.linspace(first, first + width - 1, 50).astype(int).tolist()
        if row in asked:
            assert all(any(byte in part for part in told) for byte in bytes_of_row)
        elif width == 200_000:  # But for a page where the next one begins.
            assert not any(first + width // 2 in part for part in told)
    assert sum(map(len, told)) <= len(asked) * (width + 2 * mmap.PAGESIZE)
