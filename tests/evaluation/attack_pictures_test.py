"""Figures of attacks: what is drawn where, of images and models of any form."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import robust_keras as rk
from robust_keras.evaluation import pictures

BYTES = np.random.RandomState(1).randint(20, 236, (11, 8, 8, 3)).astype(np.uint8)
X = BYTES / np.float32(255)
# Half of the radius, and to the other side in the lower half.
CHANGE = np.float32(4 / 255) * np.where(np.arange(8) < 4, 1, -1)[:, None, None].astype(np.float32)


@pytest.fixture(scope="module")
def network(make_tiny_model):
    return make_tiny_model()


@pytest.fixture(scope="module")
def labels(network):
    """Of the images, the second of them wrong."""
    found = np.argmax(network(X, training=False), axis=-1)
    found[1] = (found[1] + 1) % 4
    return found


def drawn(figure):
    """Images, titles, colours of titles and labels of the axes that are seen, by rows."""
    seen = [axes for axes in figure.axes if axes.axison]
    images = [axes.images[0].get_array() for axes in seen]
    titles = [axes.get_title() for axes in seen]
    return images, titles, [axes.title.get_color() for axes in seen], [axes.get_ylabel() for axes in seen]


def test_what_is_drawn(network, labels):
    figure = pictures.of_attack(network, (BYTES[:2], labels[:2]), X[:2] + CHANGE, epsilon="8/255")
    images, titles, colours, rows = drawn(figure)
    assert rows == ["clean", "", "adversarial", "", "difference\n\N{MULTIPLICATION SIGN} 16", ""]
    np.testing.assert_allclose(images[0], X[0], atol=1e-6)
    np.testing.assert_allclose(images[2], X[0] + CHANGE, atol=1e-6)
    np.testing.assert_allclose(images[5], np.broadcast_to(0.5 + CHANGE / (16 / 255), (8, 8, 3)), atol=1e-4)
    clean = np.argmax(network(X[:2], training=False), axis=-1)
    attacked = np.argmax(network(X[:2] + CHANGE, training=False), axis=-1)
    assert titles[:2] == [f"true: {labels[k]}\npredicted: {clean[k]}" for k in (0, 1)]
    assert titles[2:] == [*(f"predicted: {attacked[k]}" for k in (0, 1)), "", ""]
    assert colours[:2] == ["black", "tab:red"]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_without_a_radius_the_largest_difference_is_black_or_white(network, labels):
    images, *_ = drawn(pictures.of_attack(network, (X, labels), X + CHANGE, limit=1))
    assert len(images) == 3 and images[2].min() == pytest.approx(0, abs=1e-3)
    images, *_ = drawn(pictures.of_attack(network, (X, labels), X, limit=1))
    assert np.all(images[2] == 0.5)


def test_many_images_stand_in_rows_of_eight(network, labels):
    figure = pictures.of_attack(network, (X, labels), X + CHANGE, limit=20)
    assert len(figure.axes) == 6 * 8 and len(drawn(figure)[0]) == 3 * 11
    assert len(drawn(pictures.of_attack(network, (X, labels), X + CHANGE))[0]) == 3 * 8


def of_one_channel(x):
    return tf.reshape(x, (-1, 64))[:, :3]


@pytest.mark.parametrize("shape", [(8, 8, 1), (8, 8)])
def test_one_channel(shape):
    x = X[..., 0].reshape(11, *shape)
    x_adv = x + CHANGE.reshape((8, 1, 1)[: len(shape)])
    named = pictures.of_attack(of_one_channel, (x, np.eye(3)[[0] * 11]), x_adv, class_names=["ape", "bee", "cow"])
    images, titles, *_ = drawn(named)
    assert images[0].shape == (8, 8) and titles[0].startswith("true: ape\npredicted: ")
    assert named._repr_png_().startswith(b"\x89PNG")


def test_bytes_bounds_and_a_fixed_batch_are_the_same(network, labels, tmp_path):
    def of_four(x):
        return network(tf.ensure_shape(x, (4, 8, 8, 3)), training=False)

    of_four.batch_size = 4
    of_bytes = keras.Sequential([keras.layers.Rescaling(1 / 255), network])
    network.save(tmp_path / "network.keras")
    x_adv = (BYTES + 4).astype(np.uint8)
    expected = drawn(pictures.of_attack(network, (X, labels), x_adv / np.float32(255)))
    forms = {
        "bytes": (network, (BYTES, labels), x_adv, {}),
        "0 to 255": (of_bytes, (BYTES, labels[:, None]), x_adv.astype(np.float32), {"bounds": (0, 255)}),
        "fixed": (of_four, (X, labels), x_adv, {}),
        "a file": (tmp_path / "network.keras", (X, labels), x_adv, {}),
        "a model that says so": (
            rk.AdversarialModel(of_bytes, epsilon="8/255", bounds=(0, 255)),
            (BYTES, labels),
            x_adv,
            {},
        ),
    }
    for name, (model, data, adversarial, options) in forms.items():
        found = drawn(pictures.of_attack(model, data, adversarial, **options))
        np.testing.assert_allclose(found[0], expected[0], atol=1e-4, err_msg=name)
        assert found[1:] == expected[1:], name


@pytest.fixture(scope="module")
def measured(network, labels):
    return rk.evaluate(
        network, (BYTES, labels), norm="Linf", epsilon="3/255", attacks="pgd20", progress=False, diagnose=False
    )


def test_of_an_evaluation_what_was_broken(measured, network, labels):
    (broken,) = np.nonzero(measured.examples["broken_by"] > 0)
    assert 1 < len(broken) < 8
    images, titles, colours, rows = drawn(measured.pictures(network, (X, labels)))
    num = len(broken)
    np.testing.assert_allclose(np.stack(images[:num]), X[broken], atol=1e-6)
    np.testing.assert_allclose(np.stack(images[num : 2 * num]), measured.examples["adversarial"][broken])
    assert colours == ["black"] * num + ["tab:red"] * num + ["black"] * num
    assert rows[2 * num] == "difference\n\N{MULTIPLICATION SIGN} 42" and titles[0].startswith(
        f"true: {labels[broken[0]]}\n"
    )
    assert len(drawn(measured.pictures(network, (X, labels), limit=1))[0]) == 3
    with pytest.raises(ValueError, match="that were evaluated. Received: others"):
        measured.pictures(network, (255 - BYTES, labels))


def test_of_an_evaluation_that_broke_nothing_the_first(measured, network, labels):
    nothing = measured.examples | {"adversarial": X, "broken_by": np.full(11, -1)}
    assert len(drawn(measured._replace(examples=nothing).pictures(network, (X, labels)))[0]) == 3 * 8


def test_the_chart_has_a_bar_for_each_attack(measured):
    after = [{"attack": "pgd", "robust_accuracy": 0.5}, {"attack": "pgd", "robust_accuracy": 0.25}]
    results = measured.results | {"robust_accuracy_after": after, "clean_accuracy": 0.75, "robust_accuracy": 0.25}
    (axes,) = measured._replace(results=results).chart().axes
    assert [bar.get_height() for bar in axes.patches] == [75, 50, 25]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["clean", "after\npgd", "after\npgd"]
    assert measured.chart()._repr_png_().startswith(b"\x89PNG")


BAD = {
    "fewer": ({"x_adv": X[:3]}, r"an adversarial image for each image. Received: .*\(3, 8, 8, 3\)"),
    "two channels": ({"data": (X[..., :2], np.zeros(11, int)), "x_adv": X[..., :2]}, "1 or 3 channels"),
    "names": ({"class_names": ["ape"]}, "a name for each of 4 classes. Received: 1"),
    "a label": ({"data": (X, np.full(11, 4))}, "the model's 4 classes. Received: 4"),
    "limit": ({"limit": 0}, "a limit of images, an integer >= 1. Received: 0"),
    "outside": ({"x_adv": X + 1}, "within the bounds"),
    "radius": ({"epsilon": 8}, "such as '8/255'"),
    "another network": ({"network": keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Flatten()])}, "shape"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(network, labels, name):
    changes, message = BAD[name]
    with pytest.raises(ValueError, match=message) as refusal:
        pictures.of_attack(**{"network": network, "data": (X, labels), "x_adv": X, **changes})
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("Expected ")
