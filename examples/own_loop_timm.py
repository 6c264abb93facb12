"""A converted network in timm's training: found by its name, driven by timm's own optimizer, schedule and loader.

    python examples/own_loop_timm.py --smoke

timm's wheel has no train.py; it is in timm's repository. Importing this file registers the converted networks, so the
script needs one line more (`import own_loop_timm`), and then, from a directory that `gnswap convert` wrote:

    python train.py photos/ --model converted --model-kwargs directory=resnet50-gn --num-classes 10 --batch-size 2

What train.py does with the network is done below in the same calls and the same order.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader
from timm.models import register_model
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

import gnswap


@register_model
def converted(pretrained: bool = False, **options: Any) -> nn.Module:
    """`timm.create_model("converted", directory=..., num_classes=...)`: what `gnswap convert` or `finetune` saved."""
    del pretrained  # the directory has the weights
    network = gnswap.load(options.pop("directory"))
    if (classes := options.pop("num_classes", None)) not in (None, network.num_classes):
        network.reset_classifier(classes)
    return network


def train(network: nn.Module, root: Path, epochs: int, batch_size: int, size: int) -> list[float]:
    """The parts of train.py that touch the network."""
    optimizer = create_optimizer_v2(network, opt="adamw", lr=2e-3, weight_decay=0.05, layer_decay=0.8)
    # fp16's gradient scaler where there is a GPU; elsewhere it only calls backward and step
    scaler = NativeScaler(device="cuda" if torch.cuda.is_available() else "cpu")
    average = ModelEmaV3(network, decay=0.9, use_warmup=True)
    dataset = create_dataset("", root=str(root), split="train", is_training=True, batch_size=batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = create_loader(
        dataset, (3, size, size), batch_size, is_training=True, num_workers=0, use_prefetcher=False, device=device
    )
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=epochs, updates_per_epoch=len(loader))
    loss_fn, losses = nn.CrossEntropyLoss(), []
    network.to(device).train()
    for epoch in range(epochs):
        total = 0.0
        for x, labels in loader:
            loss = loss_fn(network(x.to(device)), labels.to(device))
            optimizer.zero_grad()
            scaler(loss, optimizer, parameters=network.parameters())
            average.update(network)
            total += float(loss.detach())
        scheduler.step(epoch + 1)
        losses.append(total / len(loader))
        print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    spared = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    norms = [module for module in network.modules() if isinstance(module, gnswap.FusedGroupNorm)]
    affine = [parameter for norm in norms for parameter in norm.parameters()]
    print(f"{sum(id(p) in spared for p in affine)} of {len(affine)} gammas and betas without weight decay")
    return losses


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", help="what gnswap convert wrote")
    parser.add_argument("data", nargs="?", type=Path, help="pictures: train/CLASS/")
    parser.add_argument("--smoke", action="store_true", help="a tiny network on made-up pictures: seconds")
    options = parser.parse_args(arguments)
    if not options.smoke:
        if options.data is None:
            parser.error("give a directory and pictures, or --smoke")
        classes = sum(path.is_dir() for path in (options.data / "train").iterdir())
        network = timm.create_model("converted", directory=options.directory, num_classes=classes)
        return train(network, options.data, epochs=10, batch_size=2, size=network.pretrained_cfg["input_size"][-1])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(16):
            folder = Path(scratch, "photos", "train", ("dark", "bright")[number % 2])
            folder.mkdir(parents=True, exist_ok=True)
            shade = 60 + 120 * (number % 2) + number
            Image.new("RGB", (40, 40), (shade, shade, 90)).save(folder / f"{number}.png")
        gnswap.save(gnswap.convert(timm.create_model("test_resnet")), Path(scratch, "gn"))
        network = timm.create_model("converted", directory=str(Path(scratch, "gn")), num_classes=2)
        return train(network, Path(scratch, "photos"), epochs=6, batch_size=2, size=32)


if __name__ == "__main__":
    main()
