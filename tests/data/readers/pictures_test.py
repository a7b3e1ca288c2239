"""Encoded images in TFRecord files and in folders: the right pixels, and an error that names the file."""

import gzip
import json
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data.readers import formats, pictures, tfrecords

_SHAPE = (6, 5, 3)
_IMAGES = np.random.RandomState(0).randint(0, 256, (9, *_SHAPE)).astype(np.uint8)
_LABELS = np.array([3, 1, 4, 1, 5, 0, 2, 6, 5])


def open_set(open_format, path, num_classes=10, image_shape=_SHAPE, cache_dir=None):
    return open_format(str(path), image_shape=image_shape, num_classes=num_classes, cache_dir=cache_dir)


def tfrecord(path, **options):
    return open_set(formats.tfrecord, path, **options)


def images(path, **options):
    return open_set(formats.images, path, **options)


def assert_refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("Expected ") and "Received: " in message and len(message) < 600
    return message


def assert_right(found, expected=_IMAGES, labels=_LABELS):
    np.testing.assert_array_equal(found[0], expected)
    if labels is None:
        assert found[1] is None
    else:
        np.testing.assert_array_equal(found[1], labels)


def png(image, filter_byte=0):
    """A PNG made by hand, without any library's notion of rows, columns and channels."""

    def chunk(kind, content):
        return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))

    height, width, channels = image.shape
    header = struct.pack(">LLBBBBB", width, height, 8, {1: 0, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(bytes([filter_byte]) + image[row].tobytes() for row in range(height))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(image):
    """A BMP made by hand: from the bottom up, blue first, rows filled up to four bytes."""
    height, width, _ = image.shape
    rows = [image[row, :, ::-1].tobytes() + bytes(-3 * width % 4) for row in reversed(range(height))]
    header = struct.pack("<LllHHLLllLL", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<LLL", 54 + sum(map(len, rows)), 0, 54) + header + b"".join(rows)


def jpeg(image):
    return tf.io.encode_jpeg(image, quality=100, chroma_downsampling=False).numpy()


def raw(image):
    return image.tobytes()


def record(image=None, label=None):
    """An example of bytes and an int, or of features of another kind, or without."""
    features = {}
    if image is not None:
        features["image"] = (
            tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])) if type(image) is bytes else image
        )
    if label is not None:
        features["label"] = (
            tf.train.Feature(int64_list=tf.train.Int64List(value=[label])) if type(label) is int else label
        )
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_records(path, records, compression=""):
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for each in records:
            writer.write(each)
    return path


def records(encode=png, labels=_LABELS):
    if labels is None:
        return [record(encode(image)) for image in _IMAGES]
    return [record(encode(image), int(label)) for image, label in zip(_IMAGES, labels)]


# TFRecord files.


@pytest.mark.parametrize("encode, compression", [(png, "GZIP"), (raw, ""), (raw, "ZLIB")])
def test_tfrecords(tmp_path, capsys, encode, compression):
    whole = records(encode)
    # In the order of the names, whatever that of the folder.
    write_records(tmp_path / "set-2", whole[7:], compression)
    write_records(tmp_path / "set-0", whole[:3], compression)
    write_records(tmp_path / "set-1", whole[3:7])
    for path in (
        tmp_path / "set-?",
        tmp_path / "set-?",
        tmp_path / "set*",
    ):  # The last glob matches the shards' folder.
        assert_right(tfrecord(path))
    assert capsys.readouterr().out.count("Converting ") == 2
    assert len(list(tmp_path.glob("set*.shards"))) == 2
    write_records(tmp_path / "set-3", whole[:1])
    assert len(tfrecord(tmp_path / "set-?")[0]) == 10


def test_jpegs_as_other_programs_decode_them(tmp_path):
    image = pytest.importorskip("PIL.Image")
    names, expected = [f"{k}.jpg" for k in range(9)], []
    for name, data in zip(names, map(jpeg, _IMAGES)):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
        with image.open(tmp_path / "set" / name) as file:
            expected.append(np.asarray(file))
    assert_right(images(tmp_path / "set", num_classes=None), expected, None)
    path = write_records(tmp_path / "records", records(jpeg))
    assert_right(tfrecord(path), expected)
    assert (tmp_path / "records.shards" / "shards.json").exists()


