"""scripts/miniature.sh: its commands are ones that there are, and what has finished is not run again."""

import os
import pathlib
import subprocess

from robust_keras.commands import configuration

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "miniature.sh"
# In place of Python: writes down its arguments, and leaves the folders, and what an evaluation leaves.
STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$@" "" >>"$CALLS"
for argument in "$@"; do
  case $argument in --workdir=*) mkdir -p "${argument#*=}" ;; esac
  case $argument in --workdir=*/evaluation) touch "${argument#*=}/results.json" ;; esac
done
"""


def call(folder, *parts, **variables):
    """The commands that the script runs, as lists of words, and how it ended."""
    stand_in, calls = folder / "python", folder / "calls"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    calls.write_text("")
    names = {"PYTHON": stand_in, "CALLS": calls, "RUNS": folder / "runs", "DATA_DIR": folder, "SEEDS": "4 5"}
    environment = {**os.environ, **{name: str(value) for name, value in {**names, **variables}.items()}}
    ended = subprocess.run(["bash", SCRIPT, *parts], env=environment, capture_output=True, text=True)
    return [lines.splitlines() for lines in calls.read_text().strip().split("\n\n") if lines], ended


def of(commands, script):
    """Gin files and bindings of the calls of a script, by folder."""
    words = [words for words in commands if words[0] == f"scripts/{script}.py"]
    return {flag(each, "workdir")[-1]: (flag(each, "gin_file"), flag(each, "gin_param")) for each in words}


def flag(words, name):
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


def test_its_commands_are_ones_that_there_are(tmp_path):
    commands, ended = call(tmp_path)
    assert ended.returncode == 0, ended.stderr
    runs = {}
    for folder, (files, params) in of(commands, "train").items():
        configuration.parse(files, params)
        runs[pathlib.Path(folder).relative_to(tmp_path / "runs").as_posix()] = configuration.resolve(
            configuration.train
        )
    names = ("adversarial", "standard", "few", "margin", "pseudo")
    assert sorted(runs) == sorted(f"{name}/seed{seed}" for name in names for seed in (4, 5))
    assert {run.recipe.seed for run in runs.values()} == {4, 5}
    first = {name: runs[f"{name}/seed4"].recipe for name in names}
    assert all(each.train_steps == 250 and each.averaging.tau == 0.98 for each in first.values())
    assert first["standard"].attack is None
    assert first["margin"].attack.attack_fn.keywords["loss_fn"].func.__name__ == "margin"
    assert first["few"].data.keywords["dataset"] == f"npz:{tmp_path}/runs/few.npz"
    assert first["pseudo"].data.keywords["extra_data"] == f"tfrecord:{tmp_path}/runs/pseudo_labels/10k/*.tfrecord"
    evaluations = of(commands, "evaluate")
    assert len(evaluations) == 16  # Those, of two by PGD-40 too, and of the first with raw weights.
    files, params = next(iter(evaluations.values()))
    configuration.parse(files, params)
    attacks = configuration.resolve(configuration.evaluate).keywords["attacks"]
    assert [each.keywords["num_steps"] for each in attacks] == [20, 20, 20]
    ((files, params),) = of(commands, "pseudo_label").values()
    configuration.parse(files, params)
    configuration.resolve(configuration.train, is_last=False)
    assert configuration.resolve(configuration.label_pool).sets.sizes == (10_000,)
    again, ended = call(tmp_path)
    assert ended.returncode == 0 and {words[0] for words in again} == {"scripts/report.py", "-"}


def test_a_part_brings_what_it_is_compared_with(tmp_path):
    commands, _ = call(tmp_path, "averaging", SEEDS="7")
    assert [words[0].removeprefix("scripts/") for words in commands if words[0] != "-"] == [
        "train.py",
        "evaluate.py",
        "export.py",
        "evaluate.py",
        "report.py",
    ]


def test_what_is_no_part_is_refused(tmp_path):
    commands, ended = call(tmp_path, "marging")
    assert not commands and ended.returncode == 2
    assert ended.stderr == "Expected parts out of standard flattery few averaging margin pseudo. Received: marging\n"
