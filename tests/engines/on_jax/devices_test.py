"""Which devices JAX has, who holds them, and what `auto` makes of it."""

import importlib.util
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf

from robust_keras.engines import replicas, strategies
from robust_keras.engines.on_jax import devices

ROOT = pathlib.Path(__file__).parents[3]


def chips(kind, count, platform="tpu"):
    return [types.SimpleNamespace(platform=platform, device_kind=kind, id=k) for k in range(count)]


@pytest.fixture
def has(monkeypatch):
    """`has(tensorflow={"GPU": 2}, jax=devices)`: what a machine has."""
    for name in ("TF_CONFIG", "TPU_NAME", "COLAB_TPU_ADDR"):
        monkeypatch.delenv(name, raising=False)
    strategies._made.cache_clear()
    monkeypatch.setattr(strategies, "_made", lambda name, *of: name)
    monkeypatch.setattr(strategies, "_default_strategy", lambda: "one")
    monkeypatch.setattr(strategies, "description", lambda strategy: f"what {strategy} has")

    def has(tensorflow=None, jax=()):
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * (tensorflow or {}).get(kind, 0))
        monkeypatch.setattr(devices, "_may_have_accelerator", lambda: True)
        monkeypatch.setattr(devices, "_devices", lambda: list(jax))

    return has


@pytest.mark.parametrize(
    "tensorflow, jax, expected, why",
    [
        ({"TPU": 8}, chips("TPU v5 lite", 8), "tpu", "TensorFlow has a TPU"),
        ({"GPU": 2}, chips("NVIDIA H200", 2, "gpu"), "mirrored", "TensorFlow has GPUs"),
        ({"GPU": 1}, chips("NVIDIA H200", 1, "gpu"), "one", "TensorFlow has GPUs"),
        ({}, chips("TPU v5 lite", 1), "jax", "TensorFlow has no accelerator, and JAX has"),
        ({}, chips("NVIDIA H200", 1, "gpu"), "jax", "TensorFlow has no accelerator, and JAX has"),
        ({}, chips("cpu", 4, "cpu"), "one", "TensorFlow and JAX have no accelerator"),
    ],
)
def test_auto_takes_what_there_is_and_says_why(has, tensorflow, jax, expected, why):
    has(tensorflow, jax)
    assert strategies.strategy("auto") == expected
    assert strategies.announcement() == f"Computing on what {expected} has ({why})"
    assert strategies.announcement("one") == "Computing on what one has (--strategy=one)"


def test_jax_is_not_imported_for_nothing(monkeypatch):
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    monkeypatch.setenv("JAX_PLATFORMS", "")
    installed = {"jax"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in installed or None)
    assert not devices._may_have_accelerator()
    installed.add("libtpu")
    assert devices._may_have_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not devices._may_have_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    installed.remove("jax")
    assert not devices._may_have_accelerator()


def test_a_tpu_that_tensorflow_holds_is_refused(has):
    has({"TPU": 1}, chips("TPU v5 lite", 1))
    with pytest.raises(ValueError, match="Expected a TPU that TensorFlow leaves to JAX.*Received: one that it holds"):
        devices.take()


def test_gpus_are_taken_from_tensorflow_or_refused(has, monkeypatch):
    has({"GPU": 1}, chips("NVIDIA H200", 1, "gpu"))
    hidden = []
    monkeypatch.setattr(tf.config, "set_visible_devices", lambda devices, kind: hidden.append((devices, kind)))
    assert len(devices.take()) == 1
    assert hidden == [([], "GPU")]

    def held(devices, kind):
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", held)
    with pytest.raises(ValueError, match="Expected the strategy jax before .* Received: GPUs that it holds"):
        devices.take()


def test_without_jax_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    with pytest.raises(ValueError, match=r"Expected the package jax; pip install 'robust_keras\[jax\]' brings it\. Re"):
        devices.take()


def test_a_jax_that_is_of_no_use_is_an_error_of_one_line(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(__version__="0.5.2"))
    with pytest.raises(ValueError, match="Expected JAX 0.6.2 or newer for the strategy jax. Received: 0.5.2"):
        devices.take()
    monkeypatch.delitem(sys.modules, "jax")
    (tmp_path / "jax.py").write_text("raise RuntimeError('jaxlib is older\\nthan jax')")
    with pytest.raises(ValueError, match="Expected the package jax; .* Received: jaxlib is older than jax"):
        devices.take()


def test_jax_without_devices_is_an_error_of_one_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "tpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--gin_file=gin/quickstart.gin", "--strategy=jax"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "Expected devices that JAX can use, or --strategy=one. Received: Unable to initialize" in line


def test_too_little_memory_is_an_error_of_tensorflow(on_jax):
    with on_jax(1).scope():
        large = replicas.over_replicas(lambda x: tf.tile(x, [1, 1 << 36]))
        with pytest.raises(tf.errors.ResourceExhaustedError):
            large(np.ones((4, 3), np.float32))
