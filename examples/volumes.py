"""A 3-D network that trains on one volume at a time, as medical volumes force one to.

    python examples/volumes.py [--smoke]

torchvision's r3d_18 takes volumes of any size and has 20 BatchNorm3d; it stands for the 3-D networks of this field,
which convert in the same way. At batch 1 a BatchNorm sees one volume's statistics in training and the running ones in
evaluation: two different networks. After the conversion there is one.
"""

from __future__ import annotations

import argparse
import copy
import warnings

import torch
from torch import Tensor, nn
from torchvision.models.video import r3d_18

import gnswap


def scan(label: int, side: int, seed: int) -> Tensor:
    """Noise with a bright ball (label 1) or without (label 0), each at its own contrast: `[1, 3, side, side, side]`."""
    generator = torch.Generator().manual_seed(seed)
    volume = torch.randn(1, 3, side, side, side, generator=generator)
    position = torch.linspace(-1, 1, side)
    ball = (position.view(-1, 1, 1) ** 2 + position.view(-1, 1) ** 2 + position**2) < 0.3
    return (volume + 2.0 * label * ball) * (0.5 + torch.rand((), generator=generator))


def train(model: nn.Module, volumes: int, side: int) -> nn.Module:
    """One epoch at batch 1."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-3, momentum=0.9)
    for number in range(volumes):
        optimizer.zero_grad()
        label = number % 2
        nn.functional.cross_entropy(model(scan(label, side, number)), torch.tensor([label])).backward()
        optimizer.step()
    return model


@torch.no_grad()
def two_modes(model: nn.Module, side: int) -> float:
    """How far the answer in train mode is from the answer in eval mode, relative to its size."""
    x = scan(1, side, seed=10_000)
    evaluated = model.eval()(x)
    trained = copy.deepcopy(model).train()(x)  # a copy: a BatchNorm's statistics would change
    return float((trained - evaluated).norm() / evaluated.norm())


@torch.no_grad()
def accuracy(model: nn.Module, volumes: int, side: int) -> float:
    model.eval()
    right = [model(scan(n % 2, side, seed=20_000 + n)).argmax(1).item() == n % 2 for n in range(volumes)]
    return sum(right) / volumes


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="4 volumes of 16 voxels a side: some seconds")
    smoke = parser.parse_args(arguments).smoke
    torch.manual_seed(0)
    side, volumes = (16, 4) if smoke else (32, 64)

    # stands for pretraining: enough volumes through the network for its running statistics to mean something
    original = r3d_18(num_classes=2).train()
    with torch.no_grad():
        for number in range(4):
            original(torch.cat([scan(label, side, 30_000 + 2 * number + label) for label in (0, 1)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = gnswap.convert(original.eval()).model
    networks = {"BatchNorm": original, "gnswap": converted}
    table = {}
    print(f"{'trained at batch 1':20}{'train vs eval':>15}{'accuracy':>10}")
    for name, model in networks.items():
        train(model, volumes, side)
        table[name] = {"modes": two_modes(model, side), "accuracy": accuracy(model, volumes, side)}
        print(f"{name:20}{table[name]['modes']:15.3f}{table[name]['accuracy']:10.3f}")
    return table


if __name__ == "__main__":
    main()
