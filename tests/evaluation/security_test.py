"""Security curves of networks whose distances are known, and of ones that mask them."""

import functools
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras import storage, threats
from robust_keras.data import sources
from robust_keras.evaluation import sanity_checks, security, security_file

# Grey images: so many bytes from where the network changes its mind.
BYTES_AWAY = [0.5, 1.5, 2.5, 3.5, 5.5, 7.5, 11.5, 31.5]
SIDE = 4
QUICK = {"num_steps": 20, "num_queries": 20, "batch_size": 8, "progress": False}


def brightness(x):
    """Two logits, whose margin is the mean brightness over one half."""
    bright = 10.0 * (tf.reduce_mean(x, axis=[1, 2, 3]) - 0.5)
    return tf.stack([-bright, bright], axis=-1)


@tf.custom_gradient
def without_gradient(x):
    return tf.identity(x), lambda upstream: tf.zeros_like(x)


def grey(*bytes_away, wrong=0):
    levels = [*(127.5 + away for away in bytes_away), *[100] * wrong]
    images = np.repeat(np.array(levels, np.uint8), SIDE * SIDE).reshape(-1, SIDE, SIDE, 1)
    return sources.Source("grey", images, np.ones(len(levels), np.int32), 2)


def measured(network=brightness, source=None, norm="Linf", epsilon="4/255", **options):
    source = grey(*BYTES_AWAY, wrong=1) if source is None else source
    return security.measure(network, source, threat=threats.threat(norm=norm, epsilon=epsilon), **{**QUICK, **options})


@pytest.fixture(scope="module")
def of_brightness():
    return measured()


def by_radius(points):
    return {point["epsilon_fraction"]: round(9 * point["robust_accuracy"]) for point in points}


# By hand: each byte of distance takes all pixels along, so it is one byte in Linf, four in L2 and sixteen in L1.
@pytest.mark.parametrize(
    "norm, factor",
    [("Linf", 1), pytest.param("L2", 4, marks=pytest.mark.slow), pytest.param("L1", 16, marks=pytest.mark.slow)],
)
def test_the_curve_of_a_linear_network_is_exact(of_brightness, norm, factor):
    found = of_brightness if norm == "Linf" else measured(norm=norm, epsilon=f"{4 * factor}/255")
    left = {0: 8, 1: 7, 2: 6, 3: 5, 4: 4, 6: 3, 8: 2, 12: 1, 16: 1, 24: 1, 32: 0}
    assert by_radius(found["curve"]) == {
        f"{radius * factor}/255" if radius else "0": number for radius, number in left.items()
    }
    np.testing.assert_allclose([point["epsilon"] * 255 for point in found["curve"]], factor * np.array(list(left)))
    assert {check["name"]: check["passed"] for check in found["checks"]} == dict.fromkeys(sanity_checks.NAMES, True)


def test_the_form_of_the_file(of_brightness, tmp_path):
    subject = {"model": "a", "images": None, "norm": "Linf", "epsilon": 4 / 255, "seed": 0}
    found = security_file.read_or_measure(str(tmp_path), subject, lambda: of_brightness, writes=True)
    assert json.loads((tmp_path / "security.json").read_text()) == found == security_file.read(str(tmp_path))
    assert found.keys() == {
        *("format", "norm", "num_examples", "attack", "curve", "random_noise", "checks", "told", "subject")
    }
    assert (found["format"], found["norm"], found["num_examples"]) == (1, "Linf", 9)
    curve, noise = found["curve"], found["random_noise"]
    assert [point["epsilon_fraction"] for point in noise] == [point["epsilon_fraction"] for point in curve]
    assert noise[0] == curve[0] and all(
        by_noise["robust_accuracy"] >= point["robust_accuracy"] for by_noise, point in zip(noise, curve)
    )
    assert "passed: unbounded_attack_wins: " in security_file.summary(found)

    def never():
        raise AssertionError("measured again")

    assert security_file.read_or_measure(str(tmp_path), subject, never, writes=True) == found
    with pytest.raises(ValueError, match="security.json, epsilon = 0.5. Received: 0.01568"):
        security_file.read(str(tmp_path), {**subject, "epsilon": 0.5})


