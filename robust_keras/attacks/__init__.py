"""Attacks: functions of any Keras model here, `attacks.pgd(network, x, y, norm="Linf", epsilon="8/255")`, and of any
callable that returns logits in the modules, such as `attacks.pgd.pgd`, for which write `from robust_keras.attacks.pgd
import pgd`: the package has the function of a model by the module's name.
"""

# After the modules of these names, which they import.
from robust_keras.attacks.on_models import apgd, apgd_targeted, autoattack, fab, multi_targeted, pgd, square

__all__ = ["apgd", "apgd_targeted", "autoattack", "fab", "multi_targeted", "pgd", "square"]
