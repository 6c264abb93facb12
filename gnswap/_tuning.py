"""Choosing by photos: the order and the signs of every layer, from the statistics of one pass.

Why this is not in `plan` itself: a plan without photos rests on arithmetic alone, and reads as such.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from gnswap._errors import PlanMismatchError
from gnswap._moments import ChannelStatistics, collect
from gnswap._norms import read_norm
from gnswap._order import arrange
from gnswap._policy import Policy
from gnswap._records import Decision
from gnswap._running import ROWS, batched, photos_in
from gnswap._sites import get

LEAST_SAMPLES = 8
"""Rows of a layer's tables below which they choose nothing for it."""


def tuned(
    model: nn.Module,
    decisions: Iterable[Decision],
    policy: Policy,
    calibration: Iterable[Any] | ChannelStatistics,
    fingerprint: str,
) -> tuple[list[Decision], list[str]]:
    """The decisions as the photos would have them, and what the plan's reader should know.

    Args:
        model: the network with its norms.
        decisions: of a plan without photos. An order in one of them is the user's, and stays.
        policy: the options.
        calibration: input batches, or statistics of the network.
        fingerprint: of the network.
    """
    if isinstance(calibration, ChannelStatistics):
        _require_same(calibration, fingerprint)
        statistics = calibration
    else:
        statistics = collect(model, batched(photos_in(calibration), ROWS))
    if policy.order != "natural":
        decisions = [_arranged(model, decision, statistics) for decision in decisions]
    held = len(range(statistics.samples)[3::4])
    note = f"chosen on {statistics.samples - held} photos and judged on {held} others"
    return list(decisions), [note]


def _require_same(statistics: ChannelStatistics, fingerprint: str) -> None:
    if statistics.fingerprint != fingerprint:
        raise PlanMismatchError(
            "the statistics are of another model",
            where="calibration",
            expected=f"fingerprint {fingerprint[:12]}",
            found=statistics.fingerprint[:12],
            fix="Collect them with gnswap.calibrate on this model.",
        )


def _arranged(model: nn.Module, decision: Decision, statistics: ChannelStatistics) -> Decision:
    """With order and signs from the statistics, where they help on the samples held out."""
    if decision.action == "keep" or not decision.standardise:
        return decision
    moments = statistics.layers.get(decision.paths[0])
    if moments is None or len(moments.mean) < LEAST_SAMPLES:
        rows = 0 if moments is None else len(moments.mean)
        return _because(decision, f"order left alone: {rows} samples reached the layer, {LEAST_SAMPLES} are needed")
    given, state = decision.channel_order, read_norm(get(model, decision.paths[0]))
    judged = arrange(moments.tables(state), decision.num_groups, moments.sample, given=given)
    found = judged.arrangement
    evidence = {
        "fluctuation_natural": judged.natural_held,
        "fluctuation": judged.held,
        "fluctuation_natural_seen": judged.natural_seen,
        "fluctuation_seen": judged.seen,
    }
    chosen = ["order"] * (found.order != given) + ["signs"] * (found.signs is not None)
    why = (
        f"{' and '.join(chosen)} from photos: fluctuation {judged.natural_held:.3g} to {judged.held:.3g} on others"
        if chosen
        else "no order or signs from photos: none helped on others"
    )
    decision = dataclasses.replace(decision, channel_order=found.order, signs=found.signs, evidence=evidence)
    return _because(decision, why)


def _because(decision: Decision, reason: str) -> Decision:
    return dataclasses.replace(decision, reason=f"{decision.reason}; {reason}")
