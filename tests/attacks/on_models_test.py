"""The public attacks: any model, images and labels of any form, and what comes back."""

import functools
import inspect

import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras import losses, noise, threats
from robust_keras.attacks import presets
from robust_keras.attacks.pgd import pgd as inner_pgd

BYTES = np.random.default_rng(1).integers(0, 256, (11, 8, 8, 3)).astype(np.uint8)
X = BYTES / np.float32(255)
DISTANCES = {
    "Linf": lambda delta: np.abs(delta).max(-1),
    "L2": lambda delta: np.sqrt((delta**2).sum(-1)),
    "L1": lambda delta: np.abs(delta).sum(-1),
}
RADII = {"Linf": 16 / 255, "L2": 1.0, "L1": 12.0}
# Of each attack, settings with which it breaks something in no time, and whether it draws anything.
ATTACKS = {
    "pgd": ({"num_steps": 5}, True),
    "apgd": ({"num_steps": 5}, True),
    "apgd_targeted": ({"num_steps": 5, "num_targets": 2}, True),
    "fab": ({"num_steps": 5, "num_restarts": 1}, False),
    "square": ({"num_queries": 20}, True),
    "multi_targeted": ({"num_steps": 5, "num_restarts": 1, "num_targets": 2}, True),
    "autoattack": ({"version": "custom", "attacks": ["apgd-dlr"]}, True),
}


