"""What moves from a norm to the layer in its place, and back.

Why the new layer keeps a shell of the old one: momentum, counters, running statistics and whatever else a BatchNorm
holds have no meaning in a GroupNorm, yet `revert` must give them back bit for bit. The shell is no submodule, so it is
in no `state_dict` and no optimizer, and it is copied and pickled with the layer.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from gnswap._errors import ModelError, RevertError
from gnswap._sites import get, replace

# Every attribute of nn.Module in which hooks are kept or counted.
HOOKS = tuple(name for name in nn.Module().__dict__ if "hook" in name)
# What a BatchNorm has and a GroupNorm has no use for; every other attribute goes with the layer.
_BATCHNORM_ONLY = frozenset({"momentum", "track_running_stats", "process_group"})


def carry_over(norm: nn.Module, layer: nn.Module, *, weight: Tensor | None, bias: Tensor | None) -> None:
    """Give `layer` everything of `norm` that is neither its parameters nor its statistics; `norm` is only read.

    The training flag, the hooks (the same dict objects, so that handles still remove them), attributes hung on it from
    outside, and a shell of itself.

    Args:
        norm: the old layer.
        layer: the new one, with parameters `weight` and `bias`.
        weight, bias: the old layer's gamma and beta, under whatever names it has them.
    """
    layer.training = norm.training
    own = {**norm._parameters, **norm._buffers}
    names = {
        role: name
        for role, wanted in (("weight", weight), ("bias", bias))
        for name, tensor in own.items()
        if wanted is not None and tensor is wanted
    }
    for name, value in vars(norm).items():
        if name in HOOKS or (name not in vars(layer) and name not in _BATCHNORM_ONLY):
            layer.__dict__[name] = value
    shell = _clone(norm)
    # gamma and beta live on in the new layer; a second reference would keep them alive, and go stale
    shell.__dict__["_parameters"] = dict.fromkeys(norm._parameters)
    layer.__dict__["_origin"], layer.__dict__["_origin_names"] = shell, names


def origin(layer: nn.Module) -> nn.Module | None:
    """The shell of the norm that a layer stands for; None where it stands for none."""
    shell = vars(layer).get("_origin")
    return shell if isinstance(shell, nn.Module) else None


def restore(layer: nn.Module, path: str) -> nn.Module:
    """The norm that a layer stands for, with the layer's own gamma, beta, training flag and hooks.

    Args:
        layer: has an `origin`; is only read.
        path: its place, for the error.

    Raises:
        RevertError: the statistics were on the meta device when the model was converted, and never had values.
    """
    shell = origin(layer)
    if shell is None:
        raise RevertError(
            "this layer does not know the BatchNorm it came from",
            where=path or "(root)",
            expected="a layer that gnswap.apply put there",
            found=type(layer).__qualname__,
        )
    norm = _clone(shell)
    for role, name in vars(layer)["_origin_names"].items():
        tensor = getattr(layer, role)
        if name in norm._buffers:
            norm._buffers[name] = tensor.detach()
        else:
            norm._parameters[name] = tensor
    affine = set(vars(layer)["_origin_names"].values())
    for name, buffer in norm._buffers.items():
        if buffer is not None and name not in affine:
            norm._buffers[name] = _moved(buffer, layer, f"{path}.{name}")
    for name in HOOKS:
        norm.__dict__[name] = vars(layer)[name]
    norm.training = layer.training
    return norm


def copied(model: nn.Module) -> nn.Module:
    """A deep copy.

    Raises:
        ModelError: the model holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise ModelError(
            "the model cannot be copied",
            where=type(model).__qualname__,
            found=f"{type(error).__name__}: {error}",
            fix="Let the model itself be changed: inplace=True.",
        ) from error


def replace_all(model: nn.Module, paths: Sequence[tuple[str, ...]], modules: Sequence[nn.Module]) -> nn.Module:
    """Put every module at all of its paths and look whether it is there; put everything back if anything fails.

    Args:
        model: the root.
        paths: for each module, the paths that all lead to one module now.
        modules: what takes their places.

    Returns:
        The root, which is another one where a path is "".
    """
    before = [get(model, where[0]) for where in paths]
    root = model
    try:
        for where, module in zip(paths, modules, strict=True):
            root = replace(root, where, module)
            _retarget_hooks(module)
        for where, module in zip(paths, modules, strict=True):
            for path in where:
                if (found := get(root, path)) is not module:  # a container may have ideas of its own
                    raise ModelError(
                        "a layer is not where it was put",
                        where=path or "(root)",
                        expected=type(module).__qualname__,
                        found=type(found).__qualname__,
                    )
    except BaseException:
        for where, module in zip(paths, before, strict=True):
            replace(model, where, module)
            _retarget_hooks(module)
        raise
    return root


def _retarget_hooks(module: nn.Module) -> None:
    """Make hooks that are called with "their" module mean this one: torch keeps a weak reference in them."""
    for hook in (*module._state_dict_hooks.values(), *module._load_state_dict_pre_hooks.values()):
        if isinstance(hook, _WrappedHook) and hook.with_module:
            hook.module = weakref.ref(module)


def _clone(module: nn.Module) -> nn.Module:
    """A second module on the same tensors and submodules, without running any constructor."""
    clone: nn.Module = object.__new__(type(module))
    clone.__dict__.update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        clone.__dict__[name] = dict(vars(module)[name])
    return clone


def _moved(buffer: Tensor, layer: nn.Module, place: str) -> Tensor:
    """A buffer of the shell, which `Module.to` does not reach, where the layer is by now."""
    reference = next((t for t in (*layer._buffers.values(), *layer._parameters.values()) if t is not None), buffer)
    if buffer.is_meta and not reference.is_meta:
        raise RevertError(
            "the original statistics never had values",
            where=place,
            found="a tensor on the meta device",
            fix="Load the original's weights into a model of the original architecture.",
        )
    scale = getattr(layer, "channel_scale", None)
    dtype = scale.dtype if isinstance(scale, torch.Tensor) and buffer.is_floating_point() else buffer.dtype
    return buffer.to(device=reference.device, dtype=dtype)
