"""The images of an evaluation, of the `dataset` that stands in its results.json."""

from collections.abc import Callable
from typing import Any

import numpy as np

from robust_keras.shown_text import printable


def source(dataset: dict[str, Any], *, data_dir: str | None = None, cache_dir: str | None = None) -> Any:
    """The data set, as `data.sources.load` returns it; `dataset` has its arguments, and may have counts and digests.

    Args:
        dataset: see above. With `held_out`, it is as many images as a training run holds out of the set for validation.
        data_dir: see `data.sources.load`, like `cache_dir`.
    """
    from robust_keras.data import sources

    named = {name: value for name, value in dataset.items() if name not in ("num_examples", "sha256", "held_out")}
    loaded = sources.load(**named, data_dir=data_dir, cache_dir=cache_dir)
    return sources.hold_out(loaded, dataset["held_out"])[1] if "held_out" in dataset else loaded


def loader(
    *, data_dir: str | None = None, cache_dir: str | None = None
) -> Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
    """A function of a `dataset` that returns its images and labels again, see `evaluation.examples.first`.

    It raises ValueError where they are others than those that were evaluated.

    Args:
        data_dir: see `source`, like `cache_dir`.
    """

    def load(dataset: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        from robust_keras.evaluation import examples

        loaded = source(dataset, data_dir=data_dir, cache_dir=cache_dir)
        images, labels = examples.first(loaded, dataset["num_examples"])
        if dataset.get("sha256") not in (None, digest := examples.digest(images, labels)):
            raise ValueError(
                f"Expected the images that were evaluated, of the digest {dataset['sha256']}. Received: {digest}"
            )
        return images, labels

    return load


def at_hand(
    *, dataset: str | None = None, data_dir: str | None = None
) -> Callable[[dict[str, Any]], tuple[np.ndarray, np.ndarray]]:
    """As `loader`, for results that somebody else may have written: it downloads nothing, and opens no file they name.

    Args:
        dataset: where the images are, as the user typed it; None for what the results name, if it comes with the
            package or is a prepared set in `data_dir`.
        data_dir: see `source`.
    """
    load = loader(data_dir=data_dir)

    def load_prepared(evaluated: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        name = dataset or evaluated.get("name")
        if dataset is None and name != "digits" and not _is_prepared(name, data_dir):
            raise ValueError(f"{printable(name)} is no prepared set here; --dataset or --data_dir says where it is")
        told: dict[str, Any] = {key: evaluated[key] for key in ("split", "num_examples", "sha256") if key in evaluated}
        numbers = ("image_size", "short_side", "held_out")
        told |= {key: evaluated[key] for key in numbers if isinstance(evaluated.get(key), int)}
        return load({"split": "test", "num_examples": None, **told, "name": name})

    return load_prepared


def _is_prepared(name: Any, data_dir: str | None) -> bool:
    from robust_keras.data import sources
    from robust_keras.data.readers import tfds_sets

    folder = sources.folder_of_sets(data_dir)
    return isinstance(name, str) and tfds_sets.is_prepared(name, folder)
