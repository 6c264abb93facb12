"""Networks that break tools for swapping norms, the whole way. Others of this kind are in `ZOO` of `_models.py`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _whole_way import leaves, settle, whole_way
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, skip_init

import gnswap
from gnswap import FusedGroupNorm


class AfterActivation(nn.Module):
    """conv, relu, norm: the norm gets values of one sign, with means far from zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(F.relu(self.conv1(x)))
        return self.norm2(F.relu(self.conv2(x)))


class Dense(nn.Module):
    """As in DenseNet: every norm reads the concatenation of all that came before, in sizes of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16 + 8 * index) for index in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * index, 8, 3, padding=1) for index in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            x = torch.cat([x, conv(F.relu(norm(x))) * 10**index], 1)
        return x


class InPlaceSkips(nn.Module):
    """Activations and sums that overwrite what a norm gave, and a skip tensor that two branches read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv3, self.fused = nn.Conv2d(16, 16, 3, padding=1), BatchNormAct2d(16, act_layer=nn.SiLU)
        self.norm4 = BatchNormAct2d(16, apply_act=False)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.norm1(self.stem(x)), inplace=True)
        y = self.norm2(self.conv2(skip))
        y += skip
        y = F.relu(y, inplace=True)
        z = self.fused(self.conv3(y))
        z += y
        z = z + self.norm4(z).mul_(0.5)
        z += y
        return z


class Audio(nn.Module):
    """Raw audio: wide strided convs, BatchNorm1d on `(N, C, L)`, on `(N, C, 1)` and on `(N, C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(1, 32, 20, stride=4), nn.BatchNorm1d(32)
        self.conv2, self.norm2 = nn.Conv1d(32, 64, 3, stride=2), nn.BatchNorm1d(64)
        self.conv3, self.norm3 = nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64)
        self.fc, self.norm4, self.head = nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        x = F.relu(self.norm3(self.conv3(x.mean(2, keepdim=True))))
        return self.head(F.relu(self.norm4(self.fc(x.flatten(1)))))


class Tokens(nn.Module):
    """BatchNorm1d over all tokens of all samples at once, `(N * L, C)`, as in LeViT."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm1 = nn.Linear(8, 32), nn.BatchNorm1d(32)
        self.fc2, self.norm2 = nn.Linear(32, 32), nn.BatchNorm1d(32)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.fc1(x).flatten(0, 1)).view(*x.shape[:2], -1))
        return self.norm2(self.fc2(x).flatten(0, 1)).view_as(x)


class StandardisedConv(nn.Conv2d):
    """Standardises its weights with a functional batch_norm, as timm's ScaledStdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None, training=True)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, padding=self.padding)


class Functional(nn.Module):
    """A BatchNorm by function behind one that is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.register_buffer("mean", torch.randn(32))
        self.register_buffer("var", torch.rand(32) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.norm(self.conv(x)), self.mean, self.var)


class Towers(nn.Module):
    """Two towers of one set of weights: convs shared whole, norms with gamma and beta in common, statistics not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.BatchNorm2d(32)
        self.right.weight, self.right.bias = self.left.weight, self.left.bias

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(self.conv(x)), self.right(self.conv(3 * x + 1))], 1)


def parametrised() -> nn.Module:
    """Parametrised convs around norms that are not."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 32, 3)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(32, 16, 1)),
        nn.BatchNorm2d(16),
    )


def skipped() -> nn.Module:
    """Built without initialisation, then filled by a checkpoint, as large models are."""
    checkpoint = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)).state_dict()
    model = nn.Sequential(skip_init(nn.Conv2d, 3, 32, 3), skip_init(nn.BatchNorm2d, 32))
    model.load_state_dict(checkpoint)
    return model


IMAGE = (3, 12, 12)
# name: (how to build it, the shape of one input, how many norms it has)
TRAPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "after the activation": (AfterActivation, IMAGE, 2),
    "dense": (Dense, IMAGE, 3),
    "in place": (InPlaceSkips, IMAGE, 4),
    "audio": (Audio, (1, 400), 4),
    "tokens": (Tokens, (10, 8), 2),
    "standardised weights": (lambda: nn.Sequential(StandardisedConv(3, 32, 3), nn.BatchNorm2d(32)), IMAGE, 1),
    "functional": (Functional, IMAGE, 1),
    "towers": (Towers, IMAGE, 2),
    "parametrised convs": (parametrised, IMAGE, 2),
    "skip_init": (skipped, IMAGE, 1),
    "bf16": (lambda: nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU()).bfloat16(), IMAGE, 1),
}


def trap(name: str) -> tuple[nn.Module, Tensor]:
    """A network of `TRAPS` in eval mode with norms as a trained one has them, and inputs for it."""
    build, shape, _ = TRAPS[name]
    model = build().eval()
    x = torch.randn(4, *shape, dtype=next(model.parameters()).dtype)
    return settle(model, lambda network: network(x)), x


@pytest.mark.parametrize("name", TRAPS)
def test_the_whole_way(name: str) -> None:
    model, x = trap(name)
    way = whole_way(model, lambda network: network(x))
    assert (way.conversion.report.swapped, way.conversion.report.kept) == (TRAPS[name][2], 0)
    assert way.error < way.naive_error
    assert way.layer_error < way.naive_layer_error
    assert way.reverted
    assert way.loaded


@pytest.mark.parametrize("name", TRAPS)
def test_it_trains_on_a_single_sample(name: str) -> None:
    """Every parameter that had a gradient has one, through everything that is overwritten on the way."""
    model, x = trap(name)
    converted = gnswap.convert(model).model.train()
    for network in (model, converted):
        sum(leaf.float().square().sum() for leaf in leaves(network(x[:1]))).backward()
    reached = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    for path, parameter in converted.named_parameters():
        assert (parameter.grad is not None) == (path in reached), path
        assert parameter.grad is None or parameter.grad.isfinite().all(), path


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("functional", "unreachable: (root): Functional calls batch_norm as a function"),
        ("standardised weights", "0: StandardisedConv standardises its weights with batch_norm"),
    ],
)
def test_what_is_functional_is_said(name: str, words: str) -> None:
    notes = gnswap.convert(trap(name)[0]).report.notes
    assert any(note.startswith(words) for note in notes), notes


def test_towers_keep_their_weights_in_common(tmp_path: Path) -> None:
    """And statistics of their own: after a copy, after saving and loading, and on the way back."""
    model, x = trap("towers")
    conversion = gnswap.convert(model)
    gnswap.save(conversion, tmp_path / "towers")
    for network in (conversion.model, copy.deepcopy(conversion.model), gnswap.load(tmp_path / "towers", model)):
        assert isinstance(network.left, FusedGroupNorm)
        assert network.left.weight is network.right.weight
        assert network.left.bias is network.right.bias
        assert not torch.equal(network.left.channel_scale, network.right.channel_scale)
        back = gnswap.revert(network)
        assert back.left.weight is back.right.weight
        assert torch.equal(back(x), model(x))


def test_uninitialised_statistics_are_refused_where_it_shows() -> None:
    """skip_init without a checkpoint leaves whatever was in memory; with luck it is NaN."""
    norm = skip_init(nn.BatchNorm2d, 8)
    norm.running_var.fill_(torch.nan)
    with pytest.raises(gnswap.NothingToSwapError, match="running_var is NaN or infinite in 8 of 8 channels"):
        gnswap.convert(norm)
