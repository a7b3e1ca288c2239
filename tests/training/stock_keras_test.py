"""Keras around an `AdversarialModel`, and `WeightAveraging` around stock models: callbacks, validation, saving, resuming."""

import csv
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.training.adversarial_model import AdversarialModel
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.weight_averaging import WeightAveraging, averaging_decay
from tests.training.any_keras_model_test import BATCH, NUM_CLASSES, SHAPE, WithDropout, assert_same_bits, images, small

pytestmark = pytest.mark.oldest

X, LABELS = images(BATCH * 3 + 4)


def compiled(network=None, *, optimizer="adam", metrics=None, steps_per_execution=1, **options):
    model = AdversarialModel(network or small(), epsilon="8/255", **options)
    model.compile(optimizer, metrics=metrics, steps_per_execution=steps_per_execution)
    return model


def test_callbacks_of_keras_see_robust_accuracies(tmp_path, capsys):
    model = compiled(optimizer=NesterovSGD(1e-3), metrics=["accuracy"])
    callbacks = [
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", monitor="val_robust_accuracy", save_best_only=True),
        keras.callbacks.EarlyStopping(monitor="val_robust_accuracy", patience=2, min_delta=2.0),
        keras.callbacks.ReduceLROnPlateau(patience=0, min_delta=1e9, min_lr=1e-9),
        keras.callbacks.TensorBoard(tmp_path / "events"),
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        averaging := WeightAveraging(tau=0.5),
    ]
    history = model.fit(
        X, LABELS, batch_size=BATCH, epochs=5, validation_data=(X[:11], LABELS[:11]), callbacks=callbacks, verbose=2
    ).history
    assert "robust_accuracy" in capsys.readouterr().out
    names = {"loss", "accuracy", "robust_accuracy", "learning_rate"}
    assert history.keys() == names | {"val_loss", "val_accuracy", "val_robust_accuracy"}
    assert len(history["loss"]) == 3  # Nothing improves by 2.
    assert history["learning_rate"][2] < history["learning_rate"][0]
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["val_robust_accuracy"]) for row in rows] == pytest.approx(history["val_robust_accuracy"])
    assert list((tmp_path / "events").rglob("events*"))
    best = keras.models.load_model(tmp_path / "best.keras")
    assert type(best) is type(model.network)
    assert averaging.averaged_model(X[:2] / np.float32(255)).shape == (2, NUM_CLASSES)


def test_validation_and_evaluate_are_of_the_network_in_inference():
    model = compiled(metrics=[keras.metrics.SparseCategoricalAccuracy(name="clean")])
    held_out = tf.data.Dataset.from_tensor_slices((X, LABELS)).batch(5)
    history = model.fit(X, LABELS, batch_size=BATCH, validation_data=held_out, verbose=0).history
    found = model.evaluate(X, LABELS, batch_size=5, return_dict=True, verbose=0)
    x = X / np.float32(255)
    accuracy = (model.network.predict(x, verbose=0).argmax(1) == LABELS).mean()
    assert history["val_accuracy"] == [pytest.approx(accuracy)]
    assert found["accuracy"] == pytest.approx(accuracy) and found["clean"] == pytest.approx(accuracy)
    assert found["robust_accuracy"] <= accuracy
    assert list(found.values()) == model.evaluate(X, LABELS, batch_size=5, verbose=0)
    np.testing.assert_array_equal(model.predict(x, verbose=0), model.network.predict(x, verbose=0))
    dataset = tf.data.Dataset.from_tensor_slices((x, LABELS)).batch(7)
    assert model.evaluate(dataset, verbose=0, return_dict=True)["accuracy"] == pytest.approx(accuracy)
    split = compiled().fit(X, LABELS, batch_size=BATCH, validation_split=0.25, verbose=0, validation_freq=2, epochs=3)
    assert len(split.history["val_loss"]) == 1 and len(split.history["loss"]) == 3