def test_records_without_labels(tmp_path):
    path = write_records(tmp_path / "set", records(labels=None))
    assert_refused(f"int64 'label' in {path}; scripts/pseudo_label.py", tfrecord, path)
    assert os.listdir(tmp_path) == ["set"]
    assert_right(tfrecord(path, num_classes=None), labels=None)
    assert_right(tfrecord(path, num_classes=None, image_shape=None), labels=None)
    assert_refused("scripts/pseudo_label.py", tfrecord, path)
    # Labels of another kind are none.
    other = tf.train.Feature(float_list=tf.train.FloatList(value=[1.0]))
    path = write_records(tmp_path / "other", [record(png(image), other) for image in _IMAGES])
    assert_right(tfrecord(path, num_classes=None), labels=None)
    assert_refused("scripts/pseudo_label.py", tfrecord, path)


def test_more_records_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "BLOCK", 4)
    assert_right(tfrecord(write_records(tmp_path / "set", records())))


@pytest.mark.parametrize("image_shape", [None, _SHAPE])
def test_raw_records_need_a_shape(tmp_path, image_shape):
    path = write_records(tmp_path / "set", records(raw))
    if image_shape is None:
        assert_refused(f"PNG or JPEG in {path} where no image_shape", tfrecord, path, image_shape=None)
    assert_right(tfrecord(path))
    # Once converted they have one.
    assert_right(tfrecord(path, image_shape=image_shape))
    # Another one is not refused for what the first was.
    np.testing.assert_array_equal(tfrecord(path, image_shape=(3, 10, 3))[0], _IMAGES.reshape(-1, 3, 10, 3))


@pytest.mark.parametrize("image", [b"\xff\xd8\xff", b"\x1f\x8b\x08"])
def test_raw_bytes_that_begin_like_another_format(tmp_path, image):
    whole = [image + raw(each)[3:] for each in _IMAGES]
    found, _ = tfrecord(write_records(tmp_path / "set", [record(each, 0) for each in whole]))
    assert [each.tobytes() for each in found[:]] == whole


@pytest.mark.parametrize("length, start", [(0x088B1F, b"\x1f\x8b\x08"), (0x9C78, b"\x78\x9c")])
def test_a_length_that_looks_like_a_compressed_file(tmp_path, length, start):
    width = length - len(record(bytes(length), 3)) + length
    path = write_records(tmp_path / "set", [record(bytes(width), 3)])
    assert path.read_bytes().startswith(start)
    found, labels = tfrecord(path, image_shape=(1, width, 1))
    assert found.shape == (1, 1, width, 1) and labels.tolist() == [3]


def bad_records():
    two = tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2]))
    text = tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"1"]))
    two_images = tf.train.Feature(bytes_list=tf.train.BytesList(value=[png(_IMAGES[0])] * 2))
    floats = tf.train.Feature(float_list=tf.train.FloatList(value=[0.5]))
    whole = png(_IMAGES[0])
    return {
        "one int64 'label' in record {k} of .*Received: 0": record(whole),
        "one int64 'label' in record {k} .*Received: 2": record(whole, two),
        "one int64 'label' in record {k} .* 0": record(whole, text),
        "one 'image' of bytes in record {k} .*Received: 0": record(None, 1),
        "one 'image' of bytes in record {k} .*Received: 2": record(two_images, 1),
        "one 'image' of bytes in record {k} .* 0": record(floats, 1),
        r"shape \(6, 5, 3\) in record {k} .*Received: \(5, 5, 3\)": record(png(_IMAGES[0][:5]), 1),
        r"shape \(6, 5, 3\) in record {k} .*Received: \(6, 5, 1\)": record(png(_IMAGES[0][..., :1]), 1),
        r"shape \(6, 5, 3\) in record {k} .*Received: \(6, 5, 4\)": record(png(np.zeros((6, 5, 4), np.uint8)), 1),
        "whole image in record {k} of .*Received: ": record(whole[:-9], 1),
        "record {k} of .*Received: 0 bytes": record(b"", 1),
        "(PNG, JPEG or BMP image|PNG, JPEG or the 90 bytes of .*) in record {k} of .*Received: 7 bytes": record(
            b"nothing", 1
        ),
        "tf.train.Example in record {k} of ": b"\xff\xff\xff\xff nothing",
    }


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("match", bad_records())
def test_bad_records(tmp_path, monkeypatch, match, k):
    monkeypatch.setattr(pictures, "BLOCK", 2)
    whole = records()
    whole[k] = bad_records()[match]
    write_records(tmp_path / "set-0", records())
    bad = write_records(tmp_path / "set-1", whole)
    if k == 0:  # The first of all.
        (tmp_path / "set-0").unlink()
        match = f"{match}|an int64 'label' in .*set-1"
    message = assert_refused(match.replace("{k}", str(k)), tfrecord, tmp_path / "set-*")
    assert str(bad) in message
    assert not list(tmp_path.glob("*.shards"))


