"""Upstream's AutoAttack, next to `scripts/benchmark.py attack` and `standard`.

    git clone https://github.com/fra31/auto-attack
    python3 -m venv torch_env && torch_env/bin/pip install numpy torch
    python scripts/benchmark.py standard --network=FILE.keras --dataset=cifar10 --data_dir=DIR \\
        --against='torch_env/bin/python scripts/peers/upstream_autoattack.py --checkout=auto-attack'

The network is the twin, in plain PyTorch, of the WRN that is handed over; its logits have to be the same to 1e-4 before
anything is timed. A case is an attack by its name, or 'standard'; each is upstream's own `run_standard_evaluation`, in
the batches of the request.
"""

import argparse
import fractions
import sys

import answering
import numpy as np
import torch
import torch_network


def prepare(args, request):
    """A function that runs the attack of the request, and one that counts what is left."""
    from autoattack import AutoAttack

    settings = request["settings"]
    given = dict(np.load(request["given"]))
    network = torch_network.of_weights(given)
    x, labels = torch_network.checked(network, given)
    if args.channels_last:
        network = network.to(memory_format=torch.channels_last)
    attack = AutoAttack(
        network,
        norm=settings["norm"],
        eps=float(fractions.Fraction(str(settings["epsilon"]))),
        version="standard",
        device="cpu",
        verbose=False,
    )
    if request["case"] != "standard":
        attack.attacks_to_run = [request["case"]]
        shorten(attack, **settings.get("counts", {}))

    def run():
        torch.manual_seed(0)
        return attack.run_standard_evaluation(x, labels, bs=min(settings["batch_size"], len(x)))

    def describe(x_adv):
        with torch.no_grad():
            return {"num_robust": int((network(x_adv).argmax(1) == labels).sum())}

    return run, describe


def shorten(attack, num_restarts=1, num_steps=None, num_targets=None, num_queries=None):
    """Gives the attacks other counts than the standard version's."""
    for each in (attack.apgd, attack.apgd_targeted, attack.fab, attack.square):
        each.n_restarts = num_restarts
    if num_steps:
        attack.apgd.n_iter = num_steps
    if num_targets:
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = num_targets
    if num_queries:
        attack.square.n_queries = num_queries


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", required=True, help="of the repository")
    parser.add_argument("--channels_last", action="store_true", help="the network in this memory format")
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    answering.answer(lambda request: prepare(args, request))


if __name__ == "__main__":
    main()
