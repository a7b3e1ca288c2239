"""The recipes of the released code and its data sets: their numbers, and that they run on such data as is published."""

import json

import numpy as np
import pytest
import tensorflow as tf
from command_line import call, refused, rows
from headers_test import header

from robust_keras import losses
from robust_keras.commands import configuration, train
from robust_keras.data import sources, training_batches
from robust_keras.data.readers import published
from robust_keras.models import wide_resnet
from robust_keras.saved_models.weights_in import networks
from robust_keras.saved_models.weights_in.published import PUBLISHED
from robust_keras.training import objectives

# Typed from the released code, jax/experiment.py, datasets.py and README.md, and iclrw2021doing/README.md: of each recipe data,
# radius, labelled images among a core's 32, images in its training set, and published accuracies, clean and robust, also with
# CutMix.
CIFAR = {"epsilon": 8 / 255, "flips": True, "padding": 0}
DIGITS = {"epsilon": 8 / 255, "flips": False, "padding": 0}
GOLDEN = {
    "released_wrn28_10_ddpm.gin": {
        **CIFAR, "dataset": "cifar10", "extra": "ddpm", "labelled": 10, "accuracies": ["85.97", "60.73", "87.33", "60.75"],
    },
    "released_wrn28_10_ddpm_cifar100.gin": {
        **CIFAR, "dataset": "cifar100", "extra": "ddpm", "labelled": 10,
        "accuracies": ["59.18", "30.81", "62.41", "32.06", "60.46", "33.49", "63.56", "34.64"],
    },
    "released_wrn28_10_ddpm_svhn.gin": {
        **DIGITS, "dataset": "svhn_cropped", "extra": "ddpm", "labelled": 10, "accuracies": [],
    },
    "released_wrn28_10_svhn.gin": {
        **DIGITS, "dataset": "svhn_cropped", "extra": None, "labelled": 32, "accuracies": [],
    },
    "released_wrn28_10_mnist.gin": {
        **DIGITS, "dataset": "mnist", "extra": None, "labelled": 32, "epsilon": 0.3, "padding": 2,
        "accuracies": ["99.26", "96.34"],
    },
}  # fmt: skip
# Height, width and channels, classes, and images for training, as TFDS has them.
SETS = {"cifar10": ((32, 32, 3), 10), "cifar100": ((32, 32, 3), 100), "svhn_cropped": ((32, 32, 3), 10)}
SETS["mnist"] = ((28, 28, 1), 10)
FEW = {
    "BATCH_SIZE": "8",
    "STATISTICS_GROUP_SIZE": "4",
    "TRAIN_STEPS": "2",
    "training_data.num_validation": "8",
    "training/pgd.num_steps": "1",
    "pgd40/pgd.num_steps": "1",
    "train.log_every": "1",
    "train.validation_batch_size": "8",
    "train.progress": "False",
}


def resolved(*files):
    configuration.parse(files)
    return configuration.resolve(configuration.train).recipe


def made(dataset, num_images=60, seed=0):
    shape, num_classes = SETS[dataset]
    random = np.random.RandomState(seed)
    return random.randint(0, 256, (num_images, *shape)).astype(np.uint8), random.permutation(num_images) % num_classes


