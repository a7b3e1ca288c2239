"""Loading labelled and extra data, and the errors for what is missing or malformed."""

import hashlib
import importlib.util
import json
import os
import pathlib
import pickle
import sys
import time

import absl.logging
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data import sources, training_batches
from robust_keras.data.readers import formats, mapped, tfds_sets

_TFDS_DIR = pathlib.Path(__file__).parents[2].parent / "shared" / "tfds"
needs_cifar10 = pytest.mark.skipif(not (_TFDS_DIR / "cifar10").is_dir(), reason="no prepared CIFAR-10")

_IMAGES = np.random.RandomState(0).randint(0, 256, (12, 8, 6, 3)).astype(np.uint8)
_LABELS = np.arange(12) % 4


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return f"npz:{path}"


def _fails(match, function, *args, error=ValueError, **kwargs):
    with pytest.raises(error, match=match) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("Expected ") and "Received: " in message
    return message


def _extra(name, num_classes=4, image_shape=(8, 6, 3), **kwargs):
    return sources.load_extra(name, num_classes=num_classes, image_shape=image_shape, **kwargs)


# Names.


@pytest.mark.parametrize("name", ["foo:bar", "npz:", "npz", "CIFAR10", "", "tiny_images:/x", "digits:1", "a/b/c", 3])
def test_refuses_unknown_names(name):
    message = _fails("Received: ", sources.load, name, "train")
    assert all(known in message for known in ("'cifar10'", "'digits'", "npz:FILE")) and repr(name) in message


@pytest.mark.parametrize("name", ["cifar11", "cifar10:9.9.9", "cifar10_corrupted/none"])
def test_refuses_a_name_that_tfds_does_not_know(tmp_path, name):
    message = _fails(f"Received: '{name}'", sources.load, name, "train", data_dir=str(tmp_path))
    assert all(known in message for known in ("'cifar10'", "'digits'", "npz:FILE"))


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10", "digits", "carmon:", "ddpm:", "npz:", "npz", "foo:bar", "", "tfrecord", "tfrecord:", "images"),
        *("images:", "tiny_images", "tiny_images:", None),
    ],
)
def test_refuses_unknown_extra_data(name):
    for function in (_extra, sources.open_pool, sources.find_extra):
        message = _fails("Received: ", function, name)
        kinds = ("'carmon'", "'ddpm'", "npz:FILE", "tfrecord:GLOB", "images:FOLDER", "tiny_images:FILE")
        assert all(known in message for known in kinds) and message.endswith(f"Received: {name!r}")


def test_refuses_other_splits():
    _fails("Received: 'validation'", sources.load, "digits", "validation")


def test_refuses_a_data_dir_that_does_not_exist(tmp_path):
    missing = str(tmp_path / "missing")
    for name in ("cifar10", "digits"):
        _fails(f"data_dir that exists. Received: {missing}", sources.load, name, "train", data_dir=missing)
    _fails(f"data_dir that exists. Received: {missing}", _extra, "carmon", data_dir=missing)


