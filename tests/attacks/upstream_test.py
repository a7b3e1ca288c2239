"""Verdicts on CIFAR-10 images are those of the reference implementation, from the same starts.

What is compared with was recorded by `tests/oracles/record_upstream_verdicts.py`.
"""

import functools
import importlib
import pathlib

import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, noise, threats
from robust_keras.attacks.apgd import apgd
from robust_keras.attacks.attack import as_attack
from robust_keras.attacks.autoattack import standard
from robust_keras.attacks.fab import fab
from robust_keras.evaluation import batching
from robust_keras.evaluation.examples import Examples
from robust_keras.models import wide_resnet

RECORDED = dict(np.load(pathlib.Path(__file__).parent.parent / "oracles" / "upstream_verdicts.npz"))
EPSILONS = {"Linf": "8/255", "L2": "128/255", "L1": 12}


@pytest.fixture(scope="module")
def network():
    """The recorded WRN-10-1."""
    model = wide_resnet.wide_resnet(
        depth=10,
        width=1,
        activation="silu",
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2471, 0.2435, 0.2616),
        input_shape=(32, 32, 3),
    )
    for variable in model.variables:
        variable.assign(RECORDED[f"weights/{variable.path}"])
    return lambda x: model(x, training=False)


def recorded_starts(norm, num_runs):
    """What upstream's starts were made of, `[num_runs, num_images, 32, 32, 3]`."""
    shape = RECORDED["images"].shape
    generators = [np.random.default_rng([run, 0 if norm == "Linf" else 1]) for run in range(num_runs)]
    if norm == "Linf":
        return np.stack([2 * generator.random(shape, np.float32) - 1 for generator in generators])
    return np.stack([generator.standard_normal(shape, np.float32) for generator in generators])


def make_attack(name, norm):
    threat = threats.threat(norm=norm, epsilon=EPSILONS[norm])
    if name == "apgd-dlr":
        return functools.partial(apgd, threat=threat, loss_fn=losses.dlr)
    if name == "apgd-ce":
        return functools.partial(apgd, threat=threat, shrinking_radius=norm == "L1")
    if name == "fab":
        return functools.partial(fab, threat=threat, num_restarts=1)
    return dict(zip(("apgd-ce", "apgd-t", "fab-t"), standard(threat=threat)))[name]


def test_logits(network):
    logits = network(tf.constant(RECORDED["images"], tf.float32) / 255.0)
    np.testing.assert_allclose(logits, RECORDED["logits"], atol=1e-4)


@pytest.mark.parametrize(
    "norm, name",
    [
        ("Linf", "apgd-ce"),
        ("L2", "apgd-ce"),
        ("L1", "apgd-ce"),
        pytest.param("Linf", "apgd-dlr", marks=pytest.mark.slow),
        pytest.param("Linf", "apgd-t", marks=pytest.mark.slow),
        pytest.param("L2", "apgd-t", marks=pytest.mark.slow),
        pytest.param("L1", "apgd-t", marks=pytest.mark.slow),
        pytest.param("Linf", "fab", marks=pytest.mark.slow),
        pytest.param("Linf", "fab-t", marks=pytest.mark.slow),
        pytest.param("L2", "fab-t", marks=pytest.mark.slow),
        pytest.param("L1", "fab-t", marks=pytest.mark.slow),
    ],
)
def test_verdicts(network, monkeypatch, norm, name):
    starts = tf.constant(recorded_starts(norm, 9))

    def draw(seeds, shape, *_):
        return tf.gather_nd(starts, seeds[:, ::-1])  # By run and example.

    # Seeds hold an example's index, and in the end its run.
    monkeypatch.setattr(
        noise, "fold_in", lambda seeds, data: tf.stack([seeds[:, 0], 0 * seeds[:, 0] + tf.cast(data, tf.int32)], 1)
    )
    monkeypatch.setattr(noise, "example_seeds", lambda seed, step, indices: tf.stack([indices, indices], 1))
    norms = importlib.import_module("robust_keras.attacks.apgd")._NORMS
    monkeypatch.setitem(norms, norm, norms[norm]._replace(draw=draw))
    monkeypatch.setattr(importlib.import_module("robust_keras.attacks.fab"), "start_noise", draw)
    images, labels = RECORDED["images"], RECORDED["labels"]
    examples = Examples(images, labels, RECORDED["logits"])
    attack = as_attack(make_attack(name, norm))
    work = batching.Packing(attack, network, examples, np.arange(len(labels)), batching.Batches(32))
    while work.advance() is not None:
        pass
    expected = RECORDED[f"{norm} {name}"]
    assert 0 < expected.sum() < len(expected)  # Else agreement would say little.
    assert (~work.broken != expected).sum() <= 1
