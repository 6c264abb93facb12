"""revert: give the original network back.

Why it refuses after training: gamma and beta are shared with the BatchNorm and would be the trained ones, beside
running statistics of the network before training: neither the original nor anything that works.
"""

from __future__ import annotations

from torch import nn

from gnswap import _fusing, _sites
from gnswap._absorb import given_back
from gnswap._carry import copied, origin, replace_all, restore
from gnswap._errors import ModelError, RevertError

_WHOLE = "Revert the network as a whole, as gnswap.apply, convert or load gave it."


def revert(model: nn.Module, *, inplace: bool = False, force: bool = False) -> nn.Module:
    """Put the original BatchNorms back, bit for bit.

    Parameters, training flags and hooks are those that the layers have by now; everything else (running statistics,
    momentum, counters, type, names) is as it was before the conversion.

    Args:
        model: what `apply`, `convert` or `load` returned.
        inplace: change this very model. Otherwise a deep copy is changed and the model left untouched.
        force: also where tensors have changed since the conversion. The BatchNorms then have today's gamma and beta
            and the statistics of that time, and the rest of the network is as it is today.

    Returns:
        The network with its BatchNorms. This is `model` itself with `inplace`, unless the root is the norm.

    Raises:
        RevertError: the model was not converted by gnswap, a converted layer is gone, or tensors have changed since and
            `force` is off.
        ModelError: the model cannot be copied.
        WrappedModelError: the model is wrapped (DDP, FSDP, torch.compile, TorchScript).

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 64, 3), torch.nn.BatchNorm2d(64), torch.nn.ReLU())
        >>> converted = gnswap.apply(net, gnswap.plan(net))
        >>> gnswap.revert(converted)[1]
        BatchNorm2d(64, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True)
    """
    _sites.require_plain(model)
    record = _sites.applied(model)
    if record is None:
        raise RevertError(
            "this model carries no record of a conversion",
            where=type(model).__qualname__,
            expected="what gnswap.apply, convert or load returned, as a whole",
        )
    if not force:
        _require_unchanged(model, record)
    target = model if inplace else copied(model)
    paths = [decision.paths for decision in record.plan.swaps]
    layers = [_converted_layer(target, where) for where in paths]
    modules = [restore(layer, where[0]) for layer, where in zip(layers, paths, strict=True)]
    for decision, layer in zip(record.plan.swaps, layers, strict=True):
        if decision.absorbs is not None:
            paths.append(decision.absorbs)
            modules.append(given_back(layer, _place(target, layer, decision.absorbs)))
    root = replace_all(target, paths, modules)
    _fusing.allow(root)
    vars(root).pop("_gnswap", None)
    return root


def _require_unchanged(model: nn.Module, record: _sites.Applied) -> None:
    now, then = _sites.digest(model), record.digest
    changed = [name for name in {**then, **now} if now.get(name) != then.get(name)]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise RevertError(
            "the network has changed since its conversion",
            found=f"other values in {', '.join(changed[:3])}{more}",
            fix="force=True gives the BatchNorms back with today's gamma and beta and the original statistics.",
        )


def _place(model: nn.Module, layer: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    """What stands where the activation was that `layer` computes."""
    try:
        found = [_sites.get(model, path) for path in paths]
    except ModelError as error:
        raise RevertError("the place of an activation is gone", where=paths[0], found=str(error), fix=_WHOLE) from error
    if any(type(module) is not nn.Identity for module in found) or not isinstance(layer.act, nn.Module):
        raise RevertError(
            "an absorbed activation was replaced",
            where=paths[0],
            expected="nn.Identity there, and the activation in the layer before it",
            found=", ".join(type(module).__qualname__ for module in found),
        )
    return found[0]


def _converted_layer(model: nn.Module, paths: tuple[str, ...]) -> nn.Module:
    try:
        found = [_sites.get(model, path) for path in paths]
    except ModelError as error:
        raise RevertError(
            "a converted layer is gone", where=paths[0] or "(root)", found=str(error), fix=_WHOLE
        ) from error
    if origin(found[0]) is None or any(module is not found[0] for module in found):
        raise RevertError(
            "a converted layer was replaced",
            where=paths[0] or "(root)",
            expected="the FusedGroupNorm of the conversion under all of its names",
            found=", ".join(type(module).__qualname__ for module in found),
        )
    return found[0]
