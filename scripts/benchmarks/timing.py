"""Times cases in turn with another program, and shows and keeps what came out."""

import ctypes
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from benchmarks import counting, machine, peers

# Heading, width, and how a row says it.
_COLUMNS: list[tuple[str, int, Callable]] = [
    ("seconds", 9, lambda row: f"{row['seconds']:.3g}"),
    ("spread", 15, lambda row: f"{row['seconds_min']:.3g}-{row['seconds_max']:.3g}"),
    ("images/s", 10, lambda row: f"{row['images_per_second']:.4g}"),
    ("GFLOP/s", 9, lambda row: f"{row['flops_per_second'] / 1e9:.4g}"),
    ("of conv.", 9, lambda row: f"{row['share_of_convolutions']:.0%}"),
    ("GB/s", 7, lambda row: f"{row['bytes_per_second'] / 1e9:.3g}"),
    ("of copy", 8, lambda row: f"{row['share_of_copy']:.0%}"),
    ("peak MiB", 9, lambda row: f"{row['peak_bytes_over_before'] / 2**20:.0f}"),
    ("theirs", 9, lambda row: f"{row['against']['seconds']:.3g}"),
    ("ratio", 7, lambda row: f"{row['against']['ratio']:.3f}"),
    ("spread", 13, lambda row: f"{row['against']['ratio_min']:.3g}-{row['against']['ratio_max']:.3g}"),
]


class Work(NamedTuple):
    """What one run of a case has to do.

    Attributes:
        num_images: it deals with; 0 where it has none.
        flops: operations by the network's own count; 0 where it is not known.
        num_bytes: that have to be read and written; likewise.
        dtype: of the convolutions, with the fastest of which operations a second are compared.
    """

    num_images: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0
    dtype: str = "float32"


def passes(counted: counting.Count, num_images: int, num_passes: float, dtype: str = "float32") -> Work:
    """The work of passes through a network; a backward pass for the input's gradient is one, for the weights' too."""
    wide = 2 if dtype == "bfloat16" else 4
    total = num_images * num_passes
    return Work(num_images, counted.flops * total, counted.numbers * total * wide, dtype)


