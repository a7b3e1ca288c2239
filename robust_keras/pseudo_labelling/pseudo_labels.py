"""Pseudo-labelled sets out of a pool of unlabelled images (section 4.3.1 of Gowal et al. 2020).

What duplicates the test set is left out, a plain classifier labels and scores the rest, and of each class the images
with the highest scores are kept, so that smaller sets are part of larger ones:

    score(pool, logits_fn, directory="scores", test_images=test.images)
    selection = select("scores", num_classes=10, sizes=(200_000, 500_000))
    write_set(pool, selection.sets[500_000], "500k", manifest=selection.statistics)

A pool is scored in chunks, each a file with a marker, and a set is written in parts, each with its checksum. What is
there is kept, so each function goes on where it was killed, to the same bytes, and several processes share the work.
"""

import concurrent.futures
import functools
import hashlib
import json
import posixpath
import time
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import compilation, losses, storage
from robust_keras.data import sources
from robust_keras.engines import replicas, strategies
from robust_keras.pseudo_labelling import duplicates
from robust_keras.pseudo_labelling.record_sets import Chosen, checksums, claim, read_text, set_name, write_set, writing

gfile = tf.io.gfile
_IDENTITY = "identity.json"  # Of the pool, the classifier and the settings that the scores are of.


class Selection(NamedTuple):
    """What `select` finds.

    Attributes:
        sets: a `Chosen` by the number of its images.
        statistics: of the whole pool, as JSON can hold it.
    """

    sets: dict
    statistics: dict


def label_pool(
    *,
    classifier,
    workdir,
    pool,
    test_set,
    sizes,
    near_duplicate=duplicates.THRESHOLD,
    licence=None,
    allow_chance=False,
    batch_size=256,
    chunk_size=16_384,
    progress=True,
    data_dir=None,
    cache_dir=None,
    strategy="auto",
    tpu=None,
    worker=0,
    num_workers=1,
):
    """Makes pseudo-labelled sets out of a pool: `workdir`/scores and a folder for each set, such as `workdir`/500k.

    Args:
        classifier: `(image_shape) -> (num_classes, obtain)`, called in the strategy's scope before any long work; it
            refuses what does not fit such images. `obtain() -> (load, identity)` trains or finds the classifier, once
            all else has been checked; `load()` is its logits_fn, made in the scope, and the identity is JSON, with a
            `path` that may change.
        workdir: any `tf.io.gfile` path.
        pool: name of the pool, as `sources.open_pool` takes it.
        test_set: name of the data set whose test split must not be in the sets, as `sources.load` takes it.
        sizes: numbers of images of the sets, multiples of the number of classes.
        near_duplicate: see `score`.
        licence: what the manifests say of the rights in the images.
        allow_chance: whether to go on with a classifier that is hardly right more often than chance.
        batch_size: see `score`.
        chunk_size: see `score`.
        progress: see `score`.
        data_dir: see `sources.load`.
        cache_dir: see `sources.open_pool`.
        strategy: name of a `strategies.strategy` of this process's devices.
        tpu: address of the TPU, see there.
        worker: see `score` and `write_set`.
        num_workers: see there; all of them wait until the whole pool is scored.

    Returns:
        The folders of the sets.

    Raises:
        ValueError: for bad input, before the classifier is trained; see also `score`, `select` and `write_set`.
    """
    strategy = strategies.strategy(strategy, tpu=tpu)
    _check_settings(near_duplicate, batch_size, chunk_size, worker, num_workers, strategy)
    with strategy.scope():
        if (num_processes := replicas.num_processes()) > 1:
            raise ValueError(
                f"Expected processes that share a pool as --num_workers. Received: {num_processes} in one strategy"
            )
        test = sources.load(test_set, "test", data_dir=data_dir)
        num_classes, obtain = classifier(test.images.shape[1:])
    # An npz file knows its classes by the labels that it has, and a test set need not have them all.
    if test.num_classes > num_classes or (test.num_classes < num_classes and not test_set.startswith("npz:")):
        raise ValueError(f"Expected a test set of {num_classes} classes. Received: {test.num_classes} in {test_set!r}")
    check_sizes(sizes, num_classes)
    scores = posixpath.join(workdir, "scores")
    while worker and not gfile.exists(posixpath.join(scores, _IDENTITY)):
        print("Waiting for worker 0 to convert the pool and train the classifier, where that is needed", flush=True)
        time.sleep(10)
    images = sources.open_pool(pool, data_dir=data_dir, image_shape=test.images.shape[1:], cache_dir=cache_dir)
    if max(sizes) > len(images):
        raise ValueError(
            f"Expected a pool of at least {max(sizes):,} images, or smaller label_pool.sizes. Received: {len(images):,}"
        )
    load, identity = obtain()
    with strategy.scope():
        logits_fn = load()
        accuracy = _accuracy(logits_fn, test, batch_size)
        print(f"Accuracy of the classifier on the test images: {100 * accuracy:.2f} %", flush=True)
        chance = 1 / num_classes
        if accuracy < chance + 0.1 * (1 - chance) and not allow_chance:
            raise ValueError(
                "Expected a classifier that is right more often than chance, or label_pool.allow_chance = True. "
                f"Received: one that is right on {100 * accuracy:.2f} % of the test images"
            )
        score_mine = functools.partial(
            score,
            images,
            logits_fn,
            directory=scores,
            test_images=test.images,
            classifier={name: value for name, value in identity.items() if name != "path"},
            near_duplicate=near_duplicate,
            batch_size=batch_size,
            chunk_size=chunk_size,
            worker=worker,
            num_workers=num_workers,
            progress=progress,
        )
        score_mine()
        while chunks := missing(scores):
            workers = sorted({chunk % num_workers for chunk in chunks})
            if worker in workers:  # Another worker found it damaged.
                score_mine()
                continue
            print(f"Waiting for {len(chunks):,} chunks of workers {', '.join(map(str, workers))}", flush=True)
            time.sleep(10)
    selection = select(scores, num_classes=num_classes, sizes=sizes)
    folders = []
    for size, chosen in selection.sets.items():
        folders.append(posixpath.join(workdir, set_name(size)))
        manifest = {
            "pool": {"name": pool, **selection.statistics["pool"]},
            "classifier": {**identity, "test_accuracy": accuracy},
            "duplicates": {"of": f"{test_set}, test", **selection.statistics["duplicates"]},
            "licence": licence,
        }
        is_complete = write_set(images, chosen, folders[-1], manifest=manifest, worker=worker, num_workers=num_workers)
        print(f"{folders[-1]}{'' if is_complete else ', where other workers still write'}", flush=True)
    return folders


