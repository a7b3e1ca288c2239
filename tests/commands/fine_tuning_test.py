"""The ImageNet recipe on 64 made images: a frozen backbone, all of it from there, and a network from a file."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_line import call, rows

from robust_keras.commands import train
from robust_keras.models import weights
from robust_keras.saved_models import load, warm_start

FEW = {
    "IMAGE_SIZE": "32",
    "training_data.short_side": "36",
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "8",
    "TRAIN_STEPS": "2",
    "training_data.num_validation": "8",
    "train.validation_batch_size": "8",
    "train.validate_every": "2",
    "train.log_every": "1",
    "pgd40/pgd.num_steps": "1",
    "train.progress": "False",
    "application.weights": "None",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with 64 PNGs of several sizes in 4 classes."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for k in range(64):
        (folder / f"class_{k % 4}").mkdir(exist_ok=True)
        image = random.integers(0, 200, (40 + k % 5, 44, 3)) + 18 * (k % 4)
        png = tf.io.encode_png(image.astype(np.uint8)).numpy()
        (folder / f"class_{k % 4}" / f"{k:02d}.png").write_bytes(png)
    return folder


def arguments(pictures, workdir, changes, few=FEW):
    values = {**few, "DATASET": f"'images:{pictures}'", **changes}
    bindings = [f"--gin_param={name} = {value}" for name, value in values.items()]
    return ["--gin_file=gin/convnext_tiny.gin", f"--workdir={workdir}", *bindings]


def trained(monkeypatch, pictures, folder, changes, frozen, few=FEW):
    """Trains with a part frozen, then all of it from there: the weights of both runs by name."""
    changes |= {"train.epsilon_warmup_steps": "4"}
    call(monkeypatch, train, *arguments(pictures, folder / "frozen", {**changes, **frozen}, few))
    again = arguments(pictures, folder / "all", changes, few)
    call(monkeypatch, train, *again, f"--init_from={folder / 'frozen'}")
    assert [len(rows(folder / run)) for run in ("frozen", "all")] == [2, 2]
    return load.load_weights(folder / "frozen"), load.load_weights(folder / "all")


@pytest.mark.slow
def test_convnext_is_frozen_and_then_trained_from_there(monkeypatch, pictures, tmp_path):
    first, second = trained(monkeypatch, pictures, tmp_path, {}, {"application.frozen": "'stem|downsampling|stage'"})
    assert first.keys() == second.keys()
    moved = {name.split("_")[2] for name in first if not np.array_equal(first[name], second[name])}
    assert {"stem", "stage", "head"} <= moved
    logits = load.load_logits_fn(str(tmp_path / "all" / "saved_model"))(np.zeros((2, 32, 32, 3), np.float32))
    assert logits.shape == (2, 4)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A stock network of 3 classes with a softmax, on pixels from 0 to 255, 24 x 24."""
    path = tmp_path_factory.mktemp("clean") / "clean.keras"
    network = keras.Sequential(
        [
            keras.Input((24, 24, 3)),
            keras.layers.Rescaling(1 / 255, name="unit"),
            keras.layers.Conv2D(4, 3, strides=2, activation="relu", name="conv"),
            keras.layers.GlobalAveragePooling2D(name="pool"),
            keras.layers.Dense(3, activation="softmax", name="predictions"),
        ]
    )
    network.save(path)
    return path


def test_a_file_is_trained_at_another_resolution_with_another_classifier(monkeypatch, pictures, clean, tmp_path):
    own = {"train.model": "@load_network()", "load_network.path": f"'{clean}'", "load_network.new_classifier": "True"}
    own |= {"load_network.input_range": "(0, 255)"}
    few = {name: value for name, value in FEW.items() if not name.startswith("application")}
    first, second = trained(monkeypatch, pictures, tmp_path, own, {"load_network.frozen": "'conv'"}, few)
    before = weights.by_name(keras.models.load_model(clean))
    for name in ("conv/kernel", "conv/bias"):
        np.testing.assert_array_equal(first[name], before[name])
        assert (first[name] != second[name]).any()
    assert first["logits/kernel"].shape == (4, 4) and (first["logits/kernel"] != second["logits/kernel"]).any()


def functional(inputs, *, softmax=True, flat=False):
    x = keras.layers.Conv2D(4, 3, name="conv")(inputs["image"] if isinstance(inputs, dict) else inputs)
    x = keras.layers.Flatten()(x) if flat else keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(3, name="dense")(x)
    return keras.Model(inputs, keras.layers.Softmax(name="softmax")(x) if softmax else x)


def test_a_network_from_a_file_gives_its_logits(tmp_path):
    network = functional({"image": keras.Input((8, 8, 3), name="image")})
    network.save(tmp_path / "network.keras")
    x = np.random.default_rng(0).random((2, 8, 8, 3)).astype(np.float32)
    expected = network.get_layer("softmax").input
    expected = keras.Model(network.inputs[0], expected)(x * 2 - 1)
    loaded = warm_start.load_network(path=str(tmp_path / "network.keras"), num_classes=3, input_range=(-1, 1))
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-6)
    larger = warm_start.load_network(path=str(tmp_path / "network.keras"), num_classes=3, input_shape=(12, 9, 3))
    assert larger.input_shape == (None, 12, 9, 3) and weights.names(larger) == weights.names(loaded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 4}, r"new_classifier=True the last layer is replaced. Received: \(None, 3\)"),
        ({"input_shape": (12, 12, 3)}, r"Expected a network that takes images \(12, 12, 3\)"),
        ({"frozen": "convx"}, "a part of the layers' names, conv, dense"),
        ({"input_range": (1, 0)}, "low < high"),
        ({"path": "nowhere.keras"}, "Expected a .keras file"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, message):
    functional(keras.Input((8, 8, 3)), softmax=False, flat=True).save(tmp_path / "flat.keras")
    with pytest.raises(ValueError, match=message) as refused:
        warm_start.load_network(**{"path": str(tmp_path / "flat.keras"), "num_classes": 3, **changes})
    assert "\n" not in str(refused.value)
