"""Searches: attacks as runs of steps on one state per example, so that examples can come and go between steps.

    @attack
    def my_attack(*, threat, num_steps=100):
        return Search(name="my-attack", num_runs=lambda num_classes: 1, num_steps=num_steps, start=..., step=...)

    x_adv = my_attack(logits_fn, x, labels, threat=linf, seeds=seeds)  # as any attack
    search = my_attack.search(threat=linf)  # its parts, for `evaluation.batching` to pack

An example is broken by a search when any step of any of its runs proposes a misclassified image; runs are independent
(restarts, target classes), so leaving early, or running next to other examples, changes no verdict.
"""

import functools
import inspect
import numbers
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import tensorflow as tf

from robust_keras import compilation, losses, noise, threats


class Search(NamedTuple):
    """An attack in parts.

    Attributes:
        name: what results call it.
        num_runs: `(num_classes) -> int`, independent runs per example.
        num_steps: int, steps of each run.
        start: `(x, labels, clean_logits, seeds, run) -> state`, a dictionary of tensors `[batch, ...]`. `seeds` are
            int32 `[batch, 2]`, different in every run; `run` is int32 `[batch]`, from 0 to num_runs - 1.
        step: `(logits_fn, x, labels, state, k) -> (state, x_adv, broken)`: the next state, an image inside the threat
            model and whether it is misclassified, bool `[batch]`. `k` is int32 `[batch]`, how many steps of its run
            each example has behind it: examples of one batch may be at different steps of different runs.
        loss_fn: `(logits, labels) -> [batch]`, the loss whose gradient the first run follows; None where none does.
    """

    name: str
    num_runs: Callable
    num_steps: int
    start: Callable
    step: Callable
    loss_fn: Callable | None = None


class Progress(NamedTuple):
    """Where the runs of a batch stand.

    Attributes:
        state: of the search, a dictionary of tensors `[batch, ...]`.
        k: int32 `[batch]`, steps behind each example.
        found: float32 like the images: the first misclassified one, and the clean one before that.
        broken: bool `[batch]`.
    """

    state: dict
    k: tf.Tensor
    found: tf.Tensor
    broken: tf.Tensor


def begin(
    search: Search, x: tf.Tensor, labels: tf.Tensor, clean_logits: tf.Tensor, seeds: tf.Tensor, run: tf.Tensor
) -> Progress:
    """The `Progress` of runs that have not taken a step; `run` is int32 `[batch]`."""
    state = search.start(x, labels, clean_logits, noise.fold_in(seeds, run), run)
    return Progress(state, tf.zeros_like(run), x, tf.zeros_like(run, tf.bool))


def advance(
    search: Search, logits_fn: Callable, x: tf.Tensor, labels: tf.Tensor, progress: Progress, num_steps: int | tf.Tensor
) -> Progress:
    """Takes `num_steps` (an int or int32 scalar) steps, none past a run's end; one compiled loop of static shapes."""

    def body(i, progress):
        state, x_adv, broken = search.step(logits_fn, x, labels, progress.state, progress.k)
        new = broken & ~progress.broken & (progress.k < search.num_steps)
        following = Progress(state, progress.k + 1, choose(new, x_adv, progress.found), progress.broken | new)
        return i + 1, following

    return tf.while_loop(lambda i, _: i < num_steps, body, (tf.constant(0), progress))[1]


def seeds_of(search: Search | None, seeds: tf.Tensor) -> tf.Tensor:
    """The seeds of a search's runs, int32 `[batch, 2]`: the same whether it runs alone or after others.

    Args:
        search: a `Search`; None for an attack that is none.
        seeds: int32 `[batch, 2]`, of the examples.
    """
    return seeds if search is None else noise.fold_in(seeds, zlib.crc32(search.name.encode()) & 0x7FFFFFFF)


