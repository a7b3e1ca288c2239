"""Strategies over some of JAX's CPU devices."""

import importlib.util

import pytest
import tensorflow as tf

_HAS_JAX = importlib.util.find_spec("jax") is not None
# Older versions of TensorFlow make no StableHLO.
collect_ignore_glob = [] if _HAS_JAX and tf.__version__.split(".")[:2] >= ["2", "19"] else ["*_test.py"]


@pytest.fixture(scope="session")
def on_jax():
    """`on_jax(num_devices=1)`: a strategy, the same for the same number."""
    import jax

    from robust_keras.engines.on_jax.strategy import JaxStrategy

    made = {}

    def make(num_devices=1):
        if num_devices not in made:
            made[num_devices] = JaxStrategy(jax.devices()[:num_devices])
        return made[num_devices]

    return make
