"""Labelled sets on disk: folders, records, large npz files and sets of TFDS, of images that may differ in size."""

import itertools
import json

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.data import sources
from robust_keras.data.readers import formats, mapped, pictures, shards, views
from robust_keras.evaluation import examples

_SIDE = 8


def shade(k):
    """The grey of image k."""
    return 10 + 7 * k


def encoded(k, height, width, *, kind="png", channels=3):
    image = np.full((height, width, channels), shade(k), np.uint8)
    return (tf.io.encode_png(image) if kind == "png" else tf.io.encode_jpeg(image, quality=100)).numpy()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


# Class by class, each image of a size and kind of its own.
_TRAIN = {"ant": (0, 1, 2), "bee": (3, 4), "cat": (5, 6, 7, 8)}
_VAL = {"bee": (20, 21), "cat": (22,)}


def sized(k):
    """In colour, grey, or with an alpha channel."""
    kind, channels = ("jpeg", (3, 1)[k // 2 % 2]) if k % 2 else ("png", (3, 1, 4)[k // 2 % 3])
    return encoded(k, 9 + k % 5, 8 + 2 * (k % 4), kind=kind, channels=channels)


@pytest.fixture
def folder(tmp_path):
    for part, classes in (("train", _TRAIN), ("val", _VAL)):
        for name, numbers in classes.items():
            for k in numbers:
                write(tmp_path / "set" / part / name / f"{k}.{'jpg' if k % 2 else 'png'}", sized(k))
    return tmp_path / "set"


def load(name, split="train", **options):
    return sources.load(str(name), split, **options)


def refused(match, *args, **options):
    with pytest.raises(ValueError, match=match) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("Expected ") and "Received: " in message


def assert_holds(source, classes, names=tuple(_TRAIN), size=_SIDE):
    """Each image of the classes once, with its label."""
    numbers = [k for each in classes.values() for k in each]
    assert source.images.shape == (len(numbers), size, size, 3) and source.images.dtype == np.uint8
    assert source.labels.dtype == np.int32 and source.num_classes == len(names)
    found = source.images[np.arange(len(numbers))]
    assert (found == found[:, :1, :1, :1]).all()
    labels = {shade(k): names.index(name) for name, each in classes.items() for k in each}
    assert dict(zip(found[:, 0, 0, 0].tolist(), source.labels.tolist())) == labels


def test_a_divided_folder_of_images_that_differ_in_size(folder, capsys):
    for _ in range(2):
        train = load(f"images:{folder}", image_size=_SIDE)
        assert_holds(train, _TRAIN)
        for split in ("test", "validation"):
            # Without ants, and with the labels of the training set.
            assert_holds(load(f"images:{folder}", split, image_size=_SIDE), _VAL)
    assert capsys.readouterr().out.count("Converting ") == 2
    assert sorted(path.name for path in folder.iterdir()) == ["train", "train.8.shards", "val", "val.8.shards"]
    assert train.name == f"images:{folder}" and isinstance(train.images, views.View)


def test_labels_are_those_of_the_training_set_whoever_converted_first(folder):
    alone = load(f"images:{folder}/val", image_size=_SIDE)
    assert_holds(alone, _VAL, names=tuple(_VAL))
    assert_holds(load(f"images:{folder}", "test", image_size=_SIDE), _VAL)


def test_each_size_has_a_conversion_of_its_own(folder, tmp_path, capsys):
    for _ in range(2):
        for size in (4, 6):
            source = load(f"images:{folder}", image_size=size, cache_dir=str(tmp_path / "cache"))
            assert_holds(source, _TRAIN, size=size)
    assert capsys.readouterr().out.count("Converting ") == 2
    assert not list(folder.glob("*.shards"))


def test_the_first_images_are_of_all_classes(tmp_path):
    for k in range(60):
        write(tmp_path / f"{k // 20}" / f"{k:02d}.png", encoded(k % 30, 4, 4))
    first, again = load(f"images:{tmp_path}"), load(f"images:{tmp_path}", "test")
    assert set(first.labels[:10]) == {0, 1, 2}
    np.testing.assert_array_equal(first.labels, again.labels)  # One set, whatever the split.


@pytest.mark.parametrize(
    "names, split, found",
    [
        (("train", "test"), "train", ("train", "train")),
        (("train", "test", "val"), "test", ("test", "train")),
        (("train", "val", "notes"), "test", ("val", "train")),
        (("test", "val"), "validation", ("val", "val")),
        (("train",), "test", "a folder 'test' or 'val' in .*split 'test'. Received: train"),
        (("train", "test"), "validation", "a folder 'val' in .*split 'validation'. Received: test, train"),
        (("boat", "plane", "train"), "train", ("", "")),  # A train is a vehicle, too.
        (("cat", "test"), "test", ("", "")),
        (("cat", "dog"), "validation", ("", "")),
    ],
)
def test_what_a_folder_is_divided_into(tmp_path, names, split, found):
    for name in names:
        (tmp_path / name / f"class of {name}").mkdir(parents=True)
    (tmp_path / "train.8.shards").mkdir()
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            pictures.part_of(str(tmp_path), split)
        return
    part, classes = pictures.part_of(str(tmp_path), split)
    assert part.rstrip("/") == str(tmp_path / found[0]).rstrip("/")
    assert classes == ([f"class of {found[1]}"] if found[1] else sorted(names))


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    refused("an image_size, to which images of several sizes are resized, .* in .*/train/", f"images:{folder}")
    (folder / "val" / "dog").mkdir()
    write(folder / "val" / "dog" / "0.png", sized(0))
    refused(
        r"names of the 3 classes of the training set. Received: \['dog'\]", f"images:{folder}", "test", image_size=8
    )
    write(tmp_path / "flat" / "0.png", sized(0))
    refused("a sub-folder of images for each class", f"images:{tmp_path / 'flat'}", image_size=8)
    refused("existing folder", f"images:{tmp_path / 'none'}")


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: b"<html>", lambda data: b""])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "train" / "cat" / "7.jpg"
    path.write_bytes(damage(path.read_bytes()))
    refused(f" in {path}. Received: ", f"images:{folder}", image_size=8)
    assert not list(folder.glob("*.shards"))


