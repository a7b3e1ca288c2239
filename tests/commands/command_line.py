"""The commands as a user types them, on a small network."""

import csv
import functools
import importlib
import os
import sys

import pytest

import gin
from robust_keras.commands import configuration  # noqa: F401  What gin may bind.
from tests import warm_processes
from tests.training.train_test import small_network

SMALL = {"train.model": "@small_network()"}
TINY = {
    **SMALL,
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "4",
    "TRAIN_STEPS": "6",
    "TAU": "0.9",
    "training_data.num_validation": "8",
    "training/pgd.num_steps": "2",
    "train.validate_every": "3",
    "train.checkpoint_every": "1",
    "train.num_checkpoints": "4",
    "train.log_every": "1",
    "train.validation_batch_size": "8",
    "train.progress": "False",
    "pgd40/pgd.num_steps": "2",
}


@functools.partial(gin.external_configurable, name="small_network", module="command_line")
def _small_network():
    return small_network


def params(**changes):
    return [f"--gin_param={name} = {value}" for name, value in {**TINY, **changes}.items()]


def arguments(images, workdir, **changes):
    return [
        "--gin_file=gin/at.gin",
        f"--workdir={workdir}",
        *params(DATASET=f"'npz:{images}'", **changes),
    ]


def call(monkeypatch, script, *args):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, args)])
    script.command()


def start(script, *args, log=os.devnull):
    """A command in a process of its own, which has the small network too."""
    return warm_processes.Popen(_command, log=log, name=script.__name__, args=list(map(str, args)))


def _command(name, args):
    sys.argv = [name, *args]
    importlib.import_module(name).command()


def refused(monkeypatch, capsys, script, *args):
    """Runs a command that must refuse its input: the one line that it says."""
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, script, *args)
    assert exit.value.code == 2
    said = capsys.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said
    # Commands that fetch missing data follow the line, one on a line.
    line, _, commands = said[said.index("error: ") :].partition("\n")
    assert not commands or "Fetch it with" in line
    return line + commands


def failed(monkeypatch, capsys, script, *args):
    """Runs a command that fails in the middle of its work: the one line that it says."""
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, script, *args)
    said = capsys.readouterr().err
    assert exit.value.code == 1 and said.count("error: ") == 1 and "Traceback" not in said
    return said[said.index("error: ") :].rstrip("\n")


def rows(workdir):
    with open(workdir / "metrics.csv") as file:
        return list(csv.DictReader(file))
