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

**Balance.** Inside its group a channel may be made louder by a factor :math:`e_c > 0` and moved by a centre
:math:`t_c`: :math:`z_c = s_c e_c (\hat x_c + t_c)`. Nominally :math:`m^0_g = \frac1D\sum s_c e_c t_c` and
:math:`v^0_g = \frac1D\sum e_c^2 (r_c + t_c^2) - (m^0_g)^2`. Dividing by :math:`e_c` behind the norm, and taking away
the constant :math:`k_c = t_c - s_c m^0_g / e_c`, the outputs are equal again for those statistics. What it is good for:
:math:`\mathrm{E}(\hat x + t)^2 = \mathrm{E}\hat x^2 + 2 t\,\mathrm{E}\hat x + t^2`, so with the right centres the
variance of a group hardly changes from one sample to the next (`_balance`).
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
        quieter: 1/e, a further factor on gamma; None where no channel was made louder.
        constant: k, which is in the output for each gamma and has to be taken away; None where there are no centres.
    """

    scale: Tensor
    shift: Tensor
    gain: Tensor
    quieter: Tensor | None = None
    constant: Tensor | None = None


def standardise(
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    num_groups: int,
    *,
    softness: float = 0.0,
    channel_order: Tensor | None = None,
    signs: Tensor | None = None,
    loudness: Tensor | None = None,
    centre: Tensor | None = None,
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
        loudness: e, positive, `[C]`, natural order; None is 1.
        centre: t, `[C]`, natural order; None is 0.

    Returns:
        scale, shift and gain, and what undoes loudness and centre.

    Example:
        >>> constants = standardise(torch.zeros(4), torch.full((4,), 3.0), eps=1.0, num_groups=1)
        >>> constants.scale
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    mean, var = running_mean.detach().double(), running_var.detach().double()
    dtype, one = running_var.dtype, torch.ones_like(var)
    s = one if signs is None else signs.to(one)
    e = one if loudness is None else loudness.to(one)
    t = 0 * one if centre is None else centre.to(one)
    scale = s * e * (var + eps).rsqrt()
    middle = _of_group(s * e * t, num_groups, channel_order)
    nominal = _of_group(e.square() * (var / (var + eps) + t.square()), num_groups, channel_order) - middle.square()
    return Standardisation(
        scale.to(dtype),
        (s * e * t - mean * scale).to(dtype),
        (s * (nominal + (eps + softness)).sqrt()).to(dtype),
        None if loudness is None else (1 / e).to(dtype),
        None if centre is None else (t - s * middle / e).to(dtype),
    )


def _of_group(values: Tensor, num_groups: int, channel_order: Tensor | None) -> Tensor:
    """The mean of each channel's group: `[C]` to `[C]`, natural order."""
    order = torch.arange(len(values), device=values.device) if channel_order is None else channel_order
    means = values[order].view(num_groups, -1).mean(1).repeat_interleave(len(values) // num_groups)
    return torch.empty_like(values).index_copy(0, order, means)
