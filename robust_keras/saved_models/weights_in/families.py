"""Which names a network's weights have in the files of others: one line for each family of names, as data.

A family is added by a line in `FAMILIES`, where its network is one that `models` has; a network that is like one of
these and yet another stands in `OTHERS`, so that a file of it is refused by a line that says so.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

# The last part of a name: which of our weights that is, the one that the layer has; none where it is left out.
_Leaves = Mapping[str, tuple[str, ...]]
_TORCH: _Leaves = {
    "weight": ("kernel", "scale"),
    "bias": ("bias", "offset"),
    "running_mean": ("moving_mean",),
    "running_var": ("moving_variance",),
    "num_batches_tracked": (),  # PyTorch's statistics do not depend on it.
}
_HAIKU: _Leaves = {
    "w": ("kernel",),
    "b": ("bias",),
    "scale": ("scale",),
    "offset": ("offset",),
    "mean_ema/average": ("moving_mean",),
    "var_ema/average": ("moving_variance",),
    "mean_ema/counter": ("num_updates",),
    "var_ema/counter": (),  # The same.
    "mean_ema/hidden": (),  # The average, before it is divided by 1 - decay^counter.
    "var_ema/hidden": (),
}


class Family(NamedTuple):
    """How files of one kind name the weights of a network.

    Attributes:
        format: of the files: 'torch' (safetensors too) or 'haiku'.
        network: the function in `models` that makes it.
        stem: the name of its first convolution's kernel.
        layers: patterns for the names of layers, each with the layer's name here, `{0}` for the first group.
        leaves: what may follow a layer's name.
    """

    format: str
    network: str
    stem: str
    layers: tuple[tuple[str, str], ...]
    leaves: _Leaves

    def weight(self, name: str) -> tuple[str, tuple[str, ...]] | None:
        """Our layer and the weights of it that a name may be; None for a name that is not of this family.

        Args:
            name: without what stands before the stem in all names of a network.
        """
        separator = "/" if self.format == "haiku" else "."
        for leaf, weights in self.leaves.items():
            layer = name.removesuffix(separator + leaf)
            for pattern, ours in self.layers if layer != name else ():
                if match := re.fullmatch(pattern, layer):
                    return ours.format(*match.groups()), weights
        return None


FAMILIES = (
    # The authors' PyTorch port. RobustBench's DMWideResNet: Gowal 2020 and 2021, Rebuffi 2021, Rade 2021, Wang 2023,
    # Xu 2023, Cui 2023 (WRN-28-10), Bartoldson 2024.
    Family("torch", "wide_resnet", "init_conv.weight", (
        (r"(layer\.[0-2]\.block\.\d{1,3}\.(?:batchnorm_[01]|conv_[01]|shortcut))", "{0}"),
        (r"(init_conv|batchnorm|logits)", "{0}")), _TORCH),
    # The same port's PreActResNet. RobustBench's DMPreActResNet: Gowal 2021, Rebuffi 2021, Rade 2021.
    Family("torch", "preact_resnet", "conv_2d.weight", (
        (r"(layer_[0-3]\.\d{1,3}\.(?:batchnorm_[01]|conv_2d_[12]|shortcut))", "{0}"),
        (r"(conv_2d|batchnorm|logits)", "{0}")), _TORCH),
    # The authors' JAX code.
    Family("haiku", "wide_resnet", "init_conv/w", (
        (r"resnet_lay_([0-2])_block_(\d{1,3})/(batchnorm_[01]|conv_[01]|shortcut)", "layer.{0}.block.{1}.{2}"),
        (r"(init_conv|batchnorm|logits)", "{0}")), _HAIKU),
)  # fmt: skip

# Names that tell networks which are like these and yet others, and how they differ.
OTHERS = (
    (r"block1\.layer\.0\.conv1\.weight", "the WideResNet of TRADES (Carmon 2019, Wu 2020, Cui 2023's WRN-34-10), "
        "another network: its convolutions of stride 2 are padded on both sides, those here at the end alone"),
    (r"layer1\.0\.conv1\.weight", "torchvision's ResNet, another network: its convolutions of stride 2 are padded on "
        "both sides, those here at the end alone"),
    (r"stem\..*", "a network with a stem of its own, such as ConvNeXt's"),
)  # fmt: skip
