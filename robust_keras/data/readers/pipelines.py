"""How `tf.data` pipelines of this package run."""

import tensorflow as tf


def read_ahead(dataset: tf.data.Dataset, num_elements: int = 2) -> tf.data.Dataset:
    """The same elements in the same order, some of them made ahead of time, by as many threads as the dataset says.

    Nothing tunes that number meanwhile: the thread in which `tf.data` would sleeps for up to a minute, and whoever
    frees the iterator then may wait until it wakes (seen in TensorFlow 2.21; at the end of a run, say).
    """
    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return dataset.with_options(options).prefetch(num_elements)
