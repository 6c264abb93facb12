"""A converted network in a training loop of one's own, plain torch: batch size 1, several samples to a step.

    python examples/own_loop_torch.py photos/ --model resnet50 --pretrained    # a subfolder for each class
    python examples/own_loop_torch.py --smoke

Four things are worth knowing, and all four are marked in the code:
1. `convert(..., inplace=True)` keeps the `Parameter` objects, so an optimizer that is there already stays valid.
2. gamma and beta have one dimension, as before: rules for weight decay that go by dimension or by name go on working.
   Rules that go by class find `torch.nn.BatchNorm2d` no longer; ask for `gnswap.FusedGroupNorm` as well.
3. `SoftnessSchedule` takes the network to pure GroupNorm while it trains, if that is wanted.
4. `train()` equals `eval()`: no norm has to be frozen, and no batch is too small.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gnswap


def stripes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A task for the smoke test: are the stripes across or down? Inputs `[N, 3, size, size]`, labels `[N]`."""
    labels = torch.arange(count) % 2
    across = (torch.arange(size) // 2 % 2).float()[None, :, None].expand(count, size, size)
    picture = torch.where(labels[:, None, None] == 0, across, across.transpose(1, 2))
    return picture[:, None] + torch.randn(count, 3, size, size, generator=generator), labels


def folder(root: Path, network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Single pictures and their labels, prepared as the network expects them."""
    from timm.data import ImageDataset, create_transform, resolve_data_config

    transform = create_transform(**resolve_data_config(model=network), is_training=True)
    data = ImageDataset(str(root), transform=transform)
    return [(x[None], torch.tensor([label])) for x, label in data]


def groups(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay on everything but norms and biases, found by class (2)."""
    norms = (gnswap.FusedGroupNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.batchnorm._BatchNorm)
    spared = {p for module in network.modules() if isinstance(module, norms) for p in module.parameters()}
    spared |= {p for name, p in network.named_parameters() if name.endswith(".bias")}
    decayed = [p for p in network.parameters() if p not in spared]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": list(spared), "weight_decay": 0.0}]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, help="pictures, in a subfolder for each class")
    parser.add_argument("--model", default="resnet50", help="a name that timm knows (resnet50)")
    parser.add_argument("--pretrained", action="store_true", help="fetch timm's weights")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--accumulate", type=int, default=4, help="samples in an optimizer step (4)")
    parser.add_argument("--smoke", action="store_true", help="a tiny network on made-up pictures: seconds")
    options = parser.parse_args(arguments)
    if not options.smoke and options.data is None:
        parser.error("give a folder of pictures, or --smoke")

    torch.manual_seed(0)
    name = "test_resnet" if options.smoke else options.model
    classes = 2 if options.smoke else sum(path.is_dir() for path in options.data.iterdir())
    network = timm.create_model(name, pretrained=options.pretrained, num_classes=classes)
    optimizer = torch.optim.AdamW(groups(network, 0.05), lr=1e-3)  # before the conversion, to show that it survives

    network = gnswap.apply(network, gnswap.plan(network), inplace=True)  # (1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in network.parameters()}, "the optimizer holds the network's very parameters"

    if options.smoke:
        x, labels = stripes(48, 32, torch.Generator().manual_seed(0))
        samples = list(zip(x.split(1), labels.split(1), strict=True))
    else:
        samples = folder(options.data, network)
    steps = options.epochs * len(samples) // options.accumulate
    softness = gnswap.SoftnessSchedule(network, end=0.0, steps=max(steps // 2, 1))  # (3)
    losses = []
    network.train()  # (4)
    for _ in range(options.epochs):
        total = 0.0
        for number, place in enumerate(torch.randperm(len(samples)).tolist(), 1):
            sample, label = samples[place]
            loss = F.cross_entropy(network(sample), label)
            (loss / options.accumulate).backward()
            total += float(loss.detach())
            if number % options.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
                softness.step()
        losses.append(total / len(samples))
        print(f"loss {losses[-1]:.3f}")
    pure = max(layer.softness for layer in network.modules() if isinstance(layer, gnswap.FusedGroupNorm))
    return {"first": losses[0], "last": losses[-1], "softness": pure}


if __name__ == "__main__":
    main()