def test_tfds_is_imported_only_where_it_is_needed(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # An import of it fails.
    spec = importlib.util.spec_from_file_location("another_copy", sources.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(module.load("digits", "test").images) == 360
    with pytest.raises(ImportError):
        module.load("cifar10", "test", data_dir=str(tmp_path))


# Digits.


def test_digits():
    train, test = sources.load("digits", "train"), sources.load("digits", "test")
    assert train.images.shape == (1437, 32, 32, 3) and test.images.shape == (360, 32, 32, 3)
    for source in (train, test):
        assert (source.name, source.num_classes) == ("digits", 10)
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
        assert (source.images[..., :1] == source.images).all()
        assert source.images.min() == 0 and source.images.max() == 255
    # What the class counts of the 1,797 digits are known to be.
    counts = np.bincount(np.concatenate([train.labels, test.labels]))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # No image is in both parts.
    rows = {image.tobytes() for image in train.images}
    assert not rows & {image.tobytes() for image in test.images}


def test_digits_are_enlarged_bilinearly_between_centres():
    # The first image of the file, of a zero, begins 0 0 5 13 9 1 0 0.
    first = int(np.flatnonzero(np.random.RandomState(0).permutation(1797) == 0)[0])
    split, index = ("test", first) if first < 360 else ("train", first - 360)
    source = sources.load("digits", split)
    assert source.labels[index] == 0
    row = source.images[index, 0, :, 0] * (16 / 255)
    # Between the centres of pixels 2 and 3, at 4 * 2 + 1.5 and 4 * 3 + 1.5, weights are 1/8, 3/8, ...
    expected = [5 + 8 * k / 8 for k in (1, 3, 5, 7)]
    np.testing.assert_allclose(row[10:14], expected, atol=0.5 * 16 / 255 + 1e-6)
    np.testing.assert_allclose(row[:6], 0)


# Files in NumPy's format.


def test_npz(tmp_path):
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS.astype(np.uint8), other=np.zeros(3))
    for split in ("train", "test"):
        source = sources.load(name, split)
        assert (source.name, source.num_classes) == (name, 4)
        np.testing.assert_array_equal(source.images, _IMAGES)
        np.testing.assert_array_equal(source.labels, _LABELS)
        assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
    assert sources.load(name, "train", num_classes=7).num_classes == 7
    extra = _extra(name, num_classes=5)
    np.testing.assert_array_equal(extra.images, _IMAGES)
    assert extra.num_classes == 5
    np.testing.assert_array_equal(_extra(name.replace("npz:", "ddpm:")).images, _IMAGES)


def test_npz_through_another_file_system(tmp_path):
    _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS)
    with tf.io.gfile.GFile("ram://sources_test.npz", "wb") as file:
        file.write((tmp_path / "set.npz").read_bytes())
    np.testing.assert_array_equal(sources.load("npz:ram://sources_test.npz", "train").images, _IMAGES)
    extra = _extra("npz:ram://sources_test.npz", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(extra.images, _IMAGES)
    np.testing.assert_array_equal(extra.labels, _LABELS)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_of_floats_converts_without_loss(tmp_path, dtype):
    every_byte = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    floats = every_byte.astype(dtype) / dtype(255)
    name = _npz(tmp_path / "set.npz", image=floats, label=[0])
    np.testing.assert_array_equal(sources.load(name, "train").images, every_byte)


@pytest.mark.parametrize(
    "images, match",
    [
        (_IMAGES / 256, r"multiples of 1/255, for 'image' in .*Received: floats up to 0\.\d+/255 away"),
        (_IMAGES / 127.5 - 1, r"floats in \[0, 1\], for 'image' in .*Received: -1 to 1$"),
        (_IMAGES.astype(np.float32), r"Received: 0 to 255$"),
        (np.where(_IMAGES == 0, np.nan, 0.0), "Received: nan to nan"),
        (_IMAGES.astype(np.int64), "'image' of uint8 .*Received: int64"),
        (_IMAGES > 100, "'image' of uint8 .*Received: bool"),
        (_IMAGES[0], r"'image' of shape \[N, height, width, channels\] .*Received: \(8, 6, 3\)"),
        (_IMAGES[:0], r"Received: \(0, 8, 6, 3\)"),
        (_IMAGES.transpose(0, 3, 1, 2), r"channels last .*Received: \(12, 3, 8, 6\)"),
        (_IMAGES[:7], r"'label' of shape \(7,\) .*Received: \(12,\)"),
        (np.array(["a"] * 12, object), "whole npz file.*holds objects"),
    ],
)
def test_refuses_images(tmp_path, images, match):
    name = _npz(tmp_path / "set.npz", image=images, label=_LABELS)
    for function, args in ((sources.load, ("train",)), (_extra, ())):
        assert str(tmp_path / "set.npz") in _fails(match, function, name, *args)


@pytest.mark.parametrize(
    "labels, match",
    [
        (_LABELS[None], r"'label' of shape \(12,\) .*Received: \(1, 12\)"),
        (_LABELS.astype(float), "'label' of integers .*Received: float64"),
        (_LABELS > 1, "'label' of integers .*Received: bool"),
        (_LABELS - 1, r"labels from 0 to 3 .*Received: 3 of 12 outside, such as \[-1\]"),
        (_LABELS + 1, r"labels from 0 to 3 .*Received: 3 of 12 outside, such as \[4\]"),
    ],
)
def test_refuses_labels(tmp_path, labels, match):
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=labels)
    assert str(tmp_path / "set.npz") in _fails(match, sources.load, name, "train", num_classes=4)
    _fails(match, _extra, name)


def test_refuses_negative_labels_where_the_classes_are_not_known(tmp_path):
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS - 1)
    _fails(r"labels from 0 to 2 .*Received: 3 of 12 outside, such as \[-1\]", sources.load, name, "train")


def test_refuses_other_keys(tmp_path):
    name = _npz(tmp_path / "set.npz", image=_IMAGES, y_train=_LABELS)
    _fails(r"Received: \['image', 'y_train'\]", sources.load, name, "train")


