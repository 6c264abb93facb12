"""One layer on its way from a decision without photos to one with them: each step is a copy with more decided."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

from torch import Tensor, nn

from gnswap._balance import balanced
from gnswap._estimate import Arrangement, Grouped, Tables, level, relative_error
from gnswap._moments import ChannelStatistics, Moments
from gnswap._norms import read_norm
from gnswap._order import arrange, held_out
from gnswap._records import Decision
from gnswap._sites import get

LEAST_SAMPLES = 8
"""Rows of a layer's tables below which they choose nothing for it."""


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


@dataclasses.dataclass(frozen=True, eq=False)
class TunedLayer:
    """A decision with the tables that its layer's error is estimated from; None where there are none.

    Attributes:
        decision: so far.
        free_groups, free_softness: what photos may choose.
        tables: of all rows.
        owner: which photo each row is of.
        viewed: tables of random views of the photos that do not judge.
        eps: of the norm.
        levelled: whether the decision's gain is the groups' level on the photos.
    """

    decision: Decision
    free_groups: bool = False
    free_softness: bool = False
    tables: Tables | None = None
    owner: Tensor | None = None
    viewed: Tables | None = None
    eps: float = 0.0
    levelled: bool = False

    @classmethod
    def of(
        cls, model: nn.Module, draft: Draft, statistics: ChannelStatistics, viewed: Mapping[str, Moments]
    ) -> TunedLayer:
        """The layer as it was decided without photos."""
        decision = draft.decision
        if decision.action == "keep" or not decision.standardise:
            return cls(decision)
        moments = statistics.layers.get(decision.paths[0])
        state = read_norm(get(model, decision.paths[0]))
        if moments is None or len(moments.mean) < LEAST_SAMPLES:
            rows = 0 if moments is None else len(moments.mean)
            reason = f"photos choose nothing: {rows} samples reached the layer, {LEAST_SAMPLES} are needed"
            return cls(_because(decision, reason), free_softness=draft.free_softness, eps=state.eps)
        more = viewed.get(decision.paths[0])
        layer = cls(
            decision,
            draft.free_groups,
            draft.free_softness,
            tables=moments.tables(state),
            owner=moments.sample,
            viewed=None if more is None else more.tables(state),
            eps=state.eps,
        )
        return layer._with_error()

    @functools.cached_property
    def held(self) -> Tables | None:
        """The rows held out."""
        return None if self.tables is None or self.owner is None else self.tables.rows(held_out(self.owner))

    @functools.cached_property
    def seen(self) -> Tables | None:
        """The other rows."""
        return None if self.tables is None or self.owner is None else self.tables.rows(~held_out(self.owner))

    def present_error(self) -> float:
        """The estimated relative error of the layer's output as it is decided."""
        return self.error(self.decision.softness)

    def error(self, softness: float) -> float:
        """The estimated relative error of the layer's output at a softness."""
        if self.held is None:
            return 0.0
        decided = softness == self.decision.softness
        gain = self.decision.gain if decided else self._gain_at(softness)
        return relative_error(self.held, self.decision.num_groups, self.arrangement, self.eps, softness, gain)

    def within(self, error: float, most: float) -> TunedLayer:
        """With the least softness, of 33 between 0 and `most`, at which the estimated error is below `error`."""
        low, high = 0, 32
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.error(most * middle / 32) <= error else (middle + 1, high)
        return self.softened(most * low / 32)

    def softened(self, softness: float) -> TunedLayer:
        """With another softness, where that is free, and with a balance for it where there is one."""
        if not self.free_softness:
            return self
        layer = dataclasses.replace(self, decision=dataclasses.replace(self.decision, softness=softness))
        why = f"softness {softness:g} for the target"
        if layer.decision.centre is not None:
            layer = layer._with_balance()
            why += (
                f", balanced for it, {layer.decision.evidence['constant_share']:.2g} of the group's variance constant"
            )
        decision = dataclasses.replace(layer.decision, gain=layer._gain_at(softness))
        return dataclasses.replace(layer, decision=_because(decision, why))._with_error()

    def with_level(self) -> TunedLayer:
        """With each group's output as large, in the mean, as it has to be on the photos."""
        if self.tables is None:
            return self
        levelled = dataclasses.replace(self, levelled=True)
        decision = dataclasses.replace(self.decision, gain=levelled._gain_at(self.decision.softness))
        return dataclasses.replace(levelled, decision=_because(decision, "level from photos"))._with_error()

    def without_level(self) -> TunedLayer:
        """With no gain."""
        return dataclasses.replace(
            self, levelled=False, decision=dataclasses.replace(self.decision, gain=None)
        )._with_error()

    def _gain_at(self, softness: float) -> tuple[float, ...] | None:
        if not self.levelled or self.seen is None:
            return None
        return tuple(level(self.seen, self.decision.num_groups, self.arrangement, self.eps, softness).tolist())

    @property
    def arrangement(self) -> Arrangement:
        """The decision's."""
        decision = self.decision
        return Arrangement(decision.channel_order, decision.signs, decision.loudness, decision.centre)

    def balanced(self) -> TunedLayer:
        """With a loudness and a centre for each channel, in the way its groups are now."""
        layer = self._with_balance()
        if layer.decision.centre is None:
            return self
        share = layer.decision.evidence["constant_share"]
        why = f"channels balanced on photos, {share:.2g} of the group's variance constant"
        return dataclasses.replace(layer, decision=_because(layer.decision, why))

    def _with_balance(self) -> TunedLayer:
        if self.seen is None:
            return self
        decision = self.decision
        found = balanced(self.seen, decision.num_groups, self.arrangement, self.eps, decision.softness)
        if found.centre is None:
            return self
        constant = float(Grouped.of(self.seen, decision.num_groups, found).constant_share().mean())
        decision = dataclasses.replace(
            decision,
            loudness=found.loudness,
            centre=found.centre,
            evidence={**decision.evidence, "constant_share": constant},
        )
        return dataclasses.replace(self, decision=decision)

    def _with_error(self) -> TunedLayer:
        if self.held is None:
            return self
        evidence = {**self.decision.evidence, "relative_error": self.present_error()}
        return dataclasses.replace(self, decision=dataclasses.replace(self.decision, evidence=evidence))

    def in_one_group(self) -> TunedLayer:
        """With one group, where the number of groups is free."""
        if not self.free_groups or self.tables is None or self.decision.num_groups == 1:
            return self
        merged = dataclasses.replace(self.decision, num_groups=1)
        return dataclasses.replace(self, decision=_because(merged, "one group on the photos"))._with_error()

    def arranged(self) -> TunedLayer:
        """With order and signs, where they help on the samples held out."""
        if self.tables is None or self.owner is None:
            return self
        decision, given = self.decision, self.decision.channel_order
        judged = arrange(self.tables, decision.num_groups, self.owner, given=given, views=self.viewed)
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
        return dataclasses.replace(self, decision=_because(decision, why))._with_error()


def _because(decision: Decision, reason: str) -> Decision:
    return dataclasses.replace(decision, reason=f"{decision.reason}; {reason}")
