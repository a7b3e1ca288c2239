"""What an installed package is: importable without side effects, and complete."""

import subprocess
import sys

import setuptools

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
    assert "robust_keras[cpu]" in done.stderr.splitlines()[-1]


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
    assert {"cpu", "gpu", "tpu", "docs", "test", "oracles"} == set(given["extras_require"])
    assert not any(name.startswith("tensorflow") and "datasets" not in name for name in given["install_requires"])
    for entry in given["entry_points"]["console_scripts"]:
        script = entry.split(".")[-1].split(":")[0]
        assert (ROOT / "scripts" / f"{script}.py").exists()
    patterns = given["package_data"]["robust_keras.gin"]
    gin_files = {path for path in (ROOT / "gin").rglob("*") if path.is_file()}
    found = {path for pattern in patterns for path in (ROOT / "gin").glob(pattern)}
    assert found == gin_files
