"""FusedGroupNorm: the layer that takes a BatchNorm's place.

Why the standardisation lives here and not in the neighbours' weights: the swap then needs no knowledge of the
graph around the layer, works in any network, and can be undone bit for bit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import ops
from gnswap._errors import ArgumentError
from gnswap.ops._activations import activate
from gnswap.ops._backend import backend_label

# What a BatchNorm has and a GroupNorm cannot have; code that asks for it wants to fold the norm into a conv.
_BATCHNORM_STATE = frozenset({"running_mean", "running_var", "num_batches_tracked", "track_running_stats"})


class FusedGroupNorm(nn.Module):
    r"""GroupNorm with a fused activation, on standardised and freely grouped channels.

    .. math::
        z_c = \mathrm{scale}_c\, x_c + \mathrm{shift}_c, \qquad
        y_c = \mathrm{act}\!\left(\frac{z_c - m_g}{\sqrt{v_g + \epsilon + \mathrm{softness}}}
              \,\mathrm{gain}_c\,\gamma_c + \beta_c\right)

    where :math:`m_g, v_g` are mean and variance of one sample over the D = C/G channels of the group and all
    positions (Wu & He, *Group Normalization*, 2018). Groups are D consecutive entries of `channel_order`;
    input and output keep the natural order. With none of the per-channel buffers set and softness 0 the layer
    is `torch.nn.GroupNorm` followed by `act`, with the same parameter names.

    Args:
        num_groups: G; must divide C.
        num_channels: C.
        eps: added to the variance.
        affine: whether there are gamma and beta.
        act: an activation computed in the same pass: one of `gnswap.ops.ACTIVATIONS`, or a module, which is
            kept as the submodule `act` and fused where it is one of them.
        softness: added to the variance like eps, but a dial: on standardised channels (variance about 1) 0
            is pure GroupNorm, 1 halves the fluctuation that GroupNorm adds, infinity is a frozen BatchNorm.
        bias: whether there is beta; ignored where `affine` is off.

    Shape:
        input and output `(N, C)` or `(N, C, *)` up to 5 dimensions, any float dtype. Statistics are taken in
        fp32 (fp64 for fp64). The output has the dtype and memory format of the input, also under autocast.

    Attributes:
        weight, bias: gamma and beta, `[C]`, in natural order.
        channel_scale, channel_shift: the standardisation, `[C]`, or None. A negative scale turns the
            channel's sign inside the group.
        channel_order: permutation of C as int64 `[C]`, or None.
        channel_gain: factor on gamma, `[C]`, or None. It gives back the sign and the nominal size, so that
            gamma stays what the BatchNorm learned.
        channel_correction: a further factor on gamma, fitted to photos, `[C]`, or None.
        channel_offset: added to beta, fitted to photos, `[C]`, or None.

    Raises:
        ArgumentError: G does not divide C, an unknown activation, a negative softness.

    Example:
        >>> import torch
        >>> norm = FusedGroupNorm(4, 16, act="relu")
        >>> x = torch.randn(2, 16, 8, 8)
        >>> expected = torch.relu(torch.nn.GroupNorm(4, 16)(x))
        >>> torch.allclose(norm(x), expected, atol=1e-6)
        True
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    channel_scale: Tensor | None
    channel_shift: Tensor | None
    channel_order: Tensor | None
    channel_gain: Tensor | None
    channel_correction: Tensor | None
    channel_offset: Tensor | None

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        act: str | nn.Module | None = None,
        softness: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise ArgumentError(
                "num_groups must divide num_channels",
                where="FusedGroupNorm",
                expected=f"a divisor of {num_channels}",
                found=str(num_groups),
            )
        if isinstance(act, str) and act not in ops.ACTIVATIONS:
            raise ArgumentError(
                "unknown activation",
                where="FusedGroupNorm.act",
                expected=f"one of {', '.join(ops.ACTIVATIONS)}, a module, or None",
                found=repr(act),
            )
        self.num_groups, self.num_channels = num_groups, num_channels
        self.eps, self.affine = eps, affine
        self._softness = _checked_softness(softness)
        self.drop: nn.Module | None = None
        self.act = act
        for name, present in (("weight", affine), ("bias", affine and bias)):
            empty = torch.empty(num_channels, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        for name in ("scale", "shift", "order", "gain", "correction", "offset"):
            self.register_buffer(f"channel_{name}", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set gamma to one and beta to zero."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def softness(self) -> float:
        """The dial between GroupNorm (0) and frozen BatchNorm (infinity); may be set while training.

        On a standardised layer, setting it corrects `channel_gain`, so that a group at its nominal variance
        gives the same output before and after.
        """
        return self._softness

    @softness.setter
    def softness(self, value: float) -> None:
        value = _checked_softness(value)
        if self.channel_gain is not None:
            self.channel_gain = softened(self.channel_gain, value - self._softness)
        self._softness = value

    @property
    def fused_act(self) -> str | None:
        """The activation that the kernel computes; None where there is none or it runs after the kernel."""
        if not _is_identity(self.drop):  # it works between the norm and the activation
            return None
        if isinstance(self.act, nn.Module):
            return None if has_hooks(self.act) else ops.activation_name(self.act)
        return self.act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise `x`; `residual`, of the same shape, is added before the activation."""
        weight, bias = self.effective_affine()
        fused_act = self.fused_act
        y = _normalised(
            x,
            self.num_channels,
            self.num_groups,
            weight,
            bias,
            self.eps + self._softness,
            act=fused_act,
            residual=residual,
            channel_scale=self.channel_scale,
            channel_shift=self.channel_shift,
            channel_order=self.channel_order,
        )
        if fused_act is None:
            if self.drop is not None:
                y = self.drop(y)
            y = self.act(y) if isinstance(self.act, nn.Module) else activate(y, self.act)
        return y

    def effective_affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight and bias that the norm is computed with: gamma and beta with all that is multiplied and added."""
        weight: Tensor | None = self.weight
        for factor in (self.channel_gain, self.channel_correction):
            if factor is not None:
                weight = factor if weight is None else weight * factor
        bias: Tensor | None = self.bias
        if self.channel_offset is not None:
            bias = self.channel_offset if bias is None else bias + self.channel_offset
        return weight, bias

    def extra_repr(self) -> str:
        """The arguments that make this layer, which per-channel buffers are set, and what computes it where it is."""
        parts = [f"{self.num_groups}, {self.num_channels}, eps={self.eps:g}"]
        if not self.affine:
            parts.append("affine=False")
        elif self.bias is None:
            parts.append("bias=False")
        if isinstance(self.act, str):
            parts.append(f"act={self.act}")
        if self._softness:
            parts.append(f"softness={self._softness:g}")
        parts += [
            name.removeprefix("channel_")
            for name in ("channel_scale", "channel_order", "channel_correction")
            if getattr(self, name) is not None
        ]
        tensor = next((t for t in (self.weight, self.bias, self.channel_scale) if t is not None), torch.empty(0))
        parts.append(f"backend={backend_label(tensor.device.type, tensor.dtype)}")
        return ", ".join(parts)

    def __getattr__(self, name: str) -> Any:
        if name in _BATCHNORM_STATE:
            raise AttributeError(
                f"FusedGroupNorm has no {name}: a GroupNorm keeps no batch statistics. If this came from "
                "fusing or re-parameterising the network, do that before the conversion "
                "(gnswap.revert gives the BatchNorm back)."
            )
        return super().__getattr__(name)


@torch.fx.wrap  # one node where torch.fx traces a network, as its feature extractors do
def _normalised(x: Tensor, num_channels: int, *args: Any, **kwargs: Any) -> Tensor:
    if x.ndim > 1 and x.shape[1] != num_channels:
        raise ArgumentError(
            "x does not have the channels of this layer",
            where="FusedGroupNorm",
            expected=str(num_channels),
            found=str(x.shape[1]),
        )
    return ops.group_norm(x, *args, **kwargs)


def softened(gain: Tensor, change: float) -> Tensor:
    """The gain `[C]` of a standardised layer whose softness changes by `change`: the nominal output stays as it is."""
    # gain² = nominal variance + eps + softness, so only the difference has to be known
    squared = (gain.double().square() + change).clamp_min(0)
    return squared.sqrt().copysign(gain.double()).to(gain.dtype)


def _checked_softness(value: float) -> float:
    if not 0.0 <= value < math.inf:
        raise ArgumentError(
            "softness out of range", where="FusedGroupNorm", expected="0 or more, finite", found=repr(value)
        )
    return float(value)


def _is_identity(module: nn.Module | None) -> bool:
    return module is None or (type(module) is nn.Identity and not has_hooks(module))


def has_hooks(module: nn.Module) -> bool:
    """Whether something watches the calls of a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