def test_the_middle_is_resized(tmp_path):
    """A ramp stays one; what lies outside the middle square does not count; what has the size stays as it is."""
    ramp = np.tile((4 * np.arange(32, dtype=np.uint8))[None, :, None], (32, 1, 3))
    wide = np.concatenate([np.full((32, 8, 3), 255, np.uint8), ramp, np.full((32, 9, 3), 255, np.uint8)], axis=1)
    exact = np.random.RandomState(0).randint(0, 256, (16, 20, 3)).astype(np.uint8)
    paths = []
    for k, image in enumerate((ramp, wide, wide.transpose(1, 0, 2), exact)):
        paths.append(str(tmp_path / f"{k}.png"))
        write(tmp_path / f"{k}.png", tf.io.encode_png(image).numpy())
    ((images, _),) = pictures.file_blocks(paths, None, (16, 16, 3), resized=True)
    # The centre of each pixel lies between those of two old ones.
    np.testing.assert_array_equal(images[0, :, 1:-1, :], np.tile((2 + 8 * np.arange(1, 15))[None, :, None], (16, 1, 3)))
    np.testing.assert_array_equal(images[1], images[0])
    np.testing.assert_array_equal(images[2], images[1].transpose(1, 0, 2))
    np.testing.assert_array_equal(images[3], exact[:, 2:18])
    tail = np.concatenate([each for each, _ in pictures.file_blocks(paths, None, (16, 16, 3), first=1, resized=True)])
    np.testing.assert_array_equal(tail, images[1:])


def test_large_images_are_decoded_few_at_a_time():
    assert pictures.block_size((32, 32, 3)) == 256
    assert pictures.block_size((256, 256, 3)) == 21 and pictures.block_size((4000, 4000, 3)) == 1


def test_short_side(folder):
    whole = load(f"images:{folder}", image_size=8)
    middle = load(f"images:{folder}", image_size=6, short_side=8)
    np.testing.assert_array_equal(np.asarray(middle.images), np.asarray(whole.images)[:, 1:7, 1:7])
    for options in ({"short_side": 8}, {"image_size": 9, "short_side": 8}, {"image_size": 0}, {"image_size": 8.0}):
        refused("image_size", f"images:{folder}", **options)


