"""What everybody has without gnswap, as ONNX files: torch's own export of a network, and of one with plain GroupNorms.

Why with fixed sizes: that is what torch does unless told otherwise, and the fastest that it gives.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap import _trace
from gnswap._errors import ExportError
from gnswap._layer import FusedGroupNorm
from gnswap.ops._activations import activate


class _GroupNorm(FusedGroupNorm):
    """torch's GroupNorm with the layer's gamma and beta, and what comes after it; the standardisation is left out.

    The numbers are not those of the network, the time is that of a network which was trained with GroupNorm.
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        y = y if residual is None else y + residual
        if self.drop is not None:
            y = self.drop(y)
        return self.act(y) if isinstance(self.act, nn.Module) else activate(y, self.act)


def with_plain_norms(model: nn.Module) -> nn.Module:
    """A copy in which every FusedGroupNorm computes as `torch.nn.GroupNorm` and its activation."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, FusedGroupNorm):
            module.__class__ = _GroupNorm
    return model


def export_by_torch(model: nn.Module, path: Path, case: Sequence[Tensor]) -> None:
    """`torch.onnx.export` as it comes, in eval mode on the CPU, in fp32.

    Raises:
        ExportError: torch cannot write it.
    """
    plain = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
    inputs = tuple(value.detach().to("cpu", torch.float32 if value.is_floating_point() else None) for value in case)
    try:
        with _trace.quiet():
            torch.onnx.export(plain, inputs, str(path), dynamo=True, verbose=False)
    except Exception as error:  # the exporter wraps anything
        raise ExportError(
            "torch's own exporter cannot write the network",
            where=type(model).__name__,
            found=" ".join(str(error.__cause__ or error).split())[:400],
        ) from error
