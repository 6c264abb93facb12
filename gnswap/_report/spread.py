"""What a GroupNorm divides its channels by, beside what BatchNorm divides them by: from small tables, in closed form.

With factor k and shift t of a channel (`gnswap._squash`), the channel itself is divided by a variance that is 1/k²
times BatchNorm's, and the mean that is subtracted lies t/k standard deviations from BatchNorm's. Where the first is 1
and the second 0, the layer computes what BatchNorm did; one formula shows all stages on one scale.
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
from gnswap._squash import View

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
    factor, shift = View.of(layer, mean, deviation).response(first, second)
    if layer.channel_offset is not None:  # of centres, as gamma times a constant
        gamma = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().double().cpu()
        shift = shift + (layer.channel_offset.double().cpu() / gamma).nan_to_num(0, 0, 0)
    ratio, away = factor.square().reciprocal().flatten(), (shift / factor).abs().flatten()
    at = torch.tensor([round(q * (len(ratio) - 1)) for q in QUANTILES])
    return Spread(name, tuple(ratio.sort().values[at].tolist()), float(away.median()))
