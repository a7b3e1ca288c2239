"""Records what upstream's FAB computes: its projections, and its images on a small smooth network.

The tests compare with the numbers in ``fab.npz``, which this script wrote in an environment of its own (PyTorch 2.13,
CPU). From this folder::

    git clone https://github.com/fra31/auto-attack && git -C auto-attack checkout a392200
    python3 -m venv torch_env
    torch_env/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    torch_env/bin/python record_fab.py auto-attack fab.npz

**Projections**, for D in 27 and 192: points in the unit box, some of their entries at 0 and at 1, and the hyperplanes
``weights . z = offset``. A row's kind, ``row % 5``, is one of

    0  near: no entry runs out of room for Linf and L2
    1  far: most entries do
    2  beyond the box
    3  far, and a third of the weights are zero
    4  far, and a third of the weights are under 1e-8, which moves nothing in L2 and L1

Keys, float32: ``projection/D/{points,weights}`` [rows, D], ``projection/D/offset`` [rows], and the moves
``projection/D/{Linf,L2,L1}`` [rows, D]. Weights of the first four kinds are of sizes from 2^-12 to 2^5.

**Attacks** on ``logits = tanh((x - 1/2) hidden + hidden_bias) output``, images [8, 6, 3] flattened, 5 classes; labels
are its own predictions, but for the last example's. ``epsilon/NORM`` is float64, the radius. RUN is ``NORM/fab`` or
``NORM/fab-t`` (towards the third highest logit), then ``start`` (restart 0) or ``random``, from the noise of ``noise/NORM``::

    network/{hidden,hidden_bias,output}   images [6, 8, 6, 3]   labels [6]
    noise/NORM                            what upstream draws before it scales it, shaped like the images
    RUN/images                            [4, 5, 8, 6, 3], what step 1, 2, 5 and 20 propose before any step back
    RUN/wrong                             bool [20, 5], whether each step's proposal is misclassified
    RUN/distance                          float32 [5], upstream's result: how far the nearest is, 1e10 for none

The axes of 5 are the examples that upstream attacks, all but the last.
"""

import sys

import numpy as np
import torch

STEPS = (1, 2, 5, 20)
EPSILONS = {"Linf": 0.015, "L2": 0.15, "L1": 0.6}
SHAPE, NUM_CLASSES, NUM_HIDDEN, TARGET_RANK = (8, 6, 3), 5, 12, 1


def hyperplanes(dimension, rows, rng):
    """Points, weights and offsets of the kinds above."""
    points = np.clip(rng.uniform(-0.1, 1.1, (rows, dimension)), 0.0, 1.0)
    points[::5] = rng.uniform(0.2, 0.8, points[::5].shape)
    weights = rng.normal(size=(rows, dimension)) * 2.0 ** rng.integers(-12, 6, (rows, 1))
    kind = np.arange(rows) % 5
    some = rng.random((rows, dimension)) < 1 / 3
    weights[(kind == 3)[:, None] & some] = 0.0
    weights[kind == 4] /= np.abs(weights[kind == 4]).max(axis=1, keepdims=True)
    weights[(kind == 4)[:, None] & some] *= 2e-9
    # How far the sum can fall and rise inside the box, and which way to go.
    fall = np.where(weights > 0, weights * points, weights * (points - 1)).sum(axis=1)
    rise = np.where(weights > 0, weights * (1 - points), -weights * points).sum(axis=1)
    up = rng.random(rows) < 0.5
    low, high = np.array([(0.01, 0.1), (0.4, 0.95), (1.1, 3.0), (0.4, 0.95), (0.4, 0.95)])[kind].T
    share = rng.uniform(low, high)
    offset = (weights * points).sum(axis=1) + np.where(up, share * rise, -share * fall)
    return [array.astype(np.float32) for array in (points, weights, offset)]


