"""The recipes: their numbers are the paper's, every binding is used, and changing a macro changes the run."""

import inspect
import pathlib

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import losses, threats
from robust_keras.attacks.pgd import pgd
from robust_keras.commands import configuration
from robust_keras.data import augmentation, sources, training_batches
from robust_keras.evaluation import evaluate, plan
from robust_keras.models import application, preact_resnet, wide_resnet
from robust_keras.study import costs, rows
from robust_keras.training import objectives

GIN = configuration.gin_directory()
LABELLING = "pseudo_label.gin"
RECIPES = sorted(path.name for path in GIN.glob("*.gin") if path.name != LABELLING and path.name[:4] != "base")
# For --gin_file=... after a recipe.
OVERLAYS = [
    "data/cutmix.gin",
    "data/images.gin",
    "models/preact_resnet_18.gin",
    "presets/released_code.gin",
    "scales/mini.gin",
    "threats/l1_training.gin",
]
EVALUATIONS = ["eval/aa_mt.gin", "eval/aa_mt_mini.gin", "eval/autoattack.gin", "eval/pgd20.gin", "eval/pgd40.gin"]

# Typed from Gowal et al. 2020, section 3.1, and where the paper is silent from the released code.
AT = {
    "learning_rates": {
        0: 0.1,
        1: 0.1,
        20_000: 0.1,
        38_999: 0.1,
        39_000: 0.01,
        58_499: 0.01,
        58_500: 0.001,
        77_999: 0.001,
    },
    "images_per_step": 128,
    "train_steps": 78_000,
    "norm": "Linf",
    "epsilon": 8 / 255,
    "step_size": "2/255",
    "num_steps": 10,
    "objective": objectives.adversarial_training,
    "attack_loss": losses.cross_entropy,
    "attack_target": "label",
    "group_size": 4,
    "tau": None,
    "weight_decay": 5e-4,
    "momentum": 0.9,
    "depth": 28,
    "width": 10,
    "activation": "relu",
    "num_validation": 1024,
    "dataset": "cifar10",
    "extra_data": None,
    "labelled_per_group": None,
}
WITH_80MTI = {
    "learning_rates": {
        0: 0.1,
        1: 0.1,
        5_000: 0.1,
        9_749: 0.1,
        9_750: 0.01,
        14_624: 0.01,
        14_625: 0.001,
        19_499: 0.001,
    },
    "images_per_step": 1024,
    "train_steps": 19_500,
    "group_size": 32,
    "extra_data": "carmon",
    "labelled_per_group": 16,
}
TRADES = {
    "objective": objectives.trades,
    "attack_loss": losses.kl_divergence,
    "attack_target": "clean_prediction",
}
MART = {"objective": objectives.mart}
# Section 5: TRADES, SiLU, tau .995, multistep without extra data; ratio 3:7 and cosine with it.
BEST = {**AT, **TRADES, "tau": 0.995, "activation": "silu", "depth": 70, "width": 16}
BEST_80MTI = {
    **BEST,
    **WITH_80MTI,
    # .05 * (1 + cos(pi * step / 19,500)), by hand.
    "learning_rates": {
        0: 0.1,
        3_250: 0.09330127,
        4_875: 0.08535534,
        6_500: 0.075,
        9_750: 0.05,
        13_000: 0.025,
        14_625: 0.01464466,
        19_499: 6.4894e-10,
    },
    "extra_data": "tfrecord:80mti/500k/*.tfrecord",
    "labelled_per_group": 10,
}
L2 = {"norm": "L2", "epsilon": 128 / 255, "step_size": "15/255"}
GOLDEN = {
    "at.gin": AT,
    "at_80mti.gin": {**AT, **WITH_80MTI},
    "trades.gin": {**AT, **TRADES},
    "trades_80mti.gin": {**AT, **WITH_80MTI, **TRADES},
    "mart.gin": {**AT, **MART},
    "mart_80mti.gin": {**AT, **WITH_80MTI, **MART},
    "best_wrn70_16.gin": BEST,
    "best_wrn34_20.gin": {**BEST, "depth": 34, "width": 20},
    "best_wrn70_16_80mti.gin": BEST_80MTI,
    "best_wrn28_10_80mti.gin": {**BEST_80MTI, "depth": 28, "width": 10},
    "best_wrn70_16_l2.gin": {**BEST, **L2},
    "best_wrn70_16_80mti_l2.gin": {**BEST_80MTI, **L2},
    "best_wrn70_16_cifar100.gin": {**BEST, "dataset": "cifar100"},
    "best_wrn70_16_80mti_cifar100.gin": {
        **BEST_80MTI,
        "dataset": "cifar100",
        "extra_data": "tfrecord:80mti_cifar100/500k/*.tfrecord",
    },
}
DECAYS = {"kernel": True, "bias": False, "gamma": False, "beta": False, "variable_7": False}
NUM_PARAMETERS = {(28, 10): 36_479_194, (34, 20): 184_531_674, (70, 16): 266_796_506}  # With 10 classes.
# Not the paper's; `released_recipes_test` has the numbers of the released code's.
OTHERS = {"quickstart.gin", "quickstart_plain.gin", "convnext_tiny.gin"}
OTHERS |= {name for name in RECIPES if name.startswith("released")}


