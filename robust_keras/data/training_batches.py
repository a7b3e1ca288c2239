"""Training batches from labelled and extra data, a pure function of (seed, step).

Every batch is computed from its step alone, so a run continues anywhere without replaying, and the same examples reach
the same step whatever the number of devices and hosts.
"""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import noise
from robust_keras.data import sources
from robust_keras.data.readers import views
from robust_keras.data.readers.pipelines import read_ahead

_BUFFER_BYTES = 1 << 29  # Of batches that are made ahead of time.


class TrainingData(NamedTuple):
    """What a run trains on, made by `training_data`.

    Attributes:
        labelled: a `sources.Source`, without the held-out images. Where they are larger than `image_shape`, an
            augmentation such as `random_resized_crop` makes images of that size of them.
        validation: a `sources.Source` of held-out training images.
        extra: a `sources.Source` of pseudo-labelled images, which may lie on disk, or None.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
    """

    labelled: sources.Source
    validation: sources.Source
    extra: sources.Source | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple:
        """(height, width, channels) of the images that a network is given."""
        return tuple(self.validation.images.shape[1:])


def training_data(
    *,
    dataset: str,
    num_validation: int,
    extra_data: str | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
    image_size: int | None = None,
    short_side: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> TrainingData:
    """Loads what a run trains on.

    Args:
        dataset: name of the labelled set, as `sources.load` takes it; its 'train' split is used.
        num_validation: training images held out for validation.
        extra_data: name of the extra set, as `sources.load_extra` takes it, or None.
        data_dir: where TFDS data and extra files are; None for TFDS' own default.
        cache_dir: where data that cannot be mapped into memory as it is gets a copy that can; None for beside it.
        image_size: see `sources.load`; extra images are resized alike.
        short_side: see there. More than `image_size` leaves something at the edges for `random_resized_crop`.
        mean: per channel, what networks take off pixels in [0, 1]; None for `sources.channel_statistics`.
        std: per channel, what they then divide by; given where `mean` is.

    Returns:
        A `TrainingData`.

    Raises:
        ValueError: for an unknown, missing or malformed set, and for a mean and std that do not fit its channels.
    """
    sources.check_sizes(image_size, short_side)
    side = short_side or image_size
    source = sources.load(dataset, "train", data_dir=data_dir, image_size=side, cache_dir=cache_dir)
    labelled, validation = sources.hold_out(source, num_validation)
    validation = validation._replace(images=views.middle(validation.images, image_size))
    extra = None
    if extra_data is not None:
        extra = sources.load_extra(
            extra_data,
            data_dir=data_dir,
            num_classes=source.num_classes,
            image_shape=source.images.shape[1:],
            dataset=dataset,
            cache_dir=cache_dir,
            resized=side is not None,
        )
    return TrainingData(labelled, validation, extra, *_normalisation(source, mean, std))


def _normalisation(source, mean, std):
    if mean is None and std is None:
        return sources.channel_statistics(source)
    num_channels = source.images.shape[-1]
    given = [each if isinstance(each, (tuple, list)) else () for each in (mean, std)]
    are_numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for each in given for value in each)
    if [len(each) for each in given] != [num_channels] * 2 or not are_numbers or min(given[1]) <= 0:
        raise ValueError(
            f"Expected a mean and a std > 0 for each of the {num_channels} channels of {source.name!r}, or neither. "
            f"Received: {mean} and {std}"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def reading(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What `sources.load` takes of the settings of `training_data`, to read the labelled set alone in the same way."""
    return {name: settings[name] for name in ("image_size", "short_side", "cache_dir") if name in settings}


def batches(
    data: TrainingData,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    group_size: int | None = None,
    labelled_fraction: float = 0.5,
    num_repeats: int = 1,
    label_smoothing: float = 0.0,
    extra_label_smoothing: float = 0.0,
    augmentation: Callable | None = None,
    mix: Callable | None = None,
    num_hosts: int = 1,
    host: int = 0,
) -> tf.data.Dataset:
    """The batches of steps start_step, ..., num_steps - 1.

    With extra data, every group of `group_size` consecutive examples (a group of `BatchNorm`) holds the same number of
    labelled examples: the nearest to `labelled_fraction`, and at least one of each kind. Lengths are in steps; an
    epoch, as the paper counts, is 50,000 images of either kind.

    Args:
        data: a `TrainingData`.
        batch_size: examples in the batch over all replicas and hosts.
        seed: the run's seed.
        num_steps: steps of the whole run.
        start_step: the first step to produce.
        group_size: examples in a group; None for the whole batch.
        labelled_fraction: share of labelled examples, used with extra data only; the paper's 3:7 is 0.3.
        num_repeats: how often a group holds each of its labelled images, each time augmented differently (Fort et al.
            2021); 4 in the authors' later code, where extra images come once all the same. Labelled examples of a group
            are then a multiple of it.
        label_smoothing: s in targets of (1 - s) * one-hot + s / num_classes, of the labelled examples.
        extra_label_smoothing: the same of the extra examples.
        augmentation: `(images, seeds) -> images`, or None.
        mix: `(images, targets, seeds) -> (images, targets)` on groups, such as `cutmix`, or None. Attacks should then
            move away from the 'targets'.
        num_hosts: how many hosts read the batch, each its own groups of it.
        host: which of them this is, from 0.

    Returns:
        A dataset of dictionaries, as `_batch` makes them, of batch_size / num_hosts examples.

    Raises:
        ValueError: for a batch that is not a whole number of groups for each host, an impossible split of a group, a
            smoothing outside [0, 1], data that are no bytes or have labels that are no integers, or another image size
            than that of the held-out ones.
    """
    groups = _Groups(batch_size, group_size or batch_size, num_repeats, num_hosts, host)
    smoothings = label_smoothing, extra_label_smoothing
    _check(groups, labelled_fraction, smoothings)
    make = functools.partial(_batch, groups, _parts(data, groups, labelled_fraction, smoothings), seed)
    steps = tf.data.Dataset.range(start_step, num_steps)
    at_once = _BUFFER_BYTES // (batch_size // num_hosts * math.prod(data.image_shape))
    at_once = max(1, min(at_once, os.cpu_count() or 1))
    return _dataset(steps.map(_traced(make, augmentation, mix), at_once), data.image_shape)


def _traced(make: Callable, *functions: Callable | None) -> Callable:
    """`(step) -> make(*functions, step)`. Python's control flow, whose conversion takes longer than all other tracing,
    is converted where there are functions that are not the package's.
    """
    modules = [getattr(getattr(each, "func", each), "__module__", "") for each in functions if each is not None]
    make = functools.partial(make, *functions)
    if all(module.startswith(f"{__package__}.") for module in modules):
        return tf.autograph.experimental.do_not_convert(make)
    return make


class _Groups(NamedTuple):
    """How a batch is cut into groups, and which of them a host reads.

    Attributes:
        batch_size: examples over all replicas and hosts.
        group_size: examples in a group.
        num_repeats: how often a group holds each of its labelled images.
        num_hosts: how many hosts read the batch.
        host: which of them this is, from 0.
    """

    batch_size: int
    group_size: int
    num_repeats: int
    num_hosts: int
    host: int

    @property
    def num_groups(self) -> int:
        """Groups of the whole batch."""
        return self.batch_size // self.group_size

    def mine(self) -> tf.Tensor:
        """The numbers of this host's groups, int64."""
        first, end = (k * self.num_groups // self.num_hosts for k in (self.host, self.host + 1))
        return tf.range(first, end, dtype=tf.int64)


class _Part(NamedTuple):
    """One kind of examples: its number, source, place in a group, and what is done to it.

    Attributes:
        number: 0 for labelled, 1 for extra examples.
        source: a `sources.Source`.
        per_group: examples of it in a group.
        num_repeats: how often it repeats each.
        first_index: index of its first image among those of both kinds.
        smoothing: of its labels.
    """

    number: int
    source: sources.Source
    per_group: int
    num_repeats: int
    first_index: int
    smoothing: float


def cutmix(images: tf.Tensor, targets: tf.Tensor, seeds: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Pastes a box of another image of the group into each, and mixes the targets by its area (Yun et al. 2019).

    As in the code that the paper's authors released: alpha = beta = 1, and a group has one box, one share and one
    permutation, which the copies of a repeated image have in common.

    Args:
        images: `[groups, examples, copies, height, width, channels]`.
        targets: float32 `[groups, examples, copies, num_classes]`.
        seeds: int32 `[groups, 2]`.

    Returns:
        (images, targets) like those given.
    """
    num_examples, (height, width) = images.shape[1], images.shape[3:5]
    # The side of the box before it is cut off at the edges: an area of 1 - lambda, lambda uniform.
    scale = tf.sqrt(1.0 - noise.uniform(noise.fold_in(seeds, 0), ()))

    def inside(size, number):
        """Which of `size` rows or columns the boxes cover: bool `[groups, size]`."""
        center = noise.integers(noise.fold_in(seeds, number), 1, size)
        half = tf.cast(size * scale, tf.int32)[:, None] // 2
        return (tf.range(size) >= center - half) & (tf.range(size) < center + half)

    box = inside(height, 1)[:, :, None] & inside(width, 2)[:, None, :]
    order = tf.argsort(tf.bitcast(noise.bits(noise.fold_in(seeds, 3), num_examples), tf.int32), stable=True)
    share = tf.reduce_mean(tf.cast(box, tf.float32), axis=(1, 2))[:, None, None, None]
    images = tf.where(box[:, None, None, :, :, None], tf.gather(images, order, batch_dims=1), images)
    return images, targets * (1.0 - share) + tf.gather(targets, order, batch_dims=1) * share


def _check(groups: _Groups, labelled_fraction: float, smoothings: tuple[float, float]) -> None:
    """Refuses numbers that are none, or do not fit one another."""
    batch_size, group_size, num_repeats, num_hosts, host = groups
    counts, shares = (batch_size, group_size, num_repeats), (labelled_fraction, *smoothings)
    if not all(isinstance(n, int) for n in counts) or not all(isinstance(x, (int, float)) for x in shares):
        raise ValueError(
            "Expected integers as batch_size, group_size and num_repeats, and numbers as labelled_fraction, "
            f"label_smoothing and extra_label_smoothing. Received: {(*counts, *shares)}"
        )
    if batch_size < 1 or batch_size % (group_size * num_hosts):
        of_hosts = f" times the {num_hosts} hosts" if num_hosts > 1 else ""
        raise ValueError(
            f"Expected a batch_size that is a multiple of the group size {group_size}{of_hosts}. Received: {batch_size}"
        )
    if not 0 <= host < num_hosts:
        raise ValueError(f"Expected a host from 0 to {num_hosts - 1}. Received: {host}")
    if not all(0 <= smoothing <= 1 for smoothing in smoothings):
        raise ValueError(f"Expected label smoothings from 0 to 1. Received: {', '.join(map(str, smoothings))}")
    if num_repeats < 1 or group_size % num_repeats:
        raise ValueError(f"Expected a num_repeats that divides the group size {group_size}. Received: {num_repeats}")


def _parts(
    data: TrainingData, groups: _Groups, labelled_fraction: float, smoothings: tuple[float, float]
) -> list[_Part]:
    """The kinds of examples of a group, in their order in it."""
    group_size, num_repeats = groups.group_size, groups.num_repeats
    sources.check(data.labelled)
    if data.extra is None:
        return [_Part(0, data.labelled, group_size, num_repeats, 0, smoothings[0])]
    sources.check(data.extra)
    num_labelled = _split(group_size, labelled_fraction, num_repeats)
    return [
        _Part(0, data.labelled, num_labelled, num_repeats, 0, smoothings[0]),
        _Part(1, data.extra, group_size - num_labelled, 1, len(data.labelled.labels), smoothings[1]),
    ]


def _split(group_size: int, labelled_fraction: float, multiple: int) -> int:
    """The labelled examples of a group: the nearest multiple to a fraction of it, and some of each kind."""
    num_units = group_size // multiple
    if not 0 < labelled_fraction < 1 or num_units < 2:
        raise ValueError(
            f"Expected a labelled_fraction between 0 and 1 and groups of {2 * multiple} or more with extra data. "
            f"Received: {labelled_fraction} and {group_size}"
        )
    return multiple * min(max(round(labelled_fraction * num_units), 1), num_units - 1)


def _batch(
    groups: _Groups,
    parts: list[_Part],
    seed: int,
    augmentation: Callable | None,
    mix: Callable | None,
    step: tf.Tensor,
) -> dict[str, tf.Tensor]:
    """A host's part of the batch of a step.

    Returns:
        A dictionary: `image` uint8 `[batch, height, width, channels]`, `label` int32 `[batch]`, `targets` float32
        `[batch, num_classes]`, `seeds` int32 `[batch, 2]`, `is_labelled` int32 `[batch]`, 0 or 1.
    """
    mine, num_classes = groups.mine(), parts[0].source.num_classes
    grouped = []
    for part in parts:
        flat = _examples(part, step, mine, groups.num_groups, seed, num_classes)
        grouped.append([tf.reshape(t, (mine.shape[0], part.per_group, *t.shape[1:])) for t in flat])
    image, label, targets, index, copies, is_labelled = (
        tf.reshape(tf.concat(pieces, axis=1), (-1, *pieces[0].shape[2:])) for pieces in zip(*grouped)
    )
    seeds = noise.example_seeds(seed, step, index, copies)
    if augmentation is not None:
        image = augmentation(image, seeds)
    if mix is not None:
        group_seeds = noise.fold_in(noise.example_seeds(seed, step, mine), noise.MIXING)
        # Each copy of a labelled image meets the same copy of another.
        both = [tf.reshape(t, (mine.shape[0], -1, groups.num_repeats, *t.shape[1:])) for t in (image, targets)]
        image, targets = (tf.reshape(t, (-1, *t.shape[3:])) for t in mix(*both, group_seeds))
    return {"image": image, "label": label, "targets": targets, "seeds": seeds, "is_labelled": is_labelled}


def _examples(
    part: _Part, step: tf.Tensor, mine: tf.Tensor, num_groups: int, seed: int, num_classes: int
) -> tuple[tf.Tensor, ...]:
    """The examples of a part in the groups `mine`: image, label, targets, index, copy and whether they are labelled."""
    size, count = len(part.source.labels), part.per_group // part.num_repeats
    first = step * num_groups * count
    position = first + mine[:, None] * count + tf.range(count, dtype=tf.int64)
    position = tf.reshape(tf.repeat(position, part.num_repeats, axis=1), (-1,))
    passes = position // size
    index = _shuffled(position % size, size, (seed, part.number, passes))
    copies = (passes - first // size) * part.num_repeats
    copies += tf.tile(tf.range(part.num_repeats, dtype=tf.int64), [mine.shape[0] * count])
    image, label = _read(part.source, index)
    targets = tf.one_hot(label, num_classes) * (1 - part.smoothing) + part.smoothing / num_classes
    return image, label, targets, part.first_index + index, copies, tf.fill(tf.shape(index), int(part.number == 0))


def _read(source: sources.Source, index: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Images uint8 and labels int32 of a `Source` at `index`; it may lie on disk."""

    def read(index):
        return np.ascontiguousarray(source.images[index]), source.labels[index].astype(np.int32)

    image, label = tf.numpy_function(read, [index], (tf.uint8, tf.int32))
    return tf.ensure_shape(image, (*index.shape, *source.images.shape[1:])), tf.ensure_shape(label, index.shape)


def _shuffled(position: tf.Tensor, size: int, key: tuple) -> tf.Tensor:
    """Where the permutation that the three numbers of `key` name takes each position: int64 `[n]`, in [0, size)."""
    key = tf.stack([tf.zeros_like(position) + tf.cast(part, tf.int64) for part in key], axis=-1)
    # The op itself: `tf.random.experimental.index_shuffle` takes no seed per index, and its four rounds mix small sets
    # badly.
    max_index = tf.constant(size - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=position, seed=key, max_index=max_index, rounds=24)


def _dataset(dataset: tf.data.Dataset, image_shape: tuple) -> tf.data.Dataset:
    """Batches of images of a shape, made ahead of time, the same on every host."""
    if (shape := tuple(dataset.element_spec["image"].shape[1:])) != image_shape:
        raise ValueError(
            f"Expected an augmentation that makes images of {image_shape}, such as random_resized_crop, where "
            f"short_side is larger than image_size. Received: {shape}"
        )
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return read_ahead(dataset.with_options(options))
