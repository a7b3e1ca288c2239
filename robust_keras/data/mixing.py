"""Training batches from labelled and extra data, a pure function of (seed, step).

Every batch is computed from its step alone, so a run continues anywhere without replaying, and the same examples reach
the same step whatever the number of devices.
"""

from typing import NamedTuple

import tensorflow as tf

from robust_keras import noise
from robust_keras.data import sources


class TrainingData(NamedTuple):
    """What a run trains on, made by `training_data`.

    Attributes:
        labelled: a `sources.Source`, without the held-out images.
        validation: a `sources.Source` of held-out training images.
        extra: a `sources.Source` of pseudo-labelled images, or None.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    labelled: sources.Source
    validation: sources.Source
    extra: sources.Source | None
    mean: tuple
    std: tuple


def training_data(*, dataset, num_validation, extra_data=None, data_dir=None):
    """Loads what a run trains on.

    Args:
        dataset: name of the labelled set, as `sources.load` takes it; its 'train' split is used.
        num_validation: training images held out for validation.
        extra_data: name of the extra set, as `sources.load_extra` takes it, or None.
        data_dir: where TFDS data and extra files are; None for TFDS' own default.

    Returns:
        A `TrainingData`.

    Raises:
        ValueError: for an unknown, missing or malformed set.
    """
    source = sources.load(dataset, "train", data_dir=data_dir)
    labelled, validation = sources.hold_out(source, num_validation)
    extra = None
    if extra_data is not None:
        extra = sources.load_extra(
            extra_data, data_dir=data_dir, num_classes=source.num_classes, image_shape=source.images.shape[1:]
        )
    return TrainingData(labelled, validation, extra, *sources.channel_statistics(source))


def batches(
    data,
    *,
    batch_size,
    seed,
    num_steps,
    start_step=0,
    group_size=None,
    labelled_fraction=0.5,
    label_smoothing=0.0,
    extra_label_smoothing=0.0,
    augmentation=None,
):
    """A `tf.data.Dataset` of the batches of steps start_step, ..., num_steps - 1.

    With extra data, every group of `group_size` consecutive examples (a group of `BatchNorm`) holds the same number of
    labelled examples: the nearest to `labelled_fraction`, and at least one of each kind.

    Args:
        data: a `TrainingData`.
        batch_size: examples in the batch over all replicas.
        seed: the run's seed.
        num_steps: steps of the whole run.
        start_step: the first step to produce.
        group_size: examples in a group; None for the whole batch.
        labelled_fraction: share of labelled examples, used with extra data only; the paper's 3:7 is 0.3.
        label_smoothing: s in targets of (1 - s) * one-hot + s / num_classes, of the labelled examples.
        extra_label_smoothing: the same of the extra examples.
        augmentation: `(images, seeds) -> images`, or None.

    Returns:
        A dataset of dictionaries: `image` uint8 `[batch, height, width, channels]`, `label` int32 `[batch]`, `targets`
        float32 `[batch, num_classes]`, `seeds` int32 `[batch, 2]`.

    Raises:
        ValueError: for a batch that is not a whole number of groups, an impossible split of a group, or a smoothing
            outside [0, 1].
    """
    group_size = group_size or batch_size
    if batch_size < 1 or batch_size % group_size:
        raise ValueError(
            f"Expected a batch_size that is a multiple of the group size {group_size}. Received: {batch_size}"
        )
    smoothings = (label_smoothing, extra_label_smoothing)
    if not all(0 <= smoothing <= 1 for smoothing in smoothings):
        raise ValueError(f"Expected label smoothings from 0 to 1. Received: {label_smoothing}, {extra_label_smoothing}")
    num_groups = batch_size // group_size
    parts = [(data.labelled, group_size, 0)]  # (source, examples per group, index of its first example)
    if data.extra is not None:
        if not 0 < labelled_fraction < 1 or group_size < 2:
            raise ValueError(
                "Expected a labelled_fraction between 0 and 1 and groups of 2 or more with extra data. "
                f"Received: {labelled_fraction} and {group_size}"
            )
        num_labelled = min(max(round(labelled_fraction * group_size), 1), group_size - 1)
        parts = [
            (data.labelled, num_labelled, 0),
            (data.extra, group_size - num_labelled, len(data.labelled.labels)),
        ]
    with tf.device("CPU:0"):
        images = [tf.constant(source.images) for source, _, _ in parts]
        labels = [tf.constant(source.labels, tf.int32) for source, _, _ in parts]

    num_classes = data.labelled.num_classes

    def batch(step):
        parts_of_batch = []
        for k, (source, per_group, first_index) in enumerate(parts):
            count = num_groups * per_group
            position = step * count + tf.range(count, dtype=tf.int64)
            size = len(source.labels)
            passes = position // size
            index = _shuffled(position % size, size, (seed, k, passes))
            label = tf.gather(labels[k], index)
            targets = tf.one_hot(label, num_classes) * (1 - smoothings[k]) + smoothings[k] / num_classes
            part = (tf.gather(images[k], index), label, targets, first_index + index, passes - passes[0])
            parts_of_batch.append([tf.reshape(t, (num_groups, per_group, *t.shape[1:])) for t in part])
        image, label, targets, index, copies = (
            tf.reshape(tf.concat(pieces, axis=1), (batch_size, *pieces[0].shape[2:])) for pieces in zip(*parts_of_batch)
        )
        seeds = noise.example_seeds(seed, step, index, copies)
        if augmentation is not None:
            image = augmentation(image, seeds)
        return {"image": image, "label": label, "targets": targets, "seeds": seeds}

    dataset = tf.data.Dataset.range(start_step, num_steps).map(batch, num_parallel_calls=tf.data.AUTOTUNE)
    options = tf.data.Options()
    options.deterministic = True
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return dataset.with_options(options).prefetch(tf.data.AUTOTUNE)


def _shuffled(position, size, key):
    """Where the permutation that the three numbers of `key` name takes each position: int64 `[n]`, in [0, size)."""
    key = tf.stack([tf.zeros_like(position) + tf.cast(part, tf.int64) for part in key], axis=-1)
    # The op itself: `tf.random.experimental.index_shuffle` takes no seed per index, and its four rounds mix small sets
    # badly.
    max_index = tf.constant(size - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=position, seed=key, max_index=max_index, rounds=24)
