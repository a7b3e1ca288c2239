"""What `fit` makes of data: which images each epoch and each validation has, in which order, and what ends early."""

import keras
import numpy as np
import pytest

from robust_keras.data import fit_batches
from robust_keras.training.adversarial_model import AdversarialModel

X = np.arange(16, dtype=np.uint8).reshape(16, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
Y = np.arange(16) % 3


def small():
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten(), keras.layers.Dense(3)])


def compiled(optimizer="sgd", **options):
    model = AdversarialModel(small(), objective="standard", **options)
    model.compile(optimizer)
    return model


class Reshuffled(keras.utils.PyDataset):
    """Starts each pass with the image after the one that the last pass started with."""

    def __init__(self):
        super().__init__()
        self.order, self.read = np.arange(16), []

    def __len__(self):
        return 4

    def __getitem__(self, index):
        mine = self.order[4 * index : 4 * index + 4]
        self.read.append(int(mine[0]))
        return X[mine], Y[mine]

    def on_epoch_end(self):
        self.order = np.roll(self.order, -1)


def generator(num_batches):
    for k in range(num_batches):
        yield X[4 * (k % 4) :][:4], Y[4 * (k % 4) :][:4]


def test_a_data_set_is_told_of_the_end_of_each_pass():
    data, held_out = Reshuffled(), Reshuffled()
    compiled().fit(data, validation_data=held_out, epochs=3, verbose=0)
    passes = [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14]
    assert data.read == held_out.read == passes


class Column:
    """As pandas has it: its brackets take names."""

    def __init__(self, values, index):
        self.values, self.names, self.shape = values, list(index), values.shape

    def __len__(self):
        return len(self.values)

    def __getitem__(self, names):
        return self.values[[self.names.index(name) for name in names]]

    def __array__(self, dtype=None, copy=None):
        return self.values

    def to_numpy(self):
        return self.values


def test_columns_of_a_table_are_read_by_position():
    model, names = compiled(), np.random.default_rng(0).permutation(16)
    weights = np.linspace(0.0, 2.0, 16)
    expected = model.evaluate(X, Y, sample_weight=weights, verbose=0)
    labels, weights = Column(Y, names), Column(weights, names)
    assert model.evaluate(X, labels, sample_weight=weights, verbose=0) == expected


def test_validation_reads_all_of_a_generator_and_no_more():
    model = compiled()
    expected = model.evaluate(X, Y, batch_size=4, verbose=0, return_dict=True)
    still = keras.optimizers.SGD(0.0)
    model.compile(still)
    history = model.fit(X, Y, validation_data=generator(4), verbose=0).history
    assert history["val_loss"] == [pytest.approx(expected["loss"])]
    endless = generator(100)
    history = model.fit(X, Y, validation_data=endless, validation_steps=4, epochs=3, verbose=0).history
    assert history["val_loss"] == [pytest.approx(expected["loss"])] * 3
    assert len(list(endless)) == 100 - 12


@pytest.mark.parametrize(
    "arguments, message",
    [
        (lambda: {"x": generator(4), "epochs": 2}, "Expected steps_per_epoch for 2 epochs of a generator"),
        (
            lambda: {"x": X, "y": Y, "epochs": 2, "validation_data": generator(4)},
            "or validation_steps. Received: a gen",
        ),
    ],
)
def test_a_generator_for_several_epochs_is_refused_before_the_first_step(arguments, message):
    model = compiled()
    with pytest.raises(ValueError, match=message):
        model.fit(**arguments(), verbose=0)
    assert int(model.optimizer.iterations.numpy()) == 0


def test_a_validation_that_has_run_out_is_said():
    with pytest.raises(ValueError, match="Expected batches to evaluate on. Received: the end of the generator"):
        compiled().fit(X, Y, validation_data=generator(4), validation_steps=4, epochs=2, verbose=0)


def test_a_part_that_is_held_out_is_the_one_that_keras_holds_out():
    for num, fraction, left in [(10, 0.25, 7), (10, 0.33, 6), (10, 0.15, 8), (16, 0.25, 12)]:
        (x, y, _), (held_out, _, _) = fit_batches.split(X[:num], Y[:num], None, fraction)
        assert (len(x), len(y), len(held_out)) == (left, left, num - left)


