import errno
import hashlib
import json
import os
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.data import sources
from robust_keras.pseudo_labelling import chunks, duplicates, record_sets, scoring, selection
from robust_keras.pseudo_labelling.recipes import Scoring, Share

NUM_CLASSES = 4
SHAPE = (8, 8, 3)


def smooth(num, seed):
    """Images with structure, of which no two are alike."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (num, 4, 4, 3))
    return np.rint(tf.image.resize(coarse, SHAPE[:2]).numpy()).astype(np.uint8)


TEST = smooth(20, 0)
# 96 images, of which five are copies of test images.
POOL = smooth(96, 1)
COPIES = {3: TEST[5], 17: TEST[5][:, ::-1], 40: TEST[0], 41: np.clip(TEST[7] * 1.03, 0, 255), 95: TEST[19]}
for place, image in COPIES.items():
    POOL[place] = image
EXACT = {3, 17, 40, 95}
KERNEL = np.random.default_rng(2).normal(0, 1.5, (np.prod(SHAPE), NUM_CLASSES)).astype(np.float32)
BIAS = -(TEST.reshape(20, -1) / 255 @ KERNEL).mean(0).astype(np.float32)
SETTINGS = {"batch_size": 8, "chunk_size": 20}
OPTIONS = dict(test_images=TEST, settings=Scoring(**SETTINGS), progress=False, classifier="ab")


def logits_fn(x):
    return tf.reshape(x, (-1, np.prod(SHAPE))) @ KERNEL + BIAS


def expected_scores():
    """Labels and log-odds in float64."""
    logits = POOL.reshape(len(POOL), -1) / 255.0 @ KERNEL.astype(np.float64) + BIAS
    labels, rows = logits.argmax(1), np.arange(len(POOL))
    probability = np.exp(logits - logits.max(1, keepdims=True))
    others = probability.sum(1) - probability[rows, labels]
    return labels, -np.log(others)


def expected_set(size):
    """Per class the highest scores of what is no copy, in the order of the pool."""
    labels, scores = expected_scores()
    kept = []
    for label in range(NUM_CLASSES):
        places = [k for k in range(len(POOL)) if labels[k] == label and k not in COPIES]
        kept += sorted(places, key=lambda k: -scores[k])[: size // NUM_CLASSES]
    return sorted(kept)


def score(directory, *, pool=POOL, logits_fn=logits_fn, **changes):
    settings = Scoring(**{**SETTINGS, **{name: changes.pop(name) for name in Scoring._fields if name in changes}})
    share = Share(**{name: changes.pop(name) for name in Share._fields if name in changes})
    options = {**OPTIONS, "settings": settings, "share": share, **changes}
    scoring.score(pool, logits_fn, directory=str(directory), **options)


def contents(directory):
    """All files of a folder by name, as they are."""
    folder = pathlib.Path(directory)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    directory = tmp_path_factory.mktemp("scores")
    score(directory)
    return str(directory)


def test_scores_are_log_odds_and_copies_of_test_images_are_found(scored):
    arrays = [storage.read_committed(f"{scored}/chunk-{k:08d}")[0] for k in range(5)]
    assert [len(each["label"]) for each in arrays] == [20, 20, 20, 20, 16]
    whole = {name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]}
    labels, scores = expected_scores()
    assert len(set(labels)) == NUM_CLASSES
    np.testing.assert_array_equal(whole["label"], labels)
    np.testing.assert_allclose(whole["score"], scores, rtol=1e-4, atol=1e-4)
    assert set(np.flatnonzero(whole["duplicate_of"] >= 0)) == set(COPIES)
    assert [whole["duplicate_of"][k] for k in COPIES] == [5, 5, 0, 7, 19]
    assert set(np.flatnonzero(whole["is_exact"])) == EXACT


def test_replicas_share_each_batch(mirrored, scored, tmp_path):
    sizes = set()

    def seen(x):
        sizes.add(x.shape[0])
        return logits_fn(x)

    with mirrored.scope():
        score(tmp_path, logits_fn=seen)
        with pytest.raises(ValueError, match="batch_size that divides among 2 replicas. Received: 9"):
            score(tmp_path, batch_size=9)
    assert sizes == {SETTINGS["batch_size"] // 2}
    for k in range(5):
        ours, theirs = (storage.read_committed(f"{folder}/chunk-{k:08d}")[0] for folder in (tmp_path, scored))
        for name in ("label", "duplicate_of", "is_exact"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        np.testing.assert_allclose(ours["score"], theirs["score"], rtol=1e-5)


def test_scores_do_not_round_where_probabilities_do():
    images = np.zeros((2, *SHAPE), np.uint8)
    images[1] = 255
    confident = scoring.scorer(
        lambda x: tf.stack([20 + tf.reduce_mean(x, axis=(1, 2, 3)), tf.zeros(2), tf.zeros(2)], axis=1),
        duplicates.build_index(TEST),
    )
    np.testing.assert_allclose(confident(images)[1], [20 - np.log(2), 21 - np.log(2)], rtol=1e-6)


def test_sets_hold_the_best_of_each_class_and_lie_in_one_another(scored):
    found = selection.select(scored, num_classes=NUM_CLASSES, sizes=(8, 40))
    labels, scores = expected_scores()
    for size in (8, 40):
        chosen = found.sets[size]
        assert chosen.index.tolist() == expected_set(size)
        np.testing.assert_array_equal(chosen.label, labels[chosen.index])
        np.testing.assert_allclose(chosen.score, scores[chosen.index], rtol=1e-4, atol=1e-4)
        assert np.bincount(chosen.label).tolist() == [size // NUM_CLASSES] * NUM_CLASSES
    assert set(expected_set(8)) < set(expected_set(40))
    counts = found.statistics["pool"]["images_per_class"]
    assert sum(counts) == len(POOL) - len(COPIES)
    assert (found.statistics["duplicates"]["exact"], found.statistics["duplicates"]["near"]) == (4, 1)


def test_of_equal_scores_the_first_count(tmp_path):
    scoring.score(
        POOL, lambda x: tf.one_hot(tf.range(x.shape[0]) % 2, NUM_CLASSES), directory=str(tmp_path), **{**OPTIONS, "test_images": TEST[:1]}
    )  # fmt: skip
    chosen = selection.select(str(tmp_path), num_classes=2, sizes=(6,)).sets[6]
    assert chosen.index.tolist() == [0, 1, 2, 3, 4, 5]


def test_memory_holds_no_more_than_the_largest_set(tmp_path, monkeypatch):
    # One image per class of 96, in chunks of four: what is held in between is cut again and again.
    score(tmp_path, chunk_size=4)
    largest, highest = 0, selection.highest

    def seen(chosen, num):
        nonlocal largest
        largest = max(largest, len(chosen.index))
        return highest(chosen, num)

    monkeypatch.setattr(selection, "highest", seen)
    chosen = selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(4,)).sets[4]
    assert chosen.index.tolist() == expected_set(4)
    assert largest <= 2 * 1 + 4


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_after", [0, 1, 3])
def test_scoring_goes_on_where_it_was_killed_to_the_same_bytes(tmp_path, monkeypatch, capsys, scored, kill_after):
    commit, calls = storage.commit, 0

    def dying(stem, arrays, info):
        nonlocal calls
        if calls == kill_after:
            pathlib.Path(f"{stem}.npz").write_bytes(b"half of")
            raise Killed
        calls += 1
        commit(stem, arrays, info)

    monkeypatch.setattr(storage, "commit", dying)
    with pytest.raises(Killed):
        score(tmp_path)
    monkeypatch.setattr(storage, "commit", commit)
    calls = []

    def counting(x):
        tf.py_function(lambda: calls.append(1), [], [])
        return logits_fn(x)

    score(tmp_path, logits_fn=counting)
    assert len(calls) == 3 * (4 - kill_after) + 2  # Batches: three of a whole chunk, two of the last.
    assert contents(tmp_path) == contents(scored)
    assert (f"Resuming with {5 - kill_after} of 5 chunks" in capsys.readouterr().out) == (kill_after > 0)


def test_workers_share_a_pool(tmp_path, scored):
    for worker in (2, 0, 1):
        assert chunks.missing(str(tmp_path)) if worker != 2 else True
        score(tmp_path, worker=worker, num_workers=3)
    assert chunks.missing(str(tmp_path)) == []
    assert contents(tmp_path) == contents(scored)


def test_a_marker_that_is_being_written_is_none_yet(tmp_path, scored):
    score(tmp_path)
    marker = tmp_path / "chunk-00000003.json"
    marker.write_text(marker.read_text()[:9])
    assert chunks.missing(str(tmp_path)) == [3]
    with pytest.raises(ValueError, match="Received: 1 chunks that are not"):
        selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(40,))
    assert marker.exists()
    score(tmp_path)
    assert contents(tmp_path) == contents(scored)


def write(scored, directory, **options):
    found = selection.select(scored, num_classes=NUM_CLASSES, sizes=(40,))
    manifest = {"licence": "none", **found.statistics}
    return record_sets.write_set(POOL, found.sets[40], str(directory), manifest=manifest, images_per_part=15, **options)


def test_a_set_is_checksummed_parts_with_a_manifest(scored, tmp_path):
    assert write(scored, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["num_images"] == 40 and manifest["licence"] == "none"
    assert [part["num_images"] for part in manifest["classes"]] == [10] * 4
    labels, scores = expected_scores()
    of_class = scores[[k for k in expected_set(40) if labels[k] == 2]]
    assert manifest["score_quantiles"] == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(
        manifest["classes"][2]["scores"], np.quantile(of_class, [0, 0.25, 0.5, 0.75, 1]), rtol=1e-3
    )
    names = [f"part-{k:05d}-of-00003.tfrecord" for k in range(3)]
    assert [part["name"] for part in manifest["parts"]] == names
    for part in manifest["parts"]:
        content = (tmp_path / part["name"]).read_bytes()
        assert part["sha256"] == hashlib.sha256(content).hexdigest() and part["num_bytes"] == len(content)
        # As `sha256sum -c` reads it.
        assert (tmp_path / f"{part['name']}.sha256").read_text() == f"{part['sha256']}  {part['name']}\n"
    assert manifest["duplicates"]["threshold"] == duplicates.THRESHOLD
    assert manifest["duplicates"]["measure"] == duplicates.MEASURE


def test_what_is_written_is_what_training_reads(scored, tmp_path):
    write(scored, tmp_path)
    extra = sources.load_extra(f"tfrecord:{tmp_path}/*.tfrecord", num_classes=NUM_CLASSES, image_shape=SHAPE)
    places = expected_set(40)
    np.testing.assert_array_equal(extra.images[:], POOL[places])
    np.testing.assert_array_equal(extra.labels[:], expected_scores()[0][places])
    dataset = tf.data.TFRecordDataset([f"{tmp_path}/part-00002-of-00003.tfrecord"])
    features = {"score": tf.io.FixedLenFeature([], tf.float32), "index": tf.io.FixedLenFeature([], tf.int64)}
    read = [tf.io.parse_single_example(record, features) for record in dataset]
    assert [int(each["index"]) for each in read] == places[30:]
    np.testing.assert_allclose([float(each["score"]) for each in read], expected_scores()[1][places[30:]], rtol=1e-3)


def test_writing_goes_on_where_it_was_killed_and_workers_share_it(scored, tmp_path, monkeypatch):
    write(scored, tmp_path / "undisturbed")
    records, written = record_sets._write_records, []

    def dying(path, pool, chosen):
        written.append(path)
        if len(written) == 2:
            pathlib.Path(path).write_bytes(b"half of")
            raise Killed
        records(path, pool, chosen)

    monkeypatch.setattr(record_sets, "_write_records", dying)
    with pytest.raises(Killed):
        write(scored, tmp_path / "killed")
    assert not (tmp_path / "killed" / "manifest.json").exists()
    (tmp_path / "killed" / "part-00000-of-00003.tfrecord.sha256").write_text("")  # As a kill can leave it.
    assert write(scored, tmp_path / "killed") and len(written) == 5
    assert not write(scored, tmp_path / "shared", share=Share(1, 2))
    assert write(scored, tmp_path / "shared", share=Share(0, 2))
    expected = contents(tmp_path / "undisturbed")
    assert len(expected) == 8
    assert contents(tmp_path / "killed") == expected and contents(tmp_path / "shared") == expected


def test_parts_that_are_damaged_or_lost_are_written_again(scored, tmp_path):
    write(scored, tmp_path)
    expected, parts = contents(tmp_path), [tmp_path / f"part-{k:05d}-of-00003.tfrecord" for k in range(3)]
    parts[0].write_bytes(parts[0].read_bytes()[:-1])
    parts[1].unlink()
    parts[2].write_bytes(parts[2].read_bytes().replace(b"index", b"incex", 1))
    assert write(scored, tmp_path) and contents(tmp_path) == expected


def test_a_folder_holds_one_set(scored, tmp_path):
    write(scored, tmp_path)
    expected = contents(tmp_path)
    chosen = selection.select(scored, num_classes=NUM_CLASSES, sizes=(40,)).sets[40]
    others = {
        "chosen_sha256": (chosen._replace(score=chosen.score + 1), 15),
        "images_per_part = 15, not 16": (chosen, 16),
    }
    for message, (other, images_per_part) in others.items():
        with pytest.raises(ValueError, match=f"Expected a folder of this set.*Received: .* of another, .*{message}"):
            record_sets.write_set(POOL, other, str(tmp_path), manifest={}, images_per_part=images_per_part)
    assert contents(tmp_path) == expected


def test_a_pool_that_changed_since_it_was_scored_is_refused(scored, tmp_path):
    chosen = selection.select(scored, num_classes=NUM_CLASSES, sizes=(40,)).sets[40]
    changed = POOL.copy()
    changed[chosen.index[20]] = TEST[0]  # Which would go into the set.
    with pytest.raises(ValueError, match=f"the pool that was scored.*Received: another image {chosen.index[20]}"):
        record_sets.write_set(changed, chosen, str(tmp_path), manifest={})
    assert not (tmp_path / "manifest.json").exists()
    assert record_sets.write_set(POOL, chosen, str(tmp_path), manifest={})


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_leaves_what_is_finished(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(
        record_sets.own_folders, "check", lambda path, **options: None
    )  # A link to the device is the full disk.
    write(scored, tmp_path / "undisturbed")
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "part-00001-of-00003.tfrecord").symlink_to("/dev/full")
    with pytest.raises(ValueError, match="Expected room to write .*part-00001-of-00003.tfrecord.* Received: "):
        write(scored, folder)
    finished = ["identity.json", "part-00000-of-00003.tfrecord", "part-00000-of-00003.tfrecord.sha256"]
    (folder / "part-00001-of-00003.tfrecord").unlink()
    expected = contents(tmp_path / "undisturbed")
    assert contents(folder) == {name: expected[name] for name in finished}
    assert write(scored, folder) and contents(folder) == expected

    scores = tmp_path / "scores"
    write_arrays = storage.write_arrays

    def full(path, arrays):
        if "chunk-00000002" in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        return write_arrays(path, arrays)

    monkeypatch.setattr(storage, "write_arrays", full)
    with pytest.raises(ValueError, match="Expected room to write .*chunk-00000002.* Received: "):
        score(scores)
    assert chunks.missing(str(scores)) == [2, 3, 4]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_images": TEST[:, :4]}, r"images \(4, 8, 3\) of uint8. Received: \(8, 8, 3\) of uint8"),
        ({"batch_size": 0}, "Received: 0, 20"),
        ({"batch_size": 8.0}, "Received: 8.0, 20"),
        ({"chunk_size": None}, "Received: 8, None"),
        ({"worker": 2, "num_workers": 2}, "2 of 2"),
        ({"classifier": "another"}, "classifier = ab, not another"),
        ({"near_duplicate": 0.5}, "near_duplicate = .*, not 0.5"),
        ({"chunk_size": 10}, "chunk_size = 20, not 10"),
        ({"batch_size": 4}, "batch_size = 8, not 4"),
        ({"test_images": TEST[:5]}, "test_images_sha256"),
        ({"near_duplicate": 1.1}, "up to 1. Received: 1.1"),
    ],
)
def test_bad_settings_of_scoring(scored, changes, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        score(scored, **changes)


def test_logits_that_are_not_finite(tmp_path):
    def sometimes_nan(x):
        far = tf.reduce_max(tf.abs(x - POOL[50] / np.float32(255)), axis=(1, 2, 3)) > 1e-5
        return tf.where(far[:, None], logits_fn(x), np.nan)

    with pytest.raises(ValueError, match="Expected finite logits. Received: others for image 50 of the pool"):
        score(tmp_path, logits_fn=sometimes_nan)
    assert chunks.missing(str(tmp_path)) == [2, 3, 4]


def test_bad_selections(scored, tmp_path):
    for sizes in ((), (6,), (0,), (8, 4.0)):
        with pytest.raises(ValueError, match="Expected sizes that are multiples of 4, as .* Received: "):
            selection.select(scored, num_classes=NUM_CLASSES, sizes=sizes)
    labels = expected_scores()[0]
    counts = np.bincount([labels[k] for k in range(len(POOL)) if k not in COPIES])
    with pytest.raises(ValueError, match=f"at least 30 images.*Received: {counts.min()} of class {counts.argmin()}, enough for {4 * counts.min()}"):  # fmt: skip
        selection.select(scored, num_classes=NUM_CLASSES, sizes=(120, 4))
    with pytest.raises(ValueError, match="Expected a folder with scores"):
        selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(4,))
    score(tmp_path, worker=0, num_workers=2)
    with pytest.raises(ValueError, match="Received: 2 chunks that are not"):
        selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(4,))
    score(tmp_path)
    damaged = tmp_path / "chunk-00000003.npz"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ValueError, match="Expected an intact .*chunk-00000003.npz.*scores these images again"):
        selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(4,))
    (tmp_path / "chunk-00000001.json").write_text("")  # What a full disk or a power cut can leave.
    score(tmp_path)
    chosen = selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(40,)).sets[40]
    assert chosen.index.tolist() == expected_set(40)


def test_pixels_are_bytes(tmp_path, scored):
    """Floats in [0, 1] would be divided by 255 once more, and 0-255 floats are other bytes than their pool's."""
    for pool in (POOL / np.float32(255), POOL.astype(np.float32)):
        with pytest.raises(ValueError, match="a pool of images .* of uint8. Received: .* of float32"):
            score(tmp_path, pool=pool)
        chosen = selection.select(scored, num_classes=NUM_CLASSES, sizes=(40,)).sets[40]
        with pytest.raises(ValueError, match="a pool of uint8. Received: float32"):
            record_sets.write_set(pool, chosen, str(tmp_path), manifest={})
    assert not list(tmp_path.iterdir())


