"""What a layer's tables say of a GroupNorm in its place: how far its groups fluctuate, and how far its output is off.

Exact for the samples of the tables, before any GroupNorm is built. `_order` and `_balance` search for the least.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LEVEL = (0.1, 10.0)  # bounds of `level`
_BY_SAMPLE = ("mean", "square", "patch_mean", "patch_square")


@dataclass(frozen=True, eq=False)
class Tables:
    """What the search knows of one layer's standardised input.

    Attributes:
        mean, square: M and Q, fp32 `[N, C]`.
        patch_mean, patch_square: the same over parts of each sample, `[N, K, C]`; K may be 0.
        nominal: variance of each standardised channel on the training distribution, `[C]`: 1, less where it is dead.
        weight: energy that each channel carries to the output, `[C]`.
    """

    mean: Tensor
    square: Tensor
    patch_mean: Tensor
    patch_square: Tensor
    nominal: Tensor
    weight: Tensor

    def rows(self, index: Tensor) -> Tables:
        """The tables of some samples."""
        return dataclasses.replace(self, **{name: getattr(self, name)[index] for name in _BY_SAMPLE})

    def and_rows(self, others: Tables) -> Tables:
        """The tables with other samples of the same layer behind them."""
        joined = {name: torch.cat([getattr(self, name), getattr(others, name)]) for name in _BY_SAMPLE}
        return dataclasses.replace(self, **joined)


@dataclass(frozen=True)
class Arrangement:
    """How a layer's channels are grouped.

    Attributes:
        order: permutation of C, groups are D consecutive entries; None is the natural order.
        signs: +1 or -1 a channel in natural order; None is all +1.
        loudness, centre: of each channel inside its group, natural order (`_algebra`); None is 1 and 0.
    """

    order: tuple[int, ...] | None = None
    signs: tuple[int, ...] | None = None
    loudness: tuple[float, ...] | None = None
    centre: tuple[float, ...] | None = None


def fluctuation(tables: Tables, num_groups: int, arrangement: Arrangement) -> float:
    """J of an arrangement, divided by the sum of the weights: about the layer's squared relative error."""
    grouped = Grouped.of(tables, num_groups, arrangement)
    m, v = grouped.mean.mean(2), (grouped.square - grouped.nominal).mean(2)
    weight = grouped.weight.sum(1)
    return float((m.square() + v.square() / 4).mean(0) @ weight / weight.sum().clamp_min(1e-30))


