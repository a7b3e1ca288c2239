"""Fits what time and memory depend on: seconds = a + b x, for steps of the attack, images of a batch and so on.

    python scripts/benchmark.py scaling
    python scripts/benchmark.py scaling --variables=attack_steps --points=1,2,4,8,16

On a small network, each point in a process of its own. A line has a, b, the share of the variance that the fit
explains, and the peak of memory at the last point over that at the first: it does not grow with an attack's steps.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import flags

from benchmarks import timing

_SCRIPT = pathlib.Path(__file__).parents[1] / "benchmark.py"
# Of each variable the subject whose flag it is, and points. Replicas share one batch, on the same cores.
_VARIABLES = {
    "attack_steps": ("step", (1, 2, 4, 8, 16)),
    "batch_size": ("step", (16, 32, 64, 128)),
    "groups": ("step", (1, 2, 4, 8, 16)),
    "replicas": ("step", (1, 2, 4)),
    "num_images": ("pgd", (128, 256, 512, 1024)),
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    flags.DEFINE_list("variables", list(_VARIABLES), f"Out of {', '.join(_VARIABLES)}.", flag_values=values)
    flags.DEFINE_list("points", [], "Instead of the usual ones.", flag_values=values)
    flags.DEFINE_integer("depth", 10, "Of the WRN.", flag_values=values)
    flags.DEFINE_integer("width", 1, "Of the WRN.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the points, and fits."""
    fits = {}
    for variable in values.variables:
        if variable not in _VARIABLES:
            raise ValueError(f"Expected variables out of {', '.join(_VARIABLES)}. Received: {variable}")
        subject, usual = _VARIABLES[variable]
        points = [int(point) for point in values.points] or usual
        rows = [_point(subject, variable, point, values, bench) for point in points]
        for point, row in zip(points, rows):
            bench.add({**row, "name": f"{variable}={point}"})
        fits[variable] = fitted(points, rows)
    print(f"\n{'seconds = a + b x':20}{'a':>10}{'b':>12}{'R2':>8}{'peak, last over first':>24}")
    for variable, fit in fits.items():
        print(f"{variable:20}{fit['a']:10.4f}{fit['b']:12.6f}{fit['r2']:8.4f}{fit['peak_ratio']:24.3f}")
    bench.notes["fits"] = fits


def fitted(points, rows):
    """Least squares over points, and how memory grew."""
    x, y = np.array(points, float), np.array([row["seconds"] for row in rows])
    b, a = np.polyfit(x, y, 1)
    spread = ((y - y.mean()) ** 2).sum()
    r2 = 1.0 - ((y - a - b * x) ** 2).sum() / spread if spread else 1.0
    peaks = [row["peak_bytes_over_before"] for row in rows]
    return {"a": a, "b": b, "r2": r2, "points": list(points), "peaks": peaks, "peak_ratio": peaks[-1] / peaks[0]}


def _point(subject, variable, point, values, bench):
    path = bench.new_path("found.json")
    command = [sys.executable, str(_SCRIPT), subject, f"--{variable}={point}", f"--json={path}"]
    command += [f"--depth={values.depth}", f"--width={values.width}", f"--num_runs={bench.num_runs}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"Expected {' '.join(command)} to end well. Received: {done.stderr.strip().splitlines()[-1]}")
    with open(path) as file:
        return json.load(file)["rows"][0]