def test_refuses_files_that_are_no_npz(tmp_path):
    path = tmp_path / "set.npz"
    _fails(f"Received: no {path}", sources.load, f"npz:{path}", "train", error=sources.DataUnavailable)
    _fails(f"Received: no {path}", _extra, f"npz:{path}", error=sources.DataUnavailable)
    _fails("whole npz file", sources.load, f"npz:{tmp_path}", "train")
    _npz(path, image=_IMAGES, label=_LABELS)
    whole = path.read_bytes()
    with open(tmp_path / "array.npy", "wb") as file:
        np.save(file, _IMAGES)
    damaged = bytearray(whole)
    damaged[len(whole) // 4] ^= 1
    for content in (
        *(whole[: len(whole) * k // 10] for k in range(10)),
        bytes(damaged),
        b"<!DOCTYPE html><html></html>",
        pickle.dumps({"image": _IMAGES, "label": _LABELS}),
        (tmp_path / "array.npy").read_bytes(),
    ):
        path.write_bytes(content)
        assert str(path) in _fails("whole npz file", sources.load, f"npz:{path}", "train")


# Labels in a column, and arrays.


def test_labels_of_one_column(tmp_path):
    """As `keras.datasets` has them."""
    npz = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS[:, None])
    carmon = _carmon(tmp_path / "extra.pickle", labels=_LABELS[:, None])
    for source in (
        sources.load(npz, "train"),
        _extra(npz),
        _extra(carmon),
        sources.from_arrays(_IMAGES, _LABELS[:, None]),
    ):
        sources.check(source)
        np.testing.assert_array_equal(source.labels, _LABELS)


def test_arrays_become_a_source():
    source = sources.from_arrays(_IMAGES, _LABELS.astype(np.uint8))
    assert source.num_classes == 4 and source.labels.dtype == np.int32 and source.images is _IMAGES
    for dtype in (np.float16, np.float32, np.float64):
        source = sources.from_arrays((_IMAGES / 255).astype(dtype), _LABELS, num_classes=9, name="mine")
        np.testing.assert_array_equal(source.images, _IMAGES)
        assert (source.images.dtype, source.num_classes, source.name) == (np.uint8, 9, "mine")
    for images, labels, match in (
        (_IMAGES.astype(np.float32), _LABELS, r"floats in \[0, 1\], for 'images' in mine. Received: 0 to 255"),
        (_IMAGES / 127.5 - 1, _LABELS, "Received: -1 to 1"),
        (_IMAGES / np.nan, _LABELS, "Received: nan to nan"),
        (_IMAGES / 256, _LABELS, "multiples of 1/255"),
        (_IMAGES.astype(int), _LABELS, "'images' of uint8 in mine. Received: int64"),
        (_IMAGES[0], _LABELS, "'images' of shape"),
        (_IMAGES, _LABELS[:5], r"'labels' of shape \(12,\)"),
        (_IMAGES, np.eye(4)[_LABELS], r"'labels' of shape \(12,\).*Received: \(12, 4\)"),
        (_IMAGES, _LABELS / 1.0, "'labels' of integers"),
        (_IMAGES, _LABELS - 1, "labels from 0 to 2"),
    ):
        _fails(match, sources.from_arrays, images, labels, name="mine")


def test_a_source_that_is_none_is_refused_at_the_edges():
    """Floats would be read as bytes and divided by 255 twice, and labels of floats cut off, all in silence."""
    right = sources.Source("mine", _IMAGES, _LABELS, 4)
    sources.check(right)
    for wrong in (
        right._replace(images=_IMAGES / 255),
        right._replace(images=_IMAGES.astype(np.float32)),
        right._replace(images=_IMAGES.astype(np.int32)),
        right._replace(images=_IMAGES[..., 0]),
        right._replace(images=_IMAGES[:0], labels=_LABELS[:0]),
        right._replace(images=_IMAGES.tolist()),
        right._replace(labels=_LABELS + 0.5),
        right._replace(labels=_LABELS[:, None]),
        right._replace(labels=_LABELS[:7]),
        right._replace(labels=_LABELS.tolist()),
    ):
        data = training_batches.TrainingData(right, right, wrong, (0.5,), (1.0,))
        swapped = data._replace(labelled=wrong, extra=None)
        match = r"images as bytes, uint8 \[N, height, width, channels\], and labels as integers, \[N\], in 'mine'"
        for edge in (data, swapped):
            _fails(match, training_batches.batches, edge, batch_size=4, seed=0, num_steps=1)
    floats = right._replace(images=_IMAGES / 255)
    _fails("uint8 images in 'mine'. Received: float64", sources.channel_statistics, floats)


# Extra data.


def _carmon(path, images=_IMAGES, labels=_LABELS, protocol=3, **more):
    path.write_bytes(pickle.dumps({"data": images, "extrapolated_targets": labels, **more}, protocol))
    return f"carmon:{path}"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_carmon_file(tmp_path, protocol):
    source = _extra(_carmon(tmp_path / "extra.pickle", protocol=protocol, model="wrn-28-10", epoch=200))
    np.testing.assert_array_equal(source.images, _IMAGES)
    np.testing.assert_array_equal(source.labels, _LABELS)
    assert source.labels.dtype == np.int32 and source.num_classes == 4
    assert source.name == f"carmon:{tmp_path / 'extra.pickle'}"


def test_refuses_malformed_carmon_files(tmp_path):
    path = tmp_path / "extra.pickle"
    for content, match in (
        (b"<html>", "Expected a pickle"),
        (pickle.dumps([1, 2]), "Received: list"),
        (pickle.dumps({"data": _IMAGES, "targets": _LABELS}), r"Received: \['data', 'targets'\]"),
        (pickle.dumps({"data": _IMAGES, "extrapolated_targets": _LABELS.tolist()}), "Expected a dict with arrays"),
        (pickle.dumps(os.system), "system is not allowed"),
    ):
        path.write_bytes(content)
        assert str(path) in _fails(match, _extra, f"carmon:{path}")
    for arguments, match in (
        ({"images": _IMAGES[:5]}, r"'extrapolated_targets' of shape \(5,\)"),
        ({"images": _IMAGES.reshape(12, -1)}, "'data' of shape"),
        ({"images": _IMAGES.astype(np.int32)}, "'data' of uint8"),
        ({"labels": _LABELS / 2}, "'extrapolated_targets' of integers"),
        ({"labels": _LABELS * 2}, r"labels from 0 to 3 .*Received: 6 of 12 outside, such as \[4, 6\]"),
    ):
        _fails(match, _extra, _carmon(path, **arguments))
    _fails("Received: no ", _extra, f"carmon:{tmp_path / 'none'}", error=sources.DataUnavailable)


def test_extra_data_has_to_fit_the_labelled_set(tmp_path):
    npz = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS)
    for name in (npz, _carmon(tmp_path / "extra.pickle")):
        _fails(r"images of shape \(32, 32, 3\).*Received: \(8, 6, 3\)", _extra, name, image_shape=(32, 32, 3))
        _fails("labels from 0 to 2 .*Received: 3 of 12 outside", _extra, name, num_classes=3)


def _write_all_kinds(folder):
    """The same images as every kind of set, with labels where it can have them."""
    np.savez(folder / "stored.npz", image=_SQUARES, label=_LABELS)
    np.savez_compressed(folder / "compressed.npz", image=_SQUARES, label=_LABELS)
    _carmon(folder / "extra.pickle", images=_SQUARES)
    _SQUARES.transpose(0, 3, 2, 1).tofile(folder / "tiny_images.bin")  # By columns: tested in formats_test.
    with tf.io.TFRecordWriter(str(folder / "part-0.tfrecord")) as writer:
        for image, label in zip(_SQUARES, _LABELS):
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image.tobytes()])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    for k, (image, label) in enumerate(zip(_SQUARES, _LABELS)):
        path = folder / "images" / str(label) / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tf.io.encode_png(image).numpy())


