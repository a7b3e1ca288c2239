"""Deprecation warnings of our own calls are errors, those of other packages' are not."""

import types
import warnings

import pytest
import tensorflow as tf

pytestmark = pytest.mark.oldest

CALL = "import warnings\ndef deprecated():\n    warnings.warn('gone soon', kind, stacklevel=2)\n"


def calls_deprecated(module, kind):
    """A call, in a module of that name, of something that another package has deprecated."""
    library = types.ModuleType("some_library")
    library.kind = kind
    exec(CALL, vars(library))
    caller = types.ModuleType(module)
    caller.deprecated = library.deprecated
    exec("def call():\n    deprecated()\n", vars(caller))
    caller.call()


@pytest.mark.parametrize("kind", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["robust_keras", "robust_keras.attacks.pgd", "pgd_test", "conftest"])
def test_a_deprecated_call_of_ours_is_an_error(module, kind):
    with pytest.raises(kind, match="gone soon"):
        calls_deprecated(module, kind)


def test_a_deprecated_call_in_this_file_is_an_error():
    with pytest.raises(DeprecationWarning, match="gone soon"):
        warnings.warn("gone soon", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("module", ["some_library", "robust_keras_of_another", "keras.src.layers"])
def test_other_packages_may_call_what_is_deprecated(module):
    calls_deprecated(module, DeprecationWarning)


def test_what_tensorflow_logs_as_deprecated_is_an_error_too():
    with pytest.raises(DeprecationWarning, match=r"deprecation_test\.py:\d+: is_gpu_available"):
        tf.test.is_gpu_available()  # Said once in a process.
