"""Wide residual networks (Zagoruyko & Komodakis 2016) as the paper builds them."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from robust_keras.models.normalization import BatchNorm

_GROUP_WIDTHS = (16, 32, 64)


def wide_resnet(
    *,
    depth: int,
    width: int,
    num_classes: int,
    activation: str = "relu",
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    input_shape: tuple[int, int, int] = (32, 32, 3),
    statistics_group_size: int | None = None,
    padding: int = 0,
    projects_equal_widths: bool = True,
) -> keras.Model:
    """A pre-activation Wide ResNet, WRN-depth-width.

    Three groups of (depth - 4) / 6 blocks, 16, 32 and 64 times `width` channels wide, the second and third at half
    the resolution of the one before. The first block of each group projects its shortcut from the activated input.
    Convolutions have no bias and start from a normal truncated at two standard deviations of 1 / sqrt(fan in);
    the classifier starts at zero. Layers carry the names of the published PyTorch weights. Under Keras' policy
    'mixed_bfloat16', the layers that see pixels (bfloat16 would move these by up to half a byte) and those after the
    last activation stay float32.

    Args:
        depth: number of layers, 6n + 4.
        width: width multiplier.
        num_classes: number of logits.
        activation: one of `activations.NAMES`.
        mean: per channel, subtracted from the pixels.
        std: per channel, by which pixels are divided.
        input_shape: of one image, (height, width, channels).
        statistics_group_size: examples over which `BatchNorm` takes its statistics; None for the replica's batch.
        padding: black pixels around the images, as the paper's networks have 2 around those of MNIST.
        projects_equal_widths: whether the first block of the first group projects its shortcut at width 1 too, where
            both ends have 16 channels. The authors' JAX code does, their PyTorch port does not.

    Returns:
        A functional `keras.Model`: images `[batch, *input_shape]` in [0, 1] to float32 logits `[batch, num_classes]`.

    Raises:
        ValueError: for a depth other than 6n + 4, a width under 1, fewer than 2 classes, or an unknown activation.
    """
    _check(depth, width)
    check(num_classes, mean, std, input_shape)
    images, x = normalized_images(input_shape, mean, std, padding)
    x = convolution(16, 3, 1, "init_conv", dtype="float32")(x)
    normalize = functools.partial(norm_act, activation, statistics_group_size)
    for group, base_width in enumerate(_GROUP_WIDTHS):
        for block in range((depth - 4) // 6):
            stride = 2 if group > 0 and block == 0 else 1
            projects = block == 0 and (projects_equal_widths or x.shape[-1] != base_width * width)
            x = _block(x, base_width * width, stride, normalize, f"layer.{group}.block.{block}", projects=projects)
    return keras.Model(images, classifier(normalize(x, "batchnorm"), num_classes), name=f"wide_resnet_{depth}_{width}")


def _check(depth, width):
    if not isinstance(depth, int) or depth < 10 or depth % 6 != 4:
        raise ValueError(f"Expected a depth of 6n + 4 with n >= 1, such as 10, 16 or 28. Received: {depth!r}")
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"Expected a width multiplier that is an integer >= 1. Received: {width!r}")


def check(num_classes: int, mean: Sequence[float], std: Sequence[float], input_shape: Sequence[int]) -> None:
    """Raises ValueError for fewer than 2 classes, and means or deviations of another number of channels."""
    if num_classes < 2:
        raise ValueError(f"Expected num_classes >= 2. Received: {num_classes!r}")
    if len(mean) != input_shape[-1] or len(std) != input_shape[-1]:
        raise ValueError(f"Expected one mean and std for each of {input_shape[-1]} channels. Received: {mean}, {std}")


def normalized_images(
    input_shape: Sequence[int], mean: Sequence[float], std: Sequence[float], padding: int = 0
) -> tuple[Any, Any]:
    """A network's input, images in [0, 1], and the same with `mean` taken off and divided by `std`, in float32.

    With `padding`, so many black pixels are put around the images before that.
    """
    images = x = keras.Input(input_shape, name="image")
    if padding:
        x = keras.layers.ZeroPadding2D(padding, dtype="float32", name="padding")(x)
    # Keras' Normalization takes the variance.
    normalize = keras.layers.Normalization(
        mean=mean, variance=[s**2 for s in std], dtype="float32", name="normalization"
    )
    return images, normalize(x)


def norm_act(activation: str, statistics_group_size: int | None, x: Any, name: str) -> Any:
    """A `BatchNorm` with its activation."""
    return BatchNorm(statistics_group_size, activation=activation, name=name)(x)


def classifier(x: Any, num_classes: int) -> Any:
    """Logits of the means over pixels, zero at first, in float32."""
    x = keras.layers.GlobalAveragePooling2D(dtype="float32", name="pool")(x)
    return keras.layers.Dense(num_classes, kernel_initializer="zeros", dtype="float32", name="logits")(x)


def _block(x, channels, stride, normalize, name, *, projects):
    """Two convolutions, each after its normalisation, beside a shortcut, a projection where the block `projects`."""
    activated = normalize(x, f"{name}.batchnorm_0")
    shortcut = convolution(channels, 1, stride, f"{name}.shortcut")(activated) if projects else x
    x = convolution(channels, 3, stride, f"{name}.conv_0")(activated)
    x = normalize(x, f"{name}.batchnorm_1")
    x = convolution(channels, 3, 1, f"{name}.conv_1")(x)
    return keras.layers.Add(name=f"{name}.add")([x, shortcut])


def convolution(channels: int, kernel_size: int, stride: int, name: str, dtype: str | None = None) -> Any:
    """A convolution without bias, padded as TensorFlow pads 'SAME', which starts from a `TruncatedNormal`."""
    return keras.layers.Conv2D(
        channels,
        kernel_size,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer=TruncatedNormal(),
        dtype=dtype,
        name=name,
    )


@keras.saving.register_keras_serializable(package="robust_keras")
class TruncatedNormal(keras.initializers.VarianceScaling):
    """Normal of standard deviation 1 / sqrt(fan in), cut at two standard deviations.

    Keras' own fan-in scaling widens the normal so that the deviation holds after the cut; Haiku and the paper do not.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._given_seed = seed
        super().__init__(scale=1.0, mode="fan_in", distribution="truncated_normal", seed=seed)

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> tf.Tensor:
        """Draws an array."""
        fan_in = math.prod(shape[:-1])
        return keras.random.truncated_normal(shape, stddev=1.0 / math.sqrt(fan_in), dtype=dtype, seed=self.seed)

    def get_config(self) -> dict:
        """The arguments, as Keras saves them."""
        return {"seed": self._given_seed}
