"""The 1,797 handwritten digits that come with the package, by Alpaydin and Kaynak (1998)."""

import importlib.resources

import numpy as np
import tensorflow as tf

NUM_CLASSES = 10
_NUM_TEST = 360


def load(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The digits of a split, 'train' or 'test', enlarged bilinearly.

    The test set is the first 360 of `np.random.RandomState(0).permutation(1797)`, the training set the others.

    Returns:
        (images, labels): uint8 `[N, 32, 32, 3]` and integers `[N]`.
    """
    file = importlib.resources.files("robust_keras.data").joinpath("digits.npz")
    with file.open("rb") as stream, np.load(stream) as arrays:
        images, labels = arrays["image"], arrays["label"]
    permutation = np.random.RandomState(0).permutation(len(images))
    chosen = permutation[:_NUM_TEST] if split == "test" else permutation[_NUM_TEST:]
    enlarged = tf.image.resize(images[chosen, :, :, None], (32, 32), method="bilinear").numpy()
    # Weights are multiples of 1/64 and values integers up to 16, so nothing is rounded before here.
    return np.repeat(np.rint(enlarged * (255 / 16)).astype(np.uint8), 3, axis=-1), labels[chosen]
