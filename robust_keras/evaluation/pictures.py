"""Figures of attacks: images as they are, as an attack left them, and the difference; what is left after each attack.

figure = of_attack(network, (x, y), x_adv, epsilon="8/255")  # x_adv as rk.attacks return it
figure = rk.evaluate(network, (x, y), ...).pictures(network, (x, y))  # of what the attacks broke
figure.savefig("attacked.png")
"""

import io
import os
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure

from robust_keras import bounds as pixel_bounds
from robust_keras import losses, threats
from robust_keras.evaluation import data_forms, verification
from robust_keras.foreign_files import printable
from robust_keras.models import any_network
from robust_keras.saved_models import load

# Images side by side; more stand below.
_COLUMNS = 8
_WRONG = "tab:red"
_TIMES = "\N{MULTIPLICATION SIGN}"


class _Picture(Figure):
    """A figure of matplotlib that is of no window, and that notebooks show by themselves."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", bbox_inches="tight")
        return image.getvalue()


def of_attack(
    network: keras.Model | Callable | str | os.PathLike,
    data: Any,
    x_adv: Any,
    *,
    epsilon: float | str | None = None,
    bounds: Sequence[float] | None = None,
    from_logits: bool | None = None,
    class_names: Sequence[str] | None = None,
    limit: int = 8,
) -> Figure:
    """Images, adversarial images and their magnified difference, one below the other, with true and predicted classes.

    Grey is no difference. Predictions that are wrong are red.

    Args:
        network: what was attacked: see `robust_keras.evaluate`, also for `bounds` and `from_logits`.
        data: images and labels, `(x, y)` or another form that `robust_keras.evaluate` takes; images are `[N, height,
            width]` or `[N, height, width, channels]` of 1 or 3 channels.
        x_adv: the images, attacked; uint8, or floats of the `bounds`.
        epsilon: the difference that is drawn black or white, a fraction of the pixel range such as '8/255': in Linf the
            radius. None for the largest there is.
        class_names: of all classes, in order; numbers without them.
        limit: how many images at most are drawn, the first ones.

    Raises:
        ValueError: for what is not to be drawn, or does not fit together.
    """
    reading = any_network.read(network, bounds=bounds, from_logits=from_logits)
    limit = _checked_limit(limit)
    collected, x_adv = data_forms.collected(data, None, reading.bounds), np.asarray(x_adv)
    if collected.images.shape != x_adv.shape:
        received = f"images {collected.images.shape}, adversarial images {x_adv.shape}"
        raise ValueError(f"Expected an adversarial image for each image. Received: {received}")
    images, adversarial = (
        pixel_bounds.to_unit(collected.images[:limit]),
        pixel_bounds.to_unit(x_adv[:limit], reading.bounds),
    )
    logits_fn = load.as_logits_fn(reading.network, bounds=reading.bounds, from_logits=reading.from_logits)
    span = None if epsilon is None else threats.threat(norm="Linf", epsilon=epsilon).epsilon
    return _drawn(logits_fn, images, adversarial, collected.given_labels[:limit], span, class_names)


def of_evaluation(
    results: dict[str, Any],
    examples: dict[str, np.ndarray],
    network: keras.Model | Callable | str | os.PathLike,
    data: Any,
    *,
    bounds: Sequence[float] | None = None,
    from_logits: bool | None = None,
    class_names: Sequence[str] | None = None,
    limit: int = 8,
) -> Figure:
    """`of_attack` for the images of an evaluation that attacks broke; where they broke none, for its first images.

    Args:
        results: those of the evaluation.
        examples: see there.
        network: what was evaluated.
        data: on what: any form that `robust_keras.evaluate` takes.
        bounds: as in the evaluation, like `from_logits`.
        from_logits: see there.
        class_names: see `of_attack`.
        limit: see `of_attack`.

    Raises:
        ValueError: see `of_attack`, and for other data.
    """
    reading = any_network.read(network, bounds=bounds, from_logits=from_logits)
    limit = _checked_limit(limit)
    collected = data_forms.collected(data, len(examples["label"]), reading.bounds)
    images, adversarial = pixel_bounds.to_unit(collected.images), examples["adversarial"]
    broken = examples["broken_by"] > 0
    unchanged = images.shape == adversarial.shape and np.allclose(images[~broken], adversarial[~broken], atol=1e-5)
    if not unchanged or np.any(collected.labels != examples["label"]):
        raise ValueError("Expected the images and labels that were evaluated. Received: others")
    chosen = np.flatnonzero(broken if broken.any() else np.ones_like(broken))[:limit]
    logits_fn = load.as_logits_fn(reading.network, bounds=reading.bounds, from_logits=reading.from_logits)
    span = results["epsilon"] if results["norm"] == "Linf" else None
    return _drawn(logits_fn, images[chosen], adversarial[chosen], collected.labels[chosen], span, class_names)


def chart(results: dict[str, Any]) -> Figure:
    """Bars of the accuracy before any attack and after each, in order; the last one with its 95 % interval.

    Args:
        results: of an evaluation, as results.json holds them.
    """
    names = ["clean", *(after["attack"] for after in results["robust_accuracy_after"])]
    left = [results["clean_accuracy"], *(after["robust_accuracy"] for after in results["robust_accuracy_after"])]
    figure = _Picture(figsize=(1.5 + 1.1 * len(names), 3.2), layout="constrained")
    axes = figure.subplots()
    shares = 100 * np.array(left)
    bars = axes.bar(range(len(names)), shares, color=["tab:blue", *["tab:orange"] * (len(names) - 1)])
    axes.bar_label(bars, fmt="%.1f", label_type="center", color="white")
    low, high = results["confidence_interval_95"]
    reach = [[max(shares[-1] - 100 * low, 0.0)], [max(100 * high - shares[-1], 0.0)]]
    axes.errorbar(len(names) - 1, shares[-1], reach, fmt="none", color="black", capsize=4)
    shown = ["clean", *(f"after\n{printable(name)}" for name in names[1:])]
    axes.set_xticks(range(len(names)), shown, parse_math=False)
    axes.set_ylim(0, 105)
    axes.set_ylabel("right, %")
    title = f"{results['num_examples']} images, {results['norm']} {results['epsilon_fraction']}"
    axes.set_title(printable(title), fontsize=10, parse_math=False)
    return figure


def _checked_limit(limit: int) -> int:
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ValueError(f"Expected a limit of images, an integer >= 1. Received: {limit!r}")
    return limit


def _drawn(
    logits_fn: Callable,
    images: np.ndarray,
    adversarial: np.ndarray,
    labels: np.ndarray,
    span: float | None,
    class_names: Sequence[str] | None,
) -> Figure:
    """The figure of `images` and `adversarial`, float32 in [0, 1]; `span` is the difference that is black or white."""
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[-1] not in (1, 3)) or not len(images):
        raise ValueError(
            "Expected images [N, height, width] or [N, height, width, channels] of 1 or 3 channels, at least one. "
            f"Received: {images.shape}"
        )
    clean_logits, logits = _logits(logits_fn, images), _logits(logits_fn, adversarial)
    losses.check_labels(labels, logits.shape[-1])
    names = [printable(name) for name in (range(logits.shape[-1]) if class_names is None else class_names)]
    if len(names) != logits.shape[-1]:
        raise ValueError(f"Expected a name for each of {logits.shape[-1]} classes. Received: {len(names)}")
    true = losses.as_labels(labels).numpy()
    difference = adversarial - images
    span = float(np.abs(difference).max() if span is None else span) or 1.0
    rows = {
        "clean": (images, clean_logits.argmax(axis=-1)),
        "adversarial": (adversarial, logits.argmax(axis=-1)),
        f"difference\n{_TIMES} {0.5 / span:.{0 if span < 0.05 else 1}f}": (
            np.clip(0.5 + 0.5 * difference / span, 0, 1),
            None,
        ),
    }
    return _laid_out(rows, true, names)


def _logits(logits_fn: Callable, images: np.ndarray) -> np.ndarray:
    return verification.first_look(logits_fn, images, getattr(logits_fn, "batch_size", None) or len(images))


def _laid_out(rows: dict[str, tuple[np.ndarray, np.ndarray | None]], true: np.ndarray, names: list[str]) -> Figure:
    columns = min(len(true), _COLUMNS)
    bands = -(-len(true) // columns)
    figure = _Picture(figsize=(0.5 + 1.3 * columns, 4.7 * bands), layout="constrained")
    axes = figure.subplots(len(rows) * bands, columns, squeeze=False)
    for each in axes.flat:
        each.set_axis_off()
    for k, label in enumerate(true):
        band, column = divmod(k, columns)
        for row, (name, (images, predicted)) in enumerate(rows.items()):
            each = axes[len(rows) * band + row, column]
            each.set_axis_on()
            each.set_xticks([])
            each.set_yticks([])
            each.imshow(images[k, :, :, 0] if images.shape[3:] == (1,) else images[k], cmap="gray", vmin=0, vmax=1)
            if column == 0:
                each.set_ylabel(name, fontsize=9)
            if predicted is not None:
                lines = [f"true: {names[label]}"] * (row == 0) + [f"predicted: {names[predicted[k]]}"]
                title = "\n".join(textwrap.fill(line, 20) for line in lines)
                color = "black" if predicted[k] == label else _WRONG
                each.set_title(title, fontsize=8, color=color, parse_math=False)
    return figure
