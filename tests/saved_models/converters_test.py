"""TFLite and ONNX files, read by their runtimes."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from robust_keras.models import wide_resnet
from robust_keras.saved_models import converters


@pytest.fixture(scope="module")
def resnet(randomised):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    shape = {"input_shape": (8, 8, 3), "statistics_group_size": 4}
    return randomised(wide_resnet.wide_resnet(depth=10, width=1, num_classes=5, mean=mean, std=std, **shape))


@pytest.mark.parametrize("num", [1, 3])
def test_tflite(resnet, tmp_path, num):
    path = str(tmp_path / "model.tflite")
    assert 0 < converters.export_tflite(resnet, path) < 1e-5
    x = np.random.default_rng(1).random((num, 8, 8, 3), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = tf.lite.Interpreter(path).get_signature_runner("serving_default")(image=x)
    logits = resnet(x, training=False).numpy()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5)
    np.testing.assert_allclose(found["probabilities"], tf.nn.softmax(logits), atol=1e-5)
    np.testing.assert_array_equal(found["class"], logits.argmax(-1))
    with pytest.raises(ValueError, match=f"new file. Received: {path}"):
        converters.export_tflite(resnet, path)


def test_onnx(resnet, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    path = str(tmp_path / "model.onnx")
    assert 0 < converters.export_onnx(resnet, path) < 1e-5
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_inputs()] == ["image"]
    names = ["logits", "probabilities", "class"]
    x = np.random.default_rng(1).random((3, 8, 8, 3), np.float32)
    for num in (0, 1, 3):
        found = dict(zip(names, session.run(names, {"image": x[:num]})))
        np.testing.assert_allclose(found["logits"], resnet(x, training=False)[:num], atol=1e-5)
        np.testing.assert_array_equal(found["class"], found["logits"].argmax(-1))


def test_without_its_packages_onnx_is_refused_at_once(tmp_path, linear, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tf2onnx", None)
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'robust_keras\[onnx\]'"):
        converters.export_onnx(linear, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_other_logits_are_refused(linear, tmp_path, monkeypatch):
    monkeypatch.setattr(converters, "TOLERANCE", -1.0)
    with pytest.raises(ValueError, match="Expected logits of .*model.tflite within -1 of the network's"):
        converters.export_tflite(linear, tmp_path / "model.tflite")
    assert not (tmp_path / "model.tflite").exists()


def test_what_tflite_has_not_is_refused(tmp_path):
    image = keras.Input((4, 4, 3))
    special = keras.layers.Lambda(lambda x: tf.raw_ops.Digamma(x=x), output_shape=(48,))
    network = keras.Model(image, keras.layers.Dense(3)(special(keras.layers.Flatten()(image))))
    with pytest.raises(ValueError, match="Expected a network that TFLite has. Received: "):
        converters.export_tflite(network, tmp_path / "model.tflite")
