r"""What a GroupNorm makes of each channel that a BatchNorm stood for: how much it keeps, and how far it moves it.

Any of our layers sees channel c as :math:`z_c = a_c + b_c \hat x_c`, with :math:`\hat x_c = (x_c - \mu_c)/\sigma_c`,
:math:`\sigma_c = \sqrt{\mathrm{var}_c + \epsilon}` what BatchNorm makes of it before gamma and beta. It gives

.. math::
    y_c - \beta_c = \gamma_c\,\mathrm{gain}_c \frac{z_c - m_g}{\sqrt{v_g + e}}
        = \gamma_c \,( k_c\, \hat x_c + t_c ), \qquad
    k_c = \frac{b_c\,\mathrm{gain}_c}{\sqrt{v_g + e}}, \quad
    t_c = \frac{(a_c - m_g)\,\mathrm{gain}_c}{\sqrt{v_g + e}}

with e = eps + softness, so the layer computes what BatchNorm did exactly where every *factor* :math:`k_c` is 1 and
every *shift* :math:`t_c` is 0. Both follow from the first two moments of :math:`\hat x` over the positions, since

.. math::
    m_g = \frac1D \sum_{c \in g} (a_c + b_c\,\mathrm{E}\hat x_c), \qquad
    v_g = \frac1D \sum_{c \in g} (a_c^2 + 2 a_c b_c\,\mathrm{E}\hat x_c + b_c^2\,\mathrm{E}\hat x_c^2) - m_g^2 .

**The naive swap** copies gamma and beta: a = μ, b = σ, gain = 1. On a sample with the statistics of the training set,
:math:`\mathrm{E}\hat x_c = 0` and :math:`\mathrm{E}\hat x_c^2 = \mathrm{var}_c/\sigma_c^2`, so the group's variance
is the mean of its channels' variances plus the variance of their means,

.. math::
    v_g = \frac1D \sum_{c \in g} \mathrm{var}_c + \frac1D \sum_{c \in g} (\mu_c - m_g)^2, \qquad
    k_c = \frac{\sigma_c}{\sqrt{v_g + \epsilon}}, \quad t_c = \frac{\mu_c - m_g}{\sqrt{v_g + \epsilon}} .

One channel that varies much, or whose mean lies far from the others', makes :math:`v_g` large: every quieter channel
beside it is squashed, :math:`k_c \ll 1`.

**A standardised layer** has a = 0 and b = ±1, so :math:`m_g = 0`; its gain is what makes :math:`k_c = 1` (`_algebra`).
With balance (`_balance`) a and b are each channel's own, and the gain undoes b.

Why not measured: running statistics are in every pretrained network, so this needs neither photos nor a forward pass.
What it cannot tell is how samples differ from the training set's statistics: `gnswap.report` measures that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gnswap._layer import FusedGroupNorm


@dataclass(frozen=True, eq=False)
class View:
    """How a layer sees the channels of the BatchNorm that it stands for (module docstring), fp64 on the CPU.

    Attributes:
        a, b: the affine map from x̂ to what the statistics are taken of, `[C]`.
        gain: factor on gamma, `[C]`; without corrections fitted to photos.
        group: the group of each channel, int64 `[C]`.
        num_groups: G.
        epsilon: eps and softness together.
    """

    a: Tensor
    b: Tensor
    gain: Tensor
    group: Tensor
    num_groups: int
    epsilon: float

    @classmethod
    def of(cls, layer: FusedGroupNorm, mean: Tensor, deviation: Tensor) -> Self:
        """The view of a layer.

        Args:
            layer: stands for the BatchNorm.
            mean, deviation: μ and σ of that BatchNorm, fp64 `[C]` on the CPU.
        """
        scale, shift, gain, correction = (
            default if buffer is None else buffer.detach().double().cpu()
            for buffer, default in (
                (layer.channel_scale, torch.ones_like(mean)),
                (layer.channel_shift, torch.zeros_like(mean)),
                (layer.channel_gain, torch.ones_like(mean)),
                (layer.channel_correction, torch.ones_like(mean)),
            )
        )
        order = torch.arange(len(mean)) if layer.channel_order is None else layer.channel_order.cpu()
        group = torch.empty_like(order)
        group[order] = torch.arange(layer.num_groups).repeat_interleave(len(order) // layer.num_groups)
        a, b = scale * mean + shift, scale * deviation
        return cls(a, b, gain * correction, group, layer.num_groups, layer.eps + layer.softness)

    def statistics(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the groups.

        Args:
            first, second: of x̂ and of x̂² over the positions of each sample, fp64 `[N, C]`.

        Returns:
            m and v, `[N, G]`.
        """
        z1 = self.a + self.b * first
        z2 = self.a.square() + 2 * self.a * self.b * first + self.b.square() * second
        mean, square = self._group_means(z1), self._group_means(z2)
        return mean, (square - mean.square()).clamp_min(0)

    def response(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Factor k and shift t of every channel (module docstring), each `[N, C]`.

        Args:
            first, second: see `statistics`.

        Example:
            >>> layer = FusedGroupNorm(1, 2, eps=0.0)  # the naive swap: a loud channel and one a hundred times quieter
            >>> mean, deviation = torch.zeros(2).double(), torch.tensor([100.0, 1.0]).double()
            >>> factor, shift = View.of(layer, mean, deviation).response(mean[None], torch.ones(1, 2).double())
            >>> [round(value, 4) for value in factor[0].tolist()]
            [1.4141, 0.0141]
        """
        mean, variance = self.statistics(first, second)
        rate = self.gain / (variance + self.epsilon).sqrt()[:, self.group]
        return self.b * rate, (self.a - mean[:, self.group]) * rate

    def _group_means(self, table: Tensor) -> Tensor:
        sums = table.new_zeros(len(table), self.num_groups).index_add(1, self.group, table)
        return sums / (table.shape[1] // self.num_groups)
