"""A `fit` on JAX's devices that ends in the middle, and what is done with the model afterwards."""

import signal

import keras
import numpy as np
import pytest

from robust_keras.engines.on_jax import execution
from robust_keras.training.adversarial_model import AdversarialModel
from tests.training.any_keras_model_test import images

BATCH = 8
X, LABELS = images(BATCH * 3)


@pytest.fixture
def model(on_jax):
    with on_jax(2).scope():
        keras.utils.set_random_seed(0)
        network = keras.Sequential([keras.Input(X.shape[1:]), keras.layers.Flatten(), keras.layers.Dense(4)])
        model = AdversarialModel(network, epsilon="8/255", objective="standard", log_accuracy=False)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    return model


def fit(model, num=BATCH * 3):
    model.fit(X[:num], LABELS[:num], batch_size=BATCH, shuffle=False, verbose=0)
    return model.network.get_weights()


@pytest.fixture(autouse=True)
def hears_ctrl_c():
    """What a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def after_step(monkeypatch):
    """`after_step(number, do)`: calls `do` when a step has run, and nobody has what it returns."""

    def after_step(number, do):
        steps, take = [], execution.Steps.take

        def taken(self, *args):
            returned = take(self, *args)
            steps.append(returned)
            if len(steps) == number:
                do()
            return returned

        monkeypatch.setattr(execution.Steps, "take", taken)

    return after_step


@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_leaves_the_weights_after_a_step(model, after_step, number):
    initial = model.network.get_weights()
    expected = fit(model, BATCH * number)
    model.network.set_weights(initial)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9))
    after_step(number, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        fit(model)
    assert model.optimizer.iterations.numpy() == number
    for ours, theirs in zip(model.network.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    fit(model)
    assert model.optimizer.iterations.numpy() == number + 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [1, 2])
def test_an_error_is_told_and_the_next_fit_goes_on_from_what_variables_hold(model, after_step, number):
    before = fit(model)

    def fail():
        raise TimeoutError("of somebody's own")

    after_step(number, fail)
    with pytest.raises(TimeoutError):
        fit(model)
    assert model.optimizer.iterations.numpy() == 3
    for ours, theirs in zip(model.network.get_weights(), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not np.array_equal(fit(model)[0], before[0])
    assert model.optimizer.iterations.numpy() == 6
