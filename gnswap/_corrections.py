r"""Paired corrections: a gain and an offset for each channel, so that its output lies and varies as the original's.

The same photos go through the network as it was and as it is converted, at once, in one batch of two halves. At each
norm the standardised input of the original, :math:`\hat x`, meets what the converted norm makes of its own, u; the
correction is the ratio of their standard deviations and the difference that is left between their means. Photo by
photo the two halves share all their randomness, so a few dozen photos say a lot about the difference.

Why layer by layer within each batch: a norm's correction is fitted, from all batches so far, before the batch goes on,
so the norms behind it see it in force. Fitted all at once instead, every norm makes up for the same shift that the
first one has made up for already: on EfficientNet-Lite0, one group, offsets alone took agreement from .79 to .67.

Why the ratio of deviations and no regression: regressing a disturbed signal on a clean one shrinks it, layer after
layer. Why shrinkage: a channel's own estimate is noisy, so it is drawn towards what all channels of its layer share,
as far as its scatter over the photos demands (empirical Bayes). Why judged at the network's output and on other
photos: a correction can lower the error of nearly every layer and still ruin the answers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import ops
from gnswap._build import build_layer, constants_of
from gnswap._norms import NormState, read_norm
from gnswap._progress import shown
from gnswap._records import Decision
from gnswap._running import ROWS, batched, eval_mode, placed
from gnswap._sites import get
from gnswap._trial import Jury, Score

_PASSES = 2  # in the second, every batch meets corrections from all the others
_GAIN = (0.5, 1.5)  # bounds of a gain
_STRENGTHS = (1.0, 0.5)
_WORTH = 0.98  # corrections have to bring the distance below this share of what it was


@dataclasses.dataclass(frozen=True)
class Trial:
    """What corrections would bring.

    Attributes:
        decisions: without them.
        strength: the best; None where they do not help.
        distance: of the answers with corrections of that strength, on photos that they were not fitted on.
        agreement: share of these photos with the original's class; None where the network is no classifier.
        note: the same in words.
    """

    decisions: tuple[Decision, ...]
    strength: float | None
    distance: float
    agreement: float | None
    note: str


def tried(decisions: Sequence[Decision], juries: tuple[Jury, Jury]) -> Trial:
    """Find out what corrections bring: two halves of the photos are corrected on and judged on in turn.

    Args:
        decisions: what is to be corrected.
        juries: with the original network, one for each half; which photo is in which has no meaning.

    Returns:
        How far the answers are from the original's, and whether corrections help.
    """
    fitted = [_fitted(other.model, decisions, other.photos) for other in reversed(juries)]
    before = _average([jury.score(decisions) for jury in juries])
    after = {
        strength: _average(
            [jury.score(_at(strength, decisions, found)) for jury, found in zip(juries, fitted, strict=True)]
        )
        for strength in _STRENGTHS
    }
    strength = min(_STRENGTHS, key=lambda one: after[one].distance)
    best = after[strength]
    judged = f"{before.distance:.3g} to {best.distance:.3g} on photos that they were not fitted on"
    if not best.distance < _WORTH * before.distance:
        note = f"no paired corrections: they would take the distance of the answers from {judged}"
        return Trial(tuple(decisions), None, before.distance, before.agreement, note)
    how = "paired corrections" if strength == 1 else f"paired corrections at strength {strength:g}"
    note = f"{how}: distance of the answers from {judged}"
    return Trial(tuple(decisions), strength, best.distance, best.agreement, note)


def _average(scores: Sequence[Score]) -> Score:
    distance = sum(score.distance for score in scores) / len(scores)
    agreements = [score.agreement for score in scores if score.agreement is not None]
    return Score(distance, sum(agreements) / len(agreements) if agreements else None)


def corrected(model: nn.Module, trial: Trial, photos: Sequence[Tensor]) -> list[Decision]:
    """The decisions of a trial with corrections fitted on these photos, where those help; else as they are."""
    if trial.strength is None:
        return list(trial.decisions)
    return _at(trial.strength, trial.decisions, _fitted(model, trial.decisions, photos))


def _at(strength: float, decisions: Sequence[Decision], fitted: Sequence[Decision]) -> list[Decision]:
    """Part of the way from the decisions as they are to the fitted ones: gains in the logarithm, offsets straight."""
    moved = []
    for before, after in zip(decisions, fitted, strict=True):
        if after.gain is None or after.offset is None:
            moved.append(after)
            continue
        old = before.gain or (1.0,) * len(after.gain)
        gain = tuple(a ** (1 - strength) * b**strength for a, b in zip(old, after.gain, strict=True))
        offset = tuple(strength * value for value in after.offset)
        moved.append(dataclasses.replace(after, gain=gain, offset=offset))
    return moved


def _fitted(model: nn.Module, decisions: Sequence[Decision], photos: Sequence[Tensor]) -> list[Decision]:
    """The decisions with all corrections, whether they help or not."""
    pairs: dict[int, _Pair] = {}
    with eval_mode(model), torch.no_grad(), contextlib.ExitStack() as hooks:
        for index, decision in enumerate(decisions):
            if decision.action == "swap":
                norm = get(model, decision.paths[0])
                if decision.standardise and (state := read_norm(norm)).running_var is not None:
                    pairs[index] = _Pair(norm, state, decision)
                    hooks.callback(norm.register_forward_hook(pairs[index], prepend=True).remove)
        for turn in range(_PASSES):
            for pair in pairs.values():
                pair.turn = 0
            text = f"correcting on {len(photos)} photos, pass {turn + 1} of {_PASSES}"
            for batch in shown(batched(photos, ROWS), text, -(-len(photos) // ROWS)):
                model(placed(torch.cat([batch, batch]), model))
    return [pairs[index].decision if index in pairs else decision for index, decision in enumerate(decisions)]


class _Pair:
    """A hook under which a norm answers the first half of a batch itself, and its corrected GroupNorm the second.

    Attributes:
        decision: with the corrections so far.
        turn: how many calls there were in this pass; a call takes the place of the same one in the pass before.
    """

    def __init__(self, norm: nn.Module, state: NormState, decision: Decision) -> None:
        self.norm, self.state, self.decision = norm, state, decision
        self.plain = build_layer(norm, decision).eval()
        constants = constants_of(state, decision)
        self.factor = constants.gain if constants.quieter is None else constants.gain * constants.quieter
        self.constant = None if constants.constant is None else -constants.constant
        self.tables: list[Tensor] = []  # a call: mean of x̂, of x̂², of u, of u² over the positions, [4, rows, C]
        self.turn = 0

    def __call__(self, _norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        half = len(inputs[0]) // 2
        theirs, ours = inputs[0][:half], inputs[0][half:]
        layer, mean, var = self.plain, self.state.running_mean, self.state.running_var
        assert mean is not None
        assert var is not None
        per_channel = (-1,) + (1,) * (theirs.ndim - 2)
        scale = (var.double() + self.state.eps).rsqrt().float()
        xhat = (theirs.float() - mean.float().view(per_channel)) * scale.view(per_channel)
        u = ops.group_norm(
            ours,
            layer.num_groups,
            self.factor,
            self.constant,
            layer.eps + layer.softness,
            channel_scale=layer.channel_scale,
            channel_shift=layer.channel_shift,
            channel_order=layer.channel_order,
        ).float()
        table = torch.stack([_mean(part) for part in (xhat, xhat.square(), u, u.square())]).cpu()
        self.tables[self.turn : self.turn + 1] = [table]
        self.turn += 1
        self.decision = self._corrected()
        corrected = build_layer(self.norm, self.decision).eval()
        return torch.cat([output[:half], corrected(ours, *(extra[half:] for extra in inputs[1:]))])

    def _corrected(self) -> Decision:
        tables = torch.cat(self.tables, 1).double()
        var, gamma = self.state.running_var, self.state.weight
        assert var is not None
        energy = (var / (var + self.state.eps)).double().cpu()
        gamma = torch.ones_like(energy) if gamma is None else gamma.detach().double().cpu()
        weight = energy * gamma.square() + 1e-12
        gain = _gains(tables, weight)
        offset = _offsets(tables, weight, gain) * gamma
        return dataclasses.replace(self.decision, gain=tuple(gain.tolist()), offset=tuple(offset.tolist()))


def _gains(tables: Tensor, weight: Tensor) -> Tensor:
    """Ratio of the standard deviations of x̂ and of u, shrunk towards the layer's own: `[4, N, C]` to `[C]`."""
    mean, square, our_mean, our_square = tables
    theirs, ours = (_deviations(pair) for pair in ((mean, square), (our_mean, our_square)))
    total = ours.sum(0).clamp_min(1e-8 * len(ours))
    ratio = theirs.sum(0).clamp_min(0) / total
    noise = (theirs - ratio * ours).square().sum(0) / total.square() + 1e-9  # variance of the ratio
    gain = ratio.sqrt()
    noise = noise / (4 * ratio).clamp_min(1e-3)
    shared = (weight * gain.clamp(0, 3)).sum() / weight.sum()
    spread = (weight * ((gain - shared).clamp(-1, 1).square() - noise.clamp_max(4))).sum() / weight.sum()
    spread = spread.clamp_min(0)
    return (shared + (gain - shared) * spread / (spread + noise)).clamp(*_GAIN)


def _deviations(pair: tuple[Tensor, Tensor]) -> Tensor:
    """Each sample's mean squared deviation from the mean over all samples."""
    mean, square = pair
    centre = mean.mean(0)
    return square - 2 * centre * mean + centre.square()


def _offsets(tables: Tensor, weight: Tensor, gain: Tensor) -> Tensor:
    """What is left between the means of x̂ and of gain·u, shrunk towards 0: `[4, N, C]` to `[C]`."""
    difference = tables[0] - gain * tables[2]
    mean = difference.mean(0)
    # one photo says nothing about its scatter
    noise = difference.var(0) / len(difference) + 1e-9 if len(difference) > 1 else torch.full_like(mean, torch.inf)
    spread = ((weight * (mean.square() - noise)).sum() / weight.sum()).clamp_min(0)
    return mean * spread / (spread + noise)


def _mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2) if x.ndim > 2 else x
