r"""What a GroupNorm divides its channels by, beside what BatchNorm divides them by: from small tables, in closed form.

Any of our layers sees channel c as :math:`z_c = a_c + b_c \hat x_c`, with :math:`\hat x_c` what BatchNorm makes of it,
and gives :math:`\gamma_c\,\text{gain}_c (z_c - m_g) / \sqrt{v_g + e} + \beta_c`. So the channel itself is divided by a
variance that is :math:`(v_g + e) / (b_c\,\text{gain}_c)^2` times BatchNorm's, and the mean that is subtracted lies
:math:`(m_g - a_c) / b_c` standard deviations from BatchNorm's. Where the first is 1 and the second 0, the layer
computes what BatchNorm did. The naive copy has a = mean, b = deviation, gain = 1; one formula shows all stages on one
scale.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gnswap._build import build_layer
from gnswap._moments import ChannelStatistics
from gnswap._norms import read_norm
from gnswap._records import Decision
from gnswap._report.levers import Lever
from gnswap._report.records import QUANTILES, LayerReport, Spread
from gnswap._sites import get

_SAMPLES = 128  # rows of a layer's tables that the quantiles are taken over, evenly spread


def layer_report(
    model: nn.Module,
    decision: Decision,
    stages: Iterable[tuple[Lever, Decision]],
    statistics: ChannelStatistics | None,
) -> LayerReport:
    """One swapped layer at every stage.

    Args:
        model: the original network.
        decision: the layer's, as it is in the plan.
        stages: the same decision as it is at each stage.
        statistics: of the original network; None to go by the running statistics alone.
    """
    norm = get(model, decision.paths[0])
    decided = LayerReport(
        name=decision.name,
        num_channels=decision.num_channels,
        num_groups=decision.num_groups,
        softness=decision.softness,
        reason=decision.reason,
        channel_order=decision.channel_order,
        signs=decision.signs,
    )
    state = read_norm(norm)
    if state.running_mean is None or state.running_var is None:
        return decided
    mean, var = (tensor.detach().double().cpu() for tensor in (state.running_mean, state.running_var))
    deviation = (var + state.eps).sqrt()
    grouped = deviation.view(decision.num_groups, -1)
    moments = None if statistics is None else statistics.layers.get(decision.paths[0])
    if moments is None:
        tables = torch.zeros(1, len(var), dtype=torch.float64), (var / (var + state.eps))[None]
    else:
        rows = torch.linspace(0, len(moments.mean) - 1, min(len(moments.mean), _SAMPLES)).long()
        tables = moments.mean[rows].double(), moments.square[rows].double()
    return dataclasses.replace(
        decided,
        deviation=tuple(float(f"{value:.4g}") for value in deviation.tolist()),
        loud_to_quiet=float((grouped.amax(1) / grouped.amin(1)).median()),
        spreads=tuple(
            _spread(lever.name, norm, stage, mean, deviation, *tables) for lever, stage in stages if lever.regroups
        ),
    )


def _spread(
    name: str, norm: nn.Module, decision: Decision, mean: Tensor, deviation: Tensor, first: Tensor, second: Tensor
) -> Spread:
    """At one stage; `first` and `second` are the moments of x̂ over the positions, `[N, C]`."""
    layer = build_layer(norm, decision)
    scale, shift, gain = (
        default if buffer is None else buffer.detach().double().cpu()
        for buffer, default in (
            (layer.channel_scale, torch.ones_like(mean)),
            (layer.channel_shift, torch.zeros_like(mean)),
            (layer.channel_gain, torch.ones_like(mean)),
        )
    )
    a, b = scale * mean + shift, scale * deviation
    order = torch.arange(len(mean)) if layer.channel_order is None else layer.channel_order.cpu()
    group = torch.empty_like(order)
    group[order] = torch.arange(layer.num_groups).repeat_interleave(len(order) // layer.num_groups)
    z1 = a + b * first
    z2 = a.square() + 2 * a * b * first + b.square() * second
    group_mean, group_square = (_over_groups(table[:, order], layer.num_groups) for table in (z1, z2))
    variance = (group_square - group_mean.square()).clamp_min(0)[:, group] + layer.eps + layer.softness
    ratio = (variance / (b * gain).square()).flatten()
    away = ((group_mean[:, group] - a) / b).abs().flatten()
    at = torch.tensor([round(q * (len(ratio) - 1)) for q in QUANTILES])
    return Spread(name, tuple(ratio.sort().values[at].tolist()), float(away.median()))


def _over_groups(table: Tensor, num_groups: int) -> Tensor:
    return table.view(len(table), num_groups, -1).mean(2)
