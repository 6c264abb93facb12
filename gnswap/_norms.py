"""Which normalisation layers gnswap understands, and how each of them is read.

Types are matched exactly, never by `isinstance`: a subclass may do anything in its forward, and a tool that
rebuilds it as its base drops that silently (pytorch#187298, timm#1254). Types of timm, torchvision,
detectron2 and transformers are known by name, so that none of those packages has to be imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gnswap._errors import ArgumentError, ModelError


@dataclasses.dataclass(frozen=True, eq=False)
class NormState:
    """What one normalisation layer computes.

    That is ``act(drop((x - running_mean) / sqrt(running_var + eps) * weight + bias))``. Tensors are held by
    reference, each `[C]` or None; nothing is copied.

    Attributes:
        num_channels: C.
        eps: added to the running variance.
        weight, bias: gamma and beta: `Parameter`s, which the new layer takes over as the same objects, or plain
            tensors where they do not train.
        running_mean, running_var: both, or neither (the layer then normalises by the batch even in eval mode).
        act, drop: the fused activation, and the fused dropout before it.
        dims: number of input dimensions the layer accepts, in words.
    """

    num_channels: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    act: nn.Module | None = None
    drop: nn.Module | None = None
    dims: str = "4"

    @classmethod
    def from_batchnorm(
        cls, module: nn.Module, *, dims: str = "4", act: nn.Module | None = None, drop: nn.Module | None = None
    ) -> Self:
        """Read a layer that names its state as `torch.nn.BatchNorm2d` does.

        Args:
            module: has `eps` (1e-5 where it has not), `weight`, `bias`, `running_mean`, `running_var`.
            dims, act, drop: see `NormState`.

        Example:
            >>> NormState.from_batchnorm(nn.BatchNorm2d(8, eps=1e-3)).eps
            0.001
        """
        weight, bias, mean, var = (_tensor(module, name) for name in ("weight", "bias", "running_mean", "running_var"))
        sized = next((tensor for tensor in (mean, var, weight, bias) if tensor is not None), None)
        declared = int(getattr(module, "num_features", 0))
        channels = declared if sized is None or is_lazy(sized) else sized.numel()
        return cls(channels, float(getattr(module, "eps", 1e-5)), weight, bias, mean, var, act, drop, dims)


Reader = Callable[[nn.Module], NormState]


def _tensor(module: nn.Module, name: str) -> Tensor | None:
    value = getattr(module, name, None)
    return value if isinstance(value, Tensor) else None


def _reader(dims: str, *, fused: bool = False) -> Reader:
    def read(module: nn.Module) -> NormState:
        act, drop = (getattr(module, name, None) if fused else None for name in ("act", "drop"))
        return NormState.from_batchnorm(module, dims=dims, act=act, drop=drop)

    return read


_KNOWN: dict[str, Reader] = {
    "torch.nn.modules.batchnorm.BatchNorm1d": _reader("2 or 3"),
    "torch.nn.modules.batchnorm.BatchNorm2d": _reader("4"),
    "torch.nn.modules.batchnorm.BatchNorm3d": _reader("5"),
    "torch.nn.modules.batchnorm.SyncBatchNorm": _reader("2 or more"),
    "timm.layers.norm_act.BatchNormAct2d": _reader("4", fused=True),
    # has `act` and `drop` only where timm's own conversion made it
    "timm.layers.norm_act.SyncBatchNormAct": _reader("2 or more", fused=True),
    "timm.layers.norm_act.FrozenBatchNormAct2d": _reader("4", fused=True),
    "torchvision.ops.misc.FrozenBatchNorm2d": _reader("4"),  # timm's freeze_batch_norm_2d makes it too
}
# detectron2 and transformers (a copy of the class for each model of the DETR family, eps fixed at 1e-5)
_FROZEN_HOMES = frozenset({"detectron2", "transformers"})
_FROZEN_BUFFERS = frozenset({"weight", "bias", "running_mean", "running_var"})
_REGISTERED: dict[type[nn.Module], Reader] = {}


def register_norm(norm_type: type[nn.Module], read: Reader) -> None:
    """Teach gnswap a third-party normalisation layer.

    The class is matched exactly, so subclasses are registered for themselves. State of the layer that `read`
    does not hand over would be lost in a swap, so layers that hold such state (further parameters, buffers or
    submodules) are refused with their name; a scalar `num_batches_tracked` is exempt.

    Args:
        norm_type: a subclass of `torch.nn.Module`.
        read: called with one such layer, returns its `NormState`. It must not copy or change tensors.

    Raises:
        ArgumentError: `norm_type` is no module class, is built in, or `read` cannot be called.

    Example:
        >>> import torch, gnswap
        >>> class MyNorm(torch.nn.Module):
        ...     def __init__(self, channels):
        ...         super().__init__()
        ...         self.gamma = torch.nn.Parameter(torch.ones(channels))
        ...         self.register_buffer("mean", torch.zeros(channels))
        ...         self.register_buffer("var", torch.ones(channels))
        ...
        ...     def forward(self, x):
        ...         return torch.nn.functional.batch_norm(x, self.mean, self.var, self.gamma)
        >>> gnswap.register_norm(
        ...     MyNorm, lambda norm: gnswap.NormState(len(norm.gamma), 1e-5, norm.gamma, None, norm.mean, norm.var)
        ... )
        >>> gnswap.inspect(MyNorm(8)).sites[0].num_channels
        8

        A subclass that keeps torch's names needs one line:

        >>> class LoudBatchNorm2d(torch.nn.BatchNorm2d):
        ...     pass
        >>> gnswap.register_norm(LoudBatchNorm2d, gnswap.NormState.from_batchnorm)
    """
    if not (isinstance(norm_type, type) and issubclass(norm_type, nn.Module)):
        raise ArgumentError(
            "not a module class",
            where="register_norm.norm_type",
            expected="a subclass of torch.nn.Module",
            found=repr(norm_type),
        )
    if not callable(read):
        raise ArgumentError("not callable", where="register_norm.read", found=repr(read))
    if type_name(norm_type) in _KNOWN:
        raise ArgumentError(
            "this norm is built in",
            where="register_norm.norm_type",
            found=type_name(norm_type),
            fix="Register a subclass of it.",
        )
    _REGISTERED[norm_type] = read


def type_name(kind: type) -> str:
    """The full name of a class, such as "torch.nn.modules.batchnorm.BatchNorm2d"."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_norm_like(module: nn.Module) -> bool:
    """Whether a module normalises over the batch, known to gnswap or not.

    True for what is registered, for every `_BatchNorm`, and for every module that itself keeps a running mean and
    a running variance; InstanceNorm does that too and is none.
    """
    if _find_reader(module) is not None or isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    keeps_statistics = {"running_mean", "running_var"} <= module._buffers.keys()
    return keeps_statistics and not isinstance(module, nn.modules.instancenorm._InstanceNorm)


