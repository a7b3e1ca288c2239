"""What the machine is, and what it reaches at most: in a large convolution, in copies of memory."""

import concurrent.futures
import functools
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

import robust_keras

# As Linux spells them: what makes float32 and bfloat16 fast.
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
_REPEATS = 9


def description() -> dict[str, Any]:
    """The processor, what it can do, and the versions of what runs on it."""
    processor, instructions = _processor()
    return {
        "processor": processor,
        "instructions": [name for name in _INSTRUCTIONS if name in instructions],
        "cores": len(os.sched_getaffinity(0)),
        "threads": tf.config.threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0)),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "as TensorFlow has it"),
        "versions": {
            "python": platform.python_version(),
            "tensorflow": tf.__version__,
            "keras": keras.__version__,
            "numpy": np.__version__,
            "robust_keras": robust_keras.__version__,
        },
    }


def _processor() -> tuple[str, set[str]]:
    name, instructions = platform.processor() or platform.machine(), set()
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == "model name":
                    name = value.strip()
                elif key.strip() == "flags":
                    instructions = set(value.split())
    except OSError:
        pass
    return name, instructions


@functools.cache
def convolution_speed(dtype: str = "float32") -> float:
    """Operations a second in a 3 x 3 convolution of 128 channels, [32, 32, 32, 128], at best."""
    x = tf.cast(tf.random.stateless_uniform((32, 32, 32, 128), (0, 0)), dtype)
    kernel = tf.cast(tf.random.stateless_normal((3, 3, 128, 128), (0, 1)), dtype)
    convolve = tf.function(lambda x: tf.nn.conv2d(x, kernel, 1, "SAME")[0, 0, 0, 0], autograph=False)
    return 2 * 32 * 32**2 * 9 * 128**2 / _fastest(lambda: convolve(x).numpy())


@functools.cache
def copy_speed() -> float:
    """Bytes a second that copies of memory, one on each core, read and write, at best."""
    threads = len(os.sched_getaffinity(0))
    sources = [np.ones(2**25, np.float32) for _ in range(threads)]
    targets = [np.zeros_like(each) for each in sources]
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        seconds = _fastest(lambda: list(pool.map(np.copyto, targets, sources)))
    return 2 * sum(each.nbytes for each in sources) / seconds


def _fastest(function: Callable) -> float:
    function()
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)
