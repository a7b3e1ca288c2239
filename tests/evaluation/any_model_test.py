"""Evaluations from Python: of any model and data, in a folder or in none."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras.commands import evaluate as command
from robust_keras.data import sources
from robust_keras.evaluation import any_model, batching, data_forms, report
from robust_keras.saved_models import export

pytestmark = pytest.mark.oldest

BYTES = np.random.RandomState(1).randint(0, 256, (12, 8, 8, 3)).astype(np.uint8)
X = BYTES / np.float32(255)
FEW = functools.partial(rk.attacks.apgd, num_steps=6)
QUICK = {"norm": "Linf", "epsilon": "3/255", "attacks": [FEW], "batch_size": 4, "progress": False, "diagnose": False}


@pytest.fixture(scope="module")
def network(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def labels(network):
    """Of the images, two of them wrong."""
    found = np.argmax(network(X, training=False), axis=-1)
    found[[3, 8]] = (found[[3, 8]] + 1) % 4
    return found


@pytest.fixture(scope="module")
def quick(network, labels):
    """The evaluation that others are compared with."""
    return any_model.evaluate(network, (BYTES, labels), **QUICK)


def evaluated(network, data, **changes):
    return any_model.evaluate(network, data, **{**QUICK, **changes})


def assert_same(one, other):
    for name, array in other.examples.items():
        # Margins are of another graph's rounding.
        atol = 1e-5 if name == "clean_margin" else 0
        np.testing.assert_allclose(one.examples[name], array, atol=atol, rtol=0, err_msg=name)
    assert one.robust_accuracy == other.robust_accuracy and one.warnings == other.warnings


def test_what_it_returns(quick, labels):
    assert quick.clean_accuracy == 10 / 12 > quick.robust_accuracy > 0
    assert quick.robust_accuracy_after == {"apgd-ce": quick.robust_accuracy}
    assert quick.confidence_interval_95[0] < quick.robust_accuracy < quick.confidence_interval_95[1]
    assert quick.warnings == [] and quick.examples["adversarial"].shape == BYTES.shape
    assert repr(quick) == str(quick) and "robust accuracy (an upper bound of the true one)" in str(quick)
    assert json.loads(json.dumps(quick.results)) == quick.results
    np.testing.assert_array_equal(quick.examples["label"], labels)
    assert {"model", "dataset", "versions"} <= quick.results.keys()


def test_verdicts_are_those_of_the_command_on_the_export(network, labels, tmp_path):
    export.export(network, tmp_path / "saved_model", card={})
    np.savez(tmp_path / "images.npz", image=BYTES, label=labels)
    files = {"saved_model": str(tmp_path / "saved_model"), "dataset": f"npz:{tmp_path}/images.npz"}
    bindings = ["evaluate.batch_size = 4", "evaluate.progress = False", "EPSILON = '3/255'", "evaluate.baseline = None"]
    few = ["multi_targeted.num_restarts = 1", "multi_targeted.num_steps = 5", "evaluate.diagnose = False"]
    where = str(tmp_path / "measured")
    theirs = command.run(**files, gin_files=["eval/aa_mt.gin"], workdir=where, gin_params=[*bindings, *few])
    attacks = [
        functools.partial(rk.attacks.apgd, num_restarts=5),
        functools.partial(rk.attacks.apgd, loss_fn=rk.losses.dlr, num_restarts=5),
        functools.partial(rk.attacks.multi_targeted, num_restarts=1, num_steps=5),
    ]
    ours = evaluated(network, (BYTES, labels), attacks=attacks)
    with np.load(tmp_path / "measured" / "examples.npz") as arrays:
        for name, array in arrays.items():
            # Of floats another graph rounds otherwise.
            np.testing.assert_allclose(
                ours.examples[name], array, atol=1e-5 if array.dtype == np.float32 else 0, rtol=0
            )
    assert 0 < (ours.examples["broken_by"] > 0).sum() < 10
    skipped = ("attacks", "model", "dataset", "versions")
    assert {k: v for k, v in ours.results.items() if k not in skipped} == {
        k: v for k, v in theirs.items() if k not in skipped
    }
    for one, other in zip(ours.results["attacks"], theirs["attacks"]):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    # The saved model itself, by its path.
    assert_same(
        evaluated(tmp_path / "saved_model", (BYTES, labels), attacks=attacks[:1]),
        evaluated(network, (BYTES, labels), attacks=attacks[:1]),
    )


def of_bytes(network):
    return keras.Sequential([keras.layers.Rescaling(1 / 255), network])


class Batches(keras.utils.PyDataset):
    """Twelve images in batches of five."""

    def __init__(self, labels):
        super().__init__()
        self.labels = labels

    def __len__(self):
        return 3

    def __getitem__(self, k):
        return X[5 * k : 5 * k + 5], self.labels[5 * k : 5 * k + 5, None]


def test_all_forms_of_data_are_the_same(network, labels, quick):
    dataset = tf.data.Dataset.from_tensor_slices((BYTES, labels))
    named = dataset.map(lambda x, y: {"image": x, "label": y})
    forms = {
        "floats": (X, labels),
        "float64 and one-hot": [BYTES / 255, np.eye(4)[labels]],
        "tensors": (tf.constant(X), tf.constant(labels[:, None])),
        "one-hot integers": (BYTES, np.eye(4, dtype=np.int64)[labels]),
        "dataset": dataset.batch(5),
        "of dictionaries": named.batch(12),
        "PyDataset": Batches(labels),
        "source": sources.from_arrays(BYTES, labels),
    }
    for name, data in forms.items():
        found = data_forms.collected(data, None, (0, 1))
        assert found.images.dtype == np.uint8, name
        np.testing.assert_array_equal(found.images, BYTES, err_msg=name)
        np.testing.assert_array_equal(found.labels, labels, err_msg=name)
    of_range = data_forms.collected((X * 2 - 1, labels), None, (-1, 1))
    np.testing.assert_array_equal(of_range.images, BYTES)
    assert_same(evaluated(network, forms["PyDataset"]), quick)
    in_bytes = functools.partial(evaluated, of_bytes(network), bounds=(0, 255))
    assert_same(in_bytes((BYTES.astype(np.float32), labels)), in_bytes((BYTES, labels)))


def test_the_first_examples_of_a_dataset_that_repeats(network, labels):
    endless = tf.data.Dataset.from_tensor_slices((BYTES, labels)).repeat().batch(5)
    assert len(data_forms.collected(endless, 7, (0, 1)).labels) == 7
    with pytest.raises(ValueError, match="a dataset that ends, or num_examples. Received: one that repeats"):
        data_forms.collected(endless, None, (0, 1))


def test_photographs_that_are_no_bytes(network, tmp_path):
    photos = tf.image.resize(BYTES, (16, 16)).numpy() / 255
    classifier = keras.Sequential([keras.layers.AveragePooling2D(2), network])
    labels = np.argmax(classifier(photos, training=False), axis=-1)
    found = evaluated(classifier, (photos, labels), workdir=tmp_path / "photos")
    assert found.results["robust_accuracy_uint8"] is None and found.clean_accuracy == 1.0 > found.robust_accuracy
    adversarial = found.examples["adversarial"]
    assert np.abs(adversarial - photos).max() <= 3 / 255 + 1e-6
    robust = found.examples["robust"]
    np.testing.assert_array_equal(adversarial[robust], photos[robust])
    np.testing.assert_array_equal(np.argmax(classifier(adversarial, training=False), -1) == labels, robust)
    assert "upper bound" in str(found) and report.table(report.read_results([str(tmp_path / "photos")]))


def test_vectors_are_images_to_a_dense_network(network, labels):
    dense = keras.Sequential([keras.Input((192,)), keras.layers.Reshape((8, 8, 3)), network])
    flat = evaluated(dense, (X.reshape(12, -1), labels), diagnose=True)
    np.testing.assert_array_equal(flat.examples["robust"], evaluated(network, (X, labels)).examples["robust"])


def test_an_adversarial_model_is_read_as_it_says(network, labels, tmp_path):
    with_softmax = keras.Sequential([keras.layers.Rescaling(1 / 255), network, keras.layers.Softmax()])
    model = rk.AdversarialModel(with_softmax, norm="L2", epsilon="90/255", bounds=(0, 255), from_logits=False)
    quick = {**QUICK, "workdir": tmp_path}
    said = any_model.evaluate(model, (BYTES.astype(np.float32), labels), **{**quick, "norm": None, "epsilon": None})
    assert (said.results["norm"], said.results["epsilon_fraction"]) == ("L2", "90/255")
    assert said.results["model"]["input_range"] == [0, 255] and said.results["model"]["outputs"] == "probabilities"
    # It is the evaluation of its network.
    told = {"norm": "L2", "epsilon": "90/255", "bounds": (0, 255), "from_logits": False}
    assert any_model.evaluate(with_softmax, (BYTES, labels), **{**quick, **told}).results == said.results
    assert evaluated(model, (BYTES, labels)).results["epsilon_fraction"] == "3/255"


def test_replicas_share_it(mirrored, network, labels, quick, make_tiny_model, tmp_path):
    with mirrored.scope():
        shared = evaluated(make_tiny_model(), (BYTES, labels), workdir=tmp_path)
    np.testing.assert_array_equal(shared.examples["robust"], quick.examples["robust"])
    # It is the network of one device, and of its file.
    assert evaluated(network, (BYTES, labels), workdir=tmp_path).results == shared.results


# A folder.


def test_a_folder_is_read_again_and_belongs_to_one_evaluation(
    network, labels, quick, tmp_path, monkeypatch, capsys, make_tiny_model
):
    folder = str(tmp_path / "measured")
    first = evaluated(network, (BYTES, labels), workdir=folder)
    assert_same(first, quick)
    assert sorted(path.name for path in (tmp_path / "measured").iterdir()) == ["examples.npz", "results.json"]
    with monkeypatch.context() as patch:
        patch.setattr(batching, "work_of", None)  # Nothing is attacked.
        # The same network made again has other names.
        again = evaluated(make_tiny_model(), (X, labels), workdir=folder)
    assert_same(again, first)
    assert again.results == first.results and "Already finished" in capsys.readouterr().out
    others = {
        "model.sha256": {"network": make_tiny_model(seed=5)},
        "dataset.sha256": {"data": (255 - BYTES, labels)},
        "plan.attacks.1 apgd-ce.num_steps = 6, not 7": {"attacks": [functools.partial(rk.attacks.apgd, num_steps=7)]},
        "plan.epsilon": {"epsilon": "4/255"},
        "plan.seed": {"seed": 1},
        "individual": {"individual": True},
        "model.input_range": {"bounds": (0, 2)},
    }
    for named, changes in others.items():
        given = {"network": network, "data": (BYTES, labels), **changes}
        with pytest.raises(ValueError, match="a folder of this evaluation, or a new one. Received: ") as refusal:
            evaluated(workdir=folder, **given)
        assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_an_interrupted_evaluation_goes_on(network, labels, quick, tmp_path, monkeypatch, capsys):
    folder, calls = str(tmp_path), []

    def advance(self, whole=batching.Packing.advance):
        calls.append(self)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(batching.Packing, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            evaluated(network, (BYTES, labels), workdir=folder, save_every=0.0)
    with pytest.raises(ValueError, match="plan.seed = 0, not 1"):
        evaluated(network, (BYTES, labels), workdir=folder, seed=1)
    assert_same(evaluated(network, (BYTES, labels), workdir=folder), quick)
    assert "Resuming from attack 1 of 1" in capsys.readouterr().out


def test_a_function_is_known_by_its_predictions(network, labels, tmp_path):
    evaluated(lambda x: network(x, training=False), (BYTES, labels), workdir=tmp_path)
    evaluated(lambda x: 2 * network(x, training=False), (BYTES, labels), workdir=tmp_path)
    with pytest.raises(ValueError, match="model.sha256"):
        evaluated(lambda x: network(x[:, ::-1], training=False), (BYTES, labels), workdir=tmp_path, allow_chance=True)


def test_the_architecture_is_part_of_a_model(network):
    def digest(activation, rate=0.1):
        made = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation, kernel_initializer="ones")])
        made.add(keras.layers.Dropout(rate))
        made.compile("adam")
        return any_model._digest_of_weights(made)

    assert digest("relu") == digest("relu") != digest("tanh")


# What does not fit.


def two_inputs():
    one, other = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    return keras.Model([one, other], keras.layers.Dense(4)(keras.layers.Flatten()(one - other)))


def without_gradient(x):
    return tf.one_hot(tf.argmax(tf.reshape(x, (-1, 192))[:, :4], axis=-1), 4, off_value=-1.0)


def unseeded(logits_fn, x, labels):
    return x


BAD = {
    "two inputs": ({"network": two_inputs()}, "one input, the images. Received: "),
    "a wider label": ({"data": (BYTES, np.eye(5)[np.zeros(12, int)])}, "the model's 4 classes. Received: rows of 5"),
    "a label outside": ({"data": (BYTES, np.full(12, 4))}, "the model's 4 classes. Received: 4"),
    "float labels": ({"data": (BYTES, np.zeros(12))}, "Expected labels, .*Received: float64"),
    "images outside": (
        {"data": (X * 255, np.zeros(12, int))},
        r"bounds \(0, 1\). Received: values from .*bounds=\(0, 255\)",
    ),
    "other bounds": ({"bounds": (0, 255), "data": (X, np.zeros(12, int))}, "nearly black there"),
    "no gradient": ({"network": without_gradient}, "through which gradients flow"),
    "probabilities": (
        {"network": lambda x: tf.nn.softmax(tf.reshape(x, (-1, 192))[:, :4])},
        "from_logits=False in Python",
    ),
    "fewer labels": (
        {"data": (BYTES, np.zeros(3, int))},
        r"a label for each. Received: images \(12, 8, 8, 3\), labels \(3,\)",
    ),
    "no data": ({"data": (BYTES[:0], np.zeros(0, int))}, "a label for each. Received: images .0"),
    "images alone": ({"data": BYTES}, r"data as \(x, y\), .* Received: a ndarray"),
    "weights": (
        {"data": tf.data.Dataset.from_tensors((X, np.zeros(12, int), np.ones(12)))},
        "batches .x, y.. Received: .*of 3",
    ),
    "no batches": (
        {"data": tf.data.Dataset.from_tensor_slices((X, np.zeros(12, int)))},
        r"as dataset.batch\(...\) makes",
    ),
    "an empty dataset": (
        {"data": tf.data.Dataset.from_tensors((X, np.zeros(12, int))).take(0)},
        "Received: an empty one",
    ),
    "too many": ({"num_examples": 13}, "num_examples from 1 to 12. Received: 13"),
    "none": ({"num_examples": 0}, "num_examples as an integer >= 1"),
    "square of vectors": (
        {"network": lambda x: x[:, :4], "data": (X.reshape(12, -1), np.zeros(12, int)), "attacks": "standard"},
        r"\[N, height, width, channels\] for the attack square.* Received: \(12, 192\)",
    ),
    "another image": ({"data": (BYTES[:, :4], np.zeros(12, int))}, r"shape \(8, 8, 3\). Received: \(4, 8, 3\)"),
    "an attack": ({"attacks": "autoattack"}, "attacks out of apgd-ce, .*Received: 'autoattack'"),
    "an attack without seeds": ({"attacks": [unseeded]}, r"\*, seeds.. Received: .*without seeds"),
    "a loss by name": (
        {"attacks": [functools.partial(FEW, loss_fn="ce")]},
        "a loss_fn of apgd, a function. Received: 'ce'",
    ),
    "an option": ({"verbose": 1}, "options out of individual, .*Received: verbose"),
    "a batch": ({"batch_size": 0}, "a batch_size that divides among 1 replicas. Received: 0"),
    "no radius": ({"epsilon": None}, "a threat model, such as norm='Linf', .*Received: norm='Linf', epsilon=None"),
    "bounds that are not the model's": (
        {
            "network": rk.AdversarialModel(
                keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()]), epsilon=0.1
            ),
            "bounds": (0, 255),
        },
        r"bounds=\(0.0, 1.0\), as the AdversarialModel says",
    ),
    "another radius": (
        {"attacks": [functools.partial(FEW, threat=rk.threat(norm="Linf", epsilon="1/255"))]},
        "threat model",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_before_any_attack(network, labels, name, monkeypatch, tmp_path):
    monkeypatch.setattr(batching, "work_of", None)
    changes, message = BAD[name]
    given = {"network": network, "data": (BYTES, labels), "workdir": str(tmp_path / "new"), **changes}
    with pytest.raises(ValueError, match=message) as refusal:
        evaluated(**given)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("Expected ")
