"""Choosing by photos: groups, order, signs, softness and corrections, from one pass and a few looks at the answers.

Two kinds of evidence. What belongs to one layer (its groups, order and signs) is chosen from the statistics of one
pass, by closed forms. What only shows at the network's output (how soft it has to be, whether corrections help) is
tried out, on the photos that the other choices were not made on.

Why nothing is made up where there are no photos: order and signs from 64 synthetic pictures (dead leaves with 1/f
noise) did not carry over to photos. Pure GroupNorm, agreement (KL) on 96 photos, natural order against that one:
EfficientNet-Lite0 .604 (.756) against .625 (.775) at 8 groups, .479 (1.38) against .490 (1.47) at 32; -Lite1
.542 (.689) against .635 (.562) at 8, .427 (1.00) against .427 (1.18) at 32.

Why this is not in `plan` itself: a plan without photos rests on arithmetic alone, and reads as such.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._corrections import corrected
from gnswap._errors import PlanMismatchError
from gnswap._moments import ChannelStatistics, collect
from gnswap._norms import read_norm
from gnswap._order import Arrangement, Tables, arrange, held_out, relative_error
from gnswap._policy import Policy
from gnswap._records import Decision
from gnswap._running import ROWS, batched, photos_in
from gnswap._sites import get
from gnswap._trial import Jury

LEAST_SAMPLES = 8
"""Rows of a layer's tables below which they choose nothing for it."""


_BISECTIONS = 4  # forward passes over the held-out photos to place the dial between pure and soft


@dataclasses.dataclass(frozen=True)
class Draft:
    """A decision made without photos, and what of it photos may change.

    Attributes:
        decision: complete, for the case that there are no photos.
        free_groups, free_softness: whether "auto" chose them. An order in the decision is the user's, and stays.
    """

    decision: Decision
    free_groups: bool = False
    free_softness: bool = False


def tuned(
    model: nn.Module,
    drafts: Sequence[Draft],
    policy: Policy,
    calibration: Iterable[Any] | ChannelStatistics,
    fingerprint: str,
) -> tuple[list[Decision], list[str]]:
    """The decisions as the photos would have them, and what the plan's reader should know.

    Args:
        model: the network with its norms.
        drafts: the decisions without photos.
        policy: the options.
        calibration: input batches, or statistics of the network.
        fingerprint: of the network.
    """
    photos: list[Tensor] = []
    if isinstance(calibration, ChannelStatistics):
        _require_same(calibration, fingerprint)
        statistics = calibration
    else:
        photos = photos_in(calibration)
        statistics = collect(model, batched(photos, ROWS))
    layers = [_Layer.of(model, draft, statistics, policy) for draft in drafts]
    apart = held_out(torch.arange(statistics.samples)).tolist()
    notes = [f"chosen on {statistics.samples - sum(apart)} photos and judged on {sum(apart)} others"]
    if not photos or not any(layer.decision.action == "swap" for layer in layers):
        return [layer.decision for layer in layers], notes
    if policy.fidelity is not None:
        jury = Jury(model, [photo for photo, judges in zip(photos, apart, strict=True) if judges])
        layers, note = _soft_enough(layers, jury, policy.fidelity, policy.max_softness)
        notes.append(note)
    decisions = [layer.decision for layer in layers]
    if len(photos) >= 2 * LEAST_SAMPLES:
        decisions, note = corrected(model, decisions, photos)
        notes.append(note)
    return decisions, notes


