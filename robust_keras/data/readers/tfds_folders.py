"""What a folder of TensorFlow Datasets may hold: its description names classes, and TFDS imports whatever it names."""

import posixpath
import re
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from robust_keras import foreign_files, storage

_PACKAGE = "tensorflow_datasets.core.features."
_CLASSES = {
    "audio_feature.Audio",
    "bounding_boxes.BBoxFeature",
    "class_label_feature.ClassLabel",
    "dataset_feature.Dataset",
    "features_dict.FeaturesDict",
    "image_feature.Image",
    "labeled_image.LabeledImage",
    "scalar.Scalar",
    "sequence_feature.Sequence",
    "tensor_feature.Tensor",
    "text_feature.Text",
    "translation_feature.Translation",
    "translation_feature.TranslationVariableLanguages",
    "video_feature.Video",
}
_NAMES_A_CLASS = ("pythonClassName", "python_class_name", "type")


def check(name: str, folder: str) -> None:
    """Refuses the copies of a set that name other classes than those of TFDS, or of modules that are imported.

    Args:
        name: of the set, as TFDS has it.
        folder: of all sets.

    Raises:
        ValueError: naming the file and the class; and for a description that cannot be read.
    """
    for path in _descriptions(posixpath.join(folder, re.split("[/:]", name)[0])):
        for each in _listed(posixpath.dirname(path)):
            if not tf.io.gfile.isdir(beside := posixpath.join(posixpath.dirname(path), each)):
                foreign_files.check_regular(beside)
        for found in _class_names(storage.read_json(path)):
            module = found.rpartition(".")[0]
            if found.removeprefix(_PACKAGE) not in _CLASSES and module not in sys.modules:
                raise ValueError(
                    f"Expected features of TensorFlow Datasets in {path}; what a module of your own has, --import lets "
                    f"in. Received: {foreign_files.printable(found)}"
                )


def has_copy(name: str, folder: str) -> bool:
    """Whether a folder of all sets holds a version of one."""
    return any(_descriptions(posixpath.join(folder, name)))


def _descriptions(folder: str) -> Iterator[str]:
    """The files features.json of the versions, and configurations, of a set."""
    for depth in range(3):
        waiting = [folder]
        for _ in range(depth):
            waiting = [posixpath.join(at, name.rstrip("/")) for at in waiting for name in _listed(at)]
        for at in waiting:
            if tf.io.gfile.exists(path := posixpath.join(at, "features.json")):
                yield path


def _listed(folder: str) -> list[str]:
    return tf.io.gfile.listdir(folder) if tf.io.gfile.isdir(folder) else []


def _class_names(value: Any) -> Iterator[str]:
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            yield from (found[key] for key in _NAMES_A_CLASS if isinstance(found.get(key), str))
        waiting += found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
