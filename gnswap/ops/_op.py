"""The registered op: schema, shapes without data, autograd, vmap, and the one check of arguments.

Why `custom_op` and not `triton_op` or an `autograd.Function`: an opaque op stays one node under torch.compile and
torch.export on every device, which the exporter translates as a whole, and it works where triton does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gnswap._errors import ArgumentError
from gnswap.ops import _aten, _cpu, _reference
from gnswap.ops._activations import ACTIVATIONS
from gnswap.ops._backend import DTYPES, choose_backend
from gnswap.ops._reference import accumulation_dtype, memory_format

_INPUTS = (
    "int num_groups, Tensor? weight, Tensor? bias, float eps, str? act, Tensor? residual, "
    "Tensor? channel_scale, Tensor? channel_shift, Tensor? channel_order"
)


@torch.library.custom_op(
    "gnswap::group_norm", mutates_args=(), schema=f"(Tensor x, {_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def group_norm_op(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, rstd)` for arguments that `check_arguments` has passed."""
    y, mean, rstd = forward(x, *args)
    # autograd forbids in-place operations on a view that a custom function returned, and nn.ReLU(inplace=True) follows
    # norms everywhere
    return y.new_empty(0).set_(y) if y._is_view() else y, mean, rstd  # type: ignore[call-overload]


def backend_of(x: Tensor) -> str:
    """Name of the code that computes the norm of `x`."""
    return choose_backend(x.device.type, x.dtype).name


def _degenerate(x: Tensor, num_groups: int) -> bool:
    """Whether groups have no element or one. The kernels would divide by 0, or a rounding of 0 by sqrt(eps)."""
    return x.numel() <= len(x) * num_groups


