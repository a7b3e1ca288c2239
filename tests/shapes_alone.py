"""Networks whose shapes are looked at alone, since their weights would take gigabytes."""

import contextlib

import keras


@contextlib.contextmanager
def shapes_alone():
    """Networks made inside have no weights; Keras, which puts these off to the next network, is made to forget them."""
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        keras.utils.clear_session(free_memory=False)
