"""What cannot be memory-mapped as it is stored, converted once to files that can be.

    <place>/shards.json               the marker, written last: which folder, of which source, how many images
    <place>/<unique name>/            images-00000.npy, images-00001.npy, ... uint8, and labels.npy
    <place>/in_use-<unique name>.json the lock of a process that is at work there, see `ownership`

Every conversion writes to a folder of its own and nothing is renamed, so two at once do not touch each other's files.
In the folder, `unfinished.json` says what it is a conversion of. One whose process was killed, so that its lock is
free, is gone on with after its last whole file of images by the same conversion, and removed by another one. No file
is removed while it is open or mapped, which some systems refuse. What another user made, or the data brought, is
compared with the source once, and half of it is left alone; see `trusted_copies`.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import foreign_files, own_folders, ownership, storage
from robust_keras.data.readers import npy_files, trusted_copies
from robust_keras.data.readers.mapped import MappedImages, Part
from robust_keras.data.readers.tfds_sets import why
from robust_keras.foreign_files import local_path

SHARD_BYTES = 1 << 30
_VERSION = 2
_MARKER, _LABELS, _UNFINISHED = "shards.json", "labels.npy", "unfinished.json"
_NAME = re.compile("[0-9a-f]{32}")
_BINDINGS = "training_data.cache_dir, or --cache_dir of evaluate.py, or of a pool label_pool.cache_dir,"

# Blocks of a source's images and labels, from one of its images on; see `converted`.
Blocks = Generator[tuple[np.ndarray, np.ndarray | None], None, None]


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


def identity(paths: Sequence[str], *, most_bytes: int | None = None) -> Identity:
    """The `Identity` of a source that consists of some files; it stays the same where they all move elsewhere.

    Raises:
        ValueError: for what is no file, such as a pipe, or a link to one; and for a file of more than `most_bytes`.
    """
    num_bytes = newest = 0
    files, num_common = hashlib.sha256(), len(os.path.commonpath([min(paths), max(paths)]))
    for path in paths:
        if local := local_path(path):
            found = os.stat(local)
            if not stat.S_ISREG(found.st_mode):
                received = f"{foreign_files.printable(path)}, {foreign_files.kind(found.st_mode)}"
                raise ValueError(f"Expected a regular file. Received: {received}")
            size, changed = found.st_size, found.st_mtime_ns
        else:
            found = tf.io.gfile.stat(path)
            size, changed = found.length, found.mtime_nsec
        if most_bytes is not None and size > most_bytes:
            shown = foreign_files.printable(path)
            raise ValueError(f"Expected files of at most {most_bytes:,} bytes. Received: {shown} of {size:,}")
        num_bytes, newest = num_bytes + size, max(newest, changed)
        files.update(f"{path[num_common:]}\0{size}\0{changed}\0".encode())
    return Identity(len(paths), num_bytes, newest, files.hexdigest())


def place(path: str, cache_dir: str | None = None) -> str:
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
        local = local_path(os.path.expanduser(cache_dir))
        folder = local or ""
    if local is None:
        raise ValueError(
            f"Expected {_BINDINGS} to be a folder on a local disk, for a copy of {path} that can be memory-mapped. "
            f"Received: {cache_dir}"
        )
    return os.path.join(folder, f"{name}.shards")


def converted(
    source: str,
    where: str,
    identity: Identity,
    make_blocks: Callable[[str, int], Blocks],
    *,
    image_shape: tuple | None = None,
    labelled: bool = False,
    total: int | None = None,
    trusted: bool = False,
) -> tuple[MappedImages, np.ndarray | None]:
    """The images and labels of a source, which are converted now unless they have been.

    Args:
        source: what to call the source in messages.
        where: the folder that `place` names.
        identity: the `Identity` of the source.
        make_blocks: `(folder, first) -> generator of (images, labels)` from the image `first` on: uint8 `[n, height,
            width, channels]`, and integers `[n]` or always None. It raises ValueError for bad data, and may keep files
            in `folder` until it is closed.
        image_shape: (height, width, channels) of the images that are wanted, or None for any. A conversion to another
            shape does not count.
        labelled: whether labels are wanted. A conversion without them does then not count.
        total: how many images there are, if that is known.
        trusted: whether `where` is in a folder that the user named, so that what is there is the user's.

    Returns:
        (images, labels): a `MappedImages`, and memory-mapped integers `[N]` or None.

    Raises:
        ValueError: what make_blocks raises; for a source without images; where shards cannot be written or read. A
            conversion that fails leaves nothing behind; one that is interrupted goes on when it is called again.
    """

    wanted = _Wanted(source, where, identity, make_blocks, image_shape, labelled, total, trusted)
    with own_folders.within(os.path.dirname(os.path.abspath(where))):
        own_folders.check(where)
        return _existing(wanted) or _convert(wanted)


class _Wanted(NamedTuple):
    """What `converted` is given."""

    source: str
    where: str
    identity: Identity
    make_blocks: Callable[[str, int], Blocks]
    image_shape: tuple | None
    labelled: bool
    total: int | None
    trusted: bool


def _existing(wanted: _Wanted) -> tuple[MappedImages, np.ndarray | None] | None:
    """A whole conversion that serves, and that this user made or that holds what the source does."""
    if (found := _read(wanted)) is None:
        return None
    folder, images, labels = found
    if not wanted.trusted and not trusted_copies.is_trusted(folder):
        print(f"Comparing {folder}, which was not made here, with {wanted.source}, once", flush=True)
        with tempfile.TemporaryDirectory() as place, contextlib.closing(wanted.make_blocks(place, 0)) as blocks:
            trusted_copies.compare(wanted.source, images, labels if wanted.labelled else None, blocks)
        trusted_copies.trust(folder)
    return images, labels


def _convert(wanted: _Wanted) -> tuple[MappedImages, np.ndarray | None]:
    source, where = wanted.source, wanted.where
    source_of = {"version": _VERSION, "source": wanted.identity._asdict()}
    with _advice_where_it_fails(source, where), contextlib.ExitStack() as lock:
        conversion = {**source_of, "image_shape": wanted.image_shape, "labelled": wanted.labelled}
        folder = _unfinished(where, json.loads(json.dumps(conversion)), lock, wanted.trusted)
        with _removed_where_it_fails(folder):
            shape, counts = _whole_shards(folder, wanted.labelled)
            _announce(source, folder, sum(counts))
            with contextlib.closing(wanted.make_blocks(folder, sum(counts))) as blocks:
                written = _write(folder, shape, counts, blocks, source, wanted.total)
            marker = {**source_of, "folder": os.path.basename(folder), **written}
            if (found := _existing(wanted)) is not None:  # Another process was faster.
                shutil.rmtree(folder, ignore_errors=True)
                return found
            storage.write_text(os.path.join(where, _MARKER), json.dumps(marker, indent=1))
            os.remove(os.path.join(folder, _UNFINISHED))
            trusted_copies.trust(folder)
    return _open(where, marker)[1:]


def _announce(source: str, folder: str, num_done: int) -> None:
    print(
        f"Going on with the conversion of {source} to {folder} after {num_done:,} images"
        if num_done
        else f"Converting {source} to {folder}, once",
        flush=True,
    )
    where, name = os.path.split(folder)
    if others := [entry for entry in os.listdir(where) if _NAME.fullmatch(entry) and entry != name]:
        print(f"Unused there, unless another process is at work: {', '.join(sorted(others))}", flush=True)


def _locked(where: str, name: str) -> contextlib.AbstractContextManager:
    """The lock of one of the folders there; where a file system has no locks, who has one left counts as alive."""
    return ownership.lock(where, what="a conversion of images", part=name, patience=0)


def _unfinished(where: str, conversion: dict[str, Any], lock: contextlib.ExitStack, trusted: bool) -> str:
    """The folder of a conversion, locked while the stack `lock` is open: one that was killed, or a new one."""
    for name in sorted(os.listdir(where)) if os.path.isdir(where) else ():
        folder, path = os.path.join(where, name), os.path.join(where, name, _UNFINISHED)
        if not _NAME.fullmatch(name) or not os.path.exists(path) or os.path.islink(folder):
            continue
        if not (trusted or trusted_copies.is_begun(folder)):
            continue
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_locked(where, name))
            except ownership.FolderInUse:
                continue
            if not os.path.exists(path):  # It has ended meanwhile.
                continue
            if _conversion(path) == conversion:
                lock.push(stack.pop_all())
                return folder
            shutil.rmtree(folder, ignore_errors=True)
    name = uuid.uuid4().hex
    lock.enter_context(_locked(where, name))
    folder = os.path.join(where, name)
    with _removed_where_it_fails(folder):
        os.makedirs(folder)
        trusted_copies.begin(folder)
        storage.write_text(os.path.join(folder, _UNFINISHED), json.dumps(conversion))
    return folder


def _conversion(path: str) -> Any:
    """What a file says a folder is a conversion of; None where it is not whole."""
    try:
        return storage.read_json(path)
    except ValueError:
        return None


@contextlib.contextmanager
def _removed_where_it_fails(folder: str) -> Iterator[None]:
    """Removes a folder where there is an error inside; where it is interrupted, only one without whole files."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or not _whole_shards(folder, labelled=False)[1]:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _whole_shards(folder: str, labelled: bool) -> tuple[tuple | None, list[int]]:
    """Shape of the images, and how many each whole file of them holds that a killed conversion left."""
    shape: tuple | None = None
    counts: list[int] = []
    with contextlib.suppress(FileNotFoundError, ValueError):  # A file that is not whole says that it has no rows.
        while True:
            path = _images_path(folder, len(counts))
            (count, *row_shape), _, _, _ = npy_files.header(path)
            if count != _images_per_shard(tuple(row_shape)) or npy_files.num_whole_rows(path) < count:
                break
            shape = tuple(row_shape)
            counts.append(count)
    labels_path = os.path.join(folder, _LABELS)
    if labelled or os.path.exists(labels_path):
        try:
            if npy_files.num_whole_rows(labels_path) < sum(counts):
                return None, []
        except (FileNotFoundError, ValueError):
            return None, []
    return shape, counts


