"""Pseudo-labelled images of a pool as TFRecords, with checksums and a manifest."""

import contextlib
import hashlib
import json
import posixpath
import zlib
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import storage
from robust_keras.data.readers.tfds_sets import why

gfile = tf.io.gfile
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

    index: np.ndarray
    label: np.ndarray
    score: np.ndarray
    crc32: np.ndarray


def checksums(images):
    """The CRC-32 of the pixels of each image, uint32 `[n]`."""
    return np.fromiter((zlib.crc32(image) for image in images), np.uint32, len(images))


def write_set(pool, chosen, directory, *, manifest, images_per_part=50_000, worker=0, num_workers=1):
    """Writes a pseudo-labelled set as TFRecords, as far as it is not there yet; a manifest comes last.

    A record is a `tf.train.Example` of `image` (PNG), `label`, `score` and `index`, the place in the pool.

    Args:
        pool: as in `score`.
        chosen: a `Chosen`.
        directory: a folder for `part-00000-of-00010.tfrecord`, each with a file `.sha256`, `manifest.json`, and
            `identity.json`, which tells this set from others.
        manifest: what else the manifest should say, as JSON can hold it.
        images_per_part: images in a part, at most.
        worker: which process this is, from 0; it writes every num_workers-th part, and the manifest if it is the last.
        num_workers: processes that share the work.

    Returns:
        Whether the set is complete.

    Raises:
        ValueError: for a folder with another set, a pool that has changed since it was scored, or where nothing more
            can be written; parts written before stay.
    """
    digest = hashlib.sha256()
    for array in chosen:
        digest.update(np.ascontiguousarray(array))
    identity = {"chosen_sha256": digest.hexdigest(), "images_per_part": images_per_part}
    claim(posixpath.join(directory, _IDENTITY), identity, "this set")
    starts = range(0, len(chosen.index), images_per_part)
    names = [f"part-{k:05d}-of-{len(starts):05d}.tfrecord" for k in range(len(starts))]
    paths = [posixpath.join(directory, name) for name in names]
    for path, start in list(zip(paths, starts))[worker::num_workers]:
        if not _is_intact(path):
            part = Chosen(*(array[start : start + images_per_part] for array in chosen))
            with writing(path):
                if gfile.exists(f"{path}.sha256"):
                    gfile.remove(f"{path}.sha256")
                _write_records(path, pool, part)
                write_text(f"{path}.sha256", f"{storage.sha256(path)}  {posixpath.basename(path)}\n")
    recorded = [_recorded_sha256(path) for path in paths]
    if not all(recorded):
        return False
    classes = range(int(chosen.label.max()) + 1)
    described = {
        "num_images": len(chosen.index),
        "score": SCORE,
        "score_quantiles": list(_QUANTILES),
        "classes": [_described(chosen.score[chosen.label == label]) for label in classes],
        **manifest,
        "parts": [
            {"name": name, "num_bytes": gfile.stat(path).length, "sha256": sha256}
            for name, path, sha256 in zip(names, paths, recorded)
        ],
    }
    with writing(directory):
        write_text(posixpath.join(directory, MANIFEST), json.dumps(described, indent=1) + "\n")
    return True


def set_name(size):
    """The name of a set by its number of images: '500k', '1m', or the number."""
    for unit, letter in ((1_000_000, "m"), (1_000, "k")):
        if size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


@contextlib.contextmanager
def writing(path):
    """Inside the context, a disk that is full or refuses is a one-line ValueError."""
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        raise ValueError(
            f"Expected room to write {path}; what is finished stays and counts. Received: {why(error)}"
        ) from error


def write_text(path, text):
    """Writes a text file."""
    with gfile.GFile(path, "w") as file:
        file.write(text)


def read_text(path):
    """What a text file holds; nothing where there is none."""
    if not gfile.exists(path):
        return ""
    with gfile.GFile(path) as file:
        return file.read()


def claim(path, identity, what):
    """Writes to a file what its folder is of, or refuses the folder where that says otherwise.

    Args:
        path: of the file.
        identity: a dictionary, as JSON can hold it.
        what: what the folder is of, for the message.

    Raises:
        ValueError: naming the entries that differ.
    """
    with writing(path):
        gfile.makedirs(posixpath.dirname(path))
    try:
        saved = json.loads(read_text(path))
    except ValueError:  # None yet, or what an interrupted write left behind.
        with writing(path):
            write_text(path, json.dumps(identity))
        return
    if saved != identity:
        different = [
            f"{name} {saved.get(name)}, not {value}" for name, value in identity.items() if saved.get(name) != value
        ]
        raise ValueError(
            f"Expected a folder of {what}, or none, in {posixpath.dirname(path)}. "
            f"Received: that of another, with {'; '.join(different)}"
        )


def _recorded_sha256(path):
    """The SHA-256 of a finished part; None of one that is not finished, as far as a kill got."""
    text = read_text(f"{path}.sha256")
    return text.split()[0] if text.endswith("\n") and gfile.exists(path) else None


def _is_intact(path):
    recorded = _recorded_sha256(path)
    return recorded is not None and storage.sha256(path) == recorded


def _described(scores):
    return {"num_images": len(scores), "scores": [float(value) for value in np.quantile(scores, _QUANTILES)]}


def _write_records(path, pool, chosen):
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
