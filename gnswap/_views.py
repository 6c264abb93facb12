"""Random views of a batch: what makes a few hundred photos enough to distil from.

Why these: distillation needs no labels, so a view may be anything that the original can be asked about; it should only
look like a photo still. All of them work on tensors of any normalisation, since the network's own inputs are all that
is known: colour changes are relative to each sample's own mean and deviation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_AREA = 0.5  # of a crop
_STRETCH = 7 / 6  # of its width against its height
_CONTRAST, _BRIGHTNESS, _TINT = 0.2, 0.2, 0.1
_MIXED = 0.5  # share of the samples that are blended with another one


def views(x: Tensor, generator: torch.Generator) -> Tensor:
    """A random view of every sample.

    Pictures `[N, C, H, W]` are cropped, stretched and mirrored; whatever has positions gets another contrast and
    brightness; any two samples may be blended. What is no floating tensor is left as it is.

    Args:
        x: a batch `[N, ...]` on any device.
        generator: on the CPU; the views depend on nothing but its state and `x`.

    Returns:
        A batch of the same shape, dtype and device.

    Example:
        >>> views(torch.rand(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """
    if not x.is_floating_point() or x.ndim < 2:
        return x
    if x.ndim == 4:
        x = _cropped(x, generator)
    if x.ndim >= 3:
        x = _coloured(x, generator)
    return _blended(x, generator)


def _cropped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Part of each picture, `_LEAST_AREA` of it or more, at the size of the whole, every other one mirrored."""
    rows = len(x)
    side = _between(_LEAST_AREA, 1.0, rows, generator).sqrt()
    stretch = (_between(-1.0, 1.0, rows, generator) * math.log(_STRETCH)).exp()
    width, height = (side * stretch).clamp(max=1.0), (side / stretch).clamp(max=1.0)
    mirror = torch.where(torch.rand(rows, generator=generator) < 0.5, -1.0, 1.0)
    theta = torch.zeros(rows, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = width * mirror, height
    theta[:, 0, 2] = _between(-1.0, 1.0, rows, generator) * (1 - width)
    theta[:, 1, 2] = _between(-1.0, 1.0, rows, generator) * (1 - height)
    grid = F.affine_grid(theta.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def _coloured(x: Tensor, generator: torch.Generator) -> Tensor:
    """Contrast and brightness of each sample, and a little of them for each of its channels."""
    rows, channels = x.shape[:2]
    whole, own = (rows, *[1] * (x.ndim - 1)), (rows, channels, *[1] * (x.ndim - 2))
    every = tuple(range(1, x.ndim))
    mean, spread = x.mean(every, keepdim=True), x.std(every, correction=0, keepdim=True)
    contrast = 1 + _between(-_CONTRAST, _CONTRAST, whole, generator) + _between(-_TINT, _TINT, own, generator)
    brightness = _between(-_BRIGHTNESS, _BRIGHTNESS, whole, generator)
    return mean + (x - mean) * contrast.to(x) + spread * brightness.to(x)


def _blended(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some samples mixed with their neighbour in the batch (Zhang et al., *mixup*, 2018)."""
    own = _between(0.0, 1.0, len(x), generator)
    own = torch.where(torch.rand(len(x), generator=generator) < _MIXED, own, 1.0)
    return torch.lerp(x.roll(1, 0), x, own.to(x).view(-1, *[1] * (x.ndim - 1)))


def _between(low: float, high: float, shape: int | tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)
