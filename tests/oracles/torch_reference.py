"""Adversarial training of a Wide ResNet in PyTorch: the oracle of the TensorFlow implementation.

Written from the description of the method alone (Gowal et al. 2020, https://arxiv.org/abs/2010.03593, and what the
authors' released code settles); it shares no code with the package. Needs PyTorch and NumPy in an environment of its
own. `record` replays given weights, images and noise, and writes what the training steps have to produce. `train` is a
complete small run, with its own random numbers, that prints accuracies.

    python3.11 -m venv torch_env && torch_env/bin/pip install torch numpy
    torch_env/bin/python torch_reference.py record --inputs in.npz --output out.npz --depth 10 --width 1 --group_size 8
    torch_env/bin/python torch_reference.py train --data cifar.npz --seed 0 --steps 600 --threads 2

`in.npz`: `weights/<module>/<parameter>` for every parameter (`weights/layer.0.block.0.conv_0/kernel`), `images` uint8
[steps, batch, 32, 32, 3], `labels` [steps, batch], `noise` float32 shaped like the images, `learning_rates` [steps].
`out.npz`: `loss` [steps], the mean cross-entropy on the adversarial images; of the first step `input_gradient` (of the
summed cross-entropy at the random start), `x_adv`, `gradient/...` (of the loss with its L2 term) and, as that step left
them, `momentum/...`, `weights/...`, `average/...`, `moving_mean/<module>`, `moving_variance/<module>`. Kernels are
HWIO, images NHWC. `cifar.npz`: `train_image` and `test_image`, uint8 [n, 32, 32, 3], `train_label`, `test_label`.
"""

import argparse
import fractions
import json
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
NUM_CLASSES = 10
NUM_HELD_OUT = 1024
WEIGHT_DECAY = 5e-4
MOMENTUM = 0.9

# What BatchNorm normalises with: the batch, which also updates the moving statistics; the batch alone; the moving ones.
UPDATE, BATCH, MOVING = "update", "batch", "moving"


