"""The activations that the norm computes in the same pass: one table of function, in-place form and derivative.

Why a closed list and not any callable: a fused kernel needs the function and its derivative at compile time, and
the backward recomputes the pre-activation instead of storing it. Everything else stays an ordinary module after
the norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class _Activation:
    function: Callable[[Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    # (dy, z) -> dy * act'(z) written over z
    backward: Callable[[Tensor, Tensor], Tensor]
    # exp and erf have vector and scalar versions in ATen's CPU loops, which differ in the last bit
    transcendental: bool = False


def _relu_derivative(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _relu6_derivative(z: Tensor) -> Tensor:
    return ((z > 0) & (z < 6)).to(z.dtype)


def _silu_derivative(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def _gelu_derivative(z: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return cdf + z * density


def _hardswish_derivative(z: Tensor) -> Tensor:
    inside = (z > -3) & (z < 3)
    return torch.where(inside, z / 3 + 0.5, (z >= 3).to(z.dtype))


def _leaky_relu_derivative(z: Tensor) -> Tensor:
    return torch.ones_like(z).where(z > 0, _LEAKY_SLOPE)


_aten = torch.ops.aten
_TABLE = {
    "relu": _Activation(
        function=F.relu,
        inplace=torch.relu_,
        derivative=_relu_derivative,
        backward=lambda dy, z: _aten.threshold_backward.grad_input(dy, z, 0, grad_input=z),
    ),
    "relu6": _Activation(
        function=F.relu6,
        inplace=lambda z: F.relu6(z, inplace=True),
        derivative=_relu6_derivative,
        backward=lambda dy, z: _aten.hardtanh_backward.grad_input(dy, z, 0, 6, grad_input=z),
    ),
    "silu": _Activation(
        function=F.silu,
        inplace=lambda z: F.silu(z, inplace=True),
        derivative=_silu_derivative,
        backward=lambda dy, z: _aten.silu_backward.grad_input(dy, z, grad_input=z),
        transcendental=True,
    ),
    "gelu": _Activation(
        function=F.gelu,
        inplace=_aten.gelu_.default,
        derivative=_gelu_derivative,
        backward=lambda dy, z: _aten.gelu_backward.grad_input(dy, z, grad_input=z),
        transcendental=True,
    ),
    "hardswish": _Activation(
        function=F.hardswish,
        inplace=lambda z: F.hardswish(z, inplace=True),
        derivative=_hardswish_derivative,
        backward=lambda dy, z: z.copy_(_aten.hardswish_backward.default(dy, z)),
    ),
    "leaky_relu": _Activation(
        function=lambda z: F.leaky_relu(z, _LEAKY_SLOPE),
        inplace=lambda z: F.leaky_relu(z, _LEAKY_SLOPE, inplace=True),
        derivative=_leaky_relu_derivative,
        backward=lambda dy, z: _aten.leaky_relu_backward.grad_input(dy, z, _LEAKY_SLOPE, False, grad_input=z),
    ),
}

#: Names that `act` accepts beside None: relu, relu6, silu, gelu (exact, with erf), hardswish and leaky_relu
#: (slope 0.01), each the function of that name in `torch.nn.functional`.
ACTIVATIONS: tuple[str, ...] = tuple(_TABLE)

# timm's own classes for the same functions, by name, because importing timm takes a second
_TIMM_NAMES = {
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations_me.SwishMe": "silu",
    "timm.layers.activations.HardSwish": "hardswish",
    "timm.layers.activations_me.HardSwishMe": "hardswish",
    "timm.layers.activations.GELU": "gelu",
}


def activation_name(module: nn.Module) -> str | None:
    """Name under which `group_norm` computes the function of an activation module.

    Only exact types with the right settings count: a subclass or a patched `forward` may compute something else.

    Args:
        module: the activation; `inplace` does not matter.

    Returns:
        One of `ACTIVATIONS`, or None where the module has to be kept and called.

    Example:
        >>> activation_name(nn.SiLU(inplace=True)), activation_name(nn.GELU(approximate="tanh"))
        ('silu', None)
    """
    kind = type(module)
    if "forward" in module.__dict__:
        return None
    if isinstance(module, nn.GELU):
        return "gelu" if kind is nn.GELU and module.approximate == "none" else None
    if isinstance(module, nn.LeakyReLU):
        return "leaky_relu" if kind is nn.LeakyReLU and module.negative_slope == _LEAKY_SLOPE else None
    torch_names: dict[type[nn.Module], str] = {
        nn.ReLU: "relu",
        nn.ReLU6: "relu6",
        nn.SiLU: "silu",
        nn.Hardswish: "hardswish",
    }
    return torch_names.get(kind) or _TIMM_NAMES.get(f"{kind.__module__}.{kind.__qualname__}")


def activate(z: Tensor, act: str | None) -> Tensor:
    """`act(z)`, differentiable; `z` itself where `act` is None."""
    return z if act is None else _TABLE[act].function(z)


def derivative(z: Tensor, act: str) -> Tensor:
    """`act'(z)` at the pre-activation `z`, in plain torch and differentiable; at a kink the value autograd takes."""
    return _TABLE[act].derivative(z)


def activate_(z: Tensor, act: str | None) -> Tensor:
    """Apply `act` to the buffer `z` `[N, ...]` in place, with bits of a sample that do not depend on the batch."""
    if act is not None:
        for part in _independent_parts(z, act):
            _TABLE[act].inplace(part)
    return z


def activate_backward_(dy: Tensor, z: Tensor, act: str) -> Tensor:
    """Overwrite the pre-activation `z` `[N, ...]` with `dy * act'(z)`; bits as in `activate_`."""
    for dy_part, part in zip(_independent_parts(dy, act), _independent_parts(z, act), strict=True):
        _TABLE[act].backward(dy_part, part)
    return z


def _independent_parts(z: Tensor, act: str) -> tuple[Tensor, ...]:
    # ATen's CPU loops send the last few elements of a tensor (and of each thread's share) through the scalar
    # exp or erf. Which elements those are depends on the size of the tensor handed over, so it must be one sample.
    if _TABLE[act].transcendental and z.device.type == "cpu":
        return z.unbind(0)
    return (z,)