def resolved(recipe, *params, preset=None):
    configuration.parse([recipe, preset] if preset else [recipe], params)
    return configuration.resolve(configuration.train).recipe


def fake_data(num_extra=0):
    def source(count):
        return sources.Source("fake", np.zeros((count, 32, 32, 3), np.uint8), np.zeros(count, np.int32), 10)

    mean = std = (0.5, 0.5, 0.5)
    return training_batches.TrainingData(source(50), source(5), source(num_extra) if num_extra else None, mean, std)


def learning_rate(train, step):
    return float(train.optimizer.learning_rate(tf.constant(step, tf.int64), num_steps=train.train_steps))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_parses_and_uses_all_its_bindings(recipe):
    resolved(recipe)
    assert not configuration.unused_bindings()


@pytest.mark.parametrize("recipe", EVALUATIONS)
def test_every_evaluation_parses_and_uses_all_its_bindings(recipe):
    configuration.parse([recipe])
    bound = configuration.resolve(configuration.evaluate).keywords
    assert bound["threat"].epsilon == 8 / 255
    assert all(attack.keywords["threat"].epsilon == 8 / 255 for attack in bound["attacks"])


def attacks_of(evaluation_file, *params):
    """`[(name, parameters)]` of what it runs, functions without their own bindings; and the norm."""
    configuration.parse([evaluation_file], params)
    bound = configuration.resolve(configuration.evaluate).keywords
    rows = []
    for attack in bound["attacks"]:
        parameters = dict(attack.keywords)
        threat = parameters.pop("threat")
        assert (threat.norm, threat.epsilon) == (bound["threat"].norm, bound["threat"].epsilon)
        if "loss_fn" in parameters:
            parameters["loss_fn"] = getattr(parameters["loss_fn"], "func", parameters["loss_fn"])
        rows.append((attack.func.search(**attack.keywords).name, parameters))
    return rows, bound["threat"].norm


def test_aa_mt_is_the_papers_evaluation():
    # Gowal et al. 2020, section 3.1.
    expected = [
        ("apgd-ce", {"loss_fn": losses.cross_entropy, "num_steps": 100, "num_restarts": 5}),
        ("apgd-dlr", {"loss_fn": losses.dlr, "num_steps": 100, "num_restarts": 5}),
        ("multi-targeted", {"num_steps": 200, "num_restarts": 10, "num_targets": 9}),
    ]
    assert attacks_of("eval/aa_mt.gin") == (expected, "Linf")
    assert attacks_of("eval/aa_mt.gin", "NORM = 'L2'", "EPSILON = '128/255'") == (expected, "L2")


