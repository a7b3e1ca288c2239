"""Normalisation and activation as one operation, with a gradient of its own.

    y = affine(x, scale, offset, activation="silu")
    y, mean, variance = standardized(x, scale, offset, group_size=4, epsilon=1e-5, activation="silu")

Between two convolutions, a CPU spends its time on memory: what counts is how often a tensor is read and written.
`compiled=True` takes statistics and their gradient by TensorFlow's fused kernel, and everything element by element in
one pass, which XLA compiles. Only the input, or the normalised input, is kept for the gradient. Where XLA compiles the
program anyway (TPUs, `jit_compile=True`, the engine on JAX) and on GPUs, the same formulas are plain operations.

Values are those of float32 arithmetic, rounded once to the input's type.
"""

from collections.abc import Callable

import tensorflow as tf

from robust_keras import compilation

ACTIVATIONS: dict[str, Callable] = {
    "relu": tf.nn.relu,
    "silu": tf.nn.silu,
    "leaky_relu": lambda x: tf.nn.leaky_relu(x, alpha=0.01),
    "elu": tf.nn.elu,
    "softplus": tf.nn.softplus,
    "gelu": lambda x: tf.nn.gelu(x, approximate=True),
}
_SAME = {"swish": "silu"}
# Groups that are normalised one after the other; each is some operations of the program.
_MANY = 64
# Numbers in a row that XLA's loops take one by one.
_SHORT_ROW = 32
_KERNEL_TYPES = (tf.float32, tf.bfloat16)


def activation_named(name: str) -> str:
    """The name by which an activation is saved.

    Raises:
        ValueError: for any but those of `ACTIVATIONS` and 'swish'.
    """
    name = _SAME.get(name, name)
    if name not in ACTIVATIONS:
        raise ValueError(f"Expected an activation out of {', '.join(ACTIVATIONS)}. Received: {name!r}")
    return name


