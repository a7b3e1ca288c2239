"""Times the input pipeline at 3:7 extra data, alone and under training steps.

    python scripts/benchmark.py input --batch_size=1024 --num_extra=500000
    python scripts/benchmark.py input --depth=16 --width=2 --batch_size=64

Makes npz files of random images in a temporary folder, labelled and extra, and reads them as a run does, with crops and
flips: alone, under training steps, and next to the same steps on one batch over and over. `waiting` is the share of the
time of steps until the next batch is there, a call of the iterator included.
"""

import functools
import os
import statistics
import time

import numpy as np
from absl import flags

from benchmarks import counting, networks, step, timing

_LABELLED = 50_000


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    networks.define_flags(values, depth=10, width=1)
    flags.DEFINE_integer("batch_size", 128, "Images of a step.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_extra", 100_000, "Extra images.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("num_steps", 20, "In a run.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("attack_steps", 10, "Of PGD, in a step.", flag_values=values, lower_bound=0)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times batches alone, and steps with and without them."""
    take = iter(_batches(values, os.path.dirname(bench.new_path("data")))).__next__
    bytes_of_images = values.num_steps * values.batch_size * 32 * 32 * 3
    work = timing.Work(values.num_steps * values.batch_size, num_bytes=2 * bytes_of_images)
    bench.time("batches alone", lambda: [take() for _ in range(values.num_steps)] and None, work=work)
    network = networks.wide_resnet(values.depth, values.width, values.activation, dtype=values.dtype)
    model = networks.model(
        network, objective="adversarial_training", attack_steps=values.attack_steps, batch_norm="batch"
    )
    train = step.compiled(model)
    images, passes = values.num_steps * values.batch_size, step.num_passes("adversarial_training", values.attack_steps)
    dtype = "bfloat16" if values.dtype == "mixed_bfloat16" else "float32"
    work, batch = timing.passes(counting.count(network), images, passes, dtype), take()
    rows = {
        name: bench.time(name, functools.partial(_steps, train, next_batch, values.num_steps), work=work)
        for name, next_batch in (("steps on one batch", lambda: batch), ("steps on new batches", take))
    }
    new = rows["steps on new batches"]
    waits = statistics.median(found["waited"] / seconds for found, seconds in zip(new["found"], new["runs"]))
    bench.notes["waiting"] = waits
    speeds = [bench.rows[0]["images_per_second"], rows["steps on one batch"]["images_per_second"]]
    print(f"waiting {waits:.2%}; batches alone are {speeds[0] / speeds[1]:.0f} times as fast as steps")


def _steps(train, next_batch, num_steps):
    waited = 0.0
    for _ in range(num_steps):
        started = time.perf_counter()
        batch = next_batch()
        waited += time.perf_counter() - started
        loss = train(batch)
    loss.numpy()
    return {"waited": waited}


def _batches(values, folder):
    """The batches of a run on sets that are written to the folder."""
    from robust_keras.data import augmentation, training_batches

    rng = np.random.default_rng(0)
    for name, count in (("labelled", _LABELLED), ("extra", values.num_extra)):
        images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
        np.savez(os.path.join(folder, f"{name}.npz"), image=images, label=rng.integers(0, 10, count))
    labelled, extra = (f"npz:{os.path.join(folder, name)}.npz" for name in ("labelled", "extra"))
    data = training_batches.training_data(dataset=labelled, num_validation=1024, extra_data=extra)
    return training_batches.batches(
        data,
        batch_size=values.batch_size,
        seed=0,
        num_steps=10**6,
        labelled_fraction=0.3,
        augmentation=augmentation.crop_and_flip,
    )
