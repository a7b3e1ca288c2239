"""What the device at hand gets done: operations per second in the passes of attacks through a network."""

import time

import tensorflow as tf

from robust_keras import losses
from robust_keras.attacks import stepwise
from robust_keras.engines import replicas
from robust_keras.models import wide_resnet
from robust_keras.study import costs, planning

EVALUATION_BATCH = 128
_SHORTEST_PASS = 0.02  # Seconds; shorter ones do not show what a device can do.


def device_throughput(batch_size: int = 64) -> float:
    """Operations per second of this device in attacks.

    Measured with a WRN-10-1, and where that is too little work for the device to show what it can, with a WRN-28-10.
    """
    for depth, width in ((10, 1), (28, 10)):
        seconds, flops = time_of_a_pass(depth, width, batch_size=batch_size)
        if seconds > _SHORTEST_PASS:
            break
    return flops / seconds


def attack_throughput(plan: planning.Plan, job: planning.Job) -> float:
    """Operations per second of this device in attacks on the network of a job."""
    size = plan.network(job.depth, job.width)
    seconds, flops = time_of_a_pass(*size, batch_size=EVALUATION_BATCH, num_classes=job.num_classes)
    return flops / seconds


def time_of_a_pass(depth: int, width: int, *, batch_size: int, num_classes: int = 10) -> tuple[float, float]:
    """Seconds and operations of a pass with the input's gradient, as in attacks, on all replicas of the strategy."""
    network = wide_resnet.wide_resnet(
        depth=depth,
        width=width,
        num_classes=num_classes,
        activation="silu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        input_shape=(32, 32, 3),
    )
    labels = tf.zeros(batch_size, tf.int32)

    @replicas.over_replicas
    def gradient(x: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        return stepwise.value_and_gradient(network, x, lambda logits: losses.cross_entropy(logits, labels))[2]

    x = tf.zeros((batch_size, 32, 32, 3))
    gradient(x, labels).numpy()
    passes, at_once, started = 0, 1, time.perf_counter()
    while time.perf_counter() - started < 3.0:
        for _ in range(at_once):
            following = gradient(x, labels)
        following.numpy()  # Waits for all of them.
        passes, at_once = passes + at_once, 10
    flops = costs.attack_flops(
        costs.forward_flops(depth, width, num_classes=num_classes), num_images=batch_size, num_passes=1
    )
    return (time.perf_counter() - started) / passes, flops
