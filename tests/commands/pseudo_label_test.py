"""The command that makes pseudo-labelled sets, from a pool to training on what it wrote."""

import json
import pickle
import time

import numpy as np
import pytest
from command_line import SMALL, call, start

from robust_keras import ownership, storage
from robust_keras.commands import pseudo_label, train
from robust_keras.data import sources
from robust_keras.pseudo_labelling import scoring
from robust_keras.saved_models import export

SETTINGS = {
    **SMALL,
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "4",
    "TRAIN_STEPS": "4",
    "training_data.num_validation": "8",
    "train.validation_batch_size": "8",
    "train.progress": "False",
    "pgd40/pgd.num_steps": "1",
    "label_pool.sizes": "(8, 40)",
    "label_pool.chunk_size": "50",
    "label_pool.batch_size": "16",
    "label_pool.allow_chance": "True",
    "label_pool.progress": "False",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, make_tiny_model):
    """64 labelled images, a pool of 300 of which 6 are copies of those, and a saved classifier of 4 classes."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    # A class is a colour, which can be learnt in few steps, and noise.
    shade = 60 * np.eye(4)[:, None, None, :3]
    image, pool = (
        (rng.integers(0, 196, (num, 8, 8, 3)) + shade[np.arange(num) % 4]).astype(np.uint8) for num in (64, 300)
    )
    pool[[5, 6, 7, 100, 200, 299]] = image[10:16]
    np.savez(folder / "labelled.npz", image=image, label=np.arange(64) % 4)
    np.savez(folder / "test.npz", image=image[8:40], label=np.arange(32) % 4)
    np.savez(folder / "pool.npz", image=pool)
    export.export(make_tiny_model(), folder / "saved_model", card={})
    return folder


def arguments(data, workdir, *extra, **changes):
    settings = {"POOL": f"'npz:{data}/pool.npz'", "DATASET": f"'npz:{data}/labelled.npz'"}
    settings |= {"TEST_SET": f"'npz:{data}/test.npz'", **SETTINGS, **changes}
    flags = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    return ["--gin_file=gin/pseudo_label.gin", f"--workdir={workdir}", *flags, *extra]


def contents(workdir):
    """Scores and sets, every byte of them; not the classifier, which TensorFlow writes differently each time."""
    paths = [path for name in ("scores", "8", "40") for path in (workdir / name).glob("*")]
    # What is trained on gets a folder beside it, which can be mapped into memory.
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths if path.suffix != ".shards"}


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, pseudo_label, *arguments(data, workdir, f"--saved_model={data}/saved_model"))
    return workdir


def test_a_pool_becomes_sets_with_manifests(data, undisturbed):
    manifests = [json.loads((undisturbed / name / "manifest.json").read_text()) for name in ("8", "40")]
    assert [manifest["num_images"] for manifest in manifests] == [8, 40]
    for manifest in manifests:
        assert manifest["pool"]["name"] == f"npz:{data}/pool.npz" and manifest["pool"]["num_images"] == 300
        assert manifest["duplicates"]["exact"] == 6 and manifest["duplicates"]["of"].endswith("test.npz, test")
        assert manifest["classifier"]["path"] == f"{data}/saved_model" and len(manifest["classifier"]["sha256"]) == 64
        assert "Torralba" in manifest["licence"]
    with np.load(data / "pool.npz") as arrays:
        pool = arrays["image"]
    found = [
        sources.load_extra(f"tfrecord:{undisturbed}/{name}/*.tfrecord", num_classes=4, image_shape=(8, 8, 3))
        for name in ("8", "40")
    ]
    small, large = ({image.tobytes() for image in extra.images[:]} for extra in found)
    assert len(small) == 8 and len(large) == 40 and small < large
    assert large <= {image.tobytes() for image in np.delete(pool, [5, 6, 7, 100, 200, 299], axis=0)}
    assert np.bincount(found[1].labels[:]).tolist() == [10] * 4


def test_a_classifier_is_trained_without_attack_and_used(monkeypatch, data, tmp_path):
    trained = arguments(data, tmp_path, **{"label_pool.sizes": "(4,)", "TRAIN_STEPS": "40", "multistep.base": "0.02"})
    call(monkeypatch, pseudo_label, *trained)
    assert "train.attack = None" in (tmp_path / "classifier" / "config.gin").read_text()
    assert "label_pool" not in (tmp_path / "classifier" / "config.gin").read_text()
    (step,) = storage.steps(tmp_path / "classifier" / "best")
    manifest = json.loads((tmp_path / "4" / "manifest.json").read_text())
    weights = tmp_path / "classifier" / "best" / f"step-{step:08d}.npz"
    assert manifest["classifier"]["sha256"] == storage.sha256(str(weights))
    # The same command changes nothing.
    before = {path: path.read_bytes() for path in (tmp_path / "4").glob("*")}
    call(monkeypatch, pseudo_label, *trained)
    assert {path: path.read_bytes() for path in (tmp_path / "4").glob("*")} == before


@pytest.mark.parametrize("kind", ["tfrecord", "carmon"])
def test_one_binding_trains_on_a_set(monkeypatch, data, undisturbed, tmp_path, kind):
    name = f"tfrecord:{undisturbed}/40/*.tfrecord"
    if kind == "carmon":
        made = sources.load_extra(name, num_classes=4, image_shape=(8, 8, 3))
        content = {"data": made.images[:], "extrapolated_targets": np.asarray(made.labels)}
        (tmp_path / "extra.pickle").write_bytes(pickle.dumps(content, protocol=2))
        name = f"carmon:{tmp_path}/extra.pickle"
    settings = {
        "DATASET": f"'npz:{data}/labelled.npz'",
        "EXTRA_DATA": repr(name),
        **{name: value for name, value in SETTINGS.items() if not name.startswith("label_pool")},
        "TRAIN_STEPS": "2",
        "training/pgd.num_steps": "1",
        "train.log_every": "1",
    }
    flags = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    call(monkeypatch, train, "--gin_file=gin/at_80mti.gin", f"--workdir={tmp_path}/run", *flags)
    header, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("labelled_fraction")
    assert [float(row.split(",")[column]) for row in rows] == [0.5] * 2


def test_more_sets_of_the_same_scores(monkeypatch, capsys, data, undisturbed):
    before = contents(undisturbed)
    more = arguments(data, undisturbed, f"--saved_model={data}/saved_model", **{"label_pool.sizes": "(20,)"})
    call(monkeypatch, pseudo_label, *more)
    assert "Resuming with 0 of 6 chunks" in capsys.readouterr().out
    assert json.loads((undisturbed / "20" / "manifest.json").read_text())["num_images"] == 20
    assert contents(undisturbed) == before


def test_workers_share_the_work(monkeypatch, data, undisturbed, tmp_path):
    workers = [
        start(
            pseudo_label,
            *arguments(data, tmp_path, f"--saved_model={data}/saved_model", f"--worker={worker}", "--num_workers=2"),
        )
        for worker in range(2)
    ]
    assert [worker.wait(timeout=240) for worker in workers] == [0, 0]
    assert contents(tmp_path) == contents(undisturbed)


def test_two_commands_of_one_worker_are_kept_apart(monkeypatch, capsys, data, tmp_path):
    model = f"--saved_model={data}/saved_model"
    with ownership.lock(tmp_path, what="another command", part="worker-0"), pytest.raises(SystemExit) as exit:
        call(monkeypatch, pseudo_label, *arguments(data, tmp_path, model))
    assert exit.value.code == 2 and "in use by process" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_command_continues_to_the_same_bytes(monkeypatch, data, undisturbed, tmp_path):
    # Sixty chunks instead of six, so that the signal arrives among them.
    flags = arguments(data, tmp_path, f"--saved_model={data}/saved_model", **{"label_pool.chunk_size": "5"})
    process = start(pseudo_label, *flags)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("scores/chunk-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob("scores/chunk-*.json"))) < 60  # Or it was no interruption.
    call(monkeypatch, pseudo_label, *flags)
    whole = tmp_path / "whole"
    call(monkeypatch, pseudo_label, *[flag.replace(f"--workdir={tmp_path}", f"--workdir={whole}") for flag in flags])
    assert contents(tmp_path) == contents(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"POOL": "'npz:nowhere.npz'"}, "nowhere.npz"),
        ({"POOL": "'digits'"}, "'digits'"),
        ({"label_pool.sizes": "(6,)"}, "multiples of 4, as (1000,). Received: (6,)"),
        ({"label_pool.sizes": "(400,)"}, "at least 400 images, or smaller label_pool.sizes. Received: 300"),
        ({"TEST_SET": "'digits'", "label_pool.sizes": "(10,)"}, "(32, 32, 3)"),
        ({"TEST_SET": "%DATASET"}, "TEST_SET to name other images than DATASET"),
        ({"label_pool.sizes": "(40)"}, "multiples of 4, as (1000,). Received: 40"),
        ({"label_pool.near_duplicate": "'0.7'"}, "near_duplicate as a number above 0 and up to 1. Received: '0.7'"),
        ({"label_pool.near_duplicate": "1.5"}, "Received: 1.5"),
        ({"label_pool.near_duplicates": "0.5"}, "near_duplicates"),
        ({"label_pool.chunk_size": "0"}, "chunk_size"),
        ({"train.train_step": "3"}, "train_step"),
        ({"label_pool.batch_size": "'16'"}, "Received: '16', 50"),
        ({"DATASET": "'npz:nowhere.npz'"}, "nowhere.npz"),
        ({"DATASET": "'digits'"}, "labelled images (8, 8, 3), as in 'npz:"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(monkeypatch, capsys, data, tmp_path, changes, message):
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, pseudo_label, *arguments(data, tmp_path, **changes))
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("error: Expected") == 1 and message in said
    assert not (tmp_path / "classifier").exists()


def test_what_is_not_about_the_classifier_changes_nothing(monkeypatch, capsys, data, undisturbed, tmp_path):
    """How another one would be trained is no part of a run with a saved one; flags that would not count are refused."""
    before = contents(undisturbed)
    model = f"--saved_model={data}/saved_model"
    call(monkeypatch, pseudo_label, *arguments(data, undisturbed, model, TRAIN_STEPS="5"))
    assert contents(undisturbed) == before
    capsys.readouterr()
    for extra, message in (
        ([model, f"--init_from={tmp_path}"], "--saved_model or --init_from. Received: both"),
        (["--outputs=probabilities"], "Expected --saved_model with --outputs. Received: none"),
    ):
        with pytest.raises(SystemExit) as exit:
            call(monkeypatch, pseudo_label, *arguments(data, tmp_path / "new", *extra))
        assert exit.value.code == 2 and message in capsys.readouterr().err


def test_a_test_set_need_not_hold_every_class(monkeypatch, capsys, data, tmp_path):
    with np.load(data / "test.npz") as arrays:
        few = arrays["label"] < 3
        np.savez(tmp_path / "few.npz", image=arrays["image"][few], label=arrays["label"][few])
        np.savez(tmp_path / "many.npz", image=arrays["image"], label=np.arange(32) % 5)
    model, run = f"--saved_model={data}/saved_model", tmp_path / "run"
    call(monkeypatch, pseudo_label, *arguments(data, run, model, TEST_SET=f"'npz:{tmp_path}/few.npz'"))
    assert len(json.loads((run / "40" / "manifest.json").read_text())["classes"]) == 4
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, pseudo_label, *arguments(data, tmp_path, model, TEST_SET=f"'npz:{tmp_path}/many.npz'"))
    assert exit.value.code == 2 and "a test set of 4 classes. Received: 5" in capsys.readouterr().err


def test_a_classifier_of_other_classes_is_refused(monkeypatch, capsys, data, tmp_path):
    np.savez(tmp_path / "dozen.npz", image=np.zeros((24, 32, 32, 3), np.uint8), label=np.arange(24) % 12)
    sets = {"DATASET": f"'npz:{tmp_path}/dozen.npz'", "TEST_SET": "'digits'", "label_pool.sizes": "(12,)"}
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, pseudo_label, *arguments(data, tmp_path / "run", **sets))
    assert exit.value.code == 2 and "a test set of 12 classes. Received: 10 in 'digits'" in capsys.readouterr().err


def test_a_chunk_that_another_worker_finds_damaged_is_scored_again(monkeypatch, data, undisturbed, tmp_path):
    score, calls = scoring.score, []

    def withdrawn(*args, directory, **settings):
        score(*args, directory=directory, **settings)
        if not calls:
            storage.withdraw(f"{directory}/chunk-00000002")  # As `select` in the other one does.
        calls.append(directory)

    monkeypatch.setattr(scoring, "score", withdrawn)
    call(monkeypatch, pseudo_label, *arguments(data, tmp_path, f"--saved_model={data}/saved_model"))
    assert len(calls) == 2 and contents(tmp_path) == contents(undisturbed)


def test_a_classifier_at_chance_is_refused(monkeypatch, capsys, data, make_tiny_model, tmp_path):
    with np.load(data / "labelled.npz") as arrays:
        image = arrays["image"]
    predicted = np.argmax(make_tiny_model()(image / np.float32(255), training=False), axis=-1)
    label = np.where(np.arange(64) % 4 < 1, predicted, (predicted + 1) % 4)  # Right on a quarter.
    np.savez(tmp_path / "chance.npz", image=image, label=label)
    chance = {"label_pool.allow_chance": "False", "TEST_SET": f"'npz:{tmp_path}/chance.npz'"}
    with pytest.raises(SystemExit) as exit:
        call(monkeypatch, pseudo_label, *arguments(data, tmp_path, f"--saved_model={data}/saved_model", **chance))
    assert exit.value.code == 2 and "right more often than chance" in capsys.readouterr().err


def test_another_pool_or_classifier_is_refused(monkeypatch, capsys, data, undisturbed, make_tiny_model, tmp_path):
    export.export(make_tiny_model(seed=3), tmp_path / "other", card={})
    with np.load(data / "pool.npz") as arrays:
        np.savez(tmp_path / "pool.npz", image=arrays["image"][:250])
    for extra, changes, message in (
        ([f"--saved_model={tmp_path}/other"], {}, "classifier"),
        ([f"--saved_model={data}/saved_model"], {"POOL": f"'npz:{tmp_path}/pool.npz'"}, "POOL"),
        ([f"--saved_model={data}/saved_model"], {"label_pool.near_duplicate": "0.9"}, "near_duplicate"),
        ([f"--saved_model={tmp_path}/none"], {}, "none"),
        (
            [f"--saved_model={data}/saved_model", "--input_range=0,.5"],
            {},
            "classifier.input_range = [0.0, 1.0], not [0.0, 0.5]",
        ),
        ([f"--saved_model={data}/saved_model", "--input_range=-1,1"], {}, "images in [0, 1]"),
        ([f"--saved_model={data}/saved_model", "--input_range=0,255"], {}, "images in [0, 1]"),
        ([f"--saved_model={data}/saved_model", "--strategy=gpus"], {}, "'gpus'"),
        ([f"--init_from={tmp_path}/none"], {}, "of another, with "),
        ([f"--saved_model={data}/saved_model", "--worker=2", "--num_workers=2"], {}, "2 of 2"),
    ):
        with pytest.raises(SystemExit) as exit:
            call(monkeypatch, pseudo_label, *arguments(data, undisturbed, *extra, **changes))
        said = capsys.readouterr().err.partition("error: ")[2]
        assert exit.value.code == 2 and message in said and "\n" not in said.rstrip("\n"), said
