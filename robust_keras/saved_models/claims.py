"""What lies beside a SavedModel so that others can check it: a manifest of every file, and a program that checks it.

`verify.py` is copied there as it is: it needs TensorFlow and NumPy alone. `manifest.json`, written last, has the size
and the SHA-256 of every other file, that program and the model's card among them.
"""

import os
import pathlib
import posixpath

import tensorflow as tf

from robust_keras import foreign_files, ownership, storage
from robust_keras.saved_models import verify
from robust_keras.saved_models.opening import UNFINISHED

gfile = tf.io.gfile
# What lies in a folder while it is written, and the manifest itself.
_NOT_LISTED = {UNFINISHED, ownership.lock_name(), verify.MANIFEST}


def attach(directory: str | os.PathLike, *, evaluation: str | None = None) -> None:
    """Adds what a verifier needs to a folder with a SavedModel and its cards, and the manifest of it all.

    Args:
        directory: the export's folder, any `tf.io.gfile` path; what was attached before is replaced.
        evaluation: folder of a finished evaluation of this model, whose claims are to be checked; None for none.

    Raises:
        ValueError: for a folder with links or special files.
    """
    directory = str(directory)
    program = pathlib.Path(verify.__file__).read_text()
    storage.write_text(posixpath.join(directory, verify.PROGRAM), program)
    files = [
        {"name": name, "bytes": gfile.stat(path).length, "sha256": storage.sha256(path)}
        for name, path in foreign_files.regular_files(directory)
        if name not in _NOT_LISTED
    ]
    storage.write_text(posixpath.join(directory, verify.MANIFEST), verify.manifest_text(files))
