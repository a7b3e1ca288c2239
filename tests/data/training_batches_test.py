import functools
import gc
import pickle

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import noise
from robust_keras.data import sources, training_batches
from robust_keras.data.augmentation import crop_and_flip, random_resized_crop
from robust_keras.data.readers import views
from robust_keras.pseudo_labelling import record_sets
from tests import warm_processes

EXTRA_SHADE = 200


def source(num, num_classes=7, shade=0):
    """Each image holds its index in two pixels, and what kind of data it is in the third; a label tells it too."""
    images = np.zeros((num, 1, 3, 1), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = np.divmod(np.arange(num), 256)
    images[:, 0, 2, 0] = shade
    labels = ((3 * np.arange(num) + (shade > 0)) % num_classes).astype(np.int32)
    return sources.Source("made", images, labels, num_classes)


def training_data(num_labelled, num_extra=None):
    labelled = source(num_labelled)
    extra = num_extra and source(num_extra, shade=EXTRA_SHADE)
    return training_batches.TrainingData(labelled, source(1), extra, (0.5,), (1.0,))


def stream(data, **options):
    """All batches as arrays [steps, batch, ...], with `index` and `is_extra` read off the images."""
    collected = [tf.nest.map_structure(np.asarray, batch) for batch in training_batches.batches(data, **options)]
    stacked = {name: np.stack([batch[name] for batch in collected]) for name in collected[0]}
    pixels = stacked["image"][..., 0, :, 0].astype(int)
    return {**stacked, "index": 256 * pixels[..., 0] + pixels[..., 1], "is_extra": pixels[..., 2] == EXTRA_SHADE}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_every_pass_is_a_permutation_and_each_is_another():
    # Neither set is a whole number of batches: 5 and 3 examples a step, of 12 and 7.
    data = training_data(12, 7)
    batches = stream(data, batch_size=8, seed=1, num_steps=24, labelled_fraction=0.625)
    for is_extra, size in ((False, 12), (True, 7)):
        indices = batches["index"][batches["is_extra"] == is_extra]
        num_passes = len(indices) // size
        assert num_passes == 10
        passes = indices[: num_passes * size].reshape(num_passes, size)
        np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(size), (num_passes, 1)))
        assert len(np.unique(passes, axis=0)) == num_passes
        assert not np.array_equal(passes[0], np.arange(size))


