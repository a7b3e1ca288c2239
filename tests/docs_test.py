"""README and docs say what is there: files, flags, bindings, recipes, warnings; their Python runs, and the site builds."""

import ast
import functools
import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import sys

import keras
import numpy as np
import pytest
from absl import flags

from robust_keras.commands import configuration, exit_codes
from robust_keras.data import sources
from robust_keras.evaluation import warnings
from robust_keras.saved_models import export
from robust_keras.study import rows
from robust_keras.training import metrics_log
from tests import warm_processes

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from benchmarks import command as benchmarks  # noqa: E402

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
COMMANDS = (
    "train",
    "evaluate",
    "evaluate_checkpoints",
    "export",
    "export_program",
    "import_checkpoint",
    "report",
    "reproduce",
    "pseudo_label",
    "check_tpu",
    "self_test",
    "verify",
)


def blocks(language):
    """(page, text) of each fenced block of a language."""
    return [
        (page, text) for page, each in PAGES.items() for text in re.findall(rf"```{language}\n(.*?)```", each, re.S)
    ]


def fenced_out(text):
    return re.sub(r"```.*?```", "", text, flags=re.S)


def anchors(text):
    """Of a page's headings, as both GitHub and the site make them."""
    titles = re.findall(r"^#+ (.+)$", fenced_out(text), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands():
    """(page, script's name, arguments) of each call of a Python script in a block of shell commands."""
    found = []
    for page, text in blocks("bash"):
        lines = text.replace("\\\n", " ").splitlines()
        variables = dict(line.split("=", 1) for line in lines if re.match(r"[A-Z]+=\"", line))
        for line in lines:
            for name, value in variables.items():
                line = line.replace(f"${name}", value.strip('"'))
            if match := re.search(r"python scripts/(\w+)\.py ?(.*)", line):
                found.append((page, match[1], shlex.split(match[2], comments=True)))
    return found


def flag_values(name):
    values = flags.FlagValues()
    if name.startswith("benchmark "):
        benchmarks.define_flags(values, name.split()[1])
        return values
    importlib.import_module(f"robust_keras.commands.{name}").define_flags(values)
    return values


def named(pattern):
    """(page, match) of a pattern anywhere in the pages."""
    return [(page, match) for page, text in PAGES.items() for match in re.findall(pattern, text)]


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_links_within_the_repository_lead_somewhere():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", fenced_out(text))]
    inner = [(page, link) for page, link in links if "://" not in link]
    assert len(inner) > 20
    dead = []
    for page, link in inner:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            dead.append((page, link))
    assert dead == []


def test_every_page_is_on_the_site_and_in_the_readme():
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    toctree = "\n".join(re.findall(r"```{toctree}\n(.*?)```", PAGES["docs/index.md"], re.S))
    assert {line for line in toctree.splitlines() if line and not line.startswith(":")} == pages
    # The API reference is made by the site.
    assert set(re.findall(r"\(docs/(\w+)\.md\)", PAGES["README.md"])) == pages - {"api"}


def test_files_that_are_named_exist():
    paths = named(r"(?<![\w/.])((?:scripts|gin|tests|docs|robust_keras)/[\w./*-]*\w)")
    assert len(paths) > 100
    made = {"docs/_build"}
    assert [(page, path) for page, path in paths if path not in made and not list(ROOT.glob(path))] == []


def test_test_files_that_are_named_exist():
    names = named(r"`(\w+(?:_test|_reference))\.py`")
    assert [(page, name) for page, name in names if not list((ROOT / "tests").rglob(f"{name}.py"))] == []


@pytest.mark.parametrize("page, script, arguments", commands())
def test_commands_are_understood(page, script, arguments):
    if script == "benchmark":
        script, *arguments = f"benchmark {arguments[0]}", *arguments[1:]
    values = flag_values(script)
    plain = values([script, *arguments])[1:]
    assert len(plain) == (1 if script == "inspect_model" else 0)


@pytest.mark.parametrize(
    "page, script, arguments",
    [each for each in commands() if each[1] in ("train", "evaluate", "evaluate_checkpoints", "pseudo_label")],
)
def test_recipes_and_bindings_of_commands_are_complete(page, script, arguments):
    values = flag_values(script)
    values([script, *arguments])
    if values["import"].value:
        for _, text in [each for each in blocks("python") if each[0] == page]:
            exec(compile(text, page, "exec"), {})
    params = [each for each in values.gin_param if "load_logits_fn" not in each]  # Which would load a model.
    configuration.parse(values.gin_file, params)
    if script.startswith("evaluate"):
        if params == values.gin_param:
            configuration.resolve(configuration.evaluate)
        return
    configuration.resolve(configuration.train, is_last=script == "train")
    if script == "pseudo_label":
        configuration.resolve(configuration.label_pool)


def test_flags_that_are_named_exist():
    subjects = [f"benchmark {subject}" for subject in benchmarks.subjects()]
    ours = {flag for name in (*COMMANDS, *subjects) for flag in flag_values(name)}
    for peer in (ROOT / "scripts" / "peers").glob("*.py"):
        ours |= set(re.findall(r"""["']--(\w+)["']""", peer.read_text()))
    ours |= set(re.findall(r"--(\w+)", (ROOT / "scripts" / "test.sh").read_text()))
    ours |= set(re.findall(r"--(\w+)", (ROOT / "robust_keras/engines/on_jax/runner.py").read_text())) | {"help"}
    ours |= {"dir", "tag_set", "signature_def", "inputs", "logdir"}  # Of saved_model_cli and TensorBoard.
    found = named(r"(?<![\w-])--([a-z]\w*)")
    assert len(found) > 60
    assert [(page, flag) for page, flag in found if flag not in ours] == []


def test_bindings_that_are_named_can_be_made():
    """Each `function.argument = value` in prose binds something."""
    bindings = {match for _, match in named(r"`((?:\w+/)?\w+\.\w+ = [^`]+)`")}
    assert len(bindings) > 10
    for binding in bindings:
        configuration.parse(["gin/at.gin"], [binding])


def test_macros_that_are_named_are_in_recipes():
    recipes = "".join(path.read_text() for path in (ROOT / "gin").rglob("*.gin"))
    cells = re.findall(r"^\| (`[A-Z_`, ]+`) \|", PAGES["docs/training.md"], re.M)
    macros = {name for cell in cells for name in re.findall(r"[A-Z_]+", cell)}
    assert {"NORM", "EPSILON", "TAU", "SEED", "STATISTICS_GROUP_SIZE"} <= macros
    assert [name for name in macros if not re.search(rf"%{name}\b", recipes)] == []


def test_every_recipe_is_in_the_table_with_the_papers_numbers():
    lines = [line for line in PAGES["docs/training.md"].splitlines() if line.startswith("| `gin/")]
    for path in (ROOT / "gin").glob("*.gin"):
        if path.name.startswith("base"):
            continue
        (row,) = [line for line in lines if f"`gin/{path.name}`" in line]
        recipes = re.findall(r"`gin/(\w+\.gin)`", row)
        numbers = re.findall(r"([\d.]+) % / ([\d.]+) %", row)
        header = " ".join(re.findall(r"^# (.*)$", path.read_text(), re.M))
        if numbers:
            clean, robust = numbers[recipes.index(path.name)]
            assert re.search(rf"\b{clean}\b.*\b{robust}\b", header), path.name
        else:
            assert path.name.startswith(("quickstart", "pseudo_label")) or path.name.endswith("svhn.gin")


def test_every_warning_is_in_the_table_and_no_other():
    section = PAGES["docs/evaluation.md"].partition("## Warnings")[2].partition("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    told = {name: (seen, advice) for names, seen, advice in lines for name in re.findall(r"`([^`]+)`", names)}
    assert told == warnings.WARNINGS


def test_every_column_of_metrics_is_explained():
    section = PAGES["docs/training.md"].partition("### Columns of the metrics")[2]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    assert [name for cell in cells for name in re.findall(r"`(\w+)`", cell)] == list(metrics_log.METRICS)


def test_the_studys_rows_are_as_many_as_the_page_says():
    every = rows.read()
    runnable = [row for row in every if row.runnable]
    numbers = len(every), len(runnable), len({rows.run_name(row) for row in runnable}), len(every) - len(runnable)
    text = " ".join(PAGES["docs/study.md"].split())
    assert "{} rows, of which {} are {} configurations to run and {} are other people's".format(*numbers) in text


def test_the_design_page_shows_every_folder_and_module_of_the_ground_floor():
    (tree,) = re.findall(r"```\n(robust_keras/\n.*?)```", PAGES["docs/design.md"], re.S)
    there = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "robust_keras").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    inside = tree[: tree.index("\ngin/")]
    named = set(re.findall(r"(?<=[ \n])(?:\w+\.py|\w+/)(?= )", inside)) - {"readers/"}
    assert named == there - {"__init__.py"}


def test_exit_codes_are_the_launchers():
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGES["docs/training.md"], re.M)}
    assert codes == {exit_codes.FAILED, exit_codes.USAGE, exit_codes.NON_FINITE_LOSS, exit_codes.TERMINATED}


def test_console_commands_are_installed():
    setup = (ROOT / "setup.py").read_text()
    installed = {
        f"robust-keras-{name.replace('_', '-')}"
        for name in ast.literal_eval(re.search(r"COMMANDS = (\(.*?\))", setup, re.S)[1])
    }
    found = {name for _, name in named(r"`(robust-keras-[\w-]+)`")}
    assert found and found <= installed


def test_dependencies_are_explained():
    setup = (ROOT / "setup.py").read_text()
    required = set(re.findall(r'"([a-z][a-z-]+)(?:\[[\w,-]+\])?[>=<]=?[\d.]', setup)) - {
        "tensorflow-cpu",
        "tensorflow-tpu",
    }
    assert {"keras", "ruff", "sphinx", "cleverhans"} <= required
    column = " ".join(
        line.split("|")[1] for line in PAGES["docs/dependencies.md"].splitlines() if line.startswith("| ")
    )
    assert [name for name in required if not re.search(rf"(?<![\w-]){name}(?![\w-])", column)] == []


@pytest.mark.parametrize("page, text", blocks("python"))
def test_python_compiles(page, text):
    compile(text, page, "exec")


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """A folder with a linear classifier of digits where the quickstart leaves its own."""
    folder = tmp_path_factory.mktemp("quickstart")
    images, pooled = keras.Input((32, 32, 3)), keras.layers.AveragePooling2D(4)
    dense = keras.layers.Dense(10)
    network = keras.Model(images, dense(keras.layers.Flatten()(pooled(images))))
    digits = sources.load("digits", "train")
    features = pooled(digits.images / np.float32(255)).numpy().reshape(len(digits.labels), -1)
    weights = np.linalg.lstsq(features, np.eye(10)[digits.labels] - 0.1, rcond=1e-3)[0]
    dense.kernel.assign(10 * weights)
    export.export(network, str(folder / "runs/quickstart/saved_model"), card={})
    return folder


@pytest.mark.parametrize("page", ["README.md", "docs/serving.md"])
def test_python_of_a_page_runs(digits_model, monkeypatch, page):
    (text,) = [text for name, text in blocks("python") if name == page]
    monkeypatch.chdir(digits_model)
    scope = {}
    exec(compile(text, page, "exec"), scope)
    if page == "README.md":
        assert scope["x_adv"].shape == (360, 32, 32, 3)
        assert len([line for line in text.splitlines() if line and not re.match("import |from ", line)]) <= 8
    else:
        assert scope["logits"].shape == (1, 10)


def test_python_of_the_evaluation_page_runs(tiny_model, tiny_images):
    (text,) = [text for name, text in blocks("python") if name == "docs/evaluation.md"]
    scope = {}
    exec(compile(text, "docs/evaluation.md", "exec"), scope)
    assert scope["attacked"](tiny_model, tiny_images[:2], [0, 1]).shape == (2, 8, 8, 3)
    few = {"attacks": "pgd20", "batch_size": 2, "diagnose": False, "progress": False}
    assert scope["measured"](tiny_model, tiny_images[:2], [0, 1], **few).results["num_examples"] == 2


def test_python_of_the_keras_page_runs(monkeypatch, tmp_path):
    """On few images, for an epoch, and without what is downloaded."""
    text = "\n".join(text for name, text in blocks("python") if name == "docs/keras.md")
    rng = np.random.default_rng(0)
    made = rng.integers(0, 256, (64, 32, 32, 3)).astype(np.uint8), rng.integers(0, 10, (64, 1))
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: (made, made))
    make = keras.applications.MobileNetV2
    new = functools.wraps(make)(lambda *args, **settings: make(*args, **{**settings, "weights": None}))
    monkeypatch.setattr(keras.applications, "MobileNetV2", new)
    monkeypatch.chdir(tmp_path)
    few = {"epochs=30": "epochs=1", "validation_split=0.02": "validation_split=0.25", "[:1000]": "[:8]"}
    for long, short in {**few, 'epsilon="8/255"))': 'epsilon="8/255", attacks="pgd20"))'}.items():
        assert long in text
        text = text.replace(long, short)
    scope = {}
    exec(compile(text, "docs/keras.md", "exec"), scope)
    assert (tmp_path / "best.keras").exists() and scope["model"].bounds == (-1, 1)


def test_parts_of_ones_own_are_trained_and_attacked(tmp_path, monkeypatch):
    parts = [text for name, text in blocks("python") if name == "docs/extending.md"]
    assert len(parts) == 7 and all(len(text.splitlines()) < 20 for text in parts)
    (tmp_path / "own_parts.py").write_text("\n".join(parts))
    monkeypatch.chdir(tmp_path)
    bindings = {
        "train.model": "@small_cnn()",
        "train.objective": "@half_and_half()",
        "train.attack": "@fast_gradient()",
        "train.learning_rate": "@triangular()",
        "train.optimizer": "@lion()",
        "batches.augmentation": "@darken()",
        "pgd40/pgd.loss_fn": "@true_logit()",
        "fast_gradient.threat": "@threat()",
        "small_cnn.filters": "4",
        "TRAIN_STEPS": "2",
        "train.validate_every": "2",
        "training_data.num_validation": "32",
        "pgd40/pgd.num_steps": "1",
    }
    train = ["--import=own_parts", "--gin_file=quickstart.gin", "--workdir=run"]
    run_command("train", [*train, *(f"--gin_param={name} = {value}" for name, value in bindings.items())], tmp_path)
    config = (tmp_path / "run" / "config.gin").read_text()
    assert all(f"{name}.{setting} = " in config for name, setting in [("half_and_half", "share"), ("darken", "most")])
    bindings = {"evaluate.attacks": "[@fast_gradient()]", "fast_gradient.threat": "@threat()"}
    bindings |= {"evaluate.allow_chance": "True", "evaluate.baseline": "None", "evaluate.diagnose": "False"}
    measure = ["--import=own_parts", "--saved_model=run/saved_model", "--dataset=digits", "--num_examples=20"]
    measure += ["--gin_file=eval/pgd40.gin", "--workdir=measured"]
    run_command(
        "evaluate", [*measure, *(f"--gin_param={name} = {value}" for name, value in bindings.items())], tmp_path
    )
    (record,) = json.loads((tmp_path / "measured" / "results.json").read_text())["attacks"]
    assert (record["name"], record["parameters"]) == ("fast_gradient", {"length": 1.25})


def run_command(name, arguments, folder):
    log = folder / f"{name}.txt"
    process = warm_processes.Popen(run_script, log=log, name=name, arguments=arguments, folder=folder)
    assert process.wait() == 0, log.read_text()


def run_script(name, arguments, folder):
    os.chdir(folder)
    sys.argv = [name, *arguments]
    runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")


def build_sites(sites):
    """Exits with the first code that is not 0. Each is a folder, where its site goes to, and further flags."""
    from sphinx.cmd import build

    sys.exit(next(filter(None, (build.main(["-q", "-W", "--keep-going", *site]) for site in sites)), 0))


def test_the_site_builds_without_a_warning(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("_build", "api"))
    # Its theme makes a tree of all pages for each page, half the time: one page shows what it asks for.
    shutil.copytree(tmp_path / "docs", tmp_path / "page", ignore=shutil.ignore_patterns("*.md"))
    (tmp_path / "page" / "index.md").write_text("# A page\n\nWith [a link](https://arxiv.org/abs/2010.03593).\n")
    log = tmp_path / "log.txt"
    plain = [str(tmp_path / "docs"), str(tmp_path / "site"), "-Dhtml_theme=basic"]
    process = warm_processes.Popen(
        build_sites, log=log, sites=[plain, [str(tmp_path / "page"), str(tmp_path / "site" / "page")]]
    )
    assert process.wait() == 0, log.read_text()
    assert "furo" in (tmp_path / "site" / "page" / "index.html").read_text()
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "robust_keras").rglob("*.py")
    }
    described = {path.stem for path in (tmp_path / "site" / "api").glob("*.html")}
    assert described == modules
    assert "num_steps" in (tmp_path / "site" / "api" / "robust_keras.attacks.pgd.html").read_text()
    for page in (tmp_path / "site").rglob("*.html"):  # Whoever reads it asks no other site for anything.
        asked = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//[^"]+"', page.read_text())
        assert asked == [], page
