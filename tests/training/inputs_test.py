"""What training is given: what is refused before the first step, and labels in each form that is taken."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras import storage
from robust_keras.data import training_batches
from robust_keras.training import adversarial_model, objectives
from robust_keras.training.optimizer import NesterovSGD
from tests.models.weights_test import nested
from tests.training.train_test import tiny_data, tiny_run


def changed(part, **fields):
    """`tiny_data` with other fields of a source."""

    def data(data_dir=None):
        whole = tiny_data()
        source = getattr(whole, part)
        return whole._replace(**{part: source._replace(**{name: f(source) for name, f in fields.items()})})

    return data


@pytest.mark.parametrize("part", ["labelled", "validation"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": lambda s: s.images / np.float32(255)}, "as bytes, uint8.*in 'tiny'.*Received: float32"),
        ({"images": lambda s: s.images.astype(np.float32)}, "as bytes, uint8.*Received: float32"),
        ({"images": lambda s: s.images[..., 0]}, r"as bytes, uint8 \[N, height, width, channels\]"),
        ({"labels": lambda s: s.labels[1:]}, r"integers, \[N\], in 'tiny'.*Received: uint8 \(\d+, 8, 8, 3\) and int32"),
        ({"labels": lambda s: s.labels + 1}, "labels from 0 to 3 in 'tiny'. Received: 4"),
        ({"labels": lambda s: s.labels - 1}, "labels from 0 to 3 in 'tiny'. Received: -1"),
        ({"labels": lambda s: s.labels.astype(np.float32)}, "labels as integers.*in 'tiny'.*float32"),
    ],
)
def test_data_that_training_would_misread_is_refused(tmp_path, part, fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, data=changed(part, **fields))
    assert not list(tmp_path.iterdir())


def test_labels_in_a_column_and_one_hot_are_the_labels(tmp_path):
    forms = {
        "row": lambda s: s.labels,
        "column": lambda s: s.labels[:, None],
        "one-hot": lambda s: np.eye(4, dtype=np.float32)[s.labels],
    }
    weights = []
    for name, labels in forms.items():
        data = changed("labelled", labels=labels)
        tiny_run(tmp_path / name, data=data, model=nested, train_steps=2, validate_every=100)
        weights.append(storage.read(tmp_path / name / "checkpoints", 2).arrays)
    for other in weights[1:]:
        for name, array in weights[0].items():
            np.testing.assert_array_equal(other[name], array, err_msg=name)


def batch_with(**changes):
    """A dataset of one batch."""
    labels = np.arange(8, dtype=np.int32) % 4
    batch = {
        "image": np.zeros((8, 8, 8, 3), np.uint8),
        "label": labels,
        "targets": np.eye(4, dtype=np.float32)[labels],
        "seeds": np.zeros((8, 2), np.int32),
        "is_labelled": np.ones(8, np.int32),
        **changes,
    }
    return tf.data.Dataset.from_tensors({name: values for name, values in batch.items() if values is not None})


def compiled(network):
    model = adversarial_model.AdversarialModel(network, objective=objectives.standard_training)
    model.compile(optimizer=NesterovSGD(0.1), jit_compile=False)
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((8, 8, 8, 3), np.float32)}, "as bytes, uint8.*Received: float32"),
        ({"label": np.arange(7, dtype=np.int32) % 4}, "as many of each. Received: .*'label': 7"),
        ({"label": np.arange(8, dtype=np.int32)}, "labels from 0 to 3. Received: 7"),
        ({"targets": np.zeros(8, np.int32)}, "targets as probabilities"),
        ({"seeds": None}, "Received: no seeds"),
    ],
)
def test_a_batch_that_a_step_would_misread_is_refused(tiny_model, changes, message):
    model = compiled(tiny_model)
    before = [weight.numpy() for weight in tiny_model.weights]
    with pytest.raises(ValueError, match=message):
        model.fit(batch_with(**changes), verbose=0)
    for weight, value in zip(tiny_model.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_labels_of_a_batch_in_a_column_are_its_labels(make_tiny_model):
    def trained(objective, label):
        model = adversarial_model.AdversarialModel(network := make_tiny_model(), objective=objective)
        model.compile(optimizer=NesterovSGD(0.1), jit_compile=False)
        model.fit(batch_with(label=label), verbose=0)
        return network.get_weights()

    def of_labels(logits_fn, x, x_adv, labels, targets):
        return keras.ops.sparse_categorical_crossentropy(labels, logits_fn(x), from_logits=True)

    labels = np.arange(8, dtype=np.int32) % 4
    for row, column in zip(trained(of_labels, labels), trained(of_labels, labels[:, None]), strict=True):
        np.testing.assert_array_equal(row, column)


def test_batches_of_a_recipe_are_looked_at_before_the_first_step(tmp_path):
    def floats(*args, **kwargs):
        made = training_batches.batches(*args, batch_size=8, group_size=4, **kwargs)
        return made.map(lambda batch: {**batch, "image": tf.cast(batch["image"], tf.float32) / 255.0})

    with pytest.raises(ValueError, match="as bytes, uint8"):
        tiny_run(tmp_path, batches=functools.partial(floats))
    assert not (tmp_path / "checkpoints").exists()