def prepare(folder, dataset):
    """A prepared copy of a set of TFDS, of few images."""
    import tensorflow_datasets as tfds

    copy = folder / dataset / str(tfds.builder(dataset, data_dir=str(folder)).version)
    copy.mkdir(parents=True)
    images, labels = made(dataset)
    path = copy / f"{dataset}-train.tfrecord-00000-of-00001"
    with tf.io.TFRecordWriter(str(path)) as writer:
        for image, label in zip(images, labels):
            png = tf.train.BytesList(value=[tf.io.encode_png(image).numpy()])
            feature = {
                "image": tf.train.Feature(bytes_list=png),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    split = {"name": "train", "numBytes": "1", "shardLengths": [str(len(images))]}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"name": dataset, "version": copy.name, "fileFormat": "tfrecord", "splits": [split]}
    (copy / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """CIFAR-100, SVHN and MNIST as TFDS prepares them, and generated images as they are published, in small."""
    folder = tmp_path_factory.mktemp("data")
    for dataset in ("cifar100", "svhn_cropped", "mnist"):
        prepare(folder, dataset)
    for dataset, name in (("cifar100", "cifar100_ddpm.npz"), ("svhn_cropped", "svhn_ddpm.npz")):
        images, labels = made(dataset, num_images=200, seed=1)
        np.savez(folder / name, image=images, label=labels)
    return folder


def test_the_released_configuration_is_the_presets():
    ours = resolved("released_wrn28_10_ddpm.gin")
    config = configuration.operative_config()
    configuration.parse(["best_wrn28_10_80mti.gin", "presets/released_code.gin"], ["EXTRA_DATA = 'ddpm'"])
    configuration.resolve(configuration.train)
    assert configuration.differences(config, configuration.operative_config()) == []
    assert ours.model.func is wide_resnet.wide_resnet


@pytest.mark.parametrize("name", GOLDEN)
def test_the_numbers_are_those_of_the_released_code(name):
    expected, recipe = GOLDEN[name], resolved(name)
    assert (recipe.train_steps, recipe.averaging.tau, recipe.averaging.warm_up) == (400 * 50_000 // 1024, 0.995, True)
    rates = {0: 0.0, 244: 0.2, 488: 0.4, 488 + (19_531 - 488) // 2: 0.2, 19_530: 0.0}
    learning_rate = recipe.optimizer.learning_rate
    found = {step: float(learning_rate(tf.constant(step, tf.int64), num_steps=19_531)) for step in rates}
    assert found == pytest.approx(rates, abs=2e-5)
    assert (recipe.optimizer.momentum, recipe.optimizer.weight_decay) == (0.9, 5e-4)
    assert recipe.objective.func is objectives.trades and recipe.objective.keywords.get("beta", 6.0) == 6.0
    attack, validation = recipe.attack.attack_fn.keywords, recipe.validation.correct_fn.keywords["attack"].keywords
    assert (recipe.attack.target, recipe.attack.batch_norm) == ("clean_prediction", "batch")
    assert attack["loss_fn"].func is losses.kl_divergence and validation["loss_fn"].func is losses.margin
    steps = [float(attack["step_size"](tf.constant(k))) for k in range(attack["num_steps"])]
    assert steps == pytest.approx([0.1] * 5 + [0.01] * 5)
    steps = [float(validation["step_size"](tf.constant(k))) for k in range(validation["num_steps"])]
    assert steps == pytest.approx([0.1] * 20 + [0.01] * 10 + [1e-4] * 10)
    for each in (attack, validation):
        assert (each["threat"].norm, each["threat"].epsilon) == ("Linf", expected["epsilon"])
        assert each["step_rule"].name == "adam(beta_1=0.9, beta_2=0.999, epsilon=1e-09)"
    model = {"depth": 28, "width": 10, "activation": "silu", "statistics_group_size": 32}
    padding = {"padding": expected["padding"]} if expected["padding"] else {}
    assert recipe.model.func is wide_resnet.wide_resnet and recipe.model.keywords == {**model, **padding}


@pytest.mark.parametrize("name", GOLDEN)
def test_the_data_are_those_of_the_released_code(name):
    expected, recipe = GOLDEN[name], resolved(name)
    settings = recipe.data.keywords
    assert (settings["dataset"], settings["extra_data"]) == (expected["dataset"], expected["extra"])
    assert settings["num_validation"] == 1024
    images, labels = made(expected["dataset"])
    labelled = sources.Source("made", images, np.ones_like(labels, np.int32), SETS[expected["dataset"]][1])
    extra = expected["extra"] and labelled._replace(labels=np.full(len(labels), 2, np.int32))
    data = training_batches.TrainingData(labelled, labelled, extra, (0.5,), (0.5,))
    batch = next(iter(recipe.batches(data, seed=0, num_steps=1)))
    assert batch["image"].shape == (1024, *images.shape[1:])
    is_labelled, targets = batch["is_labelled"].numpy() == 1, batch["targets"].numpy().max(axis=1)
    assert (is_labelled.reshape(32, 32).sum(axis=1) == expected["labelled"]).all()
    smoothed = 0.9 + 0.1 / labelled.num_classes
    assert targets == pytest.approx(np.where(is_labelled, 1.0, smoothed))
    stored = {image.tobytes() for image in images}
    as_stored = [image.tobytes() in stored for image in batch["image"].numpy()]
    assert all(as_stored) if not expected["flips"] else not all(as_stored)


def test_mnist_is_seen_as_the_released_network_sees_it(data_dir):
    configuration.parse(["released_wrn28_10_mnist.gin"], ["training_data.num_validation = 8"])
    recipe = configuration.resolve(configuration.train).recipe
    data = recipe.data(data_dir=str(data_dir))
    of_the_released = networks.DATASETS["mnist"]
    assert (data.mean, data.std) == (of_the_released.mean, of_the_released.std) == ((0.5,), (0.5,))
    assert recipe.model.keywords["padding"] == of_the_released.padding
    assert data.image_shape == (28, 28, 1) and len(data.labelled.labels) == 52 and data.labelled.num_classes == 10


@pytest.mark.parametrize("name", GOLDEN)
def test_a_header_says_what_is_published_and_what_is_chosen(name):
    said, accuracies = header(name), GOLDEN[name]["accuracies"]
    assert said.count("The released code's: ") == said.count("Not the released code's: ") == 1
    assert "None of Gowal et al. 2020's rows." in said and "It has not been run." in said
    assert "Published" in said and all(f"{number} %" in said for number in accuracies)
    for choice in ("held out", "every 250 steps", "chooses the best weights", "--weights=last_averaged"):
        assert choice in said
    for choice in ("no crops and no mirroring", "also the length, 400 times 50,000 images"):
        assert (choice in said) == (not GOLDEN[name]["flips"])
    assert ("that all else is as it has it for CIFAR-10" in said) == (name != "released_wrn28_10_ddpm.gin")


def test_published_accuracies_are_those_of_the_published_weights():
    of = {
        "cifar10_linf_wrn28-10_cutmix_ddpm_v2": GOLDEN["released_wrn28_10_ddpm.gin"]["accuracies"][2:],
        "cifar100_linf_wrn28-10_cutmix_ddpm": GOLDEN["released_wrn28_10_ddpm_cifar100.gin"]["accuracies"][2:4],
        "cifar100_linf_wrn70-16_cutmix_ddpm": GOLDEN["released_wrn28_10_ddpm_cifar100.gin"]["accuracies"][6:],
        "mnist_linf_wrn28-10_without": GOLDEN["released_wrn28_10_mnist.gin"]["accuracies"],
    }
    for stem, (clean, robust) in of.items():
        assert (PUBLISHED[stem].clean, PUBLISHED[stem].robust) == (float(clean), float(robust))


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "released_wrn28_10_ddpm.gin"])
def test_data_of_the_published_form(data_dir, name):
    configuration.parse([name], ["training_data.num_validation = 8"])
    data = configuration.resolve(configuration.train).recipe.data(data_dir=str(data_dir))
    shape, num_classes = SETS[GOLDEN[name]["dataset"]]
    assert (data.image_shape, data.labelled.num_classes) == (shape, num_classes)
    images, labels = made(GOLDEN[name]["dataset"])
    np.testing.assert_array_equal(np.sort(labels), np.sort([*data.labelled.labels, *data.validation.labels]))
    assert {image.tobytes() for image in images} >= {image.tobytes() for image in data.labelled.images}
    if GOLDEN[name]["extra"]:
        images, labels = made(GOLDEN[name]["dataset"], num_images=200, seed=1)
        np.testing.assert_array_equal(data.extra.images[:], images)
        np.testing.assert_array_equal(data.extra.labels, labels)
    assert len(data.mean) == len(data.std) == shape[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "released_wrn28_10_ddpm.gin"])
