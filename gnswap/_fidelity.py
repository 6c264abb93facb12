"""How far a converted network's answers are from the original's, on real inputs.

A statistical report (how much of the function survived), not to be confused with `Parity`, the numerical question
whether an exported file computes what the converted network computes.

Everything is a sum over photos, kept in fp64 and added up batch by batch: only the norms' outputs of a few photos are
held, and the result does not depend on how the photos were split into batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap._errors import ArgumentError
from gnswap._layer import FusedGroupNorm
from gnswap._pairs import Pairs
from gnswap._record import Record
from gnswap._running import answered, chunks, eval_mode, flat, no_photos
from gnswap._sites import applied

SURE = 0.5  # top-1 probability above which the original is called sure
_ROWS = 8  # photos at a time while layers are compared: all norms' outputs of so many are held at once


@dataclasses.dataclass(frozen=True)
class LayerError(Record):
    """How far one swapped norm's output is from the BatchNorm's, with each network fed its own activations.

    Attributes:
        name: the layer's path.
        relative_error: ‖converted − original‖ / ‖original‖ over all photos, positions and channels.
        gain: ⟨converted, original⟩ / ⟨original, original⟩: 1 where the output is right on average, below 1
            where it is too small or turned away.
    """

    name: str
    relative_error: float
    gain: float


@dataclasses.dataclass(frozen=True)
class Fidelity(Record):
    """A converted network compared with its original.

    Attributes:
        photos: number of inputs (rows of all batches).
        agreement: share of photos with the same top-1 class; None where the network is no classifier (its output
            is not `[N, classes]`).
        sure: number of photos where the original's top-1 probability is above 0.5.
        agreement_sure: agreement on those; None where there are none.
        kl: mean KL(original ‖ converted) of the class probabilities, in nats; None for no classifier.
        logit_error: ‖converted − original‖ / ‖original‖ over all outputs.
        layers: the error of every swapped norm, in the order of the network.
        labelled: number of photos that came with a label.
        accuracy_original, accuracy_converted: share of those that each network gets right; None without labels.
    """

    photos: int
    agreement: float | None
    sure: int
    agreement_sure: float | None
    kl: float | None
    logit_error: float
    layers: tuple[LayerError, ...] = ()
    labelled: int = 0
    accuracy_original: float | None = None
    accuracy_converted: float | None = None


def compare(original: nn.Module, converted: nn.Module, batches: Iterable[Any], *, layers: bool = True) -> Fidelity:
    """Measure how far a converted network's answers are from the original's.

    Both networks run in eval mode without gradients and get back the mode of each of their modules afterwards.
    Inputs are moved to each network's device and floating dtype.

    Args:
        original: the network with BatchNorm.
        converted: the network with `FusedGroupNorm` in its place.
        batches: input tensors with the batch in their first dimension, or tuples whose first item is one. Where
            the second item is an integer tensor `[N]`, it is taken for class labels; negative labels are
            unknown. Read once.
        layers: measure every swapped norm too. This holds the norms' outputs of a few photos at a time.

    Returns:
        The measured figures. NaN and infinite answers of the converted network never count as agreement.

    Raises:
        CalibrationError: there are no photos, or a batch is no tensor.
        ArgumentError: the networks' outputs or layers do not correspond.

    Example:
        >>> import gnswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
        >>> fidelity = gnswap.compare(model, model, [torch.randn(4, 3, 8, 8)])
        >>> fidelity.photos, fidelity.agreement, fidelity.logit_error
        (4, 1.0, 0.0)
    """
    names = swapped_layers(original, converted) if layers else []
    answers, errors = Answers(classifier=getattr(original, "num_classes", None) != 0), LayerErrors(names)
    with eval_mode(original, converted), torch.no_grad():
        for x, labels in chunks(batches, _ROWS if names else None):
            with errors.pairs.first(original):
                expected = flat(answered(original, x))
            with errors.pairs.second(converted):
                found = flat(answered(converted, x))
            errors.pairs.finish()
            answers.add(len(x), expected, found, labels)
    if not answers.photos:
        raise no_photos("compare on")
    return answers.result(errors.result())


class Answers:
    """Streaming sums over the networks' outputs."""

    def __init__(self, *, classifier: bool) -> None:
        self.classifier = classifier  # a network without a head gives [N, features], where top-1 means nothing
        self.photos = self.agree = self.sure = self.agree_sure = 0
        self.labelled = self.right_original = self.right_converted = 0
        self.kl = self.difference = self.size = 0.0

    def add(self, rows: int, expected: list[Tensor], found: list[Tensor], labels: Tensor | None) -> None:
        shapes = [[tuple(item.shape) for item in items] for items in (expected, found)]
        if shapes[0] != shapes[1] or not expected:
            raise ArgumentError(
                "the two networks' outputs do not correspond",
                where="compare",
                expected=f"floating tensors of shapes {shapes[0]}",
                found=str(shapes[1]),
            )
        self.photos += rows
        expected, found = ([item.cpu().double() for item in items] for items in (expected, found))
        for theirs, ours in zip(expected, found, strict=True):
            self.difference += float((ours - theirs).square().sum())
            self.size += float(theirs.square().sum())
        logits, ours = expected[0], found[0]
        self.classifier &= len(expected) == 1 and logits.ndim == 2 and len(logits) == rows and logits.shape[1] > 1
        if not self.classifier:
            return
        logp, logq = F.log_softmax(logits, 1), F.log_softmax(ours, 1)
        # 0 · log 0 is 0 where a probability underflows
        self.kl += float(torch.where(logp > -math.inf, logp.exp() * (logp - logq), 0.0).sum())
        finite = ours.isfinite().all(1)
        top, ours_top = logits.argmax(1), ours.argmax(1)
        agree, sure = (top == ours_top) & finite, logp.amax(1).exp() > SURE
        self.agree += int(agree.sum())
        self.sure += int(sure.sum())
        self.agree_sure += int((agree & sure).sum())
        if labels is not None:
            labels = labels.cpu()
            self.labelled += int((labels >= 0).sum())
            self.right_original += int((top == labels).sum())
            self.right_converted += int(((ours_top == labels) & finite).sum())

    def result(self, layers: tuple[LayerError, ...]) -> Fidelity:
        share = self.photos if self.classifier else 0
        labelled = self.labelled if self.classifier else 0
        return Fidelity(
            photos=self.photos,
            agreement=_ratio(self.agree, share),
            sure=self.sure if self.classifier else 0,
            agreement_sure=_ratio(self.agree_sure, self.sure if self.classifier else 0),
            kl=_ratio(self.kl, share),
            logit_error=_relative(self.difference, self.size),
            layers=layers,
            labelled=labelled,
            accuracy_original=_ratio(self.right_original, labelled),
            accuracy_converted=_ratio(self.right_converted, labelled),
        )