_SQUARES = np.random.RandomState(1).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
_BY_CLASS = np.argsort(_LABELS, kind="stable")
_KINDS = {
    "carmon": "extra.pickle",
    "npz": "stored.npz",
    "ddpm": "compressed.npz",
    "tfrecord": "part-*.tfrecord",
    "images": "images",
    "tiny_images": "tiny_images.bin",
}


@pytest.mark.parametrize("kind, file", _KINDS.items())
@pytest.mark.parametrize("is_relative", [False, True])
def test_every_kind(tmp_path, monkeypatch, kind, file, is_relative):
    monkeypatch.chdir("/")
    folder, cache_dir = tmp_path / "data", tmp_path / "cache"
    folder.mkdir()
    _write_all_kinds(folder)
    name = f"{kind}:{file}" if is_relative else f"{kind}:{folder / file}"
    options = {"data_dir": str(folder)} if is_relative else {}
    order = _BY_CLASS if kind == "images" else np.arange(12)
    assert sources.find_extra(name, **options) == str(folder / file)

    pool = sources.open_pool(name, cache_dir=str(cache_dir), image_shape=(32, 32, 3), **options)
    assert pool.shape == (12, 32, 32, 3) and pool.dtype == np.uint8 and len(pool) == 12
    np.testing.assert_array_equal(pool[2:5], _SQUARES[order[2:5]])
    np.testing.assert_array_equal(pool[np.array([11, 0, 11])], _SQUARES[order[[11, 0, 11]]])
    assert isinstance(pool[:3], np.ndarray) and isinstance(pool, np.ndarray) == (kind == "carmon")

    def extra(**others):
        return _extra(name, image_shape=(32, 32, 3), cache_dir=str(cache_dir), **options, **others)

    if kind == "tiny_images":
        _fails("scripts/pseudo_label.py gives the images of a pool their labels.* which has none", extra)
    else:
        source = extra()
        assert (source.name, source.num_classes) == (name, 4)
        np.testing.assert_array_equal(source.images, _SQUARES[order])
        np.testing.assert_array_equal(source.labels, _LABELS[order])
        assert type(source.labels) is (np.ndarray if kind == "carmon" else np.memmap)
        _fails(
            "classes, each a sub-folder|labels from 0 to 2 .*Received: 3 of 12 outside, such as .3.",
            extra,
            num_classes=3,
        )
    for function in (sources.open_pool, _extra if kind != "tiny_images" else sources.open_pool):
        _fails("shape|bytes", function, name, image_shape=(16, 16, 3), cache_dir=str(cache_dir), **options)
    assert not list(folder.glob("*.shards"))
    converted = {"ddpm": 1, "tfrecord": 1, "images": 1}.get(kind, 0)
    assert len(list(cache_dir.glob("*.shards/shards.json"))) == converted