@pytest.mark.parametrize("size", [600, 50000])
def test_order_is_neither_the_files_nor_that_of_the_pass_before(size):
    order = stream(training_data(size), batch_size=size // 10, seed=0, num_steps=20)["index"].reshape(2, size)
    limit = 4 / size**0.5  # Four standard deviations of a correlation.
    for one in order:
        assert abs(np.corrcoef(np.arange(size), one)[0, 1]) < limit
        # Neighbours in the file are seldom neighbours in a pass.
        assert np.mean(np.abs(np.diff(one)) <= 2) < 4 / size + 4 * (4 / size / size) ** 0.5
    assert abs(np.corrcoef(*order)[0, 1]) < limit


def test_one_kind_of_data_without_extra_data():
    data = training_data(10)
    batches = stream(data, batch_size=4, seed=0, num_steps=5, group_size=2, labelled_fraction=0.01)
    assert not batches["is_extra"].any()
    np.testing.assert_array_equal(np.sort(batches["index"].ravel()[:10]), np.arange(10))
    np.testing.assert_array_equal(np.sort(batches["index"].ravel()[10:]), np.arange(10))


def test_specification():
    data = training_data(10, 10)
    dataset = training_batches.batches(data, batch_size=4, seed=0, num_steps=3)
    assert dataset.element_spec == {
        "image": tf.TensorSpec((4, 1, 3, 1), tf.uint8),
        "label": tf.TensorSpec((4,), tf.int32),
        "targets": tf.TensorSpec((4, 7), tf.float32),
        "seeds": tf.TensorSpec((4, 2), tf.int32),
        "is_labelled": tf.TensorSpec((4,), tf.int32),
    }
    assert int(dataset.cardinality()) == 3


def test_labels_and_targets_belong_to_the_images():
    data = training_data(30, 40)
    batches = stream(data, batch_size=10, seed=3, num_steps=8)
    labels = np.where(
        batches["is_extra"], data.extra.labels[batches["index"] % 40], data.labelled.labels[batches["index"] % 30]
    )
    assert len(np.unique(labels)) == 7
    np.testing.assert_array_equal(batches["label"], labels)
    np.testing.assert_array_equal(batches["targets"], np.eye(7, dtype=np.float32)[labels])


def test_labels_are_smoothed_for_each_kind_of_data():
    batches = stream(
        training_data(12, 7), batch_size=8, seed=1, num_steps=3, label_smoothing=0.35, extra_label_smoothing=0.7
    )
    one_hot = np.eye(7)[batches["label"]]
    # (1 - s) * one-hot + s / 7.
    expected = np.where(batches["is_extra"][..., None], 0.3 * one_hot + 0.1, 0.65 * one_hot + 0.05)
    np.testing.assert_allclose(batches["targets"], expected, atol=1e-7)


def test_a_later_start_gives_the_tail():
    data = training_data(13, 11)
    options = dict(batch_size=8, seed=2, num_steps=20, group_size=4, augmentation=augment)
    full = stream(data, **options)
    assert len(full["label"]) == 20
    for start_step in (1, 7, 19):
        tail = stream(data, start_step=start_step, **options)
        assert_same(tail, {name: array[start_step:] for name, array in full.items()})


def test_a_finished_run_has_no_more_batches():
    assert list(training_batches.batches(training_data(5), batch_size=2, seed=0, num_steps=4, start_step=4)) == []


def test_the_length_of_the_run_changes_no_batch():
    short, long = (stream(training_data(13, 11), batch_size=4, seed=0, num_steps=n) for n in (3, 9))
    assert_same(short, {name: array[:3] for name, array in long.items()})


def test_same_again_and_other_with_another_seed():
    data = training_data(50, 50)
    options = dict(batch_size=10, num_steps=10)
    first = stream(data, seed=5, **options)
    assert_same(first, stream(data, seed=5, **options))
    other = stream(data, seed=6, **options)
    for is_extra in (False, True):
        indices = [batches["index"][batches["is_extra"] == is_extra] for batches in (first, other)]
        assert np.mean(indices[0] != indices[1]) > 0.8
    assert not np.any((first["seeds"] == other["seeds"]).all(-1))
    # The two kinds of data are not shuffled alike.
    assert np.mean(first["index"][first["is_extra"]] != first["index"][~first["is_extra"]]) > 0.8


@pytest.mark.parametrize(
    "fraction, group_size, num_labelled",
    [(0.5, 4, 2), (0.3, 32, 10), (0.01, 8, 1), (0.99, 8, 7), (0.3, 2, 1), (0.7, 10, 7)],
)
def test_split_of_every_group(fraction, group_size, num_labelled):
    batches = stream(
        training_data(300, 500),
        batch_size=3 * group_size,
        seed=0,
        num_steps=4,
        group_size=group_size,
        labelled_fraction=fraction,
    )
    groups = batches["is_extra"].reshape(4 * 3, group_size)
    expected = np.arange(group_size) >= num_labelled  # In each, labelled examples come first.
    np.testing.assert_array_equal(groups, np.tile(expected, (12, 1)))
    np.testing.assert_array_equal(batches["is_labelled"], 1 - batches["is_extra"])


def test_whole_batch_is_the_group_by_default():
    batches = stream(training_data(30, 30), batch_size=10, seed=0, num_steps=2, labelled_fraction=0.3)
    np.testing.assert_array_equal(batches["is_extra"], [[False] * 3 + [True] * 7] * 2)


def test_seeds_are_those_of_run_step_and_index():
    data = training_data(30, 40)
    batches = stream(data, batch_size=10, seed=11, num_steps=6, start_step=2)
    for k in range(4):
        # Extra images are counted on from the labelled ones.
        index = batches["index"][k] + 30 * batches["is_extra"][k]
        expected = noise.example_seeds(11, 2 + k, tf.constant(index, tf.int64))
        np.testing.assert_array_equal(batches["seeds"][k], expected)


def test_seeds_are_unique():
    batches = stream(training_data(40, 40), batch_size=20, seed=0, num_steps=40)
    # Ten of each kind a step, forty of each kind: no batch crosses into the next pass.
    assert len(np.unique(batches["seeds"].reshape(-1, 2), axis=0)) == 20 * 40


def test_seeds_are_unique_where_a_batch_reaches_into_the_next_pass():
    batches = stream(training_data(7), batch_size=5, seed=0, num_steps=20)
    assert any(len(set(index)) < 5 for index in batches["index"])
    assert all(len(np.unique(seeds, axis=0)) == 5 for seeds in batches["seeds"])


def augment(images, seeds):
    """Adds to the pixel that nothing is read from."""
    return images + tf.pad(tf.cast(seeds[:, :1] & 15, tf.uint8), [[0, 0], [2, 0]])[:, None, :, None]


def test_augmentation_takes_images_and_seeds():
    data = training_data(20, 20)
    options = dict(batch_size=4, seed=0, num_steps=5)
    plain, augmented = stream(data, **options), stream(data, augmentation=augment, **options)
    expected = plain["image"].copy()
    expected[..., 0, 2, 0] += (plain["seeds"][..., 0] & 15).astype(np.uint8)
    assert np.any(expected != plain["image"])
    np.testing.assert_array_equal(augmented["image"], expected)
    for name in ("label", "targets", "seeds"):
        np.testing.assert_array_equal(augmented[name], plain[name])


def test_control_flow_of_ones_own_augmentation_is_converted():
    def own(images, seeds):
        if tf.reduce_sum(seeds) == tf.reduce_sum(seeds):  # Of a tensor, which Python cannot tell.
            images = 255 - images
        return images

    plain, inverted = (
        next(training_batches.batches(training_data(8), batch_size=4, seed=1, num_steps=1, **more).as_numpy_iterator())
        for more in ({}, {"augmentation": functools.partial(own)})
    )
    np.testing.assert_array_equal(inverted["image"], 255 - plain["image"])


def test_crops_of_the_papers_augmentation():
    digits = np.random.default_rng(0).integers(1, 256, (20, 8, 8, 1)).astype(np.uint8)
    labelled = sources.Source("made", digits, np.arange(20, dtype=np.int32), 20)
    data = training_batches.TrainingData(labelled, labelled, None, (0.5,), (1.0,))
    (batch,) = training_batches.batches(data, batch_size=6, seed=0, num_steps=1, augmentation=crop_and_flip)
    chosen = tf.gather(digits, batch["label"])
    np.testing.assert_array_equal(batch["image"], crop_and_flip(chosen, batch["seeds"]))
    assert np.any(batch["image"] != chosen)


FOUR_GROUPS = dict(batch_size=128, seed=2, num_steps=3, group_size=32, labelled_fraction=0.3)


def keep_what_four_get(path):
    """What four replicas get, from a process which has four devices."""
    devices = [tf.config.LogicalDeviceConfiguration()] * 4
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{k}" for k in range(4)])
    dataset = training_batches.batches(training_data(300, 700), **FOUR_GROUPS)
    kept = {}
    for step, batch in enumerate(strategy.experimental_distribute_dataset(dataset)):
        for name, value in batch.items():
            for replica, part in enumerate(strategy.experimental_local_results(value)):
                kept[f"{name}/{step}/{replica}"] = part.numpy()
    np.savez(path, **kept)


@pytest.fixture
def distributed(mirrored):
    """`(dataset) -> distributed dataset` over two replicas; freed soon, while threads that tune it sleep but briefly."""
    yield mirrored.experimental_distribute_dataset
    gc.collect()


def test_every_group_holds_its_share_of_the_same_examples_on_one_two_and_four_replicas(mirrored, distributed, tmp_path):
    full = stream(training_data(300, 700), **FOUR_GROUPS)
    on_two = distributed(training_batches.batches(training_data(300, 700), **FOUR_GROUPS))
    path, log = tmp_path / "four.npz", tmp_path / "log.txt"
    process = warm_processes.Popen(keep_what_four_get, log=log, path=path)
    assert process.wait(timeout=240) == 0, log.read_text()
    with np.load(path) as on_four:
        for step, batch in enumerate(on_two):
            for name, value in batch.items():
                halves = [part.numpy() for part in mirrored.experimental_local_results(value)]
                quarters = [on_four[f"{name}/{step}/{replica}"] for replica in range(4)]
                assert [len(part) for part in halves] == [64, 64] and [len(part) for part in quarters] == [32] * 4
                for parts in (halves, quarters):
                    np.testing.assert_array_equal(np.concatenate(parts), full[name][step], err_msg=name)
        shares = [on_four[f"is_labelled/{step}/{replica}"].sum() for step in range(3) for replica in range(4)]
    assert shares == [10] * 12  # 3:7 of 32.


def test_two_replicas_get_the_batch_of_one_device(mirrored, distributed):
    data = training_data(13, 11)
    options = dict(batch_size=8, seed=2, num_steps=7, group_size=4, augmentation=augment)
    full = stream(data, **options)
    batches = list(distributed(training_batches.batches(data, **options)))
    assert len(batches) == 7
    for step, batch in enumerate(batches):
        for name in ("image", "label", "targets", "seeds"):
            halves = mirrored.experimental_local_results(batch[name])
            assert [len(half) for half in halves] == [4, 4]
            np.testing.assert_array_equal(np.concatenate(halves), full[name][step], err_msg=name)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_read_their_own_groups_of_the_same_batch(num_hosts):
    data = training_data(13, 11)
    options = dict(batch_size=16, seed=2, num_steps=9, group_size=4, num_repeats=2, augmentation=augment)
    full = stream(data, **options)
    hosts = [stream(data, num_hosts=num_hosts, host=host, **options) for host in range(num_hosts)]
    assert_same({name: np.concatenate([each[name] for each in hosts], axis=1) for name in full}, full)


class OnDisk:
    """An array that counts what is read of it."""

    def __init__(self, array):
        self._array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []

    def __len__(self):
        return len(self._array)

    def __getitem__(self, index):
        self.read += list(index)
        return self._array[index]


def test_only_what_a_batch_holds_is_read_of_extra_data():
    data = training_data(30, 40)
    options = dict(batch_size=10, seed=3, num_steps=3)
    expected = stream(data, **options)
    on_disk = OnDisk(data.extra.images), OnDisk(data.extra.labels.astype(np.uint8))
    data = data._replace(extra=data.extra._replace(images=on_disk[0], labels=on_disk[1]))
    assert_same(stream(data, **options), expected)
    for array in on_disk:
        assert sorted(array.read) == sorted(expected["index"][expected["is_extra"]])


def test_labelled_images_are_repeated_within_their_group_and_extra_ones_are_not():
    # 3:7 of 32 in multiples of 4: 8 to 24, as in the released code.
    batches = stream(
        training_data(21, 500), batch_size=64, seed=0, num_steps=20, group_size=32, labelled_fraction=0.3, num_repeats=4
    )
    groups = {name: array.reshape(40, 32, *array.shape[2:]) for name, array in batches.items()}
    np.testing.assert_array_equal(groups["is_labelled"], np.tile(np.arange(32) < 8, (40, 1)))
    copies = groups["index"][:, :8].reshape(40, 2, 4)
    np.testing.assert_array_equal(copies, np.repeat(copies[..., :1], 4, axis=-1))
    # Still each image once in a pass: 80 images are three passes and 17 more.
    assert sorted(np.bincount(copies[..., 0].ravel()))[:5] == [3, 3, 3, 3, 4]
    assert len(np.unique(batches["index"][batches["is_extra"]])) > 400
    for seeds in batches["seeds"]:
        assert len(np.unique(seeds, axis=0)) == 64


def test_seeds_of_repeated_images_are_unique_where_a_batch_reaches_into_the_next_pass():
    batches = stream(training_data(3), batch_size=12, seed=0, num_steps=20, num_repeats=2)
    assert all(len(np.unique(seeds, axis=0)) == 12 for seeds in batches["seeds"])


def group_of_images(num, copies=1, size=(16, 12), num_groups=40):
    """Constant images that hold 10 times their number and the copy's, and one-hot targets."""
    shade = (10 * np.arange(num)[:, None] + np.arange(copies)).astype(np.uint8)
    images = np.broadcast_to(shade[None, :, :, None, None, None], (num_groups, num, copies, *size, 2))
    targets = np.broadcast_to(np.eye(num, dtype=np.float32)[None, :, None], (num_groups, num, copies, num))
    return images, targets, noise.example_seeds(0, 0, tf.range(num_groups))


def test_cutmix_pastes_one_box_and_mixes_targets_by_its_area():
    images, targets, seeds = group_of_images(6, copies=3)
    mixed, mixed_targets = (np.asarray(t) for t in training_batches.cutmix(images, targets, seeds))
    assert mixed.dtype == np.uint8 and mixed.shape == images.shape
    partners_seen, boxes_seen = set(), set()
    for before, after, target in zip(images, mixed, mixed_targets):
        pasted = (before != after).any(axis=(0, 1, 4))
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns)
        assert all(np.all(np.diff(np.flatnonzero(side)) == 1) for side in (rows, columns))
        boxes_seen.add((tuple(rows), tuple(columns)))
        if not pasted.any():
            np.testing.assert_array_equal(target, targets[0])
            continue
        inside, outside = after[:, :, pasted], after[:, :, ~pasted]
        assert (outside == before[:, :, ~pasted]).all()
        partner = inside[..., 0, 0] // 10
        # A permutation, the same for all copies, and each copy meets the same copy of the other image.
        assert sorted(partner[:, 0]) == list(range(6)) and (partner == partner[:, :1]).all()
        assert (inside == before[partner[:, 0]][:, :, pasted]).all()
        partners_seen.add(tuple(partner[:, 0]))
        area = pasted.mean()
        expected = (1 - area) * np.eye(6) + area * np.eye(6)[partner[:, 0]]
        np.testing.assert_allclose(target, np.repeat(expected[:, None], 3, axis=1), atol=1e-6)
    assert len(partners_seen) > 20 and len(boxes_seen) > 30


