"""Records which CIFAR-10 images the reference implementation of AutoAttack breaks, attack by attack.

Needs PyTorch, NumPy and a checkout of https://github.com/fra31/auto-attack (commit a392200) in an environment of its own:

    python3.11 -m venv torch_env && torch_env/bin/pip install torch numpy
    torch_env/bin/python record_upstream_verdicts.py --checkout auto-attack --weights weights.npz --images images.npz \\
        --output upstream_verdicts.npz

`weights.npz`: the variables of an exported WRN-10-1 (SiLU) by name, as `tf.saved_model.load(...).variables` lists them.
`images.npz`: `images` uint8 [n, 32, 32, 3] and `labels` [n], all of which the network classifies correctly.

Random starts come from `noise`, so that both sides can begin at the same points. The output holds the network, the
images, its logits, and for each job `NORM ATTACK` which images still stand, bool [n].
"""

import argparse
import sys

import numpy as np
import torch
import torch_reference

EPSILONS = {"Linf": 8 / 255, "L2": 128 / 255, "L1": 12.0}
JOBS = [
    *((norm, attack) for norm in EPSILONS for attack in ("apgd-ce", "apgd-t", "fab-t")),
    ("Linf", "apgd-dlr"),
    ("Linf", "fab"),
]


def noise(norm, run, num_images, shape=(32, 32, 3)):
    """What the starts of a run are made of, float32 [num_images, 32, 32, 3]: uniform in [0, 1) for Linf, else normal."""
    generator = np.random.default_rng([run, 0 if norm == "Linf" else 1])
    shape = (num_images, *shape)
    return generator.random(shape, np.float32) if norm == "Linf" else generator.standard_normal(shape, np.float32)


def network(weights):
    """Images NCHW to logits."""
    net = torch_reference.WideResNet(10, 1, "silu", 1)
    tensors = {name.replace("/", "."): torch.from_numpy(value) for name, value in weights.items()}
    for name, module in net.named_modules():
        if isinstance(module, torch_reference.BatchNorm):
            module.biased_mean = tensors.pop(f"{name}.moving_mean")
            module.biased_variance = tensors.pop(f"{name}.moving_variance")
            tensors.pop(f"{name}.num_updates")
            module.num_updates = 10**6  # Debiased already.
    net.load_state_dict({n: v.permute(3, 2, 0, 1) if v.ndim == 4 else v for n, v in tensors.items()})
    net.to(memory_format=torch.channels_last)
    return lambda x: net(x.permute(0, 2, 3, 1), torch_reference.MOVING)


def make_attack(name, norm, model):
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.fab_pt import FABAttack_PT

    common = {"norm": norm, "eps": EPSILONS[norm], "seed": 0, "device": "cpu", "verbose": False}
    large = {"use_largereps": norm == "L1"}
    if name == "apgd-t":
        return APGDAttack_targeted(model, n_target_classes=5 if norm == "L1" else 9, **large, **common)
    if name.startswith("apgd"):
        return APGDAttack(model, loss=name.removeprefix("apgd-"), **large, **common)
    return FABAttack_PT(model, targeted=name == "fab-t", **common)


def with_noise(attack, norm, x):
    """Makes every run of the attack draw its start from `noise`."""
    index = {image.numpy().tobytes(): k for k, image in enumerate(x)}
    run = {"number": -1, "rows": None}
    outer = "decr_eps_pgd" if getattr(attack, "use_largereps", False) else "attack_single_run"
    original = getattr(attack, outer)

    def begin(images, *args, **kwargs):
        run["number"] += 1
        run["rows"] = [index[image.numpy().tobytes()] for image in images]
        return original(images, *args, **kwargs)

    def draw(*args, **kwargs):
        return torch.from_numpy(noise(norm, run["number"], len(x))[run["rows"]]).permute(0, 3, 1, 2).contiguous()

    setattr(attack, outer, begin)
    torch.rand = torch.randn = torch.randn_like = draw


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkout", "weights", "images", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--num_images", type=int, default=32)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    weights, data = dict(np.load(args.weights)), np.load(args.images)
    images, labels = data["images"][: args.num_images], data["labels"][: args.num_images]
    model = network(weights)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 255
    y = torch.from_numpy(labels).long()
    with torch.no_grad():
        recorded = {"images": images, "labels": labels, "logits": model(x).numpy()}
    recorded |= {f"weights/{name}": value for name, value in weights.items()}
    drawn = torch.rand, torch.randn, torch.randn_like
    for norm, name in JOBS:
        attack = make_attack(name, norm, model)
        with_noise(attack, norm, x)
        x_adv = attack.perturb(x.clone(), y.clone()).detach()
        torch.rand, torch.randn, torch.randn_like = drawn
        with torch.no_grad():
            recorded[f"{norm} {name}"] = (model(x_adv).argmax(1) == y).numpy()
        print(norm, name, recorded[f"{norm} {name}"].sum(), "of", len(x), flush=True)
    np.savez_compressed(args.output, **recorded)


if __name__ == "__main__":
    main()
