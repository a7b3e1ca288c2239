"""A `tf.distribute` strategy from a name."""

import tensorflow as tf

NAMES = ("auto", "one", "mirrored", "tpu")


def strategy(name="auto", *, tpu=None):
    """The strategy that a run executes under.

    Args:
        name: 'one' device; 'mirrored' over all GPUs of this machine, or over its logical CPUs where it has none; 'tpu';
            or 'auto': a TPU if there is one, else all GPUs, else one device.
        tpu: address of the TPU; None for the one that the environment names or that is attached.

    Returns:
        A `tf.distribute.Strategy`.

    Raises:
        ValueError: for an unknown name, or a TPU that is not there.
    """
    if name not in NAMES:
        raise ValueError(f"Expected a strategy out of {', '.join(NAMES)}. Received: {name!r}")
    if name == "auto":
        if tpu is not None or tf.config.list_physical_devices("TPU"):
            name = "tpu"
        else:
            name = "mirrored" if len(tf.config.list_logical_devices("GPU")) > 1 else "one"
    if name == "tpu":
        return _tpu_strategy(tpu)
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    return tf.distribute.get_strategy()


def _tpu_strategy(tpu):
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu or "local")
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"Expected a TPU that answers. Received: tpu={tpu!r} ({reason})") from error
    return tf.distribute.TPUStrategy(resolver)
