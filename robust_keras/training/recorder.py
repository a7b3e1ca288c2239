"""What a training run leaves on disk while it runs, and how it finds its place again."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from robust_keras import failures, storage
from robust_keras.engines import replicas
from robust_keras.training import tensorboard_events
from robust_keras.training.best_weights import BestWeights
from robust_keras.training.checkpoints import Snapshots
from robust_keras.training.metrics_log import MetricsLog
from robust_keras.training.progress import SAVING, VALIDATING, Progress
from robust_keras.training.recipes import Cadence
from robust_keras.training.run_state import NonFiniteLoss, RunState
from robust_keras.training.termination import Termination
from robust_keras.training.validation import Validator


class RunRecorder(keras.callbacks.Callback):
    """Logs, validates and saves a run; `restore` continues it.

    Everything is driven by the run's own step, so it does not depend on where an earlier call was interrupted. Where
    several are due at a step, the order is: validation, a row of metrics, the snapshot. A snapshot holds the rows so
    far, so metrics.csv has each step once. Where a snapshot cannot be written, the next step is saved at once. Of
    several processes, which make it in their strategy's scope, all record, and the first writes.

    Args:
        state: everything that the next step depends on.
        validator: see `BestWeights`.
        snapshots: where it is saved.
        log: where rows go.
        train_steps: steps of the whole run.
        cadence: how often what is done.
    """

    reads_when_due = True  # See `engines.execution`.

    def __init__(
        self,
        state: RunState,
        validator: Validator,
        snapshots: Snapshots,
        log: MetricsLog,
        *,
        train_steps: int,
        cadence: Cadence,
    ) -> None:
        super().__init__()
        self._state, self._snapshots, self._log = state, snapshots, log
        self._train_steps, self._cadence = train_steps, cadence
        self._validator, self._best = validator, BestWeights(validator, state)
        self._termination = Termination()
        self._start_step = 0
        self._unseen: list = []  # Steps and their losses since the last look.
        self._unfinished: dict | None = None  # {"step", "logs"} of a validation that a signal stopped
        self._is_writer = replicas.process_index() == 0
        self._progress = Progress(train_steps, cadence, writes=self._is_writer)

    def restore(self) -> int:
        """Continues from the newest intact snapshot, if there is one.

        Returns:
            The step from which to go on, 0 for a new run.

        Raises:
            ValueError: where the snapshot's variables are not the run's, other processes see another one, or there are
                snapshots and none is intact.
        """
        snapshot = self._snapshots.newest()
        if snapshot is None:
            self._log.begin([])
            return 0
        state, best = _told_apart(snapshot.arrays)
        info = _checked(snapshot, self._snapshots.path)
        self._state.restore(state, self._snapshots.path)
        self._best.begin(info["best"], info["last_validation"], best)
        self._unfinished = info.get("unfinished")
        self._start_step = snapshot.step
        self._log.begin(info["rows"])
        if self._is_writer:
            kept = storage.read_newest(self._snapshots.best_path)
            if self._best.best and (kept is None or kept.step != self._best.best["step"]):
                self._snapshots.write_best(self._best.best, self._best.arrays)
            print(f"Resuming from step {snapshot.step}", flush=True)
        return snapshot.step

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self._start_step == self._train_steps and self._unfinished is None

    def report(self) -> dict[str, dict | None]:
        """A dictionary: 'last' and 'best', each {'step', 'metrics'} of a validation."""
        return {"last": self._best.last, "best": self._best.best}

    def best_weights(self) -> dict[str, np.ndarray]:
        """The best weights, NumPy arrays by name."""
        return dict(self._best.arrays)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inside the context, SIGTERM and SIGINT make the next step save a snapshot and raise `Terminated`.

        A validation that a signal had stopped is caught up on first. What is being written at the end is finished,
        however it ends.
        """
        # Of the step itself there are events where its validation was caught up on, and is to be again.
        start = self._start_step - (self._unfinished is not None)
        with self._termination.heard(), self._log.events(start):
            try:
                self._catch_up()
                yield
            finally:
                self._progress.end()
                self._snapshots.finish()
        replicas.all_processes(0)  # None goes on before the files are there.

    def on_train_begin(self, logs: Mapping | None = None) -> None:
        """Says where the steps begin."""
        self._progress.begin(self._start_step, self._best.last, self._best.best)

    def on_train_batch_end(self, batch: int, logs: Mapping) -> None:
        """Validates, logs and saves as due after a step.

        Raises:
            NonFiniteLoss: where its loss, or a weight that is to be saved, is not finite.
            termination.Terminated: after a signal, once a snapshot is written.
        """
        failures.work_begins()  # A setting that cannot be traced has shown by now.
        step = self._start_step + batch + 1
        self._unseen.append((step, logs["loss"]))
        stops = self._should_stop()
        if replicas.is_on_jax() and not (stops or self._is_due(step)):  # Its devices go on without being asked.
            self._log.go_on(step, 0.0, anew=False)
            self._progress.step(step)
            return
        loss = self._seen_losses()
        self._progress.step(step, loss)
        logs = {"loss": loss, "labelled_fraction": float(logs["labelled_fraction"])}
        is_last, ended = step == self._train_steps, time.perf_counter()
        row = self._validate_now(step) if is_last or step % self._cadence.validate_every == 0 else {}
        if row is None:
            self._unfinished = {"step": step, "logs": logs}
        elif row or is_last or step % self._cadence.log_every == 0:
            self._add_row(step, logs, row, ended)
        stops = stops or row is None
        saved = self._save_as_due(step, stops)
        self._log.go_on(step, time.perf_counter() - ended, anew=bool(row) or is_last)
        if stops:
            raise self._termination.terminated(saved)

    def _is_due(self, step):
        """Whether there is anything to validate, log or save after a step."""
        cadence = self._cadence
        every = (cadence.validate_every, cadence.checkpoint_every, cadence.log_every)
        has_failed = self._snapshots.under_way() is None and self._snapshots.has_failed()
        return step == self._train_steps or any(step % each == 0 for each in every) or has_failed

    def _seen_losses(self):
        """The loss of the last step, once those of all steps turn out to be finite."""
        loss = math.nan
        for step, each in self._unseen:
            if not math.isfinite(loss := float(each)):
                raise NonFiniteLoss(f"Expected a finite loss. Received: {loss} at step {step}")
        self._unseen.clear()
        return loss

    def _should_stop(self):
        return self._termination.is_asked()

    def _catch_up(self):
        """Ends a validation that a signal stopped."""
        if self._unfinished is None:
            return
        step, logs = self._unfinished["step"], self._unfinished["logs"]
        row = self._validate_now(step)
        if row is None:  # Again; what there is to save is saved.
            raise self._termination.terminated(step)
        self._unfinished = None
        self._add_row(step, logs, row, time.perf_counter())
        # A snapshot would first take away the one of this step, which is good until the next one: this can be repeated.
        if step == self._train_steps:
            self._save(step)
        elif self._is_writer and self._best.best["step"] == step:
            self._snapshots.write_best(self._best.best, self._best.arrays)

    def _validate_now(self, step):
        """Columns of a validation; None where a signal stopped it."""

        def should_stop():
            self._progress.go_on()
            return self._should_stop()

        with self._progress.pause(VALIDATING):
            metrics = self._best.validate(step, should_stop)
        if metrics is not None:
            self._progress.validated(step, self._best.last, self._best.best)
        return metrics

    def _add_row(self, step, logs, row, ended):
        self._log.add(step, logs, row, ended)
        if row and tensorboard_events.is_due(step, self._train_steps, self._cadence.validate_every):
            self._log.picture(step, self._validator)

    def _save_as_due(self, step, stops):
        """Saves a step where that is due; the step of the snapshot from which a stopped run goes on."""
        under_way = self._snapshots.under_way()
        # There may not be the time for two: the one under way is waited for, and is enough.
        if stops and under_way is not None and not self._snapshots.has_failed():
            return under_way
        has_failed = under_way is None and self._snapshots.has_failed()
        is_due = step == self._train_steps or step % self._cadence.checkpoint_every == 0
        if is_due or stops or has_failed:
            with self._progress.pause(SAVING):
                self._save(step)
        return step

    def _save(self, step):
        arrays = self._state.read(step)
        if not self._is_writer:
            return
        info = {
            "rows": list(self._log.rows),
            "best": self._best.best,
            "last_validation": self._best.last,
            "unfinished": self._unfinished,
        }
        self._log.flush()
        self._snapshots.save(step, arrays, info, self._best.arrays)


