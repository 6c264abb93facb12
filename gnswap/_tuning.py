"""Choosing by photos: groups, order, signs, softness and corrections, from one pass and a few looks at the answers.

Two kinds of evidence. What belongs to one layer (its groups, order and signs) is searched in the statistics of one
pass, by closed forms. What only shows at the network's output (whether those choices together help, how soft it has to
be, whether corrections help) is tried out there, on the photos that the search did not see.

Why random views of the photos take part in the search (`_views`: crops, colours, blends of two): layers have more
channels than there are photos, and what the search makes of 48 photos' fluctuation does not all hold on others.
Why not in the levels: they bring EfficientNet-Lite0 with 8 groups from KL .608 to .545, and ruin a network of our own
of the MobileNet kind (8 groups, agreement .656 to .501).

Why nothing is made up where there are no photos: order and signs from 64 synthetic pictures (dead leaves with 1/f
noise) did not carry over to photos. Pure GroupNorm, agreement (KL) on 96 photos, natural order against that one:
EfficientNet-Lite0 .604 (.756) against .625 (.775) at 8 groups, .479 (1.38) against .490 (1.47) at 32; -Lite1
.542 (.689) against .635 (.562) at 8, .427 (1.00) against .427 (1.18) at 32.

What else was tried, on EfficientNet-Lite0, 8 groups, softness 0, 128 photos, KL on 96 others; none is built in:
weights on the channels by their energy on the photos (.555 to .79 and worse); constants in the channels' shifts that
cancel the fluctuation of the group's variance, by ridge regression (each layer's error falls to a half or less, the
answers' distance to .48 for a tenth of the variance constant, less than the same softness gains); statistics collected
in the converted network in place of the original (no better). What a norm gets wrong by a factor is in part divided out
by the next norm, what it adds is not: so layers' errors do not tell all, and candidates are judged at the output.

Why this is not in `plan` itself: a plan without photos rests on arithmetic alone, and reads as such.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._corrections import corrected
from gnswap._errors import PlanMismatchError
from gnswap._moments import ChannelStatistics, Moments, collect
from gnswap._norms import read_norm
from gnswap._order import Arrangement, Tables, arrange, held_out, level, relative_error
from gnswap._policy import Policy
from gnswap._progress import shown
from gnswap._records import Decision
from gnswap._running import ROWS, batched, photos_in
from gnswap._sites import get
from gnswap._trial import Jury
from gnswap._views import views

LEAST_SAMPLES = 8
"""Rows of a layer's tables below which they choose nothing for it."""


_VIEWS = 2  # of each photo, for the search of order and signs
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
    apart = held_out(torch.arange(statistics.samples)).tolist()
    viewed = _of_views(model, [photo for photo, judges in zip(photos, apart, strict=False) if not judges])
    known = [_Layer.of(model, draft, statistics, viewed) for draft in drafts]
    candidates = _candidates(known, policy)
    notes = [f"chosen on {statistics.samples - sum(apart)} photos and judged on {sum(apart)} others"]
    notes += _unreached(drafts, statistics)
    if not photos or not any(layer.decision.action == "swap" for layer in known):
        *_, layers = candidates.values()
        return [layer.with_level().decision for layer in layers], notes
    jury = Jury(model, [photo for photo, judges in zip(photos, apart, strict=True) if judges])
    layers, note = _best(candidates, jury)
    notes.append(note)
    if policy.fidelity is not None:
        layers, note = _soft_enough(layers, jury, policy.fidelity, policy.max_softness)
        notes.append(note)
    decisions = [layer.decision for layer in layers]
    if len(photos) >= 2 * LEAST_SAMPLES:
        decisions, note = corrected(model, decisions, photos)
        notes.append(note)
    return decisions, notes


def _of_views(model: nn.Module, photos: Sequence[Tensor]) -> Mapping[str, Moments]:
    """Tables of random views of the photos, by a norm's first path; none where there are no photos, or no pictures."""
    if not photos or not all(photo.is_floating_point() for photo in photos):
        return {}
    batches = (
        views(batch, torch.Generator().manual_seed(turn << 32 | index))
        for turn in range(_VIEWS)
        for index, batch in enumerate(batched(photos, ROWS))
    )
    return collect(model, batches).layers


