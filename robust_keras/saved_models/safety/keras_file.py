"""`.keras` files, looked at before Keras loads them: the archive, then its architecture, weights and further files."""

import posixpath
import re
import zipfile
import zlib

from robust_keras import zip_files
from robust_keras.foreign_files import open_regular, printable
from robust_keras.saved_models.safety import hdf5_file, keras_config

_CONFIG, _WEIGHTS, _METADATA = "config.json", "model.weights.h5", "metadata.json"
_MOST_METADATA = 1 << 16
_MOST_MEMBERS = 2_000
_UNREADABLE = (ValueError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, MemoryError)
_PLAIN = re.compile(r"[A-Za-z0-9_\-][A-Za-z0-9_.\-]{0,199}", re.ASCII)


def check(path: str) -> None:
    """Refuses a file of other classes than are known, and one that would do anything but compute; nothing is loaded.

    Classes are known that Keras has for it, this package's, and those that were registered, as by a module that
    `--import` names.

    Args:
        path: any `tf.io.gfile` path; a link to a file may be typed.

    Raises:
        ValueError: naming the class, function, weight or member of the archive that is refused.
    """
    with open_regular(path, follow=True) as file:
        try:
            with zip_files.open_archive(file, most_members=_MOST_MEMBERS) as archive:
                _check_members(archive)
                weights = hdf5_file.datasets(zip_files.content(archive, _WEIGHTS, file))
                # An array of no bytes can have axes of any length.
                axes = {size for each in weights if each.num_bytes for size in each.shape}
                keras_config.check(archive.read(_CONFIG), axes=axes)
        except _UNREADABLE as error:
            expected = "a .keras file of known classes, which computes and does nothing else"
            why = printable(error, most=400) or type(error).__name__
            raise ValueError(f"Expected {expected}. Received: {printable(path)}: {why}") from error


def weight_bytes(path: str) -> int:
    """How many bytes of weights a file holds, of which `check` has been made."""
    with open_regular(path, follow=True) as file, zip_files.open_archive(file) as archive:
        return archive.getinfo(_WEIGHTS).file_size


def _check_members(archive: zipfile.ZipFile) -> None:
    entries = {entry.filename: entry for entry in archive.infolist()}
    for name in entries:
        folder, *inside = name.removesuffix("/").split("/")
        is_asset = folder == "assets" and all(map(_PLAIN.fullmatch, inside))
        if not is_asset and name not in (_CONFIG, _WEIGHTS, _METADATA):
            raise ValueError(f"it has {printable(name)}, which is no part of a model")
    for name in (_CONFIG, _WEIGHTS):
        if name not in entries:
            raise ValueError(f"it has no {name}")
    for name, most in ((_CONFIG, keras_config.MOST_BYTES), (_METADATA, _MOST_METADATA)):
        if name in entries and entries[name].file_size > most:
            raise ValueError(f"its {name} is {entries[name].file_size:,} bytes, more than {most:,}")
    files = {posixpath.dirname(name) for name in entries}
    if both := files & entries.keys():
        raise ValueError(f"{printable(sorted(both)[0])} is both a file and a folder")
