"""Federated averaging with two clients whose pictures differ, from one pretrained network.

    python examples/federated.py [--smoke]

Why BatchNorm fails here: each client normalises by the statistics of its own pictures while it trains, but the server
averages the running statistics, and the average fits nobody (Li et al., FedBN, 2021). A GroupNorm has no statistics
to average. The honest rival is "frozen", BatchNorm as a constant: it averages well too, and here it is as good.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch import Tensor, nn

import gnswap

CLASSES = 4
# what the clients' cameras do to a picture: contrast and brightness. The pretraining saw neither of them.
CAMERAS = {"public": (1.0, 0.0), "client A": (0.1, 0.1), "client B": (2.0, -0.5)}


def pictures(camera: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Gratings in four directions, with noise: `[count, 3, 16, 16]` and the direction's number."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = labels * torch.pi / CLASSES
    row, column = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    along = row * torch.sin(angle).view(-1, 1, 1) + column * torch.cos(angle).view(-1, 1, 1)
    phase = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    grating = torch.sin(along + phase).unsqueeze(1).expand(-1, 3, -1, -1)
    contrast, brightness = CAMERAS[camera]
    return contrast * (grating + torch.randn(count, 3, 16, 16, generator=generator)) + brightness, labels


def network() -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, *, lr: float = 0.01, batch: int = 16) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for step in range(steps):
        chosen = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def averaged(models: list[nn.Module]) -> nn.Module:
    """FedAvg: the mean of everything in the state dict, running statistics among it (McMahan et al., 2017)."""
    states = [model.state_dict() for model in models]
    mean = {name: sum(state[name] for state in states) / len(states) for name in states[0]}
    result = copy.deepcopy(models[0])
    result.load_state_dict({name: value.to(states[0][name].dtype) for name, value in mean.items()})
    return result


def federate(model: nn.Module, rounds: int, steps: int, *, freeze: bool = False) -> nn.Module:
    for number in range(rounds):
        clients = []
        for index, camera in enumerate(("client A", "client B")):
            client = copy.deepcopy(model).train(not freeze)
            train(client, *pictures(camera, 256, seed=10 * number + index + 100), steps)
            clients.append(client)
        model = averaged(clients)
    return model


@torch.no_grad()
def accuracy(model: nn.Module, camera: str) -> float:
    x, y = pictures(camera, 512, seed=1)
    return float((model.eval()(x).argmax(1) == y).float().mean())


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="fewer rounds: some seconds")
    smoke = parser.parse_args(arguments).smoke
    torch.manual_seed(0)

    pretrained = network()
    train(pretrained, *pictures("public", 1024, seed=0), 100)
    pretrained.eval()
    rounds, steps = (3, 10) if smoke else (10, 20)
    results = {
        "pretrained, not trained further": pretrained,
        "BatchNorm, averaged": federate(pretrained, rounds, steps),
        "BatchNorm, frozen": federate(pretrained, rounds, steps, freeze=True),
        "gnswap": federate(gnswap.convert(pretrained, softness=0).model, rounds, steps),
    }
    table = {name: {camera: accuracy(model, camera) for camera in CAMERAS} for name, model in results.items()}
    print(f"{'accuracy after ' + str(rounds) + ' rounds':34}" + "".join(f"{camera:>10}" for camera in CAMERAS))
    for name, row in table.items():
        print(f"{name:34}" + "".join(f"{value:10.3f}" for value in row.values()))
    return table


if __name__ == "__main__":
    main()
