"""Records what the Square Attack of AutoAttack computes.

The tests compare with the numbers in ``square.npz``, which this script wrote in an environment of its own, with PyTorch
2.13 on CPU. Any version that runs AutoAttack gives the same to rounding. From this folder::

    python3 -m venv torch
    torch/bin/pip install numpy torch torchvision --index-url https://download.pytorch.org/whl/cpu
    git clone https://github.com/fra31/auto-attack && git -C auto-attack checkout a392200
    torch/bin/python record_square.py auto-attack square.npz

Upstream's own class runs, with its random draws replaced by known ones and a model that only counts. The settings are
those of AutoAttack: the margin loss, and a schedule that does not scale with the number of queries. Images are stored as
[batch, height, width, channels].

**schedule**: 10,001 queries with ``p_init = 0.8``. What upstream calls iteration i is query i here::

    share/at, share/value           [changes]    the queries at which the share p changes (and query 0), p from there on
    side/NORM/HxW/at, .../value     [changes]    the same for the window's side on images of H x W, NORM Linf, L2 or L1

**eta**: ``eta/NORM/SIDE`` [SIDE, SIDE], not transposed, NORM L2 or L1.

**proposals**: a start and ``QUERIES`` proposals in a row, each of which the model likes better than the last, so that each
changes the one before it. The side is the same in all of them. NORM is Linf, L2 or L1::

    NORM/epsilon, NORM/side         []
    NORM/x                          [2, 16, 16, 3]           some pixels at 0 and at 1
    NORM/start_signs                Linf: [2, 16, 3]         of each column
                                    L2, L1: [2, 25, 3]       of each tile, row by row
    NORM/start_transposed           [25]                     L2, L1: of each tile
    NORM/top, NORM/left             [QUERIES, 1 or 2]        of the first window, and for L2 and L1 of the second
    NORM/signs                      [QUERIES, 2, 3]          upstream shares them in the batch for Linf
    NORM/transposed                 [QUERIES]                L2, L1
    NORM/images                     [1 + QUERIES, 2, 16, 16, 3]   the start, then the proposals
"""

import sys
from unittest import mock

import numpy as np
import torch

NORMS = {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0}
SHAPES = [(32, 32), (28, 28), (8, 8), (40, 24)]
SIDES = [1, 2, 3, 4, 5, 7, 10, 11, 21]
QUERIES = 4
# Rows and columns of both windows of side 7: apart, overlapping, the same, one row shared.
WINDOWS = [((0, 8), (1, 8)), ((3, 5), (2, 4)), ((4, 4), (3, 3)), ((2, 8), (4, 4))]


class Model:
    """Keeps the images it is asked about; class 0 wins by less and less."""

    def __init__(self):
        self.images = []

    def __call__(self, x):
        self.images.append(x.permute(0, 2, 3, 1).numpy().copy())
        logits = torch.zeros(len(x), 3)
        logits[:, 0] = 2.0 - 1e-4 * len(self.images)
        return logits


def make(upstream, norm, num_queries, p_init=0.8):
    return upstream(
        Model(), norm=norm, n_queries=num_queries, eps=NORMS[norm], p_init=p_init, resc_schedule=False, device="cpu"
    )


def changes(values):
    """Where a sequence changes, from 0 on, and its values there."""
    values = np.array(values)
    at = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
    return at.astype(np.int32), values[at]


def run(attack, x):
    attack.init_hyperparam(x)
    attack.attack_single_run(x, torch.zeros(len(x), dtype=torch.long))
    return attack.predict.images


def schedule(upstream):
    arrays = {}
    share = make(upstream, "Linf", 5000).p_selection
    arrays["share/at"], arrays["share/value"] = changes([share(i) for i in range(10001)])
    for norm in NORMS:
        for height, width in SHAPES:
            # One query for each share: 10,001 of them take minutes.
            attack = make(upstream, norm, len(arrays["share/value"]))
            attack.p_selection = lambda i: arrays["share/value"][i]
            rooms = []

            def first(low, high, rooms=rooms):
                rooms.append(high)
                return torch.zeros(1, dtype=torch.long)

            attack.random_int = first
            run(attack, torch.full((1, 1, height, width), 0.5))
            # Linf draws a row and a column, the others of two windows.
            rooms = np.reshape(rooms, (attack.n_queries, -1, 2))
            sides = np.array([height, width]) - rooms
            assert np.all(sides == sides[:, :1, :1])
            at, value = changes(sides[:, 0, 0].astype(np.int32))
            key = f"side/{norm}/{height}x{width}"
            arrays[f"{key}/at"], arrays[f"{key}/value"] = arrays["share/at"][at], value
    return arrays


def patterns(upstream):
    with mock.patch("torch.rand", lambda shape: torch.zeros(shape)):
        return {
            f"eta/{norm}/{side}": make(upstream, norm, 1).eta(side).numpy() for norm in ("L2", "L1") for side in SIDES
        }


def proposals(upstream, norm):
    rng = np.random.default_rng(2)
    x = np.clip(rng.uniform(-0.1, 1.1, (2, 16, 16, 3)), 0, 1).astype(np.float32)
    is_linf = norm == "Linf"
    num_starts, num_windows = (1, 1) if is_linf else (25, 2)

    def random_signs(*shape):
        return rng.choice([-1.0, 1.0], shape).astype(np.float32)

    start_signs = random_signs(2, 16, 3) if is_linf else random_signs(2, 25, 3)
    start_transposed = rng.random(num_starts) > 0.5
    signs = np.repeat(random_signs(QUERIES, 1, 3), 2, axis=1) if is_linf else random_signs(QUERIES, 2, 3)
    transposed = np.array([True, False, False, True])
    top, left = (np.array(WINDOWS, np.int32)[:, i, :num_windows] for i in range(2))

    # What upstream asks for, in its order and layout.
    if is_linf:
        chosen = [start_signs.transpose(0, 2, 1)[:, :, None], *signs[:, 0, :, None, None]]
    else:
        chosen = [*start_signs.transpose(1, 0, 2)[..., None, None], *signs[..., None, None]]
    chosen = iter(chosen)
    firsts = iter(np.stack([top, left], axis=-1).ravel())
    coins = iter([] if is_linf else [*start_transposed, *transposed])

    def choice(shape):
        values = torch.tensor(next(chosen))
        assert list(values.shape) == list(shape), (values.shape, shape)
        return values

    attack = make(upstream, norm, QUERIES, p_init=0.2)
    attack.random_choice = choice
    attack.random_int = lambda low, high: torch.tensor([int(next(firsts))])
    with mock.patch("torch.rand", lambda shape: torch.full(shape, 0.75 if next(coins) else 0.25)):
        images = run(attack, torch.tensor(x.transpose(0, 3, 1, 2).copy()))
    assert not [*chosen, *firsts, *coins] and len(images) == 1 + QUERIES
    arrays = {
        "epsilon": np.float64(NORMS[norm]),
        "side": np.int32(7),
        "x": x,
        "start_signs": start_signs,
        "top": top,
        "left": left,
        "signs": signs,
        "images": np.stack(images),
    }
    if not is_linf:
        arrays |= {"start_transposed": start_transposed, "transposed": transposed}
    return {f"{norm}/{key}": array for key, array in arrays.items()}


def record(upstream):
    arrays = {**schedule(upstream), **patterns(upstream)}
    for norm in NORMS:
        arrays |= proposals(upstream, norm)
    return arrays


if __name__ == "__main__":
    checkout, path = sys.argv[1:]
    sys.path.insert(0, checkout)
    from autoattack.square import SquareAttack

    np.savez_compressed(path, **record(SquareAttack))
