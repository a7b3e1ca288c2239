"""The headers of gin files: what they are, their cost, what in them is not the paper's, and commands that work as they stand."""

import itertools
import pathlib
import re
import shlex

import pytest

from robust_keras.commands import configuration
from robust_keras.study import costs, rows

GIN = configuration.gin_directory()
FILES = sorted(path.relative_to(GIN).as_posix() for path in GIN.rglob("*.gin"))
LEAVES = sorted(
    path.name
    for path in GIN.glob("*.gin")
    if not path.name.startswith(("base", "convnext", "pseudo_label", "quickstart", "released"))
)
RELEASED = sorted(path.name for path in GIN.glob("released*.gin"))
FOLDERS = {
    name: sorted(f"{name}/{path.name}" for path in (GIN / name).glob("*.gin")) for name in ("objectives", "schedules")
}
# After any leaf.
OVERLAYS = ["data/cutmix.gin", "data/images.gin", "models/preact_resnet_18.gin", "presets/released_code.gin"]
OVERLAYS += ["data/mnist.gin", "data/svhn.gin", "scales/mini.gin", *FOLDERS["schedules"]]
# The paper says of these that they are there, or nothing: what is chosen, in the words of the headers.
CHOICES = {
    "momentum is .9": lambda name: True,
    "weight decay leaves BatchNorm's scale and offset alone": lambda name: True,
    "BatchNorm normalises groups of 4 images": lambda name: "80mti" not in name,
    "BatchNorm normalises groups of 32 images": lambda name: "80mti" in name,
    "in the attack too": lambda name: True,
    "drawn at random": lambda name: True,
    "every 1,000 steps": lambda name: "80mti" not in name,
    "every 250 steps": lambda name: "80mti" in name,
    "PGD-40 whose steps are Adam's": lambda name: "l2" not in name,
    "PGD-40 whose steps are those that gin/eval/pgd40_attack.gin gives for L2": lambda name: "l2" in name,
    "along the gradient divided by its L2 norm": lambda name: "l2" in name,
    "TRADES' beta is 6": lambda name: name.startswith(("trades", "best")),
    "MART's beta is 6": lambda name: name.startswith("mart"),
    "decay warms up": lambda name: name.startswith("best"),
    "averaged weights run with BatchNorm's live statistics": lambda name: name.startswith("best"),
    "labelled and extra images in the ratio of the batch": lambda name: "80mti" in name,
    "the classifier and the measure of duplicates": lambda name: name.startswith("best") and "80mti" in name,
    # Of the rows that are this recipe with other bindings.
    "leaky ReLU has slope .01": lambda name: name.startswith("at"),
    "GELU is the tanh approximation": lambda name: name.startswith("at"),
    "exponential schedule ends at a hundredth": lambda name: name.startswith("at"),
}
# TPU v3 core-hours of section 3.1: 1 h 30 min and 2 h on 32 cores.
CORE_HOURS = {"at.gin": 48, "at_80mti.gin": 64}


def header(name):
    """The comment that a file begins with, its lines joined."""
    text = (GIN / name).read_text().split("\n\n")[0]
    assert all(line.startswith("#") for line in text.splitlines())
    return " ".join(line.removeprefix("#").strip() for line in text.splitlines())


def commands(name):
    """The command lines in a header, as lists of words."""
    text = "\n".join(itertools.takewhile(lambda line: line.startswith("#"), (GIN / name).read_text().splitlines()))
    text = text.replace("\\\n#", " ")
    return [shlex.split(line.lstrip("# ")) for line in text.splitlines() if re.match(r"#\s+python scripts/", line)]


def bound(files, params=()):
    configuration.parse(files, params)
    return configuration.resolve(configuration.train)


def flag(words, name):
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_is(name):
    assert len(header(name)) > 30 and header(name)[0].isupper()


@pytest.mark.parametrize("name", LEAVES + RELEASED)
def test_a_leaf_has_its_command(name):
    (words, *_) = commands(name)
    assert words[:3] == ["python", "scripts/train.py", f"--gin_file=gin/{name}"]
    assert ("--data_dir=DIR" in words) == ("80mti" in name or "ddpm" in name)


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_has_the_papers_numbers(name):
    found = [row for row in rows.read() if row.files == (name,) and not row.bindings]
    for row in found:
        assert f"Table {row.table}," in header(name) or row.table not in (1, 5)
        for number in (row.clean, row.robust, *([row.pgd40] if row.table == 5 else [])):
            assert f" {number:.2f} " in header(name), number
    assert found and header(name).startswith("Gowal et al. 2020, Table ")


