"""The network as the exporter gets it: a copy on the CPU in eval mode, its norms reduced to the bare operator.

Why activation and residual leave the operator here: torch's exporter writes them as it writes those of any other
network, and runtimes recognise and fuse them as such.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from gnswap import ops
from gnswap._errors import ExportError
from gnswap._layer import FusedGroupNorm
from gnswap._onnx import same
from gnswap._onnx.edit import Array
from gnswap.ops._activations import activate

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class PlainGroupNorm(FusedGroupNorm):
    """A FusedGroupNorm whose activation and residual are operators of their own; made by `plain` only."""

    def fold(self) -> None:
        """Compute once what does not depend on the input."""
        weight, bias = self.effective_affine()
        # clones: a cast of the network would otherwise reach them through the parameter
        self.register_buffer("folded_weight", None if weight is None else weight.detach().clone())
        self.register_buffer("folded_bias", None if bias is None else bias.detach().clone())
        # of a root module, torch.export counts the buffers that are None as if they came last
        self._buffers = dict(sorted(self._buffers.items(), key=lambda item: item[1] is None))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What `FusedGroupNorm.forward` computes."""
        x = ops.group_norm(
            x,
            self.num_groups,
            self.folded_weight,
            self.folded_bias,
            self.eps + self.softness,
            channel_scale=self.channel_scale,
            channel_shift=self.channel_shift,
            channel_order=self.channel_order,
        )
        if residual is not None:
            x = x + residual
        fused_act = self.fused_act
        if fused_act is not None:
            return activate(x, fused_act)
        if self.drop is not None:
            x = self.drop(x)
        return self.act(x) if isinstance(self.act, nn.Module) else x


def plain(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[nn.Module, torch.dtype, dict[str, Array]]:
    """The copy, its dtype, and its tensors as they were before a cast to a half type.

    The class of each layer is exchanged and not the layer, so that aliases, hooks and the root stay what they are.
    The norms' `[C]` vectors stay in fp32: they are rounded once, after all that is folded has been folded.

    Raises:
        ExportError: the model cannot be copied, is on the meta device, has parameters of several dtypes or of one that
            is not written, or holds a subclass of FusedGroupNorm with a forward of its own.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ExportError(
            "the model has no values",
            where=type(model).__qualname__,
            found="tensors on the meta device",
            fix="Load its weights first.",
        )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:  # deepcopy raises what the members raise
        raise ExportError("the model cannot be copied", found=f"{type(error).__name__}: {error}") from error
    copied = copied.to(device="cpu").eval().requires_grad_(False)
    norms = [(name, module) for name, module in copied.named_modules() if isinstance(module, FusedGroupNorm)]
    for name, module in norms:
        if type(module).forward is not FusedGroupNorm.forward:
            raise ExportError(
                "a subclass of FusedGroupNorm with its own forward",
                where=name or "(root)",
                expected="gnswap.FusedGroupNorm, which is what the exporter knows",
                found=type(module).__qualname__,
            )
    found = [tensor.dtype for tensor in copied.state_dict().values() if tensor.is_floating_point()]
    exact: dict[str, Array] = {}
    if dtype is not None:
        exact = {
            name: tensor.detach().float().numpy().copy()
            for name, tensor in copied.state_dict().items()
            if tensor.is_floating_point() and tensor.dtype != dtype
        }
    for layer in copied.modules():
        same.exchange(layer)
    for _, module in norms:
        module.__class__ = PlainGroupNorm
        assert isinstance(module, PlainGroupNorm)
        module.float().fold()
    vectors = [dict(module.named_buffers(recurse=False)) for _, module in norms]
    if dtype is not None:
        copied = copied.to(dtype)
    for (_, module), buffers in zip(norms, vectors, strict=True):
        for name, buffer in buffers.items():
            module.register_buffer(name, buffer)
    _require_one_dtype(copied)
    return copied, dtype or next(iter(found), torch.float32), exact


def _require_one_dtype(model: nn.Module) -> None:
    found = {
        tensor.dtype
        for module in model.modules()
        if not isinstance(module, PlainGroupNorm)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.is_floating_point()
    }
    if len(found) > 1 or found - set(_DTYPES):
        raise ExportError(
            "this dtype cannot be exported",
            expected=f"one of {', '.join(map(str, _DTYPES))} for all parameters",
            found=", ".join(sorted(map(str, found))),
            fix="Pass dtype=torch.float32 to export an fp32 copy.",
        )
