"""The examples in docstrings of public names run, and print what they say."""

import doctest
import importlib

import pytest

MODULES = ["bounds", "threats", "attacks.on_models", "evaluation.any_model", "commands.registration"]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    module = importlib.import_module(f"robust_keras.{name}")
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0 and done.failed == 0
