"""Times what comes before the work: imports, `--help` of each command, and the first things that commands do.

    python scripts/benchmark.py startup

Each run is a process of its own. `train` takes one step of the quickstart and measures it, `evaluate` one step of PGD
on what it left; both with little to do but start, trace and compile.
"""

import functools
import pathlib
import shutil
import subprocess
import sys

from absl import flags

from benchmarks import timing

_SCRIPTS = pathlib.Path(__file__).parents[1]
_IMPORTS = ("tensorflow", "keras", "robust_keras", "robust_keras.training.train", "robust_keras.evaluation.evaluate")
_NAMES = ("train", "evaluate", "export", "report", "reproduce", "pseudo_label", "check_tpu", "self_test")
_SHORT = {
    "TRAIN_STEPS": "1",
    "train.validate_every": "1",
    "training_data.num_validation": "32",
    "train.progress": "False",
    "pgd40/pgd.num_steps": "1",
}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the subject's flags."""
    flags.DEFINE_list("only", [], "Cases, by the beginning of their names; all by default.", flag_values=values)


def measure(values: flags.FlagValues, bench: timing.Bench) -> None:
    """Times the processes."""
    for name, command in _commands(bench.new_path("run")).items():
        if not values.only or name.startswith(tuple(values.only)):
            bench.time(name, functools.partial(_run, name, command), settings={"command": command})


def _commands(run: str) -> dict[str, list[str]]:
    """What is started, by name; later ones need what earlier ones left."""
    commands = {"python": ["-c", ""]}
    commands |= {f"import {module}": ["-c", f"import {module}"] for module in _IMPORTS}
    commands |= {f"{name} --help": [str(_SCRIPTS / f"{name}.py"), "--help"] for name in _NAMES}
    short = [f"--gin_param={name} = {value}" for name, value in _SHORT.items()]
    train = [str(_SCRIPTS / "train.py"), "--gin_file=gin/quickstart.gin", f"--workdir={run}"]
    commands["train, first step"] = [*train, *short]
    evaluate = [str(_SCRIPTS / "evaluate.py"), f"--saved_model={run}/saved_model", "--dataset=digits"]
    evaluate += ["--num_examples=32", "--gin_file=gin/eval/pgd40.gin", "--gin_file=gin/threats/linf_digits.gin"]
    evaluate += ["--gin_param=pgd40/pgd.num_steps = 1", "--gin_param=evaluate.allow_chance = True"]
    commands["evaluate, first batch"] = [*evaluate, f"--workdir={run}-measured"]
    commands["export"] = [str(_SCRIPTS / "export.py"), f"--workdir={run}", f"--output={run}-exported"]
    return commands


def _run(name: str, command: list[str]) -> None:
    made = {"train": "--workdir=", "evaluate": "--workdir=", "export": "--output="}.get(name.split(",")[0])
    for argument in command:
        if made and argument.startswith(made):
            shutil.rmtree(argument.removeprefix(made), ignore_errors=True)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"Expected {name} to end well. Received: {done.stderr.strip().splitlines()[-1]}")
