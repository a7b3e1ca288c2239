"""Attacks over many examples, in fixed-size batches, a few compiled steps at a time.

A search runs in slots. Between compiled calls, an example that has fallen gives its slot to the next one, whatever step
the others are at: no work is done for an example whose verdict is known. Randomness and state are each example's own,
so its verdict is that of running alone. All replicas of the strategy in scope share the slots; several processes keep
the same books and compute their parts.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import noise
from robust_keras.attacks import attack as attacks
from robust_keras.attacks import stepwise
from robust_keras.engines import replicas
from robust_keras.evaluation.examples import Examples
from robust_keras.models.any_network import sized

# Steps between two looks at which examples have fallen: so many, or one in a hundred of longer runs.
_STEPS = 10
# Steps of examples that have to be saved by a smaller batch before it is compiled.
_WORTH_COMPILING = 2000


class Batches(NamedTuple):
    """How examples are packed.

    Attributes:
        batch_size: slots, over all replicas.
        seed: of the attacks' noise.
        jit_compile: whether to compile with XLA.
        shrinks: whether batches become smaller where fewer runs are left; a model may take one size alone.
    """

    batch_size: int
    seed: int = 0
    jit_compile: bool = False
    shrinks: bool = True


class Programs(NamedTuple):
    """What is compiled of an attack, functions of a batch on one replica; either `run`, or `begin` and `advance`.

    Attributes:
        run: `(x, labels, seeds) -> x_adv`, of a plain function.
        begin: `(x, labels, clean_logits, seeds, run) -> stepwise.Progress`, of a search.
        advance: `(x, labels, progress, num_steps) -> stepwise.Progress`.
    """

    run: Any = None
    begin: Any = None
    advance: Any = None


def programs(attack: attacks.Attack, logits_fn: Callable, num_classes: int) -> Programs:
    """The functions that an evaluation compiles for an attack.

    Args:
        attack: the record.
        logits_fn: images to logits.
        num_classes: of the logits.

    Returns:
        A `Programs`.
    """

    logits_fn = sized(logits_fn, num_classes)
    if attack.search is None:

        def run(x, labels, seeds):
            return attacks.checked(attack.run(logits_fn, x, labels, seeds=seeds), x, attack.name)

        return Programs(run=run)

    def begin(x, labels, clean_logits, seeds, run):
        return stepwise.begin(attack.search, x, labels, clean_logits, seeds, run)

    def advance(x, labels, progress, num_steps):
        return stepwise.advance(attack.search, logits_fn, x, labels, progress, num_steps)

    return Programs(begin=begin, advance=advance)


def work_of(
    attack: attacks.Attack, logits_fn: Callable, examples: Examples, indices: np.ndarray, batches: Batches
) -> "Packing | Batchwise":
    """The attack at work on the examples `indices`: a `Packing` of a search, a `Batchwise` of a plain function."""
    return (Packing if attack.search else Batchwise)(attack, logits_fn, examples, indices, batches)


class Packing:
    """One search over chosen examples, resumable between any two calls of `advance`.

    Attributes:
        unit: what is counted below, for people.
        broken: bool `[num_examples]`, which examples the search has broken so far.
        num_steps: of all runs of all examples.
        steps_taken: summed over examples.
        steps_left: an upper bound of those still to take, summed over examples.
    """

    unit = " steps of an image"

    def __init__(
        self, attack: attacks.Attack, logits_fn: Callable, examples: Examples, indices: np.ndarray, batches: Batches
    ) -> None:
        """
        Args:
            attack: the record of a search; of others, ValueError is raised.
            logits_fn: images to logits.
            examples: all of the evaluation.
            indices: int `[n]`, those to attack.
            batches: how.
        """
        if attack.search is None:
            raise ValueError(f"Expected the record of a search. Received: {attack.name}")
        self._search, self._examples, self._batches = attack.search, examples, batches
        self.begin(indices, range(self._search.num_runs(examples.num_classes)))

        def merge(is_new, new, old):
            return tf.nest.map_structure(lambda n, o: stepwise.choose(is_new, n, o), new, old)

        _, start, advance = programs(attack, logits_fn, examples.num_classes)
        self._start = replicas.over_replicas(start, jit_compile=batches.jit_compile)
        self._advance = replicas.over_replicas(advance, jit_compile=batches.jit_compile)
        self._merge = replicas.over_replicas(merge)

    def begin(self, indices: np.ndarray, runs: Sequence[int]) -> None:
        """Begins anew, with the programs that are compiled.

        Args:
            indices: int `[n]`, the examples to attack.
            runs: by number, those of the search to take.
        """
        self._indices, self._numbers = np.asarray(indices), np.asarray(runs)
        self._next = 0  # Into the queue: the first run of every example, then the second of every example, ...
        self._slots = np.zeros((0, 2), np.int64)  # (example, run) of each slot; example -1 is an empty one.
        self._steps = np.zeros(0, np.int64)  # Behind each slot.
        self._batch: Any = None  # x, labels and progress of the slots, on the device.
        self._runs = np.full(len(self._examples.labels), len(runs))  # Of each example.
        self.steps_taken = 0
        self.broken = np.zeros(len(self._examples.labels), bool)

    @property
    def num_steps(self) -> int:
        return int(self._runs[self._indices].sum()) * self._search.num_steps

    def take_first_run_only(self, chosen: np.ndarray) -> None:
        """Of the examples that are `chosen`, bool `[num_examples]`, only the first run is left to do."""
        self._runs[chosen] = 1

    @property
    def steps_left(self) -> int:
        active = self._slots[:, 0] >= 0
        return (len(self._queued()) + int(active.sum())) * self._search.num_steps - int(self._steps[active].sum())

    def advance(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Takes some steps.

        Returns:
            None where nothing is left to do; else (indices, images) of the examples that fell, int64 `[n]` and float32
            `[n, ...]`.
        """
        self._fill()
        active = self._slots[:, 0] >= 0
        if not active.any():
            return None
        x, labels, progress = self._batch
        num_steps = chunk(self._search.num_steps, self._search.num_steps - int(self._steps[active].max()))
        progress = self._advance(x, labels, progress, tf.constant(num_steps))
        self._batch = x, labels, progress
        self._steps += num_steps
        self.steps_taken += num_steps * int(active.sum())
        fallen = np.flatnonzero(active & progress.broken.numpy())
        # Of several runs that broke an example at once, the first counts.
        fallen = fallen[np.argsort(self._slots[fallen, 1], kind="stable")]
        indices, first = np.unique(self._slots[fallen, 0], return_index=True)
        images = tf.gather(progress.found, fallen[first]).numpy()
        self.broken[indices] = True
        ended = (self._steps >= self._search.num_steps) | self.broken[self._slots[:, 0]]
        self._slots[ended, 0] = -1
        return indices, images

    def save(self) -> dict[str, np.ndarray]:
        """NumPy arrays by name, from which `restore` goes on."""
        arrays = {"slots": self._slots, "steps": self._steps, "broken": self.broken}
        arrays |= {"next": np.array(self._next), "taken": np.array(self.steps_taken)}
        if self._batch is not None:
            arrays |= {f"progress/{k:03d}": leaf.numpy() for k, leaf in enumerate(tf.nest.flatten(self._batch[2]))}
        return arrays

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        """Takes up where `save` was called, bit for bit, on any number of replicas."""
        slots, steps, self.broken = (np.array(arrays[name]) for name in ("slots", "steps", "broken"))
        self._next, self.steps_taken = int(arrays["next"]), int(arrays["taken"])
        leaves = [arrays[name] for name in sorted(arrays) if name.startswith("progress/")]
        missing = -len(slots) % replicas.num_replicas()
        self._slots = np.concatenate([slots, np.full((missing, 2), -1)])
        self._steps = np.concatenate([steps, np.zeros(missing, np.int64)])
        if leaves:
            copies = np.arange(len(slots) + missing) % len(slots)  # Empty slots hold copies.
            leaves = [leaf[copies] for leaf in leaves]
            x, labels, progress = self._fresh(self._slots)
            leaves = [tf.constant(saved, leaf.dtype) for saved, leaf in zip(leaves, tf.nest.flatten(progress))]
            self._batch = x, labels, tf.nest.pack_sequence_as(progress, leaves)

    def _queued(self):
        """Places in the queue, from the next on, of runs of examples that still stand."""
        places = np.arange(self._next, len(self._numbers) * len(self._indices))
        if not len(places):
            return places
        examples, runs = self._indices[places % len(self._indices)], places // len(self._indices)
        return places[~self.broken[examples] & (runs < self._runs[examples])]

    def _fill(self):
        queued = self._queued()
        active = np.flatnonzero(self._slots[:, 0] >= 0)
        size = self._size(len(queued) + len(active))
        longest = self._search.num_steps - int(self._steps[active].min(initial=self._search.num_steps))
        if not len(self._slots) or self._is_worth_compiling(len(self._slots) - size, longest):
            # Full slots first; what is missing is filled up with copies of any slot, as empty ones.
            kept = np.resize(active, size) if len(active) else np.zeros(size, int)
            slots, steps = np.full((size, 2), -1), np.zeros(size, np.int64)
            slots[: len(active)], steps[: len(active)] = self._slots[active], self._steps[active]
            if len(self._slots):
                self._batch = tf.nest.map_structure(lambda leaf: tf.gather(leaf, kept), self._batch)
            self._slots, self._steps = slots, steps
        free = np.flatnonzero(self._slots[:, 0] < 0)[: len(queued)]
        if not len(free):
            return
        places = queued[: len(free)]
        self._slots[free, 0] = self._indices[places % len(self._indices)]
        self._slots[free, 1] = self._numbers[places // len(self._indices)]
        self._steps[free] = 0
        self._next = int(places[-1]) + 1
        fresh = self._fresh(self._slots)
        is_new = np.zeros(len(self._slots), bool)
        is_new[free] = True
        self._batch = fresh if self._batch is None else self._merge(tf.constant(is_new), fresh, self._batch)

    def _size(self, num_left):
        """How many slots hold what is left, at first in rounds of one size where it is more than a batch, later at most
        as many as there are; each replica has the same number.
        """
        batch_size, num_replicas = self._batches.batch_size, replicas.num_replicas()
        if not self._batches.shrinks:
            return batch_size
        size = max(num_left, 1)
        if len(self._slots):
            size = min(size, len(self._slots))
        else:
            size = math.ceil(size / math.ceil(size / batch_size))
        return math.ceil(size / num_replicas) * num_replicas

    def _is_worth_compiling(self, num_saved, num_steps):
        """Whether so many slots fewer, for so many steps, are: a sixteenth of the batch at least, as images fall one by
        one.
        """
        return num_saved * num_steps > _WORTH_COMPILING and 16 * num_saved >= self._batches.batch_size

    def _fresh(self, slots):
        """Images, labels and progress of runs that begin; empty slots hold copies."""
        indices = np.where(slots[:, 0] < 0, slots[:, 0].max(), slots[:, 0])
        x, labels, seeds = inputs(self._examples, indices, self._batches.seed)
        seeds = stepwise.seeds_of(self._search, seeds)
        clean_logits = tf.constant(self._examples.clean_logits[indices])
        runs = tf.constant(np.maximum(slots[:, 1], 0), tf.int32)
        return x, labels, self._start(x, labels, clean_logits, seeds, runs)


class Batchwise:
    """An attack that is a plain function, over chosen examples, each one step; the interface of `Packing`."""

    unit = " images"

    def __init__(
        self, attack: attacks.Attack, logits_fn: Callable, examples: Examples, indices: np.ndarray, batches: Batches
    ) -> None:
        """
        Args:
            attack: the record of a plain function.
            logits_fn: see `Packing`, like all that follow.
            examples: see there.
            indices: see there.
            batches: see there.
        """
        self._examples, self._indices, self._batches = examples, np.asarray(indices), batches
        self.num_steps = len(self._indices)
        self.steps_taken = 0
        self._name = attack.name
        run = programs(attack, logits_fn, examples.num_classes).run
        self._run = replicas.over_replicas(run, jit_compile=batches.jit_compile)

    @property
    def steps_left(self) -> int:
        return len(self._indices) - self.steps_taken

    def advance(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Attacks a batch.

        Returns:
            None where none is left; else (indices, images) of all its examples.
        """
        batch_size, seed = self._batches.batch_size, self._batches.seed
        chosen = self._indices[self.steps_taken : self.steps_taken + batch_size]
        if not len(chosen):
            return None
        self.steps_taken += len(chosen)
        x, labels, seeds = inputs(self._examples, np.resize(chosen, batch_size), seed)
        return chosen, attacks.checked(self._run(x, labels, seeds), x, self._name).numpy()[: len(chosen)]

    def save(self) -> dict[str, np.ndarray]:
        return {"taken": np.array(self.steps_taken)}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.steps_taken = int(arrays["taken"])


def chunk(num_steps: int, left: int) -> int:
    """Steps of a compiled call: no further than to the end of the run that is nearest to it.

    All runs pass one such end on their way, which keeps them in step. A call of one step alone costs what others do:
    where hardly more than a usual call is left, it takes all of it.

    Args:
        num_steps: of a run.
        left: of the run that has the fewest left.
    """
    usual = max(_STEPS, num_steps // 100)
    return left if left <= usual + usual // 5 else usual


def inputs(examples: Examples, indices: np.ndarray, seed: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """float32 images in [0, 1], int32 labels and int32 seeds `[n, 2]` of the examples `indices`."""
    images = examples.images[indices]
    x = tf.constant(images, tf.float32)
    x = x / 255.0 if images.dtype == np.uint8 else x
    seeds = noise.example_seeds(seed, 0, tf.constant(indices, tf.int32))
    return x, tf.constant(examples.labels[indices], tf.int32), noise.fold_in(seeds, noise.ATTACK)