def standardized(
    x: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    *,
    group_size: int | None,
    epsilon: float,
    activation: str | None = None,
    compiled: bool = False,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """`activation((x - mean) / sqrt(variance + epsilon) * scale + offset)`, with each group's statistics.

    Args:
        x: `[batch, ..., channels]`, a whole number of groups.
        scale: float32 `[channels]`, like `offset`.
        group_size: how many consecutive examples share statistics; None for all of them.
        epsilon: added to the variance.
        activation: a name of `ACTIVATIONS`; None for none.
        compiled: whether to take the CPU's fast path, where there is one.

    Returns:
        `(y, mean, variance)`: like `x`; each group's mean and biased variance, float32 `[groups, ..., channels]`,
        through which no gradient flows where it is compiled.
    """
    if compiled and x.dtype in _KERNEL_TYPES and (num_groups := _num_groups(x, group_size)) and compilation.is_on_cpu():
        return _standardized_by_kernels(x, scale, offset, num_groups, epsilon, activation)
    groups = tf.reshape(x, (-1, group_size or x.shape[0] or tf.shape(x)[0], *x.shape[1:]))
    axes = list(range(1, groups.shape.rank - 1))
    mean, variance = tf.nn.moments(tf.cast(groups, tf.float32), axes, keepdims=True)
    factor = scale * tf.math.rsqrt(variance + epsilon)
    y = groups * tf.cast(factor, x.dtype) + tf.cast(offset - mean * factor, x.dtype)
    return _activated(tf.reshape(y, tf.shape(x)), activation), mean, variance


def affine(
    x: tf.Tensor, factor: tf.Tensor, offset: tf.Tensor, *, activation: str | None = None, compiled: bool = False
) -> tf.Tensor:
    """`activation(x * factor + offset)`, as normalisation with given statistics is.

    Args:
        x: `[batch, ..., channels]`.
        factor: float32 `[channels]`, like `offset`.
        activation: see `standardized`, like `compiled`.
    """
    if compiled and x.dtype in _KERNEL_TYPES and compilation.is_on_cpu():
        times = channels_in_row(x)
        if times > 1:
            factor, offset = (tf.tile(each, [times]) for each in (factor, offset))
        return _like(x, _affine_by_kernels(in_rows(x), factor, offset, activation))
    return _activated(x * tf.cast(factor, x.dtype) + tf.cast(offset, x.dtype), activation)


def activated(x: tf.Tensor, activation: str, *, compiled: bool = False) -> tf.Tensor:
    """The activation of each element; see `standardized`."""
    if compiled and x.dtype in _KERNEL_TYPES and compilation.is_on_cpu():
        return _like(x, _activated_by_kernels(in_rows(x), activation))
    return _activated(x, activation)


def channels_in_row(x: tf.Tensor) -> int:
    """How often a row of `in_rows` has each channel: once unless there are few, as XLA's loops on CPU go over rows."""
    known = x.shape.rank is not None and x.shape.rank > 2 and None not in x.shape[-2:]
    return x.shape[-2] if known and x.shape[-1] < _SHORT_ROW else 1


def in_rows(x: tf.Tensor) -> tf.Tensor:
    """The same numbers in rows that have each channel `channels_in_row(x)` times: as a matrix, or as they are."""
    times = channels_in_row(x)
    return x if times == 1 else tf.reshape(x, (-1, times * x.shape[-1]))


def _like(x, rows):
    return tf.ensure_shape(tf.reshape(rows, tf.shape(x)), x.shape)


def _activated(x, activation):
    return x if activation is None else ACTIVATIONS[activation](x)


def _num_groups(x, group_size):
    """How many groups there are; 0 where that is not known, or too many for one after the other."""
    if group_size is None:
        return 1
    num_groups = (x.shape[0] or 0) // group_size
    return num_groups if num_groups <= _MANY else 0


def _standardized_by_kernels(x, scale, offset, num_groups, epsilon, activation):
    flat = x if x.shape.rank == 4 else tf.reshape(x, (tf.shape(x)[0], 1, -1, x.shape[-1]))
    mean, variance, z = _normalized(flat, scale, offset, num_groups, epsilon)
    y = z if activation is None else _activated_by_kernels(in_rows(z), activation)
    return _like(x, y), mean, variance


def _normalized(x, scale, offset, num_groups, epsilon):
    """`(mean, variance, z)` of NHWC images."""
    settings = {"epsilon": epsilon, "is_training": True}

    @tf.custom_gradient
    def normalized(x, scale, offset):
        parts = tf.split(x, num_groups)
        ran = [
            tf.raw_ops.FusedBatchNormV3(x=part, scale=scale, offset=offset, mean=[], variance=[], **settings)
            for part in parts
        ]

        def gradient(_, __, upstream):
            found = [
                tf.raw_ops.FusedBatchNormGradV3(
                    y_backprop=dz,
                    x=part,
                    scale=scale,
                    reserve_space_1=each.reserve_space_1,
                    reserve_space_2=each.reserve_space_2,
                    reserve_space_3=each.reserve_space_3,
                    **settings,
                )
                for part, dz, each in zip(parts, tf.split(upstream, num_groups), ran)
            ]
            scales, offsets = (tf.add_n([each[k] for each in found]) for k in (1, 2))
            return _joined([each[0] for each in found]), scales, offsets

        # The kernel's variance is the unbiased one.
        count = tf.cast(tf.size(parts[0]) // x.shape[-1], tf.float32)
        mean = tf.stack([each.batch_mean for each in ran])
        variance = tf.stack([each.batch_variance for each in ran]) * ((count - 1.0) / count)
        return (mean, variance, _joined([each.y for each in ran])), gradient

    return normalized(x, scale, offset)


def _joined(parts):
    return parts[0] if len(parts) == 1 else tf.concat(parts, axis=0)


def _affine_by_kernels(x, factor, offset, activation):
    @tf.custom_gradient
    def run(x, factor, offset):
        def gradient(upstream):
            dz = tf.cast(_affine_gradient(x, factor, offset, upstream, False, activation), tf.float32)
            axes = list(range(x.shape.rank - 1))
            by_parameters = tf.reduce_sum(dz * tf.cast(x, tf.float32), axes), tf.reduce_sum(dz, axes)
            # Where only this one is asked for, the program drops the others.
            return _affine_gradient(x, factor, offset, upstream, True, activation), *by_parameters

        return _affine(x, factor, offset, activation), gradient

    return run(x, factor, offset)


def _activated_by_kernels(x, activation):
    @tf.custom_gradient
    def run(x):
        return _activation(x, activation), lambda upstream: _activation_gradient(x, upstream, activation)

    return run(x)


@compilation.fused
def _affine(x, factor, offset, activation):
    return rounded(_activated(as_float32(x) * factor + offset, activation), x.dtype)


@compilation.fused
def _affine_gradient(x, factor, offset, upstream, by_x, activation):
    dz = _slope(as_float32(x) * factor + offset, as_float32(upstream), activation)
    return rounded(dz * factor if by_x else dz, x.dtype)


@compilation.fused
def _activation(x, activation):
    return rounded(_activated(as_float32(x), activation), x.dtype)


@compilation.fused
def _activation_gradient(x, upstream, activation):
    return rounded(_slope(as_float32(x), as_float32(upstream), activation), x.dtype)


def _slope(z, upstream, activation):
    """`upstream` times the activation's derivative at `z`."""
    if activation is None:
        return upstream
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(z)
        y = _activated(z, activation)
    return tape.gradient(y, z, upstream)


# XLA on CPU converts bfloat16 one by one, but works on integers many at a time: a bfloat16 is the upper half of a
# float32.
def as_float32(x: tf.Tensor) -> tf.Tensor:
    """A tensor of floats in float32."""
    if x.dtype != tf.bfloat16:
        return tf.cast(x, tf.float32)
    bits = tf.cast(tf.bitcast(x, tf.uint16), tf.uint32)
    return tf.bitcast(tf.bitwise.left_shift(bits, tf.constant(16, tf.uint32)), tf.float32)


def rounded(x: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """float32 to the nearest of `dtype`, to even where two are."""
    if dtype != tf.bfloat16:
        return tf.cast(x, dtype)
    bits, shift = tf.bitcast(x, tf.uint32), tf.constant(16, tf.uint32)
    is_odd = tf.bitwise.bitwise_and(tf.bitwise.right_shift(bits, shift), tf.constant(1, tf.uint32))
    bits += is_odd + tf.constant(0x7FFF, tf.uint32)
    bits = tf.where(tf.math.is_nan(x), tf.constant(0x7FC00000, tf.uint32), bits)
    return tf.bitcast(tf.cast(tf.bitwise.right_shift(bits, shift), tf.uint16), tf.bfloat16)
