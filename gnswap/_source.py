"""Where a model came from: enough to build its architecture again, proven before it is believed.

Why a proof: `pretrained_cfg` names an architecture, but says nothing of what the caller changed afterwards. A name is
recorded only where building it gives the same fingerprint and the same structure, module by module.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import nn

from gnswap import _sites
from gnswap._errors import StoreError
from gnswap._saved import ModelSource

# What may be handed to timm from a file. Anything else (checkpoint_path, pretrained, ...) could read other files.
_SAFE_OPTIONS = frozenset({"num_classes", "in_chans", "global_pool"})


def rebuild(source: ModelSource, device: str = "cpu") -> nn.Module:
    """The architecture with random weights; the global random state is left as it was.

    Raises:
        StoreError: the source is no timm name, holds options that a file has no business to set, or timm fails.
    """
    import timm

    architecture = source.name.partition(".")[0]
    if source.kind != "timm" or not timm.is_model(architecture) or set(source.options) - _SAFE_OPTIONS:
        raise StoreError(
            "the architecture cannot be built from its name",
            where=str(source),
            expected="a name that timm knows",
            found=f"timm {timm.__version__} without it" if source.kind == "timm" else f"a {source.kind}",
            fix="Build the original network yourself and hand it over: gnswap.load(directory, model).",
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model: nn.Module = timm.create_model(source.name, pretrained=False, **source.options)
    except Exception as error:  # whatever a third-party constructor raises
        raise StoreError(
            "timm could not build the architecture", where=str(source), found=f"{type(error).__name__}: {error}"
        ) from error
    return model


def discover(original: nn.Module) -> tuple[ModelSource | None, str]:
    """How to build a network again, as far as it tells and a trial proves.

    Args:
        original: the network with its BatchNorms; may be on the meta device.

    Returns:
        The source and "", or None and the reason in words.
    """
    config = getattr(original, "pretrained_cfg", None)
    config = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    architecture = config.get("architecture")
    if not architecture:
        return None, "the model does not say which timm architecture it is"
    name = f"{architecture}.{config['tag']}" if config.get("tag") else str(architecture)
    wanted = {"num_classes": config.get("num_classes"), "in_chans": (config.get("input_size") or [None])[0]}
    options = {
        key: value
        for key, usual in wanted.items()
        if isinstance(value := getattr(original, key, None), int) and value != usual
    }
    pool = getattr(original, "global_pool", None)
    pool = getattr(pool, "pool_type", pool)
    reason = ""
    for extra in ({}, {"global_pool": pool} if isinstance(pool, str) else {}):
        source = ModelSource("timm", name, options | extra)
        difference = mismatch(original, source)
        if difference is None:
            return source, ""
        reason = reason or difference
    return None, reason


def mismatch(original: nn.Module, source: ModelSource) -> str | None:
    """Why building `source` does not give the architecture of `original`; None where it does."""
    try:
        try:
            rebuilt = rebuild(source, "meta")
        except StoreError:
            rebuilt = rebuild(source)  # some constructors look at values, which the meta device has not
    except StoreError as error:
        return str(error)
    wanted, got = _structure(original), _structure(rebuilt)
    for path in [*wanted, *(got.keys() - wanted.keys())]:
        if wanted.get(path) != got.get(path):
            return f"building {source} gives another {path or '(root)'}: {_difference(wanted.get(path), got.get(path))}"
    if _sites.fingerprint(original) != _sites.fingerprint(rebuilt):
        return f"building {source} gives tensors of other names or shapes"
    return None


def _structure(model: nn.Module) -> dict[str, dict[str, Any]]:
    """For every module its class and its plain attributes: what tells max pooling from average pooling."""
    return {
        path: {"class": type(module).__qualname__}
        | {
            key: value.__qualname__ if isinstance(value, types.FunctionType) else value
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "training" and _is_plain(value)
        }
        for path, module in _sites.walk(model)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool | None | types.FunctionType)


def _difference(one: dict[str, Any] | None, other: dict[str, Any] | None) -> str:
    if one is None or other is None:
        return f"{(one or other or {})['class']} is only in {'it' if one is None else 'the model'}"
    key = next(key for key in [*one, *other] if one.get(key) != other.get(key))
    return f"{key} is {other.get(key)!r}, not {one.get(key)!r}"
