"""Times a SavedModel next to the Keras model that it was exported from, call by call in turn, in one process.

    python scripts/benchmark.py serving --depth=16 --width=2 --batch_sizes=1,64 --num_runs=30

`keras` is the network in a `tf.function`, and `predict_on_batch` how Keras calls it; the others are signatures of the
export. `ratio` is the time of `keras` over that of the call after it: over 1 where that is faster.
"""

import time

import numpy as np
from absl import flags

from benchmarks import networks, timing


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    networks.define_flags(values)
    flags.DEFINE_list("batch_sizes", "1,64", "Images in a call.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times calls of each batch size."""
    import tensorflow as tf

    from robust_keras.saved_models import export

    network = networks.wide_resnet(values.depth, values.width, values.activation)
    path = bench.new_path("saved_model")
    export.export(network, path, card={})
    loaded = tf.saved_model.load(path)
    signatures = loaded.signatures
    spec = tf.TensorSpec((None, *network.input_shape[1:]))
    live = tf.function(lambda image: network(image, training=False), input_signature=[spec], autograph=False)
    for size in map(int, values.batch_sizes):
        pixels = np.random.default_rng(0).integers(0, 256, (size, *network.input_shape[1:])).astype(np.uint8)
        floats, pixels = tf.constant(pixels / np.float32(255)), tf.constant(pixels)
        calls = {
            "keras": lambda image=floats: live(image),
            "predict_on_batch": lambda image=floats: network.predict_on_batch(image),
            "serving_default": lambda image=floats: signatures["serving_default"](image=image)["logits"],
            "serving_uint8": lambda image=pixels: signatures["serving_uint8"](image=image)["logits"],
        }
        seconds = _in_turn(calls, bench.num_warmups, bench.num_runs)
        for name, found in seconds.items():
            row = {"name": f"{name}, batch {size}", "settings": {"batch_size": size}, **timing.spread(found)}
            if name != "keras":
                row["against"] = {"command": "keras", **timing.paired(found, seconds["keras"])}
            bench.add(row)


def _in_turn(calls, num_warmups, num_runs):
    seconds = {name: [] for name in calls}
    for k in range(num_warmups + num_runs):
        for name, call in calls.items():
            start = time.perf_counter()
            np.asarray(call())
            if k >= num_warmups:
                seconds[name].append(time.perf_counter() - start)
    return seconds
