r"""GroupNorm in plain torch: the definition that every kernel is tested against.

Forward (Wu & He, *Group Normalization*, 2018, eq. 1-3, on standardised channels):

    u_nc = scale_c x_nc + shift_c
    m_ng, v_ng = mean and variance of u over the D channels {order[gD], ..., order[gD + D-1]} and all S positions
    xhat = (u - m) r,   r = (v + eps)^-1/2
    z = xhat weight_c + bias_c + residual,   y = act(z)

Backward, with dz = dy act'(z), dxhat = dz weight_c and <.> the mean over a group:

    dbias = sum_ns dz        dweight = sum_ns dz xhat        dresidual = dz
    du = r (dxhat - <dxhat> - xhat <dxhat xhat>)
    dx = scale_c du          dscale = sum_ns x du            dshift = sum_ns du

Half types are computed in fp32 and rounded once, at the end. The variance is the mean of squared deviations, never
E[u²] - E[u]², which loses all digits where the mean is large against the deviation. Both functions are made of
differentiable torch operations, so the backward is also the way to derivatives of any higher order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gnswap.ops._activations import activate, derivative


class Gradients(NamedTuple):
    """Gradients in the order of `group_norm_backward`'s mask, each in its input's dtype; None: no such input."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    channel_scale: Tensor | None
    channel_shift: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for inputs of `dtype`: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(x: Tensor) -> torch.memory_format:
    """The format an output like `x` gets: channels_last (4-D, 5-D) where channels lie next to each other in `x`."""
    if x.ndim in (4, 5) and not x.is_contiguous() and x.shape[1] > 1 and x.stride(1) == 1:
        return torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return torch.contiguous_format


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """View of `[C]` that broadcasts against `x` `[N, C, ...]`, in the accumulation dtype of `x`."""
    return vector.to(accumulation_dtype(x.dtype)).reshape(1, -1, *[1] * (x.ndim - 2))


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward; see the module's formulas.

    Returns:
        y in shape, dtype and memory format of `x`, and mean m and reciprocal deviation r, `[N, G]`, in the
        accumulation dtype.
    """
    xhat, mean, rstd = _normalise(x, num_groups, eps, channel_scale, channel_shift, channel_order)
    y = activate(_pre_activation(xhat, weight, bias, residual), act)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x)), mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
) -> Gradients:
    """Explicit backward; see the module's formulas. The statistics are taken from `x` again, as part of the graph."""
    xhat, _, rstd = _normalise(x, num_groups, eps, channel_scale, channel_shift, channel_order)
    over_batch = [0, *range(2, x.ndim)]

    dz = dy.to(xhat.dtype)
    if act is not None:
        dz = dz * derivative(_pre_activation(xhat, weight, bias, residual), act)
    dxhat = dz if weight is None else dz * per_channel(weight, x)

    dxhat_g, xhat_g = (_to_groups(t, num_groups, channel_order) for t in (dxhat, xhat))
    mean_dxhat = dxhat_g.mean(-1, keepdim=True)
    mean_dxhat_xhat = (dxhat_g * xhat_g).mean(-1, keepdim=True)
    du_g = rstd[..., None] * (dxhat_g - mean_dxhat - xhat_g * mean_dxhat_xhat)
    du = _from_groups(du_g, x, channel_order)
    dx = du if channel_scale is None else du * per_channel(channel_scale, x)

    def reduced(terms: Tensor, like: Tensor | None) -> Tensor | None:
        return None if like is None else terms.sum(over_batch).to(like.dtype)

    return Gradients(
        x=dx.to(x.dtype).contiguous(memory_format=memory_format(x)),
        weight=reduced(dz * xhat, weight),
        bias=reduced(dz, bias),
        residual=None if residual is None else dz.to(residual.dtype),
        channel_scale=reduced(du * x, channel_scale),
        channel_shift=reduced(du, channel_shift),
    )


def _normalise(
    x: Tensor,
    num_groups: int,
    eps: float,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    u = x.to(accumulation_dtype(x.dtype))
    if channel_scale is not None:
        u = u * per_channel(channel_scale, x)
    if channel_shift is not None:
        u = u + per_channel(channel_shift, x)
    groups = _to_groups(u, num_groups, channel_order)
    mean = groups.mean(-1, keepdim=True)
    centred = groups - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return _from_groups(centred * rstd, x, channel_order), mean.squeeze(-1), rstd.squeeze(-1)


def _pre_activation(xhat: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    z = xhat if weight is None else xhat * per_channel(weight, xhat)
    z = z if bias is None else z + per_channel(bias, xhat)
    return z if residual is None else z + residual.to(z.dtype)


def _to_groups(t: Tensor, num_groups: int, order: Tensor | None) -> Tensor:
    t = t if order is None else t.index_select(1, order)
    # the size is spelled out because -1 is undefined for an empty batch
    return t.reshape(t.shape[0], num_groups, math.prod(t.shape[1:]) // num_groups)


def _from_groups(groups: Tensor, like: Tensor, order: Tensor | None) -> Tensor:
    t = groups.reshape(like.shape)
    return t if order is None else t.index_select(1, order.argsort())
