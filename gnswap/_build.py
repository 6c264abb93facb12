"""Building the layer that a decision asks for, out of the norm that it stands for."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from gnswap._algebra import Standardisation, standardise
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
    some = next((t for t in (state.running_var, state.weight, state.bias) if t is not None), torch.empty(0))
    order, signs = (
        None if values is None else torch.tensor(values, device=some.device)
        for values in (decision.channel_order, decision.signs)
    )
    gain, offset = (
        None if values is None else torch.tensor(values, device=some.device, dtype=torch.float64)
        for values in (decision.gain, decision.offset)
    )
    layer.channel_order = order
    if decision.standardise and state.running_var is not None:
        constants = constants_of(state, decision)
        layer.channel_scale, layer.channel_shift, layer.channel_gain = constants.scale, constants.shift, constants.gain
        if constants.constant is not None:
            factors = (gain, None if state.weight is None else state.weight.detach())
            taken = -math.prod((factor for factor in factors if factor is not None), start=constants.constant)
            offset = taken if offset is None else offset + taken
        if constants.quieter is not None:
            gain = constants.quieter if gain is None else gain * constants.quieter
    elif signs is not None:
        layer.channel_scale = layer.channel_gain = signs.to(some.dtype)
        layer.channel_shift = torch.zeros_like(layer.channel_scale)
    like = next((t for t in (layer.weight, layer.bias, layer.channel_scale) if t is not None), some)
    layer.channel_correction, layer.channel_offset = (
        None if fitted is None else fitted.to(like.detach()) for fitted in (gain, offset)
    )
    layer.drop, layer.act = state.drop, state.act
    return layer


def _as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A `Parameter` as it is; a frozen layer's buffer as one that does not train, on the same memory."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def constants_of(state: NormState, decision: Decision) -> Standardisation:
    """What standardises the norm's input, by its running statistics, which it must have.

    Raises:
        ModelError: it does not fit into their dtype.
    """
    assert state.running_mean is not None
    assert state.running_var is not None
    order, signs, loudness, centre = (
        None if values is None else torch.tensor(values, device=state.running_var.device)
        for values in (decision.channel_order, decision.signs, decision.loudness, decision.centre)
    )
    constants = standardise(
        state.running_mean,
        state.running_var,
        state.eps,
        decision.num_groups,
        softness=decision.softness,
        channel_order=order,
        signs=signs,
        loudness=loudness,
        centre=centre,
    )
    tensors = [tensor for tensor in vars(constants).values() if tensor is not None]
    if not (constants.scale.is_meta or all(bool(tensor.isfinite().all()) for tensor in tensors)):
        raise ModelError(
            "the standardisation is not finite",
            where=decision.name,
            expected=f"values that {constants.scale.dtype} can hold",
            fix="Convert the model in float32, then cast it.",
        )
    return constants
