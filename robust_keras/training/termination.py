"""A signal that asks a run to stop, which it does once what it has is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from robust_keras.engines import replicas

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Terminated(BaseException):  # No reader of a file takes it for damage.
    """A SIGTERM or SIGINT arrived, and a snapshot has been written since."""


class Termination:
    """Hears SIGTERM and SIGINT (Ctrl-C, or a notebook's stop button) and keeps them until the run asks.

    A second SIGINT is for who does not want to wait: it does what it did before.
    """

    def __init__(self) -> None:
        self._received: int | None = None

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Inside the context, signals only ask the run to stop; those that arrive in another thread's are not heard."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in _SIGNALS}

        def stop(number: int, frame: FrameType | None) -> None:
            if number == signal.SIGINT and self._received == signal.SIGINT:
                signal.signal(number, previous[number])
                signal.raise_signal(number)
            self._received = number

        for number in _SIGNALS:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                signal.signal(number, previous[number])

    def is_asked(self) -> bool:
        """Whether any process received one; all of them call this at the same point."""
        return any(replicas.all_processes(self._received is not None))

    def terminated(self, step: int) -> Terminated:
        """The exception for a run that is saved at `step`."""
        name = "another process' signal" if self._received is None else signal.Signals(self._received).name
        return Terminated(f"Stopped by {name}; saved at step {step}")
