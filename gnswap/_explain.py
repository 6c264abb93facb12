"""explain: where copying gamma and beta into a GroupNorm would squash a network's channels, and what the plan does.

Why it makes a plan itself, where none is given: a user asks before deciding anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import _sites
from gnswap._build import build_layer
from gnswap._calibrate import calibrate
from gnswap._errors import ArgumentError, ModelError, NothingToSwapError, PlanMismatchError
from gnswap._explain_figure import draw
from gnswap._explanation import SQUASHED, Explanation, GroupSquash, LayerSquash
from gnswap._grouping import largest_groups
from gnswap._moments import ChannelStatistics
from gnswap._norms import NormState, read_norm
from gnswap._plan import plan as make_plan
from gnswap._policy import require_match
from gnswap._records import Decision, Plan, Site, matches
from gnswap._squash import View
from gnswap._survey import survey


def explain(
    model: nn.Module,
    layer: str | None = None,
    *,
    groups: int = 32,
    plan: Plan | None = None,
    calibration: Iterable[Any] | ChannelStatistics | None = None,
    figure: str | os.PathLike[str] | None = None,
) -> Explanation:
    r"""Say for every BatchNorm what would become of its channels if gamma and beta were copied into a GroupNorm.

    Of channel c, BatchNorm gives :math:`\gamma_c \hat x_c + \beta_c`, and a GroupNorm
    :math:`\gamma_c (k_c \hat x_c + t_c) + \beta_c`. For the naive swap

    .. math::
        k_c = \frac{\sigma_c}{\sqrt{v_g + \epsilon}}, \qquad t_c = \frac{\mu_c - m_g}{\sqrt{v_g + \epsilon}}, \qquad
        v_g = \frac1D \sum_{c \in g} \mathrm{var}_c + \frac1D \sum_{c \in g} (\mu_c - m_g)^2 :

    a channel much quieter than its group is squashed, :math:`k_c \ll 1`. Without photos everything follows from the
    running statistics, in closed form and without running the network: it holds for a sample with the statistics of
    the training set, on which a standardised layer makes no error at all. With photos the same closed form is taken
    at the moments of each of them, and shows what is left after the conversion. The model is left as it is.

    Args:
        model: a network with BatchNorm, and with weights that were trained: a fresh network has nothing to squash.
        layer: path or glob of the layers to look at; None for all.
        groups: of the naive swap; where it does not divide C, the largest number below it that does.
        plan: what is done instead; None for what `gnswap.plan` decides, on the photos if there are any.
        calibration: input batches, as for `gnswap.plan`, or what `gnswap.calibrate` made of them.
        figure: draw the result as PNG, one layer in detail or all that there are side by side.

    Returns:
        The `Explanation`, with the layers in the order of the network; `ranked` puts the worst first.

    Raises:
        NothingToSwapError: no BatchNorm with running statistics.
        PlanError: `layer` fits no norm layer.
        PlanMismatchError: `plan` or `calibration` is of another architecture.
        ArgumentError: `groups` is not a whole number from 1.
        ModelError: the model is converted already.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile, TorchScript).
        CalibrationError: see `gnswap.calibrate`.
        MissingDependencyError: `figure` is asked for and matplotlib is not installed.
        StoreError: `figure` cannot be written.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
        >>> _ = net[1].running_var.copy_(torch.tensor([1.0, 10_000.0, 1.0, 1.0]))  # channel 1: a hundred times louder
        >>> found = gnswap.explain(net, groups=2).layers[0]
        >>> [round(factor, 3) for factor in found.factor], found.groups[0].loudest, found.remedy
        ([0.014, 1.414, 1.0, 1.0], 1, 'standardised, 1 group of 4, softness 1')

    Source: Wu & He, *Group Normalization* (2018) for the norm; the derivation stands in `gnswap._squash`.
    """
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ArgumentError(
            "impossible number of groups", where="explain.groups", expected="a whole number from 1", found=repr(groups)
        )
    inventory = survey(model)
    if _sites.applied(model) is not None:
        raise ModelError("the model is converted already", fix="Explain the original: gnswap.revert(model).")
    sites = inventory.sites
    if layer is not None and sites:
        require_match("explain.layer", layer, sites)
        sites = tuple(site for site in sites if any(path == layer or matches(path, layer) for path in site.paths))
    unseen = [(site, reason) for site in sites if (reason := _unseen(model, site)) is not None]
    seen = [site for site in sites if site not in [other for other, _ in unseen]]
    if not seen:
        raise NothingToSwapError(
            "there is no BatchNorm to explain",
            where=inventory.model,
            expected="one with running statistics",
            found="; ".join(f"{site.name}: {reason}" for site, reason in unseen[:3]) or "none of any kind",
        )
    statistics = _statistics(model, calibration)
    plan = make_plan(model, calibration=statistics) if plan is None else plan
    for what, fingerprint in (("plan", plan.fingerprint), ("calibration", statistics and statistics.fingerprint)):
        if fingerprint not in (None, inventory.fingerprint):
            raise PlanMismatchError(f"the {what} is of another model", where=f"explain.{what}", fix="Make it again.")
    decisions = {decision.paths: decision for decision in plan.decisions}
    if missing := [site.name for site in seen if site.paths not in decisions]:
        raise PlanMismatchError("the plan leaves a layer out", where=missing[0], fix="Make it with gnswap.plan.")
    layers = [_explained(model, site, groups, decisions[site.paths], statistics) for site in seen]
    explanation = Explanation(
        model=inventory.model,
        groups=groups,
        samples=0 if statistics is None else statistics.samples,
        layers=tuple(layers),
        unseen=tuple(f"{site.name}: {reason}" for site, reason in unseen),
        notes=_notes(layers),
    )
    if figure is not None:
        draw(explanation, figure)
    return explanation


def _statistics(model: nn.Module, calibration: Iterable[Any] | ChannelStatistics | None) -> ChannelStatistics | None:
    if calibration is None or isinstance(calibration, ChannelStatistics):
        return calibration
    return calibrate(model, calibration)


def _unseen(model: nn.Module, site: Site) -> str | None:
    """Why nothing can be said of a layer; None where something can."""
    if site.refusal is not None:
        return site.refusal
    if not site.running_stats:
        return "no running statistics"
    var = read_norm(_sites.get(model, site.paths[0])).running_var
    return "its running statistics have no values (meta device)" if var is not None and var.is_meta else None


def _explained(
    model: nn.Module, site: Site, groups: int, decision: Decision, statistics: ChannelStatistics | None
) -> LayerSquash:
    norm = _sites.get(model, site.paths[0])
    state = read_norm(norm)
    assert state.running_mean is not None
    assert state.running_var is not None
    mean, var = (tensor.detach().double().cpu() for tensor in (state.running_mean, state.running_var))
    deviation = (var + state.eps).sqrt()
    moments = None if statistics is None else statistics.layers.get(site.paths[0])
    if moments is None:
        tables = torch.zeros_like(var)[None], (var / (var + state.eps))[None]
    else:
        tables = moments.mean.double(), moments.square.double()
    naive = Decision(
        site.paths,
        site.norm_type,
        site.num_channels,
        "swap",
        "gamma and beta copied",
        largest_groups(site.num_channels, groups),
        standardise=False,
    )
    factor, shift, error = _response(norm, naive, mean, deviation, tables)
    after, _, error_after = (
        _response(norm, decision, mean, deviation, tables)
        if decision.action == "swap"
        else (torch.ones_like(mean), shift, 0.0)
    )
    alive = var > state.eps
    live = factor[alive]
    return LayerSquash(
        paths=site.paths,
        num_channels=site.num_channels,
        num_groups=naive.num_groups,
        error=error,
        squashed=float((live < SQUASHED).double().mean()) if len(live) else 0.0,
        factor=_numbers(factor),
        shift=_numbers(shift),
        mean=_numbers(mean),
        deviation=_numbers(deviation),
        dead=tuple((~alive).nonzero().flatten().tolist()),
        groups=tuple(_groups(mean, var, state, naive.num_groups, factor, alive)),
        planned_groups=decision.num_groups,
        remedy=_remedy(decision),
        error_after=error_after,
        factor_after=_numbers(after),
    )


def _response(
    norm: nn.Module, decision: Decision, mean: Tensor, deviation: Tensor, tables: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Factor and shift of every channel, medians over the samples, and the relative error of the layer's output.

    With weight w (gamma and all that was fitted to photos) in the GroupNorm and gamma in BatchNorm, the difference of a
    channel is w (k x̂ + t) + offset - gamma x̂, so its mean square over the positions needs no more than the moments.
    """
    layer = build_layer(norm, decision)
    factor, shift = View.of(layer, mean, deviation).response(*tables)
    weight = layer.weight
    gamma = torch.ones_like(mean) if weight is None else weight.detach().double().cpu()
    offset = 0.0 if layer.channel_offset is None else layer.channel_offset.detach().double().cpu()
    first, second = tables
    off, moved = gamma * (factor - 1), gamma * shift + offset
    difference = (off.square() * second + 2 * off * moved * first + moved.square()).sum()
    size = (gamma.square() * second).sum()
    error = float((difference / size).sqrt()) if size > 0 else 0.0
    return factor.median(0).values, shift.median(0).values, error


