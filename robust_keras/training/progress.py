"""What a run says of itself while it trains: one line that stays in a terminal, lines now and then in a log."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

from tqdm import tqdm

from robust_keras.training.recipes import Cadence
from robust_keras.training.time_left import TimeLeft

VALIDATING, SAVING = "validating", "saving"
_COMPILING = "the first step compiles"
_TERMINAL, _LOG = 0.5, 120.0  # Seconds between two looks at a run.
_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"


class Progress:
    """Writes to stderr how far a run is, how long it still takes, and how robust it is: the networks and the best.

    It is told what was read of the devices, and asks for nothing. Where stderr is no terminal, it writes whole lines:
    at validations, and every two minutes at least, at the end of a step or of a batch that is validated.

    Args:
        num_steps: of the whole run.
        cadence: how often the run validates and saves; whether there is a bar, or lines between validations.
        writes: whether this process is the one that says it.
    """

    def __init__(self, num_steps: int, cadence: Cadence, *, writes: bool) -> None:
        self._num_steps, self._writes = num_steps, writes
        self._is_shown = writes and cadence.progress
        self._left = TimeLeft(num_steps, {VALIDATING: cadence.validate_every, SAVING: cadence.checkpoint_every})
        self._in_terminal = sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._step, self._shown_at = 0, 0.0
        self._loss: float | None = None
        self._doing = ""
        self._last: Mapping | None = None  # {"step", "metrics"} of validations.
        self._best: Mapping | None = None

    def begin(self, step: int, last: Mapping | None, best: Mapping | None) -> None:
        """Tells that steps begin after this one.

        Args:
            step: its number.
            last: {'step', 'metrics'} of the last validation, or None.
            best: the same of the best one.
        """
        self._step, self._last, self._best, self._doing = step, last, best, _COMPILING
        if self._is_shown and self._in_terminal:
            shown = {"bar_format": _FORMAT, "dynamic_ncols": True, "postfix": self._told()}
            self._bar = tqdm(total=self._num_steps, initial=step, **shown)
        self._show()

    def step(self, step: int, loss: float | None = None) -> None:
        """Tells that a step was taken, or begun.

        Args:
            step: its number.
            loss: of the step, where it was read, so that the step has ended; None where nobody waited for it.
        """
        if loss is not None or self._doing:
            self._left.step(step)
            self._loss = loss
        self._step, self._doing = step, ""
        self.go_on()

    @contextlib.contextmanager
    def pause(self, doing: str) -> Iterator[None]:
        """Tells that what is done inside the context is no step, but `VALIDATING` or `SAVING`."""
        self._doing = doing
        with self._left.pause(doing):
            if self._bar is not None:
                self._show()
            yield
        self._doing = ""

    def validated(self, step: int, last: Mapping, best: Mapping) -> None:
        """Tells what a validation found; see `begin`."""
        self._step, self._last, self._best = step, last, best
        if not self._writes:
            return
        found = ", ".join(f"{name} {100 * value:.2f} %" for name, value in last["metrics"].items())
        told = self._times() + self._best_told() if self._is_shown and self._bar is None else []
        tqdm.write("; ".join([f"Step {step}: {found}", *told]), file=sys.stderr)
        self._shown_at = time.monotonic()

    def go_on(self) -> None:
        """Shows how far the run is, if it was not shown for a while."""
        if time.monotonic() - self._shown_at >= (_LOG if self._bar is None else _TERMINAL):
            self._show()

    def end(self) -> None:
        """Leaves the line in a terminal as it is, and goes to the next."""
        if self._bar is not None:
            self._doing = ""
            self._show()
            self._bar.close()
            self._bar = None

    def _show(self):
        self._shown_at = time.monotonic()
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_postfix_str(self._told())
        elif self._is_shown:
            print(f"Step {self._step} of {self._num_steps}: {self._told()}", file=sys.stderr, flush=True)

    def _told(self):
        """What there is to say, the most wanted first: narrow terminals cut the rest off."""
        told = [self._doing] if self._doing else []
        told += self._times()
        if self._last is not None:
            averaged = _robust(self._last, "_averaged")
            told.append(f"robust {_robust(self._last)}" + (f", averaged {averaged}" if averaged else ""))
        told += self._best_told()
        if self._loss is not None:
            told.append(f"loss {self._loss:.4f}")
        return ", ".join(told)

    def _times(self):
        seconds = self._left.seconds(self._step)
        more = "more than " if self._left.takes_more(self._step) else ""
        return [f"{more}{tqdm.format_interval(seconds)} left"] if seconds else []

    def _best_told(self):
        if self._best is None:
            return []
        averaged = _robust(self._best, "_averaged")
        robust = f"averaged {averaged}" if averaged else _robust(self._best)
        return [f"best weights {robust} at {self._best['step']}"]


def _robust(validation: Mapping, ending: str = "") -> str | None:
    value = validation["metrics"].get(f"val_robust{ending}")
    return None if value is None else f"{100 * value:.1f} %"
