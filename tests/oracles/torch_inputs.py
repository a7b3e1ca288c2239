"""Inputs that `torch_reference.py record` and the package are both given: weights, images, labels and noise.

    python torch_inputs.py in.npz
    torch_env/bin/python torch_reference.py record --inputs in.npz --output torch_reference.npz --depth 10 --width 1 \
        --activation silu --group_size 4 --epsilon 8/255 --step_size 2/255 --num_attack_steps 10 --tau .995

They come from `RandomState`, whose numbers NumPy has frozen, so only the outputs are kept.
"""

import sys

import numpy as np

NUM_STEPS, BATCH_SIZE, GROUP_SIZE, NUM_CLASSES = 20, 8, 4, 10
EPSILON, STEP_SIZE, NUM_ATTACK_STEPS, TAU = "8/255", "2/255", 10, 0.995
BASE_LEARNING_RATE, DROPS = 0.05, (3, 12)


def make():
    """A dictionary of arrays, as `torch_reference.py` reads them."""
    random = np.random.RandomState(0)
    weights = {}

    def conv(name, size, channels_in, channels_out):
        std = (size * size * channels_in) ** -0.5
        weights[f"{name}/kernel"] = np.clip(random.randn(size, size, channels_in, channels_out), -2, 2) * std

    def norm(name, channels):
        weights[f"{name}/scale"] = 1 + 0.1 * random.randn(channels)
        weights[f"{name}/offset"] = 0.1 * random.randn(channels)

    conv("init_conv", 3, 3, 16)
    channels_in = 16
    for group, channels in enumerate((16, 32, 64)):
        name = f"layer.{group}.block.0"
        norm(f"{name}.batchnorm_0", channels_in)
        conv(f"{name}.shortcut", 1, channels_in, channels)
        conv(f"{name}.conv_0", 3, channels_in, channels)
        norm(f"{name}.batchnorm_1", channels)
        conv(f"{name}.conv_1", 3, channels, channels)
        channels_in = channels
    norm("batchnorm", 64)
    # Not zero, as training starts: the first attack would have no gradient to follow.
    weights["logits/kernel"] = 0.3 * random.randn(64, NUM_CLASSES)
    weights["logits/bias"] = 0.1 * random.randn(NUM_CLASSES)

    shape = (NUM_STEPS, BATCH_SIZE, 32, 32, 3)
    epsilon = 8 / 255
    return {
        **{f"weights/{name}": array.astype(np.float32) for name, array in weights.items()},
        "images": random.randint(0, 256, shape).astype(np.uint8),
        "labels": random.randint(0, NUM_CLASSES, shape[:2]),
        "noise": random.uniform(-epsilon, epsilon, shape).astype(np.float32),
        "learning_rates": np.array(
            [BASE_LEARNING_RATE * 0.1 ** sum(step >= drop for drop in DROPS) for step in range(NUM_STEPS)], np.float32
        ),
    }


if __name__ == "__main__":
    np.savez(sys.argv[1], **make())