def attack(build: Callable[..., Search]) -> Callable:
    """Makes an attack, `(logits_fn, x, labels, *, seeds, **settings) -> x_adv`, of a function that builds a `Search`.

    The attack takes all runs of all examples. `x_adv` is float32 like `x`: a misclassified image of the threat model,
    or `x` itself where it is misclassified already or no run broke it. The attack's attribute `search` is `build`.
    """

    def run_all(logits_fn, x, labels, *, seeds, **settings):
        search = build(**settings)
        x = threats.check_images(x, settings["threat"])
        labels = losses.as_labels(labels)
        clean_logits = logits_fn(x)

        def run(r, found, broken):
            progress = begin(search, x, labels, clean_logits, seeds, tf.zeros_like(labels) + r)
            progress = advance(search, logits_fn, x, labels, progress, search.num_steps)
            return r + 1, choose(broken, found, progress.found), broken | progress.broken

        num_runs = search.num_runs(clean_logits.shape[-1])
        nothing = (tf.constant(0), x, losses.is_wrong(clean_logits, labels))
        return tf.stop_gradient(tf.while_loop(lambda r, *_: r < num_runs, run, nothing)[1])

    kinds = inspect.Parameter
    given = [kinds(name, kinds.POSITIONAL_OR_KEYWORD) for name in ("logits_fn", "x", "labels")]
    settings = [*inspect.signature(build).parameters.values(), kinds("seeds", kinds.KEYWORD_ONLY)]
    made: Any = functools.wraps(build)(run_all)
    made.__signature__ = inspect.Signature(given + settings)
    made.search = build
    return made


def check_counts(**counts: int) -> None:
    """Raises ValueError for settings, by name, that are no whole numbers of at least 1."""
    if any(isinstance(each, bool) or not isinstance(each, numbers.Integral) or each < 1 for each in counts.values()):
        *names, last = counts
        named = f"{', '.join(names)} and {last}" if names else last
        received = ", ".join(map(repr, counts.values()))
        raise ValueError(f"Expected whole numbers {named} >= 1. Received: {received}")


def value_and_gradient(
    logits_fn: Callable, x_adv: tf.Tensor, loss_fn: Callable
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A loss and its gradient by the images.

    Entries of the gradient that are no finite numbers count as zero, as those of a square root at black pixels: the
    others still show the way.

    Args:
        logits_fn: images to logits.
        x_adv: float32 `[batch, ...]`.
        loss_fn: `(logits) -> [batch]`.

    Returns:
        `(logits, loss, gradient)`: `[batch, num_classes]`, `[batch]` and like `x_adv`; the gradient is zero where there
        is none.
    """
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(x_adv)
        logits = logits_fn(x_adv)
        loss = loss_fn(logits)
        # An example's gradient is its own: the sum couples examples only through batch statistics.
        total = tf.reduce_sum(loss)
    gradient = tape.gradient(total, x_adv, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    gradient.set_shape(x_adv.shape)  # That of a loaded model forgets the size of the batch.
    return logits, loss, finite_or_zero(gradient)


def finite_or_zero(values: tf.Tensor) -> tf.Tensor:
    """`values`, and zero where they are no finite numbers."""
    if compilation.is_on_cpu() and values.shape.rank != 2:
        return like(finite_or_zero(flat(values)), values)
    return tf.where(tf.math.is_finite(values), values, tf.zeros_like(values))


def target_class(clean_logits: tf.Tensor, labels: tf.Tensor, rank: tf.Tensor) -> tf.Tensor:
    """The wrong class of each example with the `rank`-th highest clean logit, from 0: int32 `[batch]`."""
    is_label = tf.one_hot(labels, clean_logits.shape[-1], on_value=True, off_value=False)
    order = tf.math.top_k(tf.where(is_label, clean_logits.dtype.min, clean_logits), clean_logits.shape[-1]).indices
    return tf.gather(order, rank, batch_dims=1)


def choose(condition: tf.Tensor, a: tf.Tensor, b: tf.Tensor) -> tf.Tensor:
    """`a` where `condition`, bool `[batch]`, holds, else `b`; both `[batch, ...]`."""
    # With a condition of four axes it would be three times slower on CPU.
    return like(tf.where(condition[:, None], flat(a), flat(b)), a)


def flat(values: tf.Tensor) -> tf.Tensor:
    """The same numbers `[batch, ...]` as a matrix `[batch, n]`: loops over three channels are slow on CPU."""
    rest = values.shape[1:]
    count = rest.num_elements() if rest.is_fully_defined() else -1
    return tf.reshape(values, (values.shape[0] or tf.shape(values)[0], count))


def like(values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """The same numbers in the shape of `x`."""
    return tf.reshape(values, x.shape if x.shape.is_fully_defined() else tf.shape(x))


def expand(values: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """`values` `[batch]` with as many axes as `x`, to broadcast against it."""
    return tf.reshape(values, (-1,) + (1,) * (x.shape.rank - 1))
