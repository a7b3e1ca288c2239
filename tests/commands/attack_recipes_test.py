"""The attacks that Python names and those that the recipes in gin/eval bind are the same ones."""

import pytest

from robust_keras.attacks import presets
from robust_keras.attacks.attack import as_attack
from robust_keras.commands import configuration

RECIPES = {
    "standard": ("eval/autoattack.gin", []),
    "plus": ("eval/autoattack.gin", ["autoattack.version = 'plus'"]),
    "rand": ("eval/autoattack.gin", ["autoattack.version = 'rand'"]),
    "aa+mt": ("eval/aa_mt.gin", []),
    "pgd40": ("eval/pgd40.gin", []),
    "pgd20": ("eval/pgd20.gin", []),
}


def described(attacks):
    return [(each.name, each.parameters, each.threat[:3]) for each in map(as_attack, attacks)]


@pytest.mark.parametrize("norm, epsilon", [("Linf", "8/255"), ("L2", "128/255"), ("L1", "12")])
@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_is_its_recipe_attack_by_attack(name, norm, epsilon):
    recipe, bindings = RECIPES[name]
    configuration.parse([recipe], [*bindings, f"NORM = '{norm}'", f"EPSILON = '{epsilon}'"])
    bound = configuration.resolve(configuration.evaluate).keywords
    preset = presets.choose(name, threat=bound["threat"])
    assert described(preset.attacks) == described(bound["attacks"])
    baselines = [[each] if each else [] for each in (preset.baseline, bound.get("baseline"))]
    assert described(baselines[0]) == described(baselines[1])
