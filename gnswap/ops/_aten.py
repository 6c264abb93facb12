"""GroupNorm on ATen's kernels: standardise, ATen's GroupNorm, then residual and activation in place.

Why this way:

- ATen's CPU kernel for channels_last takes E[x²] - E[x]² in fp32; at mean/std = 1000 its error is about 1000 where
  the contiguous kernel's is 1e-4. So the statistics are always taken on a contiguous buffer, and the result is
  copied back to the format of the input.
- Scale and shift are two roundings, never a fused multiply-add: which elements a compiler fuses may depend on the
  length of the tensor, and a sample must have the same bits alone and in a batch.
- ATen's backward uses uncentred sums. Handed xhat with mean 0 and deviation 1, the same kernel is the centred form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnswap._errors import ArgumentError
from gnswap.ops._activations import activate_, activate_backward_
from gnswap.ops._reference import Gradients, accumulation_dtype, memory_format, per_channel


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
    """Forward; arguments and results as in `_reference.group_norm`. `x` must not be empty."""
    inverse = None if channel_order is None else inverse_order(channel_order)
    u = _standardised(x, channel_scale, channel_shift, channel_order)
    n, c, s = u.shape
    y, mean, rstd = torch.native_group_norm(
        u,
        _ordered(weight, channel_order, u.dtype),
        _ordered(bias, channel_order, u.dtype),
        n,
        c,
        s,
        num_groups,
        eps,
    )
    if inverse is not None:
        y = torch.index_select(y, 1, inverse, out=u)  # u is a buffer of ours, gathered by the order
    y = y.reshape(x.shape)
    if residual is not None:
        y.add_(residual)
    return _finished(activate_(y, act), x), mean, rstd


def group_norm_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
    mask: list[bool],
) -> Gradients:
    """Backward from saved statistics; `mask` says which of the six gradients are wanted. `x` must not be empty."""
    need_x, need_weight, need_bias, need_residual, need_scale, need_shift = mask
    u = _standardised(x, channel_scale, channel_shift, channel_order)
    n, c, s = u.shape
    grouped = (n, num_groups, -1)
    xhat = u.reshape(grouped) - mean[..., None] if _shares(u, x) else u.reshape(grouped).sub_(mean[..., None])
    xhat = xhat.mul_(rstd[..., None]).reshape(u.shape)
    dz = _gathered(dy, u.dtype, channel_order)
    ordered_weight = _ordered(weight, channel_order, u.dtype)
    if act is not None:
        z = xhat.clone() if ordered_weight is None else xhat * per_channel(ordered_weight, u)
        ordered_bias = _ordered(bias, channel_order, u.dtype)
        if ordered_bias is not None:
            z.add_(per_channel(ordered_bias, u))
        if residual is not None:
            z.add_(_gathered(residual, residual.dtype, channel_order))
        dz = activate_backward_(dz, z, act)

    inverse = None if channel_order is None else inverse_order(channel_order)
    need_du = need_x or need_scale or need_shift
    du, dweight, dbias = torch.ops.aten.native_group_norm_backward.default(
        dz,
        xhat,
        torch.zeros_like(mean),
        torch.ones_like(rstd),
        ordered_weight,
        n,
        c,
        s,
        num_groups,
        [need_du, need_weight, need_bias],
    )
    dx = dscale = dshift = None
    if need_du:
        du = du.reshape(grouped).mul_(rstd[..., None]).reshape(u.shape)
        du = du if inverse is None else torch.index_select(du, 1, inverse, out=xhat)
        du = du.reshape(x.shape)
        over_batch = [0, *range(2, x.ndim)]
        dscale = (du * x).sum(over_batch) if need_scale else None
        dshift = du.sum(over_batch) if need_shift else None
        if need_x:
            dx = _finished(du if channel_scale is None else du.mul_(per_channel(channel_scale, x)), x)
    dresidual = None
    if need_residual and residual is not None:
        dz = dz if inverse is None else dz.index_select(1, inverse)
        dresidual = _finished(dz.reshape(x.shape), residual)
    return Gradients(
        x=dx,
        weight=_restored(dweight, inverse, weight) if need_weight else None,
        bias=_restored(dbias, inverse, bias) if need_bias else None,
        residual=dresidual,
        channel_scale=_restored(dscale, None, channel_scale),
        channel_shift=_restored(dshift, None, channel_shift),
    )


def inverse_order(order: Tensor) -> Tensor:
    """The permutation that undoes `order`. Raises `ArgumentError` where it is not a permutation (on the CPU)."""
    values, inverse = order.sort()
    # on CUDA the look would wait for the device in every call; there index_select's own range check has to do
    if order.device.type == "cpu" and not torch.equal(values, torch.arange(len(order))):
        raise ArgumentError(
            "channel_order is not a permutation",
            where="group_norm",
            expected=f"every channel from 0 to {len(order) - 1} once",
            found=str(order.tolist()),
        )
    return inverse


def _gathered(t: Tensor, dtype: torch.dtype, order: Tensor | None) -> Tensor:
    """`t` as contiguous `[N, C, S]`, its channels in `order`; shares memory with `t` where nothing has to be done.

    Three axes, because strides of an axis of length 1 are arbitrary: contiguous `[N, C, 1, 1]` may look like
    channels_last, for which ATen takes the uncentred kernel.
    """
    t = _contiguous(t).reshape(*t.shape[:2], -1)
    return (t if order is None else t.index_select(1, order)).to(dtype)


def _shares(t: Tensor, other: Tensor) -> bool:
    return t.data_ptr() == other.data_ptr()


def _contiguous(t: Tensor) -> Tensor:
    if t.device.type != "cpu" or not t.is_contiguous(memory_format=torch.channels_last) or t.is_contiguous():
        return t.contiguous()
    # ATen has a blocked transpose for matrices only, and it is up to four times faster than its general copy
    n, c = t.shape[:2]
    result = torch.empty_like(t, memory_format=torch.contiguous_format)
    for target, source in zip(result.reshape(n, c, -1), t.permute(0, 2, 3, 1).reshape(n, -1, c), strict=True):
        target.copy_(source.t())
    return result


def _standardised(
    x: Tensor, channel_scale: Tensor | None, channel_shift: Tensor | None, order: Tensor | None
) -> Tensor:
    """scale * x + shift in the accumulation dtype; otherwise as `_gathered`."""
    u = _gathered(x, accumulation_dtype(x.dtype), order)
    scale, shift = (_ordered(vector, order, u.dtype) for vector in (channel_scale, channel_shift))
    if scale is not None:
        u = u * per_channel(scale, u) if _shares(u, x) else u.mul_(per_channel(scale, u))
    if shift is not None:
        u = u + per_channel(shift, u) if _shares(u, x) else u.add_(per_channel(shift, u))
    return u


def _ordered(vector: Tensor | None, order: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if vector is None:
        return None
    return (vector if order is None else vector[order]).to(dtype).contiguous()


def _restored(gradient: Tensor | None, inverse: Tensor | None, like: Tensor | None) -> Tensor | None:
    if gradient is None or like is None:
        return None
    return (gradient if inverse is None else gradient[inverse]).to(like.dtype)


def _finished(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.dtype).contiguous(memory_format=memory_format(like))
