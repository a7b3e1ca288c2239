"""The versions' attacks and parameters, typed from upstream's `set_version` and constructors."""

import pytest

from robust_keras import threats
from robust_keras.attacks.attack import as_attack
from robust_keras.attacks.autoattack import autoattack, custom, plus, rand, standard

THREATS = {
    "Linf": threats.threat(norm="Linf", epsilon="8/255"),
    "L2": threats.threat(norm="L2", epsilon=0.5),
    "L1": threats.threat(norm="L1", epsilon=12),
}
APGD_CE = {
    "loss_fn": "cross_entropy",
    "num_steps": 100,
    "num_restarts": 1,
    "eot_steps": 1,
    "rho": 0.75,
    "shrinking_radius": False,
}
APGD_DLR = {**APGD_CE, "loss_fn": "dlr"}
APGD_T = {
    "num_targets": 9,
    "num_steps": 100,
    "num_restarts": 1,
    "eot_steps": 1,
    "rho": 0.75,
    "shrinking_radius": False,
}
FAB = {
    "num_steps": 100,
    "num_restarts": 5,
    "targeted": False,
    "num_targets": 9,
    "alpha_max": 0.1,
    "eta": 1.05,
    "beta": 0.9,
}
FAB_T = {**FAB, "num_restarts": 1, "targeted": True}
SQUARE = {"num_queries": 5000, "num_restarts": 1, "p_init": 0.8}

STANDARD = [("apgd-ce", APGD_CE), ("apgd-t", APGD_T), ("fab-t", FAB_T), ("square", SQUARE)]
STANDARD_L1 = [
    ("apgd-ce", {**APGD_CE, "num_restarts": 5, "shrinking_radius": True}),
    ("apgd-t", {**APGD_T, "num_targets": 5, "shrinking_radius": True}),
    ("fab-t", FAB_T),
    ("square", SQUARE),
]
PLUS = [
    ("apgd-ce", {**APGD_CE, "num_restarts": 5}),
    ("apgd-dlr", {**APGD_DLR, "num_restarts": 5}),
    ("fab", FAB),
    ("square", SQUARE),
    ("apgd-t", APGD_T),
    ("fab-t", FAB_T),
]
RAND = [("apgd-ce", {**APGD_CE, "eot_steps": 20}), ("apgd-dlr", {**APGD_DLR, "eot_steps": 20})]


def described(attacks, threat):
    """Names and complete parameters; all of them on this threat model."""
    records = [as_attack(attack) for attack in attacks]
    assert all(record.threat is threat for record in records)
    return [(record.name, record.parameters) for record in records]


@pytest.mark.parametrize(
    "version, norm, expected",
    [
        ("standard", "Linf", STANDARD),
        ("standard", "L2", STANDARD),
        ("standard", "L1", STANDARD_L1),
        *(("plus", norm, PLUS) for norm in THREATS),
        *(("rand", norm, RAND) for norm in THREATS),
    ],
)
def test_versions_have_upstreams_attacks_and_parameters(version, norm, expected):
    threat = THREATS[norm]
    assert described(autoattack(threat=threat, version=version), threat) == expected
    assert described({"standard": standard, "plus": plus, "rand": rand}[version](threat=threat), threat) == expected
    if version == "standard":
        assert described(autoattack(threat=threat), threat) == expected


def test_the_number_of_runs():
    def num_runs(attacks, num_classes):
        return [as_attack(attack).search.num_runs(num_classes) for attack in attacks]

    # Restarts times target classes.
    assert num_runs(standard(threat=THREATS["Linf"]), 10) == [1, 9, 9, 1]
    assert num_runs(standard(threat=THREATS["Linf"]), 100) == [1, 9, 9, 1]
    assert num_runs(standard(threat=THREATS["Linf"]), 3) == [1, 2, 2, 1]
    assert num_runs(standard(threat=THREATS["L1"]), 10) == [5, 5, 9, 1]
    assert num_runs(plus(threat=THREATS["L2"]), 10) == [5, 5, 5, 1, 9, 9]
    assert num_runs(rand(threat=THREATS["L2"]), 10) == [1, 1]


@pytest.mark.parametrize("norm", THREATS)
def test_custom_takes_attacks_by_name_in_the_given_order(norm):
    threat = THREATS[norm]
    for names in (["square", "fab-t"], ("apgd-dlr",), ["fab", "apgd-t", "apgd-ce", "apgd-dlr", "fab-t", "square"]):
        expected = [(name, dict(PLUS)[name]) for name in names]
        assert described(custom(threat=threat, attacks=names), threat) == expected
        assert described(autoattack(threat=threat, version="custom", attacks=names), threat) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(version="Standard"), "a version out of standard, plus, rand, custom. Received: 'Standard'"),
        (dict(version="custom"), "attacks out of apgd-ce, .*square. Received: None"),
        (dict(version="custom", attacks=[]), r"Received: \[\]"),
        (dict(version="custom", attacks="square"), "Received: 'square'"),
        (dict(version="custom", attacks=["square", "pgd"]), r"Received: \['square', 'pgd'\]"),
        (dict(version="plus", attacks=["square"]), r"'custom' alone. Received: \['square'\] with 'plus'"),
        (dict(attacks=["square"]), r"'custom' alone. Received: \['square'\] with 'standard'"),
    ],
)
def test_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        autoattack(threat=THREATS["Linf"], **settings)
