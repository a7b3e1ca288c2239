"""The notebooks of colab/: what is in them, and that they run from top to bottom in a fast setting."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys
import types

import nbclient
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((ROOT / "colab").glob("*.ipynb"))}

# What stands after the cell of settings when a notebook is tested: of each, at most 40 seconds on two cores.
FAST = {
    "attack_any_model": 'NUM_EXAMPLES, EPOCHS, ATTACKS = 40, 4, ["apgd-ce"]',
    "train_on_tpu": """
        STEPS, VALIDATE_EVERY, STOP_AT, BATCH_SIZE, STATISTICS_GROUP_SIZE = 30, 15, 2, 8, 8
        RECIPE += ["--gin_param=training/pgd.num_steps = 1", "--gin_param=pgd40/pgd.num_steps = 1"]
        RECIPE += ["--gin_param=TAU = None"]
        RECIPE += ["--gin_param=training_data.num_validation = 8", "--gin_param=train.log_every = 1"]
        EVALUATION += ["--num_examples=16", "--gin_param=pgd40/pgd.num_steps = 2"]
        EVALUATION += ["--gin_param=evaluate.allow_chance = True", "--gin_param=evaluate.diagnose = False"]
    """,
    "reproduce_a_row": """
        import numpy as np

        np.savez("small.npz", image=np.random.default_rng(0).integers(0, 256, (500, 8, 8, 3), "uint8"), label=np.arange(500) % 10)
        BUDGET, NUM_RUNS = "", 1
        MORE += ["--gin_param=DATASET = 'npz:small.npz'", "--gin_param=TRAIN_STEPS = 2", "--gin_param=BATCH_SIZE = 8"]
        MORE += ["--gin_param=STATISTICS_GROUP_SIZE = 8", "--gin_param=training/pgd.num_steps = 1"]
        MORE += ["--gin_param=pgd40/pgd.num_steps = 1", "--gin_param=training_data.num_validation = 8"]
    """,
    "your_own_keras_model": 'EPOCHS, NUM_TRAINED, NUM_EVALUATED, WIDTH, ATTACKS = 2, 256, 16, 4, ["apgd-ce"]',
}
# What the outputs then hold, besides tracebacks of none.
SAYS = {
    "attack_any_model": [
        "warning: zero_gradients (apgd-ce)",
        "warning: diagnosis_beats_attacks",
        "Already finished",
        "True ['examples.npz', 'results.json']",
    ],
    "train_on_tpu": ["CPU", "Stopped by SIGINT; saved at step", "Resuming from step", "| 30/30, ", "| 95 % interval"],
    "reproduce_a_row": ["-> Swish/SiLU", "Configuration 2 of 2", "95 % interval"],
    "your_own_keras_model": [
        "val_robust_accuracy",
        "averaged weights",
        "largest difference of logits:",
    ],
}


def sources(name, kind="code"):
    return [cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == kind]


def python(source):
    """A cell as Python has it: of magics and shell commands, calls."""
    return TransformerManager().transform_cell(source)


def definitions(source):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    return [node.lineno for node in ast.walk(ast.parse(python(source))) if isinstance(node, kinds)]


def settings(name):
    (index,) = [i for i, cell in enumerate(NOTEBOOKS[name].cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def assigned(source):
    """Names that lines of Python assign to."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)]
    return {node.id for node in nodes if isinstance(node.ctx, ast.Store)}


def fast(name):
    return "\n".join(line.strip() for line in FAST[name].strip().splitlines())


def test_each_notebook_has_a_fast_setting():
    assert NOTEBOOKS and FAST.keys() == SAYS.keys() == NOTEBOOKS.keys()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_valid_and_cleared(name):
    notebook = NOTEBOOKS[name]
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.colab.get("name", f"{name}.ipynb") == f"{name}.ipynb"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id
    text = (ROOT / "colab" / f"{name}.ipynb").read_text()
    assert text == nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_open_with_what_one_will_see_and_define_nothing(name):
    first = NOTEBOOKS[name].cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ") and "You will see" in first.source
    assert [source for source in sources(name) if definitions(source)] == []
    assert assigned(fast(name)) <= assigned(NOTEBOOKS[name].cells[settings(name)].source)


def test_definitions_are_seen():
    assert definitions("%pip install x\n!ls\nf = 1") == []
    assert definitions("%pip install x\nf = lambda: 1") and definitions("def f(): ...") and definitions("class A: ...")


def test_the_cell_that_installs_is_the_same_in_all():
    assert len({sources(name)[0] for name in NOTEBOOKS}) == 1
    assert "%pip install" in sources(next(iter(NOTEBOOKS)))[0]