class Conv(nn.Module):
    """Convolution without bias, padded as TensorFlow pads 'SAME': what is odd of the padding goes after."""

    def __init__(self, channels_in, channels_out, size, stride):
        super().__init__()
        self.size, self.stride = size, stride
        self.kernel = nn.Parameter(torch.empty(channels_out, channels_in, size, size))  # OIHW
        std = (channels_in * size * size) ** -0.5
        nn.init.trunc_normal_(self.kernel, 0.0, std, -2 * std, 2 * std)

    def forward(self, x):
        padding = []
        for length in (x.shape[3], x.shape[2]):  # F.pad starts at the last axis
            total = max((-(-length // self.stride) - 1) * self.stride + self.size - length, 0)
            padding += [total // 2, total - total // 2]
        if len(set(padding)) > 1:
            x, padding = F.pad(x, padding), [0]
        return F.conv2d(x, self.kernel, stride=self.stride, padding=padding[0])


class BatchNorm(nn.Module):
    """Statistics of consecutive groups of `group_size` examples; moving statistics average over the groups."""

    decay, eps = 0.99, 1e-5

    def __init__(self, channels, group_size):
        super().__init__()
        self.group_size = group_size
        self.scale = nn.Parameter(torch.ones(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.register_buffer("biased_mean", torch.zeros(channels), persistent=False)
        self.register_buffer("biased_variance", torch.zeros(channels), persistent=False)
        self.num_updates = 0

    def moving_statistics(self):
        debias = 1 - self.decay**self.num_updates
        return self.biased_mean / debias, self.biased_variance / debias

    @torch.no_grad()
    def update(self, groups):
        statistics = [torch.var_mean(group, (0, 2, 3), correction=0) for group in groups]
        variance, mean = (torch.stack(values).mean(0) for values in zip(*statistics))
        self.biased_mean.mul_(self.decay).add_(mean, alpha=1 - self.decay)
        self.biased_variance.mul_(self.decay).add_(variance, alpha=1 - self.decay)
        self.num_updates += 1

    def forward(self, x, mode):
        if mode == MOVING:
            mean, variance = self.moving_statistics()
            return F.batch_norm(x, mean, variance, self.scale, self.offset, False, eps=self.eps)
        if len(x) % self.group_size:
            raise ValueError(f"The batch must be a multiple of the group size {self.group_size}. Received: {len(x)}")
        groups = x.split(self.group_size)
        if mode == UPDATE:
            self.update(groups)
        # Normalises with the biased variance; no running statistics are handed in, so none are kept.
        return torch.cat([F.batch_norm(g, None, None, self.scale, self.offset, True, eps=self.eps) for g in groups])


class Block(nn.Module):
    """Pre-activation residual block; only the first of a group projects its shortcut."""

    def __init__(self, channels_in, channels_out, stride, project, activation, group_size):
        super().__init__()
        self.activation = activation
        self.batchnorm_0 = BatchNorm(channels_in, group_size)
        self.conv_0 = Conv(channels_in, channels_out, 3, stride)
        self.batchnorm_1 = BatchNorm(channels_out, group_size)
        self.conv_1 = Conv(channels_out, channels_out, 3, 1)
        self.shortcut = Conv(channels_in, channels_out, 1, stride) if project else None

    def forward(self, x, mode):
        h = self.activation(self.batchnorm_0(x, mode))
        shortcut = x if self.shortcut is None else self.shortcut(h)
        return self.conv_1(self.activation(self.batchnorm_1(self.conv_0(h), mode))) + shortcut


class WideResNet(nn.Module):
    """Images NHWC in [0, 1] to logits."""

    def __init__(self, depth, width, activation, group_size):
        super().__init__()
        num_blocks, rest = divmod(depth - 4, 6)
        if rest or num_blocks < 1:
            raise ValueError(f"depth must be 6 n + 4. Received: {depth}")
        self.activation = {"silu": F.silu, "relu": F.relu}[activation]
        self.init_conv = Conv(3, 16, 3, 1)
        self.layer, channels_in = nn.ModuleList(), 16
        for channels, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            blocks = [Block(channels_in, channels, stride, True, self.activation, group_size)]
            blocks += [Block(channels, channels, 1, False, self.activation, group_size) for _ in range(num_blocks - 1)]
            self.layer.append(nn.ModuleDict({"block": nn.ModuleList(blocks)}))
            channels_in = channels
        self.batchnorm = BatchNorm(channels_in, group_size)
        zeros = {"kernel": torch.zeros(channels_in, NUM_CLASSES), "bias": torch.zeros(NUM_CLASSES)}
        self.logits = nn.ParameterDict(zeros)

    def forward(self, x, mode):
        x = (x - x.new_tensor(MEAN)) / x.new_tensor(STD)
        x = self.init_conv(x.permute(0, 3, 1, 2))  # NCHW to PyTorch, in memory still NHWC: "channels_last"
        for block in (block for group in self.layer for block in group["block"]):
            x = block(x, mode)
        return self.activation(self.batchnorm(x, mode)).mean((2, 3)) @ self.logits["kernel"] + self.logits["bias"]


def to_tensors(images, labels, dtype):
    return torch.from_numpy(images).to(dtype) / 255, torch.from_numpy(labels).long()


def loss_gradient(logits_fn, x, labels):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(logits_fn(x), labels, reduction="sum"), x)[0]


def pgd(logits_fn, x, labels, noise, args, num_steps):
    x_adv = (x + noise).clamp(0, 1)
    for _ in range(num_steps):
        x_adv = x_adv + args.step_size * loss_gradient(logits_fn, x_adv, labels).sign()
        x_adv = torch.clamp(x_adv, x - args.epsilon, x + args.epsilon).clamp(0, 1)
    return x_adv


class Trainer:
    """The network, its momentum buffers and its averaged weights, all dictionaries by parameter name."""

    def __init__(self, args, weights=None):
        self.args, self.num_steps = args, 0
        self.model = WideResNet(args.depth, args.width, args.activation, args.group_size)
        self.model.to(getattr(torch, args.dtype), memory_format=torch.channels_last)
        if weights is not None:
            weights = {name.replace("/", "."): torch.from_numpy(value) for name, value in weights.items()}
            self.model.load_state_dict({n: v.permute(3, 2, 0, 1) if v.ndim == 4 else v for n, v in weights.items()})
        self.parameters = dict(self.model.named_parameters())
        self.momentum = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    def step(self, x, labels, noise, learning_rate):
        """Returns the mean cross-entropy, the adversarial images and the gradients of the whole loss."""
        x_adv = pgd(lambda v: self.model(v, BATCH), x, labels, noise, self.args, self.args.num_attack_steps)
        loss = F.cross_entropy(self.model(x_adv, UPDATE), labels)
        l2 = WEIGHT_DECAY / 2 * sum((p**2).sum() for name, p in self.parameters.items() if "batchnorm" not in name)
        gradients = dict(zip(self.parameters, torch.autograd.grad(loss + l2, list(self.parameters.values()))))
        decay = min(self.args.tau, (1 + self.num_steps) / (10 + self.num_steps))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.momentum[name].mul_(MOMENTUM).add_(gradients[name])
                parameter.sub_(learning_rate * (gradients[name] + MOMENTUM * self.momentum[name]))
                self.average[name].mul_(decay).add_(parameter, alpha=1 - decay)
        self.num_steps += 1
        return loss.item(), x_adv, gradients

    def logits_fn(self, parameters):
        """Evaluation of the network with other parameters and its live moving statistics."""
        return lambda x: torch.func.functional_call(self.model, parameters, (x, MOVING))


def to_tensorflow(prefix, tensors):
    arrays = {"/".join(name.rsplit(".", 1)): tensor.detach() for name, tensor in tensors.items()}
    return {f"{prefix}/{k}": (v.permute(2, 3, 1, 0) if v.ndim == 4 else v).numpy().copy() for k, v in arrays.items()}


def record(args):
    dtype = getattr(torch, args.dtype)
    inputs = dict(np.load(args.inputs))
    trainer = Trainer(args, {k.removeprefix("weights/"): v for k, v in inputs.items() if k.startswith("weights/")})
    output, losses = {}, []
    for s, learning_rate in enumerate(inputs["learning_rates"]):
        x, labels = to_tensors(inputs["images"][s], inputs["labels"][s], dtype)
        noise = torch.from_numpy(inputs["noise"][s]).to(dtype)
        if s == 0:
            start = (x + noise).clamp(0, 1)
            output["input_gradient"] = loss_gradient(lambda v: trainer.model(v, BATCH), start, labels).numpy()
        loss, x_adv, gradients = trainer.step(x, labels, noise, float(learning_rate))
        losses.append(loss)
        if s == 0:
            output |= {"x_adv": x_adv.numpy()} | to_tensorflow("gradient", gradients)
            output |= to_tensorflow("momentum", trainer.momentum) | to_tensorflow("average", trainer.average)
            output |= to_tensorflow("weights", trainer.parameters)
            for name, module in trainer.model.named_modules():
                if isinstance(module, BatchNorm):
                    mean, variance = module.moving_statistics()
                    output |= {f"moving_mean/{name}": mean.numpy(), f"moving_variance/{name}": variance.numpy()}
    np.savez(args.output, loss=np.array(losses), **output)


def augmented_batches(images, labels, batch_size, rng):
    """Shuffled anew in every epoch, padded with four zeros, cropped at random and flipped half of the time."""
    padded, queue = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0))), np.zeros(0, int)
    while True:
        while len(queue) < batch_size:
            queue = np.concatenate([queue, rng.permutation(len(images))])
        index, queue = queue[:batch_size], queue[batch_size:]
        top, left = rng.integers(9, size=(2, batch_size))
        step = rng.choice((-1, 1), size=batch_size)
        crops = [padded[i, t : t + 32, c : c + 32][:, ::d] for i, t, c, d in zip(index, top, left, step)]
        yield np.stack(crops), labels[index]


def uniform_noise(x, args):
    return (2 * torch.rand_like(x) - 1) * args.epsilon


def evaluate(logits_fn, images, labels, args, batch_size=200):
    clean, robust = 0, 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size)):
        x_adv = pgd(logits_fn, x, y, uniform_noise(x, args), args, 20)
        with torch.no_grad():
            clean += (logits_fn(x).argmax(1) == y).sum().item()
            robust += (logits_fn(x_adv).argmax(1) == y).sum().item()
    return clean / len(labels), robust / len(labels)


