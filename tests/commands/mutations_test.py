"""Changing each macro of a recipe changes the program, the schedule or the first loss: nothing is bound in vain."""

import functools
import re

import first_steps
import pytest

from robust_keras.commands import configuration
from robust_keras.training.weight_averaging import averaging_decay

GIN = configuration.gin_directory()
LEAVES = sorted(path.name for path in GIN.glob("*.gin") if not path.name.startswith(("base", "pseudo_label")))
SMALL = {
    "DEPTH": "10",
    "WIDTH": "1",
    "BATCH_SIZE": "16",
    "STATISTICS_GROUP_SIZE": "8",
    "training/pgd.num_steps": "1",
}
# Another value of each macro, and what it changes, out of `SEEN`.
MUTATIONS = {
    "NORM": ("'L2'", "loss"),
    "EPSILON": ("'4/255'", "loss"),
    "DATASET": ("'cifar100'", "data"),
    "EXTRA_DATA": ("'ddpm'", "data"),
    "DEPTH": ("16", "parameters"),
    "WIDTH": ("2", "parameters"),
    "ACTIVATION": ("'gelu'", "loss"),
    "BATCH_SIZE": ("32", "batch"),
    "TRAIN_STEPS": ("100", "rates"),
    "TAU": ("0.9", "averages"),
    "SEED": ("7", "batch"),
    "STATISTICS_GROUP_SIZE": ("16", "loss"),
}
# Of gin/convnext_tiny.gin, which has a network and images of its own.
OF_IMAGES = {
    "APPLICATION": ("'ResNet50'", lambda recipe: recipe.model.keywords["name"]),
    "IMAGE_SIZE": ("64", lambda recipe: (recipe.data.keywords["image_size"], recipe.batches.keywords["augmentation"])),
}
DATA = first_steps.training_data()


def rate(recipe):
    return functools.partial(recipe.optimizer.learning_rate, num_steps=recipe.train_steps)


def averages(recipe):
    tau = recipe.averaging and recipe.averaging.tau
    return tau and [float(averaging_decay(step, tau=tau)) for step in (0, 100, 10_000)]


def batch(recipe):
    return next(iter(recipe.batches(DATA, seed=recipe.seed, num_steps=1)))


# What a recipe comes to, seen from outside of gin.
SEEN = {
    "loss": lambda recipe: first_steps.loss(recipe, DATA, batch(recipe), rate(recipe)),
    "parameters": lambda recipe: recipe.model(
        num_classes=10, mean=DATA.mean, std=DATA.std, input_shape=(8, 8, 3)
    ).count_params(),
    "rates": lambda recipe: [float(rate(recipe)(step)) for step in (0, 60, 80, 20_000, 70_000)],
    "averages": averages,
    "batch": lambda recipe: batch(recipe)["image"].numpy().tobytes(),
    "data": lambda recipe: [recipe.data.keywords[name] for name in ("dataset", "extra_data")],
}


def seen(kind, **changes):
    """`SEEN[kind]` of at.gin in small."""
    configuration.parse(["at.gin"], [f"{name} = {value}" for name, value in {**SMALL, **changes}.items()])
    return SEEN[kind](configuration.resolve(configuration.train).recipe)


@pytest.fixture(scope="module")
def unchanged():
    return {kind: seen(kind) for kind in SEEN}


@pytest.mark.parametrize("macro", MUTATIONS)
def test_changing_a_macro_changes_the_run(macro, unchanged):
    value, kind = MUTATIONS[macro]
    assert seen(kind, **{macro: value}) != unchanged[kind]


def test_the_same_recipe_is_the_same_run(unchanged):
    assert {kind: seen(kind) for kind in SEEN} == unchanged


@pytest.mark.parametrize("recipe", LEAVES)
def test_every_recipe_binds_the_macros_that_people_change(recipe):
    configuration.parse([recipe])
    bound = set(re.findall(r"^([A-Z]\w*) =", configuration.gin.config_str(), re.M))
    assert bound == (
        set(MUTATIONS) - {"DEPTH", "WIDTH", "ACTIVATION"} | set(OF_IMAGES) if "conv" in recipe else set(MUTATIONS)
    )


@pytest.mark.parametrize("macro", OF_IMAGES)
def test_changing_a_macro_of_the_imagenet_recipe_changes_the_run(macro):
    value, look = OF_IMAGES[macro]
    found = []
    for params in ([], [f"{macro} = {value}"]):
        configuration.parse(["convnext_tiny.gin"], params)
        found.append(look(configuration.resolve(configuration.train).recipe))
    assert found[0] != found[1]
