"""Inputs on which a normalisation that is written carelessly fails, beside inputs of other sizes.

Why these: a constant image has variance 0, so only eps is left; a mean of 30 standard deviations costs E[x²]-E[x]²
all digits but four; a tiny variance shows an eps in the wrong place; a huge contrast overflows half precision.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Case = tuple[Tensor, ...]
Axes = list[dict[str, int]]


def special_cases(case: Case, axes: Axes) -> Iterator[tuple[str, Case]]:
    """Five special inputs of the shape of a given one, with a batch of 1 where that may change.

    Args:
        case: real inputs; mean and standard deviation are taken from them. Integer inputs are kept.
        axes: for each input its dynamic axes, name to number.
    """
    case = resized(case, axes, {"batch": 1})
    for name in ("all zero", "constant", "mean/std 30", "tiny variance", "huge contrast"):
        made = tuple(_special(name, value) if value.is_floating_point() else value for value in case)
        if any(value.is_floating_point() for value in case):
            yield name, made


def _special(name: str, value: Tensor) -> Tensor:
    wide = value.double()
    mean, std = float(wide.mean()), float(wide.std(correction=0)) or 1.0
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # half of the picture black, half white; a vector is no picture, but its halves differ as well
    width = value.shape[-1] if value.dim() else 1
    halves = torch.where(torch.arange(width) < width / 2, -1.0, 1.0).double().expand(*value.shape[:-1], width)
    halves = halves.reshape(value.shape)
    made = {
        "all zero": torch.zeros_like(wide),
        "constant": torch.full_like(wide, mean + std),
        "mean/std 30": std * (30 + noise),
        "tiny variance": mean + 1e-4 * std * noise,
        "huge contrast": 1e3 * std * halves,
    }[name]
    return made.to(value.dtype)


def other_sizes(case: Case, axes: Axes) -> Iterator[tuple[str, Case]]:
    """Batch 1, a larger batch, a larger and a smaller height and width, where these axes are dynamic."""
    if any("batch" in one for one in axes):
        batch = next(value.shape[one["batch"]] for value, one in zip(case, axes, strict=True) if "batch" in one)
        for size in {1, batch + 3} - {batch}:
            yield f"batch {size}", resized(case, axes, {"batch": size})
    names = sorted({name for one in axes for name in one} - {"batch"})
    if not names:
        return
    lengths = {
        name: value.shape[one[name]] for value, one in zip(case, axes, strict=True) for name in names if name in one
    }
    # odd sizes, and different ones for each axis, so that swapped or rounded axes show
    larger = {name: lengths[name] + 17 + 2 * number for number, name in enumerate(names)}
    smaller = {name: lengths[name] // 2 + 1 + 2 * number for number, name in enumerate(names)}
    small = resized(case, axes, {"batch": 1})
    for sizes in (larger, smaller):
        yield "size " + "x".join(str(size) for size in sizes.values()), resized(small, axes, sizes)


def resized(case: Case, axes: Axes, sizes: dict[str, int]) -> Case:
    """The case with some named axes cut, or continued by repetition, to `sizes`."""
    made = []
    for value, named in zip(case, axes, strict=True):
        for name in sizes.keys() & named.keys():
            axis = named[name]
            indices = torch.arange(sizes[name], device=value.device) % value.shape[axis]
            value = value.index_select(axis, indices)
        made.append(value)
    return tuple(made)
