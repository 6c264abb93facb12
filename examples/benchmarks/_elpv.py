"""ELPV, photos of solar cells with and without a defect, as a small task to fine-tune on; and changed test photos.

Why these photos: 2624 real grey 300x300 pictures that come as a pip package, of a kind that no ImageNet network saw,
and few enough that fine-tuning, and not training from scratch, is what anybody would do. Labels: defect probability
above 0.5 (31 %). Source: Deitsch et al., *Automatic classification of defective photovoltaic module cells in
electroluminescence images*, Solar Energy 185 (2019). The data is CC-BY-NC-SA: used here, never copied.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

TEST, VALIDATION = 0.375, 0.125  # shares of the photos; the rest is to train on
# Every change is one that a camera or a lamp makes. Values outside of black and white are cut, as a camera does.
SHIFTS: dict[str, tuple[float, ...]] = {"contrast": (0.5, 2.0), "brightness": (-0.2, 0.2), "exposure": (-1.0, 1.0)}
NEUTRAL = {"contrast": 1.0, "brightness": 0.0, "exposure": 0.0}


@dataclasses.dataclass(frozen=True)
class Cells:
    """Photos as uint8 `[N, H, W]` with labels int64 `[N]`: 1 is a defect."""

    photos: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Cells:
        return Cells(self.photos[index], self.labels[index])


def load(pixels: int, cache: Path) -> Cells:
    """All photos, resized to `pixels` once and then read from the cache."""
    file = cache / f"elpv-{pixels}.npz"
    if not file.exists():
        from elpv_dataset.utils import load_dataset

        photos, probability, _ = load_dataset()
        size = (pixels, pixels)
        small = [Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC) for photo in track(photos, "resizing")]
        cache.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".tmp.npz")
        np.savez(fresh, photos=np.stack(small), labels=(probability > 0.5).astype(np.int64))
        fresh.replace(file)
    with np.load(file) as stored:
        return Cells(torch.from_numpy(stored["photos"]), torch.from_numpy(stored["labels"]))


def split(cells: Cells) -> tuple[Cells, Cells, Cells]:
    """Photos to train on, to choose the learning rate on, and to test on: the same in every run.

    Each class is shared out alike, and every part is shuffled, so that its first photos are a fair sample of it.
    """
    generator = torch.Generator().manual_seed(0)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in (0, 1):
        of_class = (cells.labels == label).nonzero().flatten()
        of_class = of_class[torch.randperm(len(of_class), generator=generator)]
        test, validation = round(TEST * len(of_class)), round(VALIDATION * len(of_class))
        sizes = [len(of_class) - test - validation, validation, test]
        for part, indices in zip(parts, of_class.split(sizes), strict=True):
            part.append(indices)
    joined = [torch.cat(part) for part in parts]
    train, validation_, test_ = (cells[part[torch.randperm(len(part), generator=generator)]] for part in joined)
    return train, validation_, test_


def as_input(photos: Tensor) -> Tensor:
    """Float `[N, 3, H, W]` in -1 to 1, channels last: what EfficientNet-Lite was trained on (mean = std = 0.5)."""
    x = photos.float().div(127.5).sub(1.0)
    return x.unsqueeze(1).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)


def stream(cells: Cells, samples: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`samples` photos one after the other, uint8 `[H, W]` with the label: epoch by epoch, turned and mirrored.

    The order and the turns depend on the seed alone: every method and batch size sees the same photos.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(cells), generator=generator) for _ in range(-(-samples // len(cells)))])
    turns = torch.randint(8, (samples,), generator=generator)
    for index, turn in zip(order[:samples].tolist(), turns.tolist(), strict=True):
        photo = torch.rot90(cells.photos[index], turn % 4)
        yield (photo.flip(0) if turn >= 4 else photo), cells.labels[index]


def batches(cells: Cells, samples: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The `stream` in batches, as a network's input `[n, 3, H, W]` and labels `[n]`; the last may be smaller."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for number, sample in enumerate(stream(cells, samples, seed), start=1):
        waiting.append(sample)
        if len(waiting) == batch or number == samples:
            photos, labels = zip(*waiting, strict=True)
            yield as_input(torch.stack(photos)), torch.stack(labels)
            waiting = []


def shifted(photos: Tensor, shift: str, strength: float) -> Tensor:
    """The photos, uint8 `[N, H, W]`, under another light.

    Args:
        photos: uint8 `[N, H, W]`.
        shift: "contrast" multiplies the distance from each photo's own mean; "brightness" adds (1 is black to white);
            "exposure" multiplies by 2 to the power of `strength`: stops of a camera.
        strength: `NEUTRAL[shift]` changes nothing.
    """
    x = photos.float()
    if shift == "contrast":
        mean = x.mean(dim=(1, 2), keepdim=True)
        x = mean + strength * (x - mean)
    elif shift == "brightness":
        x = x + 255 * strength
    elif shift == "exposure":
        x = x * 2.0**strength
    else:
        raise ValueError(f"no such change of a photo: {shift!r}, there are {', '.join(SHIFTS)}")
    return x.round().clamp(0, 255).to(torch.uint8)
