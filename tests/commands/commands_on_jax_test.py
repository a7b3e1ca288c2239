"""The commands on JAX's devices, next to the same commands on one device of TensorFlow."""

import json
import signal
import time

import numpy as np
import pytest
from command_line import SMALL, arguments, call, rows, start

from robust_keras import storage
from robust_keras.commands import evaluate, pseudo_label, train
from robust_keras.data import sources
from robust_keras.engines import strategies

# L2 steps do not turn rounding errors into whole steps.
L2 = {"NORM": "'L2'", "EPSILON": "'128/255'", "training/pgd.step_size": "'60/255'"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Programs are compiled into a folder of the tests."""
    strategies._made.cache_clear()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
    strategies._made.cache_clear()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Labelled images, a pool of which 6 are copies of those, and test images."""
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    shade = 60 * np.eye(4)[:, None, None, :3]
    image, unlabelled = (
        (rng.integers(0, 196, (num, 8, 8, 3)) + shade[np.arange(num) % 4]).astype(np.uint8) for num in (64, 300)
    )
    unlabelled[[5, 6, 7, 100, 200, 299]] = image[10:16]
    np.savez(folder / "labelled.npz", image=image, label=np.arange(64) % 4)
    np.savez(folder / "test.npz", image=image[8:40], label=np.arange(32) % 4)
    np.savez(folder / "pool.npz", image=unlabelled)
    return folder


def labelled(monkeypatch, pool, workdir, strategy):
    """The manifest and the images of a pseudo-labelled set."""
    settings = {
        "POOL": f"'npz:{pool}/pool.npz'",
        "DATASET": f"'npz:{pool}/labelled.npz'",
        "TEST_SET": f"'npz:{pool}/test.npz'",
        **SMALL,
        "BATCH_SIZE": "16",
        "STATISTICS_GROUP_SIZE": "4",
        "TRAIN_STEPS": "80",
        "multistep.base": "0.02",
        "training_data.num_validation": "8",
        "train.validation_batch_size": "8",
        "train.progress": "False",
        "pgd40/pgd.num_steps": "1",
        "label_pool.sizes": "(20,)",
        "label_pool.chunk_size": "100",
        "label_pool.batch_size": "16",
        "label_pool.allow_chance": "True",
        "label_pool.progress": "False",
    }
    flags = [f"--gin_param={name} = {value}" for name, value in settings.items()]
    flags += ["--gin_file=gin/pseudo_label.gin", f"--workdir={workdir}", f"--strategy={strategy}"]
    call(monkeypatch, pseudo_label, *flags)
    found = sources.load_extra(f"tfrecord:{workdir}/20/*.tfrecord", num_classes=4, image_shape=(8, 8, 3))
    manifest = json.loads((workdir / "20" / "manifest.json").read_text())
    return manifest, {image.tobytes(): int(label) for image, label in zip(found.images[:], np.asarray(found.labels))}


def test_a_pool_is_labelled_trained_on_and_attacked(monkeypatch, capsys, pool, tmp_path):
    manifest, images = labelled(monkeypatch, pool, tmp_path / "jax", "jax")
    assert "Computing on 4 cpu, by JAX " in (said := capsys.readouterr().err) and "(--strategy=jax)" in said
    expected, expected_images = labelled(monkeypatch, pool, tmp_path / "one", "one")
    assert images == expected_images and len(images) == 20
    assert manifest["classifier"]["test_accuracy"] == expected["classifier"]["test_accuracy"]

    changes = {
        "BATCH_SIZE": "32",
        "EXTRA_DATA": f"'tfrecord:{tmp_path}/jax/20/*.tfrecord'",
        "train.accumulation_steps": "2",
        "train.steps_per_execution": "2",
        **L2,
    }
    runs = {}
    for strategy in ("jax", "one"):
        runs[strategy] = tmp_path / f"run on {strategy}"
        flags = arguments(pool / "labelled.npz", runs[strategy], **changes)
        flags += ["--gin_file=gin/at_80mti.gin", "--gin_file=gin/data/cutmix.gin", f"--strategy={strategy}"]
        call(monkeypatch, train, *flags[1:])
    ours, theirs = (rows(workdir) for workdir in runs.values())
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    np.testing.assert_allclose(*([float(row["loss"]) for row in each] for each in (ours, theirs)), rtol=1e-5)
    for column in ("labelled_fraction", "val_clean", "val_robust", "val_robust_averaged"):
        assert [row[column] for row in ours] == [row[column] for row in theirs], column

    verdicts = {}
    for strategy in runs:
        workdir = tmp_path / f"evaluated on {strategy}"
        flags = ["--gin_file=gin/eval/pgd40.gin", "--gin_file=gin/threats/l2.gin", f"--strategy={strategy}"]
        flags += [f"--gin_param={name} = {value}" for name, value in EVALUATION.items()]
        flags += [f"--saved_model={runs['one']}/saved_model", f"--dataset=npz:{pool}/labelled.npz"]
        call(monkeypatch, evaluate, *flags, f"--workdir={workdir}", "--num_examples=32")
        verdicts[strategy] = np.load(workdir / "examples.npz")["broken_by"].tolist()
        results = json.loads((workdir / "results.json").read_text())
        assert ("jax" in results["versions"]) or strategy == "one"
    assert verdicts["jax"] == verdicts["one"] and len(set(verdicts["one"])) > 1


EVALUATION = {
    "evaluate.batch_size": "32",
    "evaluate.allow_chance": "True",
    "evaluate.progress": "False",
    "pgd40/pgd.num_steps": "10",
}


def test_a_signal_saves_a_run_that_goes_on_elsewhere(monkeypatch, images, tmp_path):
    changes = {
        **L2,
        "BATCH_SIZE": "16",
        "TRAIN_STEPS": "400",
        "train.validate_every": "400",
        "train.checkpoint_every": "400",
    }
    flags = arguments(images, tmp_path, **changes)
    process = start(train, *flags, "--strategy=jax")
    deadline = time.monotonic() + 240
    while not (tmp_path / "metrics.csv").exists() or len(rows(tmp_path)) < 3:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    (step,) = storage.steps(tmp_path / "checkpoints")
    assert 3 <= step < 400
    losses = [float(row["loss"]) for row in rows(tmp_path)]
    call(monkeypatch, train, *flags)  # On one device of TensorFlow.
    whole = rows(tmp_path)
    assert [int(row["step"]) for row in whole] == list(range(1, 401))
    assert [float(row["loss"]) for row in whole[: len(losses)]] == losses
