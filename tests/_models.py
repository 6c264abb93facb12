"""Small networks with every shape of normalisation, shared by the tests.

Random networks get real-looking statistics first (`randomise_norms`): with running mean 0, variance 1, gamma 1
and beta 0 a wrong conversion passes for the wrong reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def randomise_norms(model: Model, seed: int = 0) -> Model:
    """Give every norm that keeps running statistics real-looking state, in place.

    Running mean ~ N(0, 1), running variance log-uniform in [0.2, 4], gamma of both signs with some near 0,
    beta ~ N(0, 1). Frozen norms (whose gamma and beta are buffers) are done as well.

    Returns:
        the model itself.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for module in model.modules():
            mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            is_batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if not is_batchnorm and not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
                continue
            if mean is not None and var is not None:
                mean.copy_(normal(mean))
                uniform = torch.rand(var.shape, generator=generator, dtype=torch.float64)
                var.copy_(torch.exp(math.log(0.2) + uniform * math.log(4 / 0.2)))
            weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
            if weight is not None:
                gamma = 0.3 + normal(weight)
                gamma[::7] *= 1e-3  # nearly pruned channels
                weight.copy_(gamma)
            if bias is not None:
                bias.copy_(normal(bias))
    return model


class AliasedNorms(nn.Module):
    """One norm under three names, one of them inside a Sequential; it runs twice, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 1)
        self.bn2 = self.bn1
        self.head = nn.Sequential(nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.extra = nn.ModuleDict({"norm": self.bn1})

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(self.bn2(self.conv2(x)))


class SharedBlock(nn.Module):
    """One whole block (conv and norm) under two names."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.stem = nn.Conv2d(3, 8, 1)
        self.left, self.right = block, block

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.relu(self.left(self.stem(x))))


class NormCalledTwice(nn.Module):
    """One norm, one name, two different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(torch.relu(self.bn(self.conv1(x)))))


class NamedParents(nn.Module):
    """Norms in a Sequential with words for names, in a ModuleDict and in a ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(3, 8, 3))
        self.stem.add_module("norm", nn.BatchNorm2d(8))
        self.by_name = nn.ModuleDict({"norm": nn.BatchNorm2d(8), "act": nn.SiLU()})
        self.listed = nn.ModuleList([nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)])
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(1))])

    def forward(self, x: Tensor) -> Tensor:
        x = self.by_name["act"](self.by_name["norm"](self.stem(x)))
        return self.listed[1](self.listed[0](x)) * self.scales[0]


class PreActivation(nn.Module):
    """Norm before convolution, as in ResNet v2 and DenseNet: no convolution to fold the norm into."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1, self.conv1 = nn.BatchNorm2d(16), nn.Conv2d(16, 16, 3, padding=1)
        self.bn2, self.conv2 = nn.BatchNorm2d(16, eps=1e-3), nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv2(torch.relu(self.bn2(self.conv1(torch.relu(self.bn1(x))))))
        return self.fc(x.mean((2, 3)))


def small_cnn(**norm_options: Any) -> nn.Sequential:
    """conv, norm, relu twice, then a classifier: `(N, 3, H, W)` to `(N, 5)`.

    Args:
        **norm_options: of `BatchNorm2d`, such as ``affine=False``, ``track_running_stats=False``, ``eps=1e-3``.
    """
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16, **norm_options),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24, **norm_options),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )


def frozen_affine() -> nn.Sequential:
    """`small_cnn` with gamma and beta that do not train."""
    model = small_cnn()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return model


def mlp() -> nn.Sequential:
    """BatchNorm1d on `(N, C)`."""
    return nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def net_1d() -> nn.Sequential:
    """BatchNorm1d on `(N, C, L)`."""
    return nn.Sequential(nn.Conv1d(3, 16, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 8, 1))


def net_3d() -> nn.Sequential:
    """BatchNorm3d on `(N, C, T, H, W)`."""
    return nn.Sequential(nn.Conv3d(3, 16, 3), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 8, 1))


def root_norm() -> nn.BatchNorm2d:
    """The model is itself a norm."""
    return nn.BatchNorm2d(12)


# name: (how to build it, the shape of one input without the batch). Each runs in eval mode.
ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "aliased": (AliasedNorms, (3, 8, 8)),
    "shared block": (SharedBlock, (3, 8, 8)),
    "called twice": (NormCalledTwice, (3, 8, 8)),
    "named parents": (NamedParents, (3, 8, 8)),
    "pre-activation": (PreActivation, (3, 8, 8)),
    "plain": (small_cnn, (3, 8, 8)),
    "frozen affine": (frozen_affine, (3, 8, 8)),
    "affine=False": (lambda: small_cnn(affine=False), (3, 8, 8)),
    "bias=False": (lambda: small_cnn(bias=False), (3, 8, 8)),
    "no running statistics": (lambda: small_cnn(track_running_stats=False), (3, 8, 8)),
    "eps 1e-3": (lambda: small_cnn(eps=1e-3), (3, 8, 8)),
    "1-D, no length": (mlp, (6,)),
    "1-D": (net_1d, (3, 9)),
    "3-D": (net_3d, (3, 4, 6, 6)),
    "root": (root_norm, (12, 5, 5)),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network of `ZOO` in eval mode with real-looking norms, and a batch of 4 inputs for it."""
    factory, shape = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = randomise_norms(factory(), seed).eval()
        return model, torch.randn(4, *shape)


def same_state(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state_dict, names and bits."""
    one, two = model.state_dict(), other.state_dict()
    return list(one) == list(two) and all(
        a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True)
    )
