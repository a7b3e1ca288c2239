"""Square Attack (Andriushchenko et al. 2020, https://arxiv.org/abs/1912.00049): random search without gradients.

    x_adv = square(logits_fn, x, labels, threat=linf, seeds=seeds)

Every query changes a square window of the best image so far, and is kept where it lowers the margin. The windows shrink
over the queries. Numbers and laws are those of the black-box part of AutoAttack, but every example draws its own.
"""

import bisect
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras import compilation, losses, noise, threats
from robust_keras.attacks import stepwise

# Queries after which the windows' share of the image is halved.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_TINY = 1e-12


class Draws(NamedTuple):
    """The random numbers of one query.

    Attributes:
        top: int32 `[batch, 2]`, the first rows of two windows. Linf uses the first window alone.
        left: int32 `[batch, 2]`, their first columns.
        transposed: bool `[batch]`, whether the pattern is.
        signs: float32 `[batch, channels]`, 1 or -1.
    """

    top: tf.Tensor
    left: tf.Tensor
    transposed: tf.Tensor
    signs: tf.Tensor


@stepwise.attack
def square(
    *, threat: threats.Threat, num_queries: int = 5000, num_restarts: int = 1, p_init: float = 0.8
) -> stepwise.Search:
    """Square Attack on the margin, with the window schedule of AutoAttack, which does not scale with `num_queries`.

    Step 0 of a run evaluates its start: vertical stripes (Linf) or tiles (L2, L1). Each later step is one query.

    Args:
        threat: a `threats.Threat`.
        num_queries: queries of a run after its start, an int >= 1.
        num_restarts: independent runs, an int >= 1.
        p_init: the share of the image that the first windows cover, in (0, 1].

    Returns:
        A `Search` on images `[batch, height, width, channels]` named 'square'.

    Raises:
        ValueError: for a setting outside these ranges, a norm other than Linf, L2 and L1, or images of another rank.
    """
    stepwise.check_counts(num_queries=num_queries, num_restarts=num_restarts)
    if not 0 < p_init <= 1:
        raise ValueError(f"Expected p_init in (0, 1]. Received: {p_init!r}")
    if threat.norm not in _NORMS:
        raise ValueError(f"Expected a norm out of {', '.join(_NORMS)}. Received: {threat.norm!r}")
    perturbation, proposal, smallest = _NORMS[threat.norm]

    def start(x, labels, clean_logits, seeds, run):
        del labels, clean_logits
        if x.shape.rank != 4:
            raise ValueError(f"Expected images [batch, height, width, channels]. Received: {x.shape}")
        # Not inside the ball yet: step 0 proposes it with an empty window, and so projects it as any query.
        delta = perturbation(noise.fold_in(seeds, 0), tuple(x.shape[1:]), epsilon=threat.epsilon)
        margin = tf.fill(tf.shape(x)[:1], math.inf)
        words = _words(seeds, tf.zeros_like(run), num=5 + x.shape[-1])
        return {"x_best": x + delta, "margin": margin, "seeds": seeds, "words": words}

    def step(logits_fn, x, labels, state, k):
        height, width, num_channels = x.shape[1:]
        sides = window_sides(height, width, num_steps=num_queries + 1, p_init=p_init, smallest=smallest)
        # A batch may hold examples whose run is over.
        side = tf.gather(tf.constant(sides, tf.int32), tf.minimum(k, num_queries))
        draws = draw(state["words"], side, height, width)
        x_adv = proposal(x, state["x_best"], draws, side, tuple(sorted(set(sides))), epsilon=threat.epsilon)
        logits = logits_fn(x_adv)
        margin = -losses.margin(logits, labels)
        better = (margin < state["margin"]) | (margin <= 0.0)
        following = {
            "x_best": stepwise.choose(better, x_adv, state["x_best"]),
            "margin": tf.where(better, margin, state["margin"]),
            "seeds": state["seeds"],
            # A step ahead, to enter the next by its state: XLA on CPU would make them again for every pixel.
            "words": _words(state["seeds"], k + 1, num=5 + num_channels),
        }
        # A wrong prediction has a margin of 0 or less; the reverse fails where a tie goes to the label.
        return following, x_adv, losses.is_wrong(logits, labels)

    return stepwise.Search("square", lambda num_classes: num_restarts, num_queries + 1, start, step)


def window_sides(height: int, width: int, *, num_steps: int, p_init: float = 0.8, smallest: int = 1) -> list[int]:
    """The side of the window at each step: a list of ints, 0 at the start's step.

    Query i (step i + 1) covers a share p of the image: side = round(sqrt(p * height * width)), where p is `p_init`
    halved for each of the schedule's marks that i has passed. Where `smallest` is more than 1, sides are
    odd. No side is more than the image's shorter one.
    """

    def side(query):
        share = p_init / 2 ** bisect.bisect_left(_HALVINGS, query)
        wanted = max(round(math.sqrt(share * height * width)), smallest)
        return min(wanted + (smallest > 1 and wanted % 2 == 0), height, width)

    return [0] + [side(query) for query in range(num_steps - 1)]


