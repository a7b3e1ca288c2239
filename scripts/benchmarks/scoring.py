"""Times the scoring of a pool against the network that it cannot do without, and shows what memory it takes.

    python scripts/benchmark.py scoring --num_images=500000 --workdir=DIR

Makes a `tiny_images.bin` of that many records from the training images of a data set, each darkened a little,
and labels it with an untrained WRN-10-1; duplicates are sought among all test images of the set. The network alone is
timed on as many images, one batch in memory over and over.
"""

import os
import shutil

import tensorflow as tf
from absl import flags

from benchmarks import counting, networks, timing


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the scorer, and the network alone on as many images, in between."""
    from robust_keras.data import sources
    from robust_keras.pseudo_labelling import recipes, scoring

    train, test = (sources.load(values.dataset, split, data_dir=values.data_dir) for split in ("train", "test"))
    path = os.path.join(values.workdir, "tiny_images.bin")
    _write(path, train.images, values.num_images)
    network = networks.wide_resnet(10, 1, "relu")
    alone = tf.function(lambda images: network(tf.cast(images, tf.float32) / 255.0, training=False), autograph=False)
    batch, num_batches = tf.constant(train.images[: values.batch_size]), values.num_images // values.batch_size
    pool = sources.open_pool(f"tiny_images:{path}", image_shape=(32, 32, 3))
    settings, scores = recipes.Scoring(batch_size=values.batch_size), os.path.join(values.workdir, "scores")

    def score():
        shutil.rmtree(scores, ignore_errors=True)
        logits_fn = networks.evaluated(network)
        scoring.score(pool, logits_fn, directory=scores, test_images=test.images, settings=settings)

    counted = counting.count(network)
    work = timing.passes(counted, values.num_images, 1)
    bench.time("scored", score, work=work)
    work = timing.passes(counted, num_batches * values.batch_size, 1)
    bench.time("network alone", lambda: [alone(batch).numpy() for _ in range(num_batches)][-1], work=work)
    scored, by_itself = (row["images_per_second"] for row in bench.rows)
    bench.notes["scored_over_alone"] = scored / by_itself
    print(f"ratio {scored / by_itself:.3f}")


def _write(path, images, num_images):
    """Writes records of 3 x 32 x 32 bytes, every channel in column-major order."""
    import numpy as np

    os.makedirs(os.path.dirname(path), exist_ok=True)
    rng = np.random.default_rng(0)
    with open(path, "wb") as file:
        for start in range(0, num_images, 10_000):
            index = np.arange(start, min(start + 10_000, num_images)) % len(images)
            factors = rng.uniform(0.8, 1.0, (len(index), 1, 1, 1)).astype(np.float32)
            file.write((images[index] * factors).astype(np.uint8).transpose(0, 3, 2, 1).tobytes())


def define_flags(values):
    flags.DEFINE_integer("num_images", 500_000, "Records in the pool.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("workdir", None, "An empty folder: 3,072 bytes a record are needed.", flag_values=values)
    flags.DEFINE_string("dataset", "cifar10", "Where images and test images come from.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where data sets are.", flag_values=values)
    flags.DEFINE_integer("batch_size", 256, "Images in a batch.", flag_values=values, lower_bound=1)
    flags.mark_flags_as_required(["workdir"], flag_values=values)
