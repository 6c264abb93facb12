"""The record of `gnswap.explain`: where copying gamma and beta would squash a network, and what is done instead."""

from __future__ import annotations

import dataclasses

from gnswap._record import Record

SQUASHED = 0.5
"""A channel that keeps less than this share of what BatchNorm gives it counts as squashed."""


@dataclasses.dataclass(frozen=True)
class GroupSquash(Record):
    """One group of the naive swap: neighbouring channels that would share one mean and one variance.

    Attributes:
        channels: of the group, in natural order.
        mean: of the group, in units of the layer's input.
        deviation: what the group's channels are divided by, sqrt(v + eps).
        loudest: the channel with the largest part in the group's variance.
        part: that part, from 0 to 1; the channel itself varies, and its mean lies away from the group's.
        by_mean: how much of `part` comes from where its mean lies, from 0 to 1.
        quietest: the live channel that keeps least; None where BatchNorm itself leaves none alive.
        ratio: how far the loudest channel lies from the group's mean (root mean square) over how far the quietest
            varies about its own; None where there is no quietest.
    """

    channels: tuple[int, ...]
    mean: float
    deviation: float
    loudest: int
    part: float
    by_mean: float
    quietest: int | None
    ratio: float | None


@dataclasses.dataclass(frozen=True)
class LayerSquash(Record):
    """One BatchNorm: what the naive swap would make of it, and what the plan does.

    BatchNorm gives γ x̂ + β; either GroupNorm gives γ (factor x̂ + shift) + β. Per-channel values are `[C]` in natural
    order, over the photos their medians.

    Attributes:
        paths, num_channels: the layer (see `Site`).
        num_groups: G of the naive swap.
        error: of the naive swap's output, root mean square relative to what BatchNorm computes, without β.
        squashed: share of the live channels that keep less than half (`SQUASHED`).
        factor, shift: of every channel in the naive swap; 1 and 0 are what BatchNorm computes.
        mean, deviation: of every channel, running_mean and sqrt(running_var + eps).
        dead: channels whose running variance is below eps: BatchNorm itself gives them next to nothing.
        groups: of the naive swap.
        planned_groups: G of the plan; 0 where it keeps the BatchNorm.
        remedy: what the plan does, in words.
        error_after: as `error`, of the planned layer; 0 for a kept one.
        factor_after: as `factor`, of the planned layer; 1 for a kept one.
    """

    paths: tuple[str, ...]
    num_channels: int
    num_groups: int
    error: float
    squashed: float
    factor: tuple[float, ...]
    shift: tuple[float, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    dead: tuple[int, ...]
    groups: tuple[GroupSquash, ...]
    planned_groups: int
    remedy: str
    error_after: float
    factor_after: tuple[float, ...]

    @property
    def name(self) -> str:
        """The first path; "(root)" where the model itself is the layer."""
        return self.paths[0] or "(root)"

    @property
    def alone(self) -> bool:
        """Whether the naive swap gives every channel a group of its own: InstanceNorm."""
        return self.num_groups == self.num_channels

    @property
    def live(self) -> tuple[int, ...]:
        """The channels that are not dead."""
        return tuple(sorted({*range(self.num_channels)}.difference(self.dead)))

    @property
    def worst(self) -> GroupSquash | None:
        """The group with the channel that keeps least; None where no channel is alive."""
        found = [(self.factor[group.quietest], group) for group in self.groups if group.quietest is not None]
        return min(found, key=lambda pair: pair[0])[1] if found else None


@dataclasses.dataclass(frozen=True)
class Explanation(Record):
    """Where the naive swap would squash, layer by layer.

    Attributes:
        model: the model's class.
        groups: the number of groups that the naive swap takes, or the largest divisor of C below it.
        samples: on how many photos the figures rest; 0 where on the running statistics alone.
        layers: in the order of the network.
        unseen: layers that nothing can be said of, and why.
        notes: what else a user should know.
    """

    model: str
    groups: int
    samples: int
    layers: tuple[LayerSquash, ...]
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ranked(self) -> tuple[LayerSquash, ...]:
        """The layers, those first whose output the naive swap would change most."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.error))

    def __str__(self) -> str:
        lines = [f"{self.model}: gamma and beta copied into GroupNorm({self.groups})"]
        lines += [
            f"  {layer.name}: output off by {layer.error:.2f} of its size, {layer.squashed:.0%} of the channels "
            f"squashed; {layer.remedy}: {layer.error_after:.2f}"
            for layer in self.ranked
        ]
        return "\n".join((*lines, *(f"  not seen: {other}" for other in self.unseen), *self.notes))
