r"""Which channels share a group, and with which sign: a search over small tables, before any GroupNorm is built.

A GroupNorm on standardised channels x̂ differs from BatchNorm by how far each sample's group mean m_g and group
variance v_g are from their nominal values, 0 and v⁰_g (see `_algebra`). To first order the error of a layer is

.. math::
    J = \sum_g w_g \,\mathrm{E}_n\!\left[ m_g^2 + \tfrac14 (v_g - v^0_g)^2 \right], \qquad
    m_g = \frac1D \sum_{c \in g} s_c M_{nc}, \quad v_g = \frac1D \sum_{c \in g} Q_{nc}

with :math:`M_{nc}, Q_{nc}` the mean of x̂ and of x̂² over the positions of sample n, and :math:`w_g` the energy that the
group's channels carry to the output, :math:`\sum_{c \in g} \gamma_c^2 \mathrm{Var}(\hat x_c)`. GroupNorm is not
invariant to the sign of one channel, BatchNorm is, so signs are free to make the means cancel.

Why deviations from the nominal values and not variances over the samples: the nominal values are what the layer's
constants assume, so a constant offset is an error like any other.

Why a guard: with fewer samples than channels the search can drive J to nothing on the samples it sees and not
elsewhere. So only the leading directions of the tables take part, patches of the samples count as samples of their
own, random views of them may be added, and `arrange` judges on samples that the search did not see.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gnswap._estimate import Arrangement, Tables, fluctuation

_RANK = 48  # leading directions of each table that take part in the search; the rest is mostly noise
_ROUNDS = 200  # of exchanges between groups; the search has settled long before
_HELD_OUT = 4  # every 4th sample judges


@dataclass(frozen=True)
class Judged:
    """An arrangement and what J was, relative to the layer's output energy.

    Attributes:
        arrangement: the one with the least J on the samples held out.
        natural_seen, natural_held: J of the natural order, on the samples searched on and on those held out.
        seen, held: J of the arrangement on the same.
    """

    arrangement: Arrangement
    natural_seen: float
    natural_held: float
    seen: float
    held: float


def arrange(
    tables: Tables,
    num_groups: int,
    owner: Tensor | None = None,
    *,
    given: tuple[int, ...] | None = None,
    views: Tables | None = None,
) -> Judged:
    """Choose order and signs for one layer.

    Searches on three samples of four and compares three candidates on the others: order and signs, signs alone,
    and the natural order; so the choice can help or do nothing. Deterministic.

    Args:
        tables: of the layer, at least two rows.
        num_groups: G; divides C.
        owner: which sample each row is of, int64 `[N]`: the rows of one sample stay on one side. None: one row each.
        given: an order to start from and to keep; only the signs are searched then.
        views: more samples to search on, made out of those that do not judge.

    Returns:
        The best candidate and its evidence.

    Example:
        >>> mean = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)).expand(32, 4)
        >>> none = torch.zeros(32, 0, 4)
        >>> tables = Tables(mean, mean.square(), none, none, torch.ones(4), torch.ones(4))
        >>> sum(arrange(tables, 1).arrangement.signs)  # equal channels cancel in pairs
        0
    """
    apart = held_out(torch.arange(len(tables.mean)) if owner is None else owner)
    seen, held = tables.rows(~apart), tables.rows(apart)
    searched = seen if views is None else seen.and_rows(views)
    start = Arrangement(given)
    candidates = [start, dataclasses.replace(_search(searched, num_groups, given, exchange=False), order=given)]
    if given is None and num_groups > 1:
        candidates.append(_search(searched, num_groups, None, exchange=True))
    best = min(candidates, key=lambda candidate: fluctuation(held, num_groups, candidate))
    natural = Arrangement()
    return Judged(
        best,
        fluctuation(seen, num_groups, natural),
        fluctuation(held, num_groups, natural),
        fluctuation(seen, num_groups, best),
        fluctuation(held, num_groups, best),
    )


def held_out(owner: Tensor) -> Tensor:
    """Which rows judge and take no part in the search: those of every 4th sample, or of the last of fewer than 4."""
    every = min(_HELD_OUT, int(owner.max()) + 1)
    return owner % every == every - 1


def _search(tables: Tables, num_groups: int, given: tuple[int, ...] | None, *, exchange: bool) -> Arrangement:
    """The arrangement of least J that greedy descent finds, in the given or natural order or from a greedy start."""
    search = _Search(tables, num_groups, given)
    if exchange:
        search.deal()
    search.flip()
    if exchange:
        for _ in range(_ROUNDS):
            if not search.swap():
                break
        search.flip()
    return search.arrangement()


class _Search:
    """The state of a search: each channel's features, sign and group.

    A channel's features are its columns of M and of (Q - nominal)/2, cut to their leading directions, so that J of a
    group is its weight times the squared length of its members' (signed) sum. The group's `1/D` is left out.
    """

    def __init__(self, tables: Tables, num_groups: int, given: tuple[int, ...] | None) -> None:
        self.random = torch.Generator().manual_seed(0)
        mean = _leading(_pooled(tables.mean, tables.patch_mean), self.random)
        square = _leading(_pooled(tables.square - tables.nominal, tables.patch_square - tables.nominal), self.random)
        self.mean, self.square = mean, square / 2
        channels = len(mean)
        self.weight = tables.weight.float()
        self.num_groups, self.group_size = num_groups, channels // num_groups
        self.signs = torch.ones(channels)
        self.group = torch.arange(channels) // self.group_size
        if given is not None:
            self.group[torch.tensor(given)] = self.group.clone()

    def deal(self) -> None:
        """A greedy start: channels in order of size, round by round one to each group, where it cancels most."""
        mean_sum = torch.zeros(self.num_groups, self.mean.shape[1])
        square_sum = torch.zeros(self.num_groups, self.square.shape[1])
        size = self.mean.square().sum(1) + self.square.square().sum(1)
        full = torch.zeros(self.num_groups)
        for turn, channel in enumerate(size.argsort(descending=True, stable=True).tolist()):
            if turn % self.num_groups == 0:
                full.zero_()
            overlap = mean_sum @ self.mean[channel]
            group = int((square_sum @ self.square[channel] - overlap.abs() + full).argmin())
            sign = -1.0 if overlap[group] > 0 else 1.0
            self.group[channel], self.signs[channel], full[group] = group, sign, torch.inf
            mean_sum[group] += sign * self.mean[channel]
            square_sum[group] += self.square[channel]

    def flip(self) -> None:
        """Turn signs, the best one of each group at a time, until none helps."""
        size = self.mean.square().sum(1)
        members = self._members()
        for _ in range(4 * self.group_size):
            signed = self.mean * self.signs[:, None]
            total = torch.zeros(self.num_groups, signed.shape[1]).index_add_(0, self.group, signed)
            change = size * (1 + 1e-6) - (total[self.group] * signed).sum(1)  # of |total|² by a flip, divided by 4
            least, place = change[members].min(1)
            turned = members.gather(1, place[:, None])[least < 0, 0]
            if not turned.numel():
                return
            self.signs[turned] *= -1

    def swap(self) -> bool:
        """Pair the groups at random; in each pair exchange the two channels that help most. Whether any did."""
        features = torch.cat([self.mean * self.signs[:, None], self.square], 1)
        total = torch.zeros(self.num_groups, features.shape[1]).index_add_(0, self.group, features)
        weights = torch.zeros(self.num_groups).index_add_(0, self.group, self.weight)
        members = self._members()
        pairs = torch.randperm(self.num_groups, generator=self.random)[: self.num_groups // 2 * 2].view(2, -1)
        one, two = pairs
        a, b = features[members[one]], features[members[two]]  # [P, D, features]
        # exchanging i and j moves the totals by δ = b_j - a_i: |t + δ|² = |t|² + 2 t·δ + |δ|²
        distance = torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist").square()
        toward = _inner(total[one], a, b)
        away = _inner(total[two], a, b)
        before_one, before_two = (total[side].square().sum(1)[:, None, None] for side in (one, two))
        moved = self.weight[members[two]][:, None, :] - self.weight[members[one]][:, :, None]
        weight_one, weight_two = (weights[side][:, None, None] for side in (one, two))
        after = (weight_one + moved) * (before_one + 2 * toward + distance)
        after += (weight_two - moved) * (before_two - 2 * away + distance)
        best, place = after.flatten(1).min(1)
        before = (weight_one * before_one + weight_two * before_two).flatten()
        good = best < before * (1 - 1e-5)
        first = members[one].gather(1, (place // self.group_size)[:, None])[good, 0]
        second = members[two].gather(1, (place % self.group_size)[:, None])[good, 0]
        self.group[first], self.group[second] = two[good], one[good]
        return bool(good.any())

    def _members(self) -> Tensor:
        """The channels of each group, ascending: `[G, D]`."""
        return self.group.argsort(stable=True).view(self.num_groups, -1)

    def arrangement(self) -> Arrangement:
        """In one fixed form: channels sorted in their group, groups by their first channel, whose sign is +1."""
        members = self._members()
        members = members[members[:, 0].argsort()]
        signs = self.signs.clone()
        signs[members] *= signs[members[:, :1]]
        order = members.flatten().tolist()
        return Arrangement(
            None if order == list(range(len(order))) else tuple(order),
            None if bool((signs > 0).all()) else tuple(signs.int().tolist()),
        )


def _inner(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total·(b_j - a_i) for every pair: `[P, F]`, `[P, D, F]`, `[P, D, F]` to `[P, D, D]`."""
    along = total[:, :, None]
    return torch.bmm(b, along).transpose(1, 2) - torch.bmm(a, along)


def _pooled(samples: Tensor, patches: Tensor) -> Tensor:
    """Rows whose Gram matrix is the second moment of the channels: half of samples, half of their patches."""
    rows = samples.float() / math.sqrt(len(samples))
    if not patches.numel():
        return rows
    parts = patches.flatten(0, 1).float()
    return torch.cat([rows, parts / math.sqrt(len(parts))]) / math.sqrt(2)


def _leading(rows: Tensor, random: torch.Generator) -> Tensor:
    """`[R, C]` to `[C, at most _RANK]`: each channel's coordinates along the leading directions of the rows.

    By subspace iteration, in place of an eigendecomposition that would cost more than the search.
    """
    if len(rows) <= _RANK:
        return rows.T.contiguous()
    basis = torch.randn(rows.shape[0], min(_RANK, *rows.shape), generator=random)
    for _ in range(4):
        basis, _ = torch.linalg.qr(rows @ (rows.T @ basis))
    return rows.T.mm(basis)