def forward(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """What the op computes, without the op."""
    backend = backend_of(x)
    if backend == "reference" or _degenerate(x, args[0]):
        return _reference.group_norm(x, *args)
    if backend == "triton":
        from gnswap.ops._triton import _launch  # imports triton, which only CUDA needs

        with torch.cuda.device(x.device):
            result: tuple[Tensor, Tensor, Tensor] = _launch.forward(x, *args)
            return result
    if backend == "cpp":
        return _cpu.group_norm(x, *args)
    return _aten.group_norm(x, *args)


@torch.library.custom_op(
    "gnswap::group_norm_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor x, Tensor mean, Tensor rstd, {_INPUTS}, bool[] mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def group_norm_backward_op(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    """The six gradients of `_reference.Gradients`; an empty tensor for each that `mask` does not ask for."""
    channels = (channel_scale, channel_shift, channel_order)
    found = gradients(dy, x, mean, rstd, num_groups, weight, bias, eps, act, residual, *channels, mask)
    return tuple(
        gradient if wanted and gradient is not None else x.new_empty(0)
        for gradient, wanted in zip(found, mask, strict=True)
    )


def gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    *rest: Any,
) -> _reference.Gradients:
    """What the op of the backward computes, without the op; None where it is not asked for or there is no input."""
    backend = backend_of(x)
    if backend == "reference" or _degenerate(x, num_groups):
        return _reference.group_norm_backward(dy, x, num_groups, weight, bias, eps, act, *rest[:4])
    mask = rest[4]
    arguments = (dy, x, mean, rstd, num_groups, weight, bias, act, *rest)
    if backend == "triton" and not (mask[4] or mask[5]):
        from gnswap.ops._triton import _launch

        with torch.cuda.device(x.device):
            return _launch.backward(*arguments)
    if backend == "cpp":
        return _cpu.group_norm_backward(*arguments)
    return _aten.group_norm_backward(*arguments)


@group_norm_op.register_fake
def _(x: Tensor, num_groups: int, *_args: Any) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x.dtype))
    return _empty_like(x), mean, torch.empty_like(mean)


@group_norm_backward_op.register_fake
def _(
    _dy: Tensor,
    x: Tensor,
    _mean: Tensor,
    _rstd: Tensor,
    _num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    _eps: float,
    _act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    _channel_order: Tensor | None,
    mask: list[bool],
) -> tuple[Tensor, ...]:
    inputs = (x, weight, bias, residual, channel_scale, channel_shift)
    return tuple(
        _empty_like(value) if wanted and value is not None else x.new_empty(0)
        for value, wanted in zip(inputs, mask, strict=True)
    )


def _empty_like(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=memory_format(t))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Save what the backward needs; `inputs` as in the schema."""
    x, num_groups, weight, bias, eps, act, residual, channel_scale, channel_shift, channel_order = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.residual_dtype = None if residual is None else residual.dtype
    if act is None:  # then the pre-activation is never needed again
        residual = None
    ctx.save_for_backward(x, mean, rstd, weight, bias, residual, channel_scale, channel_shift, channel_order)
    ctx.num_groups, ctx.eps, ctx.act = num_groups, eps, act


def _backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return backward(ctx, dy)


def backward(
    ctx: Any, dy: Tensor | None, once: Callable[..., tuple[Tensor | None, ...]] = group_norm_backward_op
) -> tuple[Tensor | None, ...]:
    """Gradients of all inputs; `once` computes them where nobody differentiates again, as the backward op does."""
    x, mean, rstd, weight, bias, residual, *channels = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if dy is None:
        return (None,) * len(needs)
    # in the order of _reference.Gradients
    mask = [needs[0], needs[2], needs[3], needs[6], needs[7], needs[8]]
    without_residual = [*mask[:3], mask[3] and residual is not None, *mask[4:]]
    affine = (ctx.num_groups, weight, bias, ctx.eps, ctx.act, residual)
    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        # create_graph=True: someone wants to differentiate the gradient, which the opaque op cannot do
        found = _reference.group_norm_backward(dy, x, *affine, *channels)
    else:
        found = once(dy, x, mean, rstd, *affine, *channels, without_residual)
    dx, dweight, dbias, dresidual, dscale, dshift = (
        gradient if wanted else None for gradient, wanted in zip(found, mask, strict=True)
    )
    if mask[3] and residual is None:
        dresidual = dy.to(ctx.residual_dtype)
    return dx, None, dweight, dbias, None, None, dresidual, dscale, dshift, None


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    setup_context(ctx, inputs, output)


group_norm_op.register_autograd(_backward, setup_context=_setup_op_context)


def _backward_one_by_one(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
    """The vmap rule, which torch uses for `is_grads_batched=True`: the bits are those of single calls."""
    calls = [
        group_norm_backward_op(
            *(value if dim is None else value.select(dim, index) for value, dim in zip(args, in_dims, strict=True))
        )
        for index in range(info.batch_size)
    ]
    stacked = tuple(torch.stack(gradients) for gradients in zip(*calls, strict=True))
    return stacked, (0,) * len(stacked)


group_norm_backward_op.register_vmap(_backward_one_by_one)


def run(x: Tensor, *args: Any) -> Tensor:
    """The normalised tensor for checked arguments: from the op, or from plain torch where torch cannot use one."""
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        # Inside torch.func transforms a custom op has no gradient, and forward mode drops its tangent without a
        # word; the reference has both. Contiguous, because a batched tensor knows no other memory format.
        return _reference.group_norm(x.contiguous(), *args)[0]
    y: Tensor = group_norm_op(x, *args)[0]
    return y


def check_arguments(
    x: Tensor,
    num_groups: int,
    eps: float,
    act: str | None,
    residual: Tensor | None,
    channel_order: Tensor | None,
    **vectors: Tensor | None,
) -> None:
    """Refuse what the kernels would compute wrongly or fail on without a clear word.

    Args:
        x, num_groups, eps, act, residual, channel_order: as in `gnswap.ops.group_norm`.
        vectors: the floating point `[C]` arguments by name.

    Raises:
        ArgumentError: says which argument, what was expected and what was found.
    """
    if not 2 <= x.ndim <= 5:
        raise _error("x has the wrong number of dimensions", "2 to 5, (N, C, ...)", f"shape {tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise _error("x has a dtype without a norm", ", ".join(map(str, DTYPES)), str(x.dtype))
    channels = x.shape[1]
    if num_groups < 1 or channels < 1 or channels % num_groups:
        raise _error("num_groups must divide the channels of x", f"a divisor of {channels}", str(num_groups))
    if not eps >= 0:
        raise _error("eps is negative", "0 or more", repr(eps))
    if act is not None and act not in ACTIVATIONS:
        raise _error("unknown activation", f"one of {', '.join(ACTIVATIONS)}, or None", repr(act))
    if residual is not None:
        if residual.shape != x.shape:
            raise _error("residual and x differ in shape", str(tuple(x.shape)), str(tuple(residual.shape)))
        _check_tensor("residual", residual, x, DTYPES)
    for name, vector in vectors.items():
        if vector is not None:
            _check_length(name, vector, channels)
            _check_tensor(name, vector, x, DTYPES)
    if channel_order is not None:
        _check_length("channel_order", channel_order, channels)
        _check_tensor("channel_order", channel_order, x, (torch.int64,))


def _check_length(name: str, vector: Tensor, channels: int) -> None:
    if vector.shape != (channels,):
        raise _error(f"{name} does not fit the channels of x", f"shape ({channels},)", str(tuple(vector.shape)))


def _check_tensor(name: str, value: Tensor, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        raise _error(f"{name} has the wrong dtype", ", ".join(map(str, dtypes)), str(value.dtype))
    if value.device != x.device:
        raise _error(f"{name} is on another device than x", str(x.device), str(value.device))


def _error(problem: str, expected: str, found: str) -> ArgumentError:
    return ArgumentError(problem, where="group_norm", expected=expected, found=found)