@contextlib.contextmanager
def _advice_where_it_fails(source: str, where: str) -> Iterator[None]:
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ValueError(
            f"Expected to write {where}, a copy of {source} that can be memory-mapped; set {_BINDINGS} to a folder on "
            f"a local disk with room for it. Received: {why(error)}"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(where)  # If nothing is in it.


def _read(wanted: _Wanted) -> tuple[str, MappedImages, np.ndarray | None] | None:
    """The folder, images and labels of a whole conversion that serves; None where there is none."""
    where = wanted.where
    try:
        if (marker := storage.read_object(os.path.join(where, _MARKER))) is None:
            return None
        serves = (
            (marker["version"], Identity(**marker["source"])) == (_VERSION, wanted.identity)
            and (marker["labelled"] or not wanted.labelled)
            and wanted.image_shape in (None, tuple(marker["image_shape"]))
        )
        return _open(where, marker) if serves else None
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, OverflowError):
        return None
    except OSError as error:
        raise ValueError(f"Expected to be able to read {where}. Received: {error}") from error


def _open(where: str, marker: dict) -> tuple[str, MappedImages, np.ndarray | None]:
    if not _NAME.fullmatch(marker["folder"]):
        raise ValueError(f"Expected the name of a folder of shards. Received: {marker['folder']}")
    folder = os.path.join(where, marker["folder"])
    own_folders.check(folder)
    shape = tuple(marker["image_shape"])
    parts = []
    for k, count in enumerate(marker["num_images"]):
        path = _images_path(folder, k)
        foreign_files.check_regular(path)
        header = npy_files.header(path)
        if header[:3] != ((count, *shape), np.dtype(np.uint8), False):
            raise ValueError(f"Expected {count} images of shape {shape}. Received: {path}")
        parts.append(Part(path, header.offset, count))
    images = MappedImages(parts, shape)
    labels: np.ndarray | None = None
    if marker["labelled"]:
        path = os.path.join(folder, _LABELS)
        foreign_files.check_regular(path)
        header = npy_files.header(path)
        if header.shape != (len(images),) or header.dtype.kind not in "iu":
            raise ValueError(f"Expected {len(images)} integers in {path}. Received: {header.dtype} {header.shape}")
        labels = np.memmap(path, header.dtype, "r", header.offset, header.shape)
    return folder, images, labels


