"""Two logical CPU devices, four of JAX, the one strategy over them, and a model small enough for every test."""

import gc
import logging
import os
import pathlib

# Read when TensorFlow and JAX are imported.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "4")

import keras
import numpy as np
import pytest
import tensorflow as tf
from absl import logging as absl_logging

from robust_keras.attacks import step_rules
from robust_keras.data.readers import trusted_copies
from robust_keras.models.normalization import BatchNorm

ROOT = pathlib.Path(__file__).parents[1]


def refuse_deprecated_calls(record):
    """A filter of TensorFlow's log, which is where it says what is deprecated: of a call of ours that is an error."""
    message = record.getMessage()
    ours = message.startswith((f"From {ROOT / 'robust_keras'}", f"From {ROOT / 'scripts'}", f"From {ROOT / 'tests'}"))
    if ours and "deprecated" in message:
        raise DeprecationWarning(message)
    return True


logging.getLogger("tensorflow").addFilter(refuse_deprecated_calls)

# Looking for garbage again and again among all that TensorFlow imports and traces takes a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)


@pytest.fixture(scope="session", autouse=True)
def notes_of_conversions(tmp_path_factory):
    """They are not the user's who runs the tests."""
    folder = tmp_path_factory.mktemp("conversions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trusted_copies, "_folder", lambda: str(folder))
        yield folder


@pytest.fixture(scope="session")
def mirrored():
    """The session's only MirroredStrategy: several in one process collide."""
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.fixture(scope="session")
def make_tiny_model():
    """`make_tiny_model(seed=0, statistics_group_size=None)`: convolution, BatchNorm, SiLU, dense; 8x8x3 to 4 logits.

    Smooth, with moving statistics that fit uniform images and logits that are balanced over them.
    """

    def make(seed=0, statistics_group_size=None):
        rng = np.random.default_rng(seed)
        images = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(6, 3, padding="same", use_bias=False)(images)
        x = BatchNorm(statistics_group_size)(x)
        x = keras.layers.Activation("silu")(x)
        x = keras.layers.Flatten()(x)
        model = keras.Model(images, keras.layers.Dense(4)(x))
        convolution, norm, dense = model.layers[1], model.layers[2], model.layers[-1]
        convolution.kernel.assign(rng.normal(0.0, 0.4, convolution.kernel.shape))
        norm.scale.assign(rng.uniform(0.5, 1.5, norm.scale.shape))
        norm.offset.assign(rng.normal(0.0, 0.3, norm.offset.shape))
        dense.kernel.assign(rng.normal(0.0, 0.15, dense.kernel.shape))
        sample = tf.constant(rng.random((64, 8, 8, 3)), tf.float32)
        features = convolution(sample).numpy()
        norm.moving_mean.assign(features.mean((0, 1, 2)))
        norm.moving_variance.assign(features.var((0, 1, 2)))
        dense.bias.assign(-np.mean(model(sample, training=False), axis=0))
        return model

    return make


@pytest.fixture
def tiny_model(make_tiny_model):
    """A fresh `make_tiny_model()`."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_images():
    """float32 [8, 8, 8, 3] in [0, 1], some pixels at 0 and at 1."""
    return tf.constant(np.clip(np.random.default_rng(1).uniform(-0.1, 1.1, (8, 8, 8, 3)), 0.0, 1.0), tf.float32)


@pytest.fixture
def warned(monkeypatch):
    """The warnings of steps that are too short for their radius, as text."""
    messages = []
    monkeypatch.setattr(absl_logging, "warning", lambda message, *args: messages.append(message % args))
    step_rules._warn.cache_clear()
    return messages


@pytest.fixture
def mixed_bfloat16():
    """Keras' policy, until the test ends."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(policy)
