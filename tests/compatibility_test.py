"""What release 0.1.0 (commit 93191f6) left on disk, under this one: see `fixtures/record.py` for how it was made."""

import csv
import json
import os
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.commands import evaluate, export, pseudo_label, report, train
from robust_keras.data import sources
from robust_keras.data.readers import trusted_copies
from robust_keras.saved_models import load
from robust_keras.training import run_state

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
# What is read is compared bit for bit, what is computed up to rounding, as a share of an array's largest number. On the
# machine that recorded it, training and evaluation also end with the same bits. Elsewhere another rounding may turn the
# sign of a gradient of nearly zero, by which an attack steps.
ROUNDING, TURNED_SIGNS = 1e-5, 1e-3
TIME = ("examples_per_second", "seconds")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The folder of all that was recorded; nothing may change it."""
    folder = tmp_path_factory.mktemp("recorded")
    for archive in FIXTURES.glob("*.zip"):
        shutil.unpack_archive(archive, folder)
    return folder


@pytest.fixture
def folder(recorded, tmp_path, monkeypatch):
    """A copy of it, which is the working directory, as when it was recorded."""
    shutil.copytree(recorded, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(name):
    return json.loads(pathlib.Path(f"{name}.json").read_text())


def rows(path):
    """Rows of a metrics.csv, without what a clock measured: text, as it stands there."""
    with open(path) as file:
        return [{name: text for name, text in row.items() if name not in TIME} for row in csv.DictReader(file)]


def assert_close(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        largest = np.abs(array).max(initial=0)
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=tolerance * largest, err_msg=name)


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def assert_same_run(resumed, undisturbed, num_rows_read):
    """All that two runs left; the first rows of metrics were read, and so are the same to the letter."""
    ours, theirs = rows(resumed / "metrics.csv"), rows(undisturbed / "metrics.csv")
    assert len(ours) == len(theirs) == 6 and ours[0].keys() == theirs[0].keys()
    assert ours[:num_rows_read] == theirs[:num_rows_read]
    for our, their in zip(ours, theirs):
        for name, text in their.items():
            assert bool(our[name]) == bool(text)
            assert not text or float(our[name]) == pytest.approx(float(text), rel=TURNED_SIGNS), name
    for name in ("checkpoints", "best"):
        our, their = storage.read_newest(resumed / name), storage.read_newest(undisturbed / name)
        assert our.step == their.step
        assert_close(our.arrays, their.arrays, TURNED_SIGNS)
        assert our.info["best"] == their.info["best"]


@pytest.mark.oldest
def test_a_stopped_run_ends_as_the_undisturbed_one(folder, capfd):
    train.run(**command("training"), workdir="stopped")
    assert "Resuming from step 3" in capfd.readouterr().out
    assert_same_run(folder / "stopped", folder / "finished", num_rows_read=3)
    assert (folder / "stopped" / "saved_model" / "model_card.json").exists()


@pytest.mark.oldest
def test_what_a_stopped_run_saved_is_restored_bit_for_bit(folder, monkeypatch):
    stopped = storage.read_newest("stopped/checkpoints")
    seen = {}

    class Seen(BaseException):
        pass

    original = run_state.RunState.restore

    def restore(self, *arguments):
        original(self, *arguments)
        seen.update({name: variable.numpy() for name, variable in self.variables.items()})
        raise Seen

    monkeypatch.setattr(run_state.RunState, "restore", restore)
    with pytest.raises(Seen):
        train.run(**command("training"), workdir="stopped")
    assert_same_bits(seen, {name: a for name, a in stopped.arrays.items() if not name.startswith("best/")})


def test_the_same_command_starts_and_ends_as_it_did(folder):
    train.run(**command("training"), workdir="anew")
    assert_same_run(folder / "anew", folder / "finished", num_rows_read=0)


def test_another_run_is_refused_in_a_stopped_one(folder):
    arguments = command("training")
    arguments["gin_params"].append("train.momentum = 0.8")
    with pytest.raises(ValueError, match=r"train.momentum.*0\.[89].*0\.[89]"):
        train.run(**arguments, workdir="stopped")


def test_a_finished_run_stays_as_it_is(folder):
    def contents():
        paths = [path for path in (folder / "finished").rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in paths if path.name not in ("config.gin", "owner.json")}

    before = contents()
    trained = train.run(**command("training"), workdir="finished")
    assert contents() == before
    best = storage.read_newest("finished/best").arrays
    assert_same_bits({weight.path: weight.numpy() for weight in trained.best.weights}, best)


@pytest.mark.parametrize("path", ["exported.keras", "finished/saved_model"])
def test_what_was_exported_gives_the_same_logits(folder, path):
    with np.load("logits.npz") as arrays:
        images, logits = arrays["images"], arrays["logits"]
    assert len(np.unique(logits.argmax(-1))) > 3
    x = tf.constant(images, tf.float32) / 255.0
    assert_close({"logits": load.load_logits_fn(path)(x).numpy()}, {"logits": logits}, ROUNDING)


@pytest.mark.parametrize("weights, prefix", [("best", "best/"), ("last", "weights/"), ("last_averaged", "averages/")])
def test_a_finished_run_is_exported(folder, weights, prefix):
    export.run(workdir="finished", output=f"{weights}.keras", weights=weights)
    arrays = storage.read_newest("finished/checkpoints").arrays
    expected = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
    network = keras.models.load_model(f"{weights}.keras")
    assert_same_bits({weight.path: weight.numpy() for weight in network.weights}, expected)


def test_weights_to_start_from(folder):
    expected = storage.read_newest("finished/best").arrays
    assert len(expected) == 47
    assert_same_bits(load.load_weights("finished"), expected)
    assert_same_bits(load.load_weights("exported.keras"), expected)


def assert_same_evaluation(resumed, undisturbed):
    """All that two evaluations left: verdicts are the same image by image."""
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (resumed, undisturbed))
    for name in ("num_examples", "clean_accuracy", "robust_accuracy", "robust_accuracy_uint8", "robust_accuracy_after"):
        assert ours[name] == theirs[name]
    for name in ("norm", "epsilon", "epsilon_fraction", "individual", "seed", "model"):
        assert ours[name] == theirs[name]
    assert ours["dataset"].items() >= theirs["dataset"].items()  # It did not say what the images were.
    for our, their in zip([*ours["attacks"], ours["baseline"]], [*theirs["attacks"], theirs["baseline"]], strict=True):
        for name in ("name", "examples_attacked", "examples_broken"):
            assert our[name] == their[name]
    with np.load(resumed / "examples.npz") as our, np.load(undisturbed / "examples.npz") as their:
        assert set(their) <= set(our)
        for name in ("index", "label", "clean_prediction", "robust", "broken_by"):
            np.testing.assert_array_equal(our[name], their[name])
        assert np.abs(our["adversarial"] - their["adversarial"]).mean() < TURNED_SIGNS


@pytest.mark.parametrize("name", ["stopped_in_square", "stopped_in_apgd"])
def test_a_killed_evaluation_ends_as_the_undisturbed_one(folder, capfd, name):
    evaluate.run(**command("evaluation"), workdir=f"evaluation/{name}")
    assert "Resuming from attack" in capfd.readouterr().out
    assert_same_evaluation(folder / "evaluation" / name, folder / "evaluation" / "finished")
    assert not (folder / "evaluation" / name / "state").exists()


def test_the_recorded_verdicts_are_of_every_kind(recorded):
    with np.load(recorded / "evaluation" / "finished" / "examples.npz") as arrays:
        assert set(arrays["broken_by"]) == {-1, 0, 1, 2}


def test_another_evaluation_is_refused_in_a_killed_one(folder):
    with pytest.raises(ValueError, match="num_examples"):
        evaluate.run(**{**command("evaluation"), "num_examples": 12}, workdir="evaluation/stopped_in_apgd")


def test_a_finished_evaluation_is_not_repeated(folder, capfd):
    before = (folder / "evaluation" / "finished" / "results.json").read_bytes()
    results = evaluate.run(**command("evaluation"), workdir="evaluation/finished")
    assert "Already finished" in capfd.readouterr().out
    assert (folder / "evaluation" / "finished" / "results.json").read_bytes() == before
    assert results == json.loads(before)


def test_a_finished_evaluation_is_reported(folder, capfd, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report", "--workdir=evaluation/finished", "--baseline=evaluation/finished"])
    report.command()
    printed = capfd.readouterr().out
    assert "95.83" in printed and "Linf" in printed


def test_half_of_a_scored_pool_is_gone_on_with(folder, capfd):
    pseudo_label.run(**command("pseudo_labels"), workdir="pseudo_labels/stopped")
    assert "Resuming with 1 of 3 chunks" in capfd.readouterr().out
    for name in ("10", "20"):
        ours, theirs = (pathlib.Path("pseudo_labels", run, name) for run in ("stopped", "finished"))
        assert storage.read_json(ours / "identity.json") == storage.read_json(theirs / "identity.json")
        part = "part-00000-of-00001.tfrecord"
        images = [
            sources.load_extra(f"tfrecord:{p / part}", num_classes=10, image_shape=(32, 32, 3)) for p in (ours, theirs)
        ]
        np.testing.assert_array_equal(*(extra.images[:] for extra in images))
        np.testing.assert_array_equal(*(extra.labels[:] for extra in images))


def test_half_of_a_conversion_is_gone_on_with(folder):
    arguments = command("conversion")
    # An archive keeps even seconds alone.
    for path in (folder / "images").rglob("*.png"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    (begun,) = (folder / "images.shards").iterdir()
    trusted_copies.begin(str(begun))  # Half of what somebody else made would be left alone.
    read = np.load(begun / "images-00000.npy")
    extra = sources.load_extra(arguments.pop("name"), **arguments)
    assert len(extra.images) == 20 and len(read) == 8
    np.testing.assert_array_equal(extra.images[:8], read)
    assert json.loads((folder / "images.shards" / "shards.json").read_text())["folder"] == begun.name


def test_what_was_recorded_is_small():
    assert sum(path.stat().st_size for path in FIXTURES.glob("*.zip")) < 700_000
