"""A replica's share of a batch in parts, one after another, so that memory holds one of them."""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf


def split(values: tf.Tensor, num_parts: int) -> tf.Tensor:
    """`[batch, ...]` as `[num_parts, batch / num_parts, ...]`.

    Raises:
        ValueError: for a batch that does not divide.
    """
    if values.shape[0] % num_parts:
        raise ValueError(
            f"Expected a batch on each replica that divides into accumulation_steps={num_parts} parts. "
            f"Received: a batch of {values.shape[0]}"
        )
    return tf.reshape(values, (num_parts, -1, *values.shape[1:]))


def accumulated(
    compute: Callable, parts: Mapping[str, tf.Tensor], first: tf.Tensor, begun: tuple, num_parts: int
) -> tuple[Any, Any, Any]:
    """What a computation gives for all parts.

    Args:
        compute: `(part, number) -> (sums, last)`: nests of tensors that add up, and a dictionary of what does not, in
            it 'predictions', `[examples, classes]`, where there are any.
        parts: entries of the batch, as `split` makes them.
        first: the number of the first part.
        begun: `(sums, last, predictions)` of the first part.
        num_parts: how many there are, at least 2.

    Returns:
        `(sums, last, predictions)`: sums, what the last part gave, and the predictions of all.
    """
    sums, last, predictions = begun
    gathered = tf.nest.map_structure(lambda v: tf.scatter_nd([[0]], v[None], (num_parts, *v.shape)), predictions)

    def add(k, sums, last, gathered):
        more, last = compute({name: values[k] for name, values in parts.items()}, first + k)
        predictions = last.pop("predictions", ())
        gathered = tf.nest.map_structure(
            lambda values, part: tf.tensor_scatter_nd_update(values, [[k]], part[None]), gathered, predictions
        )
        return k + 1, tf.nest.map_structure(tf.add, sums, more), last, gathered

    _, sums, last, gathered = tf.while_loop(
        lambda k, *_: k < num_parts, add, (tf.constant(1), sums, last, gathered), maximum_iterations=num_parts - 1
    )
    return sums, last, tf.nest.map_structure(lambda values: tf.reshape(values, (-1, values.shape[-1])), gathered)
