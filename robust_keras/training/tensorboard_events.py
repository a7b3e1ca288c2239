"""Events for TensorBoard besides the metrics: pictures and margins of validations, and what the run was told.

They are written by a writer that is the default one, at its step.
"""

import posixpath
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorboard.plugins.hparams import api as hparams_api

from robust_keras import foreign_files, own_folders
from robust_keras.training.validation import Seen

_MOST_TIMES = 100  # In a run, so that the events of a long one stay small; TensorBoard itself shows fewer pictures.
# Bytes of a record of an event file: its length and a checksum before it, one after it, and the most that there may be.
_HEAD, _FOOT, _MOST_BYTES = 12, 4, 1 << 26
_PICTURES = (
    "Images held out, the first ones. From above: as they are; under the validation's attack (the same where they are "
    "classified wrongly without one); the difference, magnified so that the largest is black or white."
)
_MARGINS = "Logit of the right class minus the highest other one, over the images held out: below 0 is wrong."


def is_due(step: int, num_steps: int, validate_every: int) -> bool:
    """Whether a validation is one of those that pictures and margins are written of: all, or about every n-th of those
    of a run that has more than a hundred, and the last.
    """
    every = -(-num_steps // (validate_every * _MOST_TIMES))
    return step == num_steps or (step // validate_every) % every == 0


def write_validation(images: np.ndarray, seen: Mapping[str, Seen]) -> None:
    """Writes histograms of margins, and a picture of images under attack.

    Args:
        images: uint8 `[few, height, width, channels]`, the first ones held out; of others than 1 or 3 channels there is
            no picture.
        seen: what a validation saw of each network, by the ending of its columns; the picture is of the last one.
    """
    for ending, each in seen.items():
        for name, margin in (("clean", each.clean_margin), ("robust", each.robust_margin)):
            right = -margin[np.isfinite(margin)]
            tf.summary.histogram(f"margins/{name}{ending}", right, description=_MARGINS)
    if seen and images.shape[-1] in (1, 3):
        picture = _picture(images, list(seen.values())[-1].adversarial)
        tf.summary.image("images/clean_adversarial_difference", picture[np.newaxis], description=_PICTURES)


def write_hyper_parameters(values: Mapping[str, bool | float | str]) -> None:
    """Writes what TensorBoard lists and compares runs by."""
    hparams_api.hparams(dict(values))


def cut_off(folder: str, step: int) -> None:
    """Removes events after a step from a folder: a run that goes on from there writes them again.

    Args:
        folder: any `tf.io.gfile` path, which need not exist.
        step: 0 for all events, those of the beginning too.
    """
    if not tf.io.gfile.isdir(folder):
        return
    for name in tf.io.gfile.listdir(folder):
        path = posixpath.join(folder, name)
        if ".tfevents." not in name:
            continue
        foreign_files.check_regular(path)
        if step == 0:
            own_folders.remove(path)
            continue
        kept = _length(path, step)
        with foreign_files.open_regular(path) as file:
            content = file.read(kept + 1)
        if len(content) > kept:
            with own_folders.open_file(path, "wb") as file:
                file.write(content[:kept])


def _length(path: str, step: int) -> int:
    """The bytes of an event file before the first record of a later step, or one that a kill left in two."""
    length = 0
    with foreign_files.open_regular(path) as file:
        while len(head := file.read(_HEAD)) == _HEAD:
            size = int.from_bytes(head[:8], "little")
            record = file.read(size + _FOOT) if size <= _MOST_BYTES else b""
            if len(record) < size + _FOOT or not _is_until(step, record[:size]):
                break
            length += _HEAD + size + _FOOT
    return length


def _is_until(step: int, record: bytes) -> bool:
    try:
        return bool(tf.compat.v1.Event.FromString(record).step <= step)
    except DecodeError:
        return False


def _picture(images: np.ndarray, adversarial: np.ndarray) -> np.ndarray:
    """Three rows of images, uint8 `[height, width, channels]`, a white line around each image."""
    clean, adversarial = images / 255, np.nan_to_num(adversarial)
    difference = adversarial - clean
    span = np.abs(difference).max() or 1.0
    rows = [np.clip(each, 0, 1) for each in (clean, adversarial, 0.5 + 0.5 * difference / span)]
    framed = np.pad(np.stack(rows), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
    count, few, height, width, channels = framed.shape
    together = framed.transpose(0, 2, 1, 3, 4).reshape(count * height, few * width, channels)
    return np.round(255 * together).astype(np.uint8)
