import functools

import pytest

import robust_keras as rk
from robust_keras import threats
from robust_keras.attacks import presets
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import as_attack

LINF = threats.threat(norm="Linf", epsilon="8/255")


def names(attacks):
    return [each.name for each in map(as_attack, presets.choose(attacks, threat=LINF).attacks)]


def test_names():
    every = ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "multi-targeted"]
    assert names(every) == every
    assert names("square") == ["square"] and names(["pgd40", "pgd20"]) == ["pgd", "pgd"]
    assert names("aa+mt") == ["apgd-ce", "apgd-dlr", "multi-targeted"]


def own(logits_fn, x, labels, *, seeds):
    return x


def within(logits_fn, x, labels, *, seeds, threat):
    return x + threat.epsilon


def test_functions_are_bound_to_the_threat_model_that_they_take():
    few = functools.partial(apgd, num_steps=3)
    other = threats.threat(norm="Linf", epsilon="4/255")
    bound = functools.partial(apgd, threat=other)
    public = functools.partial(rk.attacks.apgd, num_steps=7)
    given = [few, own, within, bound, rk.attacks.square, public, as_attack(bound)]
    found = [as_attack(each) for each in presets.choose(given, threat=LINF).attacks]
    assert [each.name for each in found] == ["apgd-ce", "own", "within", "apgd-ce", "square", "apgd-ce", "apgd-ce"]
    assert [each.threat and each.threat.epsilon_fraction for each in found] == [
        "8/255",
        None,
        "8/255",
        "4/255",
        "8/255",
        "8/255",
        "4/255",
    ]
    assert (found[0].parameters["num_steps"], found[5].parameters["num_steps"]) == (3, 7)
    assert names(own) == ["own"]


@pytest.mark.parametrize("attacks", ["autoattack", ["standard"], ["pgd", "square"], [], None, 5])
def test_others_are_refused(attacks):
    with pytest.raises(ValueError, match=r"Expected attacks.* Received: ") as refusal:
        presets.choose(attacks, threat=LINF)
    assert "\n" not in str(refusal.value)