@pytest.mark.parametrize("name", LEAVES)
@pytest.mark.parametrize("choice", CHOICES)
def test_a_leaf_says_what_is_not_the_papers(name, choice):
    assert (choice in header(name)) == bool(CHOICES[choice](name))
    assert header(name).count("Not the paper's: ") == 1


@pytest.mark.parametrize("name", LEAVES + RELEASED)
def test_a_leaf_has_its_cost(name):
    (hours,) = (int(text) for text in re.findall(r"(\d+) (?:TPU v3 )?core-hours", header(name)))
    like = "at_80mti.gin" if "80mti" in name or "released" in name else "at.gin"

    def operations(leaf):
        recipe = bound([leaf]).recipe
        return costs.training_flops(
            costs.forward_flops(*(recipe.model.keywords[key] for key in ("depth", "width"))),
            batch_size=recipe.batches.keywords["batch_size"],
            num_steps=recipe.train_steps,
            attack_steps=recipe.attack.attack_fn.keywords["num_steps"],
            objective=recipe.objective.func.__name__,
            clean_prediction=recipe.attack.target == "clean_prediction",
        )

    assert hours == pytest.approx(CORE_HOURS[like] * operations(name) / operations(like), abs=0.51)


@pytest.mark.parametrize("name", FILES)
def test_commands_in_headers_work_as_they_stand(name):
    for words in commands(name):
        files, params = flag(words, "gin_file"), flag(words, "gin_param")
        if "scripts/train.py" in words:
            bound(files, params)
        elif "scripts/evaluate.py" in words:
            configuration.parse(files, params)
            configuration.resolve(configuration.evaluate)
        else:
            assert "scripts/pseudo_label.py" in words or "scripts/export.py" in words


@pytest.mark.parametrize("name", sorted({*itertools.chain(*FOLDERS.values()), *OVERLAYS, "data/cifar10_80mti.gin"}))
def test_what_is_combined_says_how(name):
    if name != "schedules/multistep.gin":  # What every leaf without extra data has; it names its siblings.
        assert any(f"--gin_file=gin/{name}" in words for words in commands(name))


@pytest.mark.parametrize("name", LEAVES)
def test_objectives_combine_with_every_recipe(name):
    for objective in ("at", "trades", "mart"):
        recipe = bound([name, f"objectives/{objective}.gin"]).recipe
        plain = bound([f"{objective}_80mti.gin" if "80mti" in name else f"{objective}.gin"]).recipe
        assert recipe.objective.func is plain.objective.func and recipe.attack.target == plain.attack.target
        assert recipe.attack.attack_fn.keywords["loss_fn"].func is plain.attack.attack_fn.keywords["loss_fn"].func
        assert recipe.averaging == bound([name]).recipe.averaging


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_fit_every_recipe(overlay):
    for name in LEAVES + RELEASED:
        bound([name, overlay])


def test_loss_activation_and_averaging_combine():
    params = ["ACTIVATION = 'swish'", "TAU = 0.99", "trades.beta = 4", "training/threat.epsilon = '8.8/255'"]
    recipe = bound(["at.gin", "objectives/trades.gin", "schedules/cosine.gin"], params).recipe
    assert recipe.model.keywords["activation"] == "swish" and recipe.averaging.tau == 0.99
    assert recipe.objective.keywords == {"beta": 4}


def test_plain_training_takes_the_attack_of_a_recipe_away():
    recipe = bound(["at.gin", "objectives/standard.gin"]).recipe
    assert recipe.attack is None and recipe.validation.best_by == "clean"
    assert recipe.objective.func.__name__ == "standard_training"


def test_activations_and_schedules_say_their_choices():
    assert "slope .01" in header("models/wrn_28_10.gin") and "tanh approximation" in header("models/wrn_28_10.gin")
    assert "hundredth of .1" in header("schedules/multistep.gin")


def test_the_released_codes_data_and_weights_are_named():
    said = header("presets/released_code.gin")
    for words in ("EXTRA_DATA = 'ddpm'", "--weights=last_averaged", "10:22", "4 // hosts", "batches.num_repeats = 4"):
        assert words in said


def test_no_gin_file_is_a_package():
    assert not list(pathlib.Path(GIN).rglob("*.py"))
