"""Evaluations in a card: those of the same weights alone."""

import json
import shutil

import keras
import numpy as np
import pytest

from robust_keras.saved_models import cards, claims, export, load, measured


@pytest.fixture
def evaluated(tmp_path, linear):
    """The folders of an export and of an evaluation of it."""
    model, evaluation = tmp_path / "saved_model", tmp_path / "evaluation"
    export.export(linear, model, card={})
    evaluation.mkdir()
    write(evaluation, model={"path": str(model), "sha256": load.fingerprint(model)})
    return model, evaluation


def write(folder, **changed):
    results = {
        "num_examples": 100,
        "clean_accuracy": 0.9,
        "robust_accuracy": 0.55,
        "confidence_interval_95": [0.44, 0.66],
        "norm": "Linf",
        "epsilon": 8 / 255,
        "epsilon_fraction": "8/255",
        "attacks": [{"name": "apgd-ce", "parameters": {}}, {"name": "square", "parameters": {}}],
        "seed": 7,
        "warnings": [{"name": "few_steps|<b>"}],
        "dataset": {"name": "cifar10", "split": "test"},
        "versions": {"tensorflow": "2.21.0"},
        "diagnosis": {"margin": 0.1},
    }
    (folder / "results.json").write_text(json.dumps(results | changed))


def copied(network):
    twin = keras.models.clone_model(network)
    twin.set_weights(network.get_weights())
    return twin


def test_another_export_of_the_weights_carries_the_numbers(evaluated, linear, tmp_path, monkeypatch):
    model, evaluation = evaluated
    monkeypatch.setattr(claims, "attach", lambda *args, **options: None)  # These numbers were never measured.
    again = tmp_path / "again"
    options = {"evaluation": str(evaluation), "load_images": lambda dataset: None}
    export.export(copied(linear), again, card={"licence": "CC BY 4.0"}, gradient=True, **options)
    assert load.fingerprint(again) != load.fingerprint(model)
    card = json.loads((again / "model_card.json").read_text())
    told = card["evaluation"]
    assert (told["robust_accuracy"], told["num_examples"], told["seed"]) == (0.55, 100, 7)
    assert told["model_sha256"] == load.fingerprint(model) and "diagnosis" not in told
    text = (again / "MODEL_CARD.md").read_text()
    assert text == cards.readable(card)
    for line in (
        "- Robust accuracy, at most: 55.00 %, in 44.00 % to 66.00 % at 95 %\n",
        "- Images: 100 of `cifar10`, `test`\n",
        "- Threat model: `Linf`, radius `8/255`\n",
        "- Attacks: `apgd-ce`, `square`\n",
        "- Warnings: `few_steps|<b>`\n",
        "- Licence: `CC BY 4.0`\n",
        "`gradient`",
    ):
        assert line in text


def test_of_a_claim_that_is_refused_nothing_is_left(evaluated, linear, tmp_path, monkeypatch):
    _, evaluation = evaluated

    def load_images(dataset):
        assert not (tmp_path / "again").exists()  # What is missing shows before anything is written.
        raise ValueError("no images")

    with pytest.raises(ValueError, match="no images"):
        export.export(copied(linear), tmp_path / "again", card={}, evaluation=evaluation, load_images=load_images)
    with pytest.raises(ValueError, match="a named data set, and load_images"):
        export.export(copied(linear), tmp_path / "again", card={}, evaluation=evaluation)

    def refuse(directory, **options):
        assert (tmp_path / "again" / "model_card.json").exists()
        raise ValueError("refused")

    monkeypatch.setattr(claims, "attach", refuse)
    options = {"evaluation": evaluation, "load_images": lambda dataset: None}
    with pytest.raises(ValueError, match="refused"):
        export.export(copied(linear), tmp_path / "again", card={}, **options)
    assert {path.name for path in (tmp_path / "again").iterdir()} - {"in_use.json"} == {"unfinished"}


def test_a_keras_file_was_evaluated(linear, tmp_path):
    linear.save(tmp_path / "model.keras")
    write(
        tmp_path,
        model={"path": str(tmp_path / "model.keras"), "sha256": load.fingerprint(tmp_path / "model.keras")},
    )
    assert measured.of(linear, tmp_path)["clean_accuracy"] == 0.9


def test_other_weights_are_refused_before_anything_is_written(evaluated, linear, tmp_path):
    _, evaluation = evaluated
    other = copied(linear)
    other.layers[-1].bias.assign_add(np.array([0, 0, 1e-6], np.float32))
    with pytest.raises(ValueError, match=r"weights that are exported. Received: .*results.json, of others"):
        export.export(other, tmp_path / "other", card={}, evaluation=str(evaluation))
    image = keras.Input((4, 4, 3))
    larger = keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(image)))
    with pytest.raises(ValueError, match="weights that are exported"):
        measured.of(larger, evaluation)
    assert not (tmp_path / "other").exists()


def test_variables_that_end_the_process_as_they_are_read(evaluated, linear):
    model, evaluation = evaluated
    index = model / "variables" / "variables.index"
    index.write_bytes(index.read_bytes()[:-8] + bytes(8))
    write(evaluation, model={"path": str(model), "sha256": load.fingerprint(model)})
    with pytest.raises(ValueError, match="Expected an index of variables. Received: .*no table"):
        measured.of(linear, evaluation)


def test_a_model_that_changed_or_went_is_refused(evaluated, linear, tmp_path):
    model, evaluation = evaluated
    with open(model / "saved_model.pb", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match=f"as it was evaluated. Received: {model}, which has changed"):
        measured.of(linear, evaluation)
    shutil.rmtree(model)
    with pytest.raises(ValueError, match=f"of {model}, which does not exist"):
        measured.of(linear, evaluation)
    with pytest.raises(ValueError, match=f"finished evaluation. Received: {tmp_path}/nothing"):
        measured.of(linear, tmp_path / "nothing")


@pytest.mark.parametrize(
    "changed",
    [
        {"robust_accuracy": "0.99"},
        {"clean_accuracy": float("nan")},
        {"confidence_interval_95": [0.1, 2]},
        {"model": {"path": None, "sha256": "0"}},
        {"attacks": ["pgd"]},
        {"norm": 3},
    ],
)
def test_broken_results_are_refused(evaluated, linear, changed):
    write(evaluated[1], **changed)
    with pytest.raises(ValueError, match="Expected the results of an evaluation of a saved model. Received: "):
        measured.of(linear, evaluated[1])


def test_a_digest_is_of_values_whatever_their_order():
    first, second = np.arange(6, dtype=np.float32), np.ones((2, 3), np.float32)
    digest = measured.weights_digest([first, second, np.arange(3)])
    assert digest == measured.weights_digest([second, first])
    others = [[first], [first.reshape(2, 3), second], [first.astype(np.float64), second]]
    assert digest not in map(measured.weights_digest, others)
