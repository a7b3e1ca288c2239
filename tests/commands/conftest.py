"""A small data set, and a run on it."""

import numpy as np
import pytest
from command_line import arguments, call

from robust_keras.commands import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An npz file of 64 small images in 4 classes."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    random = np.random.RandomState(0)
    image, label = random.randint(0, 256, (64, 8, 8, 3)).astype(np.uint8), np.arange(64) % 4
    np.savez(path, image=image, label=label)
    return path


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """The workdir of a finished tiny run."""
    workdir = tmp_path_factory.mktemp("runs") / "at"
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, train, *arguments(images, workdir))
    return workdir