def _write(folder: str, shape: tuple | None, counts: list[int], blocks: Blocks, source: str, total: int | None) -> dict:
    """Writes images and labels after those that are there, and returns what the marker says of all."""
    append_labels, first, is_open = None, sum(counts), False
    labels_path = os.path.join(folder, _LABELS)
    bar = tqdm(desc="converting", unit="image", unit_scale=True, total=total, initial=first, delay=5, mininterval=1)
    with contextlib.ExitStack() as labels_file, contextlib.ExitStack() as shard, bar:
        if first and os.path.exists(labels_path):
            dtype = npy_files.header(labels_path).dtype
            append_labels = labels_file.enter_context(npy_files.appended(labels_path, (), dtype, first))
        for images, labels in blocks:
            shape = shape or images.shape[1:]
            if append_labels is None and labels is not None:
                append_labels = labels_file.enter_context(npy_files.appended(labels_path, (), labels.dtype))
            if append_labels is not None:
                append_labels(labels)  # type: ignore[arg-type]  # All blocks have labels, or none.
            bar.update(len(images))
            while len(images):
                if not is_open:
                    new = npy_files.appended(_images_path(folder, len(counts)), shape, images.dtype)
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


def _images_per_shard(shape: tuple) -> int:
    return max(1, SHARD_BYTES // max(1, math.prod(shape)))


def _images_path(folder: str, k: int) -> str:
    return os.path.join(folder, f"images-{k:05d}.npy")
