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
    return torch.where(z > 0, 1.0, _LEAKY_SLOPE).to(z.dtype)


_TABLE = {
    "relu": _Activation(F.relu, torch.relu_, _relu_derivative),
    "relu6": _Activation(F.relu6, lambda z: F.relu6(z, inplace=True), _relu6_derivative),
    "silu": _Activation(F.silu, lambda z: F.silu(z, inplace=True), _silu_derivative, transcendental=True),
    "gelu": _Activation(F.gelu, torch.ops.aten.gelu_.default, _gelu_derivative, transcendental=True),
    "hardswish": _Activation(F.hardswish, lambda z: F.hardswish(z, inplace=True), _hardswish_derivative),
    "leaky_relu": _Activation(
        lambda z: F.leaky_relu(z, _LEAKY_SLOPE),
        lambda z: F.leaky_relu(z, _LEAKY_SLOPE, inplace=True),
        _leaky_relu_derivative,
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


def derivative(z: Tensor, act: str | None) -> Tensor:
    """`act'(z)` at the pre-activation `z`, differentiable; at a kink the one-sided value that autograd takes."""
    return torch.ones_like(z) if act is None else _TABLE[act].derivative(z)


def activate_(z: Tensor, act: str | None) -> Tensor:
    """Apply `act` to the buffer `z` `[N, ...]` in place, with bits of a sample that do not depend on the batch."""
    if act is not None:
        for part in _independent_parts(z, act):
            _TABLE[act].inplace(part)
    return z


def mul_derivative_(z: Tensor, dy: Tensor, act: str | None) -> Tensor:
    """Overwrite the pre-activation `z` `[N, ...]` with `dy * act'(z)`; bits as in `activate_`."""
    if act is None:
        return z.copy_(dy)
    for part, dy_part in zip(_independent_parts(z, act), _independent_parts(dy, act), strict=True):
        torch.mul(dy_part, _TABLE[act].derivative(part), out=part)
    return z


def _independent_parts(z: Tensor, act: str) -> tuple[Tensor, ...]:
    # ATen's CPU loops send the last few elements of a tensor (and of each thread's share) through the scalar
    # exp or erf. Which elements those are depends on the size of the tensor handed over, so it must be one sample.
    if _TABLE[act].transcendental and z.device.type == "cpu":
        return z.unbind(0)
    return (z,)
