"""Runs a command from a notebook, with the learning curve of its run while it goes on.

    from robust_keras.commands import notebook

    notebook.run("train", ["--gin_file=gin/quickstart.gin", "--workdir=runs/quickstart"])

The command is a process of its own, so the notebook keeps no memory on the accelerator. The notebook's stop button asks
it to save and stop, as does the end of the notebook itself; the same call goes on from there.
"""

from robust_keras.commands import exit_codes, launcher  # noqa: F401  isort: skip  Before TensorFlow is imported.

import codecs
import collections
import contextlib
import csv
import importlib
import io
import math
import os
import pathlib
import posixpath
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What TensorFlow says of itself before it has a log.
_NOISE = re.compile(r"WARNING: All log messages before absl::InitializeLog|I\d{4} 00:00:\d")
COMMANDS = ("train", "evaluate", "export", "report", "reproduce", "pseudo_label")
_WAIT = 0.5  # Seconds between two looks at a process that says nothing.
_LAST_LINES = 3  # Of a process that failed, where none of them says that it is the error.


def run(command: str, arguments: Sequence[str] = (), *, stop_at_step: int | None = None) -> int:
    """Runs a command in a process of its own, and prints what it says.

    Where the flag `--workdir` is given, and inside a notebook, the `learning_curve` of that folder is shown, and drawn
    again as rows are added.

    Args:
        command: a name out of `COMMANDS`.
        arguments: its flags, such as "--gin_file=gin/at.gin".
        stop_at_step: after which step of training to do what the stop button does; None for never.

    Returns:
        The exit code: 0, or 75 where the command has saved and stopped at `stop_at_step`.

    Raises:
        ValueError: for a command that there is not.
        RuntimeError: where the command failed, with its exit code and its last lines.
        KeyboardInterrupt: after the stop button, once the command has saved and ended.
    """
    if command not in COMMANDS:
        raise ValueError(f"Expected a command out of {', '.join(COMMANDS)}. Received: {command!r}")
    if isinstance(arguments, str):
        raise ValueError(f"Expected a list of flags, such as ['--workdir=runs/at']. Received: {arguments!r}")
    process, curve = _start(command, arguments), _LiveCurve(_workdir(arguments))
    said, is_asked = _Output(process.stdout), False
    try:
        with _stop_button(process) as presses:
            curve.look()
            stop_at = math.inf if stop_at_step is None or curve.step >= stop_at_step else stop_at_step
            while not said.has_ended:
                for line in said.read():
                    print(line, flush=True)
                curve.look()
                if curve.step >= stop_at and not is_asked:
                    is_asked = True
                    print(f"Stopping after step {curve.step}, as the stop button would", flush=True)
                    process.send_signal(signal.SIGINT)
                curve.draw(said.status)
    finally:
        process.stdin.close()  # If it still runs, it hears that it is alone.
        code = process.wait()
    curve.look(at_once=True)
    curve.draw(at_once=True)
    if presses:
        raise KeyboardInterrupt(said.summary())
    if code and not (is_asked and code == exit_codes.TERMINATED):
        raise RuntimeError(f"Expected {command} to end well. Received: exit code {code}, {said.summary()}")
    return code


def learning_curve(workdir: str | os.PathLike) -> "Figure":
    """A figure of a run's metrics so far: its loss, and its accuracies on held-out images.

    Args:
        workdir: the run's folder, any `tf.io.gfile` path; the figure is empty where there are no metrics yet.
    """
    return _figure(_rows(_metrics(os.fspath(workdir))))


