"""The images of a scored pool that become sets: of each class those with the highest scores."""

import hashlib
from typing import Any, NamedTuple

import numpy as np

from robust_keras.pseudo_labelling import chunks, duplicates
from robust_keras.pseudo_labelling.record_sets import Chosen


class Selection(NamedTuple):
    """What `select` finds.

    Attributes:
        sets: a `Chosen` by the number of its images.
        statistics: of the whole pool, as JSON can hold it.
    """

    sets: dict[int, Chosen]
    statistics: dict[str, Any]


class _Best:
    """The images of a class with the highest scores, while a pool goes by; memory holds hardly more than those."""

    def __init__(self, num: int):
        types = (np.int64, np.int32, np.float32, np.uint32)
        self._num, self._chosen = num, Chosen(*(np.zeros(0, dtype) for dtype in types))
        self.count = 0  # Images of the class, all in all.

    def add(self, found: Chosen) -> None:
        self.count += len(found.index)
        self._chosen = Chosen(*(np.concatenate(pair) for pair in zip(self._chosen, found)))
        if len(self._chosen.index) > 2 * self._num:
            self._chosen = highest(self._chosen, self._num)

    def chosen(self) -> Chosen:
        """Those images, the highest score first."""
        return highest(self._chosen, self._num)


def select(directory: str, *, num_classes: int, sizes: tuple) -> Selection:
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
    if absent := chunks.missing(directory):
        raise ValueError(f"Expected a pool that is scored. Received: {len(absent)} chunks that are not")
    identity, per_class = chunks.identity(directory), max(sizes) // num_classes
    best = [_Best(per_class) for _ in range(num_classes)]
    dropped, num_exact, digest = np.zeros(num_classes, np.int64), 0, hashlib.sha256()
    for chunk in range(chunks.count(identity)):
        arrays, info = chunks.read(directory, chunk)
        digest.update(bytes.fromhex(info["images_sha256"]))
        index = chunk * identity["chunk_size"] + np.arange(len(arrays["label"]), dtype=np.int64)
        is_duplicate = arrays["duplicate_of"] >= 0
        num_exact += int(arrays["is_exact"].sum())
        dropped += np.bincount(arrays["label"][is_duplicate], minlength=num_classes)
        for label, each in enumerate(best):
            places = np.flatnonzero((arrays["label"] == label) & ~is_duplicate)
            each.add(Chosen(index[places], *(arrays[name][places] for name in ("label", "score", "crc32"))))
    _check_counts([each.count for each in best], dropped, sizes)
    chosen = [each.chosen() for each in best]
    statistics = {
        "pool": {
            "num_images": identity["num_images"],
            "sha256": digest.hexdigest(),
            "sha256_of": f"the SHA-256s of the pixels of every {identity['chunk_size']} images",
            "images_per_class": [each.count for each in best],
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
    return Selection({size: _first(chosen, size // num_classes) for size in sizes}, statistics)


def check_sizes(sizes: Any, num_classes: int) -> None:
    """Refuses sizes that are no positive multiples of the number of classes.

    Raises:
        ValueError: for those.
    """
    if (
        not isinstance(sizes, (list, tuple))
        or not sizes
        or not all(isinstance(size, int) and size > 0 and size % num_classes == 0 for size in sizes)
    ):
        raise ValueError(f"Expected sizes that are multiples of {num_classes}, as (1000,). Received: {sizes}")


def highest(chosen: Chosen, num: int) -> Chosen:
    """The `num` with the highest scores, highest first, of equals the first in the pool."""
    order = np.lexsort((chosen.index, -chosen.score))[:num]
    return Chosen(*(part[order] for part in chosen))


def _first(per_class: list[Chosen], num: int) -> Chosen:
    """The first `num` of each class, in the order of the pool."""
    chosen = Chosen(*(np.concatenate([part[:num] for part in parts]) for parts in zip(*per_class)))
    order = np.argsort(chosen.index)
    return Chosen(*(part[order] for part in chosen))


def _check_counts(counts: list[int], dropped: np.ndarray, sizes: tuple) -> None:
    fewest, per_class = int(np.argmin(counts)), max(sizes) // len(counts)
    if counts[fewest] < per_class:
        raise ValueError(
            f"Expected at least {per_class:,} images in each class for a set of {max(sizes):,}. Received: "
            f"{counts[fewest]:,} of class {fewest}, enough for {counts[fewest] * len(counts):,}; "
            f"{dropped[fewest]:,} more duplicate test images"
        )
