"""What Keras users give to `fit` and `evaluate`, as batches: arrays, `tf.data.Dataset`s, `PyDataset`s, generators.

given = batches(x, y, batch_size=32, shuffle=True, seed=0)
for images, labels, weights in given.of_epoch(0): ...
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

_BATCH_SIZE = 32  # Keras' own.


class Given(NamedTuple):
    """Batches of what was given.

    Attributes:
        of_epoch: from the number of an epoch to its batches, an iterable of `(images, labels, weights)`, weights None
            where none were given.
        first: gives the first batch, which the first epoch then still has.
        num_batches: in an epoch; None where that is not known.
        last_size: examples in the last one; None where that is not known.
        starts_anew: whether a pass begins where the last one ended, as of arrays and `PyDataset`s.
        is_read_once: whether there is one pass, as of a generator.
    """

    of_epoch: Callable[[int], Iterable]
    first: Callable[[], tuple]
    num_batches: int | None
    last_size: int | None = None
    starts_anew: bool = True
    is_read_once: bool = False

    def read_on(self, steps_per_epoch: int) -> Callable[[int], Iterator]:
        """Like `of_epoch`, but an epoch goes on where the last one stopped; what starts anew does so at its end.

        Where the first epoch that is asked for is a later one, those before it count as read.
        """
        begun: list[Iterator] = []

        def of_epoch(epoch: int) -> Iterator:
            if not begun:
                read = epoch * steps_per_epoch if self.starts_anew else 0
                done, rest = divmod(read, self.num_batches) if self.num_batches else (0, read)
                passes = itertools.count(done) if self.starts_anew else range(1)
                begun.append(itertools.islice(itertools.chain.from_iterable(map(self.of_epoch, passes)), rest, None))
            return begun[0]

        return of_epoch


def batches(
    x: Any,
    y: Any = None,
    *,
    sample_weight: Any = None,
    batch_size: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Given:
    """Batches of arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a generator.

    Args:
        x: images `[N, ...]`, or batches `(images, labels[, weights])` of any of the other kinds.
        y: labels, one an image; None where `x` has them.
        sample_weight: weights `[N]`; None for none.
        batch_size: images in a batch, over all processes; 32 by default. Of arrays alone.
        shuffle: whether arrays are shuffled, in each epoch anew.
        seed: of the order, which depends on it and the epoch alone.
        process: (index, number) of the processes that share each batch of arrays, each a part of it. Batches of the
            other kinds are each process' own.

    Returns:
        A `Given`.

    Raises:
        ValueError: for none of these, arrays of different lengths, none at all, or what belongs to arrays given with
            something else.
    """
    if isinstance(x, (tf.data.Dataset, keras.utils.PyDataset)) or hasattr(x, "__next__"):
        for name, value in {"y": y, "sample_weight": sample_weight, "batch_size": batch_size}.items():
            if value is not None:
                kind = "tf.data.Dataset" if isinstance(x, tf.data.Dataset) else type(x).__name__
                raise ValueError(f"Expected no {name} beside a {kind}, which has its own. Received: one")
        return _of_batches(x)
    arrays = [_array(each) for each in (x, y, sample_weight) if each is not None]
    if y is None or any(not len(array.shape) for array in arrays):
        raise ValueError(
            "Expected arrays x and y, or a tf.data.Dataset, PyDataset or generator of (images, labels[, weights]). "
            f"Received: {type(x).__name__} and {type(y).__name__}"
        )
    lengths = [len(array) for array in arrays]
    if not any(lengths):
        raise ValueError("Expected at least one image. Received: none")
    if len(set(lengths)) > 1:
        raise ValueError(f"Expected a label, and a weight where there are some, for each image. Received: {lengths}")
    size = _BATCH_SIZE if batch_size is None else batch_size
    if not isinstance(size, (int, np.integer)) or size < 1 or size % process[1]:
        raise ValueError(f"Expected a batch_size >= 1 that {process[1]} processes divide. Received: {batch_size!r}")
    return _of_arrays(arrays, int(size), shuffle, seed, process)


def split(x: Any, y: Any, sample_weight: Any, fraction: float) -> tuple[tuple, tuple]:
    """Arrays without their last part, and that part, as Keras' `validation_split` has it: two `(x, y, weights)`.

    Raises:
        ValueError: for a fraction that is none, or leaves nothing, and for what are no arrays.
    """
    if y is None or not hasattr(x, "__len__"):
        raise ValueError(f"Expected arrays x and y with a validation_split. Received: {type(x).__name__}")
    num_left = math.floor(len(x) * (1.0 - fraction)) if 0 < fraction < 1 else 0
    if not 0 < num_left < len(x):
        raise ValueError(
            f"Expected a validation_split between 0 and 1 that leaves images on both sides. Received: {fraction!r}"
        )
    arrays = [None if each is None else _array(each) for each in (x, y, sample_weight)]
    first, last = (
        tuple(None if each is None else each[part] for each in arrays)
        for part in (slice(None, num_left), slice(num_left, None))
    )
    return first, last


def _array(values: Any) -> Any:
    """An array in memory, or one that is read in parts as it is."""
    if hasattr(values, "to_numpy"):  # A table or a column of pandas is indexed by names.
        values = values.to_numpy()
    if isinstance(values, np.ndarray) or (hasattr(values, "shape") and hasattr(values, "__getitem__")):
        return values.numpy() if tf.is_tensor(values) else values
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"Expected arrays of one shape. Received: {' '.join(str(error).split())}") from error


def _of_arrays(arrays, batch_size, shuffle, seed, process):
    index, num_processes = process
    num_examples = len(arrays[0])
    num_batches = -(-num_examples // batch_size)

    def of_epoch(epoch: int) -> Iterator:
        order = np.arange(num_examples)
        if shuffle:
            order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(num_examples)
        for start in range(0, num_examples, batch_size):
            whole = order[start : start + batch_size]
            mine = np.split(whole, num_processes)[index] if num_processes > 1 else whole
            # Files on disk are read from front to back.
            ascending = np.sort(mine)
            back = np.argsort(np.argsort(mine))
            values = [np.asarray(array[ascending])[back] for array in arrays]
            yield (*values, None)[:3]

    last_size = num_examples - (num_batches - 1) * batch_size
    return Given(of_epoch, lambda: next(of_epoch(0)), num_batches, last_size)


def _of_batches(given):
    if isinstance(given, keras.utils.PyDataset):
        return _of_iterables(_passes_of(given), given.num_batches)
    if isinstance(given, tf.data.Dataset):
        length = int(given.cardinality())
        return _of_iterables(lambda: given, length if length >= 0 else None, starts_anew=False)
    return _of_iterables(lambda: given, None, starts_anew=False, is_read_once=True)


def _passes_of(given):
    """`() -> batches` of a `PyDataset`, which is told of the end of a pass when another one begins."""
    begun = []

    def make():
        if begun:
            given.on_epoch_end()
        begun.append(True)
        return map(given.__getitem__, itertools.count() if given.num_batches is None else range(given.num_batches))

    return make


def _of_iterables(make, length, *, starts_anew=True, is_read_once=False):
    """A `Given` of what `make()` gives for each epoch."""
    begun: list[tuple[tuple, Iterator]] = []  # The first batch of a pass, and what follows it.

    def first() -> tuple:
        if not begun:
            iterator = map(_unpacked, make())
            try:
                begun.append((next(iterator), iterator))
            except StopIteration:
                raise ValueError("Expected a dataset with batches in it. Received: an empty one") from None
        return begun[0][0]

    def of_epoch(epoch: int) -> Iterator:
        if not begun:
            return map(_unpacked, make())
        batch, others = begun.pop()
        return itertools.chain([batch], others)

    return Given(of_epoch, first, length, starts_anew=starts_anew, is_read_once=is_read_once)


def _unpacked(batch):
    """`(images, labels, weights)` of a batch."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
        raise ValueError(f"Expected batches of (images, labels) or (images, labels, weights). Received: a {kind}")
    return (*batch, None)[:3]