@compilation.fused
def _words(seeds, k, *, num):
    """The random words of query `k`, uint32 `[batch, num]`."""
    return noise.bits(noise.fold_in(seeds, k), num)


@compilation.fused
def draw(words: tf.Tensor, side: tf.Tensor, height: int, width: int) -> Draws:
    """The `Draws` made of random words, uint32 `[batch, 5 + channels]`, for windows of `side`, int32 `[batch]`.

    The first row is floor(u * (height - side)) for u uniform in [0, 1), which is never height - side unless that is 0.
    """
    high = tf.bitwise.right_shift(words[:, :4], 16)
    room = tf.stack([height - side, width - side] * 2, axis=1)
    first = tf.bitcast(tf.bitwise.right_shift(high * tf.bitcast(room, tf.uint32), 16), tf.int32)
    return Draws(
        top=first[:, 0::2],
        left=first[:, 1::2],
        transposed=tf.equal(_sign(words[:, 4]), 1.0),
        signs=_sign(words[:, 5:]),
    )


def stripes(seeds: tf.Tensor, shape: tuple[int, int, int], *, epsilon: float) -> tf.Tensor:
    """The start for Linf: columns of -epsilon or epsilon, `[batch, height, width, channels]`."""
    height, width, num_channels = shape
    signs = _sign(noise.bits(seeds, width * num_channels))
    return tf.tile(epsilon * tf.reshape(signs, (-1, 1, width, num_channels)), (1, height, 1, 1))


