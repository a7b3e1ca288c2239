"""Records the losses of TRADES and MART, and their gradients, as the authors' own code computes them.

The tests compare with the numbers in ``objectives.npz``, which this script wrote in an environment of its own (PyTorch
2.13, CPU). From this folder::

    git clone https://github.com/yaodongyu/TRADES && git -C TRADES checkout 6e8e11b
    git clone https://github.com/YisenWang/MART && git -C MART checkout 2d83e17
    python3 -m venv torch_env
    torch_env/bin/pip install numpy torch --index-url https://download.pytorch.org/whl/cpu
    torch_env/bin/python record_objectives.py TRADES MART objectives.npz

``trades_loss`` and ``mart_loss`` run whole and unchanged. Both craft their adversarial images themselves: with 0 steps
these are the clean images plus 0.001 times a draw of ``torch.randn``, which is replaced by the one that leads to the given
images. They run in float64, because their ``1.0001 - p`` and ``1.0000001 - p`` cancel in float32.

LOSS is ``trades`` or ``mart``. ``LOSS/beta`` [] is 6 for TRADES, the authors' for CIFAR-10, and the default of MART's.
``LOSS/CASE/loss`` [batch] is the loss of every example, from batches of one; gradients are those of the sum of them.

**network**: ``logits = tanh((x - 1/2) hidden + hidden_bias) output``, images [4, 4, 3] flattened, 10 classes. The first
half of the batch has the label that is predicted on the adversarial image, the other half another one::

    network/{hidden,hidden_bias,output}         network/{x,x_adv} [12, 4, 4, 3]         network/labels [12]
    LOSS/network/{hidden,hidden_bias,output}    gradients

**logits**: they come from nowhere. Row by row in turn the label is the most, the second, the third most probable class on
the adversarial image; the scale grows from 1 to 60 over the rows, so that probabilities saturate. Any two
of the three highest logits of an adversarial image are at least 0.1 apart::

    logits/{clean,adv} [36, 10]    logits/labels [36]
    LOSS/logits/{clean,adv}        gradients
"""

import importlib
import inspect
import sys
from unittest import mock

import numpy as np
import torch

SHAPE, NUM_CLASSES, NUM_HIDDEN = (4, 4, 3), 10, 9


class Network(torch.nn.Module):
    """The small network."""

    def __init__(self, weights):
        super().__init__()
        for name, value in weights.items():
            setattr(self, name, torch.nn.Parameter(torch.from_numpy(value).double()))

    def forward(self, x):
        return torch.tanh((x.reshape(len(x), -1) - 0.5) @ self.hidden + self.hidden_bias) @ self.output


class Logits(torch.nn.Module):
    """Maps clean images, which hold the numbers 0, 0.001, ..., and adversarial ones, 0.5 more, to rows of its weights."""

    def __init__(self, logits):
        super().__init__()
        self.clean, self.adv = (torch.nn.Parameter(torch.from_numpy(logits[key]).double()) for key in ("clean", "adv"))

    def images(self):
        clean = 0.001 * torch.arange(len(self.clean), dtype=torch.float64)[:, None]
        return clean, clean + 0.5

    def forward(self, x):
        number = x[:, 0]
        row = torch.round(1000 * (number % 0.5)).long()
        return torch.where(number[:, None] < 0.5 - 1e-6, self.clean[row], self.adv[row])


def run(loss_fn, model, x, x_adv, labels, beta):
    """The authors' loss, of the given adversarial images."""
    seen = []
    handle = model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        mock.patch.object(torch, "randn", lambda shape: (x_adv - x) / 0.001),
        mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
    ):
        loss = loss_fn(model, x, labels, optimizer, perturb_steps=0, beta=beta)
    handle.remove()
    nearest = [min((abs(images - given).max().item(), k) for k, given in enumerate((x, x_adv))) for images in seen]
    if {k for _, k in nearest} != {0, 1} or max(distance for distance, _ in nearest) > 1e-12:
        raise ValueError(f"Expected passes of the given clean and adversarial images only. Received: {nearest}")
    return loss


def record_case(loss_fn, model, x, x_adv, labels, beta):
    arrays = {
        "loss": np.array(
            [
                run(loss_fn, model, x[i : i + 1], x_adv[i : i + 1], labels[i : i + 1], beta).item()
                for i in range(len(labels))
            ]
        )
    }
    model.zero_grad()
    (len(labels) * run(loss_fn, model, x, x_adv, labels, beta)).backward()
    arrays |= {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def make_network(rng):
    size = int(np.prod(SHAPE))
    weights = {
        "hidden": rng.normal(0.0, 5.0 / size**0.5, (size, NUM_HIDDEN)),
        "hidden_bias": rng.normal(0.0, 0.3, NUM_HIDDEN),
        "output": rng.normal(0.0, 1.0, (NUM_HIDDEN, NUM_CLASSES)),
    }
    x = np.clip(rng.uniform(-0.1, 1.1, (12, *SHAPE)), 0.0, 1.0)
    arrays = weights | {"x": x, "x_adv": np.clip(x + rng.uniform(-0.2, 0.2, x.shape), 0.0, 1.0)}
    arrays = {key: array.astype(np.float32) for key, array in arrays.items()}
    model = Network({key: arrays[key] for key in weights})
    labels = model(torch.from_numpy(arrays["x_adv"]).double()).argmax(1).numpy()
    labels[6:] = (labels[6:] + rng.integers(1, NUM_CLASSES, 6)) % NUM_CLASSES
    return model, arrays | {"labels": labels.astype(np.int32)}


def make_logits(rng):
    scale = np.geomspace(1.0, 60.0, 36)[:, None]
    adv = scale * rng.normal(size=(36, NUM_CLASSES))
    # Like a network that the attack has moved, not another network.
    clean = adv + 0.7 * scale * rng.normal(size=adv.shape)
    ranked = np.argsort(-adv, axis=1)
    for place in range(3):  # No ties.
        adv[np.arange(36), ranked[:, place]] += 0.1 * (3 - place)
    labels = ranked[np.arange(36), np.arange(36) % 3]
    return {"clean": clean.astype(np.float32), "adv": adv.astype(np.float32), "labels": labels.astype(np.int32)}


def record(trades_path, mart_path):
    """Every array of the file."""
    sys.path[:0] = [trades_path, mart_path]
    trades_loss = importlib.import_module("trades").trades_loss
    mart_loss = importlib.import_module("mart").mart_loss
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    network, network_arrays = make_network(rng)
    logits_arrays = make_logits(rng)
    logits = Logits(logits_arrays)
    images = [torch.from_numpy(network_arrays[key]).double() for key in ("x", "x_adv")]
    arrays = {f"network/{key}": array for key, array in network_arrays.items()}
    arrays |= {f"logits/{key}": array for key, array in logits_arrays.items()}
    default = inspect.signature(mart_loss).parameters["beta"].default
    for name, loss_fn, beta in (("trades", trades_loss, 6.0), ("mart", mart_loss, default)):
        arrays[f"{name}/beta"] = np.float64(beta)
        for case, model, (x, x_adv) in (("network", network, images), ("logits", logits, logits.images())):
            labels = torch.from_numpy(arrays[f"{case}/labels"]).long()
            recorded = record_case(loss_fn, model, x, x_adv, labels, beta)
            arrays |= {f"{name}/{case}/{key}": array for key, array in recorded.items()}
    return arrays


if __name__ == "__main__":
    trades_path, mart_path, path = sys.argv[1:]
    np.savez_compressed(path, **record(trades_path, mart_path))
