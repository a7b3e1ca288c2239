"""How long a run still takes, by what its steps, its validations and its snapshots have taken so far."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping

_HALF_LIFE = 600.0  # Seconds after which what a step took counts half: others may share the machine meanwhile.


class TimeLeft:
    """Measures a run, of which steps and pauses between them are told, and says how long the rest of it takes.

    What is compiled at the first call for steps is not part of it.

    Args:
        num_steps: of the whole run.
        pauses: after how many steps what comes between steps, by name; after the last step each comes once more.
        clock: seconds that only rise.
    """

    def __init__(
        self, num_steps: int, pauses: Mapping[str, int], *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._num_steps, self._every, self._clock = num_steps, pauses, clock
        self._seen: tuple[int, float] | None = None  # The last step that had ended, and when.
        self._steps = self._seconds = 0.0
        self._took: dict[str, float] = {}  # The last pause of each name.
        self._now_in: tuple[str, float] | None = None  # A pause, and since when.

    def step(self, step: int) -> None:
        """Tells that all steps up to this one have ended."""
        now = self._clock()
        if self._seen is not None:
            count, seconds = step - self._seen[0], now - self._seen[1]
            kept = 0.5 ** (seconds / _HALF_LIFE)
            self._steps, self._seconds = kept * self._steps + count, kept * self._seconds + seconds
        self._seen = step, now

    @contextlib.contextmanager
    def pause(self, name: str) -> Iterator[None]:
        """Tells that what is done inside the context is no step."""
        began = self._clock()
        self._now_in = name, began
        try:
            yield
        finally:
            self._took[name] = self._clock() - began
            self._now_in = None
            if self._seen is not None:
                self._seen = self._seen[0], self._seen[1] + self._took[name]

    def seconds(self, step: int) -> float | None:
        """Seconds left after a step; None where none was measured."""
        if step < self._num_steps and not self._steps:
            return None
        left = (self._num_steps - step) * self._seconds / self._steps if self._steps else 0.0
        left += sum(self._pauses_left(name, step) * seconds for name, seconds in self._took.items())
        if self._now_in is not None:
            name, began = self._now_in
            left += max(self._took.get(name, 0.0) - (self._clock() - began), 0.0)
        return left

    def takes_more(self, step: int) -> bool:
        """Whether there is to come, or under way, what was never measured."""
        under_way = self._now_in[0] if self._now_in else None
        return any(
            name not in self._took and (self._pauses_left(name, step) > 0 or name == under_way) for name in self._every
        )

    def _pauses_left(self, name: str, step: int) -> int:
        every, last = self._every[name], self._num_steps
        return last // every - step // every + (last % every > 0 and step < last)
