"""Choosing by photos: groups, order, signs, softness and corrections, from one pass and a few looks at the answers.

Two kinds of evidence. What belongs to one layer (its groups, order and signs) is searched in the statistics of one
pass, by closed forms. What only shows at the network's output (whether those choices together help, how soft it has to
be, whether corrections help) is tried out there, on the photos that the search did not see. Whether balance helps
(`_balance`) is asked with the corrections on top of it, because they make up for part of what it would.

Why random views of the photos take part in the search (`_views`: crops, colours, blends of two): layers have more
channels than there are photos, and what the search makes of 48 photos' fluctuation does not all hold on others.
Why not in the levels: they bring EfficientNet-Lite0 with 8 groups from KL .608 to .545, and ruin a network of our own
of the MobileNet kind (8 groups, agreement .656 to .501).

Why nothing is made up where there are no photos: order and signs from 64 synthetic pictures (dead leaves with 1/f
noise) did not carry over to photos. Pure GroupNorm, agreement (KL) on 96 photos, natural order against that one:
EfficientNet-Lite0 .604 (.756) against .625 (.775) at 8 groups, .479 (1.38) against .490 (1.47) at 32; -Lite1
.542 (.689) against .635 (.562) at 8, .427 (1.00) against .427 (1.18) at 32.

What else was tried, on EfficientNet-Lite0, 8 groups, softness 0, 128 photos, KL on 96 others; none is built in:
weights on the channels by their energy on the photos (.555 to .79 and worse); statistics collected in the converted
network in place of the original (no better). What a norm gets wrong by a factor is in part divided out
by the next norm, what it adds is not: so layers' errors do not tell all, and candidates are judged at the output.

Why this is not in `plan` itself: a plan without photos rests on arithmetic alone, and reads as such.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._corrections import corrected, tried
from gnswap._errors import PlanMismatchError
from gnswap._moments import ChannelStatistics, Moments, collect
from gnswap._order import held_out
from gnswap._policy import Policy
from gnswap._progress import shown
from gnswap._records import Decision
from gnswap._running import ROWS, batched, photos_in
from gnswap._trial import Jury
from gnswap._tuned_layer import LEAST_SAMPLES, Draft, TunedLayer
from gnswap._views import views

_WORTH = 0.95  # balance has to bring the distance below this share of what it is without
_VIEWS = 2  # of each photo, for the search of order and signs
_BISECTIONS = 4  # forward passes over the held-out photos to place the dial between pure and soft


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
    learned = [photo for photo, judges in zip(photos, apart, strict=False) if not judges]
    viewed = _of_views(model, learned)
    known = [TunedLayer.of(model, draft, statistics, viewed) for draft in drafts]
    candidates = _candidates(known, policy)
    notes = [f"chosen on {statistics.samples - sum(apart)} photos and judged on {sum(apart)} others"]
    notes += _unreached(drafts, statistics)
    if not photos or not any(layer.decision.action == "swap" for layer in known):
        *_, layers = candidates.values()
        return [layer.with_level().decision for layer in layers], notes
    jury = Jury(model, [photo for photo, judges in zip(photos, apart, strict=True) if judges])
    layers, note = _best(candidates, jury)
    notes.append(note)
    rivals = [layers]
    if policy.order != "natural":
        balanced_layers, note = _balanced(layers, jury)
        notes.append(note)
        rivals.append(balanced_layers)
    halves = (Jury(model, photos[::2]), Jury(model, photos[1::2])) if len(photos) >= 2 * LEAST_SAMPLES else None
    if policy.fidelity is not None or halves is None:
        layers = min(rivals, key=lambda one: jury.score(_decisions(one)).distance)
        if policy.fidelity is not None and not jury.is_classifier:
            notes.append(f"the target {policy.fidelity:g} cannot be judged: the network is no classifier")
        elif policy.fidelity is not None:
            agreement = _agreement(halves or Jury(model, photos))
            layers, note = _soft_enough(layers, agreement, policy.fidelity, policy.max_softness, len(photos))
            notes.append(note)
        rivals = [layers]
    if halves is None:
        return _decisions(layers), notes
    trials = [tried(_decisions(one), halves) for one in rivals]
    best = trials[0]
    if len(trials) > 1:
        plain, balanced = trials
        best = balanced if balanced.distance < _WORTH * plain.distance else plain
        notes.append(
            f"taken: {'balanced' if best is balanced else 'not balanced'}; distance of the answers with what "
            f"corrections bring: {plain.distance:.3g} not balanced, {balanced.distance:.3g} balanced"
        )
    # not on all: what refits or heals this network judges itself on the photos held out
    return corrected(model, best, learned), [*notes, best.note]


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


def _candidates(known: Sequence[TunedLayer], policy: Policy) -> dict[str, list[TunedLayer]]:
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
        candidates["groups layer by layer"] = [min(pair, key=TunedLayer.present_error) for pair in pairs]
    return candidates


def _best(candidates: dict[str, list[TunedLayer]], jury: Jury) -> tuple[list[TunedLayer], str]:
    """The candidate whose answers to the photos held out are nearest to the original's, the first of equal ones."""
    with_levels = {f"{name}, levels": [layer.with_level() for layer in one] for name, one in candidates.items()}
    return _best_of({**candidates, **with_levels}, jury)


