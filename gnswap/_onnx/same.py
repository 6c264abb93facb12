"""Convolutions with TensorFlow's SAME padding (timm's `tf_` networks), with height and width left dynamic.

Why an operator of our own in the traced graph: timm writes the padding as max((ceil(H/s)-1)*s + (k-1)+1 - H, 0), and
each strided layer puts the last one's result into the next one's H. torch.export simplifies these expressions for
minutes without an end. The size of the result is just ceil(H/s), and ONNX's Conv computes the padding itself where it
is told `auto_pad="SAME_UPPER"`. Outside an export nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.library.custom_op("gnswap::conv2d_same", mutates_args=())
def conv2d_same(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], groups: int) -> Tensor:
    """A convolution of `[N, C, H, W]` with zeros around it so that the result is `[N, K, ceil(H/s), ceil(W/s)]`."""
    totals = [
        max((-(-size // step) - 1) * step + kernel - size, 0)
        for size, step, kernel in zip(x.shape[2:], stride, weight.shape[2:], strict=True)
    ]
    top, left = (total // 2 for total in totals)
    return F.conv2d(F.pad(x, (left, totals[1] - left, top, totals[0] - top)), weight, bias, stride, groups=groups)


@conv2d_same.register_fake
def _(x: Tensor, weight: Tensor, _bias: Tensor | None, stride: Sequence[int], _groups: int) -> Tensor:
    sizes = [(size + step - 1) // step for size, step in zip(x.shape[2:], stride, strict=True)]
    return x.new_empty((x.shape[0], weight.shape[0], *sizes))


class PlainConv2dSame(nn.Conv2d):
    """timm's Conv2dSame as one operator; made by `exchange` only."""

    def forward(self, x: Tensor) -> Tensor:
        """What `Conv2dSame.forward` computes."""
        return conv2d_same(x, self.weight, self.bias, self.stride, self.groups)  # type: ignore[no-any-return]


def exchange(module: nn.Module) -> None:
    """Make a PlainConv2dSame of a Conv2dSame, in place; anything else stays what it is."""
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" == "timm.layers.conv2d_same.Conv2dSame":
        assert isinstance(module, nn.Conv2d)
        if module.dilation == (1, 1) and "forward" not in module.__dict__:
            module.__class__ = PlainConv2dSame


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The part of `custom_translation_table` for `torch.onnx.export` that writes these convolutions."""
    from onnxscript import opset18 as op

    def same(x: Any, weight: Any, bias: Any, stride: Sequence[int], groups: int) -> Any:
        return op.Conv(x, weight, bias, strides=list(stride), group=groups, auto_pad="SAME_UPPER")

    return {torch.ops.gnswap.conv2d_same.default: same}
