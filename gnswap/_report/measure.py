"""Measuring a conversion lever by lever, on photos that are read once.

Why all stages batch by batch and not one after another: the original's answers and outputs are then needed for a few
photos at a time, so memory does not grow with their number, and a loader that shuffles or runs only once is fine.
Each photo goes through the network once for each stage, once for the original, and once for its statistics.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnswap._fidelity import Answers, LayerErrors, swapped_layers
from gnswap._moments import ChannelStatistics, collect
from gnswap._records import Decision
from gnswap._report.levers import TRAINED, Lever
from gnswap._report.photos import Worst
from gnswap._report.records import Stage
from gnswap._running import answered, chunks, eval_mode, flat, no_photos, placed
from gnswap._trial import converted as converted_for_now

_ROWS = 8  # photos at a time: the outputs of all norms of the original are held for so many


def measure(
    original: nn.Module,
    converted: nn.Module,
    stages: Sequence[tuple[Lever, tuple[Decision, ...]]],
    photos: Iterable[Any],
    worst: Worst,
    *,
    trained: bool,
) -> tuple[list[Stage], ChannelStatistics]:
    """Every stage against the original, and the original's statistics.

    The last stage is `converted` itself, not what the plan says of it.

    Args:
        original, converted: the networks.
        stages: see `levers.stages`.
        photos: batches.
        worst: is shown every photo with both answers.
        trained: whether `converted` is another network by now than the one that the plan made.

    Raises:
        CalibrationError, ArgumentError: see `gnswap.compare`.
    """
    names = swapped_layers(original, converted)
    itself = _Run(TRAINED if trained else stages[-1][0], lambda: contextlib.nullcontext(converted), original, names)
    planned = stages if trained else stages[:-1]
    runs = [_Run(lever, _answering_as(original, decisions), original, names) for lever, decisions in planned]
    runs.append(itself)
    listener, parts = LayerErrors(names).pairs, []
    with eval_mode(original, converted), torch.no_grad():
        for x, labels in chunks(photos, _ROWS):
            parts.append(collect(original, [x]))
            with listener.first(original):
                expected = flat(answered(original, x))
            kept = listener.take()
            for run in runs:
                found = run.meet(x, expected, labels, kept)
            worst.add(x, expected, found, classes=itself.answers.classifier)
    if not parts:
        raise no_photos("measure on")
    called = {swap.output_path or swap.name: swap.name for swap in stages[0][1]}
    return [run.stage(called) for run in runs], parts[0].merge(*parts[1:])


class _Run:
    """One stage, and what was seen of it so far.

    Args:
        lever: that came last.
        network: gives the network of this stage for as long as its block lasts.
        original: the network with BatchNorm.
        names: of the swapped layers.
    """

    def __init__(
        self,
        lever: Lever,
        network: Callable[[], contextlib.AbstractContextManager[nn.Module]],
        original: nn.Module,
        names: list[str],
    ) -> None:
        self.lever, self.network = lever, network
        self.answers = Answers(classifier=getattr(original, "num_classes", None) != 0)
        self.errors = LayerErrors(names)

    def meet(
        self, x: Tensor, expected: list[Tensor], labels: Tensor | None, kept: dict[str, list[Tensor]]
    ) -> list[Tensor]:
        """Run the photos through it and add up how far it is from the original; returns its outputs."""
        self.errors.pairs.expect(kept)
        with self.network() as network, self.errors.pairs.second(network):
            found = flat(network(placed(x, network)))
        self.errors.pairs.finish()
        self.answers.add(len(x), expected, found, labels)
        return found

    def stage(self, called: Mapping[str, str]) -> Stage:
        """What was seen, with the layers under the names that the plan has for them."""
        errors = (dataclasses.replace(error, name=called[error.name]) for error in self.errors.result())
        return Stage(self.lever.name, self.lever.what, self.answers.result(tuple(errors)))


def _answering_as(
    model: nn.Module, decisions: tuple[Decision, ...]
) -> Callable[[], contextlib.AbstractContextManager[nn.Module]]:
    @contextlib.contextmanager
    def network() -> Iterator[nn.Module]:
        with converted_for_now(model, decisions):
            yield model

    return network
