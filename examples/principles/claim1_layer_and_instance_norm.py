r"""Claim 1. With one group GroupNorm is LayerNorm over channels and positions, with C groups it is InstanceNorm.

Forward and gradient agree with torch's own functions to fp32 rounding, whatever the number of values in a group.

    y_c = (x_c - m_g) / sqrt(v_g + eps) * gamma_c + beta_c,   m_g, v_g over D = C/G channels and S positions

    python examples/principles/claim1_layer_and_instance_norm.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import _common
import torch
import torch.nn.functional as F
from torch import Tensor

import gnswap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (9, 3.6)
CHANNELS, EPS, ULP = 16, 1e-5, 2.0**-23
PARTS = ("output", "d/dx", "d/dgamma")


class Row(NamedTuple):
    """Relative errors against fp64 in units of 2^-23: ours, torch's, of each of PARTS."""

    end: str
    values: int  # in one group
    ours: tuple[float, ...]
    torch: tuple[float, ...]


def layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    shape = x.shape[1:]
    return F.layer_norm(x, shape, *(p[:, None, None].expand(shape) for p in (gamma, beta)), eps=EPS)


def instance_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.instance_norm(x, weight=gamma, bias=beta, eps=EPS)


def measure(smoke: bool) -> list[Row]:
    rows = []
    for end, groups, reference in (("LayerNorm", 1, layer_norm), ("InstanceNorm", CHANNELS, instance_norm)):
        for side in (4, 16, 32) if smoke else (2, 4, 8, 16, 32, 64, 128):
            x = 3 + 2 * torch.randn(4, CHANNELS, side, side)
            gamma, beta, seed = torch.randn(CHANNELS), torch.randn(CHANNELS), torch.randn_like(x)

            def group_norm(x: Tensor, gamma: Tensor, beta: Tensor, groups: int = groups) -> Tensor:
                layer = gnswap.FusedGroupNorm(groups, CHANNELS, EPS)
                return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,))

            def run(norm: object, *inputs: Tensor) -> list[Tensor]:
                leaves = [value.detach().clone().requires_grad_() for value in inputs[:3]]
                y = norm(*leaves)  # type: ignore[operator]
                return [y, *torch.autograd.grad(y, leaves, inputs[3])[:2]]

            truth = run(reference, *(value.double() for value in (x, gamma, beta, seed)))
            ours, torchs = (
                tuple(
                    _common.relative(got.double() - want, want) / ULP
                    for got, want in zip(run(norm, x, gamma, beta, seed), truth, strict=True)
                )
                for norm in (group_norm, reference)
            )
            rows.append(Row(end, x[0].numel() // groups, ours, torchs))
    return rows


def table(rows: list[Row]) -> _common.Table:
    columns = [f"{part} {who}" for part in PARTS for who in ("gnswap", "torch")]
    body = [
        (
            f"{row.end}, {row.values} a group",
            *(f"{value:.2f}" for pair in zip(row.ours, row.torch, strict=True) for value in pair),
        )
        for row in rows
    ]
    return _common.Table("error in 2^-23", columns, body)


def draw(rows: list[Row], figure: Figure) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, end in zip(panels, ("LayerNorm", "InstanceNorm"), strict=True):
        found = [row for row in rows if row.end == end]
        x = [row.values for row in found]
        for part, colour in zip(range(len(PARTS)), (_common.GNSWAP, _common.BATCHNORM, _common.OTHER), strict=True):
            axes.plot(
                x, [row.torch[part] for row in found], "s:", color=colour, mfc="none", label=f"{PARTS[part]}, torch"
            )
            axes.plot(
                x, [row.ours[part] for row in found], "o-", color=colour, markersize=4, label=f"{PARTS[part]}, gnswap"
            )
        axes.set_xscale("log")
        axes.set_xlabel("values in a group")
        axes.set_title(f"{'G = 1' if end == 'LayerNorm' else f'G = C = {CHANNELS}'}: {end}", fontsize="medium")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("error against fp64,\nrms, relative, in units of $2^{-23}$")
    _common.legend(figure, panels[0], 3)


def check(rows: list[Row]) -> None:
    for row in rows:
        for part, ours, torchs in zip(PARTS, row.ours, row.torch, strict=True):
            # 8 units are 1e-6; gamma's gradient is itself a sum over all samples and positions, which rounds
            assert ours <= max(8.0, 2 * torchs), f"{row.end}, {row.values} values: {part} off by {ours:.1f} units"


if __name__ == "__main__":
    _common.run(__name__)
