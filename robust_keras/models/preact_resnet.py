"""Pre-activation residual networks (He et al. 2016b, https://arxiv.org/abs/1603.05027) for small images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import keras

from robust_keras.models.wide_resnet import check, classifier, convolution, norm_act, normalized_images

_GROUP_WIDTHS = (64, 128, 256, 512)


class _Kind(NamedTuple):
    """The blocks of a depth.

    Attributes:
        block: makes one.
        num_blocks: in each group.
        expansion: channels that a block returns for each of its 3 x 3 convolution.
    """

    block: Callable
    num_blocks: tuple[int, int, int, int]
    expansion: int


def preact_resnet(
    *,
    depth: int,
    num_classes: int,
    activation: str = "relu",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    input_shape: tuple[int, int, int] = (32, 32, 3),
    statistics_group_size: int | None = None,
    padding: int = 0,
) -> keras.Model:
    """PreActResNet-18, -34 or -50 with the stem for small images, one 3 x 3 convolution of stride 1.

    Four groups of blocks, 64, 128, 256 and 512 channels wide, each after the first at half the resolution of the one
    before. With 18 and 34 layers, of two 3 x 3 convolutions a block, it is the network of the paper's released PyTorch
    code, layer by layer and by its names: where a block changes the shape, its shortcut is a 3 x 3 convolution of the
    block's own input. That code stops at 34 layers. Those with 50 have three convolutions a block, 1 x 1, 3 x 3 (which
    has the stride) and 1 x 1 to four times the channels, and as He et al. have it a shortcut that changes the shape
    is a 1 x 1 convolution of the activated input. A `BatchNorm` and an activation stand before the pooling.

    Convolutions, their first weights, the classifier and float32 under 'mixed_bfloat16' are those of `wide_resnet`.

    Args:
        depth: 18, 34 or 50.
        num_classes: number of logits.
        activation: one of `activations.NAMES`.
        mean: per channel, subtracted from the pixels.
        std: per channel, by which pixels are divided.
        input_shape: of one image, (height, width, channels).
        statistics_group_size: examples over which `BatchNorm` takes its statistics; None for the replica's batch.
        padding: black pixels around the images.

    Returns:
        A functional `keras.Model`: images `[batch, *input_shape]` in [0, 1] to float32 logits `[batch, num_classes]`.

    Raises:
        ValueError: for another depth, fewer than 2 classes, or an unknown activation.
    """
    if not isinstance(depth, int) or depth not in _KINDS:
        raise ValueError(f"Expected a depth out of {', '.join(map(str, _KINDS))}. Received: {depth!r}")
    check(num_classes, mean, std, input_shape)
    kind, normalize = _KINDS[depth], functools.partial(norm_act, activation, statistics_group_size)
    images, x = normalized_images(input_shape, mean, std, padding)
    x = convolution(_GROUP_WIDTHS[0], 3, 1, "conv_2d", dtype="float32")(x)
    for group, (width, num_blocks) in enumerate(zip(_GROUP_WIDTHS, kind.num_blocks)):
        for block in range(num_blocks):
            stride = 2 if group > 0 and block == 0 else 1
            changes = stride != 1 or x.shape[-1] != width * kind.expansion
            x = kind.block(x, width, stride, normalize, f"layer_{group}.{block}", projects=changes)
    return keras.Model(images, classifier(normalize(x, "batchnorm"), num_classes), name=f"preact_resnet_{depth}")


def _basic(x: Any, channels: int, stride: int, normalize: Callable, name: str, *, projects: bool) -> Any:
    """Two convolutions, each after its normalisation, beside a shortcut that is not activated."""
    shortcut = convolution(channels, 3, stride, f"{name}.shortcut")(x) if projects else x
    x = convolution(channels, 3, stride, f"{name}.conv_2d_1")(normalize(x, f"{name}.batchnorm_0"))
    x = convolution(channels, 3, 1, f"{name}.conv_2d_2")(normalize(x, f"{name}.batchnorm_1"))
    return keras.layers.Add(name=f"{name}.add")([x, shortcut])


def _bottleneck(x: Any, channels: int, stride: int, normalize: Callable, name: str, *, projects: bool) -> Any:
    """Three convolutions, each after its normalisation, beside a shortcut, activated where the block `projects`."""
    activated = normalize(x, f"{name}.batchnorm_0")
    shortcut = convolution(4 * channels, 1, stride, f"{name}.shortcut")(activated) if projects else x
    x = convolution(channels, 1, 1, f"{name}.conv_2d_1")(activated)
    x = convolution(channels, 3, stride, f"{name}.conv_2d_2")(normalize(x, f"{name}.batchnorm_1"))
    x = convolution(4 * channels, 1, 1, f"{name}.conv_2d_3")(normalize(x, f"{name}.batchnorm_2"))
    return keras.layers.Add(name=f"{name}.add")([x, shortcut])


_KINDS = {
    18: _Kind(_basic, (2, 2, 2, 2), 1),
    34: _Kind(_basic, (3, 4, 6, 3), 1),
    50: _Kind(_bottleneck, (3, 4, 6, 3), 4),
}
