"""What cannot be memory-mapped as it is stored, converted once to files that can be.

    <place>/shards.json               the marker, written last: which folder, of which source, how many images
    <place>/<unique name>/            images-00000.npy, images-00001.npy, ... uint8, and labels.npy

Every conversion writes to a folder of its own and nothing is renamed, so two at once do not touch each other's files.
In the folder, `unfinished.json` says what it is a conversion of and is locked while a process is at work. One that
nobody has locked was killed: the same conversion goes on after its last whole file of images, another one removes it.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras.data.readers.mapped import MappedImages, Part, local_path

try:
    import fcntl
except ImportError:  # Not on Windows, where nothing is then known to have been killed.
    fcntl = None  # type: ignore[assignment]

SHARD_BYTES = 1 << 30
_VERSION = 2
_MARKER, _LABELS, _UNFINISHED = "shards.json", "labels.npy", "unfinished.json"
_NAME = re.compile("[0-9a-f]{32}")
_BINDINGS = "training_data.cache_dir, or of a pool label_pool.cache_dir,"


class Identity(NamedTuple):
    """What a source is told by: a changed one is converted again.

    Attributes:
        num_files: how many files it consists of.
        num_bytes: of all of them.
        newest: when the newest was changed, in nanoseconds.
        files: SHA-256 of their names, sizes, and when each was changed.
    """

    num_files: int
    num_bytes: int
    newest: int
    files: str


def identity(paths):
    """The `Identity` of a source that consists of some files; it stays the same where they all move elsewhere."""
    num_bytes = newest = 0
    files, num_common = hashlib.sha256(), len(os.path.commonpath([min(paths), max(paths)]))
    for path in paths:
        if local := local_path(path):
            found = os.stat(local)
            size, changed = found.st_size, found.st_mtime_ns
        else:
            found = tf.io.gfile.stat(path)
            size, changed = found.length, found.mtime_nsec
        num_bytes, newest = num_bytes + size, max(newest, changed)
        files.update(f"{path[num_common:]}\0{size}\0{changed}\0".encode())
    return Identity(len(paths), num_bytes, newest, files.hexdigest())


def place(path, cache_dir=None):
    """The folder in which the shards of a source are kept.

    Args:
        path: of the source: a file, a folder, or a glob.
        cache_dir: where it is to be, or None for beside the source.

    Returns:
        `<path>.shards`; of a glob, and in a cache_dir, `<name>-<hash of the path>.shards`.

    Raises:
        ValueError: where that is not on a local disk.
    """
    local = local_path(path)
    path = str(path) if local is None else os.path.abspath(local)
    folder, name = os.path.split(path.rstrip("/"))
    wildcard = re.search(r"[*?\[]", path)
    if wildcard:
        folder = os.path.dirname(path[: wildcard.start()])
        name = re.sub(r"[^\w.\-]+", "_", path[len(folder) + 1 :])
    if wildcard or cache_dir is not None:
        name += f"-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    if cache_dir is not None:
        local = folder = local_path(os.path.expanduser(cache_dir))
    if local is None:
        raise ValueError(
            f"Expected {_BINDINGS} to be a folder on a local disk, for a copy of {path} that can be memory-mapped. "
            f"Received: {cache_dir}"
        )
    return os.path.join(folder, f"{name}.shards")


def converted(source, where, identity, make_blocks, *, image_shape=None, labelled=False, total=None):
    """The images and labels of a source, which are converted now unless they have been.

    Args:
        source: what to call the source in messages.
        where: the folder that `place` names.
        identity: the `Identity` of the source.
        make_blocks: `(folder, first) -> iterator of (images, labels)` from the image `first` on: uint8 `[n, height,
            width, channels]`, and integers `[n]` or always None. It raises ValueError for bad data, and may keep files
            in `folder` while it runs.
        image_shape: (height, width, channels) of the images that are wanted, or None for any. A conversion to another
            shape does not count.
        labelled: whether labels are wanted. A conversion without them does then not count.
        total: how many images there are, if that is known.

    Returns:
        (images, labels): a `MappedImages`, and memory-mapped integers `[N]` or None.

    Raises:
        ValueError: what make_blocks raises; for a source without images; where shards cannot be written or read. A
            conversion that fails leaves nothing behind; one that is interrupted goes on when it is called again.
    """

    def existing():
        return _read(where, identity, image_shape, labelled)

    if (found := existing()) is not None:
        return found
    source_of = {"version": _VERSION, "source": identity._asdict()}
    conversion = {**source_of, "image_shape": image_shape, "labelled": labelled}
    with contextlib.ExitStack() as lock, _advice_where_it_fails(source, where):
        folder = _unfinished(where, json.dumps(conversion).encode(), lock)
        try:
            shape, counts = _whole_shards(folder)
            print(
                f"Going on with the conversion of {source} to {folder} after {sum(counts):,} images"
                if counts
                else f"Converting {source} to {folder}, once",
                flush=True,
            )
            if others := [
                entry for entry in os.listdir(where) if _NAME.fullmatch(entry) and not folder.endswith(entry)
            ]:
                print(f"Unused there, unless another process is at work: {', '.join(sorted(others))}", flush=True)
            marker = {**source_of, "folder": os.path.basename(folder)}
            marker |= _write(folder, shape, counts, make_blocks(folder, sum(counts)), source, total)
            if (found := existing()) is not None:  # Another process was faster.
                shutil.rmtree(folder, ignore_errors=True)
                return found
            with open(os.path.join(where, _MARKER), "w") as file:
                file.write(json.dumps(marker, indent=1))
            os.remove(os.path.join(folder, _UNFINISHED))
            return _open(where, marker)
        except BaseException as error:
            if isinstance(error, Exception) or not _whole_shards(folder)[1]:
                _remove(folder)
            raise


def _remove(folder):
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(os.path.dirname(folder))  # If nothing else is in it.


def _unfinished(where, conversion, lock):
    """The folder of a conversion, locked while the stack `lock` is open: one that was killed, or a new one."""
    os.makedirs(where, exist_ok=True)
    for name in sorted(os.listdir(where)) if fcntl else ():
        path = os.path.join(where, name, _UNFINISHED)
        if not _NAME.fullmatch(name) or not os.path.exists(path):
            continue
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(open(path, "rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # Another process is at work.
                continue
            if not os.path.exists(path):  # It has ended meanwhile.
                continue
            if file.read() == conversion:
                lock.push(stack.pop_all())
                return os.path.join(where, name)
            _remove(os.path.join(where, name))
    folder = os.path.join(where, uuid.uuid4().hex)
    try:
        os.makedirs(folder)
        file = lock.enter_context(open(os.path.join(folder, _UNFINISHED), "wb", buffering=0))
        if fcntl:
            with contextlib.suppress(OSError):  # A file system without locks: nothing there counts as killed.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(conversion)
    except BaseException:
        _remove(folder)
        raise
    return folder


def _whole_shards(folder):
    """Shape of the images, and how many each whole file of them holds that a killed conversion left."""
    shape, counts = None, []
    with contextlib.suppress(FileNotFoundError, ValueError):  # A file that is not whole says that it has no rows.
        while True:
            with open(_images_path(folder, len(counts)), "rb") as file:
                np.lib.format.read_magic(file)
                (count, *row_shape), _, _ = np.lib.format.read_array_header_1_0(file)
            if count != _images_per_shard(row_shape):
                break
            shape = tuple(row_shape)
            counts.append(count)
    return shape, counts


@contextlib.contextmanager
def _advice_where_it_fails(source, where):
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"Expected to write {where}, a copy of {source} that can be memory-mapped; set {_BINDINGS} to a folder on "
            f"a local disk with room for it. Received: {error}"
        ) from error


def _read(where, identity, image_shape, labelled):
    """What `converted` returns, or None where there is no whole conversion that serves."""
    try:
        with open(os.path.join(where, _MARKER)) as file:
            marker = json.loads(file.read())
        serves = (
            (marker["version"], Identity(**marker["source"])) == (_VERSION, identity)
            and (marker["labelled"] or not labelled)
            and image_shape in (None, tuple(marker["image_shape"]))
        )
        return _open(where, marker) if serves else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    except OSError as error:
        raise ValueError(f"Expected to be able to read {where}. Received: {error}") from error


def _open(where, marker):
    if not _NAME.fullmatch(marker["folder"]):
        raise ValueError(f"Expected the name of a folder of shards. Received: {marker['folder']}")
    folder = os.path.join(where, marker["folder"])
    shape = tuple(marker["image_shape"])
    parts = []
    for k, count in enumerate(marker["num_images"]):
        path = _images_path(folder, k)
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            if np.lib.format.read_array_header_1_0(file) != ((count, *shape), False, np.dtype(np.uint8)):
                raise ValueError(f"Expected {count} images of shape {shape}. Received: {path}")
            parts.append(Part(path, file.tell(), count))
    images, labels = MappedImages(parts, shape), None
    if marker["labelled"]:
        labels = np.load(os.path.join(folder, _LABELS), mmap_mode="r", allow_pickle=False)
        if labels.shape != (len(images),):
            raise ValueError(f"Expected {len(images)} labels. Received: {len(labels)}")
    return images, labels


def _write(folder, shape, counts, blocks, source, total):
    """Writes images and labels after those that are there, and returns what the marker says of all."""
    append_labels, first, is_open = None, sum(counts), False
    labels_path = os.path.join(folder, _LABELS)
    bar = tqdm(desc="converting", unit="image", unit_scale=True, total=total, initial=first, delay=5, mininterval=1)
    with contextlib.ExitStack() as labels_file, contextlib.ExitStack() as shard, bar:
        if first and os.path.exists(labels_path):
            dtype = np.load(labels_path, mmap_mode="r", allow_pickle=False).dtype
            append_labels = labels_file.enter_context(_npy_file(labels_path, (), dtype, first))
        for images, labels in blocks:
            shape = shape or images.shape[1:]
            if append_labels is None and labels is not None:
                append_labels = labels_file.enter_context(_npy_file(labels_path, (), labels.dtype))
            if append_labels is not None:
                append_labels(labels)
            bar.update(len(images))
            while len(images):
                if not is_open:
                    new = _npy_file(_images_path(folder, len(counts)), shape, images.dtype)
                    append_images, is_open = shard.enter_context(new), True
                    counts.append(0)
                fitting = images[: _images_per_shard(shape) - counts[-1]]
                append_images(fitting)
                counts[-1] += len(fitting)
                images = images[len(fitting) :]
                if counts[-1] == _images_per_shard(shape):
                    shard.close()
                    is_open = False
    if not counts:
        raise ValueError(f"Expected images in {source}. Received: none")
    return {"image_shape": shape, "num_images": counts, "labelled": append_labels is not None}


def _images_per_shard(shape):
    return max(1, SHARD_BYTES // math.prod(shape))


def _images_path(folder, k):
    return os.path.join(folder, f"images-{k:05d}.npy")


@contextlib.contextmanager
def _npy_file(path, row_shape, dtype, num_rows=0):
    """A function that appends rows to a `.npy` file, after its first ones; the header gets their number at the end."""

    def write_header():
        description = np.lib.format.dtype_to_descr(dtype)
        header = {"descr": description, "fortran_order": False, "shape": (num_rows, *row_shape)}
        np.lib.format.write_array_header_1_0(file, header)  # Padded, so it has the same length for any number.

    def append(rows):
        nonlocal num_rows
        file.write(np.ascontiguousarray(rows, dtype).data)
        file.flush()  # Labels are to be there before the images that they are of.
        num_rows += len(rows)

    with open(path, "r+b" if num_rows else "wb") as file:
        write_header()
        file.seek(num_rows * math.prod(row_shape) * dtype.itemsize, os.SEEK_CUR)
        file.truncate()
        yield append
        file.seek(0)
        write_header()
        file.flush()
        os.fsync(file.fileno())  # The marker is not to be older than the images.