@pytest.mark.parametrize("kind", _KINDS)
def test_missing_extra_data(tmp_path, kind):
    for function in (_extra, sources.open_pool, sources.find_extra):
        for path in (tmp_path / "none", tmp_path / "none*"):
            _fails(
                f"Received: no {path}, neither".replace("*", ".*"),
                function,
                f"{kind}:{path}",
                error=sources.DataUnavailable,
            )
    if kind == "images":
        (tmp_path / "none").write_text("")
        _fails("existing folder", _extra, f"images:{tmp_path / 'none'}", error=sources.DataUnavailable)


def test_labels_are_checked_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LABELS_AT_ONCE", 5)
    for dtype in (np.int8, np.uint64):
        name = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS.astype(dtype))
        assert _extra(name).labels.dtype == dtype
    labels = _LABELS.copy()
    labels[[4, 11]] = 9, -1
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=labels)
    _fails(r"labels from 0 to 3 .*Received: 2 of 12 outside, such as \[-1, 9\]$", _extra, name)
    labels = _LABELS.astype(np.uint64)
    labels[6] = 2**64 - 1
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=labels)
    _fails(rf"Received: 1 of 12 outside, such as \[{2**64 - 1}\]$", _extra, name)


def test_a_pool_needs_no_labels(tmp_path):
    np.testing.assert_array_equal(sources.open_pool(_npz(tmp_path / "set.npz", image=_IMAGES)), _IMAGES)
    name = _npz(tmp_path / "set.npz", image=_IMAGES, label=_LABELS - 1)
    np.testing.assert_array_equal(sources.open_pool(name), _IMAGES)
    _fails("labels from 0 to 3", _extra, name)


def test_what_cannot_be_read(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "0.png").symlink_to(tmp_path / "nowhere")
    _fails(
        "Expected files and folders in a folder of images.*Received: .*0.png, a link",
        sources.open_pool,
        f"images:{tmp_path / 'set'}",
    )


def test_how_to_obtain_the_default_files(tmp_path):
    with pytest.raises(sources.DataUnavailable) as error:
        _extra("carmon", data_dir=str(tmp_path))
    lines = str(error.value).splitlines()
    assert f"  gdown 1LTw3Sb5QoiCCN-6Y5PEKkq9C9W60w-Hi -O {tmp_path}/ti_500K_pseudo_labeled.pickle" in lines
    curl = (
        f"  curl -L -o {tmp_path}/cifar10_ddpm.npz "
        "https://storage.googleapis.com/dm-adversarial-robustness/cifar10_ddpm.npz"
    )
    assert curl in lines and any("""--gin_param="EXTRA_DATA = 'ddpm'\"""" in line for line in lines)
    assert "https://github.com/yaircarmon/semisup-adv" in lines[0] and "not on the paper's data" in str(error.value)
    assert "Received: " in lines[-1]
    with pytest.raises(sources.DataUnavailable) as error:
        _extra("ddpm", data_dir=str(tmp_path))
    assert curl in str(error.value).splitlines() and "gdown" not in str(error.value)


def test_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(sources.DataUnavailable, match=f"{tmp_path}/tensorflow_datasets/ti_500K"):
        _extra("carmon")
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(sources, "PUBLISHED", {})
    _npz(tmp_path / "home" / "cifar10_ddpm.npz", image=_IMAGES, label=_LABELS)
    assert len(_extra("ddpm", data_dir="~/home").images) == 12
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "home"))
    assert len(_extra("ddpm").images) == 12


