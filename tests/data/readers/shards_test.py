"""Converting a source once, whatever happens meanwhile."""

import concurrent.futures
import errno
import itertools
import json
import os
import resource
import shutil
import signal

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import ownership
from robust_keras.data.readers import formats, shards
from robust_keras.pseudo_labelling import record_sets

_SHAPE = (2, 3, 1)
_IMAGES = np.random.RandomState(0).randint(0, 256, (23, *_SHAPE)).astype(np.uint8)
_LABELS = np.arange(23) % 5
_IDENTITY = shards.Identity(2, 300, 12345, "names")


def blocks(first=0, sizes=(4, 1, 9, 9), labelled=True):
    ends = np.cumsum(sizes)
    for start, end in zip(np.maximum(ends - sizes, first), ends):
        if start < end:
            yield _IMAGES[start:end], _LABELS[start:end] if labelled else None


class Maker:
    """Makes blocks, and counts how often."""

    def __init__(self, **options):
        self.num_calls = 0
        self._options = options

    def __call__(self, folder, first):
        self.num_calls += 1
        return blocks(first, **self._options)


def convert(where, make_blocks=None, identity=_IDENTITY, **options):
    return shards.converted("npz:source", str(where), identity, make_blocks or Maker(), **options)


def folders(where):
    return [path for path in where.iterdir() if path.is_dir()] if where.exists() else []


def assert_right(found):
    images, labels = found
    np.testing.assert_array_equal(images, _IMAGES)
    np.testing.assert_array_equal(labels, _LABELS)
    np.testing.assert_array_equal(images[np.array([22, 0, 7])], _IMAGES[[22, 0, 7]])
    assert images.shape == _IMAGES.shape and type(labels) is np.memmap and labels.dtype == _LABELS.dtype


