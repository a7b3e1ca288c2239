"""The C program of docs/serving.md, built against the installed TensorFlow."""

import pathlib
import shutil
import subprocess

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from robust_keras.saved_models import export

ROOT = pathlib.Path(__file__).parents[2]
LIBRARIES = ("libtensorflow_cc.so.2", "libtensorflow_framework.so.2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.oldest,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="There is no compiler."),
]


@pytest.fixture(scope="module")
def classify(tmp_path_factory, linear):
    """`classify(images, shape)`: what the program says."""
    folder, installed = tmp_path_factory.mktemp("c"), tf.sysconfig.get_lib()
    linked = [f"-I{installed}/include", f"-L{installed}", f"-Wl,-rpath,{installed}", *(f"-l:{n}" for n in LIBRARIES)]
    source = str(ROOT / "docs" / "serving" / "classify.c")
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", source, "-o", str(folder / "classify"), *linked]
    subprocess.run(command, check=True)
    export.export(linear, folder / "saved_model", card={})
    saved = saved_model_pb2.SavedModel.FromString((folder / "saved_model" / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_uint8"]
    names = [signature.inputs["image"].name, signature.outputs["logits"].name]

    def run(images, shape):
        (folder / "images.bin").write_bytes(images.tobytes())
        given = [folder / "classify", folder / "saved_model", folder / "images.bin", *shape, *names]
        return subprocess.run(list(map(str, given)), capture_output=True, text=True, timeout=120)

    return run


def test_its_logits_are_the_networks(classify, linear):
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3)).astype(np.uint8)
    done = classify(images, (4, 4, 3))
    assert done.returncode == 0, done.stderr
    found = np.array([line.split() for line in done.stdout.splitlines()], float)
    logits = linear(images / np.float32(255), training=False).numpy()
    np.testing.assert_allclose(found[:, 1:], logits, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[:, 0], logits.argmax(-1))


def test_images_of_another_size_end_in_one_line(classify):
    done = classify(np.zeros((2, 4, 6, 2), np.uint8), (4, 6, 2))
    assert done.returncode == 1 and done.stdout == ""
    assert "[2,4,6,2] is not compatible with expected shape [?,4,4,3]" in done.stderr
    done = classify(np.zeros((2, 4, 6, 2), np.uint8), (4, 4, 5))
    assert done.returncode == 1 and "expected whole images" in done.stderr


def test_an_empty_batch(classify):
    done = classify(np.zeros((0, 4, 4, 3), np.uint8), (4, 4, 3))
    assert (done.returncode, done.stdout) == (0, "")
