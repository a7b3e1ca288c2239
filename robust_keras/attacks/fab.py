"""FAB, the fast adaptive boundary attack (Croce & Hein 2020b, https://arxiv.org/abs/1907.02044).

    x_adv = fab(logits_fn, x, labels, threat=linf, seeds=seeds)

Where other attacks climb a loss inside the ball, this one looks for the misclassified image nearest to the clean one:
it moves onto the decision boundary of the linearised model, leans towards the clean image, and steps back to it
whenever it has crossed.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras import compilation, losses, noise, threats
from robust_keras.attacks import stepwise


class _Geometry(NamedTuple):
    """A norm's part in the attack; `[batch, 1, ...]` is what reductions return.

    Attributes:
        noise: `(seeds, shape) -> [batch, *shape]`, which divided by its length is the direction of a random start.
        length: `(moves) -> [batch, 1, ...]`, the norm.
        dual_length: `(gradients) -> [batch, 1, ...]`, the dual norm.
        fill: `(sizes, rooms, gap) -> amounts`, the shortest with `sum(sizes * amounts) = gap`, at most `rooms`.
        smallest: weights of at most this size move nothing.
    """

    noise: Callable
    length: Callable
    dual_length: Callable
    fill: Callable
    smallest: float


class _Walk(NamedTuple):
    """How an image moves: the threat model and the settings of `fab`."""

    threat: threats.Threat
    alpha_max: float
    eta: float
    beta: float


@stepwise.attack
def fab(
    *,
    threat: threats.Threat,
    num_steps: int = 100,
    num_restarts: int = 5,
    targeted: bool = False,
    num_targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> stepwise.Search:
    """FAB (Croce & Hein 2020b, algorithm 1), towards any class or, targeted, towards one class in each run.

    With d(z) the shortest move from z onto the nearest class boundary of the model linearised at x_k, inside [0, 1]^d,
    and alpha = min(|d(x_k)| / (|d(x_k)| + |d(x)|), alpha_max)::

        x_adv = clip((1 - alpha) (x_k + eta d(x_k)) + alpha (x + eta d(x)))
        x_{k+1} = x + beta (x_adv - x) where x_adv is misclassified, else x_adv

    An example is broken when any x_adv is misclassified and within the radius. The first restart starts at x, the
    others at a random point at half the radius. Untargeted, a step costs two forward passes and num_classes - 1
    backward ones; targeted, two and one.

    Args:
        threat: a `threats.Threat` of norm 'Linf', 'L2' or 'L1'.
        num_steps: an int >= 1.
        num_restarts: starts, of every target class where it is targeted; an int >= 1.
        targeted: whether every run heads for the boundary to one class, from the second highest clean logit downwards.
        num_targets: how many classes, all but the label at most; an int >= 1.
        alpha_max: the largest weight of the move from the clean image, in [0, 1].
        eta: how far beyond the boundary to go, 1 being the boundary.
        beta: how much of the perturbation a step back leaves, in [0, 1].

    Returns:
        A `stepwise.Search` named 'fab' or 'fab-t'; runs are ordered by target class, then by restart.

    Raises:
        ValueError: for counts under 1, fractions outside [0, 1], eta <= 0, or a norm without a projection.
    """
    stepwise.check_counts(num_steps=num_steps, num_restarts=num_restarts, num_targets=num_targets)
    _check(threat, alpha_max, eta, beta)

    def num_runs(num_classes):
        return (min(num_targets, num_classes - 1) if targeted else 1) * num_restarts

    def start(x, labels, clean_logits, seeds, run):
        state = {"image": tf.where(stepwise.expand(run % num_restarts > 0, x), _random_start(x, seeds, threat), x)}
        if targeted:
            state["target"] = stepwise.target_class(clean_logits, labels, run // num_restarts)
        return state

    step = functools.partial(_step, _Walk(threat, alpha_max, eta, beta))
    # Of differences of logits; the first is that of the strongest wrong class, where there are targets.
    return stepwise.Search("fab-t" if targeted else "fab", num_runs, num_steps, start, step, losses.margin)


def _check(threat, alpha_max, eta, beta):
    if not (0 <= alpha_max <= 1 and 0 <= beta <= 1 and eta > 0):
        raise ValueError(f"Expected alpha_max and beta in [0, 1] and eta > 0. Received: {alpha_max}, {beta} and {eta}")
    if threat.norm not in _NORMS:
        raise ValueError(f"Expected a norm out of {', '.join(_NORMS)}. Received: {threat.norm!r}")


def _random_start(x, seeds, threat):
    direction = start_noise(seeds, tuple(x.shape[1:]), threat.norm)
    length = _NORMS[threat.norm].length(direction)
    return _clip(x + 0.5 * threat.epsilon * tf.math.divide_no_nan(direction, length))


def _step(walk, logits_fn, x, labels, state, k):
    del k  # All steps are alike.
    image, norm = state["image"], walk.threat.norm
    boundary = nearest_boundary(logits_fn, image, labels, norm, state.get("target"))
    rows = map(stepwise.flat, (image, x, *boundary))
    x_adv = stepwise.like(_proposal(*rows, norm=norm, alpha_max=walk.alpha_max, eta=walk.eta), x)
    wrong = losses.is_wrong(logits_fn(x_adv), labels)
    rows = map(stepwise.flat, (x_adv, x))
    following, found, broken = _verdict(*rows, wrong, walk.threat.epsilon, norm=norm, beta=walk.beta)
    return {**state, "image": stepwise.like(following, x)}, stepwise.like(found, x), broken


@compilation.fused
def _proposal(image, x, gap, weights, *, norm, alpha_max, eta):
    """Beyond the boundary nearest to `image`, and a little towards the one nearest to `x`: like `x`."""
    length = _NORMS[norm].length
    move = project(image, weights, gap, norm)
    # From the clean image the same boundary is as far as the linear model says.
    clean_move = project(x, weights, gap + _total(weights * (x - image)), norm)
    way, clean_way = (tf.maximum(length(moves), 1e-8) for moves in (move, clean_move))
    alpha = tf.minimum(way / (way + clean_way), alpha_max)
    return _clip((1.0 - alpha) * (image + eta * move) + alpha * (x + eta * clean_move))


@compilation.fused
def _verdict(x_adv, x, wrong, epsilon, *, norm, beta):
    """The next image, the one that is found (or `x`), and whether it is one, of proposals and which are `wrong`."""
    delta = x_adv - x
    is_wrong = stepwise.expand(wrong, x)
    broken = is_wrong & (_NORMS[norm].length(delta) <= epsilon)
    return tf.where(is_wrong, x + beta * delta, x_adv), tf.where(broken, x_adv, x), tf.reshape(broken, (-1,))


def start_noise(seeds: tf.Tensor, shape: tuple[int, ...], norm: str) -> tf.Tensor:
    """What the random starts are made of: float32 `[batch, *shape]`, uniform in [-1, 1) for Linf, else normal."""
    return _NORMS[norm].noise(seeds, shape)


def nearest_boundary(
    logits_fn: Callable, x: tf.Tensor, labels: tf.Tensor, norm: str, target: tf.Tensor | None = None
) -> tuple[tf.Tensor, tf.Tensor]:
    """The class boundary nearest to `x` in `norm`, of the model linearised at `x`.

    Args:
        logits_fn: images to logits `[batch, num_classes]`.
        x: float32 `[batch, ...]`.
        labels: int32 `[batch]`.
        norm: 'Linf', 'L2' or 'L1'.
        target: int32 `[batch]`, the only class to consider; None for all.

    Returns:
        `(gap, weights)`: `logits_c - logits_y` at `x`, `[batch, 1, ...]`, and its gradient, like `x`, whose entries
        count as zero where they are no finite numbers. Both are zero where no class has a gradient of finite size and
        finite logits. Where a gradient is tiny or huge, both are scaled by one power of two, for the same boundary.
    """
    with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
        tape.watch(x)
        logits = logits_fn(x)
    num_classes = logits.shape[-1]
    count = num_classes - 1 if target is None else 1

    def next_class(j, *nearest):
        other = (labels + j) % num_classes if target is None else target
        difference = tf.one_hot(other, num_classes) - tf.one_hot(labels, num_classes)
        gradient = tape.gradient(logits, x, difference, unconnected_gradients=tf.UnconnectedGradients.ZERO)
        # The gradient of a loaded model forgets the size of the batch.
        gradient.set_shape(x.shape)
        gap = tf.reduce_sum(difference * logits, axis=-1, keepdims=True)
        return j + 1, *_nearer(stepwise.flat(gradient), gap, *nearest, norm=norm)

    # The forward pass stays outside: the loop holds one backward pass, however many classes there are, and runs
    # them one after the other, for the memory.
    far = tf.zeros_like(labels[:, None], tf.float32)
    nothing = (tf.constant(1), far + float("inf"), far, tf.zeros_like(stepwise.flat(x)))
    if count == 1:
        found = next_class(*nothing)
    else:
        found = tf.while_loop(
            lambda j, *_: j <= count, next_class, nothing, maximum_iterations=count, parallel_iterations=1
        )
    return stepwise.expand(found[2], x), stepwise.like(found[3], x)


@compilation.fused
def _nearer(gradient, gap, distance, nearest_gap, weights, *, norm):
    """`(distance, gap, weights)` of a boundary with this gradient and gap, where it is nearer than the one so far."""
    gradient = stepwise.finite_or_zero(gradient)
    scale = threats.ordinary_scale(_largest(gradient), at_least=2.0**-10)
    gradient, gap = scale * gradient, scale * gap
    size = _NORMS[norm].dual_length(gradient)
    new = tf.abs(gap) / (1e-12 + size)
    is_nearer = tf.math.is_finite(size) & (new < distance)
    nearer = (new, gap, gradient), (distance, nearest_gap, weights)
    return tuple(tf.where(is_nearer, its, others) for its, others in zip(*nearer))


@compilation.fused
def project(x: tf.Tensor, weights: tf.Tensor, gap: tf.Tensor, norm: str) -> tf.Tensor:
    """The shortest move in `norm` from `x` onto the hyperplane `gap + sum(weights * move) = 0`, inside [0, 1]^d.

    Where the box ends before the hyperplane, the move leads to the corner that comes nearest. Weights that are zero
    (under 1e-8 for L2 and L1) move nothing.

    Args:
        x: float32 `[batch, ...]` in [0, 1].
        weights: like `x`.
        gap: `[batch, 1, ...]`.
        norm: 'Linf', 'L2' or 'L1'.

    Returns:
        The move, float32 like `x`.
    """
    geometry = _NORMS[norm]
    sizes = tf.abs(weights)
    sizes = tf.where(sizes > geometry.smallest, sizes, 0.0)
    direction = -tf.sign(gap) * tf.sign(weights)
    rooms = tf.where(sizes > 0, tf.where(direction < 0, x, 1.0 - x), 0.0)
    return direction * geometry.fill(sizes, rooms, tf.abs(gap))


def _rise_together(sizes, rooms, gap, *, speed_fn):
    """`min(level * speeds, rooms)` at the lowest level that closes the gap: no sorting, but Newton's method.

    The sum is concave and piecewise linear in the level, so that Newton's method rises from 0 to the solution without
    overshooting, and is exact once no more entries run out of room.
    """
    speeds = speed_fn(sizes)
    full = sizes * rooms

    def newton(level, _):
        # What is free is told from the level each time: flags that travel from pass to pass would cost more.
        free = rooms > level * speeds
        slope = _total(tf.where(free, sizes * speeds, 0.0))
        higher = (gap - _total(tf.where(free, 0.0, full))) / slope
        higher = tf.where(ends_inside & (slope > 0), tf.maximum(higher, level), level)
        return higher, tf.reduce_any(higher > level)

    ends_inside = _total(full) > gap
    # What is left of the gap, times the slope, falls to a quarter or less every time: 50 are more than float32 can use.
    level, _ = tf.while_loop(lambda level, rises: rises, newton, (tf.zeros_like(gap), True), maximum_iterations=50)
    return tf.where(ends_inside, tf.minimum(level * speeds, rooms), rooms)


def _largest_first(sizes, rooms, gap):
    """All the room of the largest sizes; the size that closes the gap shares what is left between its equals.

    That size is the largest with `sum(sizes * rooms)` over it and all above it no less than the gap. Positive floats
    are ordered as their bits are, so that it is found bit by bit.
    """
    full = sizes * rooms
    bits = tf.bitcast(sizes, tf.int32)

    def set_bit(i, threshold):
        candidate = threshold + tf.bitwise.left_shift(1, 30 - i)
        return i + 1, tf.where(_total(tf.where(bits >= candidate, full, 0.0)) >= gap, candidate, threshold)

    nothing = (tf.constant(0), tf.zeros_like(gap, tf.int32))
    threshold = tf.while_loop(lambda i, _: i < 31, set_bit, nothing, maximum_iterations=31)[1]
    above, tied = bits > threshold, tf.equal(bits, threshold)
    left = gap - _total(tf.where(above, full, 0.0))
    share = _clip(tf.math.divide_no_nan(left, _total(tf.where(tied, full, 0.0))))
    return tf.where(above, rooms, tf.where(tied, share * rooms, 0.0))


def _clip(x):
    return tf.clip_by_value(x, 0.0, 1.0)


def _over_image(reduce, values):
    return reduce(values, axis=list(range(1, values.shape.rank)), keepdims=True)


def _largest(values):
    return _over_image(tf.reduce_max, tf.abs(values))


def _euclidean(values):
    return tf.sqrt(_total(tf.square(values)))


def _total_size(values):
    return _total(tf.abs(values))


_total = functools.partial(_over_image, tf.reduce_sum)
_NORMS = {
    "Linf": _Geometry(
        functools.partial(noise.uniform, minval=-1.0, maxval=1.0),
        _largest,
        _total_size,
        functools.partial(_rise_together, speed_fn=tf.ones_like),
        0.0,
    ),
    "L2": _Geometry(
        noise.normal, _euclidean, _euclidean, functools.partial(_rise_together, speed_fn=lambda sizes: sizes), 1e-8
    ),
    "L1": _Geometry(noise.normal, _total_size, _largest, _largest_first, 1e-8),
}
