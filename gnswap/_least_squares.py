"""Ridge regression of a convolution's or a linear layer's weight, from sums over photos and positions.

Axes here: B blocks (the groups of a grouped convolution; 1 of a plain one), K inputs of an output (channels of a block
times kernel positions, and a constant where the layer has a bias), O outputs of a block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STRENGTHS = (0.003, 0.03, 0.3, 3.0)
_MOST_POSITIONS = 784  # of a photo; neighbours say much the same
_ROWS = 16  # photos at a time

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d  # and timm's Conv2dSame, which is a Conv2d
Layer = Conv | nn.Linear


def can_fit(module: nn.Module) -> TypeGuard[Layer]:
    """Whether this is a layer as torch defines it, linear in its weight, and no subclass that does something else."""
    is_known = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) or _is_same_padded(module)
    return is_known and not hasattr(module, "parametrizations")


@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums from which any ridge regression of one layer follows.

    Attributes:
        inputs: X'X, `[B, K, K]`.
        residual: X'R, `[B, K, O]`, R being what the layer's output lacks.
        error: the sum of R², `[B, O]`.
        energy: the sum of the wanted output's squared deviation from its mean over samples and positions, `[B, O]`.
    """

    inputs: Tensor
    residual: Tensor
    error: Tensor
    energy: Tensor

    @classmethod
    def of(cls, layer: Layer, x: Tensor, y: Tensor) -> Sums:
        """Out of a layer's input `[N, ...]` and the output that it should have."""
        weight = _matrix(layer)
        inputs = weight.new_zeros(len(weight), weight.shape[1], weight.shape[1])
        residual, error = torch.zeros_like(weight), weight.new_zeros(len(weight), weight.shape[2])
        first, second = weight.new_zeros(error.shape), weight.new_zeros(error.shape)
        count = 0
        for start in range(0, len(x), _ROWS):
            design, wanted = _tables(layer, x[start : start + _ROWS], y[start : start + _ROWS])
            lacking = wanted - design @ weight
            inputs += design.mT @ design
            residual += design.mT @ lacking
            error += lacking.square().sum(1)
            first, second, count = first + wanted.sum(1), second + wanted.square().sum(1), count + wanted.shape[1]
        return cls(inputs, residual, error, (second - first.square() / max(count, 1)).clamp_min(0))

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.inputs + other.inputs,
            self.residual + other.residual,
            self.error + other.error,
            self.energy + other.energy,
        )

    def change(self, strength: float) -> Tensor | None:
        """What to add to the weight, `[B, K, O]`; None where that has no answer."""
        size = self.inputs.diagonal(dim1=1, dim2=2)
        scale = size.clamp_min(1e-12 * float(size.max()) + 1e-30).rsqrt()  # all inputs alike, dead ones stay 0
        scaled = self.inputs * scale[:, :, None] * scale[:, None, :]
        scaled.diagonal(dim1=1, dim2=2).add_(strength)
        factor, failed = torch.linalg.cholesky_ex(scaled)
        if failed.any():
            return None
        return scale[:, :, None] * torch.cholesky_solve(scale[:, :, None] * self.residual, factor)

    def gain(self, change: Tensor) -> Tensor:
        """How much smaller the sum of R² is after a change, `[B, O]`."""
        return (change * (2 * self.residual - self.inputs @ change)).sum(1)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The best of the fits.

    Attributes:
        error: the squared error before, relative to the wanted output's variance.
        gain: share of the error, in the mean over the outputs, that a fit on one half takes away on the other.
        strength: of the ridge.
        change: what to add to the weight, fitted on both halves.
    """

    error: float
    gain: float
    strength: float
    change: Tensor


def best_fit(one: Sums, two: Sums) -> Fit:
    """Choose the strength across two halves of the samples, and fit on both."""
    whole = one + two
    error = whole.error.clamp_min(1e-30)
    heard = whole.error > 1e-9 * whole.energy  # below that it is rounding
    best, chosen = 0.0, _STRENGTHS[-1]
    for strength in _STRENGTHS:
        fits = [half.change(strength) for half in (one, two)]
        gains = [other.gain(fit) for fit, other in zip(fits, (two, one), strict=True) if fit is not None]
        if len(gains) == 2 and heard.any():
            gain = float(((gains[0] + gains[1]) / error)[heard].mean())
            if gain > best:
                best, chosen = gain, strength
    change = whole.change(chosen)
    if change is None or not change.isfinite().all():
        best, change = 0.0, torch.zeros_like(whole.residual)
    return Fit(float(whole.error.sum()) / max(float(whole.energy.sum()), 1e-30), best, chosen, change)


def add(layer: Layer, change: Tensor) -> None:
    """Add a change `[B, K, O]` to a layer's weight and bias, in place."""
    changed = change.mT  # [B, O, K]
    if layer.bias is not None:
        layer.bias += changed[:, :, -1].reshape(layer.bias.shape)
        changed = changed[:, :, :-1]
    layer.weight += changed.reshape(layer.weight.shape)


def _matrix(layer: Layer) -> Tensor:
    """Weight and bias as `[B, K, O]`."""
    blocks = 1 if isinstance(layer, nn.Linear) else layer.groups
    weight = layer.weight.detach()
    matrix = weight.reshape(blocks, weight.shape[0] // blocks, -1)
    if layer.bias is not None:
        matrix = torch.cat([matrix, layer.bias.detach().view(blocks, -1, 1)], 2)
    return matrix.mT


def _tables(layer: Layer, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs `[B, rows, K]` and wanted outputs `[B, rows, O]` of a layer, a row for each sample and position."""
    if isinstance(layer, nn.Linear):
        design, wanted = x.reshape(1, -1, x.shape[-1]), y.reshape(1, -1, y.shape[-1])
    else:
        design, wanted = _positions(layer, x, y)
    if layer.bias is not None:
        design = torch.cat([design, torch.ones_like(design[:, :, :1])], 2)
    return design, wanted


def _positions(layer: Conv, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a convolution; of every few positions where there are many."""
    sizes = y.shape[2:]
    every = 1
    while math.prod(-(-size // every) for size in sizes) > _MOST_POSITIONS:
        every += 1
    if _is_same_padded(layer):
        from timm.layers.padding import pad_same

        x = pad_same(x, list(layer.kernel_size), list(layer.stride), list(layer.dilation))
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    taps = []
    for offsets in itertools.product(*map(range, layer.kernel_size)):
        window = [slice(None), slice(None)]
        for offset, size, stride, dilation in zip(offsets, sizes, layer.stride, layer.dilation, strict=True):
            start = offset * dilation
            window.append(slice(start, start + (size - 1) * stride + 1, stride * every))
        taps.append(x[tuple(window)].flatten(2))
    design = torch.stack(taps, 3)  # [N, C, S, taps]
    wanted = y[(slice(None), slice(None), *(slice(None, None, every) for _ in sizes))].flatten(2)
    rows, blocks = len(x), layer.groups
    design = design.view(rows, blocks, -1, *design.shape[2:]).permute(1, 0, 3, 2, 4).flatten(3).flatten(1, 2)
    return design, wanted.view(rows, blocks, -1, wanted.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def _is_same_padded(module: nn.Module) -> bool:
    from timm.layers.conv2d_same import Conv2dSame

    return type(module) is Conv2dSame
