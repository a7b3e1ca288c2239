"""Where the time of a call goes, by TensorFlow's profiler.

The profiler says when each operation ran, on which of the threads that start operations. A moment counts for the
operations that run in it, in equal parts, so that shares add up to the time of the call; what is left is time in which
none ran. An operation belongs to

- convolutions: forward, by the input or by the filter, with what oneDNN fuses into them;
- normalisation and activation: any other inside one of those layers, or in its gradient, compiled by XLA or not, and
  functions of activations wherever they are;
- other XLA clusters;
- other operations.
"""

import collections
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

IDLE = "no operation"
_LONGEST = 16  # Types of operations that are listed.


def category(name: str, kind: str) -> str:
    """What an operation counts as, by its name, which has its layer's, and its type."""
    if "Conv2D" in kind or "Conv3D" in kind:
        return "convolutions"
    in_layer = re.search(r"batchnorm|batch_norm|[./](relu|silu|gelu|elu|leaky_relu|softplus)", name)
    if in_layer or re.search(r"Sigmoid|Swish|Relu|Erf|Elu|Softplus|BatchNorm", kind):
        return "normalisation and activation"
    return "other XLA clusters" if re.search(r"Xla|cluster", f"{name} {kind}") else "other operations"


def show(run: Callable[[], Any]) -> dict[str, Any]:
    """Traces a call, prints its shares, and returns them: `seconds`, `shares`, and `types`, the longest ones."""
    seconds, segments = traced(run)
    shares: dict[str, float] = collections.defaultdict(float)
    types: dict[str, float] = collections.defaultdict(float)
    for length, running in overlaps(segments):
        for name, kind in running:
            shares[category(name, kind)] += length / len(running) / seconds
            types[f"{category(name, kind)}: {kind}"] += length / len(running) / seconds
    shares[IDLE] = max(0.0, 1.0 - sum(shares.values()))
    print(f"\nof {seconds:.3g} s, traced:")
    longest = sorted(types.items(), key=lambda item: -item[1])[:_LONGEST]
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{share:8.1%}  {name}")
        for kind, each in longest:
            if kind.startswith(f"{name}: "):
                print(f"{each:16.1%}  {kind.partition(': ')[2]}")
    return {"seconds": seconds, "shares": dict(shares), "types": dict(longest)}


def traced(run: Callable[[], Any]) -> tuple[float, list[list[tuple[float, float, tuple[str, str]]]]]:
    """Seconds of a call, and for each thread when which operation, (name, type), ran: (start, end, operation)."""
    # Its modules have this name in all versions of TensorFlow that are supported.
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    options = tf.profiler.experimental.ProfilerOptions(host_tracer_level=2, python_tracer_level=0)
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder, options=options)
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        tf.profiler.experimental.stop()
        (path,) = tf.io.gfile.glob(os.path.join(folder, "plugins", "profile", "*", "*.xplane.pb"))
        space = xplane_pb2.XSpace()
        with open(path, "rb") as file:
            space.ParseFromString(file.read())
    return seconds, [list(_innermost(plane, line)) for plane in space.planes for line in plane.lines]


def _innermost(plane: Any, line: Any) -> Iterator[tuple[float, float, tuple[str, str]]]:
    """Which operation of a thread runs when: the one inside, where one calls another."""
    # XLA's own threads say what is inside a cluster, without a type.
    called = re.compile(r"([^\s:]+):(\w+)")
    events = []
    for event in line.events:
        if match := called.fullmatch(plane.event_metadata[event.metadata_id].name):
            start = line.timestamp_ns / 1e9 + event.offset_ps / 1e12
            events.append((start, start + event.duration_ps / 1e12, match.groups()))
    events.sort(key=lambda event: (event[0], -event[1]))
    around: list[list] = []
    for start, end, operation in [*events, (float("inf"), float("inf"), None)]:
        while around and around[-1][1] <= start:
            begin, until, inner = around.pop()
            yield begin, until, inner
            if around:
                around[-1][0] = until
        if around:
            yield around[-1][0], start, around[-1][2]
        around.append([start, end, operation])


def overlaps(threads: list[list[tuple[float, float, Any]]]) -> Iterator[tuple[float, list]]:
    """Lengths of time in which the same operations run, and these."""
    changes = [
        (at, is_start, k, operation)
        for k, segments in enumerate(threads)
        for start, end, operation in segments
        if end > start
        for at, is_start in ((start, True), (end, False))
    ]
    running: dict[int, Any] = {}
    last = 0.0
    for at, is_start, k, operation in sorted(changes, key=lambda change: change[:3]):
        if running and at > last:
            yield at - last, list(running.values())
        last = at
        if is_start:
            running[k] = operation
        else:
            running.pop(k, None)
