"""Trying a conversion out: a network that answers as converted for a while, and how good its answers are.

Why hooks and no converted copy: choosing tries many plans, a copy of the network for each would cost more than the
forward passes, and hooks leave the user's module tree as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap._build import build_layer
from gnswap._layer import FusedGroupNorm
from gnswap._order import held_out
from gnswap._records import Decision
from gnswap._running import ROWS, answered, batched, eval_mode, flat
from gnswap._sites import get

Answers = Sequence[Sequence[Tensor]]
"""Every floating output of a network, batch by batch."""
_MOST_JUDGES = 64  # photos held out; more would cost time and decide nothing


def judges(count: int) -> list[bool]:
    """Which of so many photos are held out: those that judge a plan made from the same photos, too."""
    apart = held_out(torch.arange(count))
    return (apart & (apart.cumsum(0) <= _MOST_JUDGES)).tolist()


def parted(photos: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The photos to learn from, as one batch, and those that judge (`judges`); given as single samples `[1, ...]`."""
    apart = judges(len(photos))
    learned, judging = (
        [photo for photo, is_apart in zip(photos, apart, strict=True) if is_apart is wanted] for wanted in (False, True)
    )
    return torch.cat(learned), judging


@contextlib.contextmanager
def converted(model: nn.Module, decisions: Iterable[Decision]) -> Iterator[None]:
    """Within the block every swapped norm of `model` answers as the GroupNorm that its decision asks for."""
    with contextlib.ExitStack() as hooks:
        for decision in decisions:
            if decision.action == "swap":
                norm = get(model, decision.paths[0])
                answer = _Answer(build_layer(norm, decision).eval())
                hooks.callback(norm.register_forward_hook(answer, prepend=True).remove)
        yield


class _Answer:
    """A hook that answers in a norm's place."""

    def __init__(self, layer: FusedGroupNorm) -> None:
        self.layer = layer

    def __call__(self, _norm: nn.Module, inputs: tuple[Any, ...], _output: Any) -> Tensor:
        answer: Tensor = self.layer(*inputs)
        return answer


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a conversion's answers match the original's.

    Attributes:
        distance: what choices minimise: mean KL(original ‖ converted) in nats of a classifier, else the squared
            relative error of the outputs. Infinite where an answer is not finite.
        agreement: share of samples with the same top-1 class; None where the network is no classifier.
    """

    distance: float
    agreement: float | None

    def change(self, after: Score) -> str:
        """From this score to a later one, in words."""
        words = f"distance {self.distance:.3g} to {after.distance:.3g}"
        if self.agreement is None or after.agreement is None:
            return words
        return f"{words}, agreement {self.agreement:.3f} to {after.agreement:.3f}"


class Jury:
    """Photos with the original network's answers to them, against which conversions are scored.

    Args:
        model: the original network.
        photos: single samples `[1, ...]`.
    """

    def __init__(self, model: nn.Module, photos: Sequence[Tensor]) -> None:
        self.model, self.photos = model, photos
        self.expected = answers(model, photos)
        first = self.expected[0]
        self.is_classifier = (
            getattr(model, "num_classes", None) != 0
            and all(len(answer) == 1 for answer in self.expected)
            and first[0].ndim == 2
            and first[0].shape[1] > 1
        )

    def score(self, decisions: Iterable[Decision]) -> Score:
        """Run the network as converted on all the photos."""
        with converted(self.model, decisions):
            return self.judge(answers(self.model, self.photos))

    def judge(self, found: Answers) -> Score:
        """Score what `answers` gave for another network on all the photos."""
        pairs = self._pairs(found)
        if not all(bool(ours.isfinite().all()) for _, ours in pairs):
            return Score(float("inf"), 0.0 if self.is_classifier else None)
        if not self.is_classifier:
            return Score(_squared_error(pairs), None)
        theirs, ours = (torch.cat(side) for side in zip(*pairs, strict=True))
        distance = _divergences(theirs, ours).mean()
        return Score(float(distance), float((theirs.argmax(1) == ours.argmax(1)).double().mean()))

    def prefers(self, found: Answers, before: Answers) -> tuple[bool, str]:
        """Whether answers are nearer to the original's than others are, as far as so few photos can tell; a note on it.

        By their distance. Where that of a classifier has changed by less than its standard error over the photos, by
        the squared error of the logits instead: the KL divergence of a few photos is that of the one or two that the
        network is least sure of, while every photo and class has a part in the squared error. On 16 photos the
        divergence refused new weights (`refit`) that brought it from .099 to .064 and from .193 to .168 on others.
        """
        one, two = self.judge(found), self.judge(before)
        if not self.is_classifier or not (math.isfinite(one.distance) and math.isfinite(two.distance)):
            return one.distance < two.distance, ""
        ours, others = ([(_centred(a), _centred(b)) for a, b in self._pairs(side)] for side in (found, before))
        change = torch.cat([_divergences(*pair) for pair in ours]) - torch.cat([_divergences(*pair) for pair in others])
        if len(change) < 2 or change.mean().abs() > change.std() / math.sqrt(len(change)):
            return bool(change.mean() < 0), ""
        errors = _squared_error(others), _squared_error(ours)
        note = (
            f"within its standard error, so the squared error of the logits decides: {errors[0]:.3g} to {errors[1]:.3g}"
        )
        return errors[1] < errors[0], note

    def _pairs(self, found: Answers) -> list[tuple[Tensor, Tensor]]:
        return [pair for one, two in zip(self.expected, found, strict=True) for pair in zip(one, two, strict=True)]


def _divergences(theirs: Tensor, ours: Tensor) -> Tensor:
    """KL(theirs ‖ ours) of each row of logits."""
    return F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(1)


def _squared_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Of the second of each pair, over the squared size of the first."""
    sums = [(float((ours - theirs).square().sum()), float(theirs.square().sum())) for theirs, ours in pairs]
    return sum(error for error, _ in sums) / max(sum(size for _, size in sums), 1e-30)


def _centred(logits: Tensor) -> Tensor:
    """What of logits has a meaning: a constant added to all of them changes nothing."""
    return logits - logits.mean(1, keepdim=True)


def answers(model: nn.Module, photos: Iterable[Tensor]) -> list[list[Tensor]]:
    """Every floating output of a network for each batch of `ROWS` photos, in fp64 on the CPU."""
    with eval_mode(model), torch.no_grad():
        return [[output.cpu().double() for output in flat(answered(model, batch))] for batch in batched(photos, ROWS)]
