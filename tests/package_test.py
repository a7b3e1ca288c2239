"""What an installed package is: importable without side effects, and complete."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import setuptools

import robust_keras
from robust_keras.commands import configuration

ROOT = configuration.gin_directory().parent


def test_without_tensorflow_importing_says_which_extra_to_install():
    program = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "tensorflow" else real(name, *rest)
import robust_keras
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    said = done.stderr.splitlines()[-1]
    assert all(f"'robust_keras[{extra}]'" in said for extra in ("cpu", "gpu", "tpu", "jax"))


def test_importing_the_package_leaves_tensorflow_to_the_launcher():
    program = "import sys, robust_keras.commands.launcher; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_launcher_switches_on_what_cpus_need_for_speed():
    program = "import os, robust_keras.commands.train; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "1\n"


def test_setup_lists_every_package_and_its_files(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.update(arguments))
    source = (ROOT / "setup.py").read_text()
    exec(compile(source, str(ROOT / "setup.py"), "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    packages = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("robust_keras/**/*.py")
    }
    assert packages <= set(given["packages"])
    assert {"cpu", "gpu", "tpu", "jax", "docs", "test", "oracles", "onnx", "signing"} == set(given["extras_require"])
    assert not any(name.startswith("tensorflow") and "datasets" not in name for name in given["install_requires"])
    for entry in given["entry_points"]["console_scripts"]:
        script = entry.split(".")[-1].split(":")[0]
        assert (ROOT / "scripts" / f"{script}.py").exists()
    patterns = given["package_data"]["robust_keras.gin"]
    gin_files = {path for path in (ROOT / "gin").rglob("*") if path.is_file()}
    found = {path for pattern in patterns for path in (ROOT / "gin").glob(pattern)}
    assert found == gin_files


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel installs, made of a copy of the checkout."""
    checkout, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    for name in ("robust_keras", "gin"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = ["wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={site}", str(checkout)]
    subprocess.run([*pip, *wheels], check=True, capture_output=True)
    (wheel,) = site.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", f"--target={site}", str(wheel)], check=True)
    return site


@pytest.fixture
def command(installed, tmp_path):
    """Runs a console command of the wheel in an empty folder: what it printed."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_has_everything(installed):
    def files(folder, *patterns):
        return {path.relative_to(folder).as_posix() for pattern in patterns for path in folder.rglob(pattern)}

    package = installed / "robust_keras"
    assert files(package, "*.py") == files(ROOT / "robust_keras", "*.py")
    assert files(package / "gin", "*.gin", "*.csv") == files(ROOT / "gin", "*.gin", "*.csv")
    assert (package / "py.typed").exists()
    (information,) = installed.glob("*.dist-info")
    assert information.name == f"robust_keras-{robust_keras.__version__}.dist-info"
    assert list(information.rglob("LICENSE"))


def test_the_wheel_works_in_an_empty_folder(installed, command, tmp_path):
    assert command("-c", "import robust_keras; print(robust_keras.__file__)").startswith(str(installed))
    train, evaluate = (str(installed / "bin" / f"robust-keras-{name}") for name in ("train", "evaluate"))
    assert "--gin_file" in command(train, "--help")
    short = [
        "TRAIN_STEPS = 3",
        "WIDTH = 1",
        "training/pgd.num_steps = 1",
        "train.validate_every = 3",
        "training_data.num_validation = 32",
        "pgd40/pgd.num_steps = 1",
    ]
    command(train, "--gin_file=gin/quickstart.gin", *(f"--gin_param={each}" for each in short))
    run = tmp_path / "runs" / "quickstart"
    lines = (run / "metrics.csv").read_text().splitlines()
    assert lines[-1].startswith("3,") and (run / "saved_model" / "model_card.json").exists()
    attack = [
        "--gin_file=gin/eval/pgd40.gin",
        "--gin_param=pgd40/pgd.num_steps = 1",
        "--gin_param=evaluate.allow_chance = True",
        "--gin_param=evaluate.diagnose = False",
    ]
    where = ["--saved_model=runs/quickstart/saved_model", "--dataset=digits", "--num_examples=20", "--workdir=measured"]
    command(evaluate, *where, *attack)
    assert json.loads((tmp_path / "measured" / "results.json").read_text())["num_examples"] == 20


def test_versions_agree():
    version = robust_keras.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(version)}( |$)", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_the_licence_is_the_one_that_is_named():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text()
    assert "\nlicense: Apache-2.0\n" in (ROOT / "CITATION.cff").read_text()
