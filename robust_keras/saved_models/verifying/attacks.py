"""A SavedModel's logits and gradients, and attacks on it, in TensorFlow and NumPy alone."""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

BATCH_SIZE = 50


class Ball(NamedTuple):
    """A threat model on images [n, height, width, channels] in [0, 1].

    Attributes:
        norm: 'Linf', 'L2' or 'L1'.
        epsilon: the radius.
    """

    norm: str
    epsilon: float

    def length(self, delta: np.ndarray) -> np.ndarray:
        """The norm of each difference, [n, 1, 1, 1]."""
        axes, size = (1, 2, 3), np.abs(delta)
        if self.norm == "Linf":
            return size.max(axes, keepdims=True)
        return np.sqrt((size**2).sum(axes, keepdims=True)) if self.norm == "L2" else size.sum(axes, keepdims=True)

    def unit(self, delta: np.ndarray) -> np.ndarray:
        """Scaled to length 1; zero where it is zero."""
        return delta / np.maximum(self.length(delta), 1e-30)

    def project(self, x_adv: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Inside the ball and [0, 1]."""
        delta = x_adv - x
        if self.norm == "Linf":
            delta = delta.clip(-self.epsilon, self.epsilon)
        elif self.norm == "L2":
            delta = delta * np.minimum(1.0, self.epsilon / np.maximum(self.length(delta), 1e-30))
        else:  # Every entry shrinks by one amount, after Duchi et al. 2008.
            falling = -np.sort(-np.abs(delta).reshape(len(x), -1), axis=1)
            excess = (np.cumsum(falling, axis=1) - self.epsilon) / np.arange(1, falling.shape[1] + 1)
            amount = np.maximum(excess.max(axis=1), 0.0).reshape(-1, 1, 1, 1)
            delta = np.sign(delta) * np.maximum(np.abs(delta) - amount, 0.0)
        return (x + delta).clip(0.0, 1.0).astype(np.float32)

    def direction(self, gradient: np.ndarray) -> np.ndarray:
        """A step of length 1 along a gradient: its sign; itself; in L1, the signs of its largest entries."""
        if self.norm == "L1":
            size = np.abs(gradient).reshape(len(gradient), -1)
            least = np.sort(size, axis=1)[:, -max(size.shape[1] // 20, 1)].reshape(-1, 1, 1, 1)
            gradient = np.where(np.abs(gradient) >= least, np.sign(gradient), 0.0)
        return np.sign(gradient) if self.norm == "Linf" else self.unit(gradient)

    def start(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random point of the ball."""
        if self.norm == "Linf":
            return self.project(x + rng.uniform(-self.epsilon, self.epsilon, x.shape), x)
        noise = rng.normal(size=x.shape) if self.norm == "L2" else rng.laplace(size=x.shape)
        return self.project(x + self.epsilon * self.unit(noise), x)

    def is_inside(self, x_adv: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Whether images are in the ball and in [0, 1], but for float32's rounding: bool [n]."""
        short = self.length(x_adv - x).reshape(-1) <= self.epsilon * (1 + 1e-5) + 1e-6
        return short & ((x_adv >= 0) & (x_adv <= 1)).all(axis=(1, 2, 3))


class Model:
    """A model's logits and gradients.

    Attributes:
        signatures: of its SavedModel, functions by name.
        num_non_finite: of how many images so far logits were no finite numbers.
    """

    def __init__(self, logits_of: Callable, signatures: Mapping[str, Any]) -> None:
        """
        Args:
            logits_of: tensors of images to tensors of logits.
            signatures: see above.
        """
        import tensorflow as tf

        self.signatures, self.num_non_finite = signatures, 0

        def loss_of(x, labels, targets):
            with tf.GradientTape() as tape:
                tape.watch(x)
                logits = logits_of(x)
                # On logits of one spread, whatever the model's temperature.
                spread = tf.stop_gradient(tf.math.reduce_std(logits, axis=-1, keepdims=True))
                scaled = 3.0 * logits / tf.maximum(spread, 1e-30)
                cross_entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, scaled)
                margin = tf.gather(scaled, tf.maximum(targets, 0), batch_dims=1) - tf.gather(
                    scaled, labels, batch_dims=1
                )
                loss = tf.where(targets < 0, cross_entropy, margin)
            gradient = tape.gradient(loss, x, unconnected_gradients=tf.UnconnectedGradients.ZERO)
            return logits, loss, tf.where(tf.math.is_finite(gradient), gradient, 0.0)

        self._logits, self._loss = (
            tf.function(each, autograph=False, reduce_retracing=True) for each in (logits_of, loss_of)
        )

    def logits(self, x: np.ndarray) -> np.ndarray:
        """float32 [n, classes] of images [n, height, width, channels]."""
        return self._in_batches(self._logits, x.astype(np.float32))[0]

    def is_wrong(self, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether each image is misclassified: bool [n]."""
        return is_wrong(self.logits(x), labels)

    def loss(self, x: np.ndarray, labels: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whether each image is misclassified, its loss and its gradient.

        The loss is the cross-entropy where a target is negative, else the margin of that class over the label.
        """
        inputs = (x.astype(np.float32), labels.astype(np.int32), targets.astype(np.int32))
        logits, loss, gradient = self._in_batches(self._loss, *inputs)
        return is_wrong(logits, labels), np.nan_to_num(loss, nan=-1e30), gradient

    def _in_batches(self, function: Callable, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        import tensorflow as tf

        num, pieces = len(inputs[0]), []
        for start in range(0, num, BATCH_SIZE):
            found = function(*map(tf.constant, (each[start : start + BATCH_SIZE] for each in inputs)))
            found = found if isinstance(found, (tuple, list)) else (found,)
            pieces.append([part.numpy() for part in found])
        whole = tuple(np.concatenate(parts) for parts in zip(*pieces))
        self.num_non_finite += int((~np.isfinite(whole[0])).any(axis=-1).sum())
        return whole


def open_model(folder: str | os.PathLike) -> Model:
    """Loads a SavedModel, which runs what its maker put into it.

    Raises:
        ValueError: for one without a signature serving_default of one input, and of one output or one named logits.
    """
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)  # GPUs would round to ten bits.
    loaded = tf.saved_model.load(os.fspath(folder))
    if "serving_default" not in loaded.signatures:
        raise ValueError("no signature serving_default")
    signature = loaded.signatures["serving_default"]
    inputs, outputs = signature.structured_input_signature[1], list(signature.structured_outputs)
    if len(inputs) != 1 or not (len(outputs) == 1 or "logits" in outputs):
        raise ValueError("serving_default has not one input, and one output or one that is named logits")
    (name,), output = inputs, "logits" if "logits" in outputs else outputs[0]

    def logits_of(x):  # The variables live as long as the loaded object.
        return tf.cast(loaded.signatures["serving_default"](**{name: x})[output], tf.float32)

    return Model(logits_of, loaded.signatures)


def is_wrong(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each prediction is another class than the label, or a logit is no finite number: bool [n]."""
    return (logits.argmax(axis=-1) != labels) | ~np.isfinite(logits).all(axis=-1)


def ascend(
    model: Model,
    ball: Ball,
    x: np.ndarray,
    labels: np.ndarray,
    targets: np.ndarray,
    rng: np.random.Generator,
    num_steps: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Auto-PGD (Croce & Hein 2020), from a random start: the last images, or the broken ones, and which are broken."""
    x_adv = previous = ball.start(x, rng)
    broken, loss, gradient = model.loss(x_adv, labels, targets)
    found, best, best_gradient, best_loss = x_adv.copy(), x_adv.copy(), gradient.copy(), loss.copy()
    step, window = np.full((len(x), 1, 1, 1), 2 * ball.epsilon, np.float32), max(round(0.22 * num_steps), 2)
    shrink, smallest, due = max(round(0.03 * num_steps), 1), max(round(0.06 * num_steps), 2), window
    rises, best_before, was_halved = np.zeros(len(x)), best_loss.copy(), np.zeros(len(x), bool)
    for k in range(num_steps):
        momentum = 1.0 if k == 0 else 0.75
        moved = ball.project(x_adv + step * ball.direction(gradient), x)
        moved = ball.project(x_adv + momentum * (moved - x_adv) + (1 - momentum) * (x_adv - previous), x)
        previous, x_adv, loss_before = x_adv, moved, loss
        wrong, loss, gradient = model.loss(x_adv, labels, targets)
        rises += loss > loss_before
        better = loss > best_loss
        best[better], best_gradient[better], best_loss[better] = x_adv[better], gradient[better], loss[better]
        found[~broken], broken = x_adv[~broken], broken | wrong
        if broken.all():
            break
        if k + 1 == due:
            halved = (rises < 0.75 * window) | (~was_halved & (best_loss <= best_before))
            step[halved] /= 2
            x_adv, gradient = x_adv.copy(), gradient.copy()
            x_adv[halved], gradient[halved] = best[halved], best_gradient[halved]
            rises[:], best_before, was_halved = 0, best_loss.copy(), halved
            window = max(window - shrink, smallest)
            due += window
    return found, broken


def search(
    model: Model, ball: Ball, x: np.ndarray, labels: np.ndarray, rng: np.random.Generator, num_queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Random search without gradients, after Square Attack (Andriushchenko et al. 2020); returns as `ascend`."""
    num, height, width, channels = x.shape
    rows = np.arange(num)

    def margin_of(x_adv):
        logits = model.logits(x_adv)
        others = np.where(np.arange(logits.shape[1]) == labels[:, None], -np.inf, logits)
        return logits[rows, labels] - others.max(axis=1), is_wrong(logits, labels)

    stripes = np.sign(rng.normal(size=(num, 1, width, channels))) * np.ones((1, height, 1, 1))
    best = ball.project(x + ball.epsilon * ball.unit(stripes), x)
    margin, broken = margin_of(best)
    for k in range(num_queries):
        if broken.all():
            break
        share = 0.8 * 0.5 ** np.searchsorted([0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8], k / num_queries)
        side = int(np.clip(round(math.sqrt(share * height * width)), 1, min(height, width)))
        top, left = rng.integers(0, height - side + 1, num), rng.integers(0, width - side + 1, num)
        inside_rows = (np.arange(height) >= top[:, None]) & (np.arange(height) < top[:, None] + side)
        inside_columns = (np.arange(width) >= left[:, None]) & (np.arange(width) < left[:, None] + side)
        window = (inside_rows[:, :, None] & inside_columns[:, None, :])[..., None]
        signs = np.sign(rng.normal(size=(num, 1, 1, channels)))
        proposed = ball.project(best + 2 * ball.epsilon * ball.unit(window * signs), x)
        new_margin, wrong = margin_of(proposed)
        better = ((new_margin < margin) | wrong) & ~broken
        best[better], margin[better], broken = proposed[better], new_margin[better], broken | wrong
    return best, broken


def attack(
    model: Model,
    ball: Ball,
    x: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    *,
    steps: tuple[int, int],
    num_queries: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Attacks one after the other those images that still stand: Auto-PGD on the cross-entropy, then towards each of
    the four likeliest wrong classes, then a search without gradients.

    Args:
        model: a `Model`.
        ball: the threat model.
        x: float32 [n, height, width, channels].
        labels: int32 [n].
        rng: a NumPy generator.
        steps: of Auto-PGD on the cross-entropy, and on each margin.
        num_queries: of the search.

    Returns:
        (x_adv, broken): the images that attacks ended with, and which the model gets wrong: bool [n].
    """
    logits = model.logits(x)
    x_adv, broken = x.copy(), is_wrong(logits, labels)
    likeliest = np.argsort(np.where(np.arange(logits.shape[1]) == labels[:, None], np.inf, -logits), axis=1)
    targets = [np.full(len(x), -1), *likeliest[:, : min(4, logits.shape[1] - 1)].T]
    for k, target in enumerate([*targets, None]):
        left = np.flatnonzero(~broken)
        if not len(left) or (target is None and not num_queries) or (target is not None and not steps[min(k, 1)]):
            continue
        if target is None:
            x_adv[left], broken[left] = search(model, ball, x[left], labels[left], rng, num_queries)
        else:
            x_adv[left], broken[left] = ascend(model, ball, x[left], labels[left], target[left], rng, steps[min(k, 1)])
    return x_adv, broken
