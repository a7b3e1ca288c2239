"""Batch normalisation over fixed groups of examples, with an activation, and the mode it runs in.

Statistics over groups of a fixed size do not depend on how a batch is spread over devices: the paper's 32 TPU cores
normalised groups of 4 images at batch 128 and of 32 at batch 1,024, and so does one device here.

The mode is a property of a forward pass, not of a layer, so it is a context entered while the pass is traced:

    with batch_norm_mode("batch"):
        x_adv = attack(logits_fn, x, labels, seeds=seeds)

`MirroredStrategy` traces each replica in a thread of its own: enter the context inside the replica function.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_keras.engines import replicas
from robust_keras.models import norm_act

BATCH_AND_UPDATE = "batch_and_update"  # the batch's statistics, which also update the moving ones
BATCH = "batch"  # the batch's statistics, moving ones untouched
MOVING = "moving"  # the moving statistics

_mode: contextvars.ContextVar[str | None] = contextvars.ContextVar("batch_norm_mode", default=None)
_pending: contextvars.ContextVar[list | None] = contextvars.ContextVar("batch_norm_pending", default=None)


@contextlib.contextmanager
def batch_norm_mode(mode: str) -> Iterator[None]:
    """Runs every `BatchNorm` called inside the context in `mode`, whatever their `training` argument.

    Args:
        mode: 'batch_and_update', 'batch' or 'moving'.

    Raises:
        ValueError: for any other mode.
    """
    if mode not in (BATCH_AND_UPDATE, BATCH, MOVING):
        raise ValueError(f"Expected a mode out of {BATCH_AND_UPDATE}, {BATCH}, {MOVING}. Received: {mode!r}")
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def current_mode() -> str | None:
    """The mode of the innermost `batch_norm_mode`, or None outside of any."""
    return _mode.get()


@contextlib.contextmanager
def pending_updates() -> Iterator[list]:
    """Inside the context, no moving statistics change: what they are to be updated with is yielded.

    A forward pass then changes no variable, so that XLA compiles it under any strategy and parts of a batch can share
    one update; `apply_updates` makes it.

    Yields:
        A list of (layer, (mean, variance)) in the order of the updates, float32 `[channels]` each.
    """
    updates: list = []
    token = _pending.set(updates)
    try:
        yield updates
    finally:
        _pending.reset(token)


def apply_updates(layers: Sequence["BatchNorm"], statistics: Sequence) -> None:
    """Makes pending updates, in order, from inside a replica, with the statistics' means over replicas."""
    if layers and replicas.num_replicas() > 1:
        statistics = tf.nest.pack_sequence_as(statistics, replicas.all_reduce("MEAN", tf.nest.flatten(statistics)))
    for layer, values in zip(layers, statistics, strict=True):
        layer.update_moving(*values)


@keras.saving.register_keras_serializable(package="robust_keras")
class BatchNorm(keras.layers.Layer):
    """Batch normalisation of NHWC (or `[batch, channels]`) tensors, statistics over fixed groups of examples.

    Each consecutive group of `statistics_group_size` examples is normalised with its own mean and biased variance. The
    moving statistics are zero-debiased exponential averages of the means over all groups and replicas, as Haiku's
    `ExponentialMovingAverage` keeps them. Outside `batch_norm_mode`, `training=True` means 'batch_and_update' and
    `training=False` means 'moving'.

    Args:
        statistics_group_size: examples per group; None takes the whole batch of a replica as one group. The batch
            must be a whole number of groups.
        decay: of the moving statistics.
        epsilon: added to the variance.
        activation: of the normalised tensor, one of `norm_act.ACTIVATIONS`; None for none.

    Raises:
        ValueError: for a batch that is not a whole number of groups, or another activation.
    """

    def __init__(
        self,
        statistics_group_size: int | None = None,
        decay: float = 0.99,
        epsilon: float = 1e-5,
        activation: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if statistics_group_size is not None and statistics_group_size < 1:
            raise ValueError(f"Expected statistics_group_size >= 1 or None. Received: {statistics_group_size!r}")
        self.statistics_group_size = statistics_group_size
        self.decay = decay
        self.epsilon = epsilon
        self.activation = None if activation is None else norm_act.activation_named(activation)

    def build(self, input_shape: tuple) -> None:
        """Makes scale, offset and moving statistics."""
        num_channels = input_shape[-1]
        # float32 whatever the layer computes in.
        self.scale = self.add_weight(name="scale", shape=(num_channels,), initializer="ones", autocast=False)
        self.offset = self.add_weight(name="offset", shape=(num_channels,), initializer="zeros", autocast=False)
        moving = {"trainable": False, "autocast": False}
        self.moving_mean = self.add_weight(name="moving_mean", shape=(num_channels,), initializer="zeros", **moving)
        self.moving_variance = self.add_weight(
            name="moving_variance", shape=(num_channels,), initializer="ones", **moving
        )
        self.num_updates = self.add_weight(name="num_updates", shape=(), initializer="zeros", **moving)

    def call(self, x: tf.Tensor, training: bool = False) -> tf.Tensor:
        """The normalised tensor."""
        told = _mode.get()
        mode = told or (BATCH_AND_UPDATE if training else MOVING)
        # A pass that nobody has told its mode may be an export's: what it needs is in every TensorFlow.
        compiled = told is not None
        if mode == MOVING:
            factor = self.scale * tf.math.rsqrt(self.moving_variance + self.epsilon)
            offset = self.offset - self.moving_mean * factor
            return norm_act.affine(x, factor, offset, activation=self.activation, compiled=compiled)
        self._check(x)
        y, mean, variance = norm_act.standardized(
            x,
            self.scale.value,
            self.offset.value,
            group_size=self.statistics_group_size,
            epsilon=self.epsilon,
            activation=self.activation,
            compiled=compiled,
        )
        if mode == BATCH_AND_UPDATE:
            statistics = tuple(tf.reshape(tf.reduce_mean(groups, axis=0), (-1,)) for groups in (mean, variance))
            pending = _pending.get()
            if pending is None:
                apply_updates([self], [statistics])
            else:
                pending.append((self, statistics))
        return y

    def _check(self, x):
        if self.statistics_group_size and x.shape[0] is not None and x.shape[0] % self.statistics_group_size:
            raise ValueError(
                "Expected a batch on each replica that is a multiple of "
                f"statistics_group_size={self.statistics_group_size}. Received: a batch of {x.shape[0]}"
            )

    def update_moving(self, mean: tf.Tensor, variance: tf.Tensor) -> None:
        """Moves the statistics towards a batch's, float32 `[channels]` each, the same on all replicas."""

        def count(num_updates):
            num_updates.assign_add(1.0)

        def move(moving, value, num_updates):
            # The debiased average hidden_t / (1 - decay^t) obeys this recursion, whose rate starts at 1.
            rate = (1.0 - self.decay) / (1.0 - tf.pow(self.decay, num_updates))
            moving.assign(moving + rate * (value - moving))

        num_updates = self.num_updates.value
        replicas.update(count, [num_updates])
        moving = [self.moving_mean.value, self.moving_variance.value]
        replicas.update(move, moving, [mean, variance], [num_updates] * 2)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        """The input's."""
        return input_shape

    def get_config(self) -> dict:
        """The arguments, as Keras saves them."""
        return {
            **super().get_config(),
            "statistics_group_size": self.statistics_group_size,
            "decay": self.decay,
            "epsilon": self.epsilon,
            "activation": self.activation,
        }
