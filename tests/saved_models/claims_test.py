"""What is attached to an export: claims with the images that show them, a manifest of every file, and the program that
checks them."""

import json
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras import threats
from robust_keras.saved_models import cards, claims, export, signatures, verify
from robust_keras.saved_models.verifying import attacks, checks, claim, files

NUM, EPSILON = 60, 8 / 255


@pytest.fixture(scope="module")
def network():
    """`[4, 4, 3]` to 3 logits, smooth, of an ordinary spread."""
    rng = np.random.default_rng(0)
    image = keras.Input((4, 4, 3))
    hidden = keras.layers.Dense(16, activation="tanh")(keras.layers.Flatten()(image))
    network = keras.Model(image, keras.layers.Dense(3)(hidden))
    for weight in network.weights:
        weight.assign(rng.normal(0.0, 0.8 if len(weight.shape) == 2 else 0.3, weight.shape))
    return network


@pytest.fixture(scope="module")
def data(network):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (NUM, 4, 4, 3)).astype(np.uint8)
    labels = network(images / np.float32(255)).numpy().argmax(-1).astype(np.int32)
    labels[:5] = (labels[:5] + 1) % 3  # Some are wrong before any attack.
    return images, labels


@pytest.fixture(scope="module")
def made(tmp_path_factory, network, data):
    """A folder with an export, `exported`, and its evaluation, `evaluation`."""
    folder = tmp_path_factory.mktemp("made")
    export.export(network, folder / "exported", card={})
    options = {"norm": "Linf", "epsilon": "8/255", "attacks": ["apgd-ce"], "baseline": False}
    rk.evaluate(str(folder / "exported"), data, workdir=folder / "evaluation", **options)
    claims.attach(folder / "exported", evaluation=str(folder / "evaluation"), load_images=lambda dataset: data)
    return folder


@pytest.fixture
def attached(made, tmp_path):
    return pathlib.Path(shutil.copytree(made / "exported", tmp_path / "exported"))


def told(folder, **options):
    """Whether all checks of a folder pass, and the names of those that fail."""
    lines = []
    passed = verify.verify(folder, tell=lines.append, **options)
    failed = [line.split()[1] for line in lines if line.startswith("FAILED")]
    assert passed == (not lines[-1].startswith(("failed", "nothing")))
    return failed


