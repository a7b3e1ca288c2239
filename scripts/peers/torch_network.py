"""The network of the paper in plain PyTorch.

Written from the description of the method (Gowal et al. 2020) with the parts that PyTorch has for it: `BatchNorm2d`,
`SiLU`, padding as TensorFlow's 'SAME'. `of_weights` makes the twin of a network that `scripts/benchmark.py` hands over.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
ACTIVATIONS = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "elu": nn.ELU,
    "softplus": nn.Softplus,
    "leaky_relu": lambda inplace=False: nn.LeakyReLU(0.01, inplace),
}


def _activation(name):
    """In place where PyTorch has that, which saves memory."""
    return ACTIVATIONS[name](inplace=True) if name in ("relu", "silu", "elu", "leaky_relu") else ACTIVATIONS[name]()


class Block(nn.Module):
    """Two convolutions, each after normalisation and activation, beside a shortcut."""

    def __init__(self, inputs, outputs, stride, projects, activation):
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(inputs, momentum=0.01)
        self.conv_0 = nn.Conv2d(inputs, outputs, 3, stride, padding=1 if stride == 1 else 0, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(outputs, momentum=0.01)
        self.conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if projects else None
        self.activation_0, self.activation_1 = _activation(activation), _activation(activation)
        self.pads = stride > 1

    def forward(self, x):
        activated = self.activation_0(self.batchnorm_0(x))
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        y = self.conv_0(F.pad(activated, (0, 1, 0, 1)) if self.pads else activated)
        return self.conv_1(self.activation_1(self.batchnorm_1(y))) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width: images NCHW in [0, 1] to logits."""

    def __init__(self, depth, width, activation, num_classes=10):
        super().__init__()
        num_blocks, channels = (depth - 4) // 6, 16
        self.init_conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        groups = []
        for base, stride in ((16, 1), (32, 2), (64, 2)):
            blocks = []
            for k in range(num_blocks):
                blocks.append(Block(channels, base * width, stride if k == 0 else 1, k == 0, activation))
                channels = base * width
            groups.append(nn.ModuleDict({"block": nn.Sequential(*blocks)}))
        self.layer = nn.ModuleList(groups)
        self.batchnorm, self.activation = nn.BatchNorm2d(channels, momentum=0.01), _activation(activation)
        self.logits = nn.Linear(channels, num_classes)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                std = module.weight[0].numel() ** -0.5
                nn.init.trunc_normal_(module.weight, 0.0, std, -2 * std, 2 * std)

    def forward(self, x):
        x = self.init_conv((x - self.mean) / self.std)
        for group in self.layer:
            x = group["block"](x)
        return self.logits(self.activation(self.batchnorm(x)).mean((2, 3)))


def of_weights(given):
    """The network, in evaluation mode, of arrays `weights/<layer>/<variable>`, `mean`, `std` and `activation`.

    Raises:
        ValueError: for weights of another network.
    """
    weights = {name.removeprefix("weights/"): given[name] for name in given if name.startswith("weights/")}
    num_blocks = len({name.split(".")[3].split("/")[0] for name in weights if name.startswith("layer.0.block.")})
    width = weights["layer.0.block.0.conv_0/kernel"].shape[-1] // 16
    kernel = weights["logits/kernel"]
    network = WideResNet(6 * num_blocks + 4, width, str(given["activation"]), kernel.shape[-1])
    names = {"kernel": "weight", "scale": "weight", "offset": "bias", "bias": "bias"}
    names |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    state = {"mean": given["mean"].reshape(1, 3, 1, 1), "std": given["std"].reshape(1, 3, 1, 1)}
    for name, value in weights.items():
        layer, _, variable = name.rpartition("/")
        if variable in names:
            axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(value.ndim, (0,))
            state[f"{layer}.{names[variable]}"] = value.transpose(axes)
    state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"Expected the weights of a WRN. Received: none for {missing}, and {unexpected}")
    return network.eval().requires_grad_(False)


def checked(network, given, tolerance=1e-4):
    """The images and labels that were handed over with a network, once it has the same logits on them.

    Raises:
        ValueError: where it has not.
    """
    x = torch.from_numpy(given["images"]).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        difference = float((network(x) - torch.from_numpy(given["logits"])).abs().max())
    if not difference <= tolerance:
        raise ValueError(f"Expected logits within {tolerance}. Received: a difference of {difference}")
    return x, torch.from_numpy(given["labels"]).long()
