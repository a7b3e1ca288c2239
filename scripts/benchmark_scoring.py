"""Times the scoring of a pool against the network that it cannot do without, and shows what memory it takes.

    python scripts/benchmark_scoring.py --num_images=500000 --workdir=DIR

Makes a `tiny_images.bin` of that many records from the training images of a data set, each darkened a little,
and labels it with an untrained WRN-10-1; duplicates are sought among all test images of the set. The network alone is
timed before and after, on images in memory.
"""

from robust_keras.commands import launcher  # isort: skip  Before TensorFlow is imported.

import os
import resource
import time

from absl import flags


def run(*, num_images, workdir, dataset="cifar10", data_dir=None, batch_size=256):
    """Prints images a second of the network alone and of the scorer, their ratio, and the peak of memory.

    Returns:
        (images a second alone, images a second scored, peak in bytes).
    """
    import keras
    import tensorflow as tf

    from robust_keras.data import sources
    from robust_keras.models import wide_resnet
    from robust_keras.pseudo_labelling import recipes, scoring

    train, test = (sources.load(dataset, split, data_dir=data_dir) for split in ("train", "test"))
    path = os.path.join(workdir, "tiny_images.bin")
    _write(path, train.images, num_images)
    keras.utils.set_random_seed(0)
    network = wide_resnet.wide_resnet(
        depth=10,
        width=1,
        num_classes=10,
        activation="relu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_shape=(32, 32, 3),
        statistics_group_size=batch_size,
    )
    # It starts as zeros, which would put all images into one class.
    network.layers[-1].kernel.assign(tf.random.stateless_normal(network.layers[-1].kernel.shape, (0, 0)))

    def logits_fn(x):
        return network(x, training=False)

    alone = tf.function(lambda images: logits_fn(tf.cast(images, tf.float32) / 255.0))
    batch = tf.constant(train.images[:batch_size])

    def speed_alone(seconds=10.0):
        alone(batch).numpy()
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            alone(batch).numpy()
            count += batch_size
        return count / (time.perf_counter() - started)

    before = speed_alone()
    pool = sources.open_pool(f"tiny_images:{path}", image_shape=(32, 32, 3))
    started = time.perf_counter()
    settings = recipes.Scoring(batch_size=batch_size)
    scoring.score(
        pool, logits_fn, directory=os.path.join(workdir, "scores"), test_images=test.images, settings=settings
    )
    scored = num_images / (time.perf_counter() - started)
    after = speed_alone()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    network_alone = (before + after) / 2
    print(f"network alone {before:,.0f} and {after:,.0f} images/s, scored {scored:,.0f} images/s")
    print(f"ratio {scored / network_alone:.3f}, peak memory {peak / 2**30:.2f} GiB for {num_images:,} images")
    return network_alone, scored, peak


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


def main(values):
    run(
        num_images=values.num_images,
        workdir=values.workdir,
        dataset=values.dataset,
        data_dir=values.data_dir,
        batch_size=values.batch_size,
    )


def command():
    launcher.launch(main, define_flags, __doc__)


if __name__ == "__main__":
    command()
