"""Networks out of a run: all their weights, whatever Keras calls them."""

import json
import os

import keras
import numpy as np
import pytest

from robust_keras import storage
from robust_keras.models import weights as named_weights
from robust_keras.saved_models import export, load


@pytest.fixture
def run(tmp_path, linear):
    """A run's folder: every weight is 1 in the best snapshot, 2 in the newest, 3 in its average."""
    description = {"architecture": linear.to_json(), "weights": "averaged", "dataset": "digits"}
    best = {"step": 40, "metrics": {"val_robust_averaged": 0.5}}
    last = {"step": 60, "metrics": {"val_robust_averaged": 0.4}}

    def filled(prefix, value):
        return {f"{prefix}{w.path}": np.full(w.shape, value, np.float32) for w in linear.weights}

    workdir = tmp_path / "run"
    storage.write(workdir / "best", 40, filled("", 1), {"best": best, "description": description})
    arrays = {"step": np.int64(60), **filled("weights/", 2), **filled("averages/", 3), **filled("momentum/", 4)}
    info = {"rows": [], "best": best, "last_validation": last, "description": description}
    storage.write(workdir / "checkpoints", 60, {**arrays, **filled("best/", 1)}, info)
    (workdir / "config.gin").write_text("TAU = 0.995\n")
    return str(workdir)


@pytest.mark.parametrize(
    "weights, value, step, kind",
    [("best", 1, 40, "averaged"), ("last", 2, 60, "raw"), ("last_averaged", 3, 60, "averaged")],
)
def test_network_of_a_run(run, weights, value, step, kind):
    network, card = export.network_of_run(run, weights)
    for weight in network.weights:
        np.testing.assert_array_equal(weight.numpy(), np.full(weight.shape, value))
    assert (card["step"], card["weights"], card["dataset"]) == (step, kind, "digits")
    assert card["config"] == "TAU = 0.995\n" and card["validation"]["best"]["step"] == 40
    assert "architecture" not in card
    json.dumps(card)


def test_network_of_a_run_without_such_weights(run, tmp_path):
    with pytest.raises(ValueError, match=f"best weights. Received: {tmp_path}"):
        export.network_of_run(str(tmp_path))
    checkpoints = os.path.join(run, "checkpoints")
    newest = storage.read_newest(checkpoints)
    arrays = {name: array for name, array in newest.arrays.items() if not name.startswith("averages/")}
    storage.write(checkpoints, 60, arrays, newest.info)
    with pytest.raises(ValueError, match="last_averaged weights"):
        export.network_of_run(run, "last_averaged")
    export.network_of_run(run, "last")


def test_a_run_that_was_started_from_python_is_exported(run):
    os.remove(os.path.join(run, "config.gin"))
    _, card = export.network_of_run(run)
    assert card["config"] is None and card["step"] == 40


def test_other_names_of_weights_are_refused(run):
    with pytest.raises(ValueError, match="best, last, last_averaged. Received: 'newest'"):
        export.network_of_run(run, "newest")


def test_an_architecture_of_unknown_classes_is_refused_in_a_line(run):
    best = storage.read_newest(os.path.join(run, "best"))
    description = best.info["description"]
    description["architecture"] = description["architecture"].replace('"Dense"', '"Sparse"')
    storage.write(os.path.join(run, "best"), best.step, best.arrays, best.info)
    with pytest.raises(ValueError, match=f"Expected a network of classes.*Received: {run}.*Sparse") as caught:
        export.network_of_run(run)
    assert "\n" not in str(caught.value)


@pytest.fixture
def twins():
    """Two nested models, whose layers bear the same names: Keras tells their weights by one path."""

    def block():
        image = keras.Input((3,))
        return keras.Model(image, keras.layers.Dense(3, name="inner")(image))

    image = keras.Input((4, 4, 3))
    x = keras.layers.GlobalAveragePooling2D()(image)
    network = keras.Model(image, block()(block()(x)))
    for k, weight in enumerate(network.weights):
        weight.assign(np.full(weight.shape, k + 1.0))
    assert len({weight.path for weight in network.weights}) == 2 < len(network.weights) == 4
    return network


def test_weights_of_nested_models_are_all_kept(tmp_path, twins):
    path = str(tmp_path / "model.keras")
    twins.save(path)
    loaded = load.load_weights(path)
    assert sorted(float(array.max()) for array in loaded.values()) == [1.0, 2.0, 3.0, 4.0]
    description = {"architecture": twins.to_json()}
    storage.write(tmp_path / "run" / "best", 3, loaded, {"description": description})
    network, _ = export.network_of_run(str(tmp_path / "run"))
    for weight, original in zip(network.weights, twins.weights, strict=True):
        np.testing.assert_array_equal(weight.numpy(), original.numpy())


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_weights_that_are_not_all_there_are_refused(tmp_path, twins, change):
    """An older release kept one of the weights that share a path."""
    arrays = {weight.path: weight.numpy() for weight in twins.weights}
    if change == "unknown":
        arrays = named_weights.by_name(twins) | {"other/kernel": np.zeros((3, 3), np.float32)}
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
    storage.write(tmp_path / "best", 3, arrays, {"description": {"architecture": twins.to_json()}})
    with pytest.raises(
        ValueError, match=f"weights of this network. Received: {'inner' if change == 'missing' else 'other'}"
    ):
        export.network_of_run(str(tmp_path))


@pytest.mark.parametrize("info", [{}, {"description": []}, {"description": {}}])
def test_weights_of_something_else_are_refused(tmp_path, info):
    storage.write(tmp_path / "best", 1, {"kernel": np.zeros(3)}, info)
    with pytest.raises(ValueError, match=f"Expected the weights of a run in {tmp_path}/best. Received: others"):
        export.network_of_run(str(tmp_path))
