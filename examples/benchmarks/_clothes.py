"""A harder network than EfficientNet-Lite, trained here: a MobileNet with linear bottlenecks and dead channels.

Why: what is good on the networks at hand alone is not good. MobileNets differ from EfficientNet-Lite in what the
conversion finds hard, and the pretrained ones of that kind come from model hubs only. So one is trained, in four to six
minutes on two cores: timm's MobileNetV2, once through the 60,000 photos of clothes of the Debian package
dataset-fashion-mnist (MIT, Xiao et al., *Fashion-MNIST*, 2017), with gammas that start between 0 and 1 and an L1
penalty on them, which is how channels die (Liu et al., *Learning Efficient Convolutional Networks through Network
Slimming*, 2017): in most layers a fifth to a third of them, gamma below 0.01. It is right about .88 of photos that it
was not trained on. The weights are kept in the cache; other machines round differently, and get a somewhat different
network.
"""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from photos import unpacked
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NAME = "mobilenetv2_100"
PACKAGE = "dataset-fashion-mnist"
PIXELS = 64  # the photos have 28; at fewer pixels the last maps would have a single position
BATCH, RATE = 64, 0.1
L1 = 7e-4  # of each gamma: a third off over all steps where nothing holds it


def network(cache: Path) -> nn.Module:
    """The trained network in eval mode, from the cache where it is there."""
    model: nn.Module = timm.create_model(NAME, in_chans=1, num_classes=10)
    file = cache / f"{NAME}-clothes.safetensors"
    if not file.exists():
        _train(model, *_load("train", cache))
        save_file(model.state_dict(), file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def inputs(cache: Path) -> Tensor:
    """The 10,000 photos that the network was not trained on, float `[N, 1, 28, 28]`, for `enlarged`."""
    return _load("t10k", cache)[0]


def enlarged(photos: Tensor) -> Tensor:
    """Photos at the size of the network's input, `[N, 1, 64, 64]`."""
    return F.interpolate(photos, size=(PIXELS, PIXELS), mode="bilinear", align_corners=False)


def _train(model: nn.Module, photos: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    for module in model.modules():  # timm drew the weights before the seed was set
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.train().to(memory_format=torch.channels_last)
    gammas = [module.weight for module in model.modules() if isinstance(module, _BatchNorm)]
    for gamma in gammas:
        nn.init.uniform_(gamma, generator=generator)
    steps = torch.randperm(len(photos), generator=generator).split(BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=len(steps))
    for indices in track(steps, f"training {NAME}"):
        x = enlarged(photos[indices])
        mirrored = torch.rand(len(x), generator=generator) < 0.5
        x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(3), x).contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(x), labels[indices])
        optimizer.zero_grad()
        (loss + L1 * torch.stack([gamma.abs().sum() for gamma in gammas]).sum()).backward()
        optimizer.step()
        schedule.step()
    model.to(memory_format=torch.contiguous_format)


def _load(part: str, cache: Path) -> tuple[Tensor, Tensor]:
    """Photos in -1 to 1, `[N, 1, 28, 28]`, and their classes."""
    folder = cache / PACKAGE
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            (unpacked(PACKAGE, Path(scratch)) / "usr/share/datasets/fashion-mnist").rename(folder)
    # http://yann.lecun.com/exdb/mnist: a head of 4 numbers of 32 bits before the photos, of 2 before the labels
    photos, labels = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{what}-ubyte.gz").read_bytes()), np.uint8, offset=head)
        for what, head in (("images-idx3", 16), ("labels-idx1", 8))
    )
    pixels = torch.tensor(photos).view(-1, 1, 28, 28)
    return pixels.float().div(127.5).sub(1.0), torch.tensor(labels).long()
