"""The whole training step against an independent PyTorch loop: same weights, images, labels and noise.

`oracles/torch_reference.py` recorded the numbers; `oracles/torch_inputs.py` makes what both are given.
"""

import functools
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, schedules, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.models import normalization, wide_resnet
from robust_keras.training import adversarial_model, objectives
from robust_keras.training.optimizer import NesterovSGD
from robust_keras.training.weight_averaging import WeightAveraging
from tests.oracles import torch_inputs as given

REFERENCE = pathlib.Path(__file__).parent / "oracles" / "torch_reference.npz"


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as arrays:
        return dict(arrays)


class Losses(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(float(logs["loss"]))


class Run:
    """The package's own training step, fed with the recorded start noise."""

    def __init__(self, first_x_adv):
        inputs = given.make()
        make = functools.partial(
            wide_resnet.wide_resnet,
            depth=10,
            width=1,
            num_classes=given.NUM_CLASSES,
            activation="silu",
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2471, 0.2435, 0.2616),
            statistics_group_size=given.GROUP_SIZE,
        )
        self.network = make()
        for weight in self.network.trainable_weights:
            weight.assign(inputs[f"weights/{weight.path}"])
        starts = tf.constant(inputs["noise"])
        self.threat = threats.threat(norm="Linf", epsilon=given.EPSILON)._replace(
            random_start=lambda x, seeds: tf.clip_by_value(x + starts[self.model.optimizer.iterations.value], 0.0, 1.0)
        )
        attack = functools.partial(
            pgd,
            threat=self.threat,
            loss_fn=losses.cross_entropy,
            num_steps=given.NUM_ATTACK_STEPS,
            step_size=given.STEP_SIZE,
        )
        self.attack = attack

        def first_recorded(logits_fn, x, targets, *, seeds):
            # A CPU that rounds a gradient to the other side of zero steps the other way, and then trains on another
            # image: what follows the first attack is compared on the recorded images.
            is_first = tf.equal(self.model.optimizer.iterations.value, 0)
            return tf.where(is_first, first_x_adv, attack(logits_fn, x, targets, seeds=seeds))

        self.model = adversarial_model.AdversarialModel(
            self.network,
            objective=objectives.adversarial_training,
            attack=first_recorded,
            attack_batch_norm="batch",
        )
        schedule = functools.partial(
            schedules.multistep,
            base=given.BASE_LEARNING_RATE,
            num_steps=given.NUM_STEPS,
            drops=[step / given.NUM_STEPS for step in given.DROPS],
        )
        self.model.compile(optimizer=NesterovSGD(schedule), jit_compile=False)
        self.averaging = WeightAveraging(make(), tau=given.TAU)
        batches = {
            "image": inputs["images"],
            "label": inputs["labels"].astype(np.int32),
            "targets": np.eye(given.NUM_CLASSES, dtype=np.float32)[inputs["labels"]],
            "seeds": np.zeros((given.NUM_STEPS, given.BATCH_SIZE, 2), np.int32),
            "is_labelled": np.ones((given.NUM_STEPS, given.BATCH_SIZE), np.int32),
        }
        self.first_image = tf.constant(inputs["images"][0], tf.float32) / 255.0
        self.first_label = tf.constant(inputs["labels"][0], tf.int32)
        self.dataset = tf.data.Dataset.from_tensor_slices(batches)

    def fit(self, start, num_steps):
        recorded = Losses()
        dataset = self.dataset.skip(start).take(num_steps)
        self.model.fit(dataset, callbacks=[self.averaging, recorded], verbose=0)
        self.averaging.start_from_model = False
        return recorded.values


def test_first_step_and_twenty_losses(reference):
    run = Run(reference["x_adv"])
    seeds = tf.zeros((given.BATCH_SIZE, 2), tf.int32)

    @tf.function
    def attacked():
        def logits_fn(x):
            return run.network(x, training=True)

        with normalization.batch_norm_mode("batch"):
            start = run.threat.random_start(run.first_image, seeds)
            with tf.GradientTape() as tape:
                tape.watch(start)
                loss = tf.reduce_sum(losses.cross_entropy(logits_fn(start), run.first_label))
            x_adv = run.attack(logits_fn, run.first_image, run.first_label, seeds=noise.fold_in(seeds, 0))
        return tape.gradient(loss, start), x_adv

    # `iterations` exists once the model is compiled; it is 0, so this is the first step's attack.
    input_gradient, x_adv = attacked()
    assert np.abs(reference["input_gradient"]).max() > 0.05
    np.testing.assert_allclose(input_gradient, reference["input_gradient"], atol=1e-5)
    # A sign step turns a rounding error into two steps where a gradient is all but zero.
    assert np.mean(np.abs(x_adv - reference["x_adv"]) > 1e-5) < 1e-3

    recorded = run.fit(0, 1)
    np.testing.assert_allclose(recorded[0], reference["loss"][0], rtol=1e-5)
    for weight, momentum, average in zip(
        run.network.trainable_weights, run.model.optimizer.momentums, run.averaging.twin.trainable_weights
    ):
        # The momentum after the first step is the gradient, weight decay included.
        for name, value in (("momentum", momentum), ("weights", weight), ("average", average)):
            np.testing.assert_allclose(
                value.numpy(), reference[f"{name}/{weight.path}"], atol=1e-5, err_msg=f"{name} of {weight.path}"
            )
    statistics = {w.path: w.numpy() for w in run.network.non_trainable_weights}
    for name in [name for name in reference if name.startswith("moving_")]:
        kind, layer = name.split("/")
        np.testing.assert_allclose(statistics[f"{layer}/{kind}"], reference[name], atol=1e-5, err_msg=name)
    for weight, live in zip(run.averaging.twin.non_trainable_weights, run.network.non_trainable_weights):
        np.testing.assert_array_equal(weight.numpy(), live.numpy())

    recorded += run.fit(1, given.NUM_STEPS - 1)
    np.testing.assert_allclose(recorded, reference["loss"], rtol=1e-2)
    print("largest relative difference of the 20 losses:", np.max(np.abs(recorded / reference["loss"] - 1)))