def tiles(seeds: tf.Tensor, shape: tuple[int, int, int], *, epsilon: float, norm: "TileNorm") -> tf.Tensor:
    """The start for L2 and L1: a grid of small `eta`, of whole tiles that fit, `[batch, height, width, channels]`."""
    del epsilon  # The projection sets the length.
    height, width, num_channels = shape
    side = min(max(height // 5, 1), width)
    top = max((height - 5 * side) // 2, 0)
    left = min(top, width - side)
    rows, columns = (height - top) // side, (width - left) // side
    words = tf.reshape(
        noise.bits(seeds, rows * columns * (1 + num_channels)), (-1, rows, 1, columns, 1, 1 + num_channels)
    )
    pattern = eta(side, norm).reshape(side, 1, side, 1)
    transposed = tf.equal(_sign(words[..., :1]), 1.0)
    grid = tf.where(transposed, pattern.transpose(2, 1, 0, 3), pattern) * _sign(words[..., 1:])
    grid = tf.reshape(grid, (-1, rows * side, columns * side, num_channels))
    margins = [[top, height - top - rows * side], [left, width - left - columns * side]]
    return tf.pad(grid, [[0, 0], *margins, [0, 0]])


def eta(side: int, norm: "TileNorm") -> np.ndarray:
    """Two opposite bumps, one above the other, of unit length: float32 `[side, side]` (section 4.3 of the paper)."""
    upper = side // 2
    pattern = np.concatenate([_bump(upper, side, norm), -_bump(side - upper, side, norm)])
    return (pattern / np.linalg.norm(pattern.ravel(), norm.order)).astype(np.float32)


def _bump(rows, columns, norm):
    # Centred squares of half-side n = 0, 1, 2, ..., each (n + 1)^-decay high, one upon the other.
    heights = np.arange(1.0, max(rows, columns) // 2 + 2) ** -norm.decay
    stacked = np.cumsum(heights[::-1])[::-1]
    from_middle = (np.abs(np.arange(num) - num // 2) for num in (rows, columns))
    bump = stacked[np.maximum.outer(*from_middle)]
    return bump / np.linalg.norm(bump.ravel(), norm.order)


@compilation.fused
def linf_proposal(
    x: tf.Tensor, x_best: tf.Tensor, draws: Draws, side: tf.Tensor, sides: Sequence[int], *, epsilon: float
) -> tf.Tensor:
    """`x_best` moved by 2 epsilon, up or down, in one window; projected.

    Args:
        x: float32 clean images `[batch, height, width, channels]`.
        x_best: float32 images like `x`.
        draws: `Draws`.
        side: int32 `[batch]`, of the window; 0 for none.
        sides: all sides that occur, ints.
        epsilon: the radius in pixel units.
    """
    del sides
    height, width, num_channels = x.shape[1:]
    rows, columns = _inside(draws.top[:, 0], side, height), _inside(draws.left[:, 0], side, width)
    # Columns and channels as one axis: broadcasts along a last axis of 3 are slow on CPU.
    row = tf.where(columns[:, :, None], draws.signs[:, None, :], 0.0)
    row = tf.reshape(2.0 * epsilon * row, (-1, 1, width * num_channels))
    change = tf.reshape(tf.where(rows[:, :, None], row, 0.0), (-1, height, width, num_channels))
    return threats.linf_project(x_best + change, x, epsilon=epsilon)


@compilation.fused
def tile_proposal(
    x: tf.Tensor,
    x_best: tf.Tensor,
    draws: Draws,
    side: tf.Tensor,
    sides: Sequence[int],
    *,
    epsilon: float,
    norm: "TileNorm",
) -> tf.Tensor:
    """The perturbation of one window mixed with `eta`, with the length that a second window gives up; projected.

    Arguments are those of `linf_proposal`, and a `TileNorm`.
    """
    height, width, num_channels = x.shape[1:]
    # Channels first, as all lengths are by channel.
    delta = tf.transpose(x_best - x, (0, 3, 1, 2))
    window, other = (_window(draws, i, side, height, width)[:, None] for i in range(2))
    kept = tf.where(window | other, 0.0, delta)
    old = tf.where(window, delta, 0.0)
    room = norm.room(epsilon, norm.length(delta, (1, 2, 3)), norm.length(delta - kept, (2, 3)), num_channels)
    new = _place(draws, side, sides, height, width, norm) * draws.signs[:, :, None, None]
    new += old / (_TINY + norm.length(old, (2, 3)))
    new *= room / (_TINY + norm.length(new, (2, 3)))
    return norm.project(x, tf.transpose(kept + new, (0, 2, 3, 1)), epsilon)


def _place(draws, side, sides, height, width, norm):
    """The `eta` of each example's side in its first window, and 0 around it: `[batch, 1, height, width]`."""
    # All patterns end to end; the one pixel in front of them is the 0.
    occurring = sorted(set(sides) - {0})
    ends = np.cumsum([1] + [s * s for s in occurring])
    flat = tf.constant(np.concatenate([[0.0]] + [eta(s, norm).ravel() for s in occurring]), tf.float32)
    begin = tf.reduce_sum(tf.where(tf.equal(side[:, None], occurring), ends[:-1].astype(np.int32), 0), axis=1)
    rows, columns = tf.range(height) - draws.top[:, :1], tf.range(width) - draws.left[:, :1]
    row_stride = tf.where(draws.transposed, 1, side)[:, None]
    column_stride = tf.where(draws.transposed, side, 1)[:, None]
    index = (begin[:, None] + rows * row_stride)[:, :, None] + (columns * column_stride)[:, None, :]
    return tf.gather(flat, tf.where(_window(draws, 0, side, height, width), index, 0))[:, None]


class TileNorm(NamedTuple):
    """What L2 and L1 differ in.

    Attributes:
        order: of the norm, 2 or 1.
        decay: the power at which the patterns fall.
        length: `(v, axes)`, the norm over these axes, which are kept.
        room: `(epsilon, image, windows, num_channels)`, the length of a channel's new window, from the lengths of the
            perturbation and of what each channel gives up.
        project: `(x, delta, epsilon) -> x_adv`.
    """

    order: int
    decay: int
    length: Callable
    room: Callable
    project: Callable


def _l2_length(v, axes):
    return tf.sqrt(tf.reduce_sum(tf.square(v), axes, keepdims=True))


def _l2_room(epsilon, image, windows, num_channels):
    return tf.sqrt(tf.maximum(epsilon**2 - tf.square(image), 0.0) / num_channels + tf.square(windows))


def _l2_rescale(x, delta, epsilon):
    return tf.clip_by_value(x + delta * (epsilon / (_TINY + _l2_length(delta, (1, 2, 3)))), 0.0, 1.0)


def _l1_length(v, axes):
    return tf.reduce_sum(tf.abs(v), axes, keepdims=True)


def _l1_room(epsilon, image, windows, num_channels):
    # All of the room for each of the channels: the projection takes away what is too much.
    return tf.maximum(epsilon - image, 0.0) + num_channels * windows


def _l1_project(x, delta, epsilon):
    return threats.l1_project(x + delta, x, epsilon=epsilon * (1.0 - 1e-6))


def _window(draws, i, side, height, width):
    """Which pixels lie in window i, bool `[batch, height, width]`."""
    rows, columns = _inside(draws.top[:, i], side, height), _inside(draws.left[:, i], side, width)
    return rows[:, :, None] & columns[:, None, :]


def _inside(first, side, size):
    """Which of `size` coordinates lie in the window, bool `[batch, size]`."""
    offset = tf.range(size) - first[:, None]
    return (offset >= 0) & (offset < side[:, None])


def _sign(words):
    return 1.0 - 2.0 * tf.cast(tf.bitwise.right_shift(words, 31), tf.float32)


L2 = TileNorm(order=2, decay=2, length=_l2_length, room=_l2_room, project=_l2_rescale)
L1 = TileNorm(order=1, decay=4, length=_l1_length, room=_l1_room, project=_l1_project)

# The start, a query's proposal and the smallest side of its window.
_NORMS = {
    "Linf": (stripes, linf_proposal, 1),
    "L2": (functools.partial(tiles, norm=L2), functools.partial(tile_proposal, norm=L2), 3),
    "L1": (functools.partial(tiles, norm=L1), functools.partial(tile_proposal, norm=L1), 3),
}