def test_recipes_run_on_data_of_the_published_form(monkeypatch, data_dir, tmp_path, name):
    params = {**FEW, "DEPTH": "10", "WIDTH": "1"}
    flags = [f"--gin_file=gin/{name}", f"--data_dir={data_dir}", f"--workdir={tmp_path}/run"]
    call(monkeypatch, train, *flags, *[f"--gin_param={key} = {value}" for key, value in params.items()])
    assert [int(row["step"]) for row in rows(tmp_path / "run")] == [1, 2]
    assert all(np.isfinite(float(row["loss"])) for row in rows(tmp_path / "run"))
    share = float(rows(tmp_path / "run")[0]["labelled_fraction"])
    assert share == (0.25 if GOLDEN[name]["extra"] else 1.0)
    card = json.loads((tmp_path / "run" / "saved_model" / "model_card.json").read_text())
    shape, num_classes = SETS[GOLDEN[name]["dataset"]]
    assert card["dataset"] == GOLDEN[name]["dataset"] and card["num_classes"] == num_classes


# The images that Rebuffi et al. 2021 generated.


@pytest.mark.parametrize("dataset", published.DDPM_FILES)
def test_generated_images_are_those_of_the_labelled_set(tmp_path, dataset):
    file = {"cifar10": "cifar10", "cifar100": "cifar100", "svhn_cropped": "svhn"}[dataset] + "_ddpm.npz"
    shape, num_classes = SETS[dataset]
    options = {"num_classes": num_classes, "image_shape": shape, "data_dir": str(tmp_path)}
    with pytest.raises(sources.DataUnavailable) as error:
        sources.load_extra("ddpm", dataset=f"{dataset}:3.0.0", **options)
    lines = str(error.value).splitlines()
    assert lines[0] == f"Expected {tmp_path}/{file}. Fetch it with" and lines[-1] == "Received: no such file"
    assert f"  curl -L -o {tmp_path}/{file} https://storage.googleapis.com/dm-adversarial-robustness/{file}" in lines
    images, labels = made(dataset)
    np.savez(tmp_path / file, image=images, label=labels)
    for name in ("ddpm", f"ddpm:{file}", f"ddpm:{tmp_path}/{file}"):
        extra = sources.load_extra(name, dataset=dataset, **options)
        np.testing.assert_array_equal(extra.images[:], images)
        np.testing.assert_array_equal(extra.labels, labels)
    assert sources.find_extra("ddpm", data_dir=str(tmp_path), dataset=dataset) == f"{tmp_path}/{file}"
    # A set of one's own may be any of them.
    assert sources.load_extra(f"ddpm:{file}", dataset="npz:mine.npz", **options).num_classes == num_classes


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"image": np.zeros((9, 32, 32, 3), np.uint8), "label": np.full(9, 10)}, "labels from 0 to 9"),
        ({"image": np.zeros((9, 3, 32, 32), np.uint8), "label": np.zeros(9, int)}, "channels last"),
        ({"image": np.zeros((9, 28, 28, 1), np.uint8), "label": np.zeros(9, int)}, "shape"),
        ({"images": np.zeros((9, 32, 32, 3), np.uint8), "label": np.zeros(9, int)}, "image"),
    ],
    ids=["labels", "channels", "shape", "names"],
)
def test_generated_images_of_another_form_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "svhn_ddpm.npz", **arrays)
    with pytest.raises(ValueError, match=f"Expected .*{message}.* Received: "):
        sources.load_extra(
            "ddpm", dataset="svhn_cropped", num_classes=10, image_shape=(32, 32, 3), data_dir=str(tmp_path)
        )


