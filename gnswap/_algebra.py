r"""Closed forms between BatchNorm and GroupNorm, on tensors.

Why not copy gamma and beta: GroupNorm takes one mean and one variance over channels whose scales differ by orders
of magnitude, so a loud channel squashes the quiet ones. Standardising each channel first, with the running
statistics that BatchNorm itself uses, makes all of them equally loud; then a group's mean is about 0 and its
variance about 1 on every sample, and the norm does nearly nothing, as it should.

Derivation, for one channel c in group g, with signs :math:`s_c = \pm 1`:

.. math::
    \text{BatchNorm: } & y_c = \gamma_c\,\hat x_c + \beta_c, \qquad
        \hat x_c = \frac{x_c - \mu_c}{\sqrt{\sigma_c^2 + \epsilon}} \\
    \text{input of GroupNorm: } & z_c = s_c\,\hat x_c
        = \underbrace{\frac{s_c}{\sqrt{\sigma_c^2 + \epsilon}}}_{\text{scale}} x_c
        \;\underbrace{-\,\mu_c \frac{s_c}{\sqrt{\sigma_c^2 + \epsilon}}}_{\text{shift}} \\
    \text{GroupNorm: } & y_c = \frac{z_c - m_g}{\sqrt{v_g + \epsilon + \text{softness}}}\,
        \text{gain}_c\,\gamma_c + \beta_c

Over the training distribution :math:`z_c` has mean 0 and variance :math:`r_c = \sigma_c^2/(\sigma_c^2+\epsilon)`:
1, but less where a channel is nearly dead. With all means 0, the variance of the group is the mean of its channels'
variances, :math:`v^0_g = \frac1D\sum_{c \in g} r_c`. Setting :math:`m_g = 0` and :math:`v_g = v^0_g`, the two
outputs are equal for

.. math:: \text{gain}_c = s_c \sqrt{v^0_g + \epsilon + \text{softness}}.

So a sample whose group has nominal statistics gets exactly BatchNorm's output, and gamma and beta stay untouched.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Standardisation:
    """The per-channel constants of a standardised GroupNorm, each `[C]` in natural order.

    Attributes:
        scale, shift: the affine map that the input goes through first.
        gain: factor on gamma.
    """

    scale: Tensor
    shift: Tensor
    gain: Tensor


def standardise(
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    num_groups: int,
    *,
    softness: float = 0.0,
    channel_order: Tensor | None = None,
    signs: Tensor | None = None,
) -> Standardisation:
    """Constants that make a GroupNorm of `num_groups` groups stand for a BatchNorm (module docstring).

    Computed in fp64, given in the dtype and on the device of the running statistics.

    Args:
        running_mean, running_var: BatchNorm's statistics, `[C]`.
        eps: BatchNorm's epsilon, which the GroupNorm keeps.
        num_groups: G; divides C.
        softness: added to the group's variance beside eps.
        channel_order: permutation of C, int64 `[C]`; groups are D consecutive entries of it.
        signs: +1 or -1 a channel, `[C]`, natural order.

    Returns:
        scale, shift and gain.

    Example:
        >>> constants = standardise(torch.zeros(4), torch.full((4,), 3.0), eps=1.0, num_groups=1)
        >>> constants.scale
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    mean, var = running_mean.detach().double(), running_var.detach().double()
    scale = (var + eps).rsqrt()
    nominal = nominal_variance(running_var, eps, num_groups, channel_order=channel_order)
    gain = (nominal + (eps + softness)).sqrt()
    if signs is not None:
        scale, gain = scale * signs, gain * signs
    dtype = running_var.dtype
    return Standardisation(scale.to(dtype), (-mean * scale).to(dtype), gain.to(dtype))


def nominal_variance(
    running_var: Tensor, eps: float, num_groups: int, *, channel_order: Tensor | None = None
) -> Tensor:
    """The variance that each channel's group has on the training distribution, fp64 `[C]`, natural order.

    Below 1 where channels of the group are dead (a running variance not far above eps, or under it).

    Args:
        running_var: `[C]`.
        eps: BatchNorm's epsilon.
        num_groups: G; divides C.
        channel_order: permutation of C, int64 `[C]`.

    Returns:
        The nominal variance of the group that each channel is in.
    """
    var = running_var.detach().double()
    share = var / (var + eps)
    if channel_order is None:
        return _group_mean(share, num_groups)
    return torch.empty_like(share).index_copy(0, channel_order, _group_mean(share[channel_order], num_groups))


def _group_mean(values: Tensor, num_groups: int) -> Tensor:
    """The mean of each group, repeated for its D channels: `[C]` to `[C]`."""
    group_size = values.numel() // num_groups
    return values.view(num_groups, group_size).mean(1).repeat_interleave(group_size)