def train(args):
    start = time.time()
    torch.manual_seed(args.seed)
    data = np.load(args.data)
    images, labels = data["train_image"][NUM_HELD_OUT:], data["train_label"][NUM_HELD_OUT:]
    batches = augmented_batches(images, labels, args.batch_size, np.random.default_rng(args.seed))
    trainer, dtype = Trainer(args), getattr(torch, args.dtype)
    for s in range(args.steps):
        learning_rate = args.learning_rate * 0.1 ** ((2 * s >= args.steps) + (4 * s >= 3 * args.steps))
        x, y = to_tensors(*next(batches), dtype)
        loss, _, _ = trainer.step(x, y, uniform_noise(x, args), learning_rate)
        if (s + 1) % 50 == 0:
            print(f"step {s + 1} loss {loss:.4f} seconds {time.time() - start:.0f}", flush=True)
    x, y = to_tensors(data["test_image"][: args.num_test], data["test_label"][: args.num_test], dtype)
    clean, robust = evaluate(trainer.logits_fn(trainer.parameters), x, y, args)
    clean_averaged, robust_averaged = evaluate(trainer.logits_fn(trainer.average), x, y, args)
    result = {"seed": args.seed, "clean": clean, "robust": robust, "clean_averaged": clean_averaged}
    print(json.dumps(result | {"robust_averaged": robust_averaged, "seconds": round(time.time() - start, 1)}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    record_parser, train_parser = commands.add_parser("record"), commands.add_parser("train")
    record_parser.add_argument("--inputs", required=True)
    record_parser.add_argument("--output", required=True)
    train_parser.add_argument("--data", required=True)
    for name, default in {"seed": 0, "steps": 600, "batch_size": 64, "num_test": 2000}.items():
        train_parser.add_argument(f"--{name}", type=int, default=default)
    train_parser.add_argument("--learning_rate", type=float, default=0.1)
    for command, function in ((record_parser, record), (train_parser, train)):
        command.set_defaults(function=function)
        for name, default in {"depth": 10, "width": 1, "group_size": 32, "num_attack_steps": 10, "threads": 2}.items():
            command.add_argument(f"--{name}", type=int, default=default)
        for name, default in {"epsilon": "8/255", "step_size": "2/255", "tau": "0.995"}.items():
            command.add_argument(f"--{name}", type=lambda text: float(fractions.Fraction(text)), default=default)
        command.add_argument("--activation", choices=("silu", "relu"), default="silu")
        command.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.function(args)


if __name__ == "__main__":
    main()
