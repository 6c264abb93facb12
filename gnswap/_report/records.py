"""The record of a fidelity report: everything that the page and the figures show, as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from gnswap._fidelity import Fidelity
from gnswap._record import Record

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""The quantiles of `Spread.variance`."""

_Z = 1.959963984540054  # 95 % of a normal distribution lie within so many standard deviations


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share of `count` independent trials.

    Source: Wilson, *Probable inference, the law of succession, and statistical inference* (1927).

    Example:
        >>> low, high = wilson(0.9, 10)
        >>> round(low, 3), round(high, 3)
        (0.596, 0.982)
    """
    z2 = _Z * _Z / count
    centre, half = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2 * z2 / 4)
    return (centre - half) / (1 + z2), (centre + half) / (1 + z2)


@dataclasses.dataclass(frozen=True)
class Stage(Record):
    """The network with one more lever in force.

    Attributes:
        name: of the lever that came last; the first stage is the naive copy, the last one the network as it is.
        what: the lever in words.
        fidelity: the network of this stage against the original; its `layers` are every swapped norm.
    """

    name: str
    what: str
    fidelity: Fidelity

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval (Wilson) of the agreement; None where the network is no classifier."""
        share = self.fidelity.agreement
        return None if share is None else wilson(share, self.fidelity.photos)

    @property
    def interval_sure(self) -> tuple[float, float] | None:
        """The same where the original is sure; None where it never is."""
        share = self.fidelity.agreement_sure
        return None if share is None else wilson(share, self.fidelity.sure)


@dataclasses.dataclass(frozen=True)
class Spread(Record):
    """What a layer divides its channels by at one stage, beside what BatchNorm divides them by.

    Attributes:
        stage: its name.
        variance: 5, 25, 50, 75 and 95 % quantiles, over channels and photos, of the variance that a channel is
            divided by, relative to BatchNorm's: 1 keeps the function, 100 makes the channel ten times too quiet.
        shift: median, over channels and photos, of how far the mean that is subtracted is from BatchNorm's, in
            standard deviations of the channel.
    """

    stage: str
    variance: tuple[float, ...]
    shift: float


@dataclasses.dataclass(frozen=True)
class LayerReport(Record):
    """One swapped layer: where its channels went, and what its groups do to them.

    Attributes:
        name: its path.
        num_channels, num_groups, softness, reason: as decided.
        deviation: standard deviation of each channel on the training data, from the running statistics; empty where
            there are none.
        channel_order, signs: as decided; None is the natural order, and all +1.
        loud_to_quiet: standard deviation of the loudest channel over that of the quietest, in groups of neighbours:
            the median over the groups. None without running statistics.
        spreads: by stage. Without photos, from the running statistics alone: the channels at their nominal
            variance.
    """

    name: str
    num_channels: int
    num_groups: int
    softness: float
    reason: str
    deviation: tuple[float, ...] = ()
    channel_order: tuple[int, ...] | None = None
    signs: tuple[int, ...] | None = None
    loud_to_quiet: float | None = None
    spreads: tuple[Spread, ...] = ()


@dataclasses.dataclass(frozen=True)
class Answer(Record):
    """A class and the probability that a network gives it."""

    index: int
    probability: float
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class PhotoReport(Record):
    """One photo with both networks' answers.

    Attributes:
        index: its place among the photos, from 0.
        distance: KL(original ‖ converted) in nats; where the network is no classifier, the outputs' relative error.
        original, converted: the most probable classes, best first; empty for no classifier, and where an answer is not
            finite.
        name: what the caller calls the photo.
        thumbnail: a small JPEG as a data URI; None where the input is no picture.
    """

    index: int
    distance: float
    original: tuple[Answer, ...] = ()
    converted: tuple[Answer, ...] = ()
    name: str | None = None
    thumbnail: str | None = None


@dataclasses.dataclass(frozen=True)
class PhotoTable(Record):
    """A few figures of every photo, in the order of the photos.

    Attributes:
        distance: see `PhotoReport`.
        probability_original, probability_converted: what each network gives the class that the original finds most
            probable; empty for no classifier.
        same: whether both networks find the same class most probable; empty for no classifier.
    """

    distance: tuple[float, ...] = ()
    probability_original: tuple[float, ...] = ()
    probability_converted: tuple[float, ...] = ()
    same: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class FidelityReport(Record):
    """What a conversion kept of the original network, measured lever by lever; see `gnswap.report`.

    Attributes:
        model: timm's name of the architecture, or the original's class.
        photos: how many it was measured on; 0 means that nothing was measured.
        held_out: whether these photos took no part in choosing the plan; None where that is not known.
        swapped: number of layers that are GroupNorms now.
        kept: the layers that were left, each with the reason.
        agreement_interval: 95 % confidence interval (Wilson) of the final agreement; None without photos or classes.
        agreement_sure_interval: the same where the original is sure.
        stages: from the naive copy to the network as it is; empty without photos.
        layers: every swapped layer.
        answers: a few figures of every photo.
        worst: the photos on which the two networks differ most, worst first.
        notes: the plan's, and what else a reader should know.
        options: what the plan was made with.
        versions: of gnswap, torch and timm, when the plan was made.
        command: the command that made it; None from Python.
        schema_version: of this record.
    """

    model: str
    photos: int
    held_out: bool | None
    swapped: int
    kept: tuple[str, ...] = ()
    agreement_interval: tuple[float, ...] | None = None
    agreement_sure_interval: tuple[float, ...] | None = None
    stages: tuple[Stage, ...] = ()
    layers: tuple[LayerReport, ...] = ()
    answers: PhotoTable = PhotoTable()
    worst: tuple[PhotoReport, ...] = ()
    notes: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    command: str | None = None
    schema_version: int = 1

    @property
    def fidelity(self) -> Fidelity | None:
        """The network as it is against the original; None without photos."""
        return self.stages[-1].fidelity if self.stages else None