@pytest.fixture(scope="module")
def network(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def labels(network):
    return np.argmax(network(X, training=False), axis=-1)


def is_right(network, x, labels):
    return np.argmax(network(x, training=False), axis=-1) == labels


@pytest.mark.parametrize("name, norm", [(name, "Linf") for name in ATTACKS] + [("pgd", "L2"), ("apgd", "L1")])
def test_every_attack(network, labels, name, norm):
    settings, draws = ATTACKS[name]
    attack = functools.partial(getattr(rk.attacks, name), norm=norm, epsilon=RADII[norm], batch_size=4, **settings)
    x_adv = attack(network, BYTES, labels)
    assert isinstance(x_adv, np.ndarray) and x_adv.dtype == np.float32 and x_adv.shape == BYTES.shape
    assert x_adv.min() >= 0.0 and x_adv.max() <= 1.0
    distance = DISTANCES[norm]((x_adv - X).reshape(len(X), -1))
    assert np.all(distance <= RADII[norm] * (1 + 1e-5) + 1e-6)
    assert np.mean(is_right(network, x_adv, labels)) < 1.0 and np.all(is_right(network, X, labels))
    # Other forms of the same, and the seed.
    np.testing.assert_array_equal(attack(network, tf.constant(X), tf.one_hot(labels, 4)), x_adv)
    assert np.any(attack(network, BYTES, labels, seed=1) != x_adv) == draws


def test_forms_of_models_images_and_labels(network, labels):
    attack = functools.partial(rk.attacks.pgd, norm="Linf", epsilon="8/255", num_steps=3)
    expected = attack(network, BYTES, labels)
    of_bytes = keras.Sequential([keras.layers.Rescaling(1 / 255), network])
    with_softmax = keras.Sequential([network, keras.layers.Softmax()])
    same = {
        "float64": (network, BYTES / 255, labels, {}),
        "a list": (network, X.tolist(), labels.tolist(), {}),
        "[N, 1]": (network, X, labels[:, None], {}),
        "one-hot integers": (network, X, np.eye(4, dtype=np.int32)[labels], {}),
        "a function": (lambda x: network(x, training=False), X, labels, {}),
        "0 to 255": (of_bytes, BYTES.astype(np.float32), labels, {"bounds": (0, 255)}),
        "bytes for 0 to 255": (of_bytes, BYTES, labels, {"bounds": (0, 255)}),
        "probabilities": (with_softmax, X, labels, {"from_logits": False}),
    }
    says_so = rk.AdversarialModel(with_softmax, norm="Linf", epsilon="8/255", from_logits=False)
    same["an adversarial model"] = (says_so, BYTES, labels, {"norm": None, "epsilon": None})
    for name, (model, x, y, options) in same.items():
        x_adv = attack(model, x, y, **options)
        scale = 255 if "bounds" in options else 1
        assert x_adv.dtype == np.float32 and x_adv.max() > scale / 2, name
        np.testing.assert_allclose(x_adv / scale, expected, atol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def on_images(network, labels):
    """`(name, norm) -> x_adv` of an attack on the images as they are, found once."""
    return functools.cache(
        lambda name, norm: getattr(rk.attacks, name)(
            network, X, labels, norm=norm, epsilon=RADII[norm], **ATTACKS[name][0]
        )
    )


@pytest.mark.parametrize(
    "norm, shape", [("Linf", (8, 24)), ("L2", (192,)), pytest.param("L1", (192,), marks=pytest.mark.slow)]
)
def test_images_of_any_rank(network, labels, on_images, norm, shape):
    def of_shape(x):
        return network(tf.reshape(x, (-1, 8, 8, 3)), training=False)

    for name in ("pgd", "apgd", "fab"):
        attack = functools.partial(getattr(rk.attacks, name), norm=norm, epsilon=RADII[norm], **ATTACKS[name][0])
        x_adv = attack(of_shape, X.reshape(11, *shape), labels)
        np.testing.assert_allclose(x_adv.reshape(X.shape), on_images(name, norm), atol=1e-3, err_msg=name)
    with pytest.raises(ValueError, match=r"Expected images \[batch, height, width, channels\]"):
        rk.attacks.square(of_shape, X.reshape(11, *shape), labels, norm=norm, epsilon=RADII[norm])


def test_no_images_are_no_images(network):
    x_adv = rk.attacks.pgd(network, BYTES[:0], np.zeros(0, int), norm="Linf", epsilon="8/255")
    assert x_adv.shape == (0, 8, 8, 3) and x_adv.dtype == np.float32


def test_pgd_is_pgd_40_of_the_paper_by_default(network, labels):
    linf = threats.threat(norm="Linf", epsilon="8/255")
    seeds = noise.fold_in(noise.example_seeds(0, 0, tf.range(len(X))), noise.ATTACK)
    own = presets.pgd40(threat=linf)
    assert own.func is inner_pgd
    expected = tf.function(own, autograph=False)(functools.partial(network, training=False), X, labels, seeds=seeds)
    np.testing.assert_allclose(rk.attacks.pgd(network, X, labels, norm="Linf", epsilon="8/255"), expected, atol=1e-5)


def test_batches_are_of_one_size_and_the_rest_of_autoattack_is_what_stands(network, labels):
    sizes = []

    def recording(x):
        sizes.append(x.shape[0])  # While it is traced.
        return network(x, training=False)

    x_adv = rk.attacks.autoattack(
        recording, X, labels, norm="Linf", epsilon="2/255", version="custom", attacks=["apgd-ce", "fab-t"], batch_size=8
    )
    broken = ~is_right(network, x_adv, labels)
    first = rk.attacks.apgd(network, X, labels, norm="Linf", epsilon="2/255", num_restarts=5, batch_size=8)
    broken_by_first = ~is_right(network, first, labels)
    assert 0 < broken_by_first.sum() < len(X)
    assert set(sizes) == {8, min(8, int((~broken_by_first).sum()))}
    np.testing.assert_array_equal(x_adv[broken_by_first], first[broken_by_first])
    np.testing.assert_array_equal(x_adv[~broken], X[~broken])


def test_a_model_of_one_batch_size(network, labels):
    def of_four(x):
        return network(tf.ensure_shape(x, (4, 8, 8, 3)), training=False)

    of_four.batch_size = 4
    attack = functools.partial(rk.attacks.pgd, norm="Linf", epsilon="8/255", num_steps=2)
    np.testing.assert_allclose(attack(of_four, X, labels), attack(network, X, labels), atol=1e-5)


def two_inputs():
    one, other = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    return keras.Model([one, other], keras.layers.Dense(4)(keras.layers.Flatten()(one - other)))


def flat(x):
    return tf.one_hot(tf.argmax(tf.reshape(x, (-1, 192))[:, :4], axis=-1), 4, off_value=-1.0)


BAD = {
    "a label outside": ({"y": np.full(11, 4)}, "labels of the model's 4 classes. Received: 4"),
    "rows of another width": (
        {"y": np.eye(3)[np.zeros(11, int)]},
        "labels of the model's 4 classes. Received: rows of 3",
    ),
    "float labels": ({"y": np.zeros(11)}, "Expected labels, .* Received: float64"),
    "too few labels": ({"y": np.zeros(3, int)}, "a label for each image. Received: 3 for images .11, 8, 8, 3"),
    "images outside": ({"x": X * 200}, "within the bounds .* Received: values from"),
    "images that contradict": ({"bounds": (0, 255)}, "nearly black there"),
    "other integers": ({"x": BYTES.astype(int)}, "bytes, uint8, or as floats. Received: int64"),
    "another shape": ({"x": BYTES[:, :4]}, r"of the network's shape \(8, 8, 3\). Received: \(4, 8, 3\)"),
    "two inputs": ({"network": two_inputs()}, "one input, the images. Received: "),
    "no gradient": ({"network": flat}, "through which gradients flow; of attacks, square alone needs none"),
    "probabilities": (
        {"network": lambda x: tf.nn.softmax(tf.reshape(x, (-1, 192))[:, :4])},
        "from_logits=False in Python",
    ),
    "a norm": ({"norm": "linf"}, "a norm out of Linf, L2, L1. Received: 'linf'"),
    "no threat model": ({"norm": None}, "a threat model, such as norm='Linf', epsilon='8/255'. Received: norm=None"),
    "a radius": ({"epsilon": 8}, "such as '8/255'"),
    "a setting": ({"steps": 3}, "settings out of loss_fn, num_steps, .*Received: steps"),
    "a bad setting": ({"num_steps": 0}, "num_steps and num_restarts >= 1. Received: 0"),
    "a batch size": ({"batch_size": 0}, "a batch_size >= 1. Received: 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(network, labels, name):
    changes, message = BAD[name]
    given = {"network": network, "x": X, "y": labels, "norm": "Linf", "epsilon": "8/255", **changes}
    with pytest.raises(ValueError, match=message) as refusal:
        rk.attacks.pgd(**given)
    assert "\n" not in str(refusal.value)


def test_square_needs_no_gradients(labels):
    x_adv = rk.attacks.square(flat, X, labels, norm="Linf", epsilon="64/255", num_queries=5)
    assert x_adv.shape == X.shape


def test_a_program_is_told_where_to_go(network, labels):
    attack = functools.partial(rk.attacks.pgd, network, norm="Linf", epsilon="8/255")
    with pytest.raises(ValueError, match="such as attacks.pgd.pgd"):
        tf.function(lambda x: attack(x, labels), autograph=False)(X)


@pytest.mark.parametrize("name", ATTACKS)
def test_signatures_and_docstrings_tell_every_setting(name):
    attack = getattr(rk.attacks, name)
    parameters = inspect.signature(attack).parameters
    assert list(parameters)[:5] == ["network", "x", "y", "norm", "epsilon"]
    own = list(parameters)[9:]
    assert own and all(f"`{each}`" in attack.__doc__ for each in own)
    assert all(parameters[each].default is not inspect.Parameter.empty for each in own), "needs nothing else"
    assert attack.__name__ == name and "Returns:" in attack.__doc__


def test_the_modules_are_still_there():
    assert rk.attacks.pgd is not inner_pgd and rk.attacks.on_models.pgd is rk.attacks.pgd
    assert rk.attacks.pgd.inner.func is inner_pgd and rk.attacks.pgd.inner.keywords["loss_fn"] is losses.margin