def test_is_paper_extra_data():
    for name in ("carmon", f"carmon:/data/{sources.CARMON_FILE}"):
        assert sources.is_paper_extra_data(name)
    # Tables 4 and 5 have regenerated sets, too.
    for folder in ("80mti/200k", "80mti/500k", "80mti/1m", "80mti_cifar100/500k", "/data/80mti/500k"):
        assert sources.is_paper_extra_data(f"tfrecord:{folder}/*.tfrecord")
    for folder in ("80mti/501k", "mine/500k", "80mti_cifar100/1m", "not80mti/500k", "80mti/500k/part"):
        assert not sources.is_paper_extra_data(f"tfrecord:{folder}/*.tfrecord")
    assert not sources.is_paper_extra_data("npz:80mti/500k/*.tfrecord")
    for name in ("carmon:/data/other.pickle", "ddpm", f"npz:/data/{sources.CARMON_FILE}", "carmons", None):
        assert not sources.is_paper_extra_data(name)


# The published files.


def test_published_files_are_checked_by_their_structure(tmp_path):
    assert sources.PUBLISHED[sources.CARMON_FILE].num_images == 500_000
    path = tmp_path / sources.CARMON_FILE
    name = _carmon(path)
    _fails("set of 10 classes .*Received: one of 4", _extra, name)
    if sources.PUBLISHED[sources.CARMON_FILE].num_bytes is None:
        for typed in ("carmon", name):
            match = f"Expected 500000 images in {path}. Received: 12"
            _fails(match, _extra, typed, num_classes=10, data_dir=str(tmp_path))


def _publish(monkeypatch, path, **figures):
    published = sources.Published("https://example.org/file", **figures)
    monkeypatch.setattr(sources, "PUBLISHED", {path.name: published})


def test_published_size_is_checked(tmp_path, monkeypatch):
    path = tmp_path / "extra.pickle"
    name = _carmon(path)
    _publish(monkeypatch, path, num_bytes=path.stat().st_size)
    assert len(_extra(name).images) == 12
    _publish(monkeypatch, path, num_bytes=path.stat().st_size + 1)
    message = _fails(f"Received: {path.stat().st_size} bytes", _extra, name)
    assert "web page or a truncated download" in message and "https://example.org/file" in message
    assert not (tmp_path / "extra.pickle.sha256").exists()


@pytest.mark.parametrize("folder_is_writable", [True, False])
def test_published_digest_is_checked_once(tmp_path, monkeypatch, folder_is_writable):
    path = tmp_path / "extra.pickle"
    sidecar = tmp_path / "extra.pickle.sha256"
    if not folder_is_writable:
        sidecar.mkdir()  # Cannot be written, whoever runs the test.
    name = _carmon(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    num_hashed = []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda: num_hashed.append(1) or real())
    _publish(monkeypatch, path, num_bytes=size, sha256=digest)
    for _ in range(3):
        assert len(_extra(name).images) == 12
    if not folder_is_writable:
        assert len(num_hashed) == 3
        return
    assert len(num_hashed) == 1
    assert json.loads(sidecar.read_text()) == {
        "sha256": digest,
        "num_bytes": size,
        "mtime_nsec": tf.io.gfile.stat(str(path)).mtime_nsec,
    }

    # A change of the file is seen, and what it is then is remembered too.
    content = bytearray(path.read_bytes())
    content[-1:] = b".x"
    path.write_bytes(bytes(content))
    changed = real(path.read_bytes()).hexdigest()
    _publish(monkeypatch, path, sha256=digest)
    for _ in range(2):
        message = _fails(f"SHA-256 {digest} .*Received: {changed}", _extra, name)
        assert "web page or a truncated download" in message
    assert len(num_hashed) == 2

    # A change of the same size is seen by its time.
    content[-1:] = b"y"
    path.write_bytes(bytes(content))
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 2 * 10**9))
    _fails("Received: " + real(path.read_bytes()).hexdigest(), _extra, name)

    # A damaged note is made again.
    for text in ("", "{}", "[]", "no json"):
        sidecar.write_text(text)
        _fails("Received: " + real(path.read_bytes()).hexdigest(), _extra, name)
        assert json.loads(sidecar.read_text())["num_bytes"] == path.stat().st_size


# TensorFlow Datasets.


@pytest.fixture
def no_network(monkeypatch):
    """Every request fails at once, as behind a proxy that is down."""
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_set_that_cannot_be_downloaded(tmp_path, no_network, name, caplog, capfd):
    start = time.monotonic()
    for _ in range(2):  # The first attempt leaves nothing that changes the second.
        message = _fails(
            "downloaded, which failed",
            sources.load,
            name,
            "train",
            data_dir=str(tmp_path),
            error=sources.DataUnavailable,
        )
        assert "--data_dir=DIR" in message and f"DIR holds {name}/3.0.2/" in message and len(message) < 600
        assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - start < 60
    assert caplog.records == []
    assert "Downloading" not in "".join(capfd.readouterr())


