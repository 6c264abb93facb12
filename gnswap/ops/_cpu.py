"""GroupNorm on our C++ kernels: what they take, and the calls.

Why a kernel of our own on the CPU: statistics, standardisation, residual and activation in one pass with one
allocation takes less time than the best sequence of ATen calls for most shapes (examples/benchmarks/results/kernels.md
says for which), and ATen's channels_last kernel loses all digits where the mean is large against the deviation. See
csrc/ for the method.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gnswap.ops import _aten
from gnswap.ops._activations import ACTIVATIONS
from gnswap.ops._reference import Gradients, accumulation_dtype, memory_format

_ACT_CODES = {None: 0} | {name: code for code, name in enumerate(ACTIVATIONS, 1)}


@functools.cache
def _ops() -> tuple[Any, Any]:
    return torch.ops.gnswap_cpu.forward.default, torch.ops.gnswap_cpu.backward.default


def kernel(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The C++ forward; `RuntimeError` for everything that it does not take, wrong arguments among it."""
    result: tuple[Tensor, Tensor, Tensor] = _ops()[0](x, num_groups, weight, bias, eps, _ACT_CODES[act], *rest)
    return result


def backward_kernel(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    *rest: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The C++ backward: gradients of x, weight, bias in their dtypes, and of the residual in the layout of x.

    Without `act` the residual's gradient is `dy`, so none should be handed in.
    """
    dx, dweight, dbias, dresidual = _ops()[1](dy, x, mean, rstd, num_groups, weight, bias, _ACT_CODES[act], *rest)
    dweight = None if weight is None else dweight if dweight.dtype == weight.dtype else dweight.to(weight.dtype)
    dbias = None if bias is None else dbias if dbias.dtype == bias.dtype else dbias.to(bias.dtype)
    return dx, dweight, dbias, dresidual


def mixed(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual is of another dtype; the kernels know one, so both become what they compute in."""
    return residual is not None and residual.dtype != x.dtype


def _as(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.dtype)


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
    """Forward; arguments and results as in `_reference.group_norm`. Groups must have two elements or more."""
    channels = (channel_scale, channel_shift, channel_order)
    if residual is not None and mixed(x, residual):
        wide = accumulation_dtype(x.dtype)
        y, mean, rstd = group_norm(x.to(wide), num_groups, weight, bias, eps, act, residual.to(wide), *channels)
        return y.to(x.dtype), mean, rstd
    try:
        return kernel(x, num_groups, weight, bias, eps, act, residual, *channels)
    except RuntimeError:
        if channel_order is not None:
            _aten.inverse_order(channel_order)  # raises our own error where it is not a permutation
        raise


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
    """Backward from saved statistics; `mask` says which gradients are wanted. Groups must have two elements or more."""
    channels = (channel_scale, channel_shift, channel_order)
    arguments = (dy, x, mean, rstd, num_groups, weight, bias, act, residual, *channels)
    if residual is not None and mixed(x, residual):
        wide = accumulation_dtype(x.dtype)
        narrow = (dy.to(wide), x.to(wide), *arguments[2:8], residual.to(wide), *channels)
        result = group_norm_backward(*narrow, mask)
        return result._replace(x=_as(result.x, x), residual=_as(result.residual, residual))
    dscale = dshift = None
    if mask[4] or mask[5]:
        # Rare, for they are buffers in every network that gnswap makes. The other four gradients come from the kernel
        # all the same: their bits must not depend on what else is asked for.
        others = _aten.group_norm_backward(*arguments, [False] * 4 + mask[4:])
        dscale, dshift = others.channel_scale, others.channel_shift
    kernel_residual = residual if act is not None else None
    dx, dweight, dbias, dresidual = backward_kernel(
        dy.to(x.dtype), x, mean, rstd, num_groups, weight, bias, act, kernel_residual, *channels
    )
    residual_gradient: Tensor | None = None
    if residual is not None and act is None:
        residual_gradient = dy.to(residual.dtype, memory_format=memory_format(residual), copy=True)
    elif residual is not None:
        residual_gradient = dresidual.contiguous(memory_format=memory_format(residual))
    return Gradients(
        x=dx,
        weight=dweight,
        bias=dbias,
        residual=residual_gradient,
        channel_scale=dscale,
        channel_shift=dshift,
    )
