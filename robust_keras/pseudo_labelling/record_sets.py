"""Pseudo-labelled images of a pool as TFRecords, with checksums and a manifest."""

import contextlib
import hashlib
import json
import posixpath
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import own_folders, ownership, storage
from robust_keras.data.readers.tfds_sets import why
from robust_keras.pseudo_labelling.recipes import Share

SCORE = "log-odds of the predicted class, log p - log(1 - p): ordered as its probability p, which would round to 1"
MANIFEST = "manifest.json"
_IDENTITY = "identity.json"  # Of what is chosen, and how it is cut into parts.
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Chosen(NamedTuple):
    """Pseudo-labelled images of a pool, in the order of the pool.

    Attributes:
        index: int64 `[N]`, where they are in the pool.
        label: int32 `[N]`.
        score: float32 `[N]`.
        crc32: uint32 `[N]`, see `checksums`.
    """

    index: np.ndarray  # type: ignore[assignment]  # Tuples have a method of that name.
    label: np.ndarray
    score: np.ndarray
    crc32: np.ndarray


def checksums(images: np.ndarray) -> np.ndarray:
    """The CRC-32 of the pixels of each image, uint32 `[n]`."""
    return np.fromiter((zlib.crc32(image) for image in images), np.uint32, len(images))


def write_set(
    pool: Any,
    chosen: Chosen,
    directory: str,
    *,
    manifest: dict[str, Any],
    images_per_part: int = 50_000,
    share: Share = Share(),  # noqa: B008  It cannot change.
) -> bool:
    """Writes a pseudo-labelled set as TFRecords, as far as it is not there yet; a manifest comes last.

    A record is a `tf.train.Example` of `image` (PNG), `label`, `score` and `index`, the place in the pool.

    Args:
        pool: as in `scoring.score`.
        chosen: a `Chosen`.
        directory: a folder for `part-00000-of-00010.tfrecord`, each with a file `.sha256`, `manifest.json`, and
            `identity.json`, which tells this set from others.
        manifest: what else the manifest should say, as JSON can hold it.
        images_per_part: images in a part, at most.
        share: which parts are this process's; the manifest is of the one that is last.

    Returns:
        Whether the set is complete.

    Raises:
        ValueError: for a folder with another set, a pool of another type or that has changed since it was scored, or
            where nothing more can be written; parts written before stay.
    """
    if pool.dtype != np.uint8:
        raise ValueError(f"Expected a pool of uint8. Received: {pool.dtype}")
    digest = hashlib.sha256()
    for array in chosen:
        digest.update(np.ascontiguousarray(array).data)
    identity = {"chosen_sha256": digest.hexdigest(), "images_per_part": images_per_part}
    with writing(directory):
        ownership.claim(posixpath.join(directory, _IDENTITY), identity, what="this set")
    starts = range(0, len(chosen.index), images_per_part)
    paths = [posixpath.join(directory, f"part-{k:05d}-of-{len(starts):05d}.tfrecord") for k in range(len(starts))]
    for path, start in list(zip(paths, starts))[share.worker :: share.num_workers]:
        if not _is_intact(path):
            _write_part(path, pool, Chosen(*(array[start : start + images_per_part] for array in chosen)))
    recorded = [_recorded_sha256(path) for path in paths]
    if not all(recorded):
        return False
    described = {
        **_description(chosen),
        **manifest,
        "parts": [
            {"name": posixpath.basename(path), "num_bytes": tf.io.gfile.stat(path).length, "sha256": sha256}
            for path, sha256 in zip(paths, recorded)
        ],
    }
    with writing(directory):
        storage.write_text(posixpath.join(directory, MANIFEST), json.dumps(described, indent=1) + "\n")
    return True


def set_name(size: int) -> str:
    """The name of a set by its number of images: '500k', '1m', or the number."""
    for unit, letter in ((1_000_000, "m"), (1_000, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Inside the context, a disk that is full or refuses is a one-line ValueError."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ValueError(
            f"Expected room to write {path}; what is finished stays and counts. Received: {why(error)}"
        ) from error


def _recorded_sha256(path):
    """The SHA-256 of a finished part; None of one that is not finished, as far as a kill got."""
    text = storage.read_text(f"{path}.sha256")
    return text.split()[0] if text.endswith("\n") and tf.io.gfile.exists(path) else None


def _is_intact(path):
    recorded = _recorded_sha256(path)
    return recorded is not None and storage.sha256(path) == recorded


def _description(chosen: Chosen) -> dict[str, Any]:
    """What a manifest says of the scores, in all and by class."""

    def of(scores):
        return {"num_images": len(scores), "scores": [float(value) for value in np.quantile(scores, _QUANTILES)]}

    return {
        "num_images": len(chosen.index),
        "score": SCORE,
        "score_quantiles": list(_QUANTILES),
        "classes": [of(chosen.score[chosen.label == label]) for label in range(int(chosen.label.max()) + 1)],
    }


def _write_part(path: str, pool: Any, chosen: Chosen) -> None:
    with writing(path):
        if tf.io.gfile.exists(f"{path}.sha256"):
            own_folders.remove(f"{path}.sha256")
        _write_records(path, pool, chosen)
        storage.write_text(f"{path}.sha256", f"{storage.sha256(path)}  {posixpath.basename(path)}\n")


def _write_records(path, pool, chosen):
    own_folders.check(path)
    with tf.io.TFRecordWriter(path) as writer:
        for start in range(0, len(chosen.index), 1024):
            block = Chosen(*(part[start : start + 1024] for part in chosen))
            images = pool[block.index]
            changed = checksums(images) != block.crc32
            if changed.any():
                raise ValueError(
                    "Expected the pool that was scored; with another one, remove the scores. "
                    f"Received: another image {block.index[changed.argmax()]}"
                )
            for image, index, label, score in zip(images, block.index, block.label, block.score):
                writer.write(_record(image, index, label, score))


def _record(image, index, label, score):
    features = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[tf.io.encode_png(image).numpy()])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
        "score": tf.train.Feature(float_list=tf.train.FloatList(value=[score])),
        "index": tf.train.Feature(int64_list=tf.train.Int64List(value=[index])),
    }
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString(deterministic=True)