@pytest.mark.parametrize(
    "changed",
    [
        {"format": 2},
        {"curve": None},
        {"curve": [{"epsilon": 0.0, "epsilon_fraction": "0", "robust_accuracy": float("nan")}]},
        {"random_noise": [{"epsilon": float("inf"), "epsilon_fraction": "0", "robust_accuracy": 1.0}]},
        {"curve": [[0.0, "0", 1.0]]},
        {"checks": [{"name": "unbounded_attack_wins", "passed": "yes", "told": ""}]},
        {"checks": [{"name": {}, "passed": True, "told": ""}]},
        {"subject": []},
        {"num_examples": True},
    ],
)
def test_a_file_of_something_else_is_refused(of_brightness, tmp_path, changed):
    storage.write_json(str(tmp_path / "security.json"), {**of_brightness, "subject": {}, **changed})
    with pytest.raises(ValueError, match="Expected a security curve in .*security.json. Received: something else"):
        security_file.read(str(tmp_path))


def test_a_network_that_masks_its_gradient_fails():
    """Attacks with gradients find nothing, and others do."""
    source = grey(*[2.5] * 7, 31.5)
    found = measured(lambda x: brightness(without_gradient(x)), source, num_queries=200)
    passed = {check["name"]: check["passed"] for check in found["checks"]}
    assert passed["unbounded_attack_wins"] is False and passed["black_box_weaker"] is False
    assert "2 failed (unbounded_attack_wins, black_box_weaker)" in found["told"]
    # What Square found counts, whoever did not.
    at_radius = {point["epsilon_fraction"]: point["robust_accuracy"] for point in found["curve"]}
    assert at_radius["3/255"] > at_radius["4/255"] == 1 / 8


CLAIMED = {  # The seventh image, which nothing can break so near, and the fifth are claimed and not believed.
    "broken_by": np.array([1, 1, 1, 1, 1, -1, 1, -1, 0]),
    "adversarial": np.clip(grey(*BYTES_AWAY, wrong=1).images / np.float32(255) - np.float32(4 / 255), 0, 1),
}


def test_it_is_the_same_again_and_believes_nothing(of_brightness):
    assert measured(evaluated=CLAIMED) == of_brightness


def test_what_an_evaluation_found_counts_and_square_needs_pictures():
    source = grey(*BYTES_AWAY, wrong=1)
    vectors = source._replace(images=source.images.reshape(9, -1))
    evaluated = {**CLAIMED, "adversarial": CLAIMED["adversarial"].reshape(9, -1)}
    found = measured(lambda x: brightness(without_gradient(x)[:, :, None, None]), vectors, evaluated=evaluated)
    curve = by_radius(found["curve"])
    assert curve["3/255"] > curve["4/255"] == 4
    passed = {check["name"]: check["passed"] for check in found["checks"]}
    assert passed["unbounded_attack_wins"] is False and passed["black_box_weaker"] is None


def test_a_classifier_that_is_never_right_is_told_nothing():
    found = measured(source=grey(wrong=4))
    assert [point["robust_accuracy"] for point in found["curve"]] == [0.0]
    assert {check["passed"] for check in found["checks"]} == {None}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_images": 0}, "num_images, num_steps and num_queries >= 1. Received: 0, 20, 20"),
        ({"num_steps": 3}, "num_steps >= 4. Received: 3"),
        ({"num_queries": 1.5}, "Received: 9, 20, 1.5"),
        ({"epsilon": 0}, "a radius epsilon > 0 for a security curve. Received: 0"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        measured(**{"num_images": 9, **changes})


def test_from_python(tmp_path):
    network = keras.Sequential([keras.Input((SIDE, SIDE, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    network.set_weights([np.repeat([[-1.0, 1.0]], SIDE * SIDE, axis=0), np.array([8.0, -8.0])])
    source = grey(*BYTES_AWAY, wrong=1)
    attack = functools.partial(rk.attacks.apgd, num_steps=5)
    options = {"norm": "Linf", "epsilon": "4/255", "attacks": [attack], "progress": False, "security_curve": True}
    result = rk.evaluate(network, (source.images, source.labels), **options, workdir=tmp_path)
    assert by_radius(result.security["curve"])["4/255"] == 4 == round(9 * result.robust_accuracy)
    assert "5 passed and 0 failed" in str(result)
    written = (tmp_path / "security.json").read_text()
    again = rk.evaluate(network, (source.images, source.labels), **options, workdir=tmp_path)
    assert again.security == result.security == json.loads(written)
    results, examples = again
    assert results["robust_accuracy"] == result.robust_accuracy and "security" not in results
    with pytest.raises(ValueError, match="radius epsilon > 0 for a security curve"):
        rk.evaluate(network, (source.images, source.labels), **{**options, "epsilon": 0})
