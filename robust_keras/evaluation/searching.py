"""The function that attacks search on: the network itself, or the same network computed in bfloat16."""

from collections.abc import Callable

import tensorflow as tf

from robust_keras import compilation
from robust_keras.engines import replicas
from robust_keras.models import rewriting


def in_dtype(logits_fn: Callable, dtype: str) -> Callable:
    """A network with its convolutions in another type.

    Args:
        logits_fn: float32 images to logits.
        dtype: 'bfloat16'.

    Returns:
        A function like it, see `rewriting.rewritten`.

    Raises:
        ValueError: where nothing but a CPU computes it so; when it is called, for a network that cannot be.
    """
    if replicas.is_on_jax() or replicas.num_replicas() > 1 or not compilation.is_on_cpu():
        raise ValueError(f"Expected search_dtype = 'float32' anywhere but on one CPU. Received: {dtype!r}")
    rewritten = rewriting.rewritten(logits_fn, dtype=dtype)

    @tf.autograph.experimental.do_not_convert
    def search_fn(x):
        try:
            return rewritten(x)
        except rewriting.Unsupported as error:
            raise ValueError(
                f"Expected a network that can be searched in {dtype}; search_dtype = 'float32' takes any. "
                f"Received: {error}"
            ) from error

    return search_fn