def test_autoattack_is_the_version_of_the_norm():
    fab_t = ("fab-t", {"targeted": True, "num_restarts": 1})
    standard = [("apgd-ce", {}), ("apgd-t", {}), fab_t, ("square", {})]
    assert attacks_of("eval/autoattack.gin") == (standard, "Linf")
    assert attacks_of("eval/autoattack.gin", "NORM = 'L2'", "EPSILON = 0.5") == (standard, "L2")
    standard[0][1].update(num_restarts=5, shrinking_radius=True)
    standard[1][1].update(num_targets=5, shrinking_radius=True)
    assert attacks_of("eval/autoattack.gin", "NORM = 'L1'", "EPSILON = 12") == (standard, "L1")


@pytest.mark.parametrize(
    "params, names",
    [
        (["autoattack.version = 'plus'"], ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]),
        (["autoattack.version = 'rand'"], ["apgd-ce", "apgd-dlr"]),
        (["autoattack.version = 'custom'", "autoattack.attacks = ['apgd-ce', 'square']"], ["apgd-ce", "square"]),
    ],
)
def test_other_versions_of_autoattack(params, names):
    rows, _ = attacks_of("eval/autoattack.gin", *params)
    assert [name for name, _ in rows] == names
    if "rand" in params[0]:
        assert all(parameters["eot_steps"] == 20 for _, parameters in rows)


@pytest.mark.parametrize(
    "params",
    [["autoattack.version = 'Plus'"], ["autoattack.attacks = ['square']"], ["autoattack.version = 'custom'"]],
)
def test_versions_of_autoattack_that_do_not_exist(params):
    with pytest.raises(ValueError, match="Expected .* Received: "):
        attacks_of("eval/autoattack.gin", *params)


def test_every_gin_file_is_part_of_a_recipe():
    used = set()

    def read(name):
        used.add(name)
        for line in (GIN / name).read_text().splitlines():
            if line.startswith("include "):
                read(line.split("'")[1])

    for recipe in [*RECIPES, *EVALUATIONS, LABELLING]:
        read(recipe)
    assert used & set(OVERLAYS) == {"data/images.gin", "presets/released_code.gin"}  # Which recipes include too.
    for overlay in OVERLAYS:
        read(overlay)
    assert {path.relative_to(GIN).as_posix() for path in GIN.rglob("*.gin")} == used


@pytest.mark.parametrize("recipe", GOLDEN)
def test_the_recipes_numbers_are_the_papers(recipe):
    expected, train = GOLDEN[recipe], resolved(recipe)
    for step, rate in expected["learning_rates"].items():
        assert learning_rate(train, step) == pytest.approx(rate, rel=1e-6, abs=1e-8), step
    assert train.train_steps == expected["train_steps"]
    assert (train.averaging and train.averaging.tau) == expected["tau"]
    assert train.optimizer.weight_decay == expected["weight_decay"]
    assert train.optimizer.momentum == expected["momentum"]
    attack = train.attack.attack_fn
    assert attack.func is pgd and attack.keywords["loss_fn"].func is expected["attack_loss"]
    assert attack.keywords["num_steps"] == expected["num_steps"]
    assert attack.keywords["step_size"] == expected["step_size"]
    assert attack.keywords["threat"].norm == expected["norm"]
    assert attack.keywords["threat"].epsilon == expected["epsilon"]
    assert attack.keywords.get("step_rule") is None and attack.keywords.get("random_start", True)
    assert (train.attack.target, train.attack.batch_norm) == (expected["attack_target"], "batch")
    assert train.objective.func is expected["objective"]
    beta = inspect.signature(expected["objective"]).parameters.get("beta")
    assert beta is None or train.objective.keywords.get("beta", beta.default) == 6
    assert train.validation.correct_fn.func is evaluate.correct_under_attack
    validation = train.validation.correct_fn.keywords["attack"].keywords
    assert validation["num_steps"] == 40 and validation["loss_fn"].func is losses.margin
    steps = {0: 0.1, 19: 0.1, 20: 0.01, 29: 0.01, 30: 1e-4, 39: 1e-4}
    assert {k: float(validation["step_size"](tf.constant(k))) for k in steps} == pytest.approx(steps)
    assert validation["step_rule"].name == "adam(beta_1=0.9, beta_2=0.999, epsilon=1e-09)"
    data = train.data.keywords
    assert (data["dataset"], data["extra_data"]) == (expected["dataset"], expected["extra_data"])
    assert data["num_validation"] == expected["num_validation"]
    model = train.model.keywords
    assert train.model.func is wide_resnet.wide_resnet
    assert [model[name] for name in ("depth", "width", "activation")] == [
        expected[name] for name in ("depth", "width", "activation")
    ]
    assert model["statistics_group_size"] == expected["group_size"]
    made = fake_data(30 if data["extra_data"] else 0)
    made.labelled.labels[:] = 1
    dataset = train.batches(made, seed=0, num_steps=1)
    assert dataset.element_spec["image"].shape[0] == expected["images_per_step"]
    if expected["labelled_per_group"]:
        labels = next(iter(dataset))["label"].numpy().reshape(-1, expected["group_size"])
        assert ((labels == 1).sum(axis=1) == expected["labelled_per_group"]).all()
    smoothings = [train.batches.keywords.get(name, 0.0) for name in ("label_smoothing", "extra_label_smoothing")]
    assert smoothings == [0, 0]
    assert train.batches.keywords["group_size"] == expected["group_size"]
    augmentation = train.batches.keywords["augmentation"]
    assert augmentation.keywords.get("padding", 4) == 4 and augmentation.keywords.get("flip", True)


