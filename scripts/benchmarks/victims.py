"""What subjects attack: a network, and images with labels that it gets right."""

from typing import Any, NamedTuple

import keras
import numpy as np
from absl import flags

from benchmarks import counting, networks, timing


class Victim(NamedTuple):
    """A network that is attacked, and on what.

    Attributes:
        network: a `keras.Model`.
        target: what attacks are given: the network, or the path of a SavedModel of it.
        images: uint8 `[n, height, width, channels]`.
        labels: int32 `[n]`.
        counted: what a pass of one image costs.
        settings: that another program needs.
    """

    network: keras.Model
    target: Any
    images: np.ndarray
    labels: np.ndarray
    counted: counting.Count
    settings: dict[str, Any]

    @property
    def data(self) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return self.images, self.labels


def define_flags(values: flags.FlagValues, *, num_images: int) -> None:
    """Those of the network, the images and the threat model."""
    networks.define_flags(values, depth=10, width=1)
    flags.DEFINE_string(
        "network",
        None,
        "A .keras file or the folder of a training run; by default the WRN of the other flags, untrained, and its "
        "predictions as labels.",
        flag_values=values,
    )
    flags.DEFINE_bool("as_saved_model", False, "Whether to attack a SavedModel of it.", flag_values=values)
    flags.DEFINE_string("dataset", None, "Whose first test images are taken; else random ones.", flag_values=values)
    flags.DEFINE_string("data_dir", None, "Where data sets are.", flag_values=values)
    flags.DEFINE_integer("num_images", num_images, "How many images.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images in a batch.", flag_values=values, lower_bound=1)
    flags.DEFINE_string("norm", "Linf", "Linf, L2 or L1.", flag_values=values)
    flags.DEFINE_string("epsilon", "8/255", "The radius, a number or a fraction.", flag_values=values)


def victim(values: flags.FlagValues, bench: timing.Bench, *, all_right: bool) -> Victim:
    """What the flags say, with the images that the network gets right alone if `all_right`."""
    from robust_keras.data import sources

    network = _network(values)
    if values.dataset:
        source = sources.load(values.dataset, "test", data_dir=values.data_dir)
        num_images = len(source.labels) if all_right else values.num_images
        images, labels = np.asarray(source.images[:num_images]), np.asarray(source.labels[:num_images], np.int32)
    else:
        images, labels = networks.images(values.num_images)
    predictions = _logits(network, images[: 4 * values.num_images]).argmax(-1).astype(np.int32)
    if not values.network:
        labels = predictions
    if all_right:
        chosen = np.flatnonzero(predictions == labels[: len(predictions)])[: values.num_images]
        images, labels = images[chosen], labels[chosen]
        if len(chosen) < values.num_images:
            raise ValueError(f"Expected {values.num_images} images that are right. Received: {len(chosen)}")
    names = ("norm", "epsilon", "batch_size", "num_images")
    settings = {name: values[name].value for name in names}
    target = _saved_model(network, bench) if values.as_saved_model else network
    return Victim(network, target, images, labels, counting.count(network), settings)


def handed_over(of: Victim, bench: timing.Bench) -> str | None:
    """The file from which another program can make the twin of a WRN, with the images; None without one."""
    from robust_keras.models import weights

    if not bench.has_peer:
        return None
    normalization = of.network.get_layer("normalization")
    x = of.images.astype(np.float32) / 255.0
    arrays = {f"weights/{name}": np.asarray(weight) for name, weight in weights.by_name(of.network).items()}
    return bench.hand_over(
        images=x,
        labels=of.labels,
        logits=_logits(of.network, of.images),
        mean=np.ravel(normalization.mean),
        std=np.sqrt(np.ravel(normalization.variance)),
        activation=np.array(_activation(of.network)),
        **arrays,
    )


def _network(values: flags.FlagValues) -> keras.Model:
    from robust_keras.saved_models import export, opening

    if values.network is None:
        return networks.wide_resnet(values.depth, values.width, values.activation, dtype=values.dtype)
    if values.network.endswith(".keras"):
        return opening.load_keras(values.network)
    return export.network_of_run(values.network)[0]


def _saved_model(network: keras.Model, bench: timing.Bench) -> str:
    from robust_keras.saved_models import export

    path = bench.new_path("saved_model")
    export.export(network, path, card={})
    return path


def _logits(network: keras.Model, images: np.ndarray) -> np.ndarray:
    return network.predict(images.astype(np.float32) / 255.0, batch_size=128, verbose=0)


def _activation(network: keras.Model) -> str:
    """The name of the activation, which all layers that have one share."""
    for layer in network.layers:
        name = getattr(layer, "activation", None)
        if isinstance(name, str):
            return name
    raise ValueError("Expected a network with layers of an activation by name. Received: none")
