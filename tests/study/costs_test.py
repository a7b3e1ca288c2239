import math

import keras
import pytest

from robust_keras.models import wide_resnet
from robust_keras.study import costs


@pytest.mark.parametrize("depth, width, classes", [(10, 1, 10), (16, 2, 10), (10, 3, 7)])
def test_parameters_and_operations_are_those_of_the_network(depth, width, classes):
    network = wide_resnet.wide_resnet(
        depth=depth,
        width=width,
        num_classes=classes,
        activation="relu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_shape=(32, 32, 3),
    )
    convolutions = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)]
    multiplications = sum(math.prod(c.kernel.shape) * math.prod(c.output.shape[1:3]) for c in convolutions)
    classifier = math.prod(network.layers[-1].kernel.shape)
    assert costs.forward_flops(depth, width, num_classes=classes) == 2 * (multiplications + classifier)
    trainable = sum(int(weight.shape.num_elements()) for weight in (w.value for w in network.trainable_weights))
    assert costs.num_parameters(depth, width, num_classes=classes) == trainable


def test_operations_by_hand():
    # WRN-10-1, multiplications: the stem, then of each group the 1 x 1 shortcut and two 3 x 3 convolutions.
    stem = 32 * 32 * 9 * 3 * 16
    first = 32 * 32 * (16 * 16 + 9 * 16 * 16 * 2)
    second = 16 * 16 * (16 * 32 + 9 * 16 * 32 + 9 * 32 * 32)
    third = 8 * 8 * (32 * 64 + 9 * 32 * 64 + 9 * 64 * 64)
    assert costs.forward_flops(10, 1) == 2 * (stem + first + second + third + 64 * 10)


@pytest.mark.parametrize(
    "objective, attack_steps, clean_prediction, passes",
    [
        ("standard_training", 0, False, 3),
        ("adversarial_training", 10, False, 3 + 20),
        ("trades", 10, True, 6 + 20 + 1),
        ("mart", 10, False, 6 + 20),
    ],
)
def test_passes_of_a_step(objective, attack_steps, clean_prediction, passes):
    flops = costs.training_flops(
        7.0,
        batch_size=4,
        num_steps=5,
        attack_steps=attack_steps,
        objective=objective,
        clean_prediction=clean_prediction,
    )
    assert flops == 7 * 4 * 5 * passes


def test_the_tpus_throughput_gives_the_papers_time():
    # Section 3.1: WRN-28-10, 78 K steps of 128 images, 1 h 30 min on 32 cores.
    flops = costs.training_flops(
        costs.forward_flops(28, 10),
        batch_size=128,
        num_steps=78_000,
        attack_steps=10,
        objective="adversarial_training",
    )
    assert flops / costs.DEVICES["tpu_v3_32"].flops_per_second == pytest.approx(90 * 60, rel=0.02)