def test_the_loss_of_validation_is_the_objectives_and_the_regularisers():
    keras.utils.set_random_seed(0)
    l2 = keras.regularizers.L2(0.1)
    network = keras.Sequential(
        [keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(4, kernel_regularizer=l2)]
    )
    model = AdversarialModel(network, objective="standard")
    model.compile("sgd")
    logits = network(X / np.float32(255))
    expected = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(LABELS, logits))
    expected += 0.1 * tf.reduce_sum(network.layers[-1].kernel ** 2)
    assert model.evaluate(X, LABELS, verbose=0)[0] == pytest.approx(float(expected), rel=1e-5)


def test_backup_and_restore_goes_on_with_weights_optimiser_and_averages(tmp_path):
    def run(folder, stop_after=None):
        class Stop(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if epoch == stop_after:
                    raise KeyboardInterrupt

        averaging = WeightAveraging(tau=0.5, backup_dir=folder / "averages")
        model = compiled(optimizer="adam")
        callbacks = [averaging, keras.callbacks.BackupAndRestore(folder / "backup"), Stop()]
        model.fit(X, LABELS, batch_size=BATCH, epochs=4, callbacks=callbacks, verbose=0)
        return [*model.network.get_weights(), *averaging.averaged_model.get_weights()]

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", stop_after=2)
    assert_same_bits(run(tmp_path / "a"), run(tmp_path / "b"))


def averages_by_hand(trace, tau):
    averages = [value.copy() for value in trace[0]]
    for step, weights in enumerate(trace[1:]):
        decay = np.float32(averaging_decay(step, tau=tau))
        averages = [decay * average + (1 - decay) * weight for average, weight in zip(averages, weights)]
    return averages


class Trace(keras.callbacks.Callback):
    def on_train_begin(self, logs=None):
        self.trace = [[weight.numpy() for weight in self.model.trainable_weights]]

    def on_train_batch_end(self, batch, logs=None):
        self.trace.append([weight.numpy() for weight in self.model.trainable_weights])


@pytest.mark.parametrize("make", [small, WithDropout])
def test_averages_of_stock_models_are_exact_at_every_step(make):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    x = X[: BATCH * 3] / np.float32(255)
    labels = LABELS[: BATCH * 3]
    found = []
    for steps in (1, 3):
        keras.utils.set_random_seed(0)
        model, averaging, trace = make(), WeightAveraging(tau=0.3), Trace()
        model.compile("sgd", loss=loss, steps_per_execution=steps, jit_compile=False)
        step = model.train_step
        callbacks = [averaging, trace] if steps == 1 else [averaging]
        model.fit(x, labels, batch_size=BATCH, epochs=2, shuffle=False, callbacks=callbacks, verbose=0)
        assert model.train_step == step
        twin = averaging.averaged_model
        found.append([weight.numpy() for weight in twin.trainable_weights])
        if steps == 1:
            for average, expected in zip(found[0], averages_by_hand(trace.trace, 0.3), strict=True):
                np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
        for mine, live in zip(twin.non_trainable_weights, model.non_trainable_weights, strict=True):
            np.testing.assert_array_equal(mine.numpy(), live.numpy())
    for average, other in zip(*found, strict=True):
        np.testing.assert_allclose(average, other, atol=1e-6)


def test_averages_go_on_in_the_next_fit_and_end_with_it():
    x, labels = X[: BATCH * 3] / np.float32(255), LABELS[: BATCH * 3]
    model, averaging = small(), WeightAveraging(tau=0.3)
    model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    trace = Trace()
    model.fit(x, labels, batch_size=BATCH, shuffle=False, callbacks=[averaging, trace], verbose=0)
    whole = trace.trace
    model.fit(x, labels, batch_size=BATCH, shuffle=False, callbacks=[averaging, trace], verbose=0)
    whole += trace.trace[1:]
    averages = [weight.numpy() for weight in averaging.averaged_model.trainable_weights]
    for average, expected in zip(averages, averages_by_hand(whole, 0.3), strict=True):
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-6)
    model.fit(x, labels, batch_size=BATCH, verbose=0)  # Without it nothing moves.
    assert_same_bits(averages, [weight.numpy() for weight in averaging.averaged_model.trainable_weights])


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        raise KeyboardInterrupt


