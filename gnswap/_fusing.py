"""Fusing and re-parameterising need BatchNorm: on a converted network they are refused.

Why here and not left to the networks: timm's blocks fold a BatchNorm into the convolution before it, and the shortcut
around both with it. With a GroupNorm in its place most fail on a missing attribute, but some pass over the norm and
still fold the shortcut (EfficientViM), which makes another network of it without a word.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from gnswap._errors import ModelError
from gnswap._sites import get

# what `timm.utils.reparameterize_model` calls; others (torchvision, ultralytics) use the same names
METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def forbid(model: nn.Module, paths: Iterable[str]) -> None:
    """Make every module above a swapped norm refuse to be fused, where it has a method for that.

    Args:
        model: the converted network.
        paths: of the swapped norms.

    Example:
        >>> import copy
        >>> class Block(nn.Sequential):
        ...     def fuse(self):
        ...         return self[0]
        >>> model = nn.Sequential(Block(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
        >>> forbid(model, ["0.1"])
        >>> model[0].fuse()
        Traceback (most recent call last):
        gnswap._errors.ModelError: a GroupNorm cannot be folded into a convolution...
        >>> allow(model)
        >>> model[0].fuse()
        Conv2d(3, 8, kernel_size=(1, 1), stride=(1, 1))
    """
    parts = [path.split(".") for path in paths]
    for above in {".".join(names[:depth]) for names in parts for depth in range(len(names))}:
        module = get(model, above)
        for name in METHODS:
            if callable(getattr(type(module), name, None)) and name not in vars(module):
                vars(module)[name] = _refused


def allow(model: nn.Module) -> None:
    """Take back what `forbid` did."""
    for module in model.modules():
        for name in METHODS:
            if vars(module).get(name) is _refused:
                del vars(module)[name]


def _refused(*_arguments: object, **_options: object) -> None:
    raise ModelError(
        "a GroupNorm cannot be folded into a convolution",
        expected="BatchNorm, which is a constant for every channel in eval mode",
        fix="Fuse or re-parameterise before the conversion; gnswap.revert gives the BatchNorms back.",
    )