def test_sets_of_one_shape_may_have_an_image_size_that_is_theirs(tmp_path):
    """So that extra data can be resized to it."""
    np.savez(tmp_path / "set.npz", image=np.zeros((4, 8, 8, 3), np.uint8), label=np.arange(4))
    for name, size in (("digits", 32), (f"npz:{tmp_path}/set.npz", 8)):
        assert type(load(name, image_size=size).images) is np.ndarray
        refused(
            rf"an image_size that '{name}' has, .*\({size}, {size}, 3\), are not resized. .*: 9", name, image_size=9
        )


def test_an_evaluation_reads_the_first_images_alone(folder, monkeypatch):
    source = load(f"images:{folder}", image_size=8)
    read = []
    whole = mapped.MappedImages.__getitem__
    monkeypatch.setattr(
        mapped.MappedImages, "__getitem__", lambda self, index: read.append(index) or whole(self, index)
    )
    images, labels = examples.first(source, 4)
    assert [len(index) for index in read] == [4] and len(labels) == 4
    np.testing.assert_array_equal(images, np.asarray(source.images)[:4])


def interrupted(monkeypatch, *args, **options):
    """A conversion that ends after its third block."""

    def first_three(write=shards._write):
        def call(folder, shape, counts, blocks, source, total):
            def some():
                yield from itertools.islice(blocks, 3)
                raise KeyboardInterrupt

            return write(folder, shape, counts, some(), source, total)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write", first_three())
        with pytest.raises(KeyboardInterrupt):
            load(*args, **options)