def score(
    pool,
    logits_fn,
    *,
    directory,
    test_images,
    classifier="",
    near_duplicate=duplicates.THRESHOLD,
    batch_size=256,
    chunk_size=16_384,
    worker=0,
    num_workers=1,
    progress=True,
):
    """Labels and scores a pool and finds what duplicates test images, from where an earlier call was interrupted.

    In a strategy's scope, each batch is spread over its replicas.

    Args:
        pool: uint8 images `[N, height, width, channels]`, an array or what `sources.open_pool` returns.
        logits_fn: images in [0, 1] to logits.
        directory: where the scores go, any `tf.io.gfile` path.
        test_images: uint8 `[T, height, width, channels]`.
        classifier: what identifies `logits_fn`, as JSON can hold it; a folder with scores of another pool, classifier,
            test set, or of other settings, is refused.
        near_duplicate: similarity, see `duplicates`, from which on an image is a duplicate.
        batch_size: images in a batch of the classifier, over all replicas.
        chunk_size: images in a file of scores: what an interruption can cost.
        worker: which process this is, from 0; it does every num_workers-th chunk.
        num_workers: processes that share the work.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a pool that does not fit the test images, scores of something else in the directory, logits that
            are not finite, or where nothing more can be written; chunks written before stay.
    """
    if tuple(pool.shape[1:]) != tuple(test_images.shape[1:]):
        raise ValueError(f"Expected a pool of images {tuple(test_images.shape[1:])}. Received: {tuple(pool.shape[1:])}")
    _check_settings(near_duplicate, batch_size, chunk_size, worker, num_workers, tf.distribute.get_strategy())
    ends = [hashlib.sha256(pool[:batch_size]), hashlib.sha256(pool[len(pool) - min(batch_size, len(pool)) :])]
    identity = {
        "num_images": len(pool),
        "first_and_last_images_sha256": [digest.hexdigest() for digest in ends],
        "test_images_sha256": hashlib.sha256(np.ascontiguousarray(test_images)).hexdigest(),
        "classifier": classifier,
        "near_duplicate": near_duplicate,
        "coarse_threshold": duplicates.COARSE_THRESHOLD,
        "batch_size": batch_size,
        "chunk_size": chunk_size,
    }
    claim(posixpath.join(directory, _IDENTITY), identity, "scores of this pool")
    chunks = range(worker, _num_chunks(identity), num_workers)
    pending = [chunk for chunk in chunks if not storage.is_committed(_chunk(directory, chunk))]
    if len(pending) < len(chunks):
        print(f"Resuming with {len(pending):,} of {len(chunks):,} chunks to score", flush=True)
    if not pending:
        return
    index = duplicates.build_index(test_images)
    on_batch = _scorer(logits_fn, index)

    def read(chunk):
        images = np.ascontiguousarray(pool[chunk * chunk_size : (chunk + 1) * chunk_size])
        return images, hashlib.sha256(images).hexdigest(), checksums(images)

    total = sum(min(chunk_size, len(pool) - chunk * chunk_size) for chunk in pending)
    bar = tqdm(total=total, unit="image", unit_scale=True, disable=not progress, mininterval=1.0)
    with concurrent.futures.ThreadPoolExecutor(1) as reader, bar:
        coming = reader.submit(read, pending[0])
        for chunk, following in zip(pending, [*pending[1:], None]):
            images, sha256, crc32 = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            batches = (images[k : k + batch_size] for k in range(0, len(images), batch_size))
            results = [
                on_batch(np.resize(b, (batch_size, *b.shape[1:])) if len(b) < batch_size else b) for b in batches
            ]
            label, scores, neighbors, cosines = (np.concatenate(parts)[: len(images)] for parts in zip(*results))
            if not np.isfinite(scores).all():
                where = chunk * chunk_size + int(np.flatnonzero(~np.isfinite(scores))[0])
                raise ValueError(f"Expected finite logits. Received: others for image {where} of the pool")
            arrays = {"label": label, "score": scores, "crc32": crc32}
            arrays |= _duplicates(index, images, neighbors, cosines, near_duplicate)
            with writing(stem := _chunk(directory, chunk)):
                storage.commit(stem, arrays, {"images_sha256": sha256})
            bar.update(len(images))


