"""The short way into the C++ and the Triton kernels: for plain eager calls, past what only other callers need.

Why: a registered Python op costs 30 µs a call and ten times that with its autograd, which is more than the norm of a
small feature map takes. Where nothing watches the call (no compiler, tracer, dispatch mode, functorch transform or
tensor subclass), the kernel and one autograd.Function give the same bits in the time that torch's own norm needs.
Everything else goes to the registered op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gnswap.ops import _cpu, _op

_PLAIN = (Tensor, nn.Parameter)


def group_norm(x: Tensor, *args: Any) -> Tensor | None:
    """`y` for the arguments of the op, not yet checked; None where the call has to go through the op.

    Every wrong argument gives None too: the kernels notice, and the op's own check says what is wrong. Only on CUDA
    they would not, so there the arguments are checked first.
    """
    if torch.compiler.is_compiling() or not _unwatched(x):
        return None
    if _op.backend_of(x) == "triton":
        return _on_cuda(x, *args)
    residual = args[5]
    if x.numel() == 0 or _cpu.single_elements(x, args[0]) or _cpu.mixed(x, residual):
        return None
    if _op.backend_of(x) != "cpp":
        return None
    try:
        if _wants_gradient(x, *args):
            y: Tensor = _Norm.apply(x, *args)
            return y
        return _cpu.group_norm(x, *args)[0]
    except (RuntimeError, KeyError, ZeroDivisionError, TypeError, ValueError):
        return None


def _on_cuda(x: Tensor, *args: Any) -> Tensor | None:
    if x.numel() == 0:
        return None
    num_groups, weight, bias, eps, act, residual, scale, shift, order = args
    vectors = {"weight": weight, "bias": bias, "channel_scale": scale, "channel_shift": shift}
    _op.check_arguments(x, num_groups, eps, act, residual, order, **vectors)
    if _wants_gradient(x, *args):
        y: Tensor = _CudaNorm.apply(x, *args)
        return y
    return _op.forward(x, *args)[0]


def _wants_gradient(*values: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def _unwatched(t: Tensor) -> bool:
    return (
        type(t) in _PLAIN
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


class _Norm(torch.autograd.Function):
    """The op's autograd, without the op."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        y, mean, rstd = _cpu.group_norm(x, *args)
        _op.setup_context(ctx, (x, *args), (y, mean, rstd))
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_outputs[0], _gradients)


class _CudaNorm(torch.autograd.Function):
    """The same around the Triton kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        result = _op.forward(x, *args)
        _op.setup_context(ctx, (x, *args), result)
        return result[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_outputs[0], _op.gradients)


def _backward(ctx: Any, dy: Tensor | None, once: Callable[..., tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    if dy is None or torch.compiler.is_compiling() or not _unwatched(dy):
        return _op.backward(ctx, dy)
    # the vmap of is_grads_batched=True is an older one than functorch's
    if torch._C._functorch.is_legacy_batchedtensor(dy):
        return _op.backward(ctx, dy)
    return _op.backward(ctx, dy, once)


def _gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    _eps: float,
    *rest: Any,
) -> tuple[Tensor | None, ...]:
    return _cpu.group_norm_backward(dy, x, mean, rstd, num_groups, weight, bias, *rest)
