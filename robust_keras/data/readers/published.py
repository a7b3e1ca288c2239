"""Published files of extra data: where they are, and whether a file is what was published."""

import json
import os
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras import storage

CARMON_FILE = "ti_500K_pseudo_labeled.pickle"
DDPM_FILE = "cifar10_ddpm.npz"
HOW_TO_LABEL = "scripts/pseudo_label.py gives the images of a pool their labels"
_CARMON_ID = "1LTw3Sb5QoiCCN-6Y5PEKkq9C9W60w-Hi"


class Published(NamedTuple):
    """What is known of a published file; None where it is not."""

    url: str
    num_bytes: int | None = None
    sha256: str | None = None
    num_images: int | None = None
    num_classes: int | None = None


# By file name: a file of that name is taken for the published one, and has to match.
PUBLISHED = {
    CARMON_FILE: Published(
        f"https://drive.google.com/uc?id={_CARMON_ID}",
        num_images=500_000,
        num_classes=10,
    ),
    DDPM_FILE: Published(
        f"https://storage.googleapis.com/dm-adversarial-robustness/{DDPM_FILE}",
        num_classes=10,
    ),
}


class DataUnavailable(ValueError):
    """Data is not on this machine and could not be fetched; the message says how to get it."""


def find_file(name: str, path: str, folder: str, exists: Callable = tf.io.gfile.exists, what: str = "file") -> str:
    """The path as it is, or in the folder of the data sets.

    Raises:
        DataUnavailable: where neither `exists`.
    """
    path = os.path.expanduser(path)
    for candidate in (path, os.path.join(folder, path)):
        if exists(candidate):
            return candidate
    raise DataUnavailable(f"Expected an existing {what} in {name!r}. Received: no {path}, neither here nor in {folder}")


def verify(path: str, published: Published) -> None:
    """Checks a file against the published size and SHA-256, where they are known."""
    if published.num_bytes is None and published.sha256 is None:
        return
    stat = tf.io.gfile.stat(path)
    if published.num_bytes not in (None, stat.length):
        expected, received = f"{published.num_bytes} bytes", f"{stat.length} bytes"
    elif published.sha256 is not None and (digest := _sha256(path, stat)) != published.sha256:
        expected, received = f"SHA-256 {published.sha256}", digest
    else:
        return
    raise ValueError(
        f"Expected {expected} in {path}, as published; a web page or a truncated download is "
        f"likely, so get it again from {published.url}. Received: {received}"
    )


def _sha256(path, stat):
    """A file's digest, remembered beside it until its size or time of change differ."""
    key = {"num_bytes": stat.length, "mtime_nsec": stat.mtime_nsec}
    try:
        remembered = storage.read_object(f"{path}.sha256") or {}
        if {name: remembered[name] for name in key} == key:
            return remembered["sha256"]
    except (OSError, tf.errors.OpError, ValueError, KeyError, TypeError):
        pass
    digest = storage.sha256(path)
    try:
        storage.write_text(f"{path}.sha256", json.dumps({"sha256": digest, **key}))
    except (OSError, ValueError, tf.errors.OpError):
        pass  # In a folder that is read-only the file is hashed at every start.
    return digest


def how_to_obtain(name: str, path: str) -> str:
    """The commands that fetch the file of 'carmon' or 'ddpm' to `path`, one on a line."""
    folder = os.path.dirname(path)
    ddpm = os.path.join(folder, DDPM_FILE)
    generated = f"  mkdir -p {folder}\n  curl -L -o {ddpm} {PUBLISHED[DDPM_FILE].url}\n"
    if name == "ddpm":
        return f"Expected {path}. Fetch it with\n{generated}Received: no such file"
    return (
        f"Expected {path}, the data of Carmon et al. (https://github.com/yaircarmon/semisup-adv). "
        f"Fetch it with\n  pip install gdown\n  mkdir -p {folder}\n  gdown {_CARMON_ID} -O {path}\n"
        "or train on generated images instead; results are then not on the paper's data:\n"
        f"""{generated}  --gin_param="EXTRA_DATA = 'ddpm'"\nReceived: no such file"""
    )


def how_to_make(error: Exception) -> str:
    """How a set of extra data that is missing is made, or replaced."""
    return (
        f"{error}. scripts/pseudo_label.py makes such a set out of unlabelled images (--gin_file=gin/pseudo_label.gin, "
        "--workdir for its place); another one, such as 'npz:FILE', or 'carmon' or 'ddpm' for CIFAR-10: "
        "--gin_param=\"EXTRA_DATA = 'npz:FILE'\""
    )
