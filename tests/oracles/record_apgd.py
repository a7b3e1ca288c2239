"""Records what upstream's APGD computes: its L1 projection, its losses, and every point it visits on a small network.

The tests compare with the numbers in ``apgd.npz``, which this script wrote in an environment of its own (PyTorch 2.13,
CPU). From this folder::

    git clone https://github.com/fra31/auto-attack && git -C auto-attack checkout a392200
    python3 -m venv torch_env
    torch_env/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    torch_env/bin/python record_apgd.py auto-attack apgd.npz

**Projections** on the L1 ball of radius ``projection/D/epsilon`` around ``x``, for D in 27 and 192. A row's kind,
``row % 4``, is one of

    0  near: inside the ball
    1  outside, half of the entries of x at 0 or at 1
    2  outside by far
    3  outside, with many sizes alike and a third of them zero

Keys, float32: ``projection/D/{x,delta,projected}`` [rows, D], where ``projected`` is the perturbation after projection.

**Losses** on random logits of C = 3, 4 and 10 classes: ``losses/C/{logits,labels,targets}``, and for LOSS in ``dlr`` and,
with four classes or more, ``dlr-targeted``: ``losses/C/LOSS/value`` [12] and ``losses/C/LOSS/gradient`` [12, C].

**Attacks** on ``logits = tanh((x - 1/2) hidden + hidden_bias) output``, images [5, 4, 3] flattened, 5 classes, labels its
own predictions. ``epsilon/NORM`` is float64, the radius. RUN is ``NORM/LOSS``, or ``L1/ce-shrinking`` for the schedule
of larger radii; the targeted loss aims at the class of the third highest logit::

    network/{hidden,hidden_bias,output}   images [6, 5, 4, 3]   labels [6]
    noise/NORM                            what upstream draws before it scales it, shaped like the images
    RUN/points                            [evaluations, 6, 5, 4, 3], where upstream evaluates the network: the start,
                                          and after each step; with the schedule, of each radius in turn
    RUN/wrong                             bool [evaluations, 6], whether each of them is misclassified

Steps are 30, but 50 in ``L1/ce``, whose checkpoints are two steps apart then.

Where a loss no longer moves, or a pixel keeps a trace of rounding (which in L1 counts as a change), the last bit of a
number decides what upstream does next. Images are therefore multiples of 1/8 and normal noise is one of 1/1024, so that
a start has no such traces, and the images are those of NUM_CANDIDATES on which upstream goes the same ways when its
logits and projections are off by about as much as another implementation's.
"""

import sys

import numpy as np
import torch

EPSILONS = {"Linf": 0.03, "L2": 0.2, "L1": 0.6}
NUM_CANDIDATES = 192
SHAPE, NUM_EXAMPLES, NUM_CLASSES, NUM_HIDDEN = (5, 4, 3), 6, 5, 12
# Norm, loss, steps, and whether the radius shrinks.
RUNS = {
    "Linf/ce": ("Linf", "ce", 30, False),
    "L2/ce": ("L2", "ce", 30, False),
    "L1/ce": ("L1", "ce", 50, False),
    "Linf/dlr": ("Linf", "dlr", 30, False),
    "Linf/dlr-targeted": ("Linf", "dlr-targeted", 30, False),
    "L1/ce-shrinking": ("L1", "ce", 30, True),
}


def record_projections(project, dimension, epsilon, rows, rng):
    x = rng.uniform(0.0, 1.0, (rows, dimension))
    delta = rng.normal(size=(rows, dimension))
    size = np.abs(delta).sum(axis=1, keepdims=True)
    kind = np.arange(rows)[:, None] % 4
    delta *= np.select([kind == 0, kind == 1], [0.7 * epsilon / size, 2 * epsilon / size], 1.0)
    x = np.where((kind == 1) & (rng.random(x.shape) < 0.5), np.round(x), x)
    delta = np.where(kind == 3, np.round(3 * delta) / 8, delta)
    arrays = {"x": x.astype(np.float32), "delta": delta.astype(np.float32)}
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    # Upstream returns what to add to the perturbation.
    arrays["projected"] = (tensors["delta"] + project(tensors["x"], tensors["delta"], epsilon)).numpy()
    arrays["epsilon"] = np.float64(epsilon)
    return {f"projection/{dimension}/{key}": array for key, array in arrays.items()}