@pytest.mark.parametrize("kind", ["folder", "records", "tfds"])
def test_a_conversion_goes_on(folder, tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 192)
    monkeypatch.setattr(pictures, "BLOCK", 1)
    numbers = [k for each in _TRAIN.values() for k in each]
    write_records(tmp_path / "records", [sized(k) for k in numbers], numbers)
    prepared_imagenette(tmp_path, "train", [encoded(k, 9 + k, 10, kind="jpeg") for k in numbers], numbers)
    name = {"folder": f"images:{folder}", "records": f"tfrecord:{tmp_path}/records", "tfds": _IMAGENETTE}[kind]
    options = {"image_size": 8, "data_dir": str(tmp_path)}
    interrupted(monkeypatch, name, **options)
    capsys.readouterr()
    found = load(name, **options)
    assert "after 2 images" in capsys.readouterr().out
    undisturbed = load(name, **options, cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(found.images, undisturbed.images)
    np.testing.assert_array_equal(found.labels, undisturbed.labels)


# Records.


def write_records(path, images, labels):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image, label in zip(images, labels):
            feature = {
                "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[image])),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def test_records(tmp_path):
    numbers = [k for each in _TRAIN.values() for k in each]
    labels = [0] * 3 + [1] * 2 + [2] * 4
    write_records(tmp_path / "sized", [sized(k) for k in numbers], labels)
    write_records(tmp_path / "raw", [bytes([shade(k)]) * 192 for k in numbers], labels)
    write_records(tmp_path / "same", [encoded(k, 8, 8) for k in numbers], labels)
    for name, options in (("sized", {"image_size": 8}), ("raw", {"image_size": 8}), ("same", {})):
        for split in ("train", "test"):
            source = load(f"tfrecord:{tmp_path / name}", split, **options)
            assert_holds(source, _TRAIN)
            np.testing.assert_array_equal(source.labels, labels)  # In the order of the file.
    refused("an image_size, to which", f"tfrecord:{tmp_path / 'sized'}")
    refused("PNG or JPEG in .*where no image_shape or image_size", f"tfrecord:{tmp_path / 'raw'}")
    refused(r"the 147 bytes of \(7, 7, 3\)", f"tfrecord:{tmp_path / 'raw'}", image_size=7)
    refused("an existing file", f"tfrecord:{tmp_path / 'none'}")
    refused("split 'train' or 'test'", f"tfrecord:{tmp_path / 'same'}", "validation")
    whole = [sized(k) for k in numbers]
    write_records(tmp_path / "damaged", [*whole[:5], whole[5][:-20]], labels)
    refused(f"whole image in record 5 of {tmp_path}/damaged", f"tfrecord:{tmp_path / 'damaged'}", image_size=8)


# What is too large for memory.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_large_npz_file_stays_on_disk(tmp_path, monkeypatch, save):
    images = np.random.RandomState(0).randint(0, 256, (20, 4, 4, 3)).astype(np.uint8)
    labels = np.arange(20) % 3
    save(tmp_path / "set.npz", image=images, label=labels[:, None])
    small = load(f"npz:{tmp_path / 'set.npz'}")
    assert type(small.images) is np.ndarray
    monkeypatch.setattr(formats, "IN_MEMORY_BYTES", 100)
    large = load(f"npz:{tmp_path / 'set.npz'}")
    assert type(large.images) is mapped.MappedImages and large.labels.dtype == np.int32 and large.num_classes == 3
    for one, other in zip((large, *sources.hold_out(large, 6)), (small, *sources.hold_out(small, 6))):
        assert not isinstance(one.images, np.ndarray)
        np.testing.assert_array_equal(np.asarray(one.images), other.images)
        np.testing.assert_array_equal(one.labels, other.labels)
    assert sources.channel_statistics(large) == sources.channel_statistics(small)


def test_channel_statistics_of_a_large_set_look_at_some_images(monkeypatch):
    images = np.random.RandomState(0).randint(0, 256, (200, 4, 4, 3)).astype(np.uint8)
    images[100:] //= 2
    source = sources.Source("made", images, np.zeros(200, np.int32), 1)
    on_disk = source._replace(images=views.Selected(images, np.arange(200)))
    assert sources.channel_statistics(on_disk) == sources.channel_statistics(source)
    monkeypatch.setattr(sources, "_STATISTICS_IMAGES", 50)
    some = sources.channel_statistics(on_disk)
    assert some != sources.channel_statistics(source) and some == sources.channel_statistics(on_disk)
    chosen = images[np.random.RandomState(0).permutation(200)[:50]]
    assert some == sources.channel_statistics(source._replace(images=chosen))
    np.testing.assert_allclose(some[0], images.mean((0, 1, 2)) / 255, atol=0.05)
    monkeypatch.setattr(sources, "_STATISTICS_BYTES", 10 * 48)
    few = images[np.random.RandomState(0).permutation(200)[:10]]
    assert sources.channel_statistics(on_disk) == sources.channel_statistics(source._replace(images=few))


# TensorFlow Datasets.


_IMAGENETTE = "imagenette/320px-v2"


def prepared_imagenette(data_dir, split, images, labels):
    """A prepared copy, in two files."""
    folder = data_dir / _IMAGENETTE / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    half = len(images) // 2
    for shard, part in enumerate((slice(0, half), slice(half, None))):
        write_records(folder / f"imagenette-{split}.tfrecord-{shard:05d}-of-00002", images[part], labels[part])
    info = folder / "dataset_info.json"
    before = json.loads(info.read_text())["splits"] if info.exists() else []
    lengths = [str(half), str(len(images) - half)]
    template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    new = {"name": split, "numBytes": "1", "shardLengths": lengths, "filepathTemplate": template}
    text = {"name": "imagenette", "version": "1.0.0", "fileFormat": "tfrecord", "splits": [*before, new]}
    info.write_text(json.dumps({**text, "configName": "320px-v2"}))


def test_a_tfds_set_of_images_that_differ_in_size(tmp_path, capsys):
    pytest.importorskip("tensorflow_datasets")
    numbers = list(range(12))
    images = [encoded(k, 9 + k, 20 - k, kind="jpeg") for k in numbers]
    prepared_imagenette(tmp_path, "train", images, [k % 10 for k in numbers])
    prepared_imagenette(tmp_path, "validation", [encoded(k, 9, 8, kind="jpeg") for k in (3, 9)], [3, 9])
    name, data_dir = _IMAGENETTE, str(tmp_path)
    refused("image_size to which they are resized. Received: .*None, None, 3", name, data_dir=data_dir)
    for split in ("test", "validation"):
        source = load(name, split, data_dir=data_dir, image_size=8)
        np.testing.assert_array_equal(source.labels, [3, 9])
        np.testing.assert_array_equal(source.images[:][:, 4, 4, 1], [shade(3), shade(9)])
    for _ in range(2):
        source = load(name, data_dir=data_dir, image_size=8)
        assert source.images.shape == (12, 8, 8, 3) and source.num_classes == 10
    assert capsys.readouterr().out.count("Converting ") == 2
