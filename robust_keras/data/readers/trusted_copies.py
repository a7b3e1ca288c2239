"""Which conversions of a source count: those that this user made, and those that were compared with the source once.

A folder of images can bring its own conversion, of other pixels, with the names, sizes and times of its files. What
this user made is known by a note in a folder of the user's own, `$XDG_CACHE_HOME/robust_keras/conversions`, which no
data set can bring. The conversion itself stays beside the data, where there is room for it.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable

import numpy as np
from tqdm import tqdm

from robust_keras import foreign_files, own_folders, storage
from robust_keras.data.readers.mapped import MappedImages


def begin(folder: str) -> None:
    """Notes that this user makes a conversion, in a folder that is new."""
    _write(folder, "begun")


def is_begun(folder: str) -> bool:
    """Whether it is this user who made a conversion, or half of one."""
    return bool(_noted(folder))


def trust(folder: str) -> None:
    """Notes that a finished conversion counts as it is now."""
    _write(folder, _digest(folder))


def is_trusted(folder: str) -> bool:
    """Whether that was noted, and nothing has touched it since."""
    return _noted(folder) == _digest(folder)


def compare(source: str, images: np.ndarray | MappedImages, labels: np.ndarray | None, blocks: Iterable) -> None:
    """Compares a conversion with the blocks of its source.

    Args:
        source: what to call it.
        images: of the conversion, uint8 `[N, ...]`.
        labels: of it, integers `[N]`; None where they do not matter.
        blocks: see `shards.converted`.

    Raises:
        ValueError: where it is of other images or labels.
    """
    done = 0
    with tqdm(desc="comparing", unit="image", unit_scale=True, total=len(images), delay=5, mininterval=1) as bar:
        for expected, expected_labels in blocks:
            part = slice(done, done + len(expected))
            if not np.array_equal(images[part], expected):
                break
            if labels is not None and not np.array_equal(labels[part], expected_labels):
                break
            done += len(expected)
            bar.update(len(expected))
        else:
            if done == len(images):
                return
    raise ValueError(
        f"Expected a conversion of {source}. Received: one of other images, or labels, from image {done:,} on; it came "
        "with the data, or the data was changed, so remove it"
    )


def _digest(folder: str) -> str:
    """Of the files, without reading them: of what no archive can set, as when each was last changed in any way."""
    digest = hashlib.sha256()
    for name, path in foreign_files.regular_files(folder):
        found = os.lstat(path)
        digest.update(f"{name}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}\0{found.st_ino}\0".encode())
    return digest.hexdigest()


def _folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "robust_keras", "conversions")


def _note(folder: str) -> str:
    return os.path.join(_folder(), hashlib.sha256(os.path.realpath(folder).encode()).hexdigest())


def _noted(folder: str) -> str:
    with contextlib.suppress(OSError):
        return storage.read_text(_note(folder))
    return ""


def _write(folder: str, text: str) -> None:
    with contextlib.suppress(OSError):  # Without a note it is compared again.
        os.makedirs(os.path.dirname(_note(folder)), mode=0o700, exist_ok=True)
        with own_folders.open_file(_note(folder)) as file:
            file.write(text)
