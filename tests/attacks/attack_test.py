"""Attacks as records."""

import functools
import json

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks import attack, step_rules, transfer
from robust_keras.attacks.apgd import apgd, apgd_targeted
from robust_keras.attacks.autoattack import standard
from robust_keras.attacks.fab import fab
from robust_keras.attacks.multi_targeted import multi_targeted
from robust_keras.attacks.pgd import pgd
from robust_keras.attacks.square import square

LINF = threats.threat(norm="Linf", epsilon="8/255")


def own(logits_fn, x, labels, *, seeds, by=1.0):
    return x + by


class WithName:
    name = "with-name"

    def __call__(self, logits_fn, x, labels, *, seeds):
        return x


def test_a_search():
    record = attack.as_attack(functools.partial(fab, threat=LINF, targeted=True))
    assert (record.name, record.threat) == ("fab-t", LINF)
    assert (record.search.name, record.search.num_steps) == ("fab-t", 100)
    assert "threat" not in record.parameters and record.parameters["num_targets"] == 9
    assert attack.as_attack(record) is record


def test_plain_functions():
    settings = {"loss_fn": functools.partial(losses.margin), "num_steps": 3, "step_size": "2/255"}
    record = attack.as_attack(functools.partial(pgd, threat=LINF, step_rule=step_rules.adam(), **settings))
    assert (record.name, record.threat, record.search) == ("pgd", LINF, None)
    assert record.loss_fn is settings["loss_fn"] and record.parameters["loss_fn"] == "margin"
    assert record.parameters["step_rule"].startswith("adam(")
    for function, name, parameters in ((own, "own", {"by": 1.0}), (WithName(), "with-name", {})):
        record = attack.as_attack(function)
        assert record == attack.Attack(name, None, parameters, function, None, None)


def test_it_runs_as_what_was_given():
    x = tf.zeros((1, 2, 2, 1))
    np.testing.assert_array_equal(
        attack.as_attack(functools.partial(own, by=2.0)).run(None, x, None, seeds=None), x + 2
    )


@pytest.mark.parametrize(
    "given, message",
    [
        (functools.partial(own, "logits"), "bound by keyword. Received: .'logits',."),
        (3, "a function with a name. Received: 3"),
        ("pgd40", "a function with a name. Received: 'pgd40'"),
        (functools.partial(square, threat=LINF, num_queries=0), "num_queries"),
        (functools.partial(pgd, threat=LINF, num_steps=10), "settings of pgd. Received: none for loss_fn$"),
        (apgd, "Received: none for threat$"),
    ],
)
def test_what_is_none_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        attack.as_attack(given)


def test_parameters_are_json_whatever_they_are():
    settings = {
        "nan": float("nan"),
        "numpy": np.float32(0.5),
        "nested": [(1, functools.partial(pgd, num_steps=3, threat=LINF))],
        "table": {1: own},
        "object": object(),
    }
    parameters = attack.as_attack(functools.partial(own, **settings)).parameters
    assert json.loads(json.dumps(parameters, allow_nan=False)) == {
        "by": 1.0,
        "nan": "nan",
        "numpy": 0.5,
        "nested": [[1, "pgd(num_steps=3)"]],
        "table": {"1": "own"},
        "object": "object",
    }


@pytest.mark.parametrize(
    "given, expected",
    [
        (functools.partial(apgd, threat=LINF), losses.cross_entropy),
        (functools.partial(apgd, threat=LINF, loss_fn=losses.dlr), losses.dlr),
        (functools.partial(fab, threat=LINF), losses.margin),
        (functools.partial(multi_targeted, threat=LINF), losses.margin),
        (functools.partial(pgd, threat=LINF, loss_fn=losses.dlr, num_steps=1, step_size=1), losses.dlr),
        (
            functools.partial(apgd_targeted, threat=LINF),
            # The first target is the strongest wrong class: here the second, of logits 5 and 3.
            lambda logits, labels: losses.targeted_dlr(logits, labels, tf.constant([1])),
        ),
    ],
)
def test_the_loss_that_an_attack_follows(given, expected):
    logits, labels = tf.constant([[5.0, 3.0, 2.0, 1.0, 0.5]]), tf.constant([0])
    np.testing.assert_allclose(attack.as_attack(given).loss_fn(logits, labels), expected(logits, labels))


def test_attacks_that_follow_no_loss():
    for given in (
        functools.partial(square, threat=LINF),
        functools.partial(transfer.transfer, threat=LINF, surrogate=own, attack=own),
        own,
    ):
        assert attack.as_attack(given).loss_fn is None


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_the_attacks_of_autoattack_are_records_too(norm):
    threat = threats.threat(norm=norm, epsilon=0.1)
    names = [attack.as_attack(each).name for each in standard(threat=threat)]
    assert names == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("count", [0, -1, 2.0, 2.5, True, "3", None])
@pytest.mark.parametrize(
    "function, name",
    [
        (pgd, "num_steps"),
        (pgd, "num_restarts"),
        (multi_targeted, "num_targets"),
        (apgd, "eot_steps"),
        (apgd_targeted, "num_targets"),
        (fab, "num_steps"),
        (square, "num_queries"),
    ],
)
def test_counts_are_whole_numbers(function, name, count):
    settings = {"loss_fn": losses.margin, "num_steps": 2} if function is pgd else {}
    with pytest.raises(ValueError, match=r"^Expected whole numbers [\w, ]+ >= 1\. Received: .*$") as error:
        attack.as_attack(functools.partial(function, **{"threat": LINF, **settings, name: count}))
    assert name in str(error.value) and repr(count) in str(error.value)
    attack.as_attack(functools.partial(function, **{"threat": LINF, **settings, name: np.int64(1)}))