def _told_apart(arrays):
    """The arrays of a snapshot: (the run's state, the best weights), each by name."""
    best = {name.removeprefix("best/"): array for name, array in arrays.items() if name.startswith("best/")}
    return {name: array for name, array in arrays.items() if not name.startswith("best/")}, best


def _checked(snapshot: storage.Snapshot, directory: str) -> dict[str, Any]:
    """What a snapshot knows of its run, where that is of the right kinds.

    Raises:
        ValueError: where it is not.
    """
    info = snapshot.info

    def is_validation(value):
        metrics = value.get("metrics") if isinstance(value, dict) else None
        is_whole = isinstance(metrics, dict) and isinstance(value.get("step"), int)
        return value is None or (is_whole and all(isinstance(each, (int, float)) for each in metrics.values()))

    rows = info.get("rows")
    are_rows = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    unfinished = info.get("unfinished")
    are_logs = unfinished is None or (isinstance(unfinished, dict) and isinstance(unfinished.get("logs"), dict))
    whole = {"best", "last_validation"} <= info.keys() and are_rows and are_logs
    if not whole or not is_validation(info["best"]) or not is_validation(info["last_validation"]):
        raise ValueError(f"Expected the snapshots of a run in {directory}. Received: something else, {snapshot.step}")
    return info
