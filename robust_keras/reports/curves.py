"""The rows of a run's metrics.csv, which may grow while they are read, or be somebody else's."""

import csv
import io
import os

import numpy as np

from robust_keras import foreign_files, storage
from robust_keras.run_metrics import METRICS, VALIDATION


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The columns by name, float64 `[rows]` each; NaN where a row has no number, or none that is finite.

    Columns of other versions are left out, and those that the file lacks hold NaN.

    Raises:
        ValueError: for a file of anything but numbers, with steps that rise and accuracies in [0, 1].
    """
    text = storage.read_text(path)
    whole = text[: text.rfind("\n") + 1]  # A run that goes on may be writing its last line.
    try:
        lines = list(csv.DictReader(io.StringIO(whole)))
        if lines and "step" not in lines[0]:
            raise ValueError("no column step")
        found = {name: np.array([_number(line.get(name)) for line in lines], np.float64) for name in METRICS}
        if not (np.isfinite(found["step"]).all() and (np.diff(found["step"]) > 0).all()):
            raise ValueError("steps that do not rise")
        for name in VALIDATION:
            if (found[name] < 0).any() or (found[name] > 1).any():
                raise ValueError(f"{name} outside of [0, 1]")
    except (ValueError, TypeError, csv.Error) as error:
        received = foreign_files.printable(error)
        raise ValueError(f"Expected rows of metrics in {os.fspath(path)}. Received: {received}") from error
    return found


def _number(cell: str | None) -> float:
    value = float(cell) if cell else float("nan")
    return value if np.isfinite(value) else float("nan")
