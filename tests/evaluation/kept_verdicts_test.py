"""Results and states that somebody else wrote: what does not hold for the model is named."""

import json

import numpy as np
import pytest

import robust_keras as rk
from robust_keras import storage
from robust_keras.evaluation import batching

BYTES = np.random.default_rng(3).integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def network(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def labels(network):
    found = network.predict(BYTES / np.float32(255), verbose=0).argmax(axis=-1)
    return np.where(np.arange(24) == 5, (found + 1) % 4, found)  # One is wrong from the start.


def evaluated(network, labels, workdir, **options):
    attack = rk.attacks.pgd
    given = {"norm": "Linf", "epsilon": "2/255", "attacks": [attack], "diagnose": False, "save_every": 0.0}
    return rk.evaluate(network, (BYTES, labels), workdir=str(workdir), batch_size=8, **given, **options)


@pytest.fixture(scope="module")
def finished(network, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    found = evaluated(network, labels, folder)
    assert 0 < found.robust_accuracy < found.clean_accuracy < 1
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(finished, tmp_path):
    for name, data in finished.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def first(arrays, broken_by):
    return np.flatnonzero(arrays["broken_by"] == broken_by)[0]


def robust_by_word(results, arrays):
    arrays["broken_by"][arrays["broken_by"] > 0] = -1
    arrays["robust"][:] = arrays["broken_by"] < 0


def outside(results, arrays):
    arrays["adversarial"][first(arrays, 1)] = 1.0 - np.round(arrays["adversarial"][first(arrays, 1)])


def clean(results, arrays):
    arrays["adversarial"][first(arrays, 1)] = BYTES[first(arrays, 1)] / np.float32(255)


def not_finite(results, arrays):
    arrays["adversarial"][first(arrays, 1), 0, 0, 0] = np.nan


def broken_by_word(results, arrays):
    arrays["broken_by"][first(arrays, -1)] = 1
    arrays["robust"][:] = arrays["broken_by"] < 0


def wrong_by_word(results, arrays):
    arrays["broken_by"][first(arrays, -1)] = 0
    arrays["robust"][:] = arrays["broken_by"] < 0


def right_by_word(results, arrays):
    arrays["broken_by"][5] = -1
    arrays["robust"][5] = True


def change(**values):
    return lambda results, arrays: results.update(values)


def array(name, value):
    return lambda results, arrays: arrays.update({name: value})


_THE_MODEL = "Expected verdicts of this model in .*Received: image"
FORGERIES = {
    "robust by word": (robust_by_word, f"{_THE_MODEL} .* with another image where nothing broke it"),
    "outside of the ball": (outside, f"{_THE_MODEL} .* which it is not by what was kept"),
    "clean images": (clean, f"{_THE_MODEL} .* which it is not by what was kept"),
    "no numbers": (not_finite, f"{_THE_MODEL} .* which it is not by what was kept"),
    "broken by word": (broken_by_word, f"{_THE_MODEL} .* which it is not by what was kept"),
    "wrong by word": (wrong_by_word, f"{_THE_MODEL} .* as right, or wrong, before any attack"),
    "right by word": (right_by_word, f"{_THE_MODEL} 5 as right, or wrong, before any attack"),
    "robust accuracy": (change(robust_accuracy=0.99), "Expected robust_accuracy = .* Received: robust_accuracy = 0.99"),
    "clean accuracy": (change(clean_accuracy=1.0), "Received: clean_accuracy = 1.0"),
    "after an attack": (
        change(robust_accuracy_after=[{"attack": "pgd", "robust_accuracy": 1.0}]),
        "robust_accuracy_after",
    ),
    "another attack": (
        change(robust_accuracy_after=[{"attack": "apgd-t\x1b[2J", "robust_accuracy": 1.0}]),
        r"\\x1b\[2J",
    ),
    "interval": (change(confidence_interval_95=[0.9, 0.99]), "confidence_interval_95"),
    "number of images": (change(num_examples=10_000), "num_examples = 10000"),
    "nothing to tell": (
        lambda results, arrays: results.pop("warnings"),
        "results of an evaluation in .*Received: others",
    ),
    "no words": (change(warnings=7), "results of an evaluation in .*Received: something else"),
    "no places": (lambda results, arrays: arrays.pop("index"), "examples of an evaluation in .*none named index"),
    "other labels": (array("label", np.zeros(24, np.int64)), "of another label, place, or attack"),
    "fewer": (array("robust", np.ones(3, bool)), r"examples of this evaluation in .*robust, bool \(3,\)"),
    "text": (array("broken_by", np.full(24, "x")), "examples of this evaluation in .*broken_by"),
    "an attack too many": (array("broken_by", np.full(24, 9)), "of another label, place, or attack"),
    "other predictions": (array("clean_prediction", np.full(24, 3)), "with another prediction"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_results_are_refused(network, labels, folder, name):
    forge, match = FORGERIES[name]
    results = json.loads((folder / "results.json").read_text())
    arrays = dict(np.load(folder / "examples.npz"))
    forge(results, arrays)
    storage.write_json(folder / "results.json", results)
    storage.write_arrays(folder / "examples.npz", arrays)
    with pytest.raises(ValueError, match=match) as error:
        evaluated(network, labels, folder)
    assert str(error.value).isprintable()


def test_what_holds_is_said_to_be_read(network, labels, folder, monkeypatch, capsys):
    monkeypatch.setattr(batching, "work_of", None)  # Nothing is attacked.
    found = evaluated(network, labels, folder)
    said = capsys.readouterr().out
    assert "results.json; these numbers are read from this file, no attack was run" in said
    num_broken = int((found.examples["broken_by"] > 0).sum())
    assert f"The {num_broken} adversarial images that were kept still break the model" in said


class Interrupted(Exception):
    pass


@pytest.fixture
def state(network, labels, tmp_path, monkeypatch):
    """Of an evaluation that stopped when all that was left was to write its results."""
    with monkeypatch.context() as patch:
        patch.setattr("robust_keras.evaluation.results.conclude", lambda *args: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            evaluated(network, labels, tmp_path)
    return tmp_path / "state"


def rewritten(state, change):
    newest = storage.read_newest(state)
    info, arrays = dict(newest.info), dict(newest.arrays)
    change(info, arrays)
    storage.commit(str(state / f"step-{newest.step:08d}"), arrays, info)


def nothing_broken(info, arrays):
    arrays["broken"][:] = False
    info["num_pieces"] = 0


STATES = {
    "broken by word": (
        lambda info, arrays: arrays["broken"].fill(True),
        "as broken by attack 1, without what broke it",
    ),
    "no piece": (lambda info, arrays: info.update(num_pieces=0), "without what broke it"),
    "before the first": (lambda info, arrays: info.update(position=-3), "of attack -2"),
    "after the last": (lambda info, arrays: info.update(position=7), "of attack 8"),
    "text": (lambda info, arrays: arrays.update(broken=np.full((1, 24), "x")), "of shape"),
    "many pieces": (lambda info, arrays: info.update(num_pieces=10**9), "adversarial-00000"),
}


@pytest.mark.parametrize("name", STATES)
def test_a_forged_state_is_refused(network, labels, state, name):
    change, match = STATES[name]
    rewritten(state, change)
    with pytest.raises(ValueError, match=match):
        evaluated(network, labels, state.parent)


def test_images_of_a_state_have_to_break_the_model(network, labels, state, capsys):
    path = state / "adversarial-000000.npz"
    piece = dict(np.load(path))
    storage.write_arrays(path, {**piece, "images": BYTES[piece["indices"]] / np.float32(255)})
    with pytest.raises(ValueError, match=f"Expected verdicts of this model in {state}.*which attack 1 did not break"):
        evaluated(network, labels, state.parent)
    storage.write_arrays(path, piece)
    evaluated(network, labels, state.parent)
    assert f"No attack is left to run; what came before is read from {state}" in capsys.readouterr().out


def test_a_state_that_keeps_nothing_is_said_to_be_read(network, labels, state, capsys):
    """Nothing speaks against it but an attack."""
    rewritten(state, nothing_broken)
    evaluated(network, labels, state.parent)
    assert "No attack is left to run; what came before is read from" in capsys.readouterr().out