def lengths(delta, norm):
    return np.linalg.norm(delta.reshape(len(delta), -1), ord={"Linf": np.inf, "L2": 2, "L1": 1}[norm], axis=1)


def record_projections(upstream, dimension, rows, rng):
    points, weights, offset = hyperplanes(dimension, rows, rng)
    arrays = {"points": points, "weights": weights, "offset": offset}
    tensors = [torch.from_numpy(array) for array in (points, weights, offset)]
    for norm in EPSILONS:
        arrays[norm] = getattr(upstream, f"projection_{norm.lower()}")(*tensors).numpy()
    return {f"projection/{dimension}/{key}": array for key, array in arrays.items()}


def make_network(rng):
    size = int(np.prod(SHAPE))
    weights = {
        "hidden": rng.normal(0.0, 2.5 / size**0.5, (size, NUM_HIDDEN)),
        "hidden_bias": rng.normal(0.0, 0.3, NUM_HIDDEN),
        "output": rng.normal(0.0, 1.0, (NUM_HIDDEN, NUM_CLASSES)),
    }
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    hidden, bias, output = (torch.from_numpy(weights[key]) for key in ("hidden", "hidden_bias", "output"))
    return weights, lambda x: torch.tanh((x.reshape(len(x), -1) - 0.5) @ hidden + bias) @ output


def record_run(attack_class, network, images, labels, norm, targeted, random_start):
    proposed = []

    class Recorded(attack_class):
        def _get_predicted_label(self, x):
            proposed.append((x.clone(), super()._get_predicted_label(x)))
            return proposed[-1][1]

    attack = Recorded(network, norm=norm, n_iter=max(STEPS), eps=EPSILONS[norm], device="cpu")
    attack.target_class = 2 + TARGET_RANK  # 1 is the highest logit, here the label's
    torch.manual_seed(0)
    x_adv = attack.attack_single_run(images, labels, use_rand_start=random_start, is_targeted=targeted)
    steps = proposed[1:]  # The first is the clean images.
    wrong = np.stack([(label != labels[:-1]).numpy() for _, label in steps])
    distance = np.where(wrong.any(axis=0), lengths((x_adv - images).numpy()[:-1], norm), 1e10)
    images = np.stack([steps[k - 1][0].numpy() for k in STEPS])
    return {"images": images, "wrong": wrong, "distance": distance.astype(np.float32)}


def record(upstream_path):
    """Every array of the file."""
    sys.path.insert(0, upstream_path)
    from autoattack import fab_projections, fab_pt

    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    arrays = record_projections(fab_projections, 27, 30, rng) | record_projections(fab_projections, 192, 15, rng)
    weights, network = make_network(rng)
    arrays |= {f"network/{key}": value for key, value in weights.items()}
    images = np.clip(rng.uniform(-0.1, 1.1, (6, *SHAPE)), 0.0, 1.0).astype(np.float32)
    labels = network(torch.from_numpy(images)).argmax(1)
    labels[-1] = (labels[-1] + 1) % NUM_CLASSES
    arrays |= {"images": images, "labels": labels.numpy().astype(np.int32)}
    for norm, epsilon in EPSILONS.items():
        torch.manual_seed(0)
        shape = (5, *SHAPE)
        drawn = 2 * torch.rand(shape) - 1 if norm == "Linf" else torch.randn(shape)
        arrays |= {f"epsilon/{norm}": np.float64(epsilon), f"noise/{norm}": drawn.numpy()}
        for targeted, name in ((False, "fab"), (True, "fab-t")):
            for random_start, start in ((False, "start"), (True, "random")):
                run = record_run(
                    fab_pt.FABAttack_PT, network, torch.from_numpy(images), labels, norm, targeted, random_start
                )
                arrays |= {f"{norm}/{name}/{start}/{key}": value for key, value in run.items()}
    return arrays


if __name__ == "__main__":
    upstream, path = sys.argv[1:]
    np.savez_compressed(path, **record(upstream))