def _groups(
    mean: Tensor, var: Tensor, state: NormState, num_groups: int, factor: Tensor, alive: Tensor
) -> Iterable[GroupSquash]:
    for channels in torch.arange(len(mean)).view(num_groups, -1):
        centre = mean[channels].mean()
        away = (mean[channels] - centre).square()
        parts = var[channels] + away
        variance = float(parts.mean())
        place = int(parts.argmax())
        living = channels[alive[channels]]
        quietest = int(living[factor[living].argmin()]) if len(living) else None
        loud = float(parts[place])
        yield GroupSquash(
            channels=tuple(channels.tolist()),
            mean=_number(float(centre)),
            deviation=_number((variance + state.eps) ** 0.5),
            loudest=int(channels[place]),
            part=_number(loud / float(parts.sum())) if loud else 0.0,
            by_mean=_number(float(away[place]) / loud) if loud else 0.0,
            quietest=quietest,
            ratio=None if quietest is None else _number((loud / float(var[quietest])) ** 0.5),
        )


def _remedy(decision: Decision) -> str:
    if decision.action == "keep":
        return f"kept as BatchNorm ({decision.reason})"
    count, size = decision.num_groups, decision.group_size
    words = ["standardised" if decision.standardise else "not standardised"]
    words.append(f"1 group of {size}" if count == 1 else f"{count} groups of {size}")
    words += ["ordered"] * (decision.channel_order is not None) + ["signs"] * (decision.signs is not None)
    words += [f"softness {decision.softness:g}"] * (decision.softness > 0)
    return ", ".join(words)


def _notes(layers: list[LayerSquash]) -> tuple[str, ...]:
    notes = []
    if all(set(layer.mean) == {0.0} and len(set(layer.deviation)) == 1 for layer in layers):
        notes.append("the running statistics are those of a fresh network, in which there is nothing to squash")
    if alone := [layer.name for layer in layers if layer.alone]:
        shown = ", ".join(alone[:3]) + (", ..." if len(alone) > 3 else "")
        notes.append(
            f"one channel a group in {len(alone)} layer{'s' * (len(alone) > 1)} ({shown}): nothing squashes it there, "
            "but its own level and contrast are divided out of every sample (InstanceNorm), which the running "
            "statistics do not show"
        )
    return tuple(notes)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(map(_number, values.tolist()))


def _number(value: float) -> float:
    return float(f"{value:.6g}")  # the JSON of a network holds several of them for each channel