def test_every_recipe_has_golden_numbers():
    assert GOLDEN.keys() | OTHERS == set(RECIPES)


def test_the_imagenet_recipe_has_the_numbers_of_its_sources():
    train = resolved("convnext_tiny.gin")
    # Singh et al. 2023, their main.py, run_train.sh and parserr.py: 300 epochs of 1,281,167 images, 20 of them a linear
    # rise to 1e-3, a cosine; AdamW (.9, .95), weight decay .05 but for biases; smoothing .1; averages with .9999.
    assert train.train_steps == pytest.approx(300 * 1_281_167 / 1024, rel=2e-4)
    steps = {0: 0.0, 12_510: 5e-4, 25_020: 1e-3, 25_020 + 175_140: 5e-4, 375_299: 0.0}
    assert {step: learning_rate(train, step) for step in steps} == pytest.approx(steps, abs=1e-6)
    optimizer = train.optimizer.make(1e-3)
    assert (optimizer.beta_1, optimizer.beta_2, optimizer.weight_decay) == (0.9, 0.95, 0.05)
    decays = {name: optimizer._use_weight_decay(keras.Variable([0.0], name=name)) for name in DECAYS}
    assert decays == DECAYS
    assert (train.batches.keywords["label_smoothing"], *train.averaging) == (0.1, 0.9999, False)
    # Liu et al. 2023, adversarial_training.py: three steps of 8/255/3 within 4/255, no random start; both of them attack
    # the network as it is evaluated.
    attack = train.attack.attack_fn.keywords
    assert attack["threat"].norm == "Linf" and attack["threat"].epsilon == 4 / 255
    assert threats.parse_fraction(attack["step_size"], "step_size") == pytest.approx(8 / 255 / 3)
    assert (attack["num_steps"], attack["random_start"], train.attack.batch_norm) == (3, False, "moving")
    assert train.attack.epsilon_warmup_steps == 0
    # Debenedetti et al. 2022: ten epochs, where it is asked for.
    assert 10 * 1_281_167 / 1024 == pytest.approx(12_510, rel=1e-3)
    assert train.model.func is application.application
    assert train.model.keywords == {"name": "ConvNeXtTiny", "weights": "imagenet"}
    data = train.data.keywords
    assert (data["dataset"], data["image_size"], data["short_side"]) == ("imagenet2012", 224, 256)


def test_training_against_l1():
    # Not the paper's: a radius of the literature, and steps of a quarter of it.
    train = resolved("at.gin", preset="threats/l1_training.gin")
    attack = train.attack.attack_fn.keywords
    assert (attack["threat"].norm, attack["threat"].epsilon, attack["step_size"]) == ("L1", 12.0, 3)
    assert attack["num_steps"] == 10
    threat = train.validation.correct_fn.keywords["attack"].keywords["threat"]
    assert (threat.norm, threat.epsilon) == ("L1", 12.0)