def record_losses(attack, num_classes, rng):
    logits = rng.normal(0.0, 3.0, (12, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, 12)
    labels[::2] = logits[::2].argmax(axis=1)
    targets = (labels + rng.integers(1, num_classes, 12)) % num_classes
    arrays = {"logits": logits, "labels": labels.astype(np.int32), "targets": targets.astype(np.int32)}
    attack.y_target = torch.from_numpy(targets)
    for loss in ("dlr", "dlr-targeted")[: 1 if num_classes < 4 else 2]:
        z = torch.from_numpy(logits).requires_grad_()
        value = (attack.dlr_loss if loss == "dlr" else attack.dlr_loss_targeted)(z, torch.from_numpy(labels))
        (gradient,) = torch.autograd.grad(value.sum(), [z])
        arrays |= {f"{loss}/value": value.detach().numpy(), f"{loss}/gradient": gradient.numpy()}
    return {f"losses/{num_classes}/{key}": array for key, array in arrays.items()}


def make_network(rng):
    size = int(np.prod(SHAPE))
    weights = {
        "hidden": rng.normal(0.0, 4.0 / size**0.5, (size, NUM_HIDDEN)),
        "hidden_bias": rng.normal(0.0, 0.3, NUM_HIDDEN),
        "output": rng.normal(0.0, 1.0, (NUM_HIDDEN, NUM_CLASSES)),
    }
    weights = {key: value.astype(np.float32) for key, value in weights.items()}
    hidden, bias, output = (torch.from_numpy(weights[key]) for key in ("hidden", "hidden_bias", "output"))
    return weights, lambda x: torch.tanh((x.reshape(len(x), -1) - 0.5) @ hidden + bias) @ output


def draw(norm):
    torch.manual_seed(0)
    shape = (NUM_CANDIDATES, *SHAPE)
    return 2 * torch.rand(shape) - 1 if norm == "Linf" else torch.randn(shape)


def on_a_grid(function):
    return lambda *args, **kwargs: torch.round(1024 * function(*args, **kwargs)) / 1024


def rounded(values, generator):
    """`values` with a last bit of their own."""
    return values * (1 + 1e-7 * torch.normal(0.0, 1.0, values.shape, generator=generator))


def rounded_projection(project, generator):
    scale = 1 + 2e-6 * (2 * torch.rand((), generator=generator).item() - 1)

    def projection(x, delta, epsilon):
        move = project(x, delta, epsilon * scale)
        # What is taken away altogether, and what stays, is exact in any implementation.
        exact = (move.abs() == delta.abs()) | (move == 0)
        return torch.where(exact, move, rounded(move, generator))

    return projection


def record_stable_runs(upstream, network, images, labels):
    """All runs, and which examples go the same ways whatever the rounding."""

    def run_all(network):
        runs = {}
        for name, (norm, loss, num_steps, shrinking) in RUNS.items():
            runs[name] = record_run(upstream, network, images, labels, norm, loss, num_steps, shrinking)
        return runs

    runs, stable, project = run_all(network), np.ones(len(images), bool), upstream.L1_projection
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        upstream.L1_projection = rounded_projection(project, generator)
        for name, other in run_all(lambda x, generator=generator: rounded(network(x), generator)).items():
            difference = np.abs(runs[name]["points"] - other["points"]).max(axis=(0, 2, 3, 4))
            stable &= difference < 2e-6
    upstream.L1_projection = project
    return runs, stable


def record_run(upstream, network, images, labels, norm, loss, num_steps, shrinking):
    seen = []

    def recorded(x):
        logits = network(x)
        seen.append((x.detach().numpy().copy(), (logits.argmax(1) != labels).numpy()))
        return logits

    settings = {"norm": norm, "n_iter": num_steps, "eps": EPSILONS[norm], "device": "cpu"}
    if loss == "dlr-targeted":
        attack = upstream.APGDAttack_targeted(recorded, **settings)
        attack.y_target = network(images).sort(dim=1)[1][:, -3]
    else:
        attack = upstream.APGDAttack(recorded, loss=loss, **settings)
    attack.init_hyperparam(images)
    torch.manual_seed(0)
    if shrinking:
        early = int(0.3 * num_steps)
        radii = [factor * EPSILONS[norm] for factor in (3.0, 2.0, 1.0)]
        attack.decr_eps_pgd(images, labels, radii, [early, early, num_steps - 2 * early])
    else:
        attack.attack_single_run(images, labels)
    points, wrong = (np.stack(column) for column in zip(*seen))
    return {"points": points, "wrong": wrong}


def record(upstream_path):
    """Every array of the file."""
    sys.path.insert(0, upstream_path)
    from autoattack import autopgd_base as upstream

    torch.set_num_threads(1)
    torch.randn, torch.randn_like = on_a_grid(torch.randn), on_a_grid(torch.randn_like)
    rng = np.random.default_rng(0)
    arrays = record_projections(upstream.L1_projection, 27, 1.5, 16, rng)
    arrays |= record_projections(upstream.L1_projection, 192, 6.0, 8, rng)
    attack = upstream.APGDAttack_targeted(None, eps=1.0)
    for num_classes in (3, 4, 10):
        arrays |= record_losses(attack, num_classes, rng)
    weights, network = make_network(rng)
    arrays |= {f"network/{key}": value for key, value in weights.items()}
    images = np.round(8 * np.clip(rng.uniform(-0.1, 1.1, (NUM_CANDIDATES, *SHAPE)), 0.0, 1.0)).astype(np.float32) / 8
    labels = network(torch.from_numpy(images)).argmax(1)
    runs, stable = record_stable_runs(upstream, network, torch.from_numpy(images), labels)
    print(f"{stable.sum()} of {NUM_CANDIDATES} images are stable")
    kept = np.flatnonzero(stable)[:NUM_EXAMPLES]
    arrays |= {"images": images[kept], "labels": labels.numpy().astype(np.int32)[kept]}
    for norm, epsilon in EPSILONS.items():
        arrays |= {f"epsilon/{norm}": np.float64(epsilon), f"noise/{norm}": draw(norm).numpy()[kept]}
    for name, run in runs.items():
        arrays |= {f"{name}/{key}": value[:, kept] for key, value in run.items()}
    return arrays


if __name__ == "__main__":
    upstream, path = sys.argv[1:]
    np.savez_compressed(path, **record(upstream))
