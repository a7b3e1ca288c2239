"""Weights for networks of the authors' code, which the recorder and the package are both given."""

import numpy as np

# Network, depth, width, activation, data set.
TORCH = {
    "wrn_10_1": ("WideResNet", 10, 1, "silu", "cifar10"),
    "wrn_16_2": ("WideResNet", 16, 2, "relu", "cifar100"),
    "wrn_10_1_mnist": ("WideResNet", 10, 1, "silu", "mnist"),
    "preact_resnet_18": ("PreActResNet", 18, 0, "silu", "cifar10"),
}
HAIKU = {
    "wrn_10_1": ("WideResNet", 10, 1, "silu", "cifar10"),
    "wrn_16_2": ("WideResNet", 16, 2, "relu", "cifar100"),
    "wrn_10_1_mnist": ("WideResNet", 10, 1, "relu", "mnist"),
}
# Of which the small files are; halves and bfloat16 hold them exactly.
NUMBERS = [[1.0, -2.0, 0.5], [4.0, 0.25, -8.0]]


def images(dataset):
    """Eight images, float32 in [0, 1], NHWC."""
    shape = (8, 28, 28, 1) if dataset == "mnist" else (8, 32, 32, 3)
    return np.random.RandomState(1).random_sample(shape).astype(np.float32)


def weights(shapes):
    """An array for each name, of a pair of shape and kind: 'kernel', 'scale', 'count' or another."""
    random = np.random.RandomState(0)  # Its numbers are frozen.
    made = {}
    for name, (shape, kind) in sorted(shapes.items()):
        if kind == "count":
            made[name] = np.full(shape, 777, np.int64)
        elif kind == "scale":  # Of a variance too.
            made[name] = (random.random_sample(shape) + 0.5).astype(np.float32)
        elif kind == "kernel":
            fan_in = np.prod(shape) / max(shape[0] if len(shape) == 4 else 1, 1)
            made[name] = (random.standard_normal(shape) * 2 / np.sqrt(fan_in)).astype(np.float32)
        else:
            made[name] = (random.standard_normal(shape) * 0.3).astype(np.float32)
    return made