def test_boxes_of_cutmix_are_as_large_as_those_of_the_released_code():
    images, targets, seeds = group_of_images(2, size=(32, 32), num_groups=4000)
    mixed, mixed_targets = (np.asarray(t) for t in training_batches.cutmix(images, targets, seeds))
    areas, is_mixed = 1 - mixed_targets[:, 0, 0].max(-1), (mixed != images).any(axis=(1, 2, 3, 4, 5))
    rng = np.random.default_rng(0)

    def side():
        cut, center = (32 * np.sqrt(1 - share)).astype(int), rng.integers(0, 32, 100_000)
        return np.clip(center + cut // 2, 0, 32) - np.clip(center - cut // 2, 0, 32)

    share = rng.uniform(size=100_000)
    expected = side() * side() / 1024
    expected = np.minimum(expected, 1 - expected)  # A target's larger share is all that is seen.
    # Half of the permutations of two leave them where they are.
    assert abs(is_mixed.mean() - 0.5 * (expected > 0).mean()) < 0.04
    assert abs(areas[is_mixed].mean() - expected[expected > 0].mean()) < 4 * expected.std() / is_mixed.sum() ** 0.5


def test_cutmix_stays_within_groups_and_is_the_same_on_every_layout():
    labelled = sources.Source("a", np.full((8, 8, 8, 1), 50, np.uint8), np.zeros(8, np.int32), 2)
    extra = sources.Source("b", np.full((8, 8, 8, 1), 90, np.uint8), np.ones(8, np.int32), 2)
    data = training_batches.TrainingData(labelled, labelled, extra, (0.5,), (1.0,))
    options = dict(batch_size=16, seed=1, num_steps=12, group_size=8, num_repeats=2, mix=training_batches.cutmix)
    full = list(training_batches.batches(data, **options))
    halves = [list(training_batches.batches(data, num_hosts=2, host=host, **options)) for host in range(2)]
    boxes = set()
    for step, batch in enumerate(full):
        for name in batch:
            parts = [half[step][name] for half in halves]
            np.testing.assert_array_equal(tf.concat(parts, axis=0), batch[name], err_msg=name)
        other_pixels = np.where(batch["is_labelled"], 90, 50)[:, None, None, None] == np.asarray(batch["image"])
        share = other_pixels.mean(axis=(1, 2, 3))
        targets = np.take_along_axis(np.asarray(batch["targets"]), 1 - np.asarray(batch["label"])[:, None], axis=1)
        np.testing.assert_allclose(targets[:, 0], share, atol=1e-6)
        boxes |= {image.tobytes() for image in other_pixels}
    assert len(boxes) > 12


@pytest.mark.parametrize(
    "options, received",
    [
        ({"batch_size": 10, "group_size": 4}, "multiple of the group size 4. Received: 10"),
        ({"batch_size": 0}, "Received: 0"),
        ({"batch_size": -4, "group_size": 4}, "Received: -4"),
        ({"batch_size": 8, "labelled_fraction": 0.0}, "Received: 0.0 and 8"),
        ({"batch_size": 8, "labelled_fraction": 1.0}, "Received: 1.0 and 8"),
        ({"batch_size": 8, "labelled_fraction": float("nan")}, "Received: nan and 8"),
        ({"batch_size": 8, "group_size": 1}, "Received: 0.5 and 1"),
        ({"batch_size": 1}, "Received: 0.5 and 1"),
        ({"batch_size": 8, "num_repeats": 3}, "divides the group size 8. Received: 3"),
        ({"batch_size": 8, "num_repeats": 0}, "Received: 0"),
        ({"batch_size": 8, "num_repeats": 8}, "groups of 16 or more with extra data. Received: 0.5 and 8"),
        ({"batch_size": 12, "group_size": 4, "num_hosts": 2}, "group size 4 times the 2 hosts. Received: 12"),
        ({"batch_size": 8, "num_hosts": 2, "group_size": 4, "host": 2}, "host from 0 to 1. Received: 2"),
        ({"batch_size": 8, "label_smoothing": 1.1}, "Received: 1.1, 0.0"),
        ({"batch_size": 8, "extra_label_smoothing": -0.1}, "Received: 0.0, -0.1"),
    ],
)
def test_errors(options, received):
    with pytest.raises(ValueError, match=received):
        training_batches.batches(training_data(20, 20), seed=0, num_steps=2, **options)


def test_groups_of_one_are_fine_without_extra_data():
    batches = stream(training_data(9), batch_size=3, seed=0, num_steps=3, group_size=1)
    np.testing.assert_array_equal(np.sort(batches["index"].ravel()), np.arange(9))


def test_training_data_of_digits():
    data = training_batches.training_data(dataset="digits", num_validation=100)
    whole = sources.load("digits", "train")
    assert data.extra is None
    assert len(data.validation.labels) == 100 and len(data.labelled.labels) == len(whole.labels) - 100 == 1337
    held_out = np.sort(np.random.RandomState(0).permutation(1437)[:100])
    np.testing.assert_array_equal(data.validation.images, whole.images[held_out])
    np.testing.assert_array_equal(data.validation.labels, whole.labels[held_out])
    np.testing.assert_array_equal(data.labelled.images, np.delete(whole.images, held_out, axis=0))
    np.testing.assert_array_equal(data.labelled.labels, np.delete(whole.labels, held_out))
    # Of the whole set, whatever is held out.
    np.testing.assert_allclose(data.mean, whole.images.mean((0, 1, 2)) / 255, atol=1e-4)
    np.testing.assert_allclose(data.std, whole.images.std((0, 1, 2)) / 255, atol=1e-4)


def test_training_data_with_extra_data(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    path = str(tmp_path / "extra.npz")
    np.savez(path, image=images, label=np.arange(5))
    data = training_batches.training_data(dataset="digits", num_validation=7, extra_data=f"npz:{path}")
    np.testing.assert_array_equal(data.extra.images, images)
    assert data.extra.num_classes == data.labelled.num_classes == 10 and len(data.validation.labels) == 7
    np.savez(path, image=images[:, :16, :16], label=np.arange(5))
    with pytest.raises(ValueError, match="32, 32, 3"):
        training_batches.training_data(dataset="digits", num_validation=7, extra_data=f"npz:{path}")


def extra_data(kind, folder, images, labels):
    """The name of extra data of a kind, which is made now."""
    if kind == "npz":
        np.savez(folder / "extra", image=images, label=labels)
    elif kind == "ddpm":
        np.savez_compressed(folder / "extra", image=images, label=labels)
    elif kind == "carmon":
        content = {"data": images, "extrapolated_targets": labels}
        (folder / "extra.npz").write_bytes(pickle.dumps(content, protocol=2))
    elif kind == "images":
        for k, (image, label) in enumerate(zip(images, labels)):
            (folder / "extra.npz" / f"class{label}").mkdir(parents=True, exist_ok=True)
            (folder / "extra.npz" / f"class{label}" / f"{k:03d}.png").write_bytes(tf.io.encode_png(image).numpy())
    elif kind == "tfrecord":
        scores, crc32 = np.zeros(len(images), np.float32), record_sets.checksums(images)
        chosen = record_sets.Chosen(np.arange(len(images)), labels, scores, crc32)
        record_sets.write_set(images, chosen, str(folder), manifest={}, images_per_part=9)
        return f"tfrecord:{folder}/*.tfrecord"
    return f"{kind}:{folder}/extra.npz"


@pytest.mark.parametrize("kind", ["npz", "ddpm", "carmon", "images", "tfrecord"])
def test_first_batches_of_every_source_hold_the_right_pixels(tmp_path, kind):
    images = np.random.default_rng(3).integers(0, 256, (25, 32, 32, 3)).astype(np.uint8)
    labels = np.sort(np.arange(25) % 10)  # Class by class, as images lie in folders.
    name = extra_data(kind, tmp_path, images, labels)
    data = training_batches.training_data(dataset="digits", num_validation=7, extra_data=name)
    seen = set()
    for batch in training_batches.batches(
        data, batch_size=16, group_size=8, labelled_fraction=0.3, seed=0, num_steps=3
    ):
        groups = np.asarray(batch["is_labelled"]).reshape(2, 8)
        assert (groups.sum(axis=1) == 2).all()
        for image, label in zip(
            np.asarray(batch["image"])[groups.ravel() == 0], np.asarray(batch["label"])[groups.ravel() == 0]
        ):
            (place,) = np.flatnonzero((images == image).all(axis=(1, 2, 3)))
            assert labels[place] == label
            seen.add(place)
    assert len(seen) == 25  # 36 of 25: each once before any a second time.


@pytest.mark.parametrize(
    "options, match",
    [
        ({"dataset": "digits", "num_validation": 1437}, "1437"),
        ({"dataset": "Not a set", "num_validation": 1}, "Not a set"),
        ({"dataset": "digits", "num_validation": 1, "extra_data": "digits"}, "Received: 'digits'"),
    ],
)
def test_training_data_errors(options, match):
    with pytest.raises(ValueError, match=match):
        training_batches.training_data(**options)


# Labelled sets on disk.


def test_labelled_images_on_disk_are_those_in_memory(tmp_path):
    """The order depends on the seed alone, and no more is read than what a batch holds."""
    data = training_data(30, 40)
    options = dict(batch_size=10, seed=3, num_steps=3)
    expected = stream(data, **options)
    on_disk = OnDisk(data.labelled.images)
    labelled = data.labelled._replace(images=views.Selected(on_disk, np.arange(30)))
    assert_same(stream(data._replace(labelled=labelled), **options), expected)
    assert sorted(on_disk.read) == sorted(expected["index"][~expected["is_extra"]])


def write_folder(folder, num, classes=3, side=12):
    for k in range(num):
        path = folder / str(k % classes) / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.RandomState(k).randint(0, 256, (side + k % 3, side + k % 2, 3)).astype(np.uint8)
        path.write_bytes(tf.io.encode_png(image).numpy())


def test_a_folder_of_images_that_differ_in_size(tmp_path):
    write_folder(tmp_path / "set", 30)
    write_folder(tmp_path / "extra", 20, side=9)
    settings = dict(dataset=f"images:{tmp_path / 'set'}", extra_data=f"images:{tmp_path / 'extra'}", num_validation=6)
    data = training_batches.training_data(**settings, image_size=8, short_side=10)
    assert data.labelled.images.shape == (24, 10, 10, 3) and data.extra.images.shape == (20, 10, 10, 3)
    assert data.validation.images.shape == (6, 8, 8, 3) and data.image_shape == (8, 8, 3)
    assert all(0.4 < mean < 0.6 for mean in data.mean) and data.labelled.num_classes == 3

    def batch(augmentation, **options):
        options = dict(batch_size=8, group_size=4, num_steps=2, augmentation=augmentation) | options
        return [tf.nest.map_structure(np.asarray, each) for each in training_batches.batches(data, **options)]

    cropped = functools.partial(random_resized_crop, size=8)
    whole = batch(cropped, seed=0)
    assert whole[0]["image"].shape == (8, 8, 8, 3)
    hosts = [batch(cropped, seed=0, num_hosts=2, host=host) for host in (0, 1)]
    for step in range(2):
        assert_same({name: np.concatenate([each[step][name] for each in hosts]) for name in whole[step]}, whole[step])
    (later,) = batch(cropped, seed=0, start_step=1)
    assert_same(later, whole[1])
    assert not np.array_equal(batch(cropped, seed=1)[0]["label"], whole[0]["label"])
    for augmentation in (None, crop_and_flip):
        match = r"augmentation that makes images of \(8, 8, 3\), such as random_resized_crop.*Received: \(10, 10, 3\)"
        with pytest.raises(ValueError, match=match):
            batch(augmentation, seed=0)

    same_size = training_batches.training_data(**settings, image_size=8)
    assert same_size.labelled.images.shape[1:] == same_size.image_shape == (8, 8, 3)
    with pytest.raises(ValueError, match="image_size up to the short_side"):
        training_batches.training_data(**settings, short_side=10)


def test_no_thread_tunes_the_pipeline():
    # Freeing an iterator waits for that thread, which sleeps for up to a minute.
    options = training_batches.batches(training_data(300), **FOUR_GROUPS).options()
    assert options.autotune.enabled is False and options.deterministic is True
    assert options.experimental_distribute.auto_shard_policy == tf.data.experimental.AutoShardPolicy.OFF
