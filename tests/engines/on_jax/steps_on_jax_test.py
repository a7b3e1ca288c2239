"""The training steps of `fit` on JAX's devices, against those of `one`."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.engines import step_counter, strategies
from robust_keras.engines.on_jax import execution as on_jax_execution
from robust_keras.training.adversarial_model import AdversarialModel
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.weight_averaging import WeightAveraging
from tests.training.any_keras_model_test import NUM_CLASSES, SHAPE, images

BATCH, NUM_BATCHES = 8, 4
X, LABELS = images(BATCH * NUM_BATCHES)
PIXELS = X / np.float32(255)


def stock():
    """Stock normalisation and noise, and a layer that counts for itself."""
    return keras.Sequential(
        [
            keras.Input(SHAPE),
            keras.layers.GaussianNoise(0.05, seed=1),
            keras.layers.Conv2D(6, 3, use_bias=False, kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.Activation("silu"),
            keras.layers.Dropout(0.3, seed=2),
            keras.layers.Flatten(),
            keras.layers.Dense(NUM_CLASSES),
        ]
    )


def run(strategy, make_network, make_optimizer, *, options, compiled=None, averaged=True, **arguments):
    """Trains; the history and all that training leaves: arrays by what they are."""
    keras.utils.set_random_seed(0)
    callbacks = [WeightAveraging(tau=0.5)] if averaged else []
    with strategy.scope():
        network = make_network()
        model = AdversarialModel(network, norm="L2", epsilon="128/255", **options)
        model.compile(make_optimizer(), **(compiled or {}))
    history = model.fit(
        PIXELS, LABELS, batch_size=BATCH, epochs=2, shuffle=False, verbose=0, callbacks=callbacks, **arguments
    ).history
    left = {
        "weights": network.get_weights(),
        "optimizer": [np.asarray(each) for each in model.optimizer.variables],
        "averages": callbacks[0].averaged_model.get_weights() if averaged else [],
        "steps": [step_counter.of(model.optimizer).numpy()],
    }
    return history, left


def assert_alike(ours, theirs, *, rtol=1e-5, atol=1e-6):
    (history, left), (expected_history, expected) = ours, theirs
    assert history.keys() == expected_history.keys()
    for name, values in expected_history.items():
        np.testing.assert_allclose(history[name], values, rtol=rtol, err_msg=name)
    for name, arrays in expected.items():
        for k, (ours, theirs) in enumerate(zip(left[name], arrays, strict=True)):
            assert ours.dtype == theirs.dtype
            largest = np.abs(theirs).max(initial=0.0)
            np.testing.assert_allclose(ours, theirs, rtol=10 * rtol, atol=atol + rtol * largest, err_msg=f"{name} {k}")


def test_adversarial_training_in_executions_of_several_steps(on_jax, make_tiny_model):
    settings = {
        "make_network": functools.partial(make_tiny_model, statistics_group_size=2),
        "make_optimizer": lambda: NesterovSGD(0.05, momentum=0.9, weight_decay=5e-4),
        "options": {"objective": "adversarial_training", "attack_batch_norm": "batch"},
        "compiled": {
            "steps_per_execution": 3,
            "metrics": ["accuracy", keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="ce")],
        },
        "validation_data": (X[:10], LABELS[:10]),
    }
    theirs = run(strategies.strategy("one"), **settings)
    assert {"loss", "ce", "robust_accuracy", "val_loss", "val_ce"} <= theirs[0].keys()
    assert theirs[1]["steps"] == [2 * NUM_BATCHES]
    assert_alike(run(on_jax(4), **settings), theirs)


def test_trades_with_parts_weights_and_a_growing_radius(on_jax, make_tiny_model):
    settings = {
        "make_network": functools.partial(make_tiny_model, statistics_group_size=2),
        "make_optimizer": lambda: keras.optimizers.Adam(1e-3),
        "options": {"objective": "trades", "accumulation_steps": 2, "epsilon_warmup_steps": 6},
        "sample_weight": np.random.default_rng(0).uniform(0.5, 1.5, len(X)).astype(np.float32),
    }
    assert_alike(run(on_jax(2), **settings), run(strategies.strategy("one"), **settings), atol=1e-4)


def test_mart_on_stock_layers_of_which_some_draw_random_numbers(on_jax):
    settings = {
        "make_network": stock,
        "make_optimizer": lambda: NesterovSGD(0.05, momentum=0.9, weight_decay=5e-4),
        "options": {"objective": "mart", "attack_noise": True},
        "averaged": False,
    }
    # Of TensorFlow's random numbers XLA makes others, on any strategy.
    theirs = run(strategies.strategy("one"), **settings, compiled={"jit_compile": True})
    assert_alike(run(on_jax(), **settings), theirs)


def test_bfloat16_is_near(on_jax, mixed_bfloat16, make_tiny_model):
    settings = {
        "make_network": make_tiny_model,
        "make_optimizer": lambda: NesterovSGD(0.05),
        "options": {"objective": "adversarial_training", "log_accuracy": False},
    }
    ours, theirs = run(on_jax(), **settings), run(strategies.strategy("one"), **settings)
    assert_alike(ours, theirs, rtol=1e-2, atol=1e-2)


def test_a_batch_that_does_not_divide_is_refused(on_jax, make_tiny_model):
    with on_jax(4).scope():
        model = AdversarialModel(make_tiny_model(), epsilon="8/255")
        model.compile("sgd")
    with pytest.raises(ValueError, match="Expected batches that divide into 4 parts.*Received: 6 images in the last"):
        model.fit(X[:6], LABELS[:6], batch_size=8, verbose=0)


def test_other_models_are_refused(on_jax):
    with pytest.raises(ValueError, match="Expected an AdversarialModel for the strategy jax. Received: a Sequential"):
        on_jax_execution.Execution(stock(), on_jax())


def test_what_does_not_compute_there_is_refused_in_its_scope(on_jax):
    outside, network = AdversarialModel(stock(), epsilon="8/255"), stock()
    outside.compile("sgd")
    network.compile("sgd", "sparse_categorical_crossentropy")
    with on_jax().scope():
        with pytest.raises(ValueError, match="made in the scope of the strategy jax. Received: one that was made outs"):
            outside.fit(X, LABELS, verbose=0)
        with pytest.raises(ValueError, match="Expected an AdversarialModel, made in .* Received: a Sequential"):
            network.fit(PIXELS, LABELS, verbose=0, callbacks=[WeightAveraging()])


def test_an_operation_that_does_not_lower_is_named(on_jax, make_tiny_model):
    def attack(logits_fn, x, targets, *, seeds):
        return tf.reshape(tf.numpy_function(lambda x: 1.0 - x, [x], tf.float32), x.shape)

    with on_jax().scope():
        model = AdversarialModel(make_tiny_model(), attack=attack)
        model.compile("sgd")
    with pytest.raises(
        ValueError, match="Expected operations that XLA compiles. Received: .*PyFunc.*steps_on_jax_test"
    ):
        model.fit(X, LABELS, batch_size=8, verbose=0)