def _unreached(drafts: Sequence[Draft], statistics: ChannelStatistics) -> list[str]:
    """A note on norms that forward does not run: heads for training only, or somebody reads their statistics."""
    swapped = [draft.decision for draft in drafts if draft.decision.action == "swap" and draft.decision.standardise]
    names = [decision.name for decision in swapped if decision.paths[0] not in statistics.layers]
    if not names:
        return []
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"no photo reached {names[0]}{more}: exclude what is used outside of forward, for its statistics say"]


def _candidates(known: Sequence[_Layer], policy: Policy) -> dict[str, list[_Layer]]:
    """Ways to convert the whole network, by name; the last is the one that the layers' own errors speak for.

    Why several: a lever can lower the error of nearly every layer and still move the answers away. Which way is taken
    is for the network's output to say; `_best` asks it.
    """
    searched = policy.order != "natural"
    as_drafted, in_one = list(known), [layer.in_one_group() for layer in known]
    candidates = {"as without photos": as_drafted}
    if searched:
        as_drafted = [layer.arranged() for layer in shown(known, "searching order and signs")]
        candidates["order and signs"] = as_drafted
    if any(one is not layer for one, layer in zip(in_one, known, strict=True)):
        if searched:
            in_one = [
                layer.arranged() if layer is not drafted else chosen
                for layer, drafted, chosen in zip(
                    shown(in_one, "searching signs of one group"), known, as_drafted, strict=True
                )
            ]
        candidates["in one group" + ", signs" * searched] = in_one
        pairs = zip(as_drafted, in_one, strict=True)
        candidates["groups layer by layer"] = [min(pair, key=_Layer.present_error) for pair in pairs]
    return candidates


def _best(candidates: dict[str, list[_Layer]], jury: Jury) -> tuple[list[_Layer], str]:
    """The candidate whose answers to the photos held out are nearest to the original's, the first of equal ones."""
    with_levels = {f"{name}, levels": [layer.with_level() for layer in one] for name, one in candidates.items()}
    candidates = {**candidates, **with_levels}
    distances = {
        name: jury.score([layer.decision for layer in layers]).distance
        for name, layers in shown(candidates.items(), "trying out at the network's output", len(candidates))
    }
    best = min(distances, key=distances.__getitem__)
    compared = ", ".join(f"{distance:.3g} {name}" for name, distance in distances.items())
    return candidates[best], f"taken: {best}; distance of the answers on the photos held out: {compared}"


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
    def of(cls, model: nn.Module, draft: Draft, statistics: ChannelStatistics, viewed: Mapping[str, Moments]) -> _Layer:
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
        arrangement = Arrangement(self.decision.channel_order, self.decision.signs)
        decided = softness == self.decision.softness
        gain = self.decision.gain if decided else self._gain_at(softness)
        return relative_error(self.held, self.decision.num_groups, arrangement, self.eps, softness, gain)

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
        softer = dataclasses.replace(self.decision, softness=softness, gain=self._gain_at(softness))
        return dataclasses.replace(
            self, decision=_because(softer, f"softness {softness:g} for the target")
        )._with_error()

    def with_level(self) -> _Layer:
        """With each group's output as large, in the mean, as it has to be on the photos."""
        if self.tables is None:
            return self
        levelled = dataclasses.replace(self, levelled=True)
        decision = dataclasses.replace(self.decision, gain=levelled._gain_at(self.decision.softness))
        return dataclasses.replace(levelled, decision=_because(decision, "level from photos"))._with_error()

    def _gain_at(self, softness: float) -> tuple[float, ...] | None:
        if not self.levelled or self.seen is None:
            return None
        arrangement = Arrangement(self.decision.channel_order, self.decision.signs)
        return tuple(level(self.seen, self.decision.num_groups, arrangement, self.eps, softness).tolist())

    def _with_error(self) -> _Layer:
        if self.held is None:
            return self
        evidence = {**self.decision.evidence, "relative_error": self.present_error()}
        return dataclasses.replace(self, decision=dataclasses.replace(self.decision, evidence=evidence))

    def in_one_group(self) -> _Layer:
        """With one group, where the number of groups is free."""
        if not self.free_groups or self.tables is None or self.decision.num_groups == 1:
            return self
        merged = dataclasses.replace(self.decision, num_groups=1)
        return dataclasses.replace(self, decision=_because(merged, "one group on the photos"))._with_error()

    def arranged(self) -> _Layer:
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
