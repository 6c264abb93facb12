"""The last layer of a network: where it is, and a new one for other classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gnswap import _sites
from gnswap._errors import ArgumentError


def head_path(model: nn.Module) -> str:
    """The path of the layer that gives the classes: what timm's configuration names, else the last `nn.Linear`.

    Raises:
        ArgumentError: there is none, or several.

    Example:
        >>> head_path(nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)))
        '3'
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    named = config.get("classifier") if isinstance(config, dict) else getattr(config, "classifier", None)
    if isinstance(named, str) and any(path == named for path, _ in _sites.walk(model)):
        return named
    linear = [path for path, module in _sites.walk(model) if isinstance(module, nn.Linear)]
    if not linear or isinstance(named, tuple | list):
        raise ArgumentError(
            "it is not known which layer of this network gives the classes",
            where=type(model).__qualname__,
            expected="one head: what timm names in pretrained_cfg, or an nn.Linear at the end",
            found=f"several: {', '.join(named)}" if isinstance(named, tuple | list) else "no nn.Linear",
            fix="Give it its new head yourself, then say head='keep'.",
        )
    return linear[-1]


def new_head(model: nn.Module, classes: int, seed: int) -> None:
    """Put a new head with random weights in, in place: `reset_classifier` of timm, else a new `nn.Linear`.

    Args:
        model: a network with a head.
        classes: outputs of the new head.
        seed: of its weights; the global random state is left as it was.

    Raises:
        ArgumentError: see `head_path`; or the head is of a kind that is not known.

    Example:
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
        >>> new_head(model, 2, seed=0)
        >>> model[1]
        Linear(in_features=8, out_features=2, bias=True)
    """
    path = head_path(model)
    old = _sites.get(model, path)
    like = next(old.parameters(), next(model.parameters()))
    reset: Any = getattr(model, "reset_classifier", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if callable(reset):
            reset(classes)
        elif isinstance(old, nn.Linear):
            _sites.replace(model, [path], nn.Linear(old.in_features, classes, old.bias is not None))
        else:
            raise ArgumentError(
                "the head is of an unknown kind",
                where=path,
                expected="an nn.Linear, or a network with reset_classifier",
                found=type(old).__qualname__,
                fix="Give it its new head yourself, then say head='keep'.",
            )
    _sites.get(model, path).to(like.device, like.dtype).train(old.training)