def assert_refused(match, function, *args, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("Expected ") and "Received: " in message


@pytest.fixture
def where(tmp_path):
    return tmp_path / "source.shards"


@pytest.mark.parametrize("images_per_shard", [1, 4, 5, 23, 1000])
def test_shards_are_plain_files_of_a_limited_size(where, monkeypatch, images_per_shard):
    monkeypatch.setattr(shards, "SHARD_BYTES", 6 * images_per_shard + 5)
    assert_right(convert(where))
    marker = json.loads((where / "shards.json").read_text())
    (folder,) = folders(where)
    assert marker["folder"] == folder.name and marker["image_shape"] == list(_SHAPE)
    assert marker["num_images"] == [min(images_per_shard, 23 - k) for k in range(0, 23, images_per_shard)]
    files = sorted(folder.glob("images-*.npy"))
    assert [path.name for path in files] == [f"images-{k:05d}.npy" for k in range(len(marker["num_images"]))]
    np.testing.assert_array_equal(np.concatenate([np.load(path) for path in files]), _IMAGES)
    np.testing.assert_array_equal(np.load(folder / "labels.npy"), _LABELS)
    assert_right(convert(where))


def test_small_images_in_one_shard_of_a_gigabyte():
    assert shards.SHARD_BYTES == 2**30


def test_without_labels(where):
    images, labels = convert(where, Maker(labelled=False))
    np.testing.assert_array_equal(images, _IMAGES)
    assert labels is None and not list(where.glob("*/labels.npy"))


def test_converts_once_and_says_so(where, capsys):
    maker = Maker()
    for _ in range(3):
        assert_right(convert(where, maker))
    assert maker.num_calls == 1
    (folder,) = folders(where)
    assert capsys.readouterr().out == f"Converting npz:source to {folder}, once\n"


@pytest.mark.parametrize("change", [{"num_files": 3}, {"num_bytes": 301}, {"newest": 12344}, {"files": "others"}])
def test_converts_a_changed_source_again(where, capsys, change):
    convert(where, Maker(sizes=(3,)))
    (old,) = folders(where)
    maker, changed = Maker(), _IDENTITY._replace(**change)
    for _ in range(2):
        assert_right(convert(where, maker, changed))
    assert maker.num_calls == 1
    assert f"Unused there, unless another process is at work: {old.name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"labelled": True}, {"image_shape": (3, 2, 1)}])
def test_converts_again_what_is_not_what_is_wanted(where, options):
    convert(where, Maker(labelled=False))
    maker = Maker()
    convert(where, maker, image_shape=_SHAPE)
    assert maker.num_calls == 0
    convert(where, maker, **options)
    assert maker.num_calls == 1


def test_a_source_without_images(where):
    for parts in ([], [(_IMAGES[:0], _LABELS[:0])]):

        def make_blocks(folder, first, parts=parts):
            yield from parts

        assert_refused("images in npz:source. Received: none", convert, where, make_blocks)
        assert not where.exists()


# Interruptions.


def in_a_thread(function):
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        return other.submit(function).result()


def test_two_at_once(where):
    """The other one begins and ends while this one is at work."""
    folders_seen = []

    def make_blocks(folder, first):
        parts = blocks()
        yield next(parts)
        folders_seen.append(folder)
        others.append(in_a_thread(lambda: convert(where)))
        assert len(folders(where)) == 2
        yield from parts

    others = []
    assert_right(convert(where, make_blocks))
    assert_right(others[0])
    # One of them is kept.
    (kept,) = folders(where)
    assert str(kept) != folders_seen[0] and json.loads((where / "shards.json").read_text())["folder"] == kept.name
    maker = Maker()
    assert_right(convert(where, maker))
    assert maker.num_calls == 0


def test_two_at_the_same_moment(where, monkeypatch):
    """Neither sees the other's marker before it writes its own."""
    found = []

    def make_blocks(folder, first):
        yield from blocks()
        found.append(in_a_thread(lambda: convert(where)))
        monkeypatch.setattr(shards, "_read", lambda *args: None)

    found.append(convert(where, make_blocks))
    for each in found:
        assert_right(each)
    monkeypatch.undo()
    maker = Maker()
    assert_right(convert(where, maker))
    assert maker.num_calls == 0


def kill(where, num_blocks, **options):
    """A process that converts so many blocks and is then killed; returns where it began."""
    begin, end = os.pipe()

    def make_blocks(folder, first):
        os.write(end, bytes([first]))
        yield from itertools.islice(blocks(first), num_blocks)
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            convert(where, make_blocks, **options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    return os.read(begin, 1)[0]


def test_goes_on_where_it_was_killed(where, monkeypatch, capsys):
    """Again and again, in one folder, which is in the end that of an undisturbed conversion."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    assert [kill(where, 1), kill(where, 2), kill(where, 1)] == [0, 0, 5]
    (folder,) = folders(where)
    assert not (where / "shards.json").exists()
    capsys.readouterr()
    assert_right(convert(where))
    assert capsys.readouterr().out == f"Going on with the conversion of npz:source to {folder} after 10 images\n"
    assert folders(where) == [folder] and not (folder / "unfinished.json").exists()
    convert(where.parent / "undisturbed")
    (expected,) = folders(where.parent / "undisturbed")
    for path in expected.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_killed_when_all_images_were_there(where, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 23 * 6)
    assert [kill(where, 4), kill(where, 4)] == [0, 23]
    assert_right(convert(where))


def test_labels_may_have_been_cut_off(where, monkeypatch):
    """Rows that a killed conversion had written after its last whole shard, and half a row."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    kill(where, 3)
    (folder,) = folders(where)
    with open(folder / "labels.npy", "ab") as file:
        file.write(b"half")
    assert_right(convert(where))


def test_removes_what_killed_conversions_of_something_else_left(where, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    kill(where, 3, identity=_IDENTITY._replace(newest=1))
    (old,) = folders(where)
    assert_right(convert(where))
    (new,) = folders(where)
    assert new != old
    # A whole one is not touched: another process may read it.
    assert_right(convert(where, identity=_IDENTITY._replace(newest=2)))
    assert len(folders(where)) == 2 and new in folders(where)


@pytest.mark.parametrize("machine", ["another", "this"])
def test_without_locks_what_may_be_alive_is_left_alone(where, monkeypatch, capsys, machine):
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    kill(where, 3)
    (left,) = folders(where)
    lock = where / ownership.lock_name(left.name)
    holder = json.loads(lock.read_text())
    if machine == "another":  # Of which nobody can tell whether the process still runs.
        lock.write_text(json.dumps({**holder, "machine": "another"}))

    def refuse(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(ownership.fcntl, "flock", refuse)
    assert_right(convert(where))
    said = capsys.readouterr().out
    if machine == "another":
        assert f"Unused there, unless another process is at work: {left.name}\n" in said and len(folders(where)) == 2
    else:
        assert "after 10 images" in said and folders(where) == [left]


def test_a_conversion_of_an_older_release_goes_on(where, monkeypatch, capsys):
    """Which had the lock in the file that says what it is of."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    kill(where, 3)
    (where / ownership.lock_name(folders(where)[0].name)).unlink()
    capsys.readouterr()
    assert_right(convert(where))
    assert "after 10 images" in capsys.readouterr().out and len(folders(where)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "labels.npy").write_bytes(b"half of"),
        lambda folder: (folder / "labels.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00('" + b"(" * 14),
        lambda folder: os.truncate(folder / "labels.npy", 140),
        lambda folder: (folder / "images-00000.npy").write_bytes(b'\x93NUMPY\x01\x00\x10\x00"""{{{{{{{{{{{{{'),
        lambda folder: np.save(folder / "images-00000.npy", np.zeros((5, 0, 1), np.uint8)),
        lambda folder: os.truncate(folder / "images-00001.npy", 140),
        lambda folder: (folder / "unfinished.json").write_bytes(b"\xff{"),
    ],
)
def test_what_is_damaged_of_a_killed_conversion_is_done_again(where, monkeypatch, damage):
    """As a power cut may leave it; NumPy fails in several ways on a header that is none."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 5 * 6)
    kill(where, 3, labelled=True)
    (folder,) = folders(where)
    damage(folder)
    assert_right(convert(where, labelled=True))
    assert not list(where.glob("in_use*"))


@pytest.mark.parametrize("images_per_shard", [5, 1000])
def test_interrupted(where, monkeypatch, capsys, images_per_shard):
    """Ctrl-C or SIGTERM: what is whole is kept."""
    monkeypatch.setattr(shards, "SHARD_BYTES", images_per_shard * 6)

    def make_blocks(folder, first):
        yield from itertools.islice(blocks(first), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(where, make_blocks)
    assert where.exists() == (images_per_shard == 5)
    capsys.readouterr()
    assert_right(convert(where))
    assert ("after 10 images" in capsys.readouterr().out) == (images_per_shard == 5)


@pytest.mark.parametrize("error", [ValueError("Expected a. Received: b"), KeyboardInterrupt()])
def test_an_error_leaves_nothing_behind(where, error):
    def make_blocks(folder, first):
        yield from blocks(sizes=(3, 9))
        raise error

    with pytest.raises(type(error)) as caught:
        convert(where, make_blocks)
    assert caught.value is error and not where.exists()
    # Nor does it touch what was there.
    convert(where)
    before = sorted(where.rglob("*"))
    with pytest.raises(type(error)):
        convert(where, make_blocks, _IDENTITY._replace(newest=1))
    assert sorted(where.rglob("*")) == before
    maker = Maker()
    assert_right(convert(where, maker))
    assert maker.num_calls == 0


@pytest.mark.parametrize("limit", [100, 150, 280])  # In the header, the images, the labels.
def test_full_disk(where, limit):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        match = f"Expected to write {where}, .*set training_data.cache_dir, or .* label_pool.cache_dir, to a folder .*Received: .*File too large"
        assert_refused(match, convert, where)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not where.exists()
    assert_right(convert(where))


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for where in (tmp_path / "file", tmp_path / "file" / "x.shards"):
        assert_refused(f"write {where}, .*training_data.cache_dir", convert, where)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    "damage",
    [
        lambda where, folder: (where / "shards.json").write_text((where / "shards.json").read_text()[:-30]),
        lambda where, folder: (where / "shards.json").write_text("[]"),
        lambda where, folder: (where / "shards.json").unlink(),
        lambda where, folder: os.truncate(folder / "images-00001.npy", 170),
        lambda where, folder: os.truncate(folder / "images-00000.npy", 0),
        lambda where, folder: (folder / "images-00002.npy").unlink(),
        lambda where, folder: np.save(folder / "images-00000.npy", _IMAGES[:9]),
        lambda where, folder: np.save(folder / "images-00000.npy", _IMAGES[:10].astype(np.int8)),
        lambda where, folder: np.save(folder / "images-00000.npy", np.asfortranarray(_IMAGES[:10])),
        lambda where, folder: (folder / "labels.npy").unlink(),
        lambda where, folder: os.truncate(folder / "labels.npy", 200),
        lambda where, folder: np.save(folder / "labels.npy", _LABELS[:-1]),
        lambda where, folder: np.save(folder / "labels.npy", np.array([None] * 23)),
        lambda where, folder: np.save(folder / "labels.npy", _LABELS / 2),
        lambda where, folder: (folder / "labels.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00('" + b"(" * 14),
        lambda where, folder: shutil.rmtree(folder),
    ],
)
def test_converts_again_what_is_damaged(where, monkeypatch, damage):
    monkeypatch.setattr(shards, "SHARD_BYTES", 60)
    convert(where)
    damage(where, *folders(where))
    maker = Maker()
    for _ in range(2):
        assert_right(convert(where, maker))
    assert maker.num_calls == 1


def test_a_marker_leads_nowhere_else(where, tmp_path):
    convert(where, Maker(sizes=(7,)))
    (folder,) = folders(where)
    shutil.copytree(folder, tmp_path / "elsewhere")
    marker = json.loads((where / "shards.json").read_text())
    (where / "shards.json").write_text(json.dumps({**marker, "folder": "../elsewhere"}))
    assert_right(convert(where))


def test_what_cannot_be_opened_is_not_converted_again(where, monkeypatch):
    convert(where)

    def refuse(*args):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shards, "MappedImages", refuse)
    maker = Maker()
    assert_refused(f"able to read {where}. Received: .*Too many open files", convert, where, maker)
    assert maker.num_calls == 0 and len(folders(where)) == 1


# Places and identities.


def test_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shards.place("/data/x.npz") == "/data/x.npz.shards"
    assert shards.place("file:///data/x.npz") == "/data/x.npz.shards"
    assert shards.place("/data/pool/") == "/data/pool.shards"
    assert shards.place("pool") == shards.place(".//pool") == f"{tmp_path}/pool.shards"
    assert shards.place(".") == f"{tmp_path}.shards"
    for cache_dir in ("/cache", "file:///cache"):
        in_cache = [
            shards.place(path, cache_dir)
            for path in ("/data/x.npz", "/other/x.npz", "gs://a/x.npz", "gs://b/x.npz", "gs://b/x.npz/", "ram://x.npz")
        ]
        assert all(path.startswith("/cache/x.npz-") and path.endswith(".shards") for path in in_cache)
        assert len(set(in_cache)) == 6
    assert shards.place("~/x", "~/cache").startswith(os.path.expanduser("~/cache/x-"))
    globs = [shards.place(f"/data/set/{name}") for name in ("part-*.tfrecord", "part-?.tfrecord", "*/part-*.tfrecord")]
    assert len(set(globs)) == 3
    for path in globs:
        folder, name = os.path.split(path)
        assert folder == "/data/set" and not set(name) & set("*?[/") and name.endswith(".shards")
    assert shards.place("/data/*/x").startswith("/data/_") and shards.place("gs://b/*.x", "/c").startswith("/c/_.x-")


@pytest.mark.parametrize(
    "path, cache_dir", [("gs://a/x.npz", None), ("ram://x", None), ("/data/x", "gs://a"), ("gs://a/*.x", None)]
)
def test_a_place_is_local(path, cache_dir):
    assert_refused(
        f"training_data.cache_dir, .* to be a folder on a local disk.* Received: {cache_dir}",
        shards.place,
        path,
        cache_dir,
    )


def test_identity(tmp_path):
    def write(folder, content=b"123", time=10, names=("a/x", "b/y")):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).write_bytes(content)
            os.utime(tmp_path / folder / name, ns=(time, time))
        return [str(tmp_path / folder / name) for name in names]

    found = shards.identity(write("one"))
    assert found[:3] == (2, 6, 10)
    assert shards.identity(write("two")) == found  # It has moved.
    for change in (
        {"content": b"1234"},
        {"time": 11},
        {"names": ("a/x", "b/z")},
        {"names": ("a/x", "a/y")},
        {"names": ("a/x",)},
    ):
        assert shards.identity(write("three", **change)) != found
        shutil.rmtree(tmp_path / "three")
    # Two files of different sizes, or times, change places.
    for content, time in ((b"1", 10), (b"123", 9)):
        pair = [write("three", names=("a/x", "b/y")), write("three", content, time, names=("b/y",))][0]
        before = shards.identity(pair)
        os.rename(pair[0], f"{pair[0]}.away")
        os.rename(pair[1], pair[0])
        os.rename(f"{pair[0]}.away", pair[1])
        assert shards.identity(pair) != before and shards.identity(pair)[:3] == before[:3]
    os.utime(tmp_path / "one/a/x", ns=(99, 99))
    assert shards.identity([str(tmp_path / "one" / name) for name in ("a/x", "b/y")]).newest == 99
    for path in ("ram://shards_test/a", "ram://shards_test/b"):
        with tf.io.gfile.GFile(path, "wb") as file:
            file.write(b"1234")
    assert shards.identity(["ram://shards_test/a", "ram://shards_test/b"])[:2] == (2, 8)


# Every format, from any image on.


@pytest.mark.parametrize("first", [0, 1, 7, 11])
@pytest.mark.parametrize("kind", ["npz", "Fortran order", "tfrecord", "images", "tiny_images"])
def test_every_format_goes_on(tmp_path, monkeypatch, kind, first):
    images = np.random.RandomState(1).randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
    labels, num_classes = np.sort(np.arange(12) % 3), 3
    if kind in ("npz", "Fortran order"):
        path = tmp_path / "set.npz"
        np.savez_compressed(path, image=images if kind == "npz" else np.asfortranarray(images), label=labels)
        open_format = formats.npz
    elif kind == "tfrecord":
        scores = np.zeros(12, np.float32)
        chosen = record_sets.Chosen(np.arange(12), labels, scores, record_sets.checksums(images))
        record_sets.write_set(images, chosen, str(tmp_path / "set"), manifest={}, images_per_part=5)
        path, open_format = tmp_path / "set" / "*.tfrecord", formats.tfrecord
    elif kind == "images":
        path, open_format = tmp_path / "set", formats.images
        for k, image in enumerate(images):
            (path / str(labels[k])).mkdir(parents=True, exist_ok=True)
            tf.io.write_file(str(path / str(labels[k]) / f"{k:02d}.png"), tf.io.encode_png(image))
    else:
        path, open_format, labels, num_classes = f"ram://shards_test/{first}.bin", formats.tiny_images, None, None
        with tf.io.gfile.GFile(path, "wb") as file:
            file.write(images.transpose(0, 3, 2, 1).tobytes())
    found = []

    def converted(source, where, identity, make_blocks, **options):
        found[:] = make_blocks(str(tmp_path), first)
        return None, None

    monkeypatch.setattr(shards, "converted", converted)
    open_format(str(path), image_shape=None, num_classes=num_classes, cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.concatenate([block for block, _ in found]), images[first:])
    if labels is not None:
        np.testing.assert_array_equal(np.concatenate([block for _, block in found]), labels[first:])