def test_unreachable_hosts(no_network):
    reason = tfds_sets._unreachable(["https://one.invalid/file", "http://two.invalid/x", "https://one.invalid/other"])
    assert "invalid" in reason and "\n" not in reason and len(reason) < 100
    assert tfds_sets._unreachable([]) is None
    assert tfds_sets._unreachable(["gs://bucket/file"]) is None


def test_a_reachable_host(monkeypatch):
    requests = pytest.importorskip("requests")
    asked = []

    def head(url, **kwargs):
        asked.append(url)
        if "one" in url:
            raise requests.ConnectionError("a long story")

    monkeypatch.setattr(requests, "head", head)
    assert tfds_sets._unreachable(["https://one.invalid/a", "https://two.invalid/b", "https://two.invalid/c"]) is None
    assert asked == ["https://one.invalid", "https://two.invalid"]
    assert tfds_sets._unreachable(["https://one.invalid/a"]) == "cannot reach one.invalid: ConnectionError"


@pytest.mark.parametrize(
    "name, match",
    [("imdb_reviews", r"Received: 'imdb_reviews', which has \['label', 'text'\]"), ("imagenette", "None, None, 3")],
)
def test_refuses_tfds_sets_of_other_things_before_a_download(tmp_path, name, match):
    _fails(match, sources.load, name, "train", data_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


class _Features(dict):
    """The features of a set of TFDS."""

    def __init__(self, label_shape):
        import tensorflow_datasets as tfds

        label = tfds.features.ClassLabel(num_classes=4)
        if label_shape:
            label = tfds.features.Sequence(label, length=label_shape[0])
        super().__init__(image=tfds.features.Image(shape=(8, 6, 3)), label=label)


def test_tfds_labels_of_one_column():
    pytest.importorskip("tensorflow_datasets")
    for shape in ((), (1,)):
        assert tfds_sets._image_features("made", _Features(shape)) == ((8, 6, 3), 4)
    for shape in ((2,), (None,)):
        _fails(
            r"class 'label'. Received: 'made', which has labels of shape",
            tfds_sets._image_features,
            "made",
            _Features(shape),
        )

    class Builder:
        data_dir = "nowhere"

        class info:
            splits = {"train": type("Split", (), {"num_examples": 12, "filepaths": []})}
            features = {"image": type("Image", (), {"decode_example": staticmethod(tf.io.decode_png)})}

        def as_dataset(self, **options):
            stored = [tf.io.encode_png(image).numpy() for image in _IMAGES]
            return tf.data.Dataset.from_tensor_slices({"image": stored, "label": _LABELS[:, None]})

    images, labels = tfds_sets.read(tfds_sets.Split("made", "train", (8, 6, 3), 4, Builder()))
    np.testing.assert_array_equal(images, _IMAGES)
    np.testing.assert_array_equal(labels, _LABELS)


_SHARDS = 3
_PER_SHARD = 20  # More than TFDS takes from a shard at once if it is not told otherwise.


@pytest.fixture
def cifar10_copy(tmp_path):
    """A prepared copy in several shards; image k is uniformly k, of class k % 10."""
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    for shard in range(_SHARDS):
        path = folder / f"cifar10-test.tfrecord-{shard:05d}-of-{_SHARDS:05d}"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for k in range(_PER_SHARD * shard, _PER_SHARD * (shard + 1)):
                png = tf.io.encode_png(np.full((32, 32, 3), k, np.uint8)).numpy()
                feature = {
                    "id": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"id"])),
                    "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[png])),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[k % 10])),
                }
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    _write_info(folder)
    return folder


