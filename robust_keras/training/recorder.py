"""What a training run leaves on disk while it runs, and how it finds its place again."""

import concurrent.futures
import contextlib
import csv
import functools
import io
import math
import posixpath
import signal
import sys
import threading
import time

import keras
import numpy as np
import tensorflow as tf
from absl import logging
from tqdm import tqdm

from robust_keras import failures, storage
from robust_keras.engines import replicas

gfile = tf.io.gfile
METRICS = (
    "step",
    "loss",
    "learning_rate",
    "examples_per_second",
    "labelled_fraction",
    "val_clean",
    "val_robust",
    "val_clean_averaged",
    "val_robust_averaged",
)


class NonFiniteLoss(ArithmeticError):
    """The loss of a step, or a weight after it, is not finite. Neither it nor anything after it was saved."""


class Terminated(BaseException):  # No reader of a file takes it for damage.
    """A SIGTERM arrived, and a snapshot has been written since."""


class RunRecorder(keras.callbacks.Callback):
    """Logs, validates and saves a run; `restore` continues it.

    Everything is driven by the run's own step, so it does not depend on where an earlier call was interrupted. Where
    several are due at a step, the order is: validation, a row of metrics, the snapshot. A snapshot holds the rows so
    far, so metrics.csv has each step once. Snapshots are written in the background, one at a time; where that fails,
    the next step is saved at once. Of several processes, which make it in their strategy's scope, all record, and the
    first writes.

    Args:
        workdir: the run's folder.
        state: variables by name: everything that the next step depends on. 'step' is the optimiser's.
        weights: the names in `state` of the weights to keep when they are the best, by the name to keep them under.
        validate: `(should_stop) -> {column: accuracy}`, or None once `should_stop()` is true; the best weights are
            those with the highest `best_metric`.
        best_metric: a column of `validate`.
        description: what else a reader of the weights needs, as JSON can hold it; stored with them.
        learning_rate: a function of the step.
        batch_size: examples per step.
        train_steps: steps of the whole run.
        cadence: a `records.Cadence`.
    """

    def __init__(
        self,
        workdir,
        *,
        state,
        weights,
        validate,
        best_metric,
        description,
        learning_rate,
        batch_size,
        train_steps,
        cadence,
    ):
        super().__init__()
        self.checkpoints_path = posixpath.join(str(workdir), "checkpoints")
        self.best_path = posixpath.join(str(workdir), "best")
        self.metrics_path = posixpath.join(str(workdir), "metrics.csv")
        self.events_path = posixpath.join(str(workdir), "events")
        self._state = state
        self._weights = weights
        self._validate = validate
        self._best_metric = best_metric
        self._description = description
        self._learning_rate = learning_rate
        self._batch_size = batch_size
        self._train_steps = train_steps
        self._cadence = cadence
        self._start_step = 0
        self._rows = []
        self._best = None  # {"step", "metrics"} of the best validation so far
        self._best_weights = {}
        self._last_validation = None
        self._unfinished = None  # {"step", "logs"} of a validation that SIGTERM stopped
        self._terminating = False
        self._is_writer = replicas.process_index() == 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._writing, self._writing_step = None, None  # The snapshot under way.

    def restore(self):
        """Continues from the newest intact snapshot, if there is one.

        Returns:
            The step from which to go on, 0 for a new run.

        Raises:
            ValueError: where the snapshot's variables are not the run's, other processes see another one, or there are
                snapshots and none is intact.
        """
        snapshot = storage.read_newest(self.checkpoints_path)
        if snapshot is None and (damaged := storage.steps(self.checkpoints_path)):
            raise ValueError(
                f"Expected an intact snapshot in {self.checkpoints_path}, or an empty folder to start anew. "
                f"Received: damaged ones of steps {', '.join(map(str, damaged))}"
            )
        replicas.expect_same(snapshot.step if snapshot else 0, self.checkpoints_path)
        if snapshot is None:
            self._write_metrics()
            return 0
        arrays = {name: array for name, array in snapshot.arrays.items() if not name.startswith("best/")}
        shapes = {name: tuple(variable.shape) for name, variable in self._state.items()}
        saved_shapes = {name: array.shape for name, array in arrays.items()}
        if shapes != saved_shapes:
            different = sorted(k for k in shapes.keys() | saved_shapes.keys() if shapes.get(k) != saved_shapes.get(k))
            raise ValueError(
                f"Expected this run's variables in {self.checkpoints_path}. Received: others, such as {different[0]}"
            )
        for name, variable in self._state.items():
            variable.assign(arrays[name])
        self._best_weights = {
            name.removeprefix("best/"): array for name, array in snapshot.arrays.items() if name.startswith("best/")
        }
        self._rows, self._best = snapshot.info["rows"], snapshot.info["best"]
        self._last_validation, self._unfinished = snapshot.info["last_validation"], snapshot.info.get("unfinished")
        self._start_step = snapshot.step
        self._write_metrics()
        if self._is_writer:
            kept = storage.read_newest(self.best_path)
            if self._best and (kept is None or kept.step != self._best["step"]):
                self._write_best(self._best, self._best_weights)
            print(f"Resuming from step {snapshot.step}", flush=True)
        return snapshot.step

    def is_finished(self):
        """Whether there is nothing left to do."""
        return self._start_step == self._train_steps and self._unfinished is None

    def report(self):
        """A dictionary: 'last' and 'best', each {'step', 'metrics'} of a validation."""
        return {"last": self._last_validation, "best": self._best}

    def best_weights(self):
        """The best weights, NumPy arrays by name."""
        return dict(self._best_weights)

    @contextlib.contextmanager
    def running(self):
        """Inside the context, SIGTERM makes the next step save a snapshot and raise `Terminated`.

        A validation that SIGTERM had stopped is caught up on first. What is being written at the end is finished,
        however it ends.
        """

        def stop(signum, frame):
            self._terminating = True

        is_main = threading.current_thread() is threading.main_thread()
        previous = signal.signal(signal.SIGTERM, stop) if is_main else None
        self._events = tf.summary.create_file_writer(self.events_path) if self._is_writer else None
        self._clock = None
        try:
            self._catch_up()
            yield
        finally:
            self._finish_writing()
            if self._is_writer:
                self._events.close()
            if is_main:
                signal.signal(signal.SIGTERM, previous)
        replicas.all_processes(0)  # None goes on before the files are there.

    def on_train_begin(self, logs=None):
        interactive = sys.stderr.isatty()
        self._bar = tqdm(
            total=self._train_steps,
            initial=self._start_step,
            unit="step",
            disable=not (self._cadence.progress and self._is_writer),
            dynamic_ncols=interactive,
            mininterval=0.5 if interactive else 30.0,
        )

    def on_train_batch_end(self, batch, logs=None):
        failures.work_begins()  # A setting that cannot be traced has shown by now.
        step = self._start_step + batch + 1
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise NonFiniteLoss(f"Expected a finite loss. Received: {loss} at step {step}")
        self._bar.update(step - self._bar.n)
        self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
        logs = {"loss": loss, "labelled_fraction": float(logs["labelled_fraction"])}
        terminating = self._should_stop()

        last = step == self._train_steps
        row = {}
        pause = time.perf_counter()
        if last or step % self._cadence.validate_every == 0:
            row = self._validate_now(step)
            terminating = terminating or row is None
        if row is None:
            self._unfinished = {"step": step, "logs": logs}
        elif row or last or step % self._cadence.log_every == 0:
            self._log(step, logs, row, pause)
        under_way = self._writing is not None and not self._writing.done()
        failed = self._writing is not None and not under_way and self._writing.exception()
        # There may not be the time for two: the one under way is waited for, and is enough.
        if terminating and under_way and self._writing.exception() is None:
            step = self._writing_step
        elif last or step % self._cadence.checkpoint_every == 0 or terminating or failed:
            self._save(step)
        # The rate counts training steps alone, and not the first, which compiles.
        if self._clock is None or row or last:
            self._clock, self._clock_step = time.perf_counter(), step
        else:
            self._clock += time.perf_counter() - pause
        if terminating:
            raise Terminated(f"Stopped by SIGTERM; saved at step {step}")

    def on_train_end(self, logs=None):
        self._bar.close()

    def _should_stop(self):
        return any(replicas.all_processes(self._terminating))

    def _catch_up(self):
        """Ends a validation that SIGTERM stopped."""
        if self._unfinished is None:
            return
        step, logs = self._unfinished["step"], self._unfinished["logs"]
        row = self._validate_now(step)
        if row is None:  # Again; what there is to save is saved.
            raise Terminated(f"Stopped by SIGTERM; saved at step {step}")
        self._unfinished = None
        self._log(step, logs, row, time.perf_counter())
        # A snapshot would first take away the one of this step, which is good until the next one: this can be repeated.
        if step == self._train_steps:
            self._save(step)
        elif self._is_writer and self._best["step"] == step:
            self._write_best(self._best, self._best_weights)

    def _validate_now(self, step):
        """Columns of a validation; None where SIGTERM stopped it."""
        metrics = self._validate(self._should_stop)
        if metrics is None:
            return None
        self._last_validation = {"step": step, "metrics": metrics}
        if self._best is None or metrics[self._best_metric] > self._best["metrics"][self._best_metric]:
            arrays = self._read_state(step)
            self._best = self._last_validation
            self._best_weights = {kept: arrays[name] for kept, name in self._weights.items()}
        shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in metrics.items())
        if self._is_writer:
            tqdm.write(f"Step {step}: {shown}", file=sys.stderr)
        return metrics

    def _log(self, step, logs, validation, now):
        row = {"step": step, **logs, "learning_rate": float(self._learning_rate(step - 1)), **validation}
        if self._clock is not None and step > self._clock_step:
            row["examples_per_second"] = (step - self._clock_step) * self._batch_size / (now - self._clock)
        self._rows.append(row)
        if not self._is_writer:
            return
        with gfile.GFile(self.metrics_path, "a") as file:
            file.write(_csv([row]))
        with self._events.as_default(step=step):
            for name, value in row.items():
                if name != "step":
                    tf.summary.scalar(name, value)

    def _save(self, step):
        arrays = self._read_state(step)
        if not self._is_writer:
            return
        arrays |= {f"best/{name}": array for name, array in self._best_weights.items()}
        info = {
            "rows": list(self._rows),
            "best": self._best,
            "last_validation": self._last_validation,
            "unfinished": self._unfinished,
            "description": self._description,
        }
        self._events.flush()
        now = functools.partial(self._write, step, arrays, info, self._best, self._best_weights)
        try:
            self._finish_writing()
        except (OSError, tf.errors.OpError) as error:
            logging.warning("A snapshot was not written (%s); saving step %d instead", error, step)
            now()
        else:
            self._writing, self._writing_step = self._thread.submit(now), step

    def _write(self, step, arrays, info, best, best_weights):
        storage.write(self.checkpoints_path, step, arrays, info, keep=self._cadence.num_checkpoints)
        if best and storage.steps(self.best_path) != [best["step"]]:
            self._write_best(best, best_weights)

    def _finish_writing(self):
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _read_state(self, step):
        # The update that follows the last finite loss can be the one that is not.
        arrays = {name: variable.numpy() for name, variable in self._state.items()}
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise NonFiniteLoss(f"Expected finite weights. Received: {name} with others at step {step}")
        return arrays

    def _write_best(self, best, weights):
        info = {"best": best, "description": self._description}
        storage.write(self.best_path, best["step"], weights, info, keep=1)

    def _write_metrics(self):
        if not self._is_writer:
            return
        gfile.makedirs(posixpath.dirname(self.metrics_path))
        with gfile.GFile(self.metrics_path, "w") as file:
            file.write(",".join(METRICS) + "\n" + _csv(self._rows))


def _csv(rows):
    text = io.StringIO()
    csv.DictWriter(text, METRICS, lineterminator="\n").writerows(rows)
    return text.getvalue()
