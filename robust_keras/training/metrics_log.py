"""A run's metrics: rows of metrics.csv, TensorBoard events, and the examples that a second of training takes."""

import contextlib
import csv
import io
import posixpath
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import tensorflow as tf

from robust_keras import own_folders
from robust_keras.engines import replicas
from robust_keras.run_metrics import METRICS
from robust_keras.training import tensorboard_events
from robust_keras.training.validation import Validator


class MetricsLog:
    """`workdir`/metrics.csv and `workdir`/events; of several processes, which make it in their scope, the first writes.

    Args:
        workdir: the run's folder.
        learning_rate: a function of the step.
        batch_size: examples in a step.
        hyper_parameters: of the run, for TensorBoard.

    Attributes:
        rows: all rows so far, each a dictionary.
    """

    def __init__(
        self, workdir: str, learning_rate: Callable, batch_size: int, hyper_parameters: Mapping | None = None
    ) -> None:
        self._path = posixpath.join(str(workdir), "metrics.csv")
        self._events_path = posixpath.join(str(workdir), "events")
        self._learning_rate, self._batch_size = learning_rate, batch_size
        self._hyper_parameters = hyper_parameters
        self._is_writer = replicas.process_index() == 0
        self._events: tf.summary.SummaryWriter | None = None
        # A step and when it ended: training alone is timed from there, and not the first step, which compiles.
        self._since: tuple[int, float] | None = None
        self.rows: list[dict] = []

    def begin(self, rows: Sequence[dict]) -> None:
        """Replaces metrics.csv by the rows that a snapshot holds.

        Raises:
            ValueError: for what is no number, or of no column: a spreadsheet would run a formula.
        """
        self.rows = list(rows)
        if not all(name in METRICS and isinstance(value, (int, float)) for row in rows for name, value in row.items()):
            raise ValueError(f"Expected numbers of {', '.join(METRICS)} in a snapshot. Received: something else")
        if not self._is_writer:
            return
        own_folders.make(posixpath.dirname(self._path))
        with own_folders.open_file(self._path) as file:
            file.write(",".join(METRICS) + "\n" + _csv(self.rows))

    @contextlib.contextmanager
    def events(self, start_step: int = 0) -> Iterator[None]:
        """Inside the context, rows become events too, in the place of those after `start_step`."""
        self._since = None
        own_folders.check(self._events_path)
        if self._is_writer:
            tensorboard_events.cut_off(self._events_path, start_step)
            self._events = tf.summary.create_file_writer(self._events_path)
        try:
            if self._events is not None and start_step == 0 and self._hyper_parameters:
                with self._events.as_default():
                    tensorboard_events.write_hyper_parameters(self._hyper_parameters)
            yield
        finally:
            if self._events is not None:
                self._events.close()

    def add(self, step: int, logs: Mapping[str, float], validation: Mapping[str, float], ended: float) -> None:
        """Appends the row of a step.

        Args:
            step: its number.
            logs: what it returned.
            validation: columns of the validation after it, if there was one.
            ended: when the step ended, by `time.perf_counter`.
        """
        row = {"step": step, **logs, "learning_rate": float(self._learning_rate(step - 1)), **validation}
        if self._since is not None and step > self._since[0]:
            row["examples_per_second"] = (step - self._since[0]) * self._batch_size / (ended - self._since[1])
        self.rows.append(row)
        if self._events is None:
            return
        with own_folders.open_file(self._path, "a") as file:
            file.write(_csv([row]))
        with self._events.as_default(step=step):
            for name, value in row.items():
                if name != "step":
                    tf.summary.scalar(name, value)

    def picture(self, step: int, validator: Validator) -> None:
        """Makes events of what the last validation saw, after `step`."""
        if self._events is not None:
            with self._events.as_default(step=step):
                tensorboard_events.write_validation(validator.pictured, validator.seen)

    def go_on(self, step: int, pause: float, *, anew: bool) -> None:
        """Times the steps after `step`, without the `pause` in seconds since it ended; `anew`, or with those before."""
        if self._since is None or anew:
            self._since = step, time.perf_counter()
        else:
            self._since = self._since[0], self._since[1] + pause

    def flush(self) -> None:
        """Writes the events so far."""
        if self._events is not None:
            self._events.flush()


def _csv(rows: Sequence[Mapping]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, METRICS, lineterminator="\n").writerows(rows)
    return text.getvalue()
