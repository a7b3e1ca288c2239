"""What a run costs: floating-point operations of networks, training and evaluation, and hours on a device.

    flops = costs.forward_flops(28, 10)
    total = costs.training_flops(flops, batch_size=128, num_steps=78_000, attack_steps=10, objective="trades")
    hours = total / costs.DEVICES["tpu_v3_32"].flops_per_second / 3600

A multiplication and an addition are two operations. Only convolutions and the classifier count; a backward pass costs
as much as a forward pass for the input's gradient, and as much again for the weights'.
"""

from typing import NamedTuple


class Device(NamedTuple):
    """What a device gets done.

    Attributes:
        title: for people.
        flops_per_second: sustained, not peak.
        source: where that is from.
    """

    title: str
    flops_per_second: float
    source: str


DEVICES = {
    "cpu": Device(
        "2 CPU cores",
        5e10,
        "of the order of what training a WRN-10-1 gets on two AVX2 cores; --budget measures the device at hand",
    ),
    "h100": Device("1 GPU of the H100 class", 3e14, "assumed: 30 % of 989 TFLOP/s, the peak in bfloat16; not measured"),
    "tpu_v5e": Device(
        "1 TPU v5e chip",
        4.5e13,
        "assumed: 23 % of 197 TFLOP/s, the peak in bfloat16, as the paper's runs get of a TPU v3's; not measured",
    ),
    "tpu_v3_32": Device(
        "32 TPU v3 cores",
        4.5e14,
        "from the paper's 1 h 30 min for 78 K steps of WRN-28-10 at batch 128 (section 3.1); its 2 h at batch 1,024 "
        "would be 6.7e14",
    ),
}
# Passes with the weights' gradient, and whether the attack needs a prediction on the clean images first.
OUTER_PASSES = {"standard_training": 1, "adversarial_training": 1, "trades": 2, "mart": 2}


def forward_flops(depth: int, width: int, *, num_classes: int = 10, size: int = 32, channels: int = 3) -> int:
    """Operations of one image's way through `wide_resnet`: depth 6n + 4, `width` times the channels."""
    return 2 * sum(
        side * side * kernel * kernel * inputs * outputs
        for side, kernel, inputs, outputs in _convolutions(depth, width, size, channels)
    ) + 2 * (64 * width * num_classes)


def num_parameters(depth: int, width: int, *, num_classes: int = 10, channels: int = 3) -> int:
    """Trainable parameters of `wide_resnet`."""
    convolutions = _convolutions(depth, width, 32, channels)
    total = sum(kernel * kernel * inputs * outputs for _, kernel, inputs, outputs in convolutions)
    # Scale and offset before every convolution of a block, which a shortcut shares, and before the classifier.
    normalised = [inputs for _, kernel, inputs, _ in convolutions[1:] if kernel == 3] + [64 * width]
    return total + 2 * sum(normalised) + 64 * width * num_classes + num_classes


def training_flops(
    forward: float,
    *,
    batch_size: int,
    num_steps: int,
    attack_steps: int,
    objective: str,
    clean_prediction: bool = False,
) -> float:
    """Operations of a training run without its validations.

    Args:
        forward: operations of one image's forward pass.
        batch_size: images per step.
        num_steps: optimiser steps.
        attack_steps: steps of the inner attack, 0 without one.
        objective: the name of a function of `objectives`.
        clean_prediction: whether the attack starts from a prediction on the clean images.
    """
    per_image = 3 * OUTER_PASSES[objective] + 2 * attack_steps + bool(clean_prediction)
    return forward * per_image * batch_size * num_steps


def attack_flops(forward: float, *, num_images: float, num_passes: float) -> float:
    """Operations of `num_passes` passes with the input's gradient on every image. An upper bound: fallen ones stop."""
    return 2 * forward * num_images * num_passes


def _convolutions(depth: int, width: int, size: int, channels: int) -> list[tuple[int, int, int, int]]:
    """(side of the output, kernel, input channels, output channels) of each convolution."""
    rows = [(size, 3, channels, 16)]
    inputs, side = 16, size
    for group, base in enumerate((16, 32, 64)):
        outputs = base * width
        for block in range((depth - 4) // 6):
            if block == 0:
                side = -(-side // (2 if group else 1))
                rows.append((side, 1, inputs, outputs))
            rows += [(side, 3, inputs, outputs), (side, 3, outputs, outputs)]
            inputs = outputs
    return rows
