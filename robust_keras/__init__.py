"""Adversarial training and evaluation of image classifiers in TensorFlow 2 and Keras (Gowal et al. 2020).

    import robust_keras as rk

    model = rk.AdversarialModel(network, norm="Linf", epsilon="8/255", objective="trades")
    result = rk.evaluate(network, (x, y), norm="Linf", epsilon="8/255", attacks="standard")
    x_adv = rk.attacks.pgd(network, x, y, norm="Linf", epsilon="8/255")

Names load on first use: the package itself imports neither TensorFlow nor Keras.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust_keras import attacks as attacks
    from robust_keras.commands.registration import register as register
    from robust_keras.evaluation.any_model import evaluate as evaluate
    from robust_keras.threats import threat as threat
    from robust_keras.training.adversarial_model import AdversarialModel as AdversarialModel
    from robust_keras.training.optimizer import NesterovSGD as NesterovSGD
    from robust_keras.training.weight_averaging import WeightAveraging as WeightAveraging

__version__ = "0.2.0.dev0"

# What people type, by the module that has it.
_NAMES = {
    "AdversarialModel": "training.adversarial_model",
    "NesterovSGD": "training.optimizer",
    "WeightAveraging": "training.weight_averaging",
    "evaluate": "evaluation.any_model",
    "register": "commands.registration",
    "threat": "threats",
}
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
    "reports",
    "saved_models",
    "schedules",
    "storage",
    "study",
    "threats",
    "tpu_check",
    "training",
)
__all__ = [*sorted([*_NAMES, "attacks"]), "__version__"]

if importlib.util.find_spec("tensorflow") is None:
    raise ImportError(
        "robust_keras needs TensorFlow, whose variant you choose: "
        "pip install 'robust_keras[cpu]', 'robust_keras[gpu]', 'robust_keras[tpu]' or, where JAX has the devices, "
        "'robust_keras[jax]'"
    )


def __getattr__(name: str) -> Any:
    # On first use, so that a launcher can still set what TensorFlow reads when it is imported.
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _NAMES:
        found = getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_MODULES})
