"""Opening npz files and `tiny_images.bin` where they lie, and converting what cannot be."""

import io
import json
import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data.readers import archives, formats, mapped

_IMAGES = np.random.RandomState(0).randint(0, 256, (12, 8, 6, 3)).astype(np.uint8)
_LABELS = np.arange(12) % 4


def npz(path, num_classes=4, image_shape=None, cache_dir=None):
    return formats.npz(str(path), image_shape=image_shape, num_classes=num_classes, cache_dir=cache_dir)


def tiny_images(path, num_classes=None, image_shape=None, cache_dir=None):
    return formats.tiny_images(str(path), image_shape=image_shape, num_classes=num_classes, cache_dir=cache_dir)


def npy(array, version=None):
    with io.BytesIO() as file:
        np.lib.format.write_array(file, np.asanyarray(array), version)
        return file.getvalue()


def write_zip(path, compression=zipfile.ZIP_STORED, **members):
    """A zip of bytes without what NumPy writes between an entry's header and its content."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def claiming(array, **changes):
    """An array whose header claims something else."""
    header = {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape, **changes}
    with io.BytesIO() as file:
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue() + array.tobytes()


def assert_refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("Expected ") and "Received: " in message
    return message


def assert_right(found, images=_IMAGES, labels=_LABELS):
    np.testing.assert_array_equal(found[0], images)
    np.testing.assert_array_equal(found[0][np.array([3, 11, 0])], images[[3, 11, 0]])
    np.testing.assert_array_equal(found[1], labels)
    assert found[1].dtype.isnative and found[1].dtype.kind in "iu"


def peak_memory(function):
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "set.npz"


# Mapped where they lie.


@pytest.mark.parametrize("prefix", [b"", b"#! something before the archive\n"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32, np.uint64])
def test_stored_arrays_are_mapped(path, capsys, prefix, version, dtype):
    labels = _LABELS.astype(dtype)
    np.savez(path, image=_IMAGES, other=np.zeros(9), label=labels)  # With 20 bytes before each array's own header.
    by_numpy = npz(path)
    write_zip(path, label=npy(labels, version), image=npy(_IMAGES, version))
    path.write_bytes(prefix + path.read_bytes())
    for found in (by_numpy, npz(path)):
        assert type(found[0]) is mapped.MappedImages
        assert type(found[1]) is np.memmap and found[1].dtype == dtype
    assert_right(npz(path))
    assert not (path.parent / "set.npz.shards").exists() and capsys.readouterr().out == ""
    images, labels = npz(path, num_classes=None)
    np.testing.assert_array_equal(images, _IMAGES)
    assert labels is None


def test_labels_of_one_column(path):
    """As `keras.datasets` has them."""
    np.savez(path, image=_IMAGES, label=_LABELS[:, None])
    assert_right(npz(path))
    assert npz(path)[1].shape == (12,)
    np.testing.assert_array_equal(formats.load_npz(str(path))[1], _LABELS)
    assert not (path.parent / "set.npz.shards").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.longdouble])
def test_every_byte_as_a_float(dtype):
    every_byte = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(formats.as_bytes((every_byte / 255).astype(dtype), "them"), every_byte)


def test_a_column_file_is_removed_whatever_happens(path, tmp_path):
    """An array in Fortran order is unpacked first; the file goes when no one has it open, here or in another block."""
    write_zip(path, image=npy(np.asfortranarray(_IMAGES)), label=npy(_LABELS))
    member = archives.members(str(path), ["image"])[0]["image"]
    for num_taken in (0, 1, 2, 100):
        blocks = archives.blocks(str(path), member, str(tmp_path), 5)
        taken = [block for block, _ in zip(blocks, range(num_taken))]
        blocks.close()
        np.testing.assert_array_equal(np.concatenate([_IMAGES[:0], *taken]), _IMAGES[: 5 * num_taken])
        assert not (tmp_path / "fortran_order").exists()


def test_what_is_mapped_is_the_file(path):
    np.savez(path, image=_IMAGES, label=_LABELS)
    images, labels = npz(path)
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(content.index(_IMAGES.tobytes()))
        file.write(bytes(100))
        file.seek(content.index(_LABELS.tobytes()))
        file.write(struct.pack("<q", 3))
    assert not images[0].ravel()[:100].any() and labels[0] == 3


def test_large_files_are_opened_in_little_memory(path):
    labels = np.arange(100_000)
    np.savez(path, image=np.zeros((100_000, 32, 32, 3), np.uint8), label=labels)
    assert path.stat().st_size > 300e6
    (images, found), peak = peak_memory(lambda: npz(path, num_classes=100_000))
    assert peak < 5e6
    _, peak = peak_memory(lambda: (images[np.arange(0, 100_000, 1000)], found[np.arange(0, 100_000, 1000)]))
    assert peak < 2e6


@pytest.mark.parametrize("part", [0.2, 0.5, 0.95])
@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_content(path, key, part, save):
    images = np.resize(_IMAGES, (1000, 8, 6, 3))
    save(path, image=images, label=np.arange(1000) % 4)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
    content = bytearray(path.read_bytes())
    begin = entry.header_offset + 30 + len(entry.filename) + 20
    content[begin + int(part * (entry.compress_size - 1))] ^= 255
    path.write_bytes(content)
    assert str(path) in assert_refused("whole npz file", npz, path)
    assert_refused("whole npz file", formats.load_npz, str(path))
    assert not (path.parent / "set.npz.shards").exists()
    if save is np.savez and key == "label":
        np.testing.assert_array_equal(npz(path, num_classes=None)[0], images)


@pytest.mark.parametrize("key", ["image", "label"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_checksum_that_differs(path, key, save):
    save(path, image=_IMAGES, label=_LABELS)
    with zipfile.ZipFile(path) as archive:
        checksum = struct.pack("<L", archive.getinfo(f"{key}.npy").CRC)
    path.write_bytes(path.read_bytes().replace(checksum, b"abcd"))
    assert_refused(f"whole npz file.*Bad CRC-32 for file '{key}.npy'", npz, path)
    assert os.listdir(path.parent) == ["set.npz"]


def test_a_large_file_is_checked_once(path, monkeypatch, capsys):
    monkeypatch.setattr(archives, "_CHECKED_EVERY_TIME", 100)
    np.savez(path, image=_IMAGES, label=_LABELS)

    def checks(**options):
        npz(path, **options)
        return f"Checking {path}, 0.0 GB\n" == capsys.readouterr().out

    assert [checks() for _ in range(3)] == [True, False, False]
    assert not checks(num_classes=None)
    os.utime(path, ns=(0, 10**9))
    assert [checks(num_classes=None) for _ in range(2)] == [True, False]
    assert [checks() for _ in range(2)] == [True, False]  # The labels had not been.
    note = path.parent / "set.npz.shards" / "checked.json"
    for text in ("", "{}", "[]", "no json", '{"arrays": 3}'):
        note.write_text(text)
        assert checks() and not checks()
    cache_dir = str(path.parent / "cache")
    assert [checks(cache_dir=cache_dir) for _ in range(2)] == [True, False]
    assert not checks(cache_dir="gs://bucket")  # Of no use here; what is noted beside the file is.
    note.unlink()
    note.mkdir()  # Cannot be written.
    assert checks() and checks()


# Converted.


def forms():
    big_endian = npy(_LABELS.astype(">i4"))
    columns = npy(np.asfortranarray(_IMAGES))
    deflated = zipfile.ZIP_DEFLATED
    return {
        "compressed": lambda path: np.savez_compressed(path, label=_LABELS.astype(np.int8), image=_IMAGES),
        "big-endian labels": lambda path: write_zip(path, image=npy(_IMAGES), label=big_endian),
        "Fortran order": lambda path: write_zip(path, image=columns, label=npy(_LABELS)),
        "Fortran order, compressed": lambda path: write_zip(path, deflated, image=columns, label=big_endian),
        "float32": lambda path: np.savez(path, image=_IMAGES / np.float32(255), label=_LABELS),
        "float64 in Fortran order": lambda path: np.savez(path, image=np.asfortranarray(_IMAGES / 255), label=_LABELS),
        "big-endian floats": lambda path: np.savez(path, image=(_IMAGES / 255).astype(">f8"), label=_LABELS),
        "float16": lambda path: np.savez(path, image=(_IMAGES / 255).astype(np.float16), label=_LABELS),
        "labels [N, 1], compressed": lambda path: np.savez_compressed(path, image=_IMAGES, label=_LABELS[:, None]),
        "uint64 labels": lambda path: np.savez_compressed(path, image=_IMAGES, label=_LABELS.astype(np.uint64)),
    }


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("block_bytes", [1, 600, 1 << 24])
def test_others_are_converted_once(path, capsys, monkeypatch, form, block_bytes):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block_bytes)
    forms()[form](path)
    for _ in range(2):
        found = npz(path)
        assert_right(found)
        assert type(found[0]) is mapped.MappedImages and type(found[1]) is np.memmap
    folder, marker = sorted(path.parent.glob("set.npz.shards/*"))
    assert capsys.readouterr().out == f"Converting {path} to {folder}, once\n"
    assert sorted(file.name for file in folder.iterdir()) == ["images-00000.npy", "labels.npy"]
    # The labels have been converted with a pool too.
    np.testing.assert_array_equal(npz(path, num_classes=None)[0], _IMAGES)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("form", sorted(forms().keys() - {"big-endian labels"}))
def test_a_pool_is_converted_with_its_labels(path, capsys, form):
    forms()[form](path)
    images, labels = npz(path, num_classes=None)
    np.testing.assert_array_equal(images, _IMAGES)
    capsys.readouterr()
    assert_right(npz(path))
    assert capsys.readouterr().out == ""


def test_a_changed_file_is_converted_again(path):
    np.savez_compressed(path, image=_IMAGES, label=_LABELS)
    npz(path)
    np.savez_compressed(path, image=_IMAGES[::-1], label=_LABELS[::-1])
    os.utime(path, ns=(0, 10**9))
    assert_right(npz(path), _IMAGES[::-1], _LABELS[::-1])


def test_another_file_system(path):
    np.savez(path, image=_IMAGES, label=_LABELS)
    with tf.io.gfile.GFile("ram://formats_test/set.npz", "wb") as file:
        file.write(path.read_bytes())
    assert_refused("training_data.cache_dir, .*Received: None", npz, "ram://formats_test/set.npz")
    for _ in range(2):
        assert_right(npz("ram://formats_test/set.npz", cache_dir=str(path.parent / "new" / "cache")))
    assert len(list(path.parent.glob("new/cache/set.npz-*.shards"))) == 1


def test_in_a_cache_dir(path):
    np.savez_compressed(path, image=_IMAGES, label=_LABELS)
    assert_right(npz(path, cache_dir=str(path.parent / "cache")))
    assert len(list(path.parent.glob("cache/set.npz-*.shards"))) == 1
    assert not (path.parent / "set.npz.shards").exists()


@pytest.mark.parametrize("order", "CF")
def test_converts_in_little_memory(path, monkeypatch, order):
    images = np.zeros((20_000, 32, 32, 3), np.uint8)
    write_zip(path, zipfile.ZIP_DEFLATED, image=npy(np.asarray(images, order=order)), label=npy(np.zeros(20_000, int)))
    monkeypatch.setattr(formats, "_BLOCK_BYTES", 1 << 20)
    _, peak = peak_memory(lambda: npz(path, num_classes=1))
    assert peak < 10 * 2**20 < images.nbytes / 5


# Bad files.


def bad_arrays():
    return {
        r"whole npz file.*image.npy holds 1728 bytes, and uint8 \(13, 8, 6, 3\) is 1872": (
            claiming(_IMAGES, shape=(13, 8, 6, 3)),
            _LABELS,
        ),
        r"holds 1728 bytes, and uint8 \(1000000000000, 8, 6, 3\)": (
            claiming(_IMAGES, shape=(10**12, 8, 6, 3)),
            _LABELS,
        ),
        r"holds 1728 bytes, and uint8 \(11, 8, 6, 3\)": (claiming(_IMAGES, shape=(11, 8, 6, 3)), _LABELS),
        r"image.npy has a header of another form.*-12": (claiming(_IMAGES, shape=(-12, -8, 6, 3)), _LABELS),
        "float64": (claiming(_IMAGES, descr="<f8"), _LABELS),
        r"label.npy holds 96 bytes, and int64 \(13,\)": (_IMAGES, claiming(_LABELS, shape=(13,))),
        "image.npy holds objects": (claiming(_IMAGES, descr="|O"), _LABELS),
        "label.npy holds objects": (_IMAGES, np.array([None] * 12)),
        "image.npy has the version": (b"\x93NUMPY\x03\x00" + npy(_IMAGES)[8:], _LABELS),
        "whole npz file.*a header of 2000000000 bytes": (
            b"\x93NUMPY\x02\x00" + struct.pack("<L", 2_000_000_000) + bytes(100),
            _LABELS,
        ),
        r"image.npy has a header of another form.*True, 8, 6, 3": (
            claiming(_IMAGES[:1], shape=(True, 8, 6, 3)),
            _LABELS[:1],
        ),
        "whole npz file.*magic": (b"nothing", _LABELS),
        "whole npz file.*EOF": (npy(_IMAGES)[:50], _LABELS),
        r"'label' of shape \(12,\) .*Received: \(11,\)": (_IMAGES, _LABELS[:11]),
        r"'label' of shape \(12,\) .*Received: \(12, 2\)": (_IMAGES, np.stack([_LABELS] * 2, 1)),
        r"'label' of shape \(12,\) .*Received: \(1, 12\)": (_IMAGES, _LABELS[None]),
        r"'label' of shape \(12,\) .*Received: \(\)": (_IMAGES, np.array(3)),
        "'label' of integers .*Received: float64": (_IMAGES, _LABELS / 1.0),
        "'label' of integers .*Received: bool": (_IMAGES, _LABELS > 1),
        "'image' of uint8 .*Received: int32": (_IMAGES.astype(np.int32), _LABELS),
        r"'image' of shape \[N, height.*Received: \(0, 8, 6, 3\)": (_IMAGES[:0], _LABELS[:0]),
        "channels last": (_IMAGES.transpose(0, 3, 1, 2), _LABELS),
        "multiples of 1/255": (_IMAGES / 256, _LABELS),
        r"floats in \[0, 1\]": (_IMAGES / 127.5, _LABELS),
        r"floats in \[0, 1\].*Received: 0 to 255": (_IMAGES.astype(np.float32), _LABELS),
        r"floats in \[0, 1\].*Received: -1 to 1": (_IMAGES / 127.5 - 1, _LABELS),
        r"floats in \[0, 1\].*Received: 0 to inf": (np.where(_IMAGES == 0, np.inf, 0.0), _LABELS),
        "multiples of 1/255.*floats up to 0.5": ((_IMAGES / 256).astype(np.float16), _LABELS),
        "Received: nan to nan": (np.full(_IMAGES.shape, np.nan), _LABELS),
    }


@pytest.mark.parametrize("match", bad_arrays())
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_refuses_arrays(path, match, compression):
    image, label = (array if isinstance(array, bytes) else npy(array) for array in bad_arrays()[match])
    write_zip(path, compression, image=image, label=label)
    for function, argument in ((npz, path), (formats.load_npz, str(path))):
        assert str(path) in assert_refused(match, function, argument)
    assert os.listdir(path.parent) == ["set.npz"]
    if "label" in match:  # Which a pool does not need.
        if "label.npy" not in match:
            np.testing.assert_array_equal(npz(path, num_classes=None)[0], _IMAGES)
    else:
        assert_refused(match, npz, path, num_classes=None)


def test_refuses_two_arrays_of_a_name(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in {"image.npy": _IMAGES, "image": _IMAGES[::-1], "label.npy": _LABELS}.items():
            archive.writestr(name, npy(array))
    for function, argument in ((npz, path), (formats.load_npz, str(path))):
        assert_refused("whole npz file.*several arrays of one name", function, argument)


def test_refuses_an_array_that_is_not_where_the_archive_says(path):
    write_zip(path, label=npy(_LABELS), image=npy(_IMAGES))
    content = path.read_bytes()
    directory = content.index(b"PK\1\2")
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("image.npy")
    # The archive claims that the array takes more than there is before the archive's directory.
    longer = claiming(_IMAGES, shape=(15, 8, 6, 3))
    begin = entry.header_offset + 30 + len("image.npy")
    content = content[:begin] + longer + content[directory:]
    size = struct.pack("<L", entry.file_size)
    path.write_bytes(content.replace(size, struct.pack("<L", entry.file_size + 3 * 144)))
    for function, argument in ((npz, path), (formats.load_npz, str(path))):
        assert_refused("whole npz file", function, argument)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_refuses_truncated_files(path, save):
    save(path, image=_IMAGES, label=_LABELS)
    whole = path.read_bytes()
    for kept in (*(len(whole) * k // 12 for k in range(12)), len(whole) - 1, len(whole) - 22):
        path.write_bytes(whole[:kept])
        assert str(path) in assert_refused("whole npz file", npz, path)
    assert os.listdir(path.parent) == ["set.npz"]


def test_missing_arrays(path):
    np.savez(path, image=_IMAGES, y_train=_LABELS)
    assert_refused(r"scripts/pseudo_label.py .*Received: \['image', 'y_train'\]", npz, path)
    np.testing.assert_array_equal(npz(path, num_classes=None)[0], _IMAGES)
    np.savez(path, x_train=_IMAGES, label=_LABELS)
    assert_refused(r"'image' and 'label' in .*Received: \['x_train', 'label'\]", npz, path)
    assert_refused(r"an array 'image' in .*Received: \['x_train', 'label'\]", npz, path, num_classes=None)


def test_a_shape_is_refused_before_a_conversion(path):
    np.savez_compressed(path, image=_IMAGES, label=_LABELS)
    assert_refused(r"shape \(8, 8, 3\), .*Received: \(8, 6, 3\)", npz, path, image_shape=(8, 8, 3))
    assert os.listdir(path.parent) == ["set.npz"]
    assert_right(npz(path, image_shape=(8, 6, 3)))


# The 80 million tiny images.


@pytest.fixture
def tiny(tmp_path):
    """Images whose pixels are a function of all of their coordinates, and their file, written byte by byte."""

    def pixel(n, row, column, channel):
        return (7 * row + 13 * column * column + 101 * channel + 31 * n + row * column) % 256

    content = bytearray()
    for n in range(5):
        for channel in range(3):
            for column in range(32):
                for row in range(32):
                    content.append(pixel(n, row, column, channel))
    (tmp_path / "tiny_images.bin").write_bytes(content)
    images = np.fromfunction(pixel, (5, 32, 32, 3), dtype=int)
    assert images[1, 2, 3, 0] == 14 + 117 + 31 + 6  # Row 2, column 3: not symmetric in anything.
    return images.astype(np.uint8), tmp_path / "tiny_images.bin"


def test_tiny_images_are_stored_by_columns(tiny, capsys):
    expected, path = tiny
    images, labels = tiny_images(path, image_shape=(32, 32, 3))
    assert type(images) is mapped.MappedImages and labels is None
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(images[1:3], expected[1:3])
    np.testing.assert_array_equal(images[np.array([4, 0, 4])], expected[[4, 0, 4]])
    assert os.listdir(path.parent) == ["tiny_images.bin"] and capsys.readouterr().out == ""


@pytest.mark.parametrize("block_bytes", [3072, 7000, 1 << 24])
def test_tiny_images_on_another_file_system(tiny, tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(formats, "_BLOCK_BYTES", block_bytes)
    expected, path = tiny
    remote = f"ram://formats_test/tiny_images-{block_bytes}.bin"  # A file there is not replaced but grows.
    with tf.io.gfile.GFile(remote, "wb") as file:
        file.write(path.read_bytes())
    images, _ = tiny_images(remote, cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(images, expected)
    assert json.loads(next(tmp_path.glob("cache/*/shards.json")).read_text())["num_images"] == [5]


@pytest.mark.parametrize("num_bytes", [0, 1, 3071, 3073, 5 * 3072 - 1])
def test_refuses_truncated_tiny_images(tiny, num_bytes):
    path = tiny[1]
    path.write_bytes((path.read_bytes() + b"x")[:num_bytes] if num_bytes else b"")
    assert str(path) in assert_refused(f"3072 bytes in .*Received: {num_bytes} bytes", tiny_images, path)


def test_refuses_tiny_images_for_other_uses(tiny):
    path = tiny[1]
    assert_refused("scripts/pseudo_label.py", tiny_images, path, num_classes=10)
    assert_refused(r"shape \(64, 64, 3\).*Received: \(32, 32, 3\)", tiny_images, path, image_shape=(64, 64, 3))
