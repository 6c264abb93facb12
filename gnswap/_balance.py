r"""How loud each channel is in its group, and about which centre it swings: so that the group's variance keeps still.

What GroupNorm takes from a pretrained network is what changes from photo to photo in a group's mean and variance. Order
and signs make the means cancel; the variance, a mean of squares, can cancel nothing. But about another centre t,

.. math::
    \mathrm{E}_s(\hat x + t)^2 = Q + 2 t M + t^2,

and M, the channel's mean on a photo, goes up and down with its mean square Q (in sparse channels nearly always): a
small t of the opposite sign takes most of that away. A factor e on the channel says how much of the group's variance is
its own. Both are undone behind the norm (`_algebra`), so at nominal statistics the layer gives what BatchNorm gives, as
before.

They minimise the squared error of the layer's output, which is exact in the tables, plus

.. math::
    \frac{\lambda}{1 + 10 s} \sum_g w_g \left( p_g + \tfrac1D \sum_{c \in g} \log^2 e_c \right), \qquad \sum_g w_g = 1,

p being the share of the group's nominal variance that is a constant of the centres. Why the penalty: it draws towards
what is known without photos, and a constant in the variance acts as a softness of p / (1 - p). What it brings, before
corrections, KL on photos that chose nothing, 8 groups, softness 0, 64 photos: EfficientNet-Lite0 .569 without, .530
with a softness of .1, .457 with a constant share of .02; our own net of the MobileNet kind 1.13, .96, and .41 with
one of .07. With a tenth of this penalty: .449 and .204, but a quarter to a third of the variance is constant.

Why less of it where softness s is a larger constant anyway: the error falls with s, and would no longer outweigh the
penalty. KL on 96 photos that the plans did not see, corrections and all, 64 photos, with all of \lambda and with this:
softness 1 / 4 / 32, EfficientNet-Lite0 .099 to .087 / .062 to .047 / .034 to .022; softness 1 / 4, -Lite1 .107 to
.084 / .057 to .040; softness 1, Lite0, 8 groups .281 to .251, 32 groups .473 to .418. The constant share is .6 to 4 %.

Why no gain is fitted in the same breath: least squares shrink a disturbed signal, layer after layer (.569 to .747).
"""

from __future__ import annotations

import dataclasses

import torch

from gnswap._estimate import Arrangement, Grouped, Tables

_PENALTY, _LESS_WHERE_SOFT = 0.1, 10.0
_STEPS = 50
_RATE = 0.1


def balanced(tables: Tables, num_groups: int, arrangement: Arrangement, eps: float, softness: float) -> Arrangement:
    """The arrangement with a loudness and a centre for each channel; as it is, where none are found. Deterministic.

    Args:
        tables, num_groups, arrangement, eps, softness: as for `_estimate.relative_error`.

    Example:
        >>> mean = (torch.rand(32, 1, generator=torch.Generator().manual_seed(0)) - 0.5).expand(32, 4)
        >>> none = torch.zeros(32, 0, 4)
        >>> tables = Tables(mean, 1 + mean, none, none, torch.ones(4), torch.ones(4))
        >>> found = balanced(tables, 1, Arrangement(signs=(1, -1, 1, -1)), 1e-5, 0.0)
        >>> max(found.centre) < 0  # square and mean go up and down together
        True
    """
    with torch.inference_mode(False), torch.enable_grad():
        grouped = Grouped.of(tables, num_groups, arrangement)
        weight = grouped.weight.sum(1) / grouped.weight.sum().clamp_min(1e-30)
        centre, log_loudness = (torch.zeros_like(grouped.weight, requires_grad=True) for _ in range(2))
        share = _PENALTY / (1 + _LESS_WHERE_SOFT * softness)
        optimizer = torch.optim.Adam([centre, log_loudness], lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
        for _ in range(_STEPS):
            moved = dataclasses.replace(grouped, loudness=log_loudness.exp(), centre=centre)
            penalty = weight @ (moved.constant_share() + log_loudness.square().mean(1))
            error = moved.squared_error(eps + softness)
            optimizer.zero_grad()
            (error + share * penalty).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    if not (centre.isfinite().all() and log_loudness.isfinite().all()):
        return arrangement
    loudness, natural = (
        torch.empty_like(part).view(-1).index_copy(0, grouped.order, part.view(-1))
        for part in (log_loudness.detach().exp(), centre.detach())
    )
    if arrangement.signs is not None:
        natural = natural * torch.tensor(arrangement.signs)
    return dataclasses.replace(arrangement, loudness=tuple(loudness.tolist()), centre=tuple(natural.tolist()))
