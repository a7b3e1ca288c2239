"""What the labelling of a pool is told: what identifies it, which sets are wanted, where it runs, and who does it."""

from typing import NamedTuple

from robust_keras.pseudo_labelling import duplicates


class Scoring(NamedTuple):
    """How a pool is scored: with other values the scores are others.

    Attributes:
        near_duplicate: similarity, see `duplicates`, from which on an image is a duplicate of a test image.
        batch_size: images in a batch of the classifier, over all replicas.
        chunk_size: images in a file of scores: what an interruption can cost.
    """

    near_duplicate: float = duplicates.THRESHOLD
    batch_size: int = 256
    chunk_size: int = 16_384


class Recipe(NamedTuple):
    """What identifies the scores of a pool, beside the classifier.

    Attributes:
        pool: name of the pool, as `sources.open_pool` takes it.
        test_set: name of the data set whose test split must not be in the sets, as `sources.load` takes it.
        scoring: a `Scoring`.
    """

    pool: str
    test_set: str
    scoring: Scoring = Scoring()


class Sets(NamedTuple):
    """The sets that are wanted. There can be more of the same scores.

    Attributes:
        sizes: numbers of images of the sets, multiples of the number of classes.
        licence: what the manifests say of the rights in the images.
        allow_chance: whether to go on with a classifier that is hardly right more often than chance.
    """

    sizes: tuple
    licence: str | None = None
    allow_chance: bool = False


class Layout(NamedTuple):
    """Where a pool is scored. The scores are the same on any layout.

    Attributes:
        strategy: name of a `strategies.strategy` of this process's devices.
        tpu: address of the TPU, see there.
        cache_dir: see `sources.open_pool`.
        progress: whether to show a progress bar.
    """

    strategy: str = "auto"
    tpu: str | None = None
    cache_dir: str | None = None
    progress: bool = True


class Share(NamedTuple):
    """A process's share of the work.

    Attributes:
        worker: which process this is, from 0; it does every num_workers-th piece.
        num_workers: processes that share the work.
    """

    worker: int = 0
    num_workers: int = 1


def check(scoring: Scoring, share: Share, num_replicas: int) -> None:
    """Refuses settings that cannot be.

    Raises:
        ValueError: for a similarity that is none, numbers that are not whole or too small, a worker that is not one of
            them, or a batch that does not divide among the replicas.
    """
    similarity, batch_size, chunk_size = scoring
    if not isinstance(similarity, (int, float)) or not 0 < similarity <= 1:
        raise ValueError(f"Expected near_duplicate as a number above 0 and up to 1. Received: {similarity!r}")
    worker, num_workers = share
    whole = all(isinstance(number, int) for number in (batch_size, chunk_size, worker, num_workers))
    if not whole or batch_size < 1 or chunk_size < 1 or not 0 <= worker < num_workers:
        raise ValueError(
            "Expected a batch_size and a chunk_size >= 1 and a worker from 0 to num_workers - 1. "
            f"Received: {batch_size!r}, {chunk_size!r}, {worker!r} of {num_workers!r}"
        )
    if batch_size % num_replicas:
        raise ValueError(f"Expected a batch_size that divides among {num_replicas} replicas. Received: {batch_size}")
