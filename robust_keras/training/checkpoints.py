"""A run's snapshots and its best weights on disk, written in the background, one at a time."""

import concurrent.futures
import functools
import posixpath
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from absl import logging

from robust_keras import own_folders, storage
from robust_keras.engines import replicas


class Snapshots:
    """`workdir`/checkpoints, of which a run goes on, and `workdir`/best, the best weights alone.

    Args:
        workdir: the run's folder.
        description: what else a reader of the weights needs, as JSON can hold it; stored with them.
        num_checkpoints: snapshots kept.
    """

    def __init__(self, workdir: str, description: Mapping, num_checkpoints: int) -> None:
        self.path = posixpath.join(str(workdir), "checkpoints")
        self.best_path = posixpath.join(str(workdir), "best")
        self._description, self._num_checkpoints = description, num_checkpoints
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing: concurrent.futures.Future | None = None
        self._writing_step: int | None = None

    def newest(self) -> storage.Snapshot | None:
        """The newest intact snapshot, or None for a new run.

        Raises:
            ValueError: where other processes see another one, or there are snapshots and none is intact; for links in
                the place of the folders, which then could not be written.
        """
        own_folders.check(self.path, typed=True)
        own_folders.check(self.best_path, typed=True)
        snapshot = storage.read_newest(self.path)
        if snapshot is None and (damaged := storage.steps(self.path)):
            raise ValueError(
                f"Expected an intact snapshot in {self.path}, or an empty folder to start anew. "
                f"Received: damaged ones of steps {', '.join(map(str, damaged))}"
            )
        replicas.expect_same(snapshot.step if snapshot else 0, self.path)
        return snapshot

    def save(self, step: int, arrays: Mapping, info: dict, best_weights: dict[str, np.ndarray]) -> None:
        """Starts to write a snapshot, once the one before is written; where that failed, writes this one at once.

        Args:
            step: after how many steps it is taken.
            arrays: of the run's state, by name.
            info: what else it holds; 'best' is {'step', 'metrics'} of the best weights, or None.
            best_weights: by name.
        """
        arrays = {**arrays, **{f"best/{name}": array for name, array in best_weights.items()}}
        now = functools.partial(self._write, step, arrays, {**info, "description": self._description}, best_weights)
        try:
            self.finish()
        except (OSError, tf.errors.OpError) as error:
            logging.warning("A snapshot was not written (%s); saving step %d instead", error, step)
            now()
        else:
            self._writing, self._writing_step = self._thread.submit(now), step

    def under_way(self) -> int | None:
        """The step of the snapshot that is being written at this moment, or None."""
        return self._writing_step if self._writing is not None and not self._writing.done() else None

    def has_failed(self) -> bool:
        """Whether the last one could not be written; waits for one that is being written."""
        return self._writing is not None and self._writing.exception() is not None

    def finish(self) -> None:
        """Waits for the snapshot under way, and raises what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def write_best(self, best: dict, weights: dict[str, np.ndarray]) -> None:
        """Writes the best weights, found by the validation `best`, {'step', 'metrics'}; older ones go."""
        info = {"best": best, "description": self._description}
        storage.write(self.best_path, best["step"], weights, info, keep=1)

    def _write(self, step, arrays, info, best_weights):
        storage.write(self.path, step, arrays, info, keep=self._num_checkpoints)
        best = info["best"]
        if best and storage.steps(self.best_path) != [best["step"]]:
            self.write_best(best, best_weights)
