"""Records a SavedModel of TensorFlow 2.15 with Keras 2: its files, its logits and their gradients.

What people attack was often exported years ago. This made ``tf215_saved_model/`` and ``tf215.npz`` in an environment of
its own (Python 3.11), from this folder::

    python3.11 -m venv tf215
    tf215/bin/pip install tensorflow-cpu==2.15.1
    tf215/bin/python record_tf215.py

The network has a SiLU, which is a function with a gradient of its own in TensorFlow, and a BatchNorm with statistics.

Keys: ``images`` uint8 [3, 8, 8, 3]; ``logits`` float32 [3, 5] of images / 255; ``gradients`` float32 [5, 3, 8, 8, 3]:
row k holds those of logit k by the images in [0, 1].
"""

import pathlib
import shutil

import numpy as np
import tensorflow as tf

HERE = pathlib.Path(__file__).parent


def build(rng):
    image = tf.keras.Input((8, 8, 3))
    x = tf.keras.layers.Conv2D(6, 3, padding="same", use_bias=False)(image)
    x = tf.keras.layers.BatchNormalization()(x)
    x = tf.keras.layers.Activation(tf.nn.silu)(x)
    x = tf.keras.layers.Flatten()(x)
    model = tf.keras.Model(image, tf.keras.layers.Dense(5)(x))
    for weight in model.weights:
        if "kernel" in weight.name:
            weight.assign(rng.normal(0.0, 2.0 * np.prod(weight.shape[:-1]) ** -0.5, weight.shape))
        elif "variance" in weight.name or "gamma" in weight.name:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
        else:
            weight.assign(rng.normal(0.0, 0.2, weight.shape))
    return model


def main():
    if not tf.__version__.startswith("2.15."):
        raise RuntimeError(f"Expected TensorFlow 2.15. Received: {tf.__version__}")
    rng = np.random.default_rng(0)
    model = build(rng)
    images = rng.integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    x = tf.constant(images, tf.float32) / 255.0
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        logits = model(x, training=False)
        columns = tf.unstack(logits, axis=-1)
    gradients = np.stack([tape.gradient(column, x).numpy() for column in columns])
    shutil.rmtree(HERE / "tf215_saved_model", ignore_errors=True)
    model.export(HERE / "tf215_saved_model")
    np.savez_compressed(HERE / "tf215.npz", images=images, logits=logits.numpy(), gradients=gradients)


if __name__ == "__main__":
    main()
