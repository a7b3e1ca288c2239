"""The function that attacks search on: the network itself, with fewer passes over memory, or in bfloat16."""

from collections.abc import Callable

import tensorflow as tf
from absl import logging

from robust_keras import compilation
from robust_keras.engines import replicas
from robust_keras.models import rewriting


def search_fn(logits_fn: Callable, dtype: str = "float32") -> Callable:
    """The same network for searches: where one CPU computes, as `rewriting.rewritten` has it.

    Args:
        logits_fn: float32 images to logits.
        dtype: 'float32', in which a network that cannot be rewritten is searched as it is, or 'bfloat16'.

    Returns:
        A function like `logits_fn`.

    Raises:
        ValueError: for bfloat16 where anything but one CPU computes; when it is called, for a network that cannot be
            computed so.
    """
    is_low = dtype == "bfloat16"
    if replicas.is_on_jax() or replicas.num_replicas() > 1 or not compilation.is_on_cpu():
        if is_low:
            raise ValueError(f"Expected search_dtype = 'float32' anywhere but on one CPU. Received: {dtype!r}")
        return logits_fn
    rewritten = rewriting.rewritten(logits_fn, dtype=dtype)

    @tf.autograph.experimental.do_not_convert
    def searched_fn(x):
        try:
            return rewritten(x)
        except rewriting.Unsupported as error:
            if is_low:
                raise ValueError(
                    f"Expected a network that can be searched in {dtype}; search_dtype = 'float32' takes any. "
                    f"Received: {error}"
                ) from error
            logging.info("The network is searched as it is, for %s", error)
            return logits_fn(x)

    return searched_fn