@pytest.mark.parametrize("extra", ["ddpm:cifar10_ddpm.npz", "carmon"])
def test_images_of_other_classes_are_refused_whether_or_not_they_are_there(
    monkeypatch, capsys, data_dir, tmp_path, extra
):
    flags = ["--gin_file=gin/released_wrn28_10_ddpm_svhn.gin", f"--data_dir={data_dir}", f"--workdir={tmp_path}/run"]
    flags += [f"--gin_param=EXTRA_DATA = '{extra}'", "--gin_param=training_data.num_validation = 8"]
    line = refused(monkeypatch, capsys, train, *flags)
    assert line == (
        "error: Expected extra data with the classes of svhn_cropped, such as 'ddpm'. "
        f"Received: '{extra}', with those of cifar10"
    )


@pytest.mark.parametrize(
    "params", [["training_data.std = None"], ["training_data.mean = (0.5, 0.5, 0.5)"], ["training_data.std = (0.0,)"]]
)
def test_a_mean_and_deviation_that_do_not_fit(data_dir, params):
    configuration.parse(["released_wrn28_10_mnist.gin"], ["training_data.num_validation = 8", *params])
    recipe = configuration.resolve(configuration.train).recipe
    with pytest.raises(ValueError, match="Expected a mean and a std > 0 for each of the 1 channels.* Received: "):
        recipe.data(data_dir=str(data_dir))


def test_missing_sets_are_a_line(monkeypatch, capsys, tmp_path):
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for name, dataset in (("released_wrn28_10_mnist", "mnist"), ("released_wrn28_10_svhn", "svhn_cropped")):
        flags = [f"--gin_file=gin/{name}.gin", f"--data_dir={tmp_path}", f"--workdir={tmp_path}/run"]
        line = refused(monkeypatch, capsys, train, *flags)
        assert f"Expected '{dataset}' to be in {tmp_path} or to be downloaded" in line and "--data_dir=DIR" in line