class Read(keras.callbacks.Callback):
    """The orders of the images that a model was trained on, one an epoch."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.epochs, original = [], fit_batches._of_arrays

        def recorded(arrays, *options):
            given = original(arrays, *options)

            def of_epoch(epoch):
                self.epochs.append([])
                for batch in given.of_epoch(epoch):
                    self.epochs[-1] += batch[0][:, 0, 0, 0].tolist()
                    yield batch

            return given._replace(of_epoch=of_epoch)

        monkeypatch.setattr(fit_batches, "_of_arrays", recorded)


def test_every_epoch_has_an_order_of_its_own_in_one_fit_or_several(monkeypatch):
    read = Read(monkeypatch)
    compiled().fit(X, Y, batch_size=4, epochs=4, verbose=0)
    whole = read.epochs[:]
    assert len({tuple(order) for order in whole}) == 4
    read.epochs.clear()
    model = compiled()
    for _ in range(2):
        model.fit(X, Y, batch_size=4, epochs=1, verbose=0)
    model.fit(X, Y, batch_size=4, epochs=4, initial_epoch=2, verbose=0)
    assert read.epochs == whole


def test_a_run_that_is_resumed_reads_on_where_it_was(monkeypatch, tmp_path):
    read = Read(monkeypatch)
    options = dict(batch_size=4, steps_per_epoch=3, verbose=0)
    compiled().fit(X, Y, epochs=4, **options)
    first, second, third = read.epochs
    read.epochs.clear()
    backup = keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)
    compiled().fit(X, Y, epochs=2, callbacks=[backup], **options)
    compiled().fit(X, Y, epochs=4, callbacks=[backup], **options)
    assert read.epochs == [first, second[:8], second, third]


def test_early_stopping_restores_its_weights_after_the_optimisers_averages():
    class Recorded(keras.callbacks.Callback):
        best = None

        def on_epoch_end(self, epoch, logs=None):
            if self.best is None:
                self.best = self.model.network.get_weights()

    model, recorded = compiled(keras.optimizers.SGD(-0.5, use_ema=True, ema_momentum=0.9)), Recorded()
    stopping = keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, restore_best_weights=True)
    model.fit(X, Y, validation_data=(X, Y), epochs=5, callbacks=[recorded, stopping], verbose=0)
    assert stopping.best_epoch == 0
    for ours, best in zip(model.network.get_weights(), recorded.best):
        np.testing.assert_array_equal(ours, best)


def test_callbacks_are_told_of_validation():
    told = []

    class Told(keras.callbacks.Callback):
        def on_test_begin(self, logs=None):
            told.append("begin")

        def on_test_end(self, logs=None):
            told.append(sorted(logs))

    compiled().fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[Told()], verbose=0)
    assert told[0] == told[2] == "begin" and "val_loss" in told[1] and len(told) == 4


def test_validation_of_averages_that_the_optimiser_keeps():
    model = compiled(keras.optimizers.SGD(0.5, use_ema=True, ema_momentum=0.5))
    swapped = keras.callbacks.SwapEMAWeights(swap_on_epoch=False)
    history = model.fit(X, Y, batch_size=4, validation_data=(X, Y), callbacks=[swapped], verbose=0).history
    # Which the network has at the end.
    assert history["val_loss"] == [pytest.approx(model.evaluate(X, Y, verbose=0)[0], rel=1e-5)]


def test_batches_that_have_weights_and_batches_that_have_none_follow_each_other():
    found = []
    for steps_per_execution in (1, 4):
        keras.utils.set_random_seed(0)
        model = AdversarialModel(small(), epsilon=None, objective="standard", log_accuracy=False)
        model.compile("sgd", steps_per_execution=steps_per_execution)
        weights = [(), (np.zeros(4),), (np.full(4, 2.0),), ()]
        batches = ((X[4 * k : 4 * k + 4], np.arange(4) % 2, *each) for k, each in enumerate(weights))
        model.fit(batches, steps_per_epoch=4, verbose=0)
        found.append(model.network.get_weights())
    for one_by_one, together in zip(*found, strict=True):
        np.testing.assert_allclose(together, one_by_one, rtol=1e-6)
