"""Everything about the norms of a model that can be known without running it.

Why this is not the verb `inspect` itself: `plan` needs the same survey, and verbs do not import each other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from types import MethodType
from typing import Any

from torch import nn

from gnswap._errors import ModelError
from gnswap._forwards import read_forward
from gnswap._norms import NormState, foreign_attributes, is_norm_like, read_norm, refusal, type_name
from gnswap._records import Inventory, Site
from gnswap._sites import find_norms, fingerprint, get, require_plain, walk

_OTHER_NORMS = (
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# what apply itself leaves on converted models
_OWN_MARKS = ("_origin", "_gnswap")


def survey(model: nn.Module) -> Inventory:
    """List every norm of a model; see `gnswap.inspect`."""
    require_plain(model)
    first: dict[int, tuple[str, nn.Module]] = {}
    for path, module in walk(model):
        first.setdefault(id(module), (path, module))
    unique = list(first.values())
    norms = find_norms(model)
    held, unregistered = _held_outside(unique)
    norm_paths = {path for paths, _ in norms for path in paths}
    sites = []
    for paths, module in norms:
        reason = refusal(module) or _entangled(model, paths, norm_paths)
        if reason is None and id(module) in held:
            reason = f"also held outside the module tree, by {held[id(module)]}, where a swap would not reach it"
        sites.append(_site(paths, module, reason))
    return Inventory(
        model=type_name(type(model)),
        fingerprint=fingerprint(model),
        sites=tuple(sites),
        left_alone=tuple(
            f"{_shown(path)}: {type(module).__qualname__}" for path, module in unique if _is_other_norm(module)
        ),
        notes=(*_functional_notes(unique), *unregistered, *_attribute_notes(norms)),
    )


def _shown(path: str) -> str:
    return path or "(root)"


def _site(paths: tuple[str, ...], module: nn.Module, reason: str | None) -> Site:
    try:
        state = read_norm(module)
    except ModelError:  # then the refusal says why, and what can be seen from outside is shown
        state = NormState.from_batchnorm(module, dims="unknown")
    affine = [tensor for tensor in (state.weight, state.bias) if tensor is not None]
    return Site(
        paths=paths,
        norm_type=type_name(type(module)),
        num_channels=state.num_channels,
        eps=state.eps,
        affine=state.weight is not None,
        bias=state.bias is not None,
        frozen=bool(affine) and not any(tensor.requires_grad for tensor in affine),
        running_stats=state.running_mean is not None,
        dims=state.dims,
        act=_class_of(state.act),
        drop=_class_of(state.drop),
        hooks=sum(len(getattr(module, name)) for name in _HOOKS),
        refusal=reason,
    )


def _class_of(module: nn.Module | None) -> str | None:
    return None if module is None or isinstance(module, nn.Identity) else type(module).__qualname__


def _entangled(model: nn.Module, paths: tuple[str, ...], norm_paths: Collection[str]) -> str | None:
    """Why the place of a norm in the model forbids a swap."""
    for path in filter(None, paths):
        parts = path.split(".")
        for depth in range(len(parts)):
            if (above := ".".join(parts[:depth])) in norm_paths:
                return f"part of another norm layer, {_shown(above)}"
        parent = get(model, ".".join(parts[:-1]))
        if parts[-1] in read_forward(type(parent)).reads:
            return f"the forward of {type(parent).__qualname__} reads its running statistics, which GroupNorm has not"
    return None


def _held_outside(unique: Collection[tuple[str, nn.Module]]) -> tuple[dict[int, str], list[str]]:
    """Norms in plain attributes: id to holder for those in the tree as well, notes for those that are not."""
    in_tree = {id(module) for _, module in unique}
    internals = nn.Module().__dict__.keys() | set(_OWN_MARKS)
    held: dict[int, str] = {}
    strangers: dict[int, str] = {}
    for path, module in unique:
        for name, value in vars(module).items():
            if name in internals:
                continue
            holder = f"{_shown(path)}.{name}" if path else name
            for item in _items(value):
                if id(item) in in_tree:
                    held.setdefault(id(item), holder)
                    continue
                # a module that is not registered: what it holds of the tree would be missed there
                for part in item.modules():
                    if id(part) in in_tree:
                        held.setdefault(id(part), holder)
                    elif is_norm_like(part):
                        strangers.setdefault(id(part), f"{holder}: {type(part).__qualname__}")
    notes = [f"{place} is in a plain attribute, no submodule of the model: left alone" for place in strangers.values()]
    return held, notes


def _items(value: Any) -> Iterable[nn.Module]:
    """The modules in an attribute: itself, one level of containers, the owner of a bound method."""
    if isinstance(value, dict):
        value = list(value.values())
    for item in value if isinstance(value, list | tuple | set | frozenset) else (value,):
        owner = item.__self__ if isinstance(item, MethodType) else item
        if isinstance(owner, nn.Module):
            yield owner


def _is_other_norm(module: nn.Module) -> bool:
    """A normalisation that is none over the batch: torch's by class, others by name where they own tensors."""
    if isinstance(module, _OTHER_NORMS):
        return True
    if is_norm_like(module) or "norm" not in type(module).__name__.lower():
        return False
    weights_other_things = isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    return bool(module._parameters or module._buffers) and not weights_other_things


def _functional_notes(unique: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """One note for each class whose forward calls batch_norm by itself."""
    places: dict[type[nn.Module], list[str]] = {}
    for path, module in unique:
        if not is_norm_like(module):
            places.setdefault(type(module), []).append(_shown(path))
    notes = []
    for kind, paths in places.items():
        forward = read_forward(kind)
        where = f"{_and_more(paths)}: {kind.__qualname__}"
        if forward.on_activations:
            notes.append(f"unreachable: {where} calls batch_norm as a function in its forward; left alone")
        if forward.on_weights:
            notes.append(f"{where} standardises its weights with batch_norm; no norm of activations, left alone")
        if forward.unclear:
            notes.append(f"{where} names batch_norm, but its source cannot be read; left alone")
    return notes


def _attribute_notes(norms: Iterable[tuple[tuple[str, ...], nn.Module]]) -> list[str]:
    """One note for each set of attributes: transformers, for one, hangs the same on every module of a network."""
    places: dict[tuple[str, ...], list[str]] = {}
    for paths, module in norms:
        if names := foreign_attributes(module):
            places.setdefault(names, []).append(_shown(paths[0]))
    return [
        f"{_and_more(paths)}: attributes put there from outside go along in a swap: {', '.join(names)}"
        for names, paths in places.items()
    ]


def _and_more(paths: Sequence[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]
