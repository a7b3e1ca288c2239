"""Callbacks that read or set weights, or the learning rate, while a model trains on JAX's devices."""

import keras
import numpy as np

from robust_keras.engines import strategies
from robust_keras.training.adversarial_model import AdversarialModel
from tests.training.any_keras_model_test import images

BATCH = 8
X, LABELS = images(BATCH * 3)


class Meddler(keras.callbacks.Callback):
    """Reads weights after each step, and sets weights and the learning rate before some."""

    def __init__(self):
        super().__init__()
        self.seen, self.steps = [], 0

    def on_train_batch_begin(self, batch, logs=None):
        self.steps += 1
        kernel = self.model.network.trainable_weights[0]
        if self.steps % 3 == 2:
            kernel.assign(0.5 * kernel)
        if self.steps == 4:
            self.model.optimizer.learning_rate = 0.02

    def on_train_batch_end(self, batch, logs=None):
        iterations = int(self.model.optimizer.iterations.numpy())
        self.seen.append([iterations, float(logs["loss"]), *(float(w.numpy().sum()) for w in self.model.weights)])


def trained(strategy, make_tiny_model, callbacks, *, epochs=4, steps_per_execution=1):
    with strategy.scope():
        model = AdversarialModel(make_tiny_model(statistics_group_size=4), norm="L2", epsilon="64/255")
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), steps_per_execution=steps_per_execution)
    history = model.fit(
        X,
        LABELS,
        batch_size=BATCH,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
        validation_data=(X[:8], LABELS[:8]),
    ).history
    return history, model.network.get_weights()


def assert_alike(ours, theirs):
    (history, weights), (expected, expected_weights) = ours, theirs
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=2e-5, err_msg=name)
    for array, value in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(array, value, atol=1e-5)


def test_steps_start_from_what_a_callback_has_set(on_jax, make_tiny_model):
    meddlers = []
    found = []
    for strategy in (on_jax(2), strategies.strategy("one")):
        meddlers.append(Meddler())
        found.append(trained(strategy, make_tiny_model, [meddlers[-1]]))
    assert_alike(*found)
    assert [row[0] for row in meddlers[0].seen] == list(range(1, 13))
    np.testing.assert_allclose(meddlers[0].seen, meddlers[1].seen, rtol=1e-4, atol=1e-4)


def test_callbacks_of_keras_do_what_they_do_elsewhere(on_jax, make_tiny_model, tmp_path):
    found, sums = [], []
    for k, strategy in enumerate((on_jax(2), strategies.strategy("one"))):
        of_epochs = []

        def note(epoch, logs, of_epochs=of_epochs):
            of_epochs.append([float(np.sum(weight)) for weight in note.callback.model.get_weights()])

        note.callback = keras.callbacks.LambdaCallback(on_epoch_end=note)
        callbacks = [
            keras.callbacks.LearningRateScheduler(lambda epoch, lr: 0.5 * lr if epoch else lr),
            keras.callbacks.ReduceLROnPlateau(monitor="loss", patience=0, min_delta=1e9, min_lr=1e-9),
            keras.callbacks.ModelCheckpoint(tmp_path / f"{k}-{{epoch}}.keras"),
            # Nothing is better than the first epoch, whose weights come back.
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, min_delta=1e9, restore_best_weights=True),
            note.callback,
        ]
        found.append(trained(strategy, make_tiny_model, callbacks, epochs=6, steps_per_execution=2))
        sums.append(of_epochs)
    assert_alike(*found)
    assert len(found[0][0]["loss"]) == 3
    np.testing.assert_allclose(*sums, rtol=1e-4, atol=1e-4)
    assert len({row[0] for row in sums[0]}) == 3
    names = sorted(path.name[1:] for path in tmp_path.glob("0-*"))
    assert names == sorted(path.name[1:] for path in tmp_path.glob("1-*")) and len(names) == 3
    for k, (_, weights) in enumerate(found):
        first = keras.models.load_model(tmp_path / f"{k}-1.keras").get_weights()
        for weight, restored in zip(first, weights, strict=True):
            np.testing.assert_array_equal(weight, restored)


def test_a_fit_goes_on_from_what_was_set_after_another(on_jax, make_tiny_model):
    found = []
    for strategy in (on_jax(2), strategies.strategy("one")):
        with strategy.scope():
            model = AdversarialModel(make_tiny_model(statistics_group_size=4), norm="L2", epsilon="64/255")
            model.compile(keras.optimizers.SGD(0.05, momentum=0.9), steps_per_execution=2)
        for _ in range(2):
            history = model.fit(X, LABELS, batch_size=BATCH, shuffle=False, verbose=0).history
            model.network.set_weights([0.9 * weight for weight in model.network.get_weights()])
        evaluated = model.evaluate(X[:10], LABELS[:10], batch_size=5, return_dict=True, verbose=0)
        found.append(({**history, **{f"of {k}": [v] for k, v in evaluated.items()}}, model.network.get_weights()))
    assert_alike(*found)