def test_the_steps_of_all_recipes_reach_their_radius(warned):
    training = [([recipe], []) for recipe in RECIPES]
    training += [([recipe, overlay], []) for recipe in ("at.gin", "trades_80mti.gin") for overlay in OVERLAYS]
    training += [(list(row.files), list(row.bindings)) for row in rows.read() if row.runnable]
    for files, params in training:
        configuration.parse(files, params)
        configuration.resolve(configuration.train)
    for evaluation in EVALUATIONS:
        for params in ([], ["NORM = 'L2'", "EPSILON = '128/255'"], ["NORM = 'L1'", "EPSILON = 12"]):
            configuration.parse([evaluation], params)
            bound = configuration.resolve(configuration.evaluate).keywords
            plan.make(bound["attacks"], bound.get("baseline"), bound["threat"])
    assert warned == []


def test_steps_of_another_norm_are_warned_of_when_a_recipe_is_read(warned):
    resolved("at.gin", "NORM = 'L2'", "EPSILON = '128/255'")
    (line,) = warned
    assert "L2 128/255. Received: 10 of 0.0784 in all" in line and "gin/threats/l2_training.gin" in line
    resolved("at.gin", "NORM = 'L2'", "EPSILON = '128/255'", preset="threats/l2_training.gin")
    assert len(warned) == 1


@pytest.mark.parametrize("size", NUM_PARAMETERS, ids=lambda size: "{}_{}".format(*size))
def test_networks_have_the_papers_parameters(size):
    recipe = {(28, 10): "at.gin", (34, 20): "best_wrn34_20.gin", (70, 16): "best_wrn70_16.gin"}[size]
    keywords = resolved(recipe).model.keywords
    assert costs.num_parameters(keywords["depth"], keywords["width"], num_classes=10) == NUM_PARAMETERS[size]


