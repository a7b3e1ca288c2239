"""Times a run's snapshot: weights, momentum and averages, written to disk and read back.

    python scripts/benchmark.py checkpoint --depth=28 --width=10

`take` is what a training run waits for: copies of all arrays. Writing goes on in the background while it trains.
"""

import numpy as np
from absl import flags

from benchmarks import networks, timing

_COPIES = ("weights", "momentum", "averages")


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    networks.define_flags(values, depth=28, width=10)
    flags.DEFINE_string("workdir", None, "A folder; a temporary one by default.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times copies, writing, and reading back."""
    from robust_keras import storage
    from robust_keras.models import weights

    network = networks.wide_resnet(values.depth, values.width, values.activation)
    variables = {f"{kind}/{name}": v for kind in _COPIES for name, v in weights.by_name(network).items()}
    folder = values.workdir or bench.new_path("checkpoints")
    arrays = {}

    def take():
        arrays.update({name: np.array(variable) for name, variable in variables.items()})

    take()
    work = timing.Work(num_bytes=2 * sum(array.nbytes for array in arrays.values()))
    bench.time("take", take, work=work)
    bench.time("write", lambda: storage.write(folder, 1, arrays, {}), work=work)
    bench.time("read", lambda: len(storage.read(folder, 1).arrays), work=work)
