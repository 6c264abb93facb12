"""Building the layer that a decision asks for, out of the norm that it stands for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnswap._algebra import standardise
from gnswap._errors import ModelError
from gnswap._layer import FusedGroupNorm
from gnswap._norms import NormState, read_norm
from gnswap._records import Decision


def build_layer(norm: nn.Module, decision: Decision) -> FusedGroupNorm:
    """The layer that stands for `norm`, which is only read: its parameters are the same objects.

    Raises:
        ModelError: the standardisation does not fit into the dtype of the running statistics.
    """
    state = read_norm(norm)
    layer = FusedGroupNorm(decision.num_groups, state.num_channels, state.eps, affine=False, softness=decision.softness)
    layer.affine = state.weight is not None
    layer.register_parameter("weight", _as_parameter(state.weight))
    layer.register_parameter("bias", _as_parameter(state.bias))
    _set_constants(layer, state, decision)
    like = layer.weight if layer.weight is not None else layer.bias if layer.bias is not None else layer.channel_scale
    if decision.gain is not None:
        layer.channel_correction = _like(decision.gain, like)
    if decision.offset is not None:
        layer.channel_offset = _like(decision.offset, like)
    layer.drop, layer.act = state.drop, state.act
    return layer


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A `Parameter` as it is; a frozen layer's buffer as one that does not train, on the same memory."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def _set_constants(layer: FusedGroupNorm, state: NormState, decision: Decision) -> None:
    some = next((t for t in (state.running_var, state.weight, state.bias) if t is not None), None)
    device = None if some is None else some.device
    order, signs = (
        None if values is None else torch.tensor(values, device=device)
        for values in (decision.channel_order, decision.signs)
    )
    layer.channel_order = order
    if decision.standardise and state.running_mean is not None and state.running_var is not None:
        constants = standardise(
            state.running_mean,
            state.running_var,
            state.eps,
            decision.num_groups,
            softness=decision.softness,
            channel_order=order,
            signs=signs,
        )
        layer.channel_scale, layer.channel_shift, layer.channel_gain = constants.scale, constants.shift, constants.gain
        if not (layer.channel_scale.is_meta or _all_finite(constants.scale, constants.shift, constants.gain)):
            raise ModelError(
                "the standardisation is not finite",
                where=decision.name,
                expected=f"values that {constants.scale.dtype} can hold",
                fix="Convert the model in float32, then cast it.",
            )
    elif signs is not None:
        dtype = torch.get_default_dtype() if some is None else some.dtype
        layer.channel_scale = layer.channel_gain = signs.to(dtype)
        layer.channel_shift = torch.zeros_like(layer.channel_scale)


def _like(values: tuple[float, ...], tensor: Tensor | None) -> Tensor:
    """The values on the device and in the dtype of a tensor, or in torch's defaults."""
    return (
        torch.tensor(values, dtype=tensor.dtype, device=tensor.device) if tensor is not None else torch.tensor(values)
    )


def _all_finite(*tensors: Tensor) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors)
