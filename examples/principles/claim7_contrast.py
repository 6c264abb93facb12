r"""Claim 7. A per-sample contrast s_n is divided out by GroupNorm and only averaged by BatchNorm.

For samples s_n x_n, with sigma_n^2 the variance of x_n and no mean worth speaking of,

    GroupNorm: s_n x_n / sqrt(s_n^2 sigma_n^2 + eps) -> x_n / sigma_n
    BatchNorm: s_n x_n / sqrt(mean over k of s_k^2 sigma_k^2 + eps)

so the first forgets s_n as long as s_n^2 sigma_n^2 >> eps, and the second keeps it relative to the batch or to the
training set. Softness e is an eps of choice: in between, s_n / sqrt(s_n^2 + e).

    python examples/principles/claim7_contrast.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
from torch import Tensor, nn

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (6.8, 4.4)
GROUPS, EPS = 8, 1e-5
NAMES = (
    "BatchNorm, eval()",
    "BatchNorm, train(), one sample of many",
    "GroupNorm",
    "GroupNorm, standardised",
    "GroupNorm, standardised, softness 1",
)


class Row(NamedTuple):
    """The size of one photo's output at one contrast, for each of NAMES, relative to that at contrast 1."""

    contrast: float
    size: tuple[float, ...]


def measure(smoke: bool) -> list[Row]:
    network, photos = _common.photos(8 if smoke else 20)
    stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
    stem.load_state_dict(network.get_submodule("conv_stem").state_dict())
    with torch.no_grad():
        x = stem(photos - photos.mean((2, 3), keepdim=True))  # contrast is about the photo's own mean
    norm = nn.BatchNorm2d(x.shape[1], EPS, affine=False).eval()
    norm.running_mean.copy_(x.mean((0, 2, 3)))  # type: ignore[union-attr]
    norm.running_var.copy_(x.var((0, 2, 3), correction=0))  # type: ignore[union-attr]
    plan = gnswap.plan(norm, groups=GROUPS, softness=0)
    ways = [
        gnswap.apply(norm, way)
        for way in (plan.edit("(root)", standardise=False), plan, plan.edit("(root)", softness=1.0))
    ]
    trained = nn.BatchNorm2d(x.shape[1], EPS, affine=False)  # in train()

    def sizes(contrast: float) -> list[float]:
        one = contrast * x[:1]
        batch = torch.cat([one, x[1:]])
        with torch.no_grad():
            return [_size(norm(one)), _size(trained(batch)[:1]), *(_size(way(one)) for way in ways)]

    normal = sizes(1.0)
    exponents = range(-6, 7, 3) if smoke else range(-6, 7)
    contrasts = [10 ** (exponent / 4) for exponent in exponents]
    return [
        Row(contrast, tuple(size / one for size, one in zip(sizes(contrast), normal, strict=True)))
        for contrast in contrasts
    ]


def _size(y: Tensor) -> float:
    return float(y.var((2, 3)).mean().sqrt())


def table(rows: list[Row]) -> _common.Table:
    return _common.Table("contrast", NAMES, [(f"{row.contrast:.3g}", *(f"{s:.3f}" for s in row.size)) for row in rows])


def draw(rows: list[Row], figure: Figure) -> None:
    axes = figure.subplots()
    x = [row.contrast for row in rows]
    looks = (
        (_common.BATCHNORM, "-"),
        (_common.BATCHNORM, "o:"),
        (_common.NAIVE, "s-"),
        (_common.GNSWAP, "o-"),
        (_common.OTHER, "^-"),
    )
    for column, (name, (colour, style)) in enumerate(zip(NAMES, looks, strict=True)):
        axes.plot(
            x,
            [row.size[column] for row in rows],
            style,
            color=colour,
            label=name,
            mfc="none",
            markersize=9 if "s" in style else 5,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _common.round_numbers(axis)
    axes.set_xlabel("contrast of one real photo, 1 is its own")
    axes.set_ylabel("size of its output,\nrelative to that at contrast 1")
    _common.legend(figure, axes, 2)


def check(rows: list[Row]) -> None:
    x = [row.contrast for row in rows]
    power = _common.slope(x, [row.size[0] for row in rows])
    assert abs(power - 1) < 1e-3, f"BatchNorm in eval() gives contrast^{power:.3f}"
    low = [row for row in rows if row.contrast <= 1]
    power = _common.slope([row.contrast for row in low], [row.size[1] for row in low])
    assert power > 0.9, f"BatchNorm in train() gives contrast^{power:.3f} where the sample does not rule the batch"
    for row in rows:
        assert abs(row.size[2] - 1) < 0.02, f"GroupNorm's output at contrast {row.contrast:.3g} is {row.size[2]:.3f}"
    for name, column in ((NAMES[3], 3), (NAMES[4], 4)):
        power = _common.slope(x, [row.size[column] for row in rows])
        assert power < 0.7, f"{name} gives contrast^{power:.2f}: it does not damp contrast"


if __name__ == "__main__":
    _common.run(__name__)
