"""The short way into the C++ kernels: for plain eager calls, past everything that only other callers need.

Why: a registered Python op costs 30 µs a call and ten times that with its autograd, which is more than the norm of a
small feature map takes. Where nothing watches the call (no compiler, tracer, dispatch mode, functorch transform or
tensor subclass), the kernel and one autograd.Function give the same bits in the time that torch's own norm needs.
Everything else goes to the registered op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gnswap.ops import _cpu, _op

_PLAIN = (Tensor, nn.Parameter)


def group_norm(x: Tensor, *args: Any) -> Tensor | None:
    """`y` for the arguments of the op, not yet checked; None where the call has to go through the op.

    Every wrong argument gives None too: the kernels notice, and the op's own check says what is wrong.
    """
    if torch.compiler.is_compiling() or not _unwatched(x) or x.device.type != "cpu":
        return None
    residual = args[5]
    if x.numel() == 0 or _cpu.single_elements(x, args[0]) or _cpu.mixed(x, residual):
        return None
    if _op.backend_of(x) != "cpp":
        return None
    try:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in (x, *args)):
            y: Tensor = _Norm.apply(x, *args)
            return y
        return _cpu.group_norm(x, *args)[0]
    except (RuntimeError, KeyError, ZeroDivisionError, TypeError, ValueError):
        return None


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
        (dy,) = grad_outputs
        if dy is None or torch.compiler.is_compiling() or not _unwatched(dy):
            return _op.backward(ctx, dy)
        # the vmap of is_grads_batched=True is an older one than functorch's
        if torch._C._functorch.is_legacy_batchedtensor(dy):
            return _op.backward(ctx, dy)
        return _op.backward(ctx, dy, _gradients)


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