def missing(directory):
    """The chunks that are not scored yet: a list of their numbers."""
    present = set(gfile.listdir(directory))
    chunks = range(_num_chunks(_identity(directory)))
    absent = [chunk for chunk in chunks if storage.marker_path(_chunk("", chunk)) not in present]
    # A marker may be one that is being written, or half of one; they are read once all are there.
    return absent or [chunk for chunk in chunks if not storage.is_committed(_chunk(directory, chunk))]


def select(directory, *, num_classes, sizes):
    """The images of each class with the highest scores, without what duplicates a test image; memory holds those alone.

    Args:
        directory: where `score` has put the scores of the whole pool.
        num_classes: classes of the task.
        sizes: numbers of images, multiples of `num_classes`.

    Returns:
        A `Selection`.

    Raises:
        ValueError: for a pool that is not scored, a damaged file of scores, or a class with too few images.
    """
    check_sizes(sizes, num_classes)
    if chunks := missing(directory):
        raise ValueError(f"Expected a pool that is scored. Received: {len(chunks)} chunks that are not")
    identity, per_class = _identity(directory), max(sizes) // num_classes
    types = (np.int64, np.int32, np.float32, np.uint32)
    best = [Chosen(*(np.zeros(0, dtype) for dtype in types)) for _ in range(num_classes)]
    counts, dropped = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    num_exact, digest = 0, hashlib.sha256()
    for chunk in range(_num_chunks(identity)):
        arrays, info = _read_chunk(directory, chunk)
        digest.update(bytes.fromhex(info["images_sha256"]))
        index = chunk * identity["chunk_size"] + np.arange(len(arrays["label"]), dtype=np.int64)
        is_duplicate = arrays["duplicate_of"] >= 0
        num_exact += int(arrays["is_exact"].sum())
        dropped += np.bincount(arrays["label"][is_duplicate], minlength=num_classes)
        for label in range(num_classes):
            places = np.flatnonzero((arrays["label"] == label) & ~is_duplicate)
            counts[label] += len(places)
            found = Chosen(index[places], *(arrays[name][places] for name in ("label", "score", "crc32")))
            best[label] = Chosen(*(np.concatenate(pair) for pair in zip(best[label], found)))
            if len(best[label].index) > 2 * per_class:
                best[label] = _highest(best[label], per_class)
    if (counts < per_class).any():
        fewest = int(counts.argmin())
        raise ValueError(
            f"Expected at least {per_class:,} images in each class for a set of {max(sizes):,}. Received: "
            f"{counts[fewest]:,} of class {fewest}, enough for {counts[fewest] * num_classes:,}; "
            f"{dropped[fewest]:,} more duplicate test images"
        )
    best = [_highest(each, per_class) for each in best]
    sets = {}
    for size in sizes:
        chosen = Chosen(*(np.concatenate([part[: size // num_classes] for part in parts]) for parts in zip(*best)))
        order = np.argsort(chosen.index)
        sets[size] = Chosen(*(part[order] for part in chosen))
    statistics = {
        "pool": {
            "num_images": identity["num_images"],
            "sha256": digest.hexdigest(),
            "sha256_of": f"the SHA-256s of the pixels of every {identity['chunk_size']} images",
            "images_per_class": counts.tolist(),
        },
        "duplicates": {
            "measure": duplicates.MEASURE,
            "threshold": identity["near_duplicate"],
            "coarse_threshold": identity["coarse_threshold"],
            "exact": num_exact,
            "near": int(dropped.sum()) - num_exact,
            "per_class": dropped.tolist(),
        },
    }
    return Selection(sets, statistics)


def check_sizes(sizes, num_classes):
    """Refuses sizes that are no positive multiples of the number of classes."""
    if (
        not isinstance(sizes, (list, tuple))
        or not sizes
        or not all(isinstance(size, int) and size > 0 and size % num_classes == 0 for size in sizes)
    ):
        raise ValueError(f"Expected sizes that are multiples of {num_classes}, as (1000,). Received: {sizes}")


def _check_settings(near_duplicate, batch_size, chunk_size, worker, num_workers, strategy):
    if not isinstance(near_duplicate, (int, float)) or not 0 < near_duplicate <= 1:
        raise ValueError(f"Expected near_duplicate as a number above 0 and up to 1. Received: {near_duplicate!r}")
    whole = all(isinstance(number, int) for number in (batch_size, chunk_size, worker, num_workers))
    if not whole or batch_size < 1 or chunk_size < 1 or not 0 <= worker < num_workers:
        raise ValueError(
            "Expected a batch_size and a chunk_size >= 1 and a worker from 0 to num_workers - 1. "
            f"Received: {batch_size!r}, {chunk_size!r}, {worker!r} of {num_workers!r}"
        )
    if batch_size % strategy.num_replicas_in_sync:
        raise ValueError(
            f"Expected a batch_size that divides among {strategy.num_replicas_in_sync} replicas. Received: {batch_size}"
        )


def _accuracy(logits_fn, test, batch_size):
    """Share of a labelled set that a classifier gets right."""
    num_right = 0

    def on_batch(images):
        return logits_fn(tf.cast(images, tf.float32) / 255.0)

    predict = replicas.over_replicas(on_batch)
    for start in range(0, len(test.labels), batch_size):
        chosen = np.arange(start, start + batch_size) % len(test.labels)
        right = ~losses.is_wrong(predict(test.images[chosen]), test.labels[chosen]).numpy()
        num_right += int(right[: len(test.labels) - start].sum())
    return num_right / len(test.labels)


def _scorer(logits_fn, index):
    """A compiled function of a batch of uint8 images: label, score, nearest test image and its cosine."""
    nearest = compilation.fused(functools.partial(duplicates.nearest, index))

    def on_batch(images):
        x = tf.cast(images, tf.float32) / 255.0
        logits = tf.cast(logits_fn(x), tf.float32)
        label = tf.argmax(logits, axis=-1, output_type=tf.int32)
        is_label = tf.one_hot(label, tf.shape(logits)[-1], on_value=True, off_value=False)
        others = tf.reduce_logsumexp(tf.where(is_label, -np.inf, logits), axis=-1)
        return label, tf.reduce_max(logits, axis=-1) - others, *nearest(images)

    return replicas.over_replicas(on_batch)


def _duplicates(index, images, neighbors, cosines, near_duplicate):
    """Of which test image each image is a duplicate, -1 for none, and whether it is an exact one."""
    duplicate_of, is_exact = np.full(len(images), -1, np.int32), np.zeros(len(images), bool)
    close = np.flatnonzero(cosines >= duplicates.COARSE_THRESHOLD)
    similarities, exact = duplicates.similarity(index, images[close], neighbors[close])
    found = exact | (similarities >= near_duplicate)
    duplicate_of[close[found]], is_exact[close[found]] = neighbors[close[found]], exact[found]
    return {"duplicate_of": duplicate_of, "is_exact": is_exact}


def _highest(chosen, num):
    """The `num` with the highest scores, highest first, of equals the first in the pool."""
    order = np.lexsort((chosen.index, -chosen.score))[:num]
    return Chosen(*(part[order] for part in chosen))


def _num_chunks(identity):
    return -(-identity["num_images"] // identity["chunk_size"])


def _chunk(directory, chunk):
    return posixpath.join(directory, f"chunk-{chunk:08d}")


def _read_chunk(directory, chunk):
    """A chunk's scores and what its marker says; a damaged one will be scored again."""
    try:
        return storage.read_committed(_chunk(directory, chunk))
    except ValueError as error:
        storage.withdraw(_chunk(directory, chunk))
        raise ValueError(f"{error}; the command of the worker whose it is scores these images again") from error


def _identity(directory):
    path = posixpath.join(directory, _IDENTITY)
    if not gfile.exists(path):
        raise ValueError(f"Expected a folder with scores. Received: {directory}")
    return json.loads(read_text(path))
