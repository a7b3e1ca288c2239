"""Small pictures of what attacks broke: clean, adversarial, and the magnified difference, as PNG."""

from typing import NamedTuple

import numpy as np
import tensorflow as tf

from robust_keras.reports.contents import Evaluation

MOST_PICTURES = 8
_MOST_SIDE = 96  # Pixels; larger images are shown smaller.


class Grid(NamedTuple):
    """Images of some examples.

    Attributes:
        examples: their numbers.
        images: for each (clean, adversarial, difference), as PNG.
        times: by how much the difference is magnified.
        shrunk: by how much the sides of the images are shorter than they were; 1 for not at all.
    """

    examples: list[int]
    images: list[tuple[bytes, bytes, bytes]]
    times: float
    shrunk: float


def grid(evaluation: Evaluation, most_bytes: int) -> Grid | None:
    """Images that attacks broke, of each attack in turn; None where there are none, or none that can be drawn.

    Args:
        evaluation: with `examples` and `clean`.
        most_bytes: of all of them together.
    """
    examples, clean = evaluation.examples, evaluation.clean
    if examples is None or clean is None or clean.ndim != 4 or clean.shape[-1] not in (1, 3):
        return None
    chosen = _in_turn(examples["broken_by"])
    if not chosen:
        return None
    clean, adversarial = clean[chosen], np.clip(np.nan_to_num(examples["adversarial"][chosen]), 0, 1)
    difference = adversarial - clean
    results = evaluation.results
    span = float(results["epsilon"] if results["norm"] == "Linf" else np.abs(difference).max()) or 1.0
    shrunk = max(*clean.shape[1:3], _MOST_SIDE) / _MOST_SIDE
    found, left = [], most_bytes
    for triple in zip(clean, adversarial, np.clip(0.5 + 0.5 * difference / span, 0, 1)):
        first, second, third = (_png(image, shrunk) for image in triple)
        pngs = first, second, third
        left -= sum(map(len, pngs))
        if left < 0:
            break
        found.append(pngs)
    return Grid(chosen[: len(found)], found, 0.5 / span, shrunk) if found else None


def _in_turn(broken_by: np.ndarray) -> list[int]:
    """Examples that attacks broke: the first of each attack, then the second, and so on."""
    broken = np.flatnonzero(broken_by > 0)
    by_attack = broken_by[broken]
    rank = np.array([(by_attack[:k] == by).sum() for k, by in enumerate(by_attack)], int)
    return broken[np.lexsort((by_attack, rank))][:MOST_PICTURES].tolist()


def _png(image: np.ndarray, shrunk: float) -> bytes:
    if shrunk > 1:
        size = [max(round(side / shrunk), 1) for side in image.shape[:2]]
        image = tf.image.resize(image, size, method="area").numpy()
    return tf.io.encode_png(np.round(255 * image).astype(np.uint8), compression=9).numpy()
