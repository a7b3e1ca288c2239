"""SavedModels that need nothing but TensorFlow to run, with a model card."""

import json
import platform
import posixpath

import keras
import tensorflow as tf

import robust_keras

gfile = tf.io.gfile
CARD = "model_card.json"


def export(network, directory, *, card):
    """Writes a network as a SavedModel with two signatures and a model card.

    `serving_default` takes `image`, float32 `[batch, height, width, channels]` in [0, 1]; `serving_uint8` takes bytes. Both
    return `logits`, float32 `[batch, num_classes]`. The batch size is free, and gradients flow through the loaded model.
    The card is written last: a folder without it is what an interrupted export left.

    Args:
        network: a float32 `keras.Model` outside any strategy.
        directory: any `tf.io.gfile` path; an unfinished export in it is replaced.
        card: a dictionary for the model card; what describes the network and the versions is added.

    Raises:
        ValueError: where the folder holds a finished export, or something that is not one.
    """
    directory = str(directory)
    card_path = posixpath.join(directory, CARD)
    if is_finished(directory):
        raise ValueError(f"Expected a folder without a finished export. Received: {directory}")
    if gfile.isdir(directory) and gfile.listdir(directory) and not gfile.exists(posixpath.join(directory, "saved_model.pb")):
        raise ValueError(f"Expected an empty or new folder. Received: {directory}")
    shape = network.input_shape[1:]
    archive = keras.export.ExportArchive()
    archive.track(network)
    archive.add_endpoint(
        "serving_default",
        lambda image: {"logits": network(image, training=False)},
        input_signature=[tf.TensorSpec((None, *shape), tf.float32, name="image")],
    )
    archive.add_endpoint(
        "serving_uint8",
        lambda image: {"logits": network(tf.cast(image, tf.float32) / 255.0, training=False)},
        input_signature=[tf.TensorSpec((None, *shape), tf.uint8, name="image")],
    )
    archive.write_out(directory, verbose=False)
    described = {
        "name": network.name,
        "num_parameters": sum(int(tf.size(w.value)) for w in network.trainable_weights),
        "num_classes": network.output_shape[-1],
        "inputs": {
            "serving_default": {"image": f"float32 {['batch', *shape]} in [0, 1]"},
            "serving_uint8": {"image": f"uint8 {['batch', *shape]}"},
        },
        "output": {"logits": f"float32 {['batch', network.output_shape[-1]]}"},
        "versions": versions(),
    }
    with gfile.GFile(card_path, "w") as file:
        file.write(json.dumps(described | card, indent=2) + "\n")


def is_finished(directory):
    """Whether the folder holds a finished export."""
    return gfile.exists(posixpath.join(str(directory), CARD))


def versions():
    """Versions of what numbers depend on, by package."""
    return {
        "robust_keras": robust_keras.__version__,
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
