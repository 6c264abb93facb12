"""plan: decide for every BatchNorm what becomes of it, and say why.

Why decisions are taken here and nowhere else: a plan is data, so it can be read, edited, stored and applied to a fresh
copy of the same architecture on another machine; `apply` follows it without a thought of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from gnswap import _grouping
from gnswap._absorb import with_absorbed
from gnswap._errors import PlanError
from gnswap._moments import ChannelStatistics
from gnswap._policy import Policy, Selection
from gnswap._records import Decision, Plan, Site
from gnswap._survey import survey
from gnswap._tuned_layer import Draft
from gnswap._tuning import tuned


def plan(
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
) -> Plan:
    """Decide for every BatchNorm of a model what becomes of it; the model is left as it is.

    A number of groups is valid if it divides C and leaves at least 4 channels in a group. The nearest valid one
    is taken instead of any other, which the decision's reason says, and one warning for the whole plan. One channel
    per group (InstanceNorm) comes only from an override that names the layer by its own path.

    A BatchNorm1d may see vectors, where a group's statistics have nothing but its D channels to go by, so it gets
    one group unless an override says otherwise, and `max_softness` unless `softness` is given.

    Args:
        model: any network with BatchNorm.
        groups: G for every layer, or "auto": two where each then has 64 channels or more, else one.
        group_size: D for every layer, instead of `groups`.
        softness: added to each group's variance, which is about 1. 0 is pure GroupNorm, 1 halves what GroupNorm
            adds in fluctuation, infinity would be a frozen BatchNorm. "auto" is 1.0, within `max_softness`, unless
            `fidelity` asks for something else.
        max_softness: bound of "auto".
        fidelity: target for the share of photos with an unchanged top-1 class, in (0, 1]. Needs `calibration`.
            The plan is then the purest that reaches it on photos held out, within `max_softness`; its notes say what
            it cost, or that it is out of reach (also a warning).
        order: which channels share a group. "natural" is neighbours, with their own signs; "auto" is what the photos
            say, with the channels' loudness and centres in their groups, and neighbours without photos; a mapping from
            glob or path to a permutation of the layer's channels is the user's own for those layers, "auto" for the
            others.
        calibration: input batches (tensors, or tuples whose first item is the input), or what `gnswap.calibrate`
            made of them. 64 to 256 unlabelled photos like those that the network is for. They are read once and held in
            memory, and it does not matter in which order or batches they come: a quarter of them, chosen by
            content, judges what the others and random views of them suggest.
        include: glob or globs over module paths: only these layers are swapped.
        exclude: glob or globs: these are kept.
        overrides: for single layers: a mapping from glob or path to a mapping with any of "groups", "group_size",
            "softness", "action" ("swap" or "keep"). A layer's own path counts more than a glob, a later glob
            more than an earlier one.
        absorb: let a norm compute the activation module behind it, in one pass, where torch.fx proves that nothing
            else reads its output or calls that module; a note says which stay where they are. Off by default, because
            a hook on the norm then sees the activated output.

    Returns:
        The plan, with one decision for each site that `gnswap.inspect` lists.

    Raises:
        ArgumentError: an impossible or contradictory option.
        PlanError: a glob that fits no layer, an unknown key in `overrides`, a layer that cannot be swapped.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile, TorchScript).

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
        >>> decision = gnswap.plan(net, groups=8, softness=0).decisions[0]
        >>> decision.name, decision.action, decision.num_groups, decision.group_size
        ('1', 'swap', 8, 8)
    """
    policy = Policy(groups, group_size, softness, max_softness, fidelity, order)
    policy.check(calibrated=calibration is not None)
    inventory = survey(model)
    selection = Selection.read(include, exclude, overrides, order, inventory.sites)
    choices = [_decide(site, policy, selection) for site in inventory.sites]
    _warn_of_changed_groups([choice for choice in choices if choice.changed])
    notes = list(inventory.notes)
    decisions = [choice.decision for choice in choices]
    if calibration is not None:
        drafts = [
            choice.draft(policy, selection.override(site))
            for choice, site in zip(choices, inventory.sites, strict=True)
        ]
        decisions, found = tuned(model, drafts, policy, calibration, inventory.fingerprint)
        notes += found
    if absorb:
        decisions, found = with_absorbed(model, decisions)
        notes += found
    return Plan(
        fingerprint=inventory.fingerprint,
        model=inventory.model,
        decisions=tuple(decisions),
        options={**policy.options(), "calibrated": calibration is not None, "absorb": absorb, **selection.options()},
        notes=tuple(notes),
        versions=_versions(),
    )


@dataclasses.dataclass(frozen=True)
class _Choice:
    """A decision, and what was changed on the way: the number of groups that was asked for, and could not be had."""

    decision: Decision
    changed: str | None = None

    def draft(self, policy: Policy, override: Mapping[str, Any]) -> Draft:
        """The decision with what photos may still change of it."""
        groups, size = override.get("groups", policy.groups), override.get("group_size", policy.group_size)
        softness = override.get("softness", policy.softness)
        return Draft(self.decision, groups == "auto" and size is None, softness == "auto")


def _decide(site: Site, policy: Policy, selection: Selection) -> _Choice:
    override = selection.override(site)
    action = override.get("action")
    if site.refusal is not None:
        if action == "swap":
            raise PlanError(
                "this layer cannot be swapped",
                where=f'overrides["{site.name}"]',
                expected="a layer that gnswap.inspect does not refuse",
                found=site.refusal,
            )
        return _keep(site, site.refusal)
    if action == "keep":
        return _keep(site, "kept by an override")
    if action != "swap" and (reason := selection.skipped(site)) is not None:
        return _keep(site, reason)
    num_groups, why_groups, changed = _choose_groups(site, policy, override)
    by_name = override["literal"] or (override["named"] and action == "swap")
    if num_groups == site.num_channels and not by_name:
        return _keep(
            site,
            "one channel: GroupNorm would be InstanceNorm and lose what the layer knows; "
            f'swap it all the same with overrides={{"{site.name}": {{"groups": 1}}}}',
        )
    softness, why_softness = _choose_softness(site, policy, override)
    reasons = [why_groups, why_softness]
    if num_groups == site.num_channels:
        reasons.append("one channel per group is InstanceNorm: asked for by name")
    if not site.running_stats:
        reasons.append("no running statistics to standardise with: plain GroupNorm")
    given = selection.order(site)
    if given is not None:
        reasons.append("order as given")
    decision = Decision(
        paths=site.paths,
        norm_type=site.norm_type,
        num_channels=site.num_channels,
        action="swap",
        reason="; ".join(reasons),
        num_groups=num_groups,
        softness=softness,
        standardise=site.running_stats,
        channel_order=given,
    )
    return _Choice(decision, changed)


def _keep(site: Site, reason: str) -> _Choice:
    return _Choice(Decision(site.paths, site.norm_type, site.num_channels, "keep", reason))


def _choose_groups(site: Site, policy: Policy, override: Mapping[str, Any]) -> tuple[int, str, str | None]:
    """G, the reason for it, and what to warn of."""
    if "groups" in override or "group_size" in override:
        groups, group_size, source = override.get("groups", "auto"), override.get("group_size"), "override"
    else:
        groups, group_size, source = policy.groups, policy.group_size, "option"
    channels = site.num_channels
    if override["literal"] and (groups != "auto" or group_size is not None):
        asked = int(groups if group_size is None else group_size)
        if channels % asked:
            raise PlanError(
                "what was asked for does not divide the channels",
                where=f'overrides["{site.name}"]',
                expected=f"a divisor of {channels}",
                found=str(asked),
            )
        num_groups = asked if group_size is None else channels // asked
        return num_groups, f"{num_groups} groups by override of this layer", None
    if source == "option" and _may_see_vectors(site):
        why = "one group: BatchNorm1d may see vectors, which leave a group nothing but its channels"
        return 1, why, None if groups in ("auto", 1) and group_size in (None, channels) else why
    if group_size is not None:
        num_groups, note = _grouping.nearest_group_size(channels, group_size)
        return num_groups, note or f"groups of {group_size} by {source}", note
    if groups != "auto":
        num_groups, note = _grouping.nearest_groups(channels, int(groups))
        return num_groups, note or f"{groups} groups by {source}", note
    num_groups = _grouping.auto_groups(channels)
    return num_groups, f"auto: groups of {channels // num_groups}", None


def _choose_softness(site: Site, policy: Policy, override: Mapping[str, Any]) -> tuple[float, str]:
    said = override.get("softness", "auto")
    if said != "auto":
        return float(said), f"softness {said:g} by override"
    if not site.running_stats:
        return 0.0, "softness 0"
    if policy.softness == "auto" and _may_see_vectors(site):
        return policy.max_softness, f"softness {policy.max_softness:g}, the most allowed, for the same reason"
    softness, source = policy.base_softness()
    return softness, f"softness {softness:g}, {source}"


def _may_see_vectors(site: Site) -> bool:
    """Whether the layer's class takes `(N, C)`, where no positions help a group's statistics."""
    return site.dims in ("2", "2 or 3")


def _warn_of_changed_groups(changed: Sequence[_Choice]) -> None:
    if not changed:
        return
    shown = ", ".join(f"{choice.decision.name} ({choice.decision.num_groups})" for choice in changed[:4])
    more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
    count = "1 layer" if len(changed) == 1 else f"{len(changed)} layers"
    warnings.warn(
        f"{count} got another number of groups than was asked for: {shown}{more}. "
        "The reason stands in each decision of the plan.",
        UserWarning,
        stacklevel=3,
    )


def _versions() -> dict[str, str]:
    return {
        "gnswap": str(getattr(sys.modules["gnswap"], "__version__", "unknown")),
        "torch": str(torch.__version__),
        "timm": importlib.metadata.version("timm"),
    }