def linear(kind, optimizer=None, layers=()):
    """A small network, and the model with which it is trained."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential(
        [keras.Input(SHAPE), *layers, keras.layers.Flatten(), keras.layers.Dense(NUM_CLASSES, dtype="float32")]
    )
    model = network if kind == "stock" else AdversarialModel(network, objective="standard")
    loss = {"loss": keras.losses.SparseCategoricalCrossentropy(from_logits=True)} if kind == "stock" else {}
    model.compile(optimizer or keras.optimizers.SGD(0.5), jit_compile=False, **loss)
    return network, model


def train(model, num_steps, *callbacks):
    """Trains in so many steps."""
    x, labels = X[:4] / np.float32(255), LABELS[:4]
    model.fit(x, labels, batch_size=4, epochs=num_steps, shuffle=False, verbose=0, callbacks=list(callbacks))


def average_of(averaging):
    return averaging.averaged_model.trainable_weights[0].numpy()


def assert_moved_once(averaging, before, network, decay):
    expected = decay * before + (1 - decay) * network.trainable_weights[0].numpy()
    assert np.abs(expected - before).max() > 1e-4
    np.testing.assert_allclose(average_of(averaging), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["stock", "adversarial"])
def test_an_interrupted_fit_leaves_no_averaging_behind(kind):
    network, model = linear(kind)
    averaging = WeightAveraging(tau=0.9, warm_up=False)

    def interrupt():
        with pytest.raises(KeyboardInterrupt):
            train(model, 3, averaging, Interrupts())
        return average_of(averaging)

    before = interrupt()
    train(model, 1, averaging)
    assert_moved_once(averaging, before, network, 0.9)
    before = interrupt()
    train(model, 2)  # Without it nothing moves.
    np.testing.assert_array_equal(average_of(averaging), before)
    before = interrupt()
    start = network.trainable_weights[0].numpy()
    other = WeightAveraging(tau=0.6, warm_up=False)
    train(model, 1, other)
    assert_moved_once(other, start, network, 0.6)
    np.testing.assert_array_equal(average_of(averaging), before)


@pytest.mark.parametrize("kind", ["stock", "adversarial"])
def test_averages_of_one_fit_stay_as_they_are_in_others_and_after_compiling_again(kind):
    network, model = linear(kind)
    slow, fast = WeightAveraging(tau=0.995), WeightAveraging(tau=0.3, warm_up=False)
    train(model, 20, slow, fast)  # Both move.
    step = model.train_step
    before, others = average_of(slow), average_of(fast)
    assert np.abs(before - others).max() > 1e-4
    train(model, 1)
    np.testing.assert_array_equal(average_of(slow), before)
    loss = {"loss": model.loss} if kind == "stock" else {}
    model.compile(keras.optimizers.SGD(0.5), jit_compile=False, **loss)
    train(model, 1, slow)
    assert_moved_once(slow, before, network, 21 / 30)  # The 20 updates before it count.
    np.testing.assert_array_equal(average_of(fast), others)
    assert model.train_step == step


def test_the_count_of_updates_survives_an_interruption_after_compiling_again(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def run(*callbacks):
        network, model = linear("stock")
        averaging = WeightAveraging(tau=0.995, backup_dir=tmp_path / "averages")
        if callbacks:  # Of a first phase, whose averages go on.
            train(model, 6, averaging)
            model.compile(keras.optimizers.SGD(0.5), loss=model.loss, jit_compile=False)
        train(model, 3, averaging, keras.callbacks.BackupAndRestore(tmp_path / "backup"), Trace(), *callbacks)
        return network, averaging

    with pytest.raises(KeyboardInterrupt):
        run(Stop())
    stored = storage.read(tmp_path / "averages", 2).arrays
    assert stored["updates"] == 8
    network, averaging = run()
    assert_moved_once(averaging, stored["0"], network, 9 / 18)


def test_evaluation_with_the_callback_is_no_training():
    _, model = linear("stock")
    averaging = WeightAveraging(tau=0.9)
    step = model.train_step
    model.evaluate(X / np.float32(255), LABELS, verbose=0, callbacks=[averaging])
    assert model.train_step == step


def test_averages_move_once_an_update_of_an_optimiser_that_accumulates_gradients():
    network, model = linear("stock", keras.optimizers.SGD(0.5, gradient_accumulation_steps=2))
    averaging, trace = WeightAveraging(tau=0.3), Trace()
    train(model, 5, averaging, trace)
    for average, expected in zip(
        averaging.averaged_model.trainable_weights, averages_by_hand(trace.trace[0:5:2], 0.3), strict=True
    ):
        np.testing.assert_allclose(average.numpy(), expected, atol=1e-6)
    before = average_of(averaging)
    train(model, 1, averaging)  # The sixth step is the third update.
    assert_moved_once(averaging, before, network, 3 / 12)


def test_averages_stand_still_where_loss_scaling_skips_an_update():
    optimizer = keras.optimizers.LossScaleOptimizer(
        keras.optimizers.SGD(1e-3), initial_scale=3e38, dynamic_growth_steps=1
    )
    _, model = linear("stock", optimizer, [keras.layers.Rescaling(100.0)])
    averaging, trace = WeightAveraging(tau=0.9), Trace()
    train(model, 12, averaging, trace)
    updates = [trace.trace[0]]
    updates += [now for last, now in zip(trace.trace, trace.trace[1:]) if not np.array_equal(last[0], now[0])]
    assert 3 < len(updates) < 9  # It skips every other one.
    np.testing.assert_allclose(average_of(averaging), averages_by_hand(updates, 0.9)[0], atol=1e-6)


class Inside(keras.layers.Layer):
    """Scales pixels with statistics that a layer of its own was adapted to."""

    def __init__(self, **options):
        super().__init__(**options)
        self.inner = keras.layers.Normalization(axis=-1)

    def build(self, shape):
        self.inner.build(shape)

    def call(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", ["stock", "adversarial"])
def test_twins_scale_pixels_with_the_statistics_that_a_network_was_adapted_to(kind):
    normalization, nested = keras.layers.Normalization(axis=-1), Inside()
    network, model = linear(kind, keras.optimizers.SGD(0.0), [normalization, nested])
    for layer in (normalization, nested.inner):
        layer.adapt(3 * X / np.float32(255))
    averaging = WeightAveraging(tau=0.9)
    train(model, 2, averaging)
    x = X / np.float32(255)
    assert np.abs(network(x) - network.layers[-1](network.layers[-2](x))).max() > 0.1
    np.testing.assert_allclose(averaging.averaged_model(x), network(x), atol=1e-5)
    for mine, live in zip(averaging.averaged_model.weights, network.weights, strict=True):
        assert mine.dtype == live.dtype
        np.testing.assert_allclose(mine.numpy(), live.numpy(), atol=1e-6)


def test_a_network_that_cannot_be_cloned_asks_for_a_twin():
    class Odd(keras.Model):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer
            self.build((None, *SHAPE))

        def build(self, shape):
            self.built = True

        def call(self, x):
            return self.layer(x)

    model = Odd(small())
    model.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    with pytest.raises(ValueError, match=r"WeightAveraging\(twin=\.\.\.\)") as raised:
        model.fit(X / np.float32(255), LABELS, verbose=0, callbacks=[WeightAveraging(tau=0.5)])
    assert "\n" not in str(raised.value)
    model.fit(X / np.float32(255), LABELS, verbose=0, callbacks=[WeightAveraging(Odd(small()), tau=0.5)])


READS = """
import sys, keras, numpy as np
x = np.load(sys.argv[1])
np.save(sys.argv[3], keras.models.load_model(sys.argv[2]).predict(x, verbose=0))
assert "robust_keras" not in sys.modules
"""


def test_a_saved_network_of_stock_layers_needs_no_package(tmp_path):
    model = compiled()
    model.fit(X, LABELS, batch_size=BATCH, verbose=0)
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "exported")
    x = X / np.float32(255)
    np.save(tmp_path / "x.npy", x)
    paths = [str(tmp_path / name) for name in ("x.npy", "model.keras", "y.npy")]
    subprocess.run([sys.executable, "-c", READS, *paths], check=True, cwd=tmp_path, env={"PATH": ""})
    expected = model.predict(x, verbose=0)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-6)
    served = tf.saved_model.load(str(tmp_path / "exported"))
    np.testing.assert_allclose(served.serve(x), expected, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        network = small()
        model = compiled(network)
    finally:
        keras.config.set_dtype_policy("float32")
    losses = model.fit(X, LABELS, batch_size=BATCH, epochs=3, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