JAX_07 = {"jax": "0.7.2", "jaxlib": "0.7.2", "numpy": "2.1.3"}
# What is here, what the devices are by TensorFlow's and JAX's word (None where it is not installed), what is chosen, and
# what pip is asked for, if at all.
MACHINES = {
    "Colab's TPU": ({**JAX_07, "libtpu": "0.0.21"}, None, "TPU", "jax: JAX has 1 TPU,", "robust_keras[jax]"),
    "Kaggle's TPU": ({**JAX_07, "libtpu": "0.0.17"}, "CPU", 8 * "TPU ", "jax: JAX has 8 TPU,", "robust_keras"),
    "a TPU VM of TensorFlow": ({"numpy": "2.0.2"}, "CPU" + 8 * " TPU", None, "tpu: TensorFlow has 8", "robust_keras"),
    "Colab's GPU": (
        {**JAX_07, "jax-cuda12-plugin": "0.7.2"},
        "CPU GPU",
        "GPU",
        "one: TensorFlow has 1 GPU",
        "robust_keras",
    ),
    "two GPUs": ({"numpy": "1.26.4"}, "CPU GPU GPU", "CPU", "mirrored: TensorFlow has 2", "robust_keras"),
    "JAX's GPUs": (JAX_07, "CPU", "GPU GPU", "jax: JAX has 2 GPU,", "robust_keras"),
    "a CPU": (JAX_07, None, "CPU", "one: neither", "robust_keras[cpu]"),
    "an NVIDIA GPU": ({"numpy": "2.1.3"}, None, None, "one: there is an NVIDIA GPU", "robust_keras[gpu]"),
    "all is there": (JAX_07, "CPU", "CPU", "one: neither", None),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_what_the_cell_that_installs_chooses(machine, monkeypatch, capsys):
    installed, tensorflow, jax, chosen, package = MACHINES[machine]
    there = {"tensorflow": tensorflow, "jax": jax, "robust_keras": None if package else "", "keras": ""}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if there[name] is None else name)
    monkeypatch.setattr(shutil, "which", lambda name: name if machine == "an NVIDIA GPU" else None)
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [types.SimpleNamespace(name=n) for n in installed])
    monkeypatch.setattr(importlib.metadata, "version", installed.__getitem__)
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # What it imports goes with it.

    def run(command, **arguments):
        name = re.match("import ([a-z]+)", command[2])[1]
        assert command[:2] == [sys.executable, "-c"] and there[name] is not None
        return types.SimpleNamespace(stdout=f"a word of the driver\n{there[name]}\n")

    monkeypatch.setattr(subprocess, "run", run)
    asked = []
    shell = types.SimpleNamespace(run_line_magic=lambda name, line: asked.append((name, line)))
    names = {"get_ipython": lambda: shell}
    exec(python(sources("train_on_tpu")[0]), names)
    assert capsys.readouterr().out.startswith(f"Strategy {chosen}")
    if package is None:
        assert asked == []
        return
    ((name, line),) = asked
    line = re.sub(r"{(\w+)}", lambda found: names[found[1]], line)
    form = r'install -q -c (\S+) "(\S+) @ git\+https://github.com/\S+"'
    constraints, wanted = re.fullmatch(form, line).groups()
    assert (name, wanted) == ("pip", package)
    kept = set(pathlib.Path(constraints).read_text().split())
    # Whatever drives devices stays, to the letter; numpy keeps its major version.
    exactly = {f"{name}=={version}" for name, version in installed.items() if name != "numpy"}
    tensorflows = set() if tensorflow is not None else {"tensorflow==2.20.*", "tensorflow-cpu==2.20.*"}
    assert kept == exactly | {f"numpy=={installed['numpy'][0]}.*"} | tensorflows


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_recipes_that_are_named_exist(name):
    named = re.findall(r"\bgin/[\w/]+\.gin", "\n".join(cell.source for cell in NOTEBOOKS[name].cells))
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_the_repository_has_one_address():
    (address,) = re.findall(r'url="(.+)"', (ROOT / "setup.py").read_text())
    badge = address.replace("https://github.com/", "https://colab.research.google.com/github/") + "/blob/main/colab/"
    linked = re.findall(r"\]\(([^)]*colab\.research[^)]*\.ipynb)\)", (ROOT / "README.md").read_text())
    assert sorted(linked) == sorted(f"{badge}{name}.ipynb" for name in NOTEBOOKS)
    for name in NOTEBOOKS:
        assert f'REPOSITORY = "{address}"' in sources(name)[0]
        links = re.findall(r"https://github\.com/[\w.-]*robust[\w./-]*", "\n".join(sources(name, "markdown")))
        for link in links:
            inside = link.removeprefix(address).removeprefix("/blob/main/")
            assert link.startswith(address) and (ROOT / inside).exists(), link


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_run_from_top_to_bottom(name, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = NOTEBOOKS[name].copy()
    cells, after = list(notebook.cells), settings(name) + 1
    notebook.cells = [*cells[:after], nbformat.v4.new_code_cell(fast(name)), *cells[after:]]
    work = tmp_path / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    text = "".join(output.text for output in outputs if output.output_type == "stream")
    assert [words for words in SAYS[name] if words not in text] == []
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert "Traceback" not in text