def relist(folder):
    """What anybody can do who edits the folder: a manifest that fits."""
    (folder / "manifest.json").unlink()
    listed = [
        {"name": name, "bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
        for name, path in files.files_below(folder)
    ]
    (folder / "manifest.json").write_text(files.manifest_text(listed))


def edit(folder, **changes):
    """Changes what the claim says, with a manifest that fits."""
    path = folder / "claims" / "claims.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    relist(folder)


def test_a_claim_that_holds(attached):
    assert told(attached) == []


def test_the_manifest_lists_every_file(attached):
    listed = [file["name"] for file in json.loads((attached / "manifest.json").read_text())["files"]]
    found = sorted(path.relative_to(attached).as_posix() for path in attached.rglob("*") if path.is_file())
    assert listed == [name for name in found if name != "manifest.json"]
    assert {"model_card.json", "verify.py", "saved_model.pb", "claims/claims.json"} <= set(listed)


def edited_card(folder):
    (folder / "model_card.json").write_text('{"val_robust": 0.99}')


def swapped_weights(folder):
    path = folder / "variables" / "variables.data-00000-of-00001"
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


def extra_file(folder):
    (folder / "assets").mkdir(exist_ok=True)
    (folder / "assets" / "more").write_text("")


def missing_file(folder):
    (folder / "variables" / "variables.index").unlink()


def linked_file(folder):
    (folder / "model_card.json").rename(folder.parent / "card")
    (folder / "model_card.json").symlink_to(folder.parent / "card")


def linked_folder(folder):
    (folder / "variables").rename(folder.parent / "variables")
    (folder / "variables").symlink_to(folder.parent / "variables")


def another_form(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text().replace("\n", "\n\n", 1))


def no_manifest(folder):
    (folder / "manifest.json").unlink()


def code_that_is_listed(folder):
    (folder / "numpy.py").write_text("raise SystemExit(0)")
    relist(folder)


@pytest.mark.parametrize(
    "tamper",
    [
        edited_card,
        swapped_weights,
        extra_file,
        missing_file,
        linked_file,
        linked_folder,
        another_form,
        no_manifest,
        code_that_is_listed,
    ],
)
def test_the_manifest_shows(tamper, attached):
    tamper(attached)
    assert "manifest" in told(attached)


# Tampers of those who write the manifest anew.


def another_norm(folder):
    edit(folder, norm="L2")


def lowered_epsilon(folder):
    edit(folder, epsilon=4 / 255, epsilon_fraction="4/255")


def other_units(folder):
    edit(folder, epsilon=8.0, epsilon_fraction="8")


def more_images_than_there_are(folder):
    edit(folder, num_examples=10 * NUM)


def a_better_accuracy(folder):
    edit(folder, robust_accuracy=1.0)


def another_attack(folder):
    edit(folder, attacks=[{"name": "square", "examples_broken": NUM}])


def of_another_model(folder):
    edit(folder, model_sha256="0" * 64)


def rewrite_cards(folder, change):
    """Both cards, as an export writes them."""
    card = json.loads((folder / "model_card.json").read_text())
    change(card)
    (folder / "model_card.json").write_text(json.dumps(card))
    (folder / "MODEL_CARD.md").write_text(cards.readable(card))
    relist(folder)


def an_evaluation_with_more(folder):
    told = json.loads((folder / "claims" / "claims.json").read_text())
    more = {"robust_accuracy": 0.99, "model_sha256": "", "results_sha256": ""}
    rewrite_cards(folder, lambda card: card.update(evaluation={**told, **more}))


def in_card(**more):
    return lambda folder: rewrite_cards(folder, lambda card: card.update(more))


def validation(**metrics):
    return {"best": {"step": 1, "metrics": metrics}}


def a_text_with_more(folder):
    with (folder / "MODEL_CARD.md").open("a") as file:
        file.write("\nAccuracy under AutoAttack: 97.3 %. robust accuracy = 0.973\n")
    relist(folder)


def rewrite(folder, change):
    path = folder / "claims" / "examples.npz"
    with np.load(path) as saved:
        arrays = dict(saved)
    change(arrays)
    np.savez(path, **arrays)
    relist(folder)


def altered_adversarials(folder):
    rewrite(folder, lambda arrays: arrays.update(adversarial=1 - arrays["adversarial"]))


def clean_adversarials(folder):
    def change(arrays):
        num = len(arrays["adversarial"])
        arrays["adversarial"] = arrays["clean"][:num] / np.float32(255)

    rewrite(folder, change)


def permuted_labels(folder):
    rewrite(folder, lambda arrays: arrays.update(labels=(arrays["labels"] + 1) % 3))


def chosen_images(folder):
    def change(arrays):
        arrays["positions"] = np.sort(arrays["positions"])

    rewrite(folder, change)


def other_verdicts(folder):
    rewrite(folder, lambda arrays: arrays.update(verdicts=np.full(NUM, -1, np.int32)))


def a_pickle(folder):
    rewrite(folder, lambda arrays: arrays.update(labels=np.array([{}])))


def one_more_array(folder):
    rewrite(folder, lambda arrays: arrays.update(more=np.zeros(3)))


@pytest.mark.parametrize(
    "tamper, check",
    [
        (another_norm, "replay"),
        (lowered_epsilon, "replay"),
        (other_units, "claim"),
        (more_images_than_there_are, "claim"),
        (a_better_accuracy, "claim"),
        (another_attack, "claim"),
        (of_another_model, "claim"),
        (a_text_with_more, "cards"),
        (an_evaluation_with_more, "cards"),
        (altered_adversarials, "replay"),
        (clean_adversarials, "replay"),
        (permuted_labels, "logits"),
        (chosen_images, "claim"),
        (other_verdicts, "reading"),
        (a_pickle, "reading"),
        (one_more_array, "reading"),
    ],
)
def test_a_tamper_is_caught(tamper, check, attached, monkeypatch):
    slow = {"attack": None, "neighbours": None, "gradients": None}
    monkeypatch.setattr(verify, "CHECKS", {k: v for k, v in verify.CHECKS.items() if k not in slow})
    tamper(attached)
    assert check in told(attached)


PUBLISHED = {"clean_accuracy": 0.8, "robust_accuracy": 0.99, "norm": "Linf", "epsilon": "8/255", "attacks": "aa"}


@pytest.mark.parametrize(
    "more",
    [
        {"adversarial_accuracy": 0.931},
        {"remarks": "nine of 10 images withstand AutoAttack"},
        {"intended_use": "Robust accuracy: 93.1 %"},
        {"limits": ["0.931"]},
        {"name": "97.3 % robust"},
        {"name": 0.973},
        {"licence": "robust accuracy"},
        {"step": 0.973},
        {"class_names": ["a", "b", "0.973"]},
        {"versions": {"robust_accuracy": "0.973"}},
        {"inputs": {"serving_default": {"certified": 0.97}}},
        {"source": {"file": {"parameters": {"AutoAttack": 97.3}}, "sha256": "a"}},
        {"threat_model": {"norm": "Linf", "epsilon_fraction": 0.973}},
        {"validation": validation(val_robust=1.99)},
        {"validation": validation(autoattack=0.5)},
        {"published": PUBLISHED},
        {"config": "", "config_sha256": "0"},
        {"weights_sha256": "withstands all attacks"},
        {"class_names": ["a", "b"]},
        {"num_classes": 4},
    ],
)
def test_cards_say_no_more_than_is_claimed(more, attached):
    read = claim.read_claim(attached)
    in_card(**more)(attached)
    with pytest.raises(ValueError, match="model_card.json"):
        verify.check_cards(read, attached)


def test_what_cards_say_unchecked_is_told(attached):
    more = {"remarks": "Ours.", "intended_use": "To play.", "validation": validation(val_robust=0.5)}
    in_card(**more, class_names=["a", "b", "c"])(attached)
    told = verify.check_cards(claim.read_claim(attached), attached)
    assert told == "say what is claimed; not checked: validation, class_names, remarks, intended_use"
    (attached / "LICENSE").write_text("")
    (attached / "variables" / "README").write_text("")
    relist(attached)
    assert files.check_manifest(attached).endswith("not checked: LICENSE, variables/README")


def test_a_digest_of_an_evaluation_is_one(attached):
    told = json.loads((attached / "claims" / "claims.json").read_text())
    told = {name: value for name, value in told.items() if name not in ("format", "model_sha256")}
    for digest in ("0" * 64, "withstands all attacks"):
        in_card(evaluation={**told, "model_sha256": "0" * 64, "results_sha256": digest})(attached)
        if digest[0] == "0":
            verify.check_cards(claim.read_claim(attached), attached)
    with pytest.raises(ValueError, match="has a results_sha256 that is none"):
        verify.check_cards(claim.read_claim(attached), attached)


def test_limits_say_what_signatures_allow():
    assert f"outside [0, 1] by more than {signatures.ROUNDING:g}" in cards.LIMITS[-1]


def test_without_claims_nothing_passes_but_on_demand(attached, capsys):
    shutil.rmtree(attached / "claims")
    relist(attached)
    assert verify.main([str(attached)]) == 1
    assert "nothing to check: nothing is claimed of this model" in capsys.readouterr().out
    assert verify.main([str(attached), "--allow_no_claims"]) == 0
    an_evaluation = {"num_examples": 9, "clean_accuracy": 0.9, "robust_accuracy": 0.8, "norm": "Linf", "attacks": []}
    an_evaluation |= {"confidence_interval_95": [0.7, 0.9], "warnings": [], "model_sha256": "", "results_sha256": ""}
    in_card(evaluation=an_evaluation)(attached)
    assert verify.main([str(attached), "--allow_no_claims"]) == 1


def test_too_few_images_show_nothing(attached, case, capsys):
    with pytest.raises(SystemExit) as ended:
        verify.main([str(attached), "--num_attacked=29"])
    assert ended.value.code == 2 and "num_attacked >= 30" in capsys.readouterr().err
    with pytest.raises(checks.NothingShownError, match="0 of 20 broken: at most 13.9 % at 95 %, fewer than 30"):
        checks.check_attack(case())


# Models whose behaviour belies the claim, whatever was written beside them.


@pytest.fixture(scope="module")
def case(made, network):
    """`case(change)`: a `Case` of the network with its logits changed by `(logits_of, x) -> logits`."""
    read = claim.read_claim(made / "exported")

    def build(change=lambda logits_of, x: logits_of(x), read=read):
        model = attacks.Model(lambda x: change(lambda x: network(x, training=False), x), {})
        return checks.Case(model, read, np.random.default_rng(0), 20)

    return build


@tf.custom_gradient
def falsely(logits, x):
    return logits, lambda upstream: (tf.zeros_like(logits), tf.random.stateless_normal(tf.shape(x), (1, 2)))


def false_gradients(logits_of, x):
    return falsely(tf.stop_gradient(logits_of(x)), x)


def no_gradients(logits_of, x):
    return logits_of(tf.round(x * 255.0) / 255.0)


def quantised_input(logits_of, x):
    return logits_of(x + tf.stop_gradient(tf.round(x * 8.0) / 8.0 - x))


def quantised_logits(logits_of, x):
    logits = logits_of(x)
    return logits + tf.stop_gradient(tf.round(logits) - logits)


@pytest.mark.parametrize("change", [false_gradients, no_gradients, quantised_input, quantised_logits])
def test_gradients_that_are_none_are_caught(change, case):
    checks.check_gradients(case())
    with pytest.raises(ValueError, match="gradients at clean images"):
        checks.check_gradients(case(change))


def test_who_is_hardly_right_may_be_hardly_sure(case):
    read = case().claim
    softened = read._replace(logits=read.logits * np.float32(0.1))
    with pytest.raises(ValueError, match="logits hide how sure the model is"):
        checks.check_logits(case(lambda logits_of, x: 0.1 * logits_of(x), softened))
    weak = softened._replace(verdicts=np.where(np.arange(NUM) % 2, 0, softened.verdicts))  # Right of less than half.
    checks.check_logits(case(lambda logits_of, x: 0.1 * logits_of(x), weak))


def random_logits(logits_of, x):
    logits = logits_of(x)
    return logits + tf.random.normal(tf.shape(logits), 0.0, 0.02)


def logits_of_the_batch(logits_of, x):
    return logits_of(x) + 3.0 * tf.reduce_mean(x)


def not_finite(logits_of, x):
    return logits_of(x) * np.nan


@pytest.mark.parametrize(
    "change, seen",
    [
        (random_logits, "differ by"),
        (logits_of_the_batch, "differ by"),
        (not_finite, "are wrong"),
        (lambda logits_of, x: 1e-3 * logits_of(x), "logits recorded differ"),
        (lambda logits_of, x: -logits_of(x), "are wrong"),
    ],
)
def test_logits_that_are_others_are_caught(change, seen, case):
    tf.random.set_seed(0)
    checks.check_logits(case())
    with pytest.raises(ValueError, match=seen):
        checks.check_logits(case(change))


@pytest.mark.parametrize("change", [lambda logits: 1e-3 * logits, lambda logits: 1e3 * logits])
def test_logits_that_hide_how_sure_the_model_is_are_caught(change, case):
    read = case().claim
    told = read._replace(logits=change(read.logits))
    with pytest.raises(ValueError, match="hide how sure"):
        checks.check_logits(case(lambda logits_of, x: change(logits_of(x)), told))


def answers(network, bundled, *, classes=tf.int64, of_bytes=0.0, of_classes=0):
    """Signatures, where that of bytes has others of the last logit for images that are not bundled, and all have other
    classes.
    """

    def signature(dtype, more):
        def answer(*, image):
            x = tf.cast(image, tf.float32) / (255.0 if dtype.is_integer else 1.0)
            away = tf.reduce_min(tf.reduce_max(tf.abs(x[:, None] - bundled), axis=(2, 3, 4)), axis=1)
            logits = network(x, training=False) + tf.where(away > 1e-3, more, 0.0)[:, None] * [0.0, 0.0, 1.0]
            return {"logits": logits, "class": tf.cast((tf.argmax(logits, axis=-1) + of_classes) % 3, classes)}

        return tf.function(answer).get_concrete_function(image=tf.TensorSpec((None, 4, 4, 3), dtype))

    return {"serving_default": signature(tf.float32, 0.0), "serving_uint8": signature(tf.uint8, of_bytes)}


@pytest.mark.parametrize(
    "options, seen",
    [
        ({}, None),
        ({"of_bytes": 9.0}, "serving_uint8 returns other logits"),
        ({"classes": tf.float32}, None),
        ({"classes": tf.uint8, "of_classes": 1}, "serving_default returns other classes"),
        ({"classes": tf.float32, "of_classes": 1}, "serving_default returns other classes"),
    ],
)
def test_signatures_that_answer_otherwise_are_caught(options, seen, case, network):
    """Of images that are not bundled, too, and of classes of any type."""
    whole = case()
    whole.model.signatures = answers(network, whole.claim.images, **options)
    if seen is None:
        assert checks.check_signatures(whole) == "serving_default, serving_uint8 agree"
        return
    with pytest.raises(ValueError, match=seen):
        checks.check_signatures(whole)


def test_images_that_are_not_robust_are_found(case):
    read = case().claim
    everything = read._replace(verdicts=np.full(len(read.verdicts), -1, np.int32))
    with pytest.raises(ValueError, match=r"\d+ of 20 broken: at most \d+\.\d % at 95 %"):
        checks.check_attack(case(read=everything))


def test_the_copy_beside_a_model_needs_nothing_of_this_package(attached, capsys):
    command = [sys.executable, "-I", str(attached / "verify.py"), "--num_attacked=5", "--quick", "--seed=3"]
    whole = subprocess.run(command, cwd=attached.parent, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stdout
    assert "seed 3" in whole.stdout and "0 of 5 broken: at most 45.1 % at 95 %" in whole.stdout
    assert "no check has failed; nothing was shown by attack" in whole.stdout
    edited_card(attached)
    assert verify.main([str(attached)]) == 1
    told = capsys.readouterr().out
    assert "FAILED manifest" in told and "was not run" in told


@pytest.mark.parametrize("successes, trials, bound", [(0, 100, 0.0295), (1, 100, 0.0466), (3, 10, 0.6066), (5, 5, 1.0)])
def test_bounds_by_hand(successes, trials, bound):
    assert claim.upper_bound(successes, trials) == pytest.approx(bound, abs=1e-4)
    assert claim.upper_bound(0, trials) == pytest.approx(1 - 0.05 ** (1 / trials))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_projections_are_those_of_the_package(norm):
    rng = np.random.default_rng(0)
    x, delta = rng.random((6, 4, 4, 3), np.float32), rng.normal(0, 0.3, (6, 4, 4, 3)).astype(np.float32)
    ball, threat = attacks.Ball(norm, 0.5), threats.threat(norm=norm, epsilon=0.5)
    for moved in (ball.project(x + delta, x), ball.start(x, rng), ball.project(x + ball.direction(delta), x)):
        assert ball.is_inside(moved, x).all() and (np.abs(moved - x).max() > 0.01)
    np.testing.assert_allclose(
        ball.length(delta).ravel(), threat.distance(tf.constant(delta), tf.zeros_like(delta)), rtol=1e-5
    )
    if norm != "L1":  # There the package finds the nearest point of the box too.
        np.testing.assert_allclose(
            ball.project(x + delta, x), threat.project(tf.constant(x + delta), tf.constant(x)), atol=1e-6
        )
    assert not ball.is_inside(x + 2 * delta, x).any()
