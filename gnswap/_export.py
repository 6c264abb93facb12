"""export_onnx: a network as one ONNX file that any runtime reads.

Why the GroupNorms are lowered before the export and not by a translation of our operator: what the exporter sees is
then plain torch, so every version of it writes the same standard nodes. Why opset 18: from 21 on torch writes
GroupNormalization, for which onnxruntime's CPU and CUDA providers have no kernel; its replacement computes
E[x²]-E[x]² and is wrong by 2.5e-3 where the mean is 30 standard deviations, and NaN at 1000. The
InstanceNormalization form of opset 18 keeps 2e-5 and has kernels everywhere.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnswap import _onnx_graph as onnx_graph
from gnswap import _sites, _trace
from gnswap._errors import ArgumentError, ExportError
from gnswap._layer import FusedGroupNorm
from gnswap._record import Record
from gnswap.ops._activations import activate

TARGETS = ("portable",)
_OPSETS = (18, 19, 20)
_MAX_BYTES = 2**31 - 1  # protobuf's own limit for one file


@dataclasses.dataclass(frozen=True)
class Endpoint(Record):
    """An input or output of an ONNX file.

    Attributes:
        name: as `InferenceSession.run` wants it.
        shape: one entry an axis: a number, or the name of a dynamic axis ("batch", "height", "width//32").
        dtype: as ONNX calls it, such as "FLOAT".
    """

    name: str
    shape: tuple[str, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class ExportReport(Record):
    """What `export_onnx` wrote.

    Attributes:
        path: the file.
        target: what it was written for.
        opset: of the standard ONNX operators.
        sha256, size: of the file; size in bytes.
        inputs, outputs: in the order that runtimes want and give them.
        dynamic_axes: names of the axes that may change from call to call.
        operators: how often each operator occurs.
        norms: paths of the FusedGroupNorm layers that were written as plain operators.
        notes: what is less general than was asked for, and why.
        versions: of gnswap, torch, onnx and onnxscript.
    """

    path: str
    target: str
    opset: int
    sha256: str
    size: int
    inputs: tuple[Endpoint, ...]
    outputs: tuple[Endpoint, ...]
    dynamic_axes: tuple[str, ...]
    operators: dict[str, int]
    norms: tuple[str, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | Sequence[Tensor],
    *,
    target: str = "portable",
    dtype: torch.dtype | None = None,
    dynamic_batch: bool = True,
    dynamic_size: bool = True,
    opset: int = 18,
) -> ExportReport:
    """Write a network as an ONNX file, as it computes in eval mode.

    Works on a copy on the CPU: the model, its train flags and its device stay as they are. The file appears under
    its name only when it is complete and checked. The same model gives the same bytes.

    Args:
        model: converted by gnswap or not; fp32 parameters.
        path: the `.onnx` file to write; an existing one is replaced.
        example_input: the input, or all positional inputs. Their values do not matter, their sizes do where an axis
            is not dynamic.
        target: "portable" is the only one so far: standard operators that every runtime knows.
        dtype: ``torch.float32`` casts a half-precision or fp64 model first; None wants an fp32 model.
        dynamic_batch: whether the batch size may change from call to call.
        dynamic_size: whether height and width may. Where the network does not allow it the example's size is
            written, and the report's notes say why.
        opset: 18, 19 or 20.

    Returns:
        what was written.

    Raises:
        ArgumentError: an argument that is not of this kind.
        WrappedModelError: DDP, FSDP, torch.compile or TorchScript anywhere in the model.
        ExportError: the network cannot be traced or written; the file is not touched then.
        MissingDependencyError: onnx or onnxscript is missing.

    Example:
        >>> import tempfile, torch, gnswap
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), gnswap.FusedGroupNorm(2, 8, act="relu"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = gnswap.export_onnx(model, f"{folder}/net.onnx", torch.randn(2, 3, 16, 16))
        >>> report.dynamic_axes, report.operators["InstanceNormalization"]
        (('batch', 'height', 'width'), 1)
    """
    _check_options(target, dtype, opset)
    _sites.require_plain(model)
    onnx = onnx_graph.require_onnx()
    path = Path(path)
    if not path.parent.is_dir():
        raise ArgumentError("no such folder", where="path", found=str(path.parent))
    plain, norms = lowered(model, dtype)
    inputs = _checked_inputs(example_input, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            example_output = plain(*inputs)
        except Exception as error:  # the user's forward may raise anything
            raise ExportError(
                "the model does not run on the example input",
                where=", ".join(str(tuple(value.shape)) for value in inputs),
                found=f"{type(error).__name__}: {error}",
            ) from error
    traced = _trace.trace(plain, inputs, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    input_names = _input_names(plain, len(inputs))
    proto = _translate(traced, input_names, _output_names(example_output), opset)

    known = {*plain.state_dict(), *(name for name, _ in plain.named_buffers())}
    onnx_graph.make_reshapes_constant(proto.graph)
    onnx_graph.name_after_modules(proto.graph, known)
    onnx_graph.name_axes(proto.graph, traced.axes)
    onnx_graph.strip_traces(proto)
    versions = _versions(onnx)
    properties = {"gnswap.version": versions["gnswap"], "gnswap.torch": versions["torch"], "gnswap.target": target}
    if (record := _sites.applied(model)) is not None:
        properties["gnswap.fingerprint"] = record.plan.fingerprint
    onnx.helper.set_model_props(proto, properties)
    proto = onnx_graph.check(proto, opset)
    data = proto.SerializeToString(deterministic=True)
    _write(path, data)
    return ExportReport(
        path=str(path),
        target=target,
        opset=opset,
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        inputs=tuple(_endpoint(value) for value in proto.graph.input),
        outputs=tuple(_endpoint(value) for value in proto.graph.output),
        dynamic_axes=tuple(sorted({name for axes in traced.axes for name in axes.values()})),
        operators=onnx_graph.histogram(proto.graph),
        norms=norms,
        notes=(*traced.notes, *_target_notes(plain)),
        versions=versions,
    )


class PlainGroupNorm(FusedGroupNorm):
    """A FusedGroupNorm that computes by plain torch operators; made by `lowered` only."""

    def fold(self) -> None:
        """Compute once what does not depend on the input: folded and permuted parameters, the way back."""
        order, (folded, bias) = self.channel_order, self.effective_affine()
        back = None if order is None else torch.argsort(order)
        self.register_buffer("folded_weight", folded if order is None or folded is None else folded[order])
        self.register_buffer("folded_bias", bias if order is None or bias is None else bias[order])
        self.register_buffer("inverse_order", back)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """What `FusedGroupNorm.forward` computes."""
        per_channel = (-1, *[1] * (x.dim() - 2))
        if self.channel_scale is not None:
            x = x * self.channel_scale.view(per_channel)
        if self.channel_shift is not None:
            x = x + self.channel_shift.view(per_channel)
        if self.channel_order is not None:
            x = x.index_select(1, self.channel_order)
        x = F.group_norm(x, self.num_groups, self.folded_weight, self.folded_bias, self.eps + self.softness)
        if self.channel_order is not None:
            x = x.index_select(1, self.inverse_order)
        if residual is not None:
            x = x + residual
        fused_act = self.fused_act
        if fused_act is not None:
            return activate(x, fused_act)
        if self.drop is not None:
            x = self.drop(x)
        return self.act(x) if isinstance(self.act, nn.Module) else x


def lowered(model: nn.Module, dtype: torch.dtype | None = None) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy in eval mode on the CPU, without our operator in it, and the paths of its norms.

    The class of each layer is exchanged and not the layer, so that aliases, hooks and the root stay what they are.

    Raises:
        ExportError: the model cannot be copied, is on the meta device, is not fp32, or holds a subclass of
            FusedGroupNorm with a forward of its own.
    """
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ExportError("the model is on the meta device and has no values", fix="Load its weights first.")
    try:
        plain = copy.deepcopy(model)
    except Exception as error:  # deepcopy raises what the members raise
        raise ExportError("the model cannot be copied", found=f"{type(error).__name__}: {error}") from error
    plain = plain.to(device="cpu", dtype=dtype).eval().requires_grad_(False)
    kinds = {tensor.dtype for tensor in plain.state_dict().values() if tensor.is_floating_point()}
    if kinds - {torch.float32}:
        raise ExportError(
            "only fp32 networks can be exported so far",
            expected="torch.float32",
            found=", ".join(sorted(map(str, kinds))),
            fix="Pass dtype=torch.float32 to export an fp32 copy.",
        )
    norms = []
    for name, module in plain.named_modules():
        if not isinstance(module, FusedGroupNorm):
            continue
        if type(module).forward is not FusedGroupNorm.forward:
            raise ExportError("a subclass of FusedGroupNorm with its own forward", where=name or "(root)")
        module.__class__ = PlainGroupNorm
        assert isinstance(module, PlainGroupNorm)
        module.fold()
        norms.append(name or "(root)")
    return plain, tuple(norms)


def _check_options(target: str, dtype: torch.dtype | None, opset: int) -> None:
    if target not in TARGETS:
        raise ArgumentError("unknown target", where="target", expected=" or ".join(TARGETS), found=repr(target))
    if dtype not in (None, torch.float32):
        raise ArgumentError(
            "dtype not available yet",
            where="dtype",
            expected="None or torch.float32",
            found=str(dtype),
            fix="Half-precision files need their statistics kept in fp32, which this version does not write.",
        )
    if opset not in _OPSETS:
        raise ArgumentError(
            "opset out of range",
            where="opset",
            expected="18, 19 or 20",
            found=str(opset),
            fix="From 21 on GroupNormalization would be written, which onnxruntime computes inaccurately.",
        )


def _checked_inputs(example: Tensor | Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    inputs = [example] if isinstance(example, Tensor) else list(example)
    if not inputs or not all(isinstance(value, Tensor) for value in inputs):
        raise ArgumentError(
            "not an input",
            where="example_input",
            expected="a tensor, or a tuple of tensors for several positional inputs",
            found=", ".join(type(value).__name__ for value in inputs) or "nothing",
        )
    if any(value.numel() == 0 for value in inputs):
        raise ArgumentError("an empty example input", where="example_input", expected="at least one element")
    return [value.detach().to("cpu", dtype if value.is_floating_point() else None) for value in inputs]


def _input_names(model: nn.Module, count: int) -> list[str]:
    """ "input" where there is one, else the names in forward's signature."""
    if count == 1:
        return ["input"]
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{number}" for number in range(count - len(names))]
        else:
            names.append(parameter.name)
    return names[:count]


def _output_names(output: Any) -> list[str]:
    """ "output" where there is one, keys of a dict, and "output_0", "output_1" of a tuple."""
    leaves = [(path, leaf) for path, leaf in torch.utils._pytree.tree_flatten_with_path(output)[0] if leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise ExportError(
            "the model's output is not made of tensors",
            expected="a tensor, or tuples, lists and dicts of tensors",
            found=", ".join(sorted({type(leaf).__name__ for _, leaf in leaves})) or "nothing",
        )
    names = []
    for path, _ in leaves:
        keys = [str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", "")))) for entry in path]
        if not keys or keys[0].isdigit():
            keys.insert(0, "output")
        names.append("_".join(keys))
    return names


def _translate(traced: _trace.Traced, input_names: list[str], output_names: list[str], opset: int) -> Any:
    try:
        with _trace.quiet():
            program = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps anything; its first line says which operator
        raise ExportError(
            "torch's exporter cannot write the network as ONNX",
            found=" ".join(str(error.__cause__ or error).split())[:400],
            fix="An operator without an ONNX form has to be replaced in the model.",
        ) from error
    assert program is not None  # it is None only for the old exporter
    proto = program.model_proto
    if proto.ByteSize() > _MAX_BYTES:
        raise ExportError("the network is larger than one ONNX file can be", expected="under 2 GiB")
    return proto


def _target_notes(model: nn.Module) -> tuple[str, ...]:
    single = [
        name
        for name, module in model.named_modules()
        if isinstance(module, FusedGroupNorm | nn.GroupNorm) and module.num_groups == 1
    ]
    if not single:
        return ()
    return (
        f"{len(single)} layers have one group: TensorRT 10.16 computes these as instance norm "
        "(NVIDIA/TensorRT#4756); validate there before use",
    )


def _write(path: Path, data: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")  # not mkstemp: its mode 0600 would stay
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise ExportError("the file cannot be written", where=str(path), found=str(error)) from error
    finally:
        fresh.unlink(missing_ok=True)


def _endpoint(value: Any) -> Endpoint:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return Endpoint(value.name, shape, onnx.TensorProto.DataType.Name(tensor.elem_type))


def _versions(onnx: Any) -> dict[str, str]:
    import onnxscript

    return {
        "gnswap": str(getattr(sys.modules["gnswap"], "__version__", "unknown")),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnxscript": onnxscript.__version__,
    }
