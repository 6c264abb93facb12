"""The photos on which two networks differ most: their answers, and a picture small enough to go into the page."""

from __future__ import annotations

import base64
import dataclasses
import heapq
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._report.records import Answer, PhotoReport, PhotoTable

MOST = 12
"""Photos that are shown."""

_TOP = 3  # classes of each answer
_SIDE = 176  # pixels of a thumbnail's longer side


class Worst:
    """Takes every photo with both networks' outputs; keeps a few figures of each and the worst few whole.

    Args:
        model: the original, whose `pretrained_cfg` may say how its photos were prepared and what its classes are.
        class_names: what the classes are called.
        photo_names: what the photos are called, in their order.
    """

    def __init__(self, model: nn.Module, class_names: Sequence[str] | None, photo_names: Sequence[str] | None) -> None:
        config = getattr(model, "pretrained_cfg", None)
        self.config: Mapping[str, Any] = config if isinstance(config, Mapping) else {}
        self.class_names = class_names if class_names is not None else _names_of_timm(model, self.config)
        self.photo_names = photo_names
        self.photos = 0
        self.figures: dict[str, list[Any]] = {"distance": []}
        self._heap: list[tuple[float, int, PhotoReport, Tensor]] = []  # the least bad first

    def add(self, x: Tensor, expected: list[Tensor], found: list[Tensor], *, classes: bool) -> None:
        """Photos `[N, ...]` with the floating outputs of the original and of the converted network."""
        start, self.photos = self.photos, self.photos + len(x)
        theirs, ours = ([item.detach().cpu().double() for item in items] for items in (expected, found))
        if classes:
            reports = self._classified(start, theirs[0], ours[0])
        elif all(len(item) == len(x) for item in theirs):
            reports = [
                PhotoReport(start + row, value, name=self._name(start + row))
                for row, value in enumerate(_relative(theirs, ours))
            ]
        else:
            return  # outputs that belong to no single photo, such as a detector's list of boxes
        self.figures["distance"] += [report.distance for report in reports]
        for row, report in enumerate(reports):
            entry = (report.distance, -report.index, report, x[row].detach().cpu().clone())
            if len(self._heap) < MOST:
                heapq.heappush(self._heap, entry)
            elif entry[:2] > self._heap[0][:2]:
                heapq.heapreplace(self._heap, entry)

    def table(self) -> PhotoTable:
        """The figures of all photos."""
        return PhotoTable(**{name: tuple(values) for name, values in self.figures.items()})

    def worst(self) -> tuple[PhotoReport, ...]:
        """The worst few, worst first, with thumbnails where they are pictures."""
        ranked = sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
        return tuple(dataclasses.replace(report, thumbnail=thumbnail(x, self.config)) for _, _, report, x in ranked)

    def _classified(self, start: int, theirs: Tensor, ours: Tensor) -> list[PhotoReport]:
        finite = ours.isfinite().all(1)
        logp, logq = theirs.log_softmax(1), ours.log_softmax(1)
        # 0 · log 0 is 0 where a probability underflows
        kl = torch.where(logp > -math.inf, logp.exp() * (logp - logq), 0.0).sum(1)
        distances: list[float] = torch.where(finite, kl.clamp_min(0), math.inf).tolist()
        top = theirs.argmax(1, keepdim=True)
        answers = [self._top(table.exp()) for table in (logp, logq)]
        columns = {
            "probability_original": logp.exp().gather(1, top)[:, 0],
            "probability_converted": torch.where(finite, logq.exp().gather(1, top)[:, 0], 0.0),
            "same": (top[:, 0] == ours.argmax(1)) & finite,
        }
        for name, column in columns.items():
            self.figures.setdefault(name, []).extend(column.tolist())
        return [
            PhotoReport(
                start + row,
                distances[row],
                answers[0][row],
                answers[1][row] if finite[row] else (),
                self._name(start + row),
            )
            for row in range(len(theirs))
        ]

    def _top(self, probabilities: Tensor) -> list[tuple[Answer, ...]]:
        found = probabilities.topk(min(_TOP, probabilities.shape[1]), 1)
        return [
            tuple(Answer(index, probability, self._class(index)) for index, probability in zip(*row, strict=True))
            for row in zip(found.indices.tolist(), found.values.tolist(), strict=True)
        ]

    def _class(self, index: int) -> str | None:
        return self.class_names[index] if self.class_names is not None and index < len(self.class_names) else None

    def _name(self, index: int) -> str | None:
        return self.photo_names[index] if self.photo_names is not None and index < len(self.photo_names) else None


def thumbnail(x: Tensor, config: Mapping[str, Any]) -> str | None:
    """A prepared photo `[C, H, W]` as a data URI of a small JPEG; None where it is no picture of 1 or 3 channels.

    Without mean and std in `config` the values are stretched between their least and their greatest.
    """
    if x.ndim != 3 or len(x) not in (1, 3) or not x.is_floating_point():
        return None
    from PIL import Image  # late: nobody else in `import gnswap` needs it

    x = x.float()
    mean, std = (torch.tensor(config.get(key) or (), dtype=torch.float32) for key in ("mean", "std"))
    if len(mean) == len(std) == len(x):
        x = x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
    else:
        x = (x - x.amin()) / (x.amax() - x.amin()).clamp_min(1e-12)
    pixels = (x.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if len(x) == 1 else pixels)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _relative(theirs: list[Tensor], ours: list[Tensor]) -> list[float]:
    """The relative error of every photo's outputs, infinite where one is not finite."""
    pairs = list(zip(theirs, ours, strict=True))
    difference = sum((one - other).flatten(1).square().sum(1) for one, other in pairs)
    size = sum(one.flatten(1).square().sum(1) for one, _ in pairs)
    error = (torch.as_tensor(difference) / torch.as_tensor(size).clamp_min(1e-30)).sqrt()
    values: list[float] = torch.where(error.isfinite(), error, math.inf).tolist()
    return values


def _names_of_timm(model: nn.Module, config: Mapping[str, Any]) -> Sequence[str] | None:
    """The class names of a timm network that has the classes of its pretrained weights."""
    if config.get("label_names"):
        return [str(name) for name in config["label_names"]]
    if not config or config.get("num_classes") != getattr(model, "num_classes", None):
        return None
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return None
    info: Any = ImageNetInfo(subset)  # without type information
    return [str(info.index_to_description(index)) for index in range(info.num_classes())]