def level(tables: Tables, num_groups: int, arrangement: Arrangement, eps: float, softness: float) -> Tensor:
    """The factor that makes each group's output as large as BatchNorm's on the samples of the tables, in the mean.

    Where photos are not what the running statistics say, a group's variance is off its nominal value on all of them
    alike, and the layer's constants are wrong by that. One number a group, so a few photos settle it:
    the geometric mean over the samples of sqrt(v + eps + softness), over the nominal value.

    Args:
        tables, num_groups, arrangement, eps, softness: as for `relative_error`.

    Returns:
        a factor for each channel, the same in a group, fp64 `[C]`, natural order.
    """
    grouped = Grouped.of(tables, num_groups, arrangement)
    v = grouped.variance() + (eps + softness)
    factor = (v.log().mean(0) / 2).exp() / (grouped.nominal_variance() + (eps + softness)).sqrt()
    by_position = factor.clamp(*_LEVEL).repeat_interleave(len(grouped.order) // num_groups)
    return torch.empty_like(by_position).index_copy_(0, grouped.order, by_position)


def relative_error(
    tables: Tables,
    num_groups: int,
    arrangement: Arrangement,
    eps: float,
    softness: float,
    gain: Sequence[float] | None = None,
) -> float:
    """How far one GroupNorm's output is from the BatchNorm's on the same input: ‖difference‖ / ‖BatchNorm's output‖.

    Exact for the samples of the tables, beta left out.

    Args:
        tables: of the layer.
        num_groups: G.
        arrangement: order and signs.
        eps: of the norm.
        softness: added to the variance beside eps.
        gain: a factor on the output for each channel, natural order; None is all 1.
    """
    grouped = Grouped.of(tables, num_groups, arrangement)
    factor = None if gain is None else torch.tensor(gain, dtype=torch.float64)[grouped.order].view(num_groups, -1)
    return float(grouped.squared_error(eps + softness, factor).sqrt())


@dataclass(frozen=True, eq=False)
class Grouped:
    """Tables in the order of an arrangement, in fp64.

    Attributes:
        order: the arrangement's permutation, `[C]`.
        mean, square: with the arrangement's signs, `[N, G, D]`.
        nominal, weight: `[G, D]`.
        loudness, centre: the same, the centre with the arrangement's signs.
    """

    order: Tensor
    mean: Tensor
    square: Tensor
    nominal: Tensor
    weight: Tensor
    loudness: Tensor
    centre: Tensor

    @classmethod
    def of(cls, tables: Tables, num_groups: int, arrangement: Arrangement) -> Grouped:
        samples, channels = tables.mean.shape
        order = torch.arange(channels) if arrangement.order is None else torch.tensor(arrangement.order)
        mean = tables.mean if arrangement.signs is None else tables.mean * torch.tensor(arrangement.signs)
        mean, square = (part.double()[:, order].view(samples, num_groups, -1) for part in (mean, tables.square))
        loudness, centre = (
            torch.full((channels,), default, dtype=torch.float64)
            if values is None
            else torch.tensor(values, dtype=torch.float64)
            for values, default in ((arrangement.loudness, 1.0), (arrangement.centre, 0.0))
        )
        if arrangement.signs is not None:
            centre = centre * torch.tensor(arrangement.signs)
        return cls(
            order,
            mean,
            square,
            *(part.double()[order].view(num_groups, -1) for part in (tables.nominal, tables.weight, loudness, centre)),
        )

    def middle(self) -> Tensor:
        """m of each sample and group, `[N, G]`."""
        return (self.loudness * (self.mean + self.centre)).mean(2)

    def variance(self) -> Tensor:
        """v of each sample and group, `[N, G]`."""
        square = self.square + 2 * self.centre * self.mean + self.centre.square()
        return ((self.loudness.square() * square).mean(2) - self.middle().square()).clamp_min(0)

    def nominal_variance(self) -> Tensor:
        """v where every channel has its nominal statistics, `[G]`."""
        square = self.loudness.square() * (self.nominal + self.centre.square())
        return square.mean(1) - self._nominal_middle().square()

    def _nominal_middle(self) -> Tensor:
        return (self.loudness * self.centre).mean(1)

    def constant_share(self) -> Tensor:
        """The share of each group's nominal variance that is a constant of the centres, `[G]`; 0 without them."""
        varying, whole = (self.loudness.square() * self.nominal).mean(1), self.nominal_variance()
        return (whole - varying) / whole.clamp_min(1e-30)

    def squared_error(self, epsilon: float, gain: Tensor | None = None) -> Tensor:
        """The squared relative error of the GroupNorm's output, a scalar; has gradients.

        Sample by sample the GroupNorm gives a·x̂ + b for a channel, so the mean squared difference over the positions is
        (a - 1)² Q + 2 (a - 1) b M + b².

        Args:
            epsilon: all that is added to the variance.
            gain: a factor on the output, `[G, D]`.
        """
        weight = self.weight / self.nominal.mean(1, keepdim=True).clamp_min(1e-12)
        a = ((self.nominal_variance() + epsilon) / (self.variance() + epsilon)).sqrt()[:, :, None]
        a = a if gain is None else a * gain
        b = a * (self.centre - self.middle()[:, :, None] / self.loudness)
        constant = self.centre - self._nominal_middle()[:, None] / self.loudness
        b = b - (constant if gain is None else constant * gain)
        difference = (a - 1).square() * self.square + 2 * (a - 1) * b * self.mean + b.square()
        error, size = ((part * weight).sum() for part in (difference, self.square))
        return error / size.clamp_min(1e-30)
