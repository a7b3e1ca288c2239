"""What a training step minimises.

An objective is `objective(logits_fn, x, x_adv, labels, targets) -> [batch] loss`. It runs the passes that it needs, the
clean one only if it needs it, and chooses the mode of `BatchNorm` in each: one pass updates the moving statistics.
`labels` are int `[batch]`, `targets` class probabilities `[batch, num_classes]`.
"""

from robust_keras.losses import cross_entropy
from robust_keras.normalization import BATCH_AND_UPDATE, batch_norm_mode


def adversarial_training(logits_fn, x, x_adv, labels, targets):
    """Cross-entropy on the adversarial images (Madry et al. 2017; the paper's equation 3)."""
    with batch_norm_mode(BATCH_AND_UPDATE):
        return cross_entropy(logits_fn(x_adv), targets)


def standard_training(logits_fn, x, x_adv, labels, targets):
    """Cross-entropy on the clean images: plain, non-robust training. Needs no attack."""
    with batch_norm_mode(BATCH_AND_UPDATE):
        return cross_entropy(logits_fn(x), targets)
