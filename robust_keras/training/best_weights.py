"""The best weights of a run so far, by the images held out."""

from collections.abc import Callable, Mapping

import numpy as np

from robust_keras.training.run_state import RunState
from robust_keras.training.validation import Validator


class BestWeights:
    """Validates a run and keeps the weights of its best validation, of equal ones the first.

    Args:
        validator: called as `(should_stop) -> {column: accuracy}`, or None once `should_stop()` is true; the best
            weights are those with the highest `validator.best_metric`.
        state: of the run.

    Attributes:
        best: {'step', 'metrics'} of the best validation, or None.
        last: the same of the last one.
        arrays: the best weights by name.
    """

    def __init__(self, validator: Validator, state: RunState) -> None:
        self._validator, self._state = validator, state
        self.best: dict | None = None
        self.last: dict | None = None
        self.arrays: dict[str, np.ndarray] = {}

    def begin(self, best: dict | None, last: dict | None, arrays: Mapping[str, np.ndarray]) -> None:
        """Takes up what a snapshot holds."""
        self.best, self.last, self.arrays = best, last, dict(arrays)

    def validate(self, step: int, should_stop: Callable[[], bool]) -> dict[str, float] | None:
        """Columns of a validation after `step`; None where it was to stop.

        Raises:
            run_state.NonFiniteLoss: for better weights that are not finite.
        """
        metrics = self._validator(should_stop)
        if metrics is None:
            return None
        name = self._validator.best_metric
        is_better = self.best is None or metrics[name] > self.best["metrics"][name]
        self.last = {"step": step, "metrics": metrics}
        if is_better:
            self.arrays = self._state.best_of(self._state.read(step))
            self.best = self.last
        return metrics
