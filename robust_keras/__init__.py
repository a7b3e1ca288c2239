"""Adversarial training and evaluation of image classifiers in TensorFlow 2 and Keras (Gowal et al. 2020)."""

import importlib
import importlib.util

__version__ = "0.2.0.dev0"

_MODULES = (
    "attacks",
    "bounds",
    "commands",
    "data",
    "engines",
    "evaluation",
    "losses",
    "models",
    "noise",
    "pseudo_labelling",
    "saved_models",
    "schedules",
    "storage",
    "study",
    "threats",
    "tpu_check",
    "training",
)

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "robust_keras needs TensorFlow, whose variant you choose: "
        "pip install 'robust_keras[cpu]', 'robust_keras[gpu]' or 'robust_keras[tpu]'"
    )


def __getattr__(name):
    # Sub-modules load on first use, so that a launcher can still set what TensorFlow reads when it is imported.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
