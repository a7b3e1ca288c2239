"""Measures what training on a labelled set on disk takes: memory, time to the first batch, images a second.

    python scripts/benchmark.py streaming --num_images=1000000 --workdir=DIR

Makes TFRecords of that many images of 64 x 64, raw bytes, in DIR, and reads them as a run does, with random crops and
flips, but trains nothing. Each part runs in a process of its own, whose peak of memory it prints: the conversion, which
happens once; batches of one seed, twice; and of another one. Their order is printed as a hash. The files, 25 kB an
image with the copy, are removed at the end.
"""

import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

from absl import flags

from benchmarks import timing

_SIZE = 64
_PER_FILE = 100_000
_CLASSES = 1000


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Measures a part in this process, or all of them in others."""
    if values.part:
        bench.add({"name": values.part, **_part(values.part, values.workdir, values.num_steps, values.batch_size)})
        return
    records = os.path.join(values.workdir, "records")
    os.makedirs(records, exist_ok=True)
    try:
        started = time.perf_counter()
        _make(records, values.num_images)
        print(f"{values.num_images:,} images made in {time.perf_counter() - started:.0f} s", flush=True)
        parts = {name: _in_a_process(name, values, bench) for name in ("convert", "0", "0 again", "1")}
    finally:
        if not values.keep:
            shutil.rmtree(records)
    if not parts["0"]["order"] == parts["0 again"]["order"] != parts["1"]["order"]:
        raise RuntimeError(f"Expected the order to depend on the seed alone. Received: {parts}")


def _in_a_process(name, values, bench):
    path = bench.new_path("found.json")
    script = pathlib.Path(__file__).parents[1] / "benchmark.py"
    command = [sys.executable, str(script), "streaming", f"--part={name}", f"--workdir={values.workdir}"]
    command += [f"--num_steps={values.num_steps}", f"--batch_size={values.batch_size}", f"--json={path}"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    with open(path) as file:
        (result,) = json.load(file)["rows"]
    result["seconds_of_the_process"] = round(time.perf_counter() - started, 1)
    print({key: value for key, value in result.items() if key != "name"})
    bench.add(result)
    return result


def _part(name, workdir, num_steps, batch_size):
    """What a process measures of itself."""
    from robust_keras.data import augmentation, training_batches

    started = time.perf_counter()
    data = training_batches.training_data(
        dataset=f"tfrecord:{workdir}/records/*.tfrecord", num_validation=1024, image_size=_SIZE
    )
    found = {"images": len(data.labelled.labels), "data_after_s": round(time.perf_counter() - started, 1)}
    if name != "convert":
        seed, order = int(name.split()[0]), hashlib.sha256()
        batches = training_batches.batches(
            data, batch_size=batch_size, seed=seed, num_steps=num_steps, augmentation=augmentation.crop_and_flip
        )
        for step, batch in enumerate(batches):
            if step == 0:
                first = time.perf_counter()
            order.update(batch["label"].numpy().tobytes() + batch["image"].numpy().tobytes())
        speed = (num_steps - 1) * batch_size / (time.perf_counter() - first)
        found |= {"first_batch_after_s": round(first - started, 1), "images_per_second": round(speed)}
        found["order"] = order.hexdigest()[:16]
    found["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return found


def _make(folder, num_images):
    """Writes records of noise, of which no two are the same."""
    import numpy as np
    import tensorflow as tf

    pixels = np.random.default_rng(0).integers(0, 256, 2**24, dtype=np.uint8)
    num_bytes = 3 * _SIZE**2
    for begin in range(0, num_images, _PER_FILE):
        with tf.io.TFRecordWriter(os.path.join(folder, f"{begin:09d}.tfrecord")) as writer:
            for k in range(begin, min(begin + _PER_FILE, num_images)):
                at = 1021 * k % (len(pixels) - num_bytes)
                image = tf.train.BytesList(value=[k.to_bytes(8, "little") + pixels[at + 8 : at + num_bytes].tobytes()])
                label = tf.train.Int64List(value=[k % _CLASSES])
                feature = {"image": tf.train.Feature(bytes_list=image), "label": tf.train.Feature(int64_list=label)}
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())


def define_flags(values):
    flags.DEFINE_integer("num_images", 100_000, "How many images.", flag_values=values, lower_bound=2000)
    flags.DEFINE_string("workdir", None, "A folder with 25 kB of room for each.", flag_values=values)
    flags.DEFINE_integer("num_steps", 200, "Batches that are timed.", flag_values=values, lower_bound=2)
    flags.DEFINE_integer("batch_size", 256, "Images in a batch.", flag_values=values, lower_bound=1)
    flags.DEFINE_bool("keep", False, "Keeps the files.", flag_values=values)
    flags.DEFINE_string("part", None, "What this process measures; all by default.", flag_values=values)
    flags.mark_flags_as_required(["workdir"], flag_values=values)