class Bench:
    """Times what it is given. Used as a context, at whose end another program ends.

    Args:
        num_runs: how often each case is timed.
        num_warmups: how often it runs before that.
        command: of the other program; None for none.

    Attributes:
        rows: what was measured, a dictionary for each case.
        notes: what else there is to say, for the file.
    """

    def __init__(self, num_runs: int, num_warmups: int, command: str | None = None) -> None:
        self.num_runs, self.num_warmups = num_runs, num_warmups
        self.rows: list[dict[str, Any]] = []
        self.notes: dict[str, Any] = {}
        self._peer = peers.Peer(command) if command else None
        self._folder = tempfile.TemporaryDirectory()
        self._shown: list[int] = []

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *error: Any) -> None:
        if self._peer:
            self._peer.close()
        self._folder.cleanup()

    @property
    def has_peer(self) -> bool:
        """Whether there is another program."""
        return self._peer is not None

    def new_path(self, name: str) -> str:
        """A path in a folder that is there as long as this context is."""
        return os.path.join(tempfile.mkdtemp(dir=self._folder.name), name)

    def hand_over(self, **arrays: np.ndarray) -> str:
        """Writes arrays to a file that the other program can read, and returns its path."""
        path = self.new_path("given.npz")
        np.savez(path, **arrays)  # type: ignore[arg-type]
        return path

    def time(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        work: Work = Work(),  # noqa: B008  It cannot change.
        settings: Mapping[str, Any] | None = None,
        given: str | None = None,
        is_compared: bool = True,
        describe: Callable[[Any], Any] = lambda found: found,
    ) -> dict[str, Any]:
        """Times a case.

        Args:
            name: of the case.
            run: does it once, and returns once it is done.
            work: of one run.
            settings: of the case, for the other program and the file.
            given: what `hand_over` returned.
            is_compared: whether the other program, if there is one, runs too.
            describe: called with what a run returned, after the clock stopped; a dictionary is kept.

        Returns:
            The row, as it is in the file.
        """
        request = {"case": name, "settings": dict(settings or {}), "given": given}
        peer = self._peer if is_compared else None
        before, ours, theirs = _begin_peak(), [], []
        first = [_timed(run)[0] for _ in range(self.num_warmups)]
        answers = [peer.measure(request) for _ in range(self.num_warmups) if peer]
        found = []
        for _ in range(self.num_runs):
            seconds, returned = _timed(run)
            ours.append(seconds)
            found.append(describe(returned))
            if peer:
                theirs.append(peer.measure(request))
        row = {"name": name, "settings": request["settings"], **spread(ours), "first_seconds": [*first, *ours][0]}
        row["found"] = [each for each in found if isinstance(each, dict)]
        peak = _peak()
        row |= {"peak_bytes": peak, "peak_bytes_over_before": max(0, peak - before)}
        row |= _speeds(row["seconds"], work)
        if peer:
            row["against"] = _against(peer.command, ours, theirs, answers)
        self.add(row)
        return row

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, and shows it; the first one under a heading."""
        columns = [k for k, (_, _, show) in enumerate(_COLUMNS) if _shown(show, row) is not None]
        if columns != self._shown:
            print(f"{'case':34}" + "".join(f"{_COLUMNS[k][0]:>{_COLUMNS[k][1]}}" for k in columns), flush=True)
            self._shown = columns
        cells = "".join(f"{_shown(_COLUMNS[k][2], row):>{_COLUMNS[k][1]}}" for k in columns)
        print(f"{row['name']:34}{cells}", flush=True)
        self.rows.append(row)

    def write(self, path: str, subject: str, flags: Mapping[str, Any]) -> None:
        """Writes all that was measured."""
        found = {"subject": subject, "flags": dict(flags), "machine": machine.description(), **self.notes}
        dtypes = {row["dtype"] for row in self.rows if row.get("dtype")}
        found["reached"] = {f"convolutions_{dtype}": machine.convolution_speed(dtype) for dtype in sorted(dtypes)}
        found["reached"]["copy"] = machine.copy_speed()
        with open(path, "w") as file:
            json.dump({**found, "rows": self.rows}, file, indent=1, default=float)
            file.write("\n")


def _shown(show: Callable, row: Mapping[str, Any]) -> str | None:
    try:
        return show(row)
    except (KeyError, TypeError):
        return None


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


def spread(seconds: list[float]) -> dict[str, Any]:
    """The median of some times, the fastest, the slowest, and all of them."""
    return {
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "runs": seconds,
    }


def _speeds(seconds: float, work: Work) -> dict[str, Any]:
    speeds: dict[str, Any] = {}
    if work.num_images:
        speeds |= {"images": work.num_images, "images_per_second": work.num_images / seconds}
    if work.flops:
        speeds |= {"dtype": work.dtype, "flops": work.flops, "flops_per_second": work.flops / seconds}
        speeds["share_of_convolutions"] = speeds["flops_per_second"] / machine.convolution_speed(work.dtype)
    if work.num_bytes:
        speeds |= {"bytes": work.num_bytes, "bytes_per_second": work.num_bytes / seconds}
        speeds["share_of_copy"] = speeds["bytes_per_second"] / machine.copy_speed()
    return speeds


def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """Other times next to ours, and how they compare pair by pair."""
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {
        **spread(theirs),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratios": ratios,
    }


def _against(command: str, ours: list[float], answers: list[dict], first: list[dict]) -> dict[str, Any]:
    return {
        "command": command,
        **paired(ours, [answer["seconds"] for answer in answers]),
        "first_seconds": [*first, *answers][0]["seconds"],
        "answers": answers,
    }


def _begin_peak() -> int:
    """Gives back memory that is free, begins a new peak, and returns what the process holds, in bytes.

    TensorFlow keeps what it has once taken for tensors: only of the first case is the difference what it needs.
    """
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except (OSError, AttributeError):
        pass  # The peak is then that of the whole process.
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next((int(line.split()[1]) * 1024 for line in file if line.startswith(name)), 0)