def _start(command: str, arguments: Sequence[str]) -> Any:
    """The process of a command; it finds modules where this one does, and no signal reaches it but by us."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))}
    return subprocess.Popen(
        [sys.executable, "-u", "-m", __name__, command, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )


@contextlib.contextmanager
def _stop_button(process: Any) -> Iterator[list[int]]:
    """Inside the context, the stop button interrupts a process, not this one in the middle of what it does.

    The first press lets it save and stop, a second does not wait, a third kills it; the context gives the presses.
    """
    presses: list[int] = []

    def pressed(number: int, frame: Any) -> None:
        presses.append(number)
        process.send_signal(signal.SIGINT if len(presses) < 3 else signal.SIGKILL)

    if threading.current_thread() is not threading.main_thread():
        yield presses
        return
    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)


class _Output:
    """What a process says, read by a thread so that waiting for it ends; `status` is the line that is not whole yet."""

    def __init__(self, stream: Any):
        self._pieces: queue.Queue[bytes] = queue.Queue()
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._lines: collections.deque[str] = collections.deque(maxlen=50)
        self._rest = self.status = ""
        self.has_ended = False
        threading.Thread(target=self._receive, args=(stream,), daemon=True).start()

    def _receive(self, stream):
        while piece := stream.read1(1 << 16):
            self._pieces.put(piece)
        self._pieces.put(b"")

    def read(self) -> list[str]:
        """The next lines, as a terminal would leave them; none where nothing comes for a while, or it has ended."""
        try:
            piece = self._pieces.get(timeout=_WAIT)
        except queue.Empty:
            return []
        self.has_ended = not piece
        *lines, self._rest = (self._rest + self._decode(piece)).split("\n")
        if self.has_ended:
            lines, self._rest = [*lines, self._rest], ""
        shown = [text for line in lines if (text := _overwritten(line))]
        self._lines.extend(shown)
        self.status = _overwritten(self._rest)
        return shown

    def summary(self) -> str:
        """The line that says what the error is; without one, the last lines."""
        told = [line for line in self._lines if line.startswith("error: ")]
        return " | ".join(told[-1:] or [*self._lines][-_LAST_LINES:])


def _overwritten(line: str) -> str:
    """What a terminal leaves of a line with carriage returns, without what says nothing."""
    left = next((part for part in reversed(line.split("\r")) if part.strip()), "").rstrip()
    left = re.sub(r"^(?!error: ).*%.*?(?=error: )", "", left)  # A progress bar stood there.
    return "" if _NOISE.match(left) else left


class _LiveCurve:
    """The learning curve of a folder, shown where there is a notebook; each part takes a tenth of the time at most."""

    def __init__(self, workdir: str | None):
        self._workdir = workdir
        self._is_shown = _is_notebook()
        self._text = self._drawn = self._status = ""
        self._look_due = self._draw_due = 0.0
        self._picture: Any = None
        self._bar: Any = None
        self.step = 0
        if self._is_shown:
            _figure([])  # What it imports takes a second, while the command starts and not while it trains.

    def look(self, *, at_once: bool = False) -> None:
        """Reads the metrics again."""
        started = time.monotonic()
        if self._workdir is None or (started < self._look_due and not at_once):
            return
        text = _metrics(self._workdir)
        if text != self._text and (rows := _rows(text)):
            self._text, self.step = text, int(rows[-1]["step"])
        ended = time.monotonic()
        self._look_due = ended + 9 * (ended - started)

    def draw(self, status: str = "", *, at_once: bool = False) -> None:
        """Shows what was read and a line of progress, where they are new."""
        started = time.monotonic()
        if not self._is_shown or (started < self._draw_due and not at_once):
            return
        from IPython import display

        if status != self._status:
            self._status = status
            self._bar = _show({"text/plain": status}, self._bar, raw=True)  # Not `Pretty`, which reads files.
        if self._text != self._drawn:
            self._drawn = self._text
            image = io.BytesIO()
            _figure(_rows(self._text)).savefig(image, format="png")
            self._picture = _show(display.Image(image.getvalue()), self._picture)
        ended = time.monotonic()
        self._draw_due = ended + max(_WAIT, 9 * (ended - started))


def _show(what: Any, handle: Any, *, raw: bool = False) -> Any:
    """Shows something below, or where the handle says that it is shown already; returns the handle."""
    from IPython import display

    if handle is None:
        return display.display(what, raw=raw, display_id=True)
    handle.update(what, raw=raw)
    return handle


def _is_notebook() -> bool:
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return get_ipython() is not None


def _workdir(arguments: Sequence[str]) -> str | None:
    """What a list of flags says of `--workdir`."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        name, is_whole, value = str(argument).partition("=")
        if name in ("--workdir", "-workdir"):
            found = value if is_whole else str(following)
    return found


def _metrics(workdir: str) -> str:
    """The text of metrics.csv, nothing where it cannot be read now."""
    path = posixpath.join(workdir, "metrics.csv")
    try:
        if "://" not in workdir:  # TensorFlow, which takes seconds to import, is not needed here.
            return pathlib.Path(path).read_text(encoding="utf-8") if pathlib.Path(path).is_file() else ""
        from robust_keras import storage

        return storage.read_text(path)
    except Exception:  # There is none yet, or a bucket does not answer; another look follows.
        return ""


def _rows(text: str) -> list[dict[str, float]]:
    """The whole lines of a csv file that may be in the middle of being written, without empty cells."""
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for line in csv.DictReader(io.StringIO(whole)):
        try:
            row = {name: float(value) for name, value in line.items() if value}
        except (TypeError, ValueError):
            continue
        if "step" in row:
            rows.append(row)
    return rows


def _figure(rows: Sequence[dict[str, float]]) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9.5, 3.4), dpi=100, layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    _plot(loss, rows, "loss", "C7-", "")
    loss.set(xlabel="step", title="loss of the training batches")
    for column, form, label in (
        ("val_clean", "C0o:", "clean"),
        ("val_robust", "C3o:", "under attack"),
        ("val_clean_averaged", "C0o-", "clean, averaged weights"),
        ("val_robust_averaged", "C3o-", "under attack, averaged weights"),
    ):
        _plot(accuracy, rows, column, form, label)
    accuracy.set(xlabel="step", ylim=(-2, 102), title="accuracy on held-out images, %", xlim=loss.get_xlim())
    if accuracy.lines:
        accuracy.legend(fontsize="small", loc="best")
    for axis in (loss, accuracy):
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _plot(axis: Any, rows: Sequence[dict[str, float]], column: str, form: str, label: str) -> None:
    points = [(row["step"], row[column] * (100 if column.startswith("val_") else 1)) for row in rows if column in row]
    if points:
        axis.plot(*zip(*points), form, label=label, markersize=4)


def _stop_when_alone() -> None:
    """Asks this process to save and stop once whoever started it is gone, which closes the pipe between them."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


class _Shown(io.TextIOWrapper):
    """What is written to the pipe of a notebook, which shows a progress bar as a terminal would."""

    def isatty(self) -> bool:
        """Says so to what draws the bar."""
        return True


def main() -> None:
    """Runs the command that the first argument names; this is the process that `run` starts."""
    command = sys.argv.pop(1)
    _stop_when_alone()
    sys.stderr = _Shown(sys.stderr.buffer, encoding="utf-8", errors="backslashreplace", write_through=True)
    importlib.import_module(f"robust_keras.commands.{command}").command()


if __name__ == "__main__":
    main()