def _soft_enough(layers: list[_Layer], jury: Jury, target: float, most: float) -> tuple[list[_Layer], str]:
    """The least softness that reaches the target agreement, spent first where the layers' errors are largest.

    One dial for the whole network: the error that a layer may have. Each layer takes the least softness that keeps its
    estimated error under it, so layers that GroupNorm hardly disturbs stay pure.
    """
    if not jury.is_classifier:
        return layers, f"the target {target:g} cannot be judged: the network is no classifier"

    def agreement(candidate: Sequence[_Layer]) -> float:
        return jury.score([layer.decision for layer in candidate]).agreement or 0.0

    pure, soft = ([layer.softened(softness) for layer in layers] for softness in (0.0, most))
    reached = agreement(soft)
    if reached < target:
        note = (
            f"the target {target:g} is out of reach: softness {most:g} everywhere keeps the class of {reached:.3f} of "
            f"{len(jury.photos)} photos held out; more photos, fewer groups or a larger max_softness may help"
        )
        warnings.warn(note, UserWarning, stacklevel=4)
        return soft, note
    if agreement(pure) >= target:
        return pure, f"the target {target:g} is met by pure GroupNorm on {len(jury.photos)} photos held out"
    errors = [error for layer in layers if layer.free_softness for error in (layer.error(0.0), layer.error(most))]
    low, high = math.log(max(min(errors), 1e-6)), math.log(max(*errors, 1e-6))
    best = soft
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        candidate = [layer.within(math.exp(middle), most) for layer in layers]
        if agreement(candidate) >= target:
            best, low = candidate, middle
        else:
            high = middle
    spent = [layer.decision.softness for layer in best if layer.free_softness]
    return best, (
        f"the target {target:g} is met on {len(jury.photos)} photos held out; it cost a softness of "
        f"{sum(spent) / len(spent):.2g} on average, {max(spent):.2g} at most, and {spent.count(0.0)} layers stay pure"
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Layer:
    """A decision with the tables of the rows held out, from which its error is estimated; None where there are none."""

    decision: Decision
    free_softness: bool
    held: Tables | None
    eps: float

    @classmethod
    def of(cls, model: nn.Module, draft: Draft, statistics: ChannelStatistics, policy: Policy) -> _Layer:
        """The layer with the groups, order and signs that the statistics choose."""
        decision = draft.decision
        if decision.action == "keep" or not decision.standardise:
            return cls(decision, False, None, 0.0)
        moments = statistics.layers.get(decision.paths[0])
        state = read_norm(get(model, decision.paths[0]))
        if moments is None or len(moments.mean) < LEAST_SAMPLES:
            rows = 0 if moments is None else len(moments.mean)
            reason = f"photos choose nothing: {rows} samples reached the layer, {LEAST_SAMPLES} are needed"
            return cls(_because(decision, reason), draft.free_softness, None, state.eps)
        tables = moments.tables(state)
        layers = [
            cls(candidate, draft.free_softness, tables.rows(held_out(moments.sample)), state.eps)
            for candidate in _regrouped(decision, draft.free_groups)
        ]
        if policy.order != "natural":
            layers = [layer._arranged(tables, moments.sample) for layer in layers]
        best = min(layers, key=lambda layer: layer.error(layer.decision.softness))
        return best._with_error()

    def error(self, softness: float) -> float:
        """The estimated relative error of the layer's output at a softness."""
        if self.held is None:
            return 0.0
        arrangement = Arrangement(self.decision.channel_order, self.decision.signs)
        return relative_error(self.held, self.decision.num_groups, arrangement, self.eps, softness)

    def within(self, error: float, most: float) -> _Layer:
        """With the least softness, of 33 between 0 and `most`, at which the estimated error is below `error`."""
        low, high = 0, 32
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.error(most * middle / 32) <= error else (middle + 1, high)
        return self.softened(most * low / 32)

    def softened(self, softness: float) -> _Layer:
        """With another softness, where that is free."""
        if not self.free_softness:
            return self
        softer = dataclasses.replace(self.decision, softness=softness)
        return dataclasses.replace(
            self, decision=_because(softer, f"softness {softness:g} for the target")
        )._with_error()

    def _with_error(self) -> _Layer:
        if self.held is None:
            return self
        evidence = {**self.decision.evidence, "relative_error": self.error(self.decision.softness)}
        return dataclasses.replace(self, decision=dataclasses.replace(self.decision, evidence=evidence))

    def _arranged(self, tables: Tables, owner: Tensor) -> _Layer:
        """With order and signs, where they help on the samples held out."""
        decision, given = self.decision, self.decision.channel_order
        judged = arrange(tables, decision.num_groups, owner, given=given)
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
        return dataclasses.replace(self, decision=_because(decision, why))


def _regrouped(decision: Decision, free: bool) -> list[Decision]:
    """The numbers of groups to choose from: what was decided without photos, and one group."""
    if not free or decision.num_groups == 1:
        return [decision]
    return [decision, _because(dataclasses.replace(decision, num_groups=1), "one group is better on the photos")]


def _require_same(statistics: ChannelStatistics, fingerprint: str) -> None:
    if statistics.fingerprint != fingerprint:
        raise PlanMismatchError(
            "the statistics are of another model",
            where="calibration",
            expected=f"fingerprint {fingerprint[:12]}",
            found=statistics.fingerprint[:12],
            fix="Collect them with gnswap.calibrate on this model.",
        )


def _because(decision: Decision, reason: str) -> Decision:
    return dataclasses.replace(decision, reason=f"{decision.reason}; {reason}")
