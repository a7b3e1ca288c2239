"""The run as a library call: going on, modes of the attack, and what the training step is made of."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, ownership, schedules, storage, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.commands import train_settings
from robust_keras.data import sources, training_batches
from robust_keras.evaluation import evaluate
from robust_keras.models import normalization, wide_resnet
from robust_keras.training import adversarial_model, objectives

NUM_STEPS = 6


def tiny_data(data_dir=None):
    random = np.random.RandomState(0)
    labels = np.arange(40, dtype=np.int32) % 4
    images = (random.rand(40, 8, 8, 3) * 120 + labels[:, None, None, None] * 40).astype(np.uint8)
    source = sources.Source("tiny", images, labels, 4)
    train, validation = sources.hold_out(source, 8)
    return training_batches.TrainingData(train, validation, None, (0.5,) * 3, (0.25,) * 3)


def small_network(*, num_classes, mean, std, input_shape):
    """What a step has to do with, and no more: tracing a Wide ResNet takes longer than these runs."""
    layers = [
        keras.layers.Rescaling(1 / std[0], -mean[0] / std[0], name="pixels"),
        keras.layers.Conv2D(12, 3, strides=2, padding="same", use_bias=False, name="conv"),
        normalization.BatchNorm(4, name="norm"),
        keras.layers.Activation("silu", name="silu"),
        keras.layers.Flatten(name="features"),
        keras.layers.Dense(num_classes, kernel_initializer="zeros", name="logits"),
    ]
    images = keras.Input(input_shape, name="images")
    return keras.Model(images, functools.reduce(lambda x, layer: layer(x), layers, images), name="small")


def tiny_run(workdir, **changes):
    """Trains a tiny network."""
    return tiny_settings(**changes)(workdir=str(workdir))


def tiny_settings(**changes):
    """A run with L2 steps, which do not turn rounding errors into whole steps as the sign does."""
    l2 = threats.threat(norm="L2", epsilon="128/255")
    attack = functools.partial(pgd, threat=l2, loss_fn=losses.cross_entropy, num_steps=2, step_size="60/255")
    arguments = {
        "data": tiny_data,
        "model": small_network,
        "batches": functools.partial(training_batches.batches, batch_size=8, group_size=4),
        "objective": objectives.adversarial_training,
        "attack": attack,
        "validation": functools.partial(evaluate.correct_under_attack, attack=attack),
        "learning_rate": functools.partial(schedules.multistep, base=0.1),
        "train_steps": NUM_STEPS,
        "seed": 0,
        "tau": 0.9,
        "strategy": "one",
        "validation_batch_size": 6,
        "validate_every": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "progress": False,
        **changes,
    }
    return train_settings.train(**arguments)


def rows(workdir, step=NUM_STEPS):
    return storage.read(workdir / "checkpoints", step).info["rows"]


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one_device")
    return workdir, tiny_run(workdir)


@pytest.mark.oldest
def test_a_run_continues_from_a_snapshot_to_the_same_result(one_device, tmp_path, capsys):
    workdir, _ = one_device
    snapshot = storage.read(workdir / "checkpoints", 3)
    storage.write(tmp_path / "checkpoints", 3, snapshot.arrays, snapshot.info)
    (tmp_path / "metrics.csv").write_text("rows of steps\nthat are done\nagain")
    tiny_run(tmp_path)
    assert capsys.readouterr().out.splitlines() == ["Resuming from step 3"]
    ours, theirs = (storage.read(run / "checkpoints", NUM_STEPS).arrays for run in (tmp_path, workdir))
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    assert (tmp_path / "metrics.csv").read_text().count("\n") == NUM_STEPS + 1


def test_a_folder_in_use_is_refused(tmp_path):
    with ownership.lock(tmp_path, what="another call"), pytest.raises(ownership.FolderInUse):
        tiny_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_of_another_network_are_refused(one_device, tmp_path):
    snapshot = storage.read(one_device[0] / "checkpoints", 3)
    storage.write(tmp_path / "checkpoints", 3, snapshot.arrays, snapshot.info)
    with pytest.raises(ValueError, match="Expected this run's variables"):
        tiny_run(tmp_path, model=functools.partial(wide_resnet.wide_resnet, depth=10, width=2, activation="silu"))


@pytest.mark.oldest
def test_the_result_holds_the_best_weights_and_both_reports(one_device):
    workdir, trained = one_device
    assert trained.report["last"]["step"] == NUM_STEPS
    accuracies = {row["step"]: row["val_robust_averaged"] for row in rows(workdir) if "val_robust" in row}
    assert accuracies.keys() == {3, NUM_STEPS}
    best_step = max(accuracies, key=lambda step: (accuracies[step], -step))
    assert trained.report["best"]["step"] == best_step
    at_best = storage.read(workdir / "checkpoints", best_step).arrays
    for weight in trained.best.weights:
        np.testing.assert_array_equal(weight.numpy(), at_best[f"averages/{weight.path}"])


def test_reported_validation_accuracy_is_that_of_the_reported_network(one_device):
    _, trained = one_device
    data = tiny_data()
    x = tf.cast(data.validation.images, tf.float32) / 255
    predictions = tf.argmax(trained.averaged(x, training=False), -1).numpy()
    clean = np.mean(predictions == data.validation.labels)
    assert trained.report["last"]["metrics"]["val_clean_averaged"] == pytest.approx(clean)


@pytest.mark.slow
def test_seeds_change_everything_and_nothing_else_does(one_device, tmp_path):
    workdir, _ = one_device
    tiny_run(tmp_path / "again", train_steps=1)
    tiny_run(tmp_path / "other", train_steps=1, seed=1)
    again, other = rows(tmp_path / "again", 1)[0]["loss"], rows(tmp_path / "other", 1)[0]["loss"]
    # The classifier starts at zero, so the first loss is log 4 for all; the second is not.
    assert again == rows(workdir)[0]["loss"] == pytest.approx(np.log(4), rel=1e-5)
    assert other == pytest.approx(np.log(4), rel=1e-5)
    weights = [storage.read(tmp_path / run / "checkpoints", 1).arrays for run in ("again", "other")]
    assert not np.allclose(weights[0]["weights/logits/bias"], weights[1]["weights/logits/bias"])


class Probe:
    """An attack that records what it is asked for, and moves nothing."""

    def __init__(self):
        self.targets = None

    def __call__(self, logits_fn, x, targets, *, seeds):
        self.targets = targets
        self.mode = normalization._mode.get()
        return x + 0.0 * tf.reshape(tf.cast(seeds[:, 0], tf.float32), (-1, 1, 1, 1))


@pytest.mark.parametrize("target", adversarial_model.ATTACK_TARGETS)
@pytest.mark.parametrize("mode", ["batch", "moving"])
def test_the_attack_gets_its_target_and_its_batch_norm_mode(target, mode):
    network = wide_resnet.wide_resnet(depth=10, width=1, num_classes=4, input_shape=(8, 8, 3), statistics_group_size=2)
    probe = Probe()
    model = adversarial_model.AdversarialModel(
        network,
        objective=objectives.adversarial_training,
        attack=probe,
        attack_target=target,
        attack_batch_norm=mode,
    )
    network.get_layer("logits").kernel.assign(tf.random.stateless_normal((64, 4), (0, 0)))
    x = tf.random.stateless_uniform((4, 8, 8, 3), (1, 1))
    labels, targets = tf.constant([0, 1, 2, 3]), tf.fill((4, 4), 0.25)
    seeds = noise.example_seeds(0, 0, tf.range(4))
    before = [w.numpy() for w in network.non_trainable_weights]
    model.attacked(x, labels, targets, seeds)
    assert probe.mode == mode
    with normalization.batch_norm_mode(mode):
        prediction = tf.nn.softmax(network(x, training=True))
    expected = {"label": labels, "targets": targets, "clean_prediction": prediction}[target]
    np.testing.assert_allclose(probe.targets, expected, atol=1e-6)
    for old, weight in zip(before, network.non_trainable_weights):
        np.testing.assert_array_equal(old, weight.numpy())


def test_batch_norm_mode_of_the_attack_changes_the_run(one_device, tmp_path):
    workdir, _ = one_device
    tiny_run(tmp_path, attack_batch_norm="moving", train_steps=3)
    assert rows(tmp_path, 3)[2]["loss"] != pytest.approx(rows(workdir)[2]["loss"], rel=1e-6)


def test_the_whole_step_compiles_with_xla(one_device, tmp_path):
    workdir, _ = one_device
    tiny_run(tmp_path, train_steps=2, jit_compile=True, validate_every=100)
    for ours, theirs in zip(rows(tmp_path, 2), rows(workdir)[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_works_on_remote_style_paths():
    workdir = "ram://run"
    tiny_run(workdir, train_steps=1)
    assert storage.steps(f"{workdir}/checkpoints") == [1]
    with tf.io.gfile.GFile(f"{workdir}/metrics.csv") as file:
        assert file.read().startswith("step,loss,learning_rate")
    with tf.io.gfile.GFile(f"{workdir}/checkpoints/step-00000001.json") as file:
        assert json.loads(file.read())["info"]["last_validation"]["step"] == 1


# Another optimiser.


def test_a_given_optimizer_takes_the_same_steps(tmp_path):
    without = {"momentum": 0.0, "weight_decay": 0.0}
    ours = tiny_run(tmp_path / "ours", **without)
    stock = tiny_run(tmp_path / "stock", optimizer=lambda learning_rate: keras.optimizers.SGD(learning_rate))
    for one, other in zip(stock.network.weights, ours.network.weights):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6, err_msg=one.path)


def test_a_run_with_a_given_optimizer_continues_to_the_same_result(tmp_path, capsys):
    def make(learning_rate):
        return keras.optimizers.AdamW(learning_rate, weight_decay=0.1)

    run = functools.partial(tiny_run, optimizer=make, learning_rate=functools.partial(schedules.cosine, base=0.01))
    run(tmp_path / "whole")
    snapshot = storage.read(tmp_path / "whole" / "checkpoints", 3)
    assert len([name for name in snapshot.arrays if name.startswith("optimizer/")]) >= 2
    storage.write(tmp_path / "again" / "checkpoints", 3, snapshot.arrays, snapshot.info)
    capsys.readouterr()
    run(tmp_path / "again")
    assert capsys.readouterr().out.splitlines() == ["Resuming from step 3"]
    ours, theirs = (storage.read(tmp_path / name / "checkpoints", NUM_STEPS).arrays for name in ("again", "whole"))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"optimizer": keras.optimizers.SGD, "momentum": 0.8},
            "settings of the given optimizer itself. Received: .*0.8",
        ),
        (
            {"optimizer": lambda learning_rate: None},
            "a keras.optimizers.Optimizer from train.optimizer. Received: None",
        ),
    ],
    ids=["momentum", "none"],
)
def test_an_optimizer_that_is_none_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **changes)
