"""Times two worker processes that train together against two that train apart, each on a core of its own.

    python scripts/benchmark.py workers --workdir=DIR --gin_file=gin/quickstart.gin

Pairs of runs, one after the other on an idle Linux machine. A worker of the pair has half of the batch; what they add
up to, in examples per second as metrics.csv has it, is the throughput. The ratio says what meeting at each step costs;
where the machine's speed changes between runs, the ratio of the best ones says it best. A core of a virtual machine
that sleeps for a moment, as one that waits does, may be lent to others and come back slower: --keep_awake gives each
core, in all runs, a process that takes what nothing else wants.
"""

import contextlib
import csv
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys

from absl import flags

from benchmarks import timing


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Runs the pairs and prints the ratio of each."""
    train_steps = values.train_steps
    workdir = pathlib.Path(values.workdir)
    workdir.mkdir(parents=True)
    bindings = [
        *values.gin_param,
        f"TRAIN_STEPS = {train_steps}",
        f"train.log_every = {train_steps // 2}",
        f"train.checkpoint_every = {train_steps}",
        f"train.validate_every = {train_steps}",
        "train.progress = False",
    ]
    command = [sys.executable, pathlib.Path(__file__).parents[1] / "train.py"]
    command += [f"--gin_file={file}" for file in values.gin_file] + [f"--gin_param={binding}" for binding in bindings]
    command += [f"--data_dir={values.data_dir}"] if values.data_dir else []
    rates_apart, rates_together = [], []
    with contextlib.ExitStack() as awake:
        for core in range(2) if values.keep_awake else ():
            awake.callback(_idle_process(core).kill)
        for pair in range(values.pairs):
            folders = [workdir / f"apart-{pair}-{core}" for core in range(2)]
            runs = [_start(command, core, folder, values.batch_size // 2) for core, folder in enumerate(folders)]
            apart, folder, cluster = _rate(runs, folders), workdir / f"together-{pair}", _addresses()
            together = _rate([_start(command, core, folder, values.batch_size, cluster) for core in range(2)], [folder])
            print(f"apart {apart:.1f} examples/s, together {together:.1f}, ratio {together / apart:.3f}")
            bench.add({"name": f"pair {pair}", "apart": apart, "together": together, "ratio": together / apart})
            rates_apart.append(apart)
            rates_together.append(together)
    ratios = [together / apart for together, apart in zip(rates_together, rates_apart)]
    best = max(rates_together) / max(rates_apart)
    print(f"median ratio {statistics.median(ratios):.3f}, of the best of each {best:.3f}")
    bench.notes |= {"ratio": statistics.median(ratios), "ratio_of_the_best": best}


def _start(command, core, workdir, batch_size, cluster=()):
    """A training on a core: alone, or as one of the workers at the addresses `cluster`."""
    environment = {**os.environ, "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
    environment.pop("TF_CONFIG", None)
    if cluster:
        task = {"type": "worker", "index": core}
        environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": cluster}, "task": task})
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", f"--gin_param=BATCH_SIZE = {batch_size}"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )


def _rate(processes, workdirs):
    """Examples per second of all folders, once the processes have ended."""
    for process in processes:
        _, errors = process.communicate()
        if process.returncode:
            raise ValueError(f"Expected a run that ends well. Received: {errors.strip().splitlines()[-1]}")
    rate = 0.0
    for workdir in workdirs:
        with open(workdir / "metrics.csv") as file:
            rate += float(list(csv.DictReader(file))[-1]["examples_per_second"])
    return rate


def _idle_process(core):
    """A process that never ends and runs on a core where nothing else wants to."""

    def settle():
        os.sched_setaffinity(0, {core})
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))

    return subprocess.Popen([sys.executable, "-c", "while True: pass"], preexec_fn=settle)


def _addresses():
    sockets = [socket.create_server(("localhost", 0)) for _ in range(2)]
    addresses = [f"localhost:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    return addresses


def define_flags(values):
    flags.DEFINE_multi_string("gin_file", None, "The recipe.", flag_values=values)
    flags.DEFINE_multi_string("gin_param", [], "Binding; any number of times.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where data sets are.", flag_values=values)
    flags.DEFINE_string("workdir", None, "A new folder.", flag_values=values)
    flags.DEFINE_integer("batch_size", 64, "Of the two workers together.", flag_values=values)
    flags.DEFINE_integer("train_steps", 40, "Steps of each run.", flag_values=values)
    flags.DEFINE_integer("pairs", 3, "Pairs of runs.", flag_values=values)
    flags.DEFINE_bool("keep_awake", False, "Whether the cores never sleep.", flag_values=values)
    flags.mark_flags_as_required(["gin_file", "workdir"], flag_values=values)
