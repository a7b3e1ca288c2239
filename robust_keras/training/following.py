"""A run's snapshots as another process finds them while the run goes on; nothing in the run's folder is changed."""

import os
import posixpath
import time
from collections.abc import Collection, Iterator

import tensorflow as tf
from absl import logging

from robust_keras import storage

EVERY = 1.0  # Seconds between two looks.


def follow(
    workdir: str | os.PathLike, *, seen: Collection[int], last_step: int | None, timeout: float | None
) -> Iterator[storage.Snapshot]:
    """The snapshots of a run, each once, of those that are there the oldest first.

    One that the run removes while it is read is passed over, and so is, with a warning, one that is damaged. It ends
    after the last step's.

    Args:
        workdir: the run's folder, which need not be there yet.
        seen: steps to leave out.
        last_step: of the run; None where it is not known.
        timeout: seconds without a new snapshot after which it ends, too; None for none.

    Yields:
        Verified snapshots.

    Raises:
        OSError: for a snapshot that cannot be read, and stays; or `tf.errors.OpError`.
    """
    directory, seen, since = posixpath.join(os.fspath(workdir), "checkpoints"), set(seen), time.monotonic()
    while True:
        if (snapshot := _unseen(directory, seen)) is not None:
            seen.add(snapshot.step)
            yield snapshot
            since = time.monotonic()
        elif last_step in seen or (timeout is not None and time.monotonic() - since >= timeout):
            return
        else:
            time.sleep(EVERY)


def _unseen(directory: str, seen: set[int]) -> storage.Snapshot | None:
    """The oldest snapshot that is not in `seen`, to which those are added that are damaged; None for none."""
    for step in storage.steps(directory):
        for is_second in (False, True):
            if step in seen:
                break
            try:
                return storage.read(directory, step)
            except (ValueError, OSError, tf.errors.OpError) as error:
                if step not in storage.steps(directory):  # Removed, or about to be written again.
                    break
                if is_second and not isinstance(error, ValueError):
                    raise
                if is_second:  # The first time, its marker may have been that of what was there before.
                    logging.warning("Passing over a damaged snapshot: %s", error)
                    seen.add(step)
    return None
