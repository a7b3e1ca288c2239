"""Twenty kills at random moments: nothing is lost but the steps since the last checkpoint."""

import csv
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from robust_keras import storage

ROOT = pathlib.Path(__file__).parents[2]
NUM_STEPS, NUM_KILLS = 120, 20


def start(workdir):
    command = [
        sys.executable,
        ROOT / "scripts" / "train.py",
        "--gin_file=gin/quickstart.gin",
        f"--workdir={workdir}",
        f"--gin_param=TRAIN_STEPS = {NUM_STEPS}",
        "--gin_param=train.validate_every = 50",
        "--gin_param=train.checkpoint_every = 2",
        "--gin_param=train.log_every = 1",
        "--gin_param=train.progress = False",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_logged(workdir):
    try:
        with open(workdir / "metrics.csv") as file:
            return [int(row["step"]) for row in csv.DictReader(file) if row["step"]]
    except (FileNotFoundError, ValueError):  # A line that is being written.
        return []


def wait_for(workdir, process, step):
    deadline = time.monotonic() + 600
    while (steps_logged(workdir) or [0])[-1] < step and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_twenty_kills(tmp_path, capsys):
    moments = random.Random(0)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(undisturbed)
    assert process.wait(timeout=1200) == 0, process.stderr.read()

    steps_taken, resumed_from, codes = 0, 0, []
    for kill in range(NUM_KILLS):
        process = start(killed)
        # Half of the steps left over for the last call; any moment of the step and of what is written after it.
        wait_for(killed, process, resumed_from + moments.randint(1, NUM_STEPS // NUM_KILLS))
        time.sleep(moments.uniform(0.0, 0.4))
        process.send_signal([signal.SIGKILL, signal.SIGTERM][kill % 2])
        sent = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - sent < 25
        codes.append(process.returncode)
        steps_taken += steps_logged(killed)[-1] - resumed_from
        resumed_from = storage.read_newest(killed / "checkpoints").step
    assert set(codes) <= {-signal.SIGKILL, 75}
    process = start(killed)
    output, errors = process.communicate(timeout=1200)
    assert process.returncode == 0, errors
    assert re.search(rf"^Resuming from step {resumed_from}$", output, re.MULTILINE)
    steps_taken += NUM_STEPS - resumed_from

    assert steps_logged(killed) == list(range(1, NUM_STEPS + 1))
    ours, theirs = (storage.read(run / "checkpoints", NUM_STEPS).arrays for run in (killed, undisturbed))
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    with capsys.disabled():
        print(f"\n{steps_taken} steps for {NUM_STEPS}, exit codes {codes}, {os.cpu_count()} cores")
    assert steps_taken <= 1.15 * NUM_STEPS
