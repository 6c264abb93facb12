"""The short way into the C++ and the Triton kernels: for plain eager calls, past what only other callers need.

Why: a registered Python op costs 30 µs a call and ten times that with its autograd, which is more than the norm of a
small feature map takes. Where nothing watches the call (no compiler, tracer, dispatch mode, functorch transform or
tensor subclass), csrc/eager.cpp gives the same bits in less than the time that torch's own norm needs; where that could
not be compiled, and on CUDA, one autograd.Function does. Everything else goes to the registered op.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from gnswap.ops import _cpu, _cpu_library, _op
from gnswap.ops._activations import ACTIVATIONS

_PLAIN = (Tensor, nn.Parameter)


def group_norm(x: Tensor, *args: Any) -> Tensor | None:
    """`y` for the arguments of the op, not yet checked; None where the call has to go through the op.

    Every wrong argument gives None too: the kernels notice, and the op's own check says what is wrong. Only on CUDA
    they would not, so there the arguments are checked first.
    """
    if torch.compiler.is_compiling() or type(x) not in _PLAIN:
        return None
    backend = _op.backend_of(x)
    if backend == "cpp" and (eager := _eager()) is not None:
        return eager(x, *args)
    if not _unwatched(x):
        return None
    if backend == "triton":
        return _on_cuda(x, *args)
    if backend != "cpp":
        return None
    try:
        if _wants_gradient(x, *args):
            y: Tensor = _Norm.apply(x, *args)
            return y
        return _cpu.kernel(x, *args)[0]
    except (RuntimeError, KeyError, TypeError):
        return None


def _eager() -> Callable[..., Tensor | None] | None:
    """The compiled way in, or None; the first call of a process loads it."""
    kernels = _cpu_library.library()
    if isinstance(kernels, str) or isinstance(kernels.eager, str):
        return None
    if kernels.eager.kernels:  # not connected yet
        kernels.eager.connect(kernels.eager.kernels, ACTIVATIONS, _eager_backward)
        kernels.eager.kernels = None
    function: Callable[..., Tensor | None] = kernels.eager.group_norm
    return function


def _eager_backward(
    dy: Tensor,
    saved: tuple[Any, ...],
    num_groups: int,
    eps: float,
    act: int,
    residual: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The backward of the compiled way in where it is watched, differentiated again, or asked for rare gradients."""
    x, statistics, *vectors = saved
    mean, rstd = statistics.view(2, len(x), num_groups)
    need_x, need_weight, need_bias, need_residual, need_scale, need_shift = needs
    ctx = SimpleNamespace(
        saved_tensors=(x, mean, rstd, *vectors),
        needs_input_grad=(
            *(need_x, False, need_weight, need_bias, False, False),
            *(need_residual, need_scale, need_shift, False),
        ),
        num_groups=num_groups,
        eps=eps,
        act=ACTIVATIONS[act - 1] if act else None,
        residual_dtype=x.dtype if residual else None,
    )
    dx, _, dweight, dbias, _, _, dresidual, dscale, dshift, _ = _op.backward(ctx, dy)
    return dx, dweight, dbias, dresidual, dscale, dshift


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
    if torch.is_grad_enabled():
        for value in values:  # not any(): a generator takes longer than the kernel's own start
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False


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
        result = _cpu.kernel(x, *args)
        _op.setup_context(ctx, (x, *args), result)
        return result[0]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        dy, needs = grad_outputs[0], ctx.needs_input_grad
        if dy is None or needs[7] or needs[8] or torch.is_grad_enabled() or _watched_gradient(dy):
            return _op.backward(ctx, dy)
        # without an activation no residual was saved, for then its gradient is dy
        x, mean, rstd, weight, bias, residual, *channels = ctx.saved_tensors
        dx, dweight, dbias, dresidual = _cpu.backward_kernel(
            dy, x, mean, rstd, ctx.num_groups, weight, bias, ctx.act, residual, *channels
        )
        if not needs[6]:
            return dx, None, dweight, dbias, None, None, None, None, None, None
        return dx, None, dweight, dbias, None, None, dy if residual is None else dresidual, None, None, None


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
    if dy is None or _watched_gradient(dy):
        return _op.backward(ctx, dy)
    return _op.backward(ctx, dy, once)


def _watched_gradient(dy: Tensor) -> bool:
    # the vmap of is_grads_batched=True is an older one than functorch's
    return torch.compiler.is_compiling() or not _unwatched(dy) or torch._C._functorch.is_legacy_batchedtensor(dy)
