"""The labels and scores of a pool, chunk by chunk, and which of its images duplicate a test image."""

import concurrent.futures
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from robust_keras import compilation, failures
from robust_keras.engines import replicas
from robust_keras.pseudo_labelling import chunks, duplicates
from robust_keras.pseudo_labelling.recipes import Scoring, Share, check
from robust_keras.pseudo_labelling.record_sets import checksums

_STORED = ("label", "score", "crc32", "duplicate_of", "is_exact")


def score(
    pool: Any,
    logits_fn: Callable[[tf.Tensor], tf.Tensor],
    *,
    directory: str,
    test_images: np.ndarray,
    classifier: Any = "",
    settings: Scoring = Scoring(),  # noqa: B008  It cannot change.
    share: Share = Share(),  # noqa: B008
    progress: bool = True,
) -> None:
    """Labels and scores a pool and finds what duplicates test images, from where an earlier call was interrupted.

    In a strategy's scope, each batch is spread over its replicas.

    Args:
        pool: uint8 images `[N, height, width, channels]`, an array or what `sources.open_pool` returns.
        logits_fn: images in [0, 1] to logits.
        directory: where the scores go, any `tf.io.gfile` path.
        test_images: uint8 `[T, height, width, channels]`.
        classifier: what identifies `logits_fn`, as JSON can hold it; a folder with scores of another pool, classifier,
            test set, or of other settings, is refused.
        settings: a `Scoring`.
        share: which chunks are this process's.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a pool that does not fit the test images, scores of something else in the directory, logits that
            are not finite, or where nothing more can be written; chunks written before stay.
    """
    if pool.dtype != np.uint8 or tuple(pool.shape[1:]) != tuple(test_images.shape[1:]):
        raise ValueError(
            f"Expected a pool of images {tuple(test_images.shape[1:])} of uint8. "
            f"Received: {tuple(pool.shape[1:])} of {pool.dtype}"
        )
    check(settings, share, replicas.num_replicas())
    identity = _identity(pool, test_images, classifier, settings)
    chunks.claim(directory, identity)
    mine = range(share.worker, chunks.count(identity), share.num_workers)
    pending = [chunk for chunk in mine if not chunks.is_scored(directory, chunk)]
    if len(pending) < len(mine):
        print(f"Resuming with {len(pending):,} of {len(mine):,} chunks to score", flush=True)
    if not pending:
        return
    index = duplicates.build_index(test_images)
    on_batch = scorer(logits_fn, index)
    total = sum(min(settings.chunk_size, len(pool) - chunk * settings.chunk_size) for chunk in pending)
    with tqdm(total=total, unit="image", unit_scale=True, disable=not progress, mininterval=1.0) as bar:
        for chunk in _read_ahead(pool, pending, settings.chunk_size):
            arrays = _scores(on_batch, chunk, settings.batch_size)
            arrays |= _duplicates(index, chunk.images, arrays, settings.near_duplicate)
            stored = {name: arrays[name] for name in _STORED}
            chunks.write(directory, chunk.number, stored, images_sha256=chunk.sha256)
            failures.work_begins()
            bar.update(len(chunk.images))


class _Chunk(NamedTuple):
    """Consecutive images of a pool, as read: where the first one is, and checksums of all and of each."""

    number: int
    first: int
    images: np.ndarray
    sha256: str
    crc32: np.ndarray


def scorer(logits_fn: Callable[[tf.Tensor], tf.Tensor], index: duplicates.SearchIndex) -> Callable:
    """A compiled function of a batch of uint8 images: label, score, nearest test image and its cosine.

    The score is the log-odds of the label, log p - log(1 - p), of logits z: max z - log sum exp of the others.
    """
    nearest = compilation.fused(functools.partial(duplicates.nearest, index))

    def on_batch(images):
        x = tf.cast(images, tf.float32) / 255.0
        logits = tf.cast(logits_fn(x), tf.float32)
        label = tf.argmax(logits, axis=-1, output_type=tf.int32)
        is_label = tf.one_hot(label, tf.shape(logits)[-1], on_value=True, off_value=False)
        others = tf.reduce_logsumexp(tf.where(is_label, -np.inf, logits), axis=-1)
        return label, tf.reduce_max(logits, axis=-1) - others, *nearest(images)

    return replicas.over_replicas(on_batch)


def _identity(pool, test_images, classifier, settings: Scoring) -> dict[str, Any]:
    size = min(settings.batch_size, len(pool))
    ends = hashlib.sha256(pool[: settings.batch_size]), hashlib.sha256(pool[len(pool) - size :])
    return {
        "num_images": len(pool),
        "first_and_last_images_sha256": [digest.hexdigest() for digest in ends],
        "test_images_sha256": hashlib.sha256(np.ascontiguousarray(test_images).data).hexdigest(),
        "classifier": classifier,
        "near_duplicate": settings.near_duplicate,
        "coarse_threshold": duplicates.COARSE_THRESHOLD,
        "batch_size": settings.batch_size,
        "chunk_size": settings.chunk_size,
    }


def _read_ahead(pool, numbers: list[int], chunk_size: int) -> Iterator[_Chunk]:
    """The chunks of those numbers; while one is scored, the next one is read."""

    def read(number):
        images = np.ascontiguousarray(pool[number * chunk_size : (number + 1) * chunk_size])
        return _Chunk(number, number * chunk_size, images, hashlib.sha256(images).hexdigest(), checksums(images))

    with concurrent.futures.ThreadPoolExecutor(1) as reader:
        coming = reader.submit(read, numbers[0])
        for following in [*numbers[1:], None]:
            chunk = coming.result()
            if following is not None:
                coming = reader.submit(read, following)
            yield chunk


def _scores(on_batch, chunk: _Chunk, batch_size: int) -> dict[str, np.ndarray]:
    """What `scorer` says of each image of a chunk, and its checksum; the last batch is filled up."""
    images = chunk.images
    batches = (images[k : k + batch_size] for k in range(0, len(images), batch_size))
    results = [on_batch(np.resize(b, (batch_size, *b.shape[1:])) if len(b) < batch_size else b) for b in batches]
    label, scores, neighbors, cosines = (np.concatenate(parts)[: len(images)] for parts in zip(*results))
    if not np.isfinite(scores).all():
        where = chunk.first + int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(f"Expected finite logits. Received: others for image {where} of the pool")
    return {"label": label, "score": scores, "crc32": chunk.crc32, "neighbors": neighbors, "cosines": cosines}


def _duplicates(index, images, found: dict[str, np.ndarray], near_duplicate: float) -> dict[str, np.ndarray]:
    """Of which test image each image is a duplicate, -1 for none, and whether it is an exact one."""
    duplicate_of, is_exact = np.full(len(images), -1, np.int32), np.zeros(len(images), bool)
    close = np.flatnonzero(found["cosines"] >= duplicates.COARSE_THRESHOLD)
    neighbors = found["neighbors"][close]
    similarities, exact = duplicates.similarity(index, images[close], neighbors)
    duplicated = exact | (similarities >= near_duplicate)
    duplicate_of[close[duplicated]], is_exact[close[duplicated]] = neighbors[duplicated], exact[duplicated]
    return {"duplicate_of": duplicate_of, "is_exact": is_exact}