def _write_info(folder, split="test", per_shard=_PER_SHARD):
    info = {
        "name": "cifar10",
        "version": "3.0.2",
        "fileFormat": "tfrecord",
        "splits": [
            {
                "name": split,
                "numBytes": "1",
                "shardLengths": [str(per_shard)] * _SHARDS,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        ],
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_tfds_set_in_the_order_of_its_files(cifar10_copy, monkeypatch, caplog, capfd):
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.INFO)  # As a command sets it.
    try:
        for name in ("cifar10", "cifar10:3.0.2"):
            source = sources.load(name, "test", data_dir=str(cifar10_copy.parents[1]))
            assert (source.name, source.num_classes) == (name, 10)
            assert source.images.shape == (_PER_SHARD * _SHARDS, 32, 32, 3)
            assert source.images.dtype == np.uint8 and source.labels.dtype == np.int32
            np.testing.assert_array_equal(source.labels, np.arange(_PER_SHARD * _SHARDS) % 10)
            np.testing.assert_array_equal(source.images[:, 3, 4, 1], np.arange(_PER_SHARD * _SHARDS))
            assert sources.channel_statistics(source)[0] == (0.4914, 0.4822, 0.4465)
        monkeypatch.setattr(formats, "IN_MEMORY_BYTES", 100)
        on_disk = sources.load("cifar10", "test", data_dir=str(cifar10_copy.parents[1]))
        assert type(on_disk.images) is mapped.MappedImages and on_disk.num_classes == 10
        np.testing.assert_array_equal(on_disk.images, source.images)
        np.testing.assert_array_equal(on_disk.labels, source.labels)
        assert absl.logging.get_verbosity() == absl.logging.INFO
    finally:
        absl.logging.set_verbosity(verbosity)
    assert caplog.records == []
    said = "".join(capfd.readouterr())
    assert said.count("cifar10") == said.count("Converting ") * 2 == 2  # Of the conversion alone: from where, to where.


def test_refuses_incomplete_copies(cifar10_copy, no_network):
    def refused(match):
        _fails(match, sources.load, "cifar10", "test", data_dir=str(cifar10_copy.parents[1]))

    _write_info(cifar10_copy, per_shard=_PER_SHARD + 1)
    refused("whole copy of 'cifar10' in .*Received: Input dataset was expected to contain 63 elements .* 60 elements.$")
    _write_info(cifar10_copy)
    shard = sorted(cifar10_copy.glob("*-test*"))[-1]
    shard.write_bytes(shard.read_bytes()[:-20])
    refused("whole copy of 'cifar10' in ")
    shard.unlink()
    refused("whole copy of 'cifar10' in ")
    _write_info(cifar10_copy, split="train")
    refused(r"split 'test'. Received: \['train'\]")
    (cifar10_copy / "dataset_info.json").unlink()
    refused("without a dataset_info.json")


@needs_cifar10
def test_cifar10():
    test = sources.load("cifar10", "test", data_dir=str(_TFDS_DIR))
    assert test.images.shape == (10000, 32, 32, 3) and test.images.dtype == np.uint8
    assert np.bincount(test.labels).tolist() == [1000] * 10


# Statistics and validation.


def test_channel_statistics():
    empty = np.zeros((1, 2, 2, 3), np.uint8)
    label = np.zeros(1, np.int32)
    published = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    for name, expected in published.items():
        assert sources.channel_statistics(sources.Source(name, empty, label, 10)) == expected
    images = np.zeros((5000, 2, 2, 3), np.uint8)
    images[::2, ..., 0] = 255  # mean 1/2, std 1/2
    images[4000:, ..., 1] = 51  # 1/5 in one image of five: mean 1/25, std 2/25
    images[..., 2] = 102  # constant
    source = sources.Source("npz:cifar10", images, np.zeros(5000, np.int32), 10)
    mean, std = sources.channel_statistics(source)
    assert mean == (0.5, 0.04, 0.4) and std == (0.5, 0.08, 1.0)
    assert all(type(value) is float for value in mean + std)
    source = source._replace(images=np.resize(_IMAGES, (5, 8, 6, 3)))
    mean, std = sources.channel_statistics(source)
    pixels = source.images / 255
    assert mean == tuple(np.round(pixels.mean((0, 1, 2)), 4))
    assert std == tuple(np.round(pixels.std((0, 1, 2)), 4))


def test_hold_out():
    images = np.arange(100, dtype=np.uint8).reshape(100, 1, 1, 1)
    source = sources.Source("name", images, np.arange(100, dtype=np.int32), 100)
    train, validation = sources.hold_out(source, 30)
    assert len(train.images) == 70 and len(validation.images) == 30
    assert sorted(np.concatenate([train.labels, validation.labels])) == list(range(100))
    for part in (train, validation):
        assert part.name == "name" and part.num_classes == 100
        np.testing.assert_array_equal(part.images.ravel(), part.labels)
        assert (np.diff(part.labels) > 0).all()
    assert set(validation.labels) == set(np.random.RandomState(0).permutation(100)[:30])
    np.random.seed(1)
    np.testing.assert_array_equal(sources.hold_out(source, 30)[1].labels, validation.labels)
    train, validation = sources.hold_out(source, 0)
    np.testing.assert_array_equal(train.images, images)
    assert validation.images.shape == (0, 1, 1, 1)
    for num_validation in (-1, 100, 101):
        _fails(f"100 images of 'name'. Received: {num_validation}", sources.hold_out, source, num_validation)
