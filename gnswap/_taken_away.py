r"""What a GroupNorm takes away from the layer in front of it: on every photo each group's mean, and with it its size.

So whoever fits that layer to the original's output need not ask for them. With z the standardised channels of a group
on one photo, m and v their mean and variance there, and z̃ those of the converted network,

.. math::
    \tilde m + (z - m) \sqrt{\frac{\tilde v + \epsilon}{v + \epsilon}}

gives behind the norm what z itself would give, and is nearer to what the layer can reach from a disturbed input: the
norms in front have taken the photo's own size away already, and no weight brings it back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gnswap._layer import FusedGroupNorm
from gnswap._running import flat


def norms_behind(model: nn.Module, names: Iterable[str], x: Tensor) -> dict[str, FusedGroupNorm]:
    """The GroupNorms that read layers' outputs as they are, and are all that reads them.

    What else reads an output stands in no module. So the outputs are replaced by NaN for everything but the norms: a
    network that still gives numbers needs them for nothing else.

    Args:
        model: a converted network in eval mode; run a few times.
        names: paths of layers, each called once.
        x: a photo, `[1, ...]`.
    """
    candidates: dict[str, FusedGroupNorm] = {}
    outputs: dict[int, tuple[str, Tensor, Tensor]] = {}

    def note(name: str, y: Tensor) -> None:
        outputs[id(y)] = (name, y, y.clone())  # y itself, so that no other tensor takes its id

    def meet(norm: FusedGroupNorm, inputs: tuple[Tensor, ...]) -> None:
        for given in inputs[:1]:
            name, _, as_it_was = outputs.get(id(given), ("", given, None))
            if as_it_was is not None and torch.equal(given, as_it_was):  # nothing has written into it
                candidates[name] = norm

    with contextlib.ExitStack() as hooks:
        for name in names:
            layer = model.get_submodule(name)
            hooks.callback(layer.register_forward_hook(lambda _m, _x, y, name=name: note(name, y)).remove)
        for norm in model.modules():
            if isinstance(norm, FusedGroupNorm):
                hooks.callback(norm.register_forward_pre_hook(meet).remove)
        model(x)
    return {name: candidates[name] for name in _read_by_nothing_else(model, candidates, list(candidates), x)}


def _read_by_nothing_else(
    model: nn.Module, candidates: dict[str, FusedGroupNorm], names: list[str], x: Tensor
) -> list[str]:
    if not names or _runs_without(model, candidates, names, x):
        return names
    if len(names) == 1:
        return []
    halves = names[: len(names) // 2], names[len(names) // 2 :]
    return [name for half in halves for name in _read_by_nothing_else(model, candidates, half, x)]


def _runs_without(model: nn.Module, candidates: dict[str, FusedGroupNorm], names: list[str], x: Tensor) -> bool:
    """Whether the network gives numbers where these layers' outputs are seen by their norms only."""
    hidden: dict[int, tuple[Tensor, Tensor]] = {}

    def hide(output: Tensor) -> Tensor:
        nothing = torch.full_like(output, float("nan"))
        hidden[id(nothing)] = (output, nothing)
        return nothing

    def show(given: Tensor) -> Tensor:
        return hidden[id(given)][0] if id(given) in hidden else given

    with contextlib.ExitStack() as hooks:
        for name in names:
            layer, norm = model.get_submodule(name), candidates[name]
            hooks.callback(layer.register_forward_hook(lambda _m, _x, y: hide(y)).remove)
            hooks.callback(norm.register_forward_pre_hook(lambda _m, inputs: (show(inputs[0]), *inputs[1:])).remove)
        try:
            return all(bool(output.isfinite().all()) for output in flat(model(x)))
        except Exception:  # somebody's forward may refuse NaN: then it has read them
            return False


def equivalent(norm: FusedGroupNorm, y: Tensor, reached: Tensor) -> Tensor:
    """What gives the same as y behind the norm, with each group's mean and size on a photo as they are in `reached`.

    Args:
        norm: the GroupNorm behind the layer.
        y: what the layer should give, `[N, C, *]`.
        reached: what it gives, of the same shape.
    """
    mean, size = _statistics(norm, y)
    reached_mean, reached_size = _statistics(norm, reached)
    factor = reached_size / size
    scale, shift = _per_channel(norm.channel_scale, y, 1.0), _per_channel(norm.channel_shift, y, 0.0)
    # in the standardised channels z = scale y + shift; written for y
    moved = (reached_mean - factor * mean + (factor - 1) * shift) / scale
    return torch.where(scale != 0, factor * y + moved, y)


def _statistics(norm: FusedGroupNorm, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and size of every channel's group on every photo, `[N, C, 1, ...]`."""
    z = y * _per_channel(norm.channel_scale, y, 1.0) + _per_channel(norm.channel_shift, y, 0.0)
    order = torch.arange(norm.num_channels, device=y.device) if norm.channel_order is None else norm.channel_order
    grouped = z[:, order].reshape(len(z), norm.num_groups, -1)
    variance, mean = torch.var_mean(grouped, 2, correction=0)
    size = (variance + norm.eps + norm.softness).clamp_min(1e-30).sqrt()
    group = torch.empty_like(order)
    group[order] = torch.arange(norm.num_channels, device=y.device) // (norm.num_channels // norm.num_groups)
    shape = (len(z), -1, *(1,) * (y.ndim - 2))
    return mean[:, group].view(shape), size[:, group].view(shape)


def _per_channel(values: Tensor | None, y: Tensor, default: float) -> Tensor:
    """`[C]` as `[C, 1, ...]`."""
    values = y.new_full(y.shape[1:2], default) if values is None else values.to(y)
    return values.view(-1, *(1,) * (y.ndim - 2))
