"""Published files of extra data: where they are, and whether a file is what was published."""

import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from robust_keras import storage

CARMON_FILE = "ti_500K_pseudo_labeled.pickle"
# The images that Rebuffi et al. 2021 generated, by the TFDS name of the set that they resemble.
DDPM_FILES = {"cifar10": "cifar10_ddpm.npz", "cifar100": "cifar100_ddpm.npz", "svhn_cropped": "svhn_ddpm.npz"}
HOW_TO_LABEL = "scripts/pseudo_label.py gives the images of a pool their labels"
_CARMON_ID = "1LTw3Sb5QoiCCN-6Y5PEKkq9C9W60w-Hi"
_DDPM_URL = "https://storage.googleapis.com/dm-adversarial-robustness"
_REGENERATED = re.compile(r"(^|/)(80mti/(200k|500k|1m)|80mti_cifar100/500k)/\*\.tfrecord$")


class Published(NamedTuple):
    """What is known of a published file; None where it is not."""

    url: str
    num_bytes: int | None = None
    sha256: str | None = None
    num_images: int | None = None
    num_classes: int | None = None
    dataset: str | None = None  # Of TFDS, whose labels these are.


# By file name: a file of that name is taken for the published one, and has to match.
PUBLISHED = {
    CARMON_FILE: Published(
        f"https://drive.google.com/uc?id={_CARMON_ID}",
        num_images=500_000,
        num_classes=10,
        dataset="cifar10",
    ),
    **{
        file: Published(f"{_DDPM_URL}/{file}", num_classes=100 if dataset == "cifar100" else 10, dataset=dataset)
        for dataset, file in DDPM_FILES.items()
    },
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


def default_file(kind: str, dataset: str | None) -> str | None:
    """The published file that 'carmon' or 'ddpm' alone stands for beside a labelled set; None for other kinds.

    Args:
        kind: of extra data.
        dataset: name of the labelled set. Beside one for which there are no generated images they are CIFAR-10's.
    """
    generated = DDPM_FILES.get(_plain(dataset), DDPM_FILES["cifar10"])
    return {"carmon": CARMON_FILE, "ddpm": generated}.get(kind)


def check_labels_are_of(name: str, published: Published, dataset: str | None) -> None:
    """Refuses a published file beside another set of the same shape, whose classes are other things.

    Args:
        name: of the extra data.
        published: what is known of its file.
        dataset: name of the labelled set.
    """
    if published.dataset is not None and (known := _plain(dataset)) in DDPM_FILES and known != published.dataset:
        raise ValueError(
            f"Expected extra data with the classes of {known}, such as 'ddpm'. Received: {name!r}, with those of "
            f"{published.dataset}"
        )


def is_paper_extra_data(name: str) -> bool:
    """Whether extra data of a name is the paper's: the published file of Carmon et al., or a regenerated set.

    A file by its published name counts, because `sources.load_extra` refuses it unless it is that file. The paper also
    regenerated sets of 200 K, 500 K and 1 M images (section 4.3.1), and trained Table 5's models on the 500 K; they are
    not published. Sets by the names that the recipes have for them count, as made in the way that the paper describes.
    """
    kind, colon, path = str(name).partition(":")
    if kind == "tfrecord":
        return bool(_REGENERATED.search(path.replace("\\", "/")))
    return kind == "carmon" and (not colon or os.path.basename(path) == CARMON_FILE)


def _plain(dataset: str | None) -> str:
    """A TFDS name without its version."""
    return (dataset or "").partition(":")[0]


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
    folder, file = os.path.split(path)
    ddpm = file if name == "ddpm" else DDPM_FILES["cifar10"]
    generated = f"  mkdir -p {folder}\n  curl -L -o {os.path.join(folder, ddpm)} {_DDPM_URL}/{ddpm}\n"
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
