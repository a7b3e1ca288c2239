"""Networks with weights at random."""

import keras
import numpy as np
import pytest


def _randomised(network, seed=0):
    """Weights and statistics at random: logits and gradients are zero as training starts."""
    rng = np.random.default_rng(seed)
    for weight in network.weights:
        kind = weight.path.rsplit("/", 1)[-1]
        if kind in ("scale", "moving_variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        elif kind == "kernel":
            weight.assign(rng.normal(0.0, np.prod(weight.shape[:-1]) ** -0.5, weight.shape))
        elif kind != "num_updates":
            weight.assign(rng.normal(0.0, 0.3, weight.shape))
    return network


@pytest.fixture(scope="session")
def randomised():
    """`randomised(network, seed=0)`: the network, with weights and statistics at random."""
    return _randomised


@pytest.fixture(scope="session")
def linear():
    """The smallest network, `[4, 4, 3]` to 3 logits."""
    image = keras.Input((4, 4, 3))
    return _randomised(keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image))))