def test_bad_raw_records(tmp_path):
    whole = records(raw)
    whole[4] = record(raw(_IMAGES[4])[:-1], 2)
    path = write_records(tmp_path / "set", whole)
    assert_refused(rf"the 90 bytes of \(6, 5, 3\) in record 4 of {path}. Received: 89 bytes", tfrecord, path)
    assert_refused("the 108 bytes of .* in record 0 of .*Received: 90 bytes", tfrecord, path, image_shape=(6, 6, 3))


@pytest.mark.parametrize("compression", ["", "GZIP", "ZLIB"])
def test_truncated_tfrecords(tmp_path, compression):
    path = write_records(tmp_path / "set", records(raw), compression)
    whole = path.read_bytes()
    for kept in (0, 5, 13, len(whole) // 2, len(whole) - 1):  # Half of nine records ends within one.
        path.write_bytes(whole[:kept])
        assert str(path) in assert_refused("Expected ", tfrecord, path)
        assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize("length", [2**40, 2**62, 2**64 - 20])
def test_a_record_that_claims_more_than_there_is(tmp_path, length):
    path = write_records(tmp_path / "set", records(raw))
    claim = struct.pack("<Q", length)
    claim += struct.pack("<L", tfrecords._masked_crc32c(claim)) + bytes(100)
    whole = path.read_bytes()
    for content in (claim, whole + claim):
        path.write_bytes(content)
        message = f"whole TFRecord file.*at byte {len(content) - len(claim)} would end at byte .* of {len(content)}"
        assert_refused(message, tfrecord, path)


@pytest.mark.parametrize("compression", ["", "GZIP", "ZLIB"])
def test_damaged_tfrecords(tmp_path, compression):
    path = write_records(tmp_path / "set", records(raw), compression)
    whole = path.read_bytes()
    for position in range(14, len(whole) - 8, len(whole) // 4):
        damaged = bytearray(whole)
        damaged[position] ^= 255
        path.write_bytes(damaged)
        assert str(path) in assert_refused("Expected a whole ", tfrecord, path)


def test_other_files_for_tfrecords(tmp_path):
    path = tmp_path / "set"
    empty = gzip.compress(b"")
    for content in (
        b"",
        b"<!DOCTYPE html><html></html>",
        b"\x1f\x8b nothing",
        empty,
        zlib.compress(b""),
        png(_IMAGES[0]),
    ):
        path.write_bytes(content)
        assert str(path) in assert_refused("Expected ", tfrecord, path)
    write_records(tmp_path / "a", records())
    for content in (b"", zlib.compress(b"")):
        (tmp_path / "b").write_bytes(content)
        assert_refused(f"records in {tmp_path}/b. Received: none", tfrecord, tmp_path / "[ab]")
    write_records(path, records(), "ZLIB")
    path.write_bytes(path.read_bytes() * 2)  # TensorFlow would return the first half.
    assert_refused(f"whole ZLIB file. Received: {path} .it goes on after its end", tfrecord, path)
    write_records(path, records(), "GZIP")
    path.write_bytes(path.read_bytes() * 2)
    assert len(tfrecord(path)[0]) == 18


# Folders.


def write_files(folder, names, encode=png):
    for name, image in zip(names, _IMAGES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(image))
    return folder


@pytest.mark.parametrize("encode, extension", [(png, "png"), (bmp, "BMP")])
def test_a_folder_of_images(tmp_path, capsys, encode, extension):
    order = [4, 0, 8, 2, 6, 1, 7, 3, 5]
    folder = write_files(tmp_path / "pool", [f"{k}.{extension}" for k in order], encode)
    (folder / ".hidden.png").write_bytes(b"nothing")
    (folder / "readme.txt").write_bytes(b"nothing")
    for _ in range(2):
        assert_right(images(folder, num_classes=None), _IMAGES[np.argsort(order)], None)
    assert_right(images(f"{folder}/", num_classes=None, image_shape=None), _IMAGES[np.argsort(order)], None)
    assert capsys.readouterr().out.count("Converting ") == 1
    assert sorted(os.listdir(tmp_path)) == ["pool", "pool.shards"]
    assert_refused("a sub-folder of images for each class in .*scripts/pseudo_label.py", images, folder)


def test_a_folder_of_classes(tmp_path, capsys):
    names = [
        "b/9.png",
        "a/x/2.png",
        "a/1.PNG",
        "a-b/1.jpeg",
        "c/deep/er/1.png",
        "b/10.png",
        "a/x.png",
        "c/1.jpg",
        "a/3.png",
    ]
    folder = write_files(tmp_path / "set", names)
    (folder / ".git").mkdir()
    (folder / "cache.shards").mkdir()
    (folder / "a" / ".x.png").write_bytes(b"nothing")
    (folder / "c" / "deep" / ".trash").mkdir()
    (folder / "c" / "deep" / ".trash" / "x.png").write_bytes(b"nothing")
    (folder / "readme.txt").write_bytes(b"nothing")
    classes = ["a", "a-b", "b", "c"]
    order = sorted(range(9), key=lambda k: (classes.index(names[k].split("/")[0]), names[k]))
    labels = [classes.index(names[k].split("/")[0]) for k in order]
    assert labels == [0, 0, 0, 0, 1, 2, 2, 3, 3]
    for num_classes in (4, None):
        assert_right(images(folder, num_classes=num_classes), _IMAGES[order], labels)
    assert capsys.readouterr().out.count("Converting ") == 1
    for num_classes in (3, 5):
        match = f"Expected {num_classes} classes, each a sub-folder of .*Received: 4"
        assert_refused(match, images, folder, num_classes=num_classes)

    # A file that moves to another class keeps its size and its time of change.
    (folder / "b/9.png").rename(folder / "a-b/9.png")
    found = images(folder, num_classes=4)
    assert found[1].tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]
    np.testing.assert_array_equal(found[0][5], _IMAGES[0])


@pytest.mark.parametrize("block, at_once", [(2, 3), (4, 1 << 16), (256, 4)])
def test_more_files_than_a_block(tmp_path, monkeypatch, block, at_once):
    monkeypatch.setattr(pictures, "BLOCK", block)
    monkeypatch.setattr(pictures, "_FILES_AT_ONCE", at_once)
    folder = write_files(tmp_path / "set", [f"{k // 4}/{k}.png" for k in range(9)])
    assert_right(images(folder, num_classes=3), _IMAGES, np.arange(9) // 4)


def bad_files():
    whole = png(_IMAGES[0])
    deep = tf.io.encode_png(tf.zeros(_SHAPE, tf.uint16)).numpy()
    return {
        "whole image in {path}. Received: ": whole[:-20],
        "whole image in {path}. Received: .": jpeg(_IMAGES[0])[:-40],
        "whole image in {path}. Received: ..": bmp(_IMAGES[0])[:-1],
        "whole image in {path}. Received: ...": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "PNG, JPEG or BMP image in {path}. Received: 0 bytes": b"",
        "PNG, JPEG or BMP image in {path}. Received: 13 bytes": b"<html></html>",
        r"shape \(6, 5, 3\) in {path}. Received: \(6, 4, 3\)": png(_IMAGES[0][:, :4]),
        r"shape \(6, 5, 3\) in {path}. Received: \(6, 5, 1\)": png(_IMAGES[0][..., :1]),
        "8 bits a channel in {path}. Received: 16 bits": deep,
    }


@pytest.mark.parametrize("k, image_shape", [(0, None), (7, _SHAPE)])
@pytest.mark.parametrize("match", bad_files())
def test_bad_files(tmp_path, monkeypatch, match, image_shape, k):
    monkeypatch.setattr(pictures, "BLOCK", 2)
    folder = write_files(tmp_path / "set", [f"{each}.png" for each in range(9)])
    (folder / f"{k}.png").write_bytes(bad_files()[match])
    if k == 0 and image_shape is None and "shape" in match:
        match = r"shape .* in {path}"  # The next one is then of another shape.
        path = folder / "1.png"
    else:
        path = folder / f"{k}.png"
    assert_refused(match.replace("{path}", str(path)), images, folder, image_shape=image_shape, num_classes=None)
    assert os.listdir(tmp_path) == ["set"]


def test_an_image_of_another_format(tmp_path):
    image = pytest.importorskip("PIL.Image")
    folder = write_files(tmp_path / "set", [f"{k}.png" for k in range(4)])
    image.fromarray(_IMAGES[2]).save(folder / "2.png", "GIF")  # Which TensorFlow would decode.
    assert tf.io.decode_image((folder / "2.png").read_bytes(), expand_animations=False).shape == _SHAPE
    assert_refused(f"PNG, JPEG or BMP image in {folder}/2.png", images, folder, num_classes=None)


def test_folders_of_another_form(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert_refused(f"files .*png.* in {folder}. Received: none", images, folder)
    write_files(folder, ["a/1.png", "b/1.png"])
    (folder / "c").mkdir()
    assert_refused(rf"images in every sub-folder of {folder}, .*Received: none in \['c'\]", images, folder)
    write_files(folder, ["1.png"])
    assert_refused(f"images in {folder} or in sub-folders of it. Received: both", images, folder)
    for name in "ab":
        shutil.rmtree(folder / name)
    assert len(images(folder, num_classes=None)[0]) == 1  # Folders without images are no classes beside images.
    assert json.loads((tmp_path / "set.shards" / "shards.json").read_text())["num_images"] == [1]


def test_an_unreadable_file(tmp_path):
    folder = write_files(tmp_path / "set", ["0.png", "1.png"])
    (folder / "2.png").symlink_to(folder / "nowhere")
    with pytest.raises((ValueError, OSError), match="2.png|nowhere"):
        images(folder, num_classes=None)


def test_a_folder_on_another_file_system(tmp_path):
    for k in range(4):
        path = f"ram://pictures_test/set/{k % 2}/{k}.png"
        tf.io.gfile.makedirs(os.path.dirname(path))
        with tf.io.gfile.GFile(path, "wb") as file:
            file.write(png(_IMAGES[k]))
    found = images("ram://pictures_test/set", num_classes=2, cache_dir=str(tmp_path))
    assert_right(found, _IMAGES[[0, 2, 1, 3]], [0, 0, 1, 1])
    assert tfrecords.list_files("ram://pictures_test/set/0/*.png") == [
        f"ram://pictures_test/set/0/{k}.png" for k in (0, 2)
    ]


def test_folders_that_are_named_by_their_label_are_in_its_order(tmp_path):
    folder = write_files(tmp_path / "set", [f"{label}/x.png" for label in (0, 10, 2, 1, 3, 4, 5, 6, 7)])
    order = [0, 3, 2, 4, 5, 6, 7, 8, 1]
    assert_right(images(folder, num_classes=9), _IMAGES[order], list(range(9)))


def test_missing_parts_are_refused(tmp_path):
    names = [f"part-{k:05d}-of-00003.tfrecord" for k in range(3)]
    for name in names:
        write_records(tmp_path / name, records()[:2])
    assert len(tfrecord(f"{tmp_path}/part-*.tfrecord")[0]) == 6
    (tmp_path / names[1]).unlink()
    with pytest.raises(
        ValueError, match="Expected 3 parts of .*part-\\*-of-00003.tfrecord. Received: 2, without 00001"
    ):
        tfrecord(f"{tmp_path}/part-*.tfrecord")
