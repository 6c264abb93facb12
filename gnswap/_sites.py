"""Walking a model with every name a module has, replacing modules, and knowing a model again.

Why not `named_modules` and `setattr`: the first hides aliases (a norm under two names would be swapped under one
of them only), the second makes a phantom module when it is given a dotted name.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import io
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gnswap._errors import ArgumentError, ModelError, WrappedModelError
from gnswap._norms import is_norm_like, type_name
from gnswap._records import Plan

# By the name of a class or of one of its bases, so that nothing of torch.distributed is imported for the check.
_WRAPPERS = {
    "torch.nn.parallel.distributed.DistributedDataParallel": ("DistributedDataParallel", "convert its `.module`"),
    "torch.nn.parallel.data_parallel.DataParallel": ("DataParallel", "convert its `.module`"),
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "FullyShardedDataParallel",
        "convert the model before it is wrapped",
    ),
    "torch.distributed.fsdp.FSDPModule": ("fully_shard", "convert the model before fully_shard"),
    "torch._dynamo.eval_frame.OptimizedModule": ("torch.compile", "convert its `._orig_mod`, then compile"),
    "torch.jit._script.ScriptModule": ("TorchScript", "convert the eager model, then script or trace it"),
}


@dataclasses.dataclass(frozen=True)
class Applied:
    """What a converted model remembers of its conversion.

    Attributes:
        plan: the plan that was applied.
        digest: of the converted model right after the swap (see `digest`), to see later whether it was trained.
    """

    plan: Plan
    digest: dict[str, str]


def applied(model: nn.Module) -> Applied | None:
    """The record that `apply` left on the root of a converted model, or None."""
    record = vars(model).get("_gnswap")
    return record if isinstance(record, Applied) else None


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module under every path that leads to it, parents first, in order of registration.

    Unlike `named_modules(remove_duplicate=False)` it stops at cycles.

    Raises:
        ModelError: a submodule's own name holds a dot, so that paths are ambiguous.
    """
    yield from _walk(model, "", ())


def _walk(module: nn.Module, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    above = (*above, id(module))
    for name, child in module._modules.items():
        if child is None or id(child) in above:
            continue
        if "." in name:
            raise ModelError(
                "a submodule's name holds a dot",
                where=path or "(root)",
                found=repr(name),
                fix="It was put there by setattr with a dotted path, beside the module that was meant: remove it.",
            )
        yield from _walk(child, f"{path}.{name}" if path else name, above)


def require_plain(model: nn.Module) -> None:
    """Refuse what is no module, and models with a wrapper anywhere in them.

    Raises:
        ArgumentError: `model` is no `torch.nn.Module`.
        WrappedModelError: DDP, DataParallel, FSDP, a compiled or scripted module; says how to unwrap it.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError("not a model", where="model", expected="a torch.nn.Module", found=type_name(type(model)))
    for path, module in walk(model):
        wrapper = next((_WRAPPERS[name] for name in map(type_name, type(module).__mro__) if name in _WRAPPERS), None)
        if wrapper is None and vars(module).get("_compiled_call_impl") is not None:
            wrapper = ("Module.compile()", "convert the model before it is compiled")
        if wrapper is not None:
            name, fix = wrapper
            raise WrappedModelError(
                f"the model is wrapped by {name}",
                where=path or "(root)",
                fix=f"{fix[0].upper()}{fix[1:]}.",
            )


def find_norms(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module]]:
    """Every BatchNorm-like module once, with all its paths, in the order of `walk`.

    Example:
        >>> norm = nn.BatchNorm2d(4)
        >>> [paths for paths, _ in find_norms(nn.ModuleDict({"a": norm, "b": norm}))]
        [('a', 'b')]
    """
    found: dict[int, tuple[list[str], nn.Module]] = {}
    for path, module in walk(model):
        if is_norm_like(module):
            found.setdefault(id(module), ([], module))[0].append(path)
    return [(tuple(paths), module) for paths, module in found.values()]


def fingerprint(model: nn.Module) -> str:
    """sha256 that is equal for two instances of one architecture, and for no other.

    Over the paths and types of all norms, and the name and shape of every parameter and persistent buffer under
    every path; not over dtype, device or values.
    """
    lines = [f"norm {' '.join(paths)} {type_name(type(module))}" for paths, module in find_norms(model)]
    for path, module in walk(model):
        tensors = {
            **module._parameters,
            **{n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set},
        }
        lines += [
            f"tensor {path}.{name} {'lazy' if is_lazy(tensor) else tuple(tensor.shape)}"
            for name, tensor in tensors.items()
            if tensor is not None
        ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def get(model: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path; "" is the model itself.

    Raises:
        ModelError: there is no module at that path.
    """
    module = model
    for name in path.split(".") if path else ():
        child = module._modules.get(name)
        if child is None:
            raise ModelError("no module has this path", where=path, found=f"{type_name(type(module))} without {name!r}")
        module = child
    return module


def replace(model: nn.Module, paths: Sequence[str], new: nn.Module) -> nn.Module:
    """Put `new` at every one of the paths.

    Returns:
        the root: the model itself, or `new` where the path is the root's.

    Raises:
        ModelError: there is no module at one of the paths; nothing is replaced then.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        >>> type(replace(model, ["1"], nn.Identity())[1]).__name__
        'Identity'
    """
    places = []
    for path in paths:
        get(model, path)
        parent, _, name = path.rpartition(".")
        places.append((get(model, parent), name))
    if "" in paths:
        return new
    for holder, name in places:
        holder._modules[name] = new
    return model


def digest(model: nn.Module) -> dict[str, str]:
    """A checksum of every parameter and buffer, by its first name, to see whether anything was trained.

    crc32 of the bytes: it finds accidental differences and is no protection against forgery. "meta" for tensors
    without data.
    """
    sums: dict[str, str] = {}
    seen: set[int] = set()
    for path, module in walk(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            sums[f"{path}.{name}" if path else name] = checksum(tensor)
    return sums


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, whatever its device and layout; "meta" or "lazy" where it has none."""
    if is_lazy(tensor):
        return "lazy"
    if tensor.is_meta:
        return "meta"
    data = tensor.detach().cpu()
    if data.layout is torch.strided and not data.is_quantized:
        flat = data.resolve_conj().resolve_neg().contiguous().reshape(-1)
        return f"{zlib.crc32(flat.view(torch.uint8).numpy().data):08x}" if flat.numel() else "empty"
    buffer = io.BytesIO()
    torch.save(data, buffer)
    return f"{zlib.crc32(buffer.getbuffer()):08x}"


def skeleton(model: nn.Module) -> nn.Module:
    """A deep copy without data: every parameter and buffer on the meta device, aliases and ties kept."""
    memo: dict[int, Any] = {}
    for _, module in walk(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for buffer in module._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(model, memo)
