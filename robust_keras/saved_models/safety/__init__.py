"""Models of strangers, looked at before TensorFlow or Keras loads them: `check` is the one door."""

import contextlib
import contextvars
import functools
import os
import sys
from collections.abc import Iterator

import tensorflow as tf

from robust_keras import foreign_files
from robust_keras.saved_models.safety import keras_file, saved_model

gfile = tf.io.gfile
_TRUSTED: contextvars.ContextVar[bool] = contextvars.ContextVar("trusted", default=False)


def check(path: str | os.PathLike, *, trusted: bool = False) -> None:
    """Refuses a model that would do anything but compute, without loading it.

    Args:
        path: a SavedModel's folder or a `.keras` file, which exists.
        trusted: whether a person has looked at it: what would be refused is then printed, in a line on stderr.

    Raises:
        ValueError: naming the operation, class or file that is refused.
    """
    path = os.fspath(path)
    is_folder = gfile.isdir(path)
    of_kind = keras_file if path.endswith(".keras") and not is_folder else saved_model
    if trusted and is_folder:  # Nobody's trust makes a pipe answer.
        list(foreign_files.regular_files(path, follow=True))
    elif trusted:
        foreign_files.check_regular(path, follow=True)
    try:
        of_kind.check(path)
    except ValueError as error:
        if not trusted:
            hint = "scripts/inspect_model.py shows what is in there, --trust_model loads it all the same"
            raise ValueError(f"{error}; {hint}") from error
        _tell(f"Let through as trusted: {foreign_files.printable(error, most=1000)}")


@functools.cache
def _tell(line: str) -> None:  # Once, however often a model is looked at.
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def trusting(is_trusted: bool = True) -> Iterator[None]:
    """Models that are loaded inside are trusted, wherever that happens: recipes load some by themselves."""
    token = _TRUSTED.set(is_trusted or _TRUSTED.get())
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """What `trusting` says here; False outside."""
    return _TRUSTED.get()
