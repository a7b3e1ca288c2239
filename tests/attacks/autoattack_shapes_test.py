"""The standard ensemble as a whole, with few steps, on images and classes unlike CIFAR-10's."""

import functools
import math

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import threats
from robust_keras.attacks.attack import as_attack
from robust_keras.attacks.autoattack import standard
from robust_keras.data import sources
from robust_keras.evaluation import evaluate

FEW_CLASSES = ("dlr_fell_back_to_margin", "targeted_dlr_fell_back_to_margin", "fewer_target_classes")


@pytest.mark.parametrize(
    "num_classes, shape, norm, epsilon, flags",
    [
        (2, (28, 28, 1), "Linf", "8/255", {"targeted_dlr_fell_back_to_margin", "fewer_target_classes"}),
        (3, (40, 24, 3), "L2", 0.5, {"targeted_dlr_fell_back_to_margin", "fewer_target_classes"}),
        pytest.param(10, (28, 28, 1), "L1", 5.0, set(), marks=pytest.mark.slow),
        (100, (40, 24, 3), "Linf", "8/255", set()),
    ],
)
def test_the_standard_ensemble_takes_any_classes_and_shapes(num_classes, shape, norm, epsilon, flags):
    rng = np.random.default_rng(0)
    first = rng.normal(0.0, 2.0 / math.sqrt(math.prod(shape)), (math.prod(shape), 8)).astype(np.float32)
    second = rng.normal(size=(8, num_classes)).astype(np.float32)

    def network(x):
        return tf.nn.silu(tf.reshape(x - 0.5, (-1, math.prod(shape))) @ first) @ second

    images = rng.integers(0, 256, (2, *shape)).astype(np.uint8)
    clean = images / np.float32(255)
    labels = np.argmax(network(clean), axis=-1).astype(np.int32)
    threat = threats.threat(norm=norm, epsilon=epsilon)
    few = {"apgd-ce": {"num_steps": 3}, "apgd-t": {"num_steps": 3}, "fab-t": {"num_steps": 2}}
    few["square"] = {"num_queries": 3}
    whole = standard(threat=threat)
    steps = [functools.partial(one, **few[as_attack(one).name]) for one in whole]
    results, examples = evaluate.evaluate(
        network,
        sources.Source("made", images, labels, num_classes),
        attacks=steps,
        threat=threat,
        batch_size=2,
        individual=True,
        diagnose=False,
        progress=False,
    )
    assert [record["name"] for record in results["attacks"]] == list(few)
    assert [record["examples_attacked"] for record in results["attacks"]] == [2] * 4
    assert set(results["warnings"]) & set(FEW_CLASSES) == flags
    adversarial = examples["adversarial"]
    assert adversarial.shape == (2, *shape)
    np.testing.assert_array_equal(np.argmax(network(adversarial), axis=-1) == labels, examples["robust"])
    assert threat.distance(adversarial, clean).numpy().max() <= threat.epsilon * (1 + 1e-5) + 1e-6