class LayerErrors:
    """Streaming sums over the swapped norms' outputs, gathered by `pairs` while the two networks run in turn."""

    def __init__(self, names: list[str]) -> None:
        self.sums = {name: [0.0, 0.0, 0.0] for name in names}  # of difference², original², product
        self.pairs = Pairs(names, self.add)

    def add(self, name: str, expected: Tensor, output: Tensor) -> None:
        found = output.to(expected.device)
        difference = found - expected
        sums = self.sums[name]
        sums[0] += _dot(difference, difference)
        sums[1] += _dot(expected, expected)
        sums[2] += _dot(expected, found)

    def result(self) -> tuple[LayerError, ...]:
        return tuple(
            LayerError(name or "(root)", _relative(difference, size), product / size if size else math.nan)
            for name, (difference, size, product) in self.sums.items()
        )


def _dot(a: Tensor, b: Tensor) -> float:
    """The inner product: fp32 inside pieces of 32768, fp64 across them. Five times faster than all in fp64."""
    kind = torch.promote_types(a.dtype, torch.float32)
    pairs = zip(*(torch.split(item.flatten().to(kind), 1 << 15) for item in (a, b)), strict=True)
    return float(torch.stack([torch.dot(*pair) for pair in pairs]).sum(dtype=torch.float64))


def swapped_layers(original: nn.Module, converted: nn.Module) -> list[str]:
    names = [name for name, module in converted.named_modules() if isinstance(module, FusedGroupNorm)]
    theirs = {name for name, _ in original.named_modules(remove_duplicate=False)}
    if missing := [name for name in names if name not in theirs]:
        raise ArgumentError(
            "the two networks are not the same architecture",
            where=missing[0],
            expected="a layer of that name in the original",
            fix="Pass the network that the other one was converted from, or layers=False.",
        )
    record = applied(converted)
    seen_at = {} if record is None else {decision.paths[0]: decision.output_path for decision in record.plan.swaps}
    return [seen_at.get(name, name) for name in names]


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _relative(difference: float, size: float) -> float:
    if size == 0:
        return math.nan if difference else 0.0
    return math.sqrt(difference / size)