def test_the_released_codes_preset():
    # As `released_code_facts` have it: batch 1,024, 400 epochs, 10 of warm-up, .1 * 1024 / 256, 3:7, smoothing .1. On
    # 32 cores of 4 hosts a labelled image is 4 // 4 times in a batch, and 10 of a core's 32 images are labelled.
    train = resolved("trades_80mti.gin", preset="presets/released_code.gin")
    assert train.train_steps == 400 * 50_000 // 1024
    rates = {0: 0.0, 244: 0.2, 488: 0.4, 488 + (19_531 - 488) // 2: 0.2, 19_530: 0.0}
    assert {step: learning_rate(train, step) for step in rates} == pytest.approx(rates, abs=2e-5)
    attack = train.attack.attack_fn.keywords
    assert attack["step_rule"].name == "adam(beta_1=0.9, beta_2=0.999, epsilon=1e-09)"
    sizes = [float(attack["step_size"](tf.constant(k))) for k in range(10)]
    assert sizes == pytest.approx([0.1] * 5 + [0.01] * 5)
    data = fake_data(30)
    data.labelled.labels[:], data.extra.labels[:] = 1, 2
    batch = next(iter(train.batches(data, seed=0, num_steps=1)))
    labels, targets = batch["label"].numpy().reshape(32, 32), batch["targets"].numpy()
    assert ((labels == 1).sum(axis=1) == 10).all()
    assert targets[labels.reshape(-1) == 1].max(axis=1) == pytest.approx(1.0)
    assert targets[labels.reshape(-1) == 2].max(axis=1) == pytest.approx(0.91)


def test_the_released_codes_preset_on_one_host():
    # There a labelled image is four times in a batch, and of 8 pictures of a core 2 are labelled: 8 of 32 images.
    configuration.parse(["trades_80mti.gin", "presets/released_code.gin"], ["batches.num_repeats = 4"])
    data = fake_data(30)
    data.labelled.labels[:], data.extra.labels[:] = 1, 2
    batch = next(iter(configuration.resolve(configuration.train).recipe.batches(data, seed=0, num_steps=1)))
    labels = batch["label"].numpy().reshape(32, 32)
    assert ((labels == 1).sum(axis=1) == 8).all()


def test_images_of_ones_own_are_resized_and_cropped():
    train = resolved("at.gin", "IMAGE_SIZE = 8", preset="data/images.gin")
    assert (train.data.keywords["image_size"], train.data.keywords["short_side"]) == (8, 256)
    assert train.batches.keywords["augmentation"].func is augmentation.random_resized_crop
    assert train.batches.keywords["augmentation"].keywords == {"size": 8}


def test_another_network_takes_the_place_of_the_recipes():
    train = resolved("best_wrn28_10_80mti.gin", "DEPTH = 34", preset="models/preact_resnet_18.gin")
    assert train.model.func is preact_resnet.preact_resnet
    assert train.model.keywords == {"depth": 34, "activation": "relu", "statistics_group_size": 32}
    with pytest.raises(ValueError, match="WIDTH, which change nothing"):
        resolved("at.gin", "WIDTH = 2", preset="models/preact_resnet_18.gin")


def test_cutmix_mixes_images_and_what_the_attack_moves_away_from():
    train = resolved("best_wrn28_10_80mti.gin", preset="data/cutmix.gin")
    assert train.attack.target == "targets"
    data = fake_data(30)
    data.labelled.labels[:], data.extra.labels[:], data.extra.images[:] = 1, 2, 255
    batch = next(iter(train.batches(data, seed=0, num_steps=1)))
    plain = next(iter(resolved("best_wrn28_10_80mti.gin").batches(data, seed=0, num_steps=1)))
    assert (batch["label"].numpy() == plain["label"].numpy()).all()
    assert (batch["targets"].numpy().max(axis=1) < 0.99).any() and (plain["targets"].numpy().max(axis=1) == 1).all()
    assert (batch["image"].numpy() != plain["image"].numpy()).any()


def test_the_validation_attack_follows_the_threat_model():
    threat = (
        resolved("at.gin", "NORM = 'L2'", "EPSILON = '128/255'")
        .validation.correct_fn.keywords["attack"]
        .keywords["threat"]
    )
    assert (threat.norm, threat.epsilon) == ("L2", 128 / 255)


def test_operative_configuration_parses_again_to_the_same_recipe(tmp_path):
    resolved("quickstart.gin", "EPSILON = '5/255'")
    config = configuration.operative_config()
    (tmp_path / "config.gin").write_text(config)
    configuration.parse([tmp_path / "config.gin"])
    configuration.resolve(configuration.train)
    assert configuration.differences(config, configuration.operative_config()) == []


def test_quickstart_twins_differ_in_the_attack_alone():
    robust, plain = resolved("quickstart.gin"), resolved("quickstart_plain.gin")
    assert plain.attack is None and plain.objective.func is objectives.standard_training
    assert robust.objective.func is objectives.adversarial_training
    assert robust.averaging.tau == plain.averaging.tau == 0.995
    assert robust.model.keywords == plain.model.keywords
    assert robust.model.keywords["activation"] == "silu"
    assert robust.attack.attack_fn.keywords["num_steps"] == 10
    assert robust.train_steps == plain.train_steps


def test_the_best_weights_are_those_of_what_is_trained_for():
    assert [resolved(recipe).validation.best_by for recipe in ("at.gin", "trades.gin", "quickstart.gin")] == [
        "robust"
    ] * 3
    assert resolved("quickstart_plain.gin").validation.best_by == "clean"


def test_no_keras_class_is_registered_with_gin():
    def of_this_package(base):
        return {
            found
            for each in base.__subclasses__()
            for found in (each, *of_this_package(each))
            if found.__module__.startswith("robust_keras.")
        }

    classes = of_this_package(keras.layers.Layer) | {keras.Model, keras.layers.Dense}
    assert {"Activation", "BatchNorm", "AdversarialModel"} <= {each.__name__ for each in classes}
    assert configuration.gin.get_configurable("wide_resnet")
    for each in classes:
        with pytest.raises(ValueError):
            configuration.gin.get_configurable(each.__name__)


def test_gin_folder_is_no_package():
    assert not list(pathlib.Path(GIN).rglob("__init__.py"))
