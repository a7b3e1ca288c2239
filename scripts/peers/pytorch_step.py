"""A training step of the paper in PyTorch, next to `scripts/benchmark.py step`.

    python3 -m venv torch_env && torch_env/bin/pip install numpy torch
    python scripts/benchmark.py step --against='torch_env/bin/python scripts/peers/pytorch_step.py --channels_last'

PGD with steps along the signs, the cross-entropy on what it finds (TRADES too), SGD with Nesterov momentum and weight
decay. Depth, width, activation, batch, steps, objective and statistics are those of the request; 'mixed_bfloat16' means
autocast. --source takes the network of a checkout of
https://github.com/imrahulr/adversarial_robustness_pytorch instead of the one in `torch_network.py`.
"""

import argparse
import contextlib
import importlib.util
import pathlib

import answering
import torch
import torch_network
from torch.nn import functional as F

EPSILON, STEP_SIZE = 8 / 255, 2 / 255


def network_of(source, settings):
    if source is None:
        return torch_network.WideResNet(settings["depth"], settings["width"], settings["activation"])
    path = pathlib.Path(source) / "core" / "models" / "wideresnetwithswish.py"
    spec = importlib.util.spec_from_file_location("wideresnetwithswish", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    activation = torch_network.ACTIVATIONS[settings["activation"]]
    return module.WideResNet(depth=settings["depth"], width=settings["width"], activation_fn=activation)


def prepare(args, request):
    """A function that takes a step of the request's kind and returns its loss."""
    settings = request["settings"]
    if settings.get("groups", 1) != 1:
        raise ValueError(f"Expected one group: PyTorch's layers know no others. Received: {settings['groups']}")
    torch.manual_seed(0)
    network = network_of(args.source, settings).train()
    images = torch.rand(settings["batch_size"], 3, 32, 32)
    if args.channels_last:
        network, images = network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (settings["batch_size"],))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model = torch.compile(network) if args.compile else network
    dtype = args.dtype or ("bfloat16" if settings.get("dtype") == "mixed_bfloat16" else "float32")
    if dtype == "float32":
        precision = contextlib.nullcontext
    else:

        def precision():
            return torch.autocast("cpu", dtype=torch.bfloat16)

    def step():
        network.train(settings.get("attack_batch_norm", "batch") == "batch")
        # Gradients of the weights are not wanted here.
        network.requires_grad_(False)
        x_adv = attacked(model, images, labels, settings, precision)
        network.requires_grad_(True)
        network.train()
        optimizer.zero_grad()
        with precision():
            loss = loss_of(model, images, x_adv, labels, settings["objective"])
        loss.backward()
        optimizer.step()
        return loss.item()

    return step, lambda loss: {"loss": loss}


def attacked(model, images, labels, settings, precision):
    """PGD from a random point of the ball."""
    if not settings["attack_steps"]:
        return images
    is_trades = settings["objective"] == "trades"
    if is_trades:
        with torch.no_grad(), precision():
            targets = F.softmax(model(images).float(), 1)
    x_adv = (images + torch.empty_like(images).uniform_(-EPSILON, EPSILON)).clamp(0, 1)
    low, high = (images - EPSILON).clamp(min=0), (images + EPSILON).clamp(max=1)
    for _ in range(settings["attack_steps"]):
        x_adv.requires_grad_(True)
        with precision():
            logits = model(x_adv).float()
            if is_trades:
                loss = F.kl_div(F.log_softmax(logits, 1), targets, reduction="sum")
            else:
                loss = F.cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x_adv)
        x_adv = torch.clamp(x_adv.detach() + STEP_SIZE * gradient.sign(), low, high)
    return x_adv.detach()


def loss_of(model, images, x_adv, labels, objective):
    if objective == "standard":
        return F.cross_entropy(model(images), labels)
    if objective == "adversarial_training":
        return F.cross_entropy(model(x_adv), labels)
    if objective != "trades":
        raise ValueError(f"Expected standard, adversarial_training or trades. Received: {objective}")
    clean, adversarial = model(images).float(), model(x_adv).float()
    divergence = F.kl_div(F.log_softmax(adversarial, 1), F.softmax(clean, 1), reduction="batchmean")
    return F.cross_entropy(clean, labels) + 6.0 * divergence


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="whatever the request says")
    parser.add_argument("--channels_last", action="store_true", help="in this memory format")
    parser.add_argument("--compile", action="store_true", help="by torch.compile")
    parser.add_argument("--source", help="a checkout whose network is taken")
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it takes by itself")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    answering.answer(lambda request: prepare(args, request))


if __name__ == "__main__":
    main()
