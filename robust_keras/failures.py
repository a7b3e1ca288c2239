"""What is left of an error in the middle of a run: its traceback, in the run's folder.

A command enters `running` first. What it does then checks its input, and says `work_begins()` once there is something
to lose: an error before is the user's and needs no traceback, an error after it is a failed run.
"""

import contextlib
import os
import posixpath
import traceback
from collections.abc import Iterator

import tensorflow as tf

from robust_keras import own_folders

gfile = tf.io.gfile
FILE = "error.txt"
_runs: list["_Run"] = []  # From the outermost to the innermost.


class _Run:
    def __init__(self, folder: str, process: int):
        self.path = posixpath.join(folder, f"error-{process}.txt" if process else FILE)
        self.has_begun = False


@contextlib.contextmanager
def running(folder: str | os.PathLike, *, process: int = 0) -> Iterator[None]:
    """Inside the context, an error after `work_begins()` leaves its traceback in `<folder>/error.txt`.

    Args:
        folder: of the run, any `tf.io.gfile` path.
        process: which process of the run this is; the others' files are `error-1.txt` and so on.

    Raises:
        Exception: what is raised inside; `traceback_path` then says where its traceback is.
    """
    run = _Run(os.fspath(folder), process)
    _runs.append(run)
    try:
        yield
    except Exception as error:
        if run.has_begun and traceback_path(error) is None:
            with contextlib.suppress(OSError, tf.errors.OpError):  # The error itself says more.
                own_folders.make(os.fspath(folder))
                with own_folders.open_file(run.path) as file:
                    file.write("".join(traceback.format_exception(error)))
                vars(error)["traceback_path"] = run.path
        raise
    finally:
        _runs.remove(run)


def work_begins() -> None:
    """Says that input is checked: from here on, an error is a failed run. What an earlier attempt left is removed."""
    for run in _runs:
        if not run.has_begun and gfile.exists(run.path):
            own_folders.remove(run.path)
        run.has_begun = True


def traceback_path(error: BaseException) -> str | None:
    """Where the traceback of an error is; None of one that `running` has not seen, or before any work."""
    return getattr(error, "traceback_path", None)