def read_norm(module: nn.Module) -> NormState:
    """What a normalisation layer computes, tensors by reference.

    Raises:
        ModelError: the layer is of an unknown type, lazy, parametrised, or its `forward` was replaced.

    Example:
        >>> read_norm(nn.BatchNorm1d(8)).dims
        '2 or 3'
    """
    if (reason := _unreadable(module)) is not None:
        raise ModelError(
            "this layer cannot be read as a BatchNorm",
            where=type_name(type(module)),
            expected="a norm that `gnswap.inspect` does not refuse",
            found=reason,
        )
    reader = _find_reader(module)
    state = reader(module) if reader is not None else None
    if not isinstance(state, NormState):
        raise ModelError(
            "the registered reader returned no NormState",
            where=type_name(type(module)),
            expected="a gnswap.NormState",
            found=repr(state),
            fix="Register another one: gnswap.register_norm.",
        )
    return state


def refusal(module: nn.Module) -> str | None:
    """Why this layer, taken by itself, cannot be swapped; None where it can.

    Example:
        >>> refusal(nn.LazyBatchNorm2d())
        'not initialised: run one input through the model first'
    """
    return _unreadable(module) or _unfit(module, read_norm(module))


def foreign_attributes(module: nn.Module) -> tuple[str, ...]:
    """Names of attributes that somebody hung on a layer from outside; empty for third-party types."""
    if type_name(type(module)) not in _KNOWN:
        return ()
    own = nn.SyncBatchNorm(1).__dict__.keys() | {"_compiled_call_impl"}
    return tuple(name for name in vars(module) if name not in own)


def _find_reader(module: nn.Module) -> Reader | None:
    kind = type(module)
    reader = _REGISTERED.get(kind) or _KNOWN.get(type_name(kind))
    if reader is None and kind.__module__.partition(".")[0] in _FROZEN_HOMES and "FrozenBatchNorm" in kind.__name__:
        reader = _reader("4") if module._buffers.keys() >= _FROZEN_BUFFERS else None
    return reader


def _unreadable(module: nn.Module) -> str | None:
    kind = type(module)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) or any(map(is_lazy, _own_tensors(module).values())):
        return "not initialised: run one input through the model first"
    if nn.utils.parametrize.is_parametrized(module):
        names = ", ".join(module.parametrizations)  # type: ignore[arg-type]
        return f"{names} parametrised (torch.nn.utils.parametrize): remove_parametrizations first"
    if _find_reader(module) is None:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            return f"{kind.__qualname__} is a subclass of BatchNorm unknown to gnswap: see gnswap.register_norm"
        return f"{kind.__qualname__} keeps running statistics but is unknown to gnswap: see gnswap.register_norm"
    if "forward" in vars(module):
        return "its forward was replaced on this instance"
    return None


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    both: dict[str, Any] = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in both.items() if tensor is not None}


def _unfit(module: nn.Module, state: NormState) -> str | None:
    """Why a layer that can be read cannot be swapped all the same."""
    if (state.running_mean is None) != (state.running_var is None):
        return "has one of running_mean and running_var only"
    tensors = {
        name: tensor
        for name in ("weight", "bias", "running_mean", "running_var")
        if (tensor := getattr(state, name)) is not None
    }
    for name, tensor in tensors.items():
        if tensor.shape != (state.num_channels,) or not tensor.is_floating_point():
            return f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not one float a channel"
    if state.num_channels < 1:
        return "has no channels"
    return _would_be_lost(module, state) or _impossible_statistics(state)


def _would_be_lost(module: nn.Module, state: NormState) -> str | None:
    handed_over = {id(getattr(state, field.name)) for field in dataclasses.fields(state)}
    own = {**_own_tensors(module), **{name: child for name, child in module._modules.items() if child is not None}}
    lost = [name for name, value in own.items() if id(value) not in handed_over and name != "num_batches_tracked"]
    return f"holds {', '.join(lost)}, which a swap would lose" if lost else None


def _impossible_statistics(state: NormState) -> str | None:
    mean, var = state.running_mean, state.running_var
    if mean is None or var is None or mean.is_meta or var.is_meta:
        return None
    for name, tensor in (("running_mean", mean), ("running_var", var)):
        if bad := int((~tensor.isfinite()).sum()):
            return f"{name} is NaN or infinite in {bad} of {state.num_channels} channels"
    if bad := int((var < 0).sum()):
        return f"running_var is negative in {bad} of {state.num_channels} channels"
    if bad := int((var.double() + state.eps <= 0).sum()):
        return f"running_var + eps is 0 in {bad} of {state.num_channels} channels"
    return None
