"""The first training step of a recipe, on invented images: small, eager and deterministic."""

import numpy as np

from robust_keras.data import sources, training_batches
from robust_keras.training import adversarial_model
from robust_keras.training.optimizer import NesterovSGD


def training_data(with_extra=False):
    """Images of noise, 8 x 8."""

    def source(count, seed):
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        return sources.Source("made", images, rng.integers(0, 10, count).astype(np.int32), 10)

    return training_batches.TrainingData(
        source(30, 0), source(1, 2), source(40, 1) if with_extra else None, (0.5,) * 3, (0.25,) * 3
    )


def loss(recipe, data, batch, learning_rate):
    """The loss of a recipe's first step on a batch; the step's weights are finite."""
    network = recipe.model(num_classes=10, mean=data.mean, std=data.std, input_shape=(8, 8, 3))
    rng = np.random.default_rng(3)
    for weight in network.trainable_weights:  # A classifier of zeros would hide every difference.
        if weight.path.endswith("kernel"):
            weight.assign(rng.normal(0.0, 0.1, weight.shape))
    attack = recipe.attack
    model = adversarial_model.AdversarialModel(
        network,
        objective=recipe.objective,
        attack=attack.attack_fn,
        attack_target=attack.target,
        attack_batch_norm=attack.batch_norm,
    )
    optimizer = NesterovSGD(learning_rate)
    optimizer.build(network.trainable_variables)
    model.compile(optimizer=optimizer, run_eagerly=True)
    value = float(model.train_step(batch)["loss"])
    assert np.isfinite(value)
    assert all(np.isfinite(weight.numpy()).all() for weight in network.trainable_weights)
    return value
