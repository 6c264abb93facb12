"""Operators: GroupNorm on standardised, freely grouped channels, with residual and activation in the same pass.

Axes, everywhere in this package:

====  =======================================================================
N     samples of a batch
C     channels, axis 1 of every input
G     groups of channels (`num_groups`)
D     channels in a group, C / G
S     positions of a sample: the product of all axes after C; 1 for `(N, C)`
====  =======================================================================

Statistics are `[N, G]`, affine parameters and the standardisation `[C]`.
"""

from __future__ import annotations

from torch import Tensor

from gnswap.ops import _direct
from gnswap.ops._activations import ACTIVATIONS, activation_name
from gnswap.ops._backend import BackendReport, backend_report
from gnswap.ops._op import check_arguments, run

__all__ = ["ACTIVATIONS", "BackendReport", "activation_name", "backend_report", "group_norm"]


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    channel_scale: Tensor | None = None,
    channel_shift: Tensor | None = None,
    channel_order: Tensor | None = None,
) -> Tensor:
    r"""GroupNorm of `channel_scale * x + channel_shift`, plus `residual`, through `act`.

    .. math::
        u_c = \mathrm{scale}_c\, x_c + \mathrm{shift}_c, \qquad
        y_c = \mathrm{act}\!\left(\frac{u_c - m_g}{\sqrt{v_g + \epsilon}}\,\mathrm{weight}_c
              + \mathrm{bias}_c + \mathrm{residual}_c\right)

    with mean :math:`m_g` and (biased, centred) variance :math:`v_g` of one sample over the channels of a group and
    all positions (Wu & He, *Group Normalization*, 2018). Without the keyword arguments this is
    `torch.nn.functional.group_norm`. A sample's result has the same bits alone and in any batch, and the same bits
    on every call with the same number of threads.

    Differentiable to any order in `x`, `weight`, `bias`, `residual`, `channel_scale` and `channel_shift`. Registered
    as `torch.ops.gnswap.group_norm`, one node under torch.compile and torch.export. Inside the transforms of
    `torch.func` (vmap, grad, jvp, ...) and in forward mode it is plain torch: right, slower, contiguous.

    Args:
        x: `(N, C)` or `(N, C, *)`, up to 5 dimensions; fp32, fp64, fp16 or bf16; any strides; N may be 0.
        num_groups: G, a divisor of C; a group is D = C/G consecutive entries of `channel_order`.
        weight: `[C]` or None (ones); its dtype may differ from that of `x`.
        bias: `[C]` or None (zeros).
        eps: added to the variance. A group of one element (D = S = 1) has variance 0 and normalises to 0.
        act: one of `ACTIVATIONS`, or None.
        residual: of the shape of `x`; added before the activation.
        channel_scale: `[C]` or None (ones).
        channel_shift: `[C]` or None (zeros).
        channel_order: int64 `[C]`, a permutation of the channels, or None (natural). It decides which channels
            share a group; input, output and all other arguments stay in natural order. That it is a permutation
            is checked on the CPU only: on CUDA the look would make every call wait.

    Returns:
        `y` with shape, dtype and memory format (channels_last, channels_last_3d, else contiguous) of `x`. Half
        types are computed in fp32 and rounded once.

    Raises:
        ArgumentError: an argument of the wrong shape, dtype, device or value.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 8, 5, 5)
        >>> y = group_norm(x, 4, act="silu")
        >>> expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4))
        >>> torch.allclose(y, expected, atol=1e-6)
        True
        >>> even_and_odd = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        >>> group_norm(x, 2, channel_order=even_and_odd)[:, ::2].mean((1, 2, 3)).abs().max() < 1e-6
        tensor(True)
    """
    arguments = (num_groups, weight, bias, eps, act, residual, channel_scale, channel_shift, channel_order)
    y = _direct.group_norm(x, *arguments)
    if y is not None:
        return y
    check_arguments(
        x,
        num_groups,
        eps,
        act,
        residual,
        channel_order,
        weight=weight,
        bias=bias,
        channel_scale=channel_scale,
        channel_shift=channel_shift,
    )
    return run(x, *arguments)
