"""Sets of images that somebody made to harm: refused in one line, and quickly, with nothing read or written outside."""

import gzip
import io
import json
import os
import resource
import struct
import sys
import zlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data import sources
from robust_keras.data.readers import picture_headers, record_lengths, tfds_folders, tfrecords, trusted_copies

_IMAGE = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


def png(width=4, height=4, rows=None, image=_IMAGE):
    """A PNG that says it is that large, with so many rows of pixels in it."""
    if rows is None and (width, height) == (4, 4):
        return tf.io.encode_png(image).numpy()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1 + 3 * width) * (rows or 0))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bmp(width, height):
    return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def jpeg(width, height):
    data = bytearray(tf.io.encode_jpeg(_IMAGE).numpy())
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif_of_many():
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 4, 4, 0) + b"\x02\x16\x8c\x2d\x99\x87\x2a\x1c\xdc\x33\xa0\x02\x75\xec"
    return b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0x91, 0, 0) + bytes(12) + frame * 1000 + b";"


def write(folder, **files):
    for name, data in files.items():
        path = folder / "set" / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder / "set"


def pipe(folder):
    os.mkfifo(write(folder, a__1_png=png()) / "a" / "2.png")


def linked(target, name="2.png"):
    def make(folder):
        at = write(folder, a__1_png=png(), b__1_png=png())
        (folder / "private" / "more").mkdir(parents=True)
        (folder / "private" / "1.png").write_bytes(png())
        (at / name).symlink_to(folder / target)

    return make


def of(**files):
    return lambda folder: write(folder, a__1_png=png(), **files) and None


_LARGE = "at most 67,108,864 pixels in .*2.(png|jpg|bmp). Received: "
IMAGES = {
    "pipe": (pipe, "2.png, a pipe"),
    "device": (linked("/dev/zero", "a/2.png"), "2.png, a link"),
    "private picture": (linked("private/1.png", "a/2.png"), "2.png, a link"),
    "link to nowhere": (linked("nowhere", "a/2.png"), "2.png, a link"),
    "class that is a link": (linked("private", "c"), "c, a link"),
    "folder in a class that is a link": (linked("private", "a/c"), "c, a link"),
    "link to the folder above": (linked("set", "a/c"), "c, a link"),
    "PNG of 22,000 x 22,000": (of(a__2_png=png(22_000, 22_000)), f"{_LARGE}484,000,"),
    "PNG of 2^31 x 2^31": (of(a__2_png=png(2**31 - 1, 2**31 - 1)), _LARGE),
    "JPEG of 65,500 x 65,500": (of(a__2_jpg=jpeg(65_500, 65_500)), _LARGE),
    "BMP of 2^30 x 4": (of(a__2_bmp=bmp(2**30, 4)), _LARGE),
    "BMP of -2^30 x -4": (of(a__2_bmp=bmp(-(2**30), -4)), _LARGE),
    "PNG that ends in its header": (of(a__2_png=png()[:18]), "2.png"),
    "PNG with nothing in it": (of(a__2_png=png(4000, 4000)), "2.png"),
    "animated GIF": (of(a__2_png=gif_of_many()), "PNG, JPEG or BMP image in .*2.png"),
    "WebP": (of(a__2_png=b"RIFF\x00\x00\x01\x00WEBPVP8 "), "PNG, JPEG or BMP image in .*2.png"),
    "SVG": (of(a__2_png=b"<svg/>"), "PNG, JPEG or BMP image in .*2.png"),
}


