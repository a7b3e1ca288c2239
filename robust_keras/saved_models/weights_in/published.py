"""The authors' published networks: where they are, and which accuracies their papers state, as data."""

from typing import NamedTuple

from robust_keras.foreign_files import printable

PLACE = "https://storage.googleapis.com/dm-adversarial-robustness"
GOWAL_2020, REBUFFI_2021, GOWAL_2021 = "arXiv:2010.03593", "arXiv:2103.01946", "arXiv:2110.09468"
# By norm, as the tables of https://github.com/google-deepmind/deepmind-research/tree/master/adversarial_robustness say.
_EPSILONS = {"linf": ("Linf", "8/255"), "l2": ("L2", "128/255")}
_MNIST_EPSILON = "0.3"
_RESNETS = {"resnet18": "PreActResNet-18"}


class Published(NamedTuple):
    """A network that the authors published.

    Attributes:
        name: of its file, which says the data set, the norm, the architecture and which extra data there were.
        clean: accuracy on all test images, in per cent.
        robust: accuracy under AutoAttack on all test images, in per cent.
        paper: on arXiv.
    """

    name: str
    clean: float
    robust: float
    paper: str

    @property
    def url(self) -> str:
        """Of its PyTorch form."""
        return f"{PLACE}/{self.name}.pt"

    @property
    def dataset(self) -> str:
        """The data set, by TFDS' name."""
        return self.name.split("_")[0]

    @property
    def threat(self) -> tuple[str, str]:
        """The norm and the radius, as the tables have them."""
        norm, epsilon = _EPSILONS[self.name.split("_")[1]]
        return norm, _MNIST_EPSILON if self.dataset == "mnist" else epsilon

    @property
    def architecture(self) -> str:
        """The network, such as WRN-28-10."""
        written = self.name.split("_")[2]
        return _RESNETS.get(written, written.replace("wrn", "WRN-"))

    @property
    def activation(self) -> str:
        """Of all of them, as the authors' `eval.py` builds them."""
        return "silu"


PUBLISHED = {
    each.name: each
    for each in (
        Published("cifar10_linf_wrn70-16_with", 91.10, 65.88, GOWAL_2020),
        Published("cifar10_linf_wrn28-10_with", 89.48, 62.80, GOWAL_2020),
        Published("cifar10_linf_wrn70-16_without", 85.29, 57.20, GOWAL_2020),
        Published("cifar10_linf_wrn34-20_without", 85.64, 56.86, GOWAL_2020),
        Published("cifar10_l2_wrn70-16_with", 94.74, 80.53, GOWAL_2020),
        Published("cifar10_l2_wrn70-16_without", 90.90, 74.50, GOWAL_2020),
        Published("cifar100_linf_wrn70-16_with", 69.15, 36.88, GOWAL_2020),
        Published("cifar100_linf_wrn70-16_without", 60.86, 30.03, GOWAL_2020),
        Published("mnist_linf_wrn28-10_without", 99.26, 96.34, GOWAL_2020),
        Published("cifar10_linf_wrn106-16_cutmix_ddpm_v2", 88.50, 64.64, REBUFFI_2021),
        Published("cifar10_linf_wrn70-16_cutmix_ddpm_v2", 88.54, 64.25, REBUFFI_2021),
        Published("cifar10_linf_wrn28-10_cutmix_ddpm_v2", 87.33, 60.75, REBUFFI_2021),
        Published("cifar10_linf_resnet18_ddpm", 83.53, 56.66, REBUFFI_2021),
        Published("cifar10_l2_wrn70-16_cutmix_ddpm_v2", 92.41, 80.42, REBUFFI_2021),
        Published("cifar10_l2_wrn28-10_cutmix_ddpm_v2", 91.79, 78.80, REBUFFI_2021),
        Published("cifar10_l2_resnet18_cutmix_ddpm", 90.33, 75.86, REBUFFI_2021),
        Published("cifar100_linf_wrn70-16_cutmix_ddpm", 63.56, 34.64, REBUFFI_2021),
        Published("cifar100_linf_wrn28-10_cutmix_ddpm", 62.41, 32.06, REBUFFI_2021),
        Published("cifar100_linf_resnet18_ddpm", 56.87, 28.50, REBUFFI_2021),
        Published("cifar10_linf_wrn70-16_cutmix_ddpm_100m", 88.74, 66.11, GOWAL_2021),
        Published("cifar10_linf_wrn28-10_ddpm_100m", 87.50, 63.44, GOWAL_2021),
        Published("cifar10_linf_resnet18_ddpm_100m", 87.35, 58.63, GOWAL_2021),
    )
}


def find(name: str) -> Published:
    """The network of a name.

    Raises:
        ValueError: for another name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"Expected --published out of {', '.join(PUBLISHED)}. Received: {printable(name)}")
    return PUBLISHED[name]
