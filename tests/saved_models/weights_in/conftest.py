"""Networks of the authors' code, recorded, and small ones made up."""

import json
import pathlib

import numpy as np
import pytest

from robust_keras.saved_models.weights_in import checkpoint, networks, selection
from tests.oracles import checkpoint_inputs

ORACLES = pathlib.Path(__file__).parents[2] / "oracles"


@pytest.fixture(scope="session")
def recorded():
    """`recorded(library)[name]`: what the authors' code of a library gave, 'torch' or 'haiku'."""
    return {library: dict(np.load(ORACLES / f"checkpoints_{library}.npz")) for library in ("torch", "haiku")}


@pytest.fixture(scope="session")
def recorded_weights(recorded):
    """`recorded_weights(library, name)`: the arrays that a recorded network had, by its own names."""

    def weights(library, name):
        return checkpoint_inputs.weights(json.loads(str(recorded[library][f"{name}/weights"])))

    return weights


@pytest.fixture(scope="session")
def imported():
    """`imported(path, dataset, activation, key=None)`: (network, what was found, its architecture)."""

    def imported(path, dataset="cifar10", activation="silu", key=None):
        with checkpoint.opened(path) as opened:
            found = selection.find(opened, key)
            made = networks.architecture(found, dataset, activation)
            return networks.load(found, made), found, made

    return imported