def test_folders_of_older_releases_go_on(tmp_path, scored):
    """Whose identities are on one line."""
    score(tmp_path / "scores")
    write(scored, tmp_path / "set")
    expected = contents(tmp_path)
    for folder in ("scores", "set"):
        path = tmp_path / folder / "identity.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
    score(tmp_path / "scores")
    assert write(scored, tmp_path / "set") and contents(tmp_path) == expected


@pytest.mark.parametrize("text", ["no json", "[1]", "3", '{"num_images": 96}'])
def test_a_malformed_identity_is_named(tmp_path, text):
    score(tmp_path)
    (tmp_path / "identity.json").write_text(text)
    for function in (
        lambda: selection.select(str(tmp_path), num_classes=NUM_CLASSES, sizes=(4,)),
        lambda: score(tmp_path),
    ):
        with pytest.raises(ValueError) as caught:
            function()
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_another_pool_of_as_many_images_is_refused(scored):
    for place in (0, 95):
        changed = POOL.copy()
        changed[place] ^= 1
        with pytest.raises(ValueError, match="first_and_last_images"):
            scoring.score(changed, logits_fn, directory=scored, **OPTIONS)


def test_names_of_sets():
    names = [record_sets.set_name(size) for size in (200_000, 500_000, 1_000_000, 40, 1_500, 2_500_000)]
    assert names == ["200k", "500k", "1m", "40", "1500", "2500k"]