def _best_of(candidates: dict[str, list[TunedLayer]], jury: Jury) -> tuple[list[TunedLayer], str]:
    distances = {
        name: jury.score(_decisions(layers)).distance
        for name, layers in shown(candidates.items(), "trying out at the network's output", len(candidates))
    }
    best = min(distances, key=distances.__getitem__)
    compared = ", ".join(f"{distance:.3g} {name}" for name, distance in distances.items())
    return candidates[best], f"taken: {best}; distance of the answers on the photos held out: {compared}"


def _balanced(layers: list[TunedLayer], jury: Jury) -> tuple[list[TunedLayer], str]:
    """With loudness and centres, and the groups' levels where the answers to the photos held out speak for them."""
    found = [layer.balanced() for layer in shown(layers, "balancing the channels of each group")]
    candidates = {
        "balanced": [layer.without_level() for layer in found],
        "balanced, levels": [layer.with_level() for layer in found],
    }
    shares = [layer.decision.evidence["constant_share"] for layer in found if layer.decision.centre is not None]
    best, note = _best_of(candidates, jury)
    constant = sum(shares) / max(len(shares), 1)
    return best, f"{note}; {constant:.2g} of a balanced group's variance is a constant, on average"


def _decisions(layers: Sequence[TunedLayer]) -> list[Decision]:
    return [layer.decision for layer in layers]


def _agreement(photos: Jury | tuple[Jury, Jury]) -> Callable[[Sequence[TunedLayer]], float]:
    """Of all photos: of two halves, each with corrections fitted on the other one."""
    if isinstance(photos, Jury):
        return lambda candidate: photos.score(_decisions(candidate)).agreement or 0.0
    return lambda candidate: tried(_decisions(candidate), photos).agreement or 0.0


def _soft_enough(
    layers: list[TunedLayer],
    agreement: Callable[[Sequence[TunedLayer]], float],
    target: float,
    most: float,
    photos: int,
) -> tuple[list[TunedLayer], str]:
    """The least softness that reaches the target agreement, spent first where the layers' errors are largest.

    One dial for the whole network: the error that a layer may have. Each layer takes the least softness that keeps its
    estimated error under it, so layers that GroupNorm hardly disturbs stay pure.

    Why all photos judge and not only those held out: these are too few. On EfficientNet-Lite1 16 of them met .97 at a
    softness at which .875 of 96 others did; .938 of all 64 did. A single number has little room to overfit.
    """
    pure, soft = ([layer.softened(softness) for layer in layers] for softness in (0.0, most))
    reached = agreement(soft)
    if reached < target:
        note = (
            f"the target {target:g} is out of reach: softness {most:g} everywhere keeps the class of {reached:.3f} of "
            f"{photos} photos; more photos, fewer groups or a larger max_softness may help"
        )
        warnings.warn(note, UserWarning, stacklevel=4)
        return soft, note
    if agreement(pure) >= target:
        return pure, f"the target {target:g} is met by pure GroupNorm on {photos} photos"
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
        f"the target {target:g} is met on {photos} photos; it cost a softness of "
        f"{sum(spent) / len(spent):.2g} on average, {max(spent):.2g} at most, and {spent.count(0.0)} layers stay pure"
    )


def _require_same(statistics: ChannelStatistics, fingerprint: str) -> None:
    if statistics.fingerprint != fingerprint:
        raise PlanMismatchError(
            "the statistics are of another model",
            where="calibration",
            expected=f"fingerprint {fingerprint[:12]}",
            found=statistics.fingerprint[:12],
            fix="Collect them with gnswap.calibrate on this model.",
        )
