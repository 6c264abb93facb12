"""convert: inspect, plan and apply in one call, and say what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gnswap._apply import apply
from gnswap._couple import singles_of_one_shape
from gnswap._fidelity import Fidelity, compare
from gnswap._heal import heal
from gnswap._healing import HealReport
from gnswap._moments import ChannelStatistics
from gnswap._plan import plan as make_plan
from gnswap._record import Record
from gnswap._records import Plan
from gnswap._refit import RefitReport, refit
from gnswap._running import kept_batches
from gnswap._trial import parted


@dataclasses.dataclass(frozen=True)
class ConversionReport(Record):
    """What came of a conversion.

    Attributes:
        model: the model's class.
        swapped: number of layers that are GroupNorms now.
        kept: number of norm layers that were left; the plan says why.
        notes: what a user should know, kept layers first.
        fidelity: the converted network against the original on the calibration photos; None without photos.
        refitting, healing: what `gnswap.refit` and `gnswap.heal` did before `fidelity` was measured; None where they
            were not asked for.
    """

    model: str
    swapped: int
    kept: int
    notes: tuple[str, ...] = ()
    fidelity: Fidelity | None = None
    refitting: RefitReport | None = None
    healing: HealReport | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Conversion:
    """What `convert` returns.

    Attributes:
        model: the converted network.
        plan: the decisions behind it.
        report: what came of them.
    """

    model: nn.Module
    plan: Plan
    report: ConversionReport


def convert(
    model: nn.Module,
    *,
    groups: int | Literal["auto"] = "auto",
    group_size: int | None = None,
    softness: float | Literal["auto"] = "auto",
    max_softness: float = 1.0,
    fidelity: float | None = None,
    order: Literal["auto", "natural"] | Mapping[str, Sequence[int]] = "auto",
    calibration: Iterable[Any] | ChannelStatistics | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    absorb: bool = False,
) -> Conversion:
    """Turn a pretrained BatchNorm network into a GroupNorm network that still works; the input is left untouched.

    Args:
        model: any network with BatchNorm, on any device.
        groups, group_size, softness, max_softness, fidelity, order, include, exclude, overrides, absorb: see
            `gnswap.plan`.
        calibration: see `gnswap.plan`; read once. The fidelity of the converted network is measured on these photos
            (not on statistics of them): a little too good, since they also chose the plan.

    Returns:
        The converted network (a copy), the plan, and a report.

    Raises:
        NothingToSwapError: there is no BatchNorm, or every one is kept.
        ArgumentError, PlanError: an option is wrong; see `gnswap.plan`.
        CalibrationError: `calibration` is empty or holds no tensors.
        ModelError: the model cannot be copied or is wrapped.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU()).eval()
        >>> conversion = gnswap.convert(net, calibration=[torch.randn(2, 3, 8, 8)])
        >>> conversion.report.swapped, conversion.report.fidelity.photos
        (1, 2)
    """
    photos = None
    if calibration is not None and not isinstance(calibration, ChannelStatistics):
        calibration = photos = kept_batches(calibration)
    plan = make_plan(
        model,
        groups=groups,
        group_size=group_size,
        softness=softness,
        max_softness=max_softness,
        fidelity=fidelity,
        order=order,
        calibration=calibration,
        include=include,
        exclude=exclude,
        overrides=overrides,
        absorb=absorb,
    )
    converted = apply(model, plan)
    measured = None if photos is None else compare(model, converted, photos)
    notes = [f"kept {decision.name}: {decision.reason}" for decision in plan.kept]
    notes += plan.notes
    if fidelity is not None and measured is not None:
        notes.append(_verdict(fidelity, measured))
    report = ConversionReport(
        model=plan.model, swapped=len(plan.swaps), kept=len(plan.kept), notes=tuple(notes), fidelity=measured
    )
    return Conversion(converted, plan, report)


def taught(
    conversion: Conversion,
    original: nn.Module,
    photos: Iterable[Any],
    *,
    refitting: bool,
    steps: int | None,
    checkpoint: Path | None = None,
) -> Conversion:
    """Refit and heal a conversion's network in place, and report on it as it is then.

    Args:
        conversion: what `convert` made of `original`.
        original: the network with its BatchNorms.
        photos: input batches; read once.
        refitting: whether `gnswap.refit` comes first.
        steps, checkpoint: see `gnswap.heal`; without steps nothing is healed.

    Returns:
        The same network and plan with another report.

    Raises:
        GnswapError: see `gnswap.refit` and `gnswap.heal`.
    """
    kept = kept_batches(photos)
    refitted = None
    if refitting:
        # the others judge healing
        to_refit = kept if steps is None else [parted(singles_of_one_shape(kept, "refit"))[0]]
        refitted = refit(conversion.model, original, to_refit)
    healing = None
    if steps is not None:
        healing = heal(conversion.model, original, kept, steps=steps, checkpoint=checkpoint)
    report = dataclasses.replace(
        conversion.report,
        notes=(*conversion.report.notes, *(done.verdict for done in (refitted, healing) if done is not None)),
        fidelity=compare(original, conversion.model, kept),
        refitting=refitted,
        healing=healing,
    )
    return dataclasses.replace(conversion, report=report)


def _verdict(target: float, measured: Fidelity) -> str:
    if measured.agreement is None:
        return f"the target {target:g} cannot be judged: the network is no classifier"
    word = "met" if measured.agreement >= target else "missed"
    return f"target {target:g} {word}: {measured.agreement:.3f} of {measured.photos} photos keep their class"