@pytest.fixture
def little_memory():
    """A limit of the memory that is taken from here on."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def refused(match, function, *args, **options):
    with pytest.raises(ValueError, match=match) as error:
        function(*args, **options)
    assert str(error.value).isprintable() and len(str(error.value)) < 1500


@pytest.mark.parametrize("size", [None, 8])
@pytest.mark.parametrize("kind", IMAGES)
def test_a_folder_of_images(tmp_path, little_memory, kind, size):
    make, match = IMAGES[kind]
    make(tmp_path)
    refused(match, sources.load, f"images:{tmp_path / 'set'}", "train", image_size=size, cache_dir=str(tmp_path / "c"))


def test_a_folder_that_is_typed_may_be_a_link(tmp_path):
    write(tmp_path, a__1_png=png(), b__1_png=png())
    (tmp_path / "link").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "readme.txt").symlink_to(tmp_path / "nowhere")  # Which is no image.
    assert len(sources.load(f"images:{tmp_path / 'link'}", "train").images) == 2


def test_more_pixels_than_the_header_says_are_not_unpacked(tmp_path, little_memory):
    data = png(4, 4, rows=100_000_000 // 13)  # 100 MB
    assert len(data) < 200_000 and tf.io.decode_png(data).shape == (4, 4, 3)


@pytest.mark.parametrize(
    "data, expected",
    [
        (png(), 16),
        (png(3000, 2, rows=0), 6000),
        (jpeg(640, 480), 307_200),
        (bmp(7, -9), 63),
        (gif_of_many(), 16),
        (b"", np.inf),
        (b"\x89", np.inf),
        (b"RIFF", np.inf),
    ],
)
def test_how_large_an_image_is_by_its_header(data, expected):
    assert picture_headers.num_pixels(tf.constant([data, data])).numpy().tolist() == [expected] * 2


# Conversions that come with the data.


def converted(folder):
    """A set, and the folder of its conversion, which a stranger made."""
    at = write(folder, a__1_png=png(), a__2_png=png(image=255 - _IMAGE))
    sources.load(f"images:{at}", "train")
    (made,) = (path for path in (folder / "set.shards").iterdir() if path.is_dir())
    for note in os.listdir(trusted_copies._folder()):
        os.remove(os.path.join(trusted_copies._folder(), note))
    return at, made


def test_a_conversion_that_comes_with_a_set_has_to_hold_its_pixels(tmp_path, capsys):
    at, made = converted(tmp_path)
    expected = sources.load(f"images:{at}", "train")
    assert "which was not made here" in capsys.readouterr().out
    np.testing.assert_array_equal(np.sort(expected.images[:], axis=0)[0], np.minimum(_IMAGE, 255 - _IMAGE))
    sources.load(f"images:{at}", "train")
    assert capsys.readouterr().out == ""  # Once.
    path = made / "images-00000.npy"
    data, status = bytearray(path.read_bytes()), path.stat()
    data[-5] ^= 255
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # As an archive does.
    refused("a conversion of .*set. Received: one of other images", sources.load, f"images:{at}", "train")


def test_labels_count_as_pixels_do(tmp_path):
    at = write(tmp_path, a__1_png=png(), b__2_png=png())
    images = {"num_classes": 2, "image_shape": (4, 4, 3)}
    sources.load_extra(f"images:{at}", **images)
    (labels,) = tmp_path.glob("set.shards/*/labels.npy")
    np.save(labels, np.load(labels)[::-1])
    refused("Received: one of other images, or labels", sources.load_extra, f"images:{at}", **images)


@pytest.mark.parametrize("name", ["images-00000.npy", "labels.npy", "images-00001.npy", "", "..", "../shards.json"])
@pytest.mark.parametrize("is_begun", [True, False])
def test_a_conversion_that_leads_elsewhere_is_not_written_to(tmp_path, name, is_begun):
    """An `authorized_keys` was replaced in this way."""
    at, made = converted(tmp_path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "private").write_text("private")
    marker = json.loads((made.parent / "shards.json").read_text())
    conversion = {key: marker[key] for key in ("version", "source")}
    (made / "unfinished.json").write_text(json.dumps({**conversion, "image_shape": None, "labelled": True}))
    if is_begun:
        (made.parent / "shards.json").unlink()
    place = made.parent if name == ".." else made / name
    if place.resolve().is_dir():
        place.rename(tmp_path / "moved")
        place.symlink_to(outside)
    else:
        place.resolve().unlink(missing_ok=True)
        (made / name).resolve().symlink_to(outside / "private")
    try:
        found = sources.load(f"images:{at}", "train")
        np.testing.assert_array_equal(np.sort(found.images[:], axis=0)[0], np.minimum(_IMAGE, 255 - _IMAGE))
    except ValueError as error:
        assert "a symbolic link" in str(error)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {"private": "private"}


def test_a_pipe_in_a_conversion_stops_nobody(tmp_path):
    at, made = converted(tmp_path)
    (made / "images-00000.npy").unlink()
    os.mkfifo(made / "images-00000.npy")
    assert len(sources.load(f"images:{at}", "train").images) == 2
    (made.parent / "shards.json").unlink()
    os.mkfifo(made.parent / "shards.json")
    refused("shards.json, a pipe", sources.load, f"images:{at}", "train")


# Records.


def record(length, data=b""):
    start = struct.pack("<Q", length)
    return start + struct.pack("<I", tfrecords._masked_crc32c(start)) + data


@pytest.mark.parametrize("length", [2**40, 2**62, 2**64 - 12, record_lengths.MOST_BYTES + 1])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zlib.compress])
def test_a_record_that_says_it_is_long(tmp_path, pack, length):
    (tmp_path / "set").write_bytes(pack(record(length, bytes(100))))
    refused("TFRecord file|records of at most", sources.open_pool, f"tfrecord:{tmp_path / 'set'}")


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_records_across_blocks_of_a_compressed_file(pack):
    whole = pack(b"".join(record(length, bytes(length + 4)) for length in (0, 1, 70_000, 3_000_000, 5)))
    kind = "GZIP" if pack is gzip.compress else "ZLIB"
    record_lengths.check_compressed(io.BytesIO(whole), kind, "set")
    with pytest.raises(ValueError, match="truncated"):
        record_lengths.check_compressed(io.BytesIO(whole[:-9]), kind, "set")


def test_a_pipe_of_records(tmp_path):
    os.mkfifo(tmp_path / "set.tfrecord")
    refused("set.tfrecord, a pipe", sources.open_pool, f"tfrecord:{tmp_path}/*.tfrecord")


# Folders of TensorFlow Datasets.


def described(tmp_path, text, name="made/1.0.0"):
    (tmp_path / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / name / "features.json").write_text(text if isinstance(text, str) else json.dumps(text))
    return str(tmp_path)


def features(image="tensorflow_datasets.core.features.image_feature.Image", key="pythonClassName"):
    top = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
    return {"pythonClassName": top, "featuresDict": {"features": {"image": {key: image, "image": {}}}}}


@pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
@pytest.mark.parametrize("name", ["made/1.0.0", "made/large/1.0.0", "made"])
def test_a_set_imports_no_module(tmp_path, monkeypatch, key, name):
    (tmp_path / "harmful_module.py").write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    described(tmp_path, features("harmful_module.Image", key), name)
    refused("features.json.*Received: harmful_module.Image", sources.load, "made", "train", data_dir=str(tmp_path))
    assert not (tmp_path / "ran").exists() and "harmful_module" not in sys.modules


@pytest.mark.parametrize("text", ["[" * 100_000, "no json", '"' + "a" * 1000, '{"a":' * 900 + "1" + "}" * 900])
def test_a_description_that_is_none(tmp_path, text):
    described(tmp_path, text)
    if text.startswith('{"a"'):
        tfds_folders.check("made", str(tmp_path))
    else:
        refused("Expected JSON in .*features.json", tfds_folders.check, "made:1.0.0", str(tmp_path))


def test_features_of_tensorflow_datasets_are_let_in(tmp_path):
    described(tmp_path, features())
    tfds_folders.check("made/large:1.0.0", str(tmp_path))
    os.mkfifo(tmp_path / "made/1.0.0/label.labels.txt")
    refused("label.labels.txt, a pipe", tfds_folders.check, "made", str(tmp_path))


def test_class_names_of_no_other_file(tmp_path):
    described(tmp_path, features())
    (tmp_path / "private.txt").write_text("secret")
    (tmp_path / "made/1.0.0/label.labels.txt").symlink_to(tmp_path / "private.txt")
    refused("label.labels.txt, a symbolic link", tfds_folders.check, "made", str(tmp_path))
