"""export_onnx: a network as one ONNX file that any runtime reads.

torch traces and translates the network; every GroupNorm stays one node meanwhile, and `gnswap._onnx` writes it in the
form that suits the target. Never as ONNX's own GroupNormalization: onnxruntime's CPU and CUDA providers have no kernel
for it, and what they put in its place computes E[x²]-E[x]², which is wrong by 2.5e-3 where the mean is 30 standard
deviations, and NaN at 1000.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gnswap import _onnx_graph as onnx_graph
from gnswap import _sites, _trace
from gnswap._errors import ArgumentError, ExportError
from gnswap._onnx import compiler, norm, plain, same, targets, write
from gnswap._onnx.autotune import tune
from gnswap._onnx.compiler import NormExport
from gnswap._record import Record

_HALVES = (torch.float16, torch.bfloat16)
_OPSETS = range(18, 25)


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
        norms: how each GroupNorm was written, and why in this way.
        timings: with autotune: median milliseconds of the whole network in each form, fastest first.
        files: all that belongs together: the file, and its weights where they are too large for one file.
        notes: what is less general than was asked for, and why.
        versions: of gnswap, torch, onnx, onnx-ir and onnxscript.
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
    norms: tuple[NormExport, ...]
    timings: dict[str, float]
    files: tuple[str, ...]
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
    opset: int | None = None,
    threads: int | None = None,
    autotune: bool = False,
) -> ExportReport:
    """Write a network as an ONNX file, as it computes in eval mode.

    Works on a copy on the CPU: the model, its train flags and its device stay as they are. The file appears under
    its name only when it is complete and checked. The same model gives the same bytes.

    Args:
        model: converted by gnswap or not; parameters of one dtype: fp32, fp16 or bf16.
        path: the `.onnx` file to write; an existing one is replaced. Weights beyond 2 GiB go to a file beside it.
        example_input: the input, or all positional inputs. Their values do not matter, their sizes do where an axis
            is not dynamic.
        target: "portable": operators that every runtime has; "cpu", "cuda", "tensorrt": what is fastest there.
            All are standard operators and run everywhere.
        dtype: of weights, inputs and outputs of the file; None keeps the model's. Statistics stay in fp32. bf16 is for
            a GPU: onnxruntime's CPU provider has no convolutions in it, and target "cpu" refuses it.
        dynamic_batch: whether the batch size may change from call to call.
        dynamic_size: whether height and width may. Where the network does not allow it the example's size is
            written, and the report's notes say why.
        opset: 18 to 24; None is 20 for target "cpu", 22 for bf16, which convolutions only have since then, else 18.
        threads: for target "cpu": 1 where the session will use one thread; None means several.
        autotune: time every form on this machine, with the example as input, and keep the fastest; not for target
            "portable". The bytes then depend on the machine.

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
    path = Path(path)
    _check_options(path, target, dtype, threads, autotune)
    _sites.require_plain(model)
    onnx = onnx_graph.require_onnx()
    prepared, dtype, exact = plain.plain(model, dtype)
    wanted = targets.target_of(target, threads)
    _check_runnable(dtype, wanted)
    opset = _checked_opset(opset, dtype, wanted)
    inputs = _checked_inputs(example_input, dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            example_output = prepared(*inputs)
        except Exception as error:  # the user's forward may raise anything
            raise ExportError(
                "the model does not run on the example input",
                where=", ".join(str(tuple(value.shape)) for value in inputs),
                found=f"{type(error).__name__}: {error}",
                fix="example_input is what forward takes, in its order; several inputs go in a tuple.",
            ) from error
    traced = _trace.trace(prepared, inputs, dynamic_batch=dynamic_batch, dynamic_size=dynamic_size)
    input_names = _input_names(prepared, len(inputs))
    compiled = _translate(traced, input_names, _output_names(example_output, input_names), opset)

    graph = compiled.graph
    known = {*prepared.state_dict(), *(name for name, _ in prepared.named_buffers())}
    loose = graph.initializers.keys() - known
    found = compiler.prepare(graph, exact)
    rows = norm.example_rows(traced.program)
    for one in found:
        one.example_row = rows.get(one.path)
    choice = compiler.by_target(wanted)
    timings: dict[str, float] = {}
    if autotune and found:
        choice, timings = tune(compiled, found, wanted, inputs, threads)
    norms = compiler.lower(graph, found, choice)
    onnx_graph.name_after_modules(graph, graph.initializers.keys() - loose)
    onnx_graph.name_axes(graph, traced.axes)
    onnx_graph.strip_traces(graph)
    versions = _versions(onnx)
    compiled.metadata_props.clear()
    compiled.metadata_props.update(
        _properties(model, target, versions) | compiler.layouts(found) | compiler.affine_behind(found)
    )
    proto, files = write.write(compiled, path, opset)
    return ExportReport(
        path=str(path),
        target=target,
        opset=opset,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=sum(file.stat().st_size for file in files),
        inputs=tuple(_endpoint(value) for value in proto.graph.input),
        outputs=tuple(_endpoint(value) for value in proto.graph.output),
        dynamic_axes=tuple(sorted({name for axes in traced.axes for name in axes.values()})),
        operators=onnx_graph.histogram(graph),
        norms=norms,
        timings=timings,
        files=tuple(map(str, files)),
        notes=(*traced.notes, *_target_notes(norms)),
        versions=versions,
    )


def _check_options(path: Path, target: str, dtype: torch.dtype | None, threads: int | None, autotune: bool) -> None:
    if target not in targets.TARGETS:
        raise ArgumentError("unknown target", where="target", expected=" or ".join(targets.TARGETS), found=repr(target))
    if dtype not in (None, torch.float32, *_HALVES):
        raise ArgumentError(
            "no dtype for a file",
            where="dtype",
            expected="None, torch.float32, torch.float16 or torch.bfloat16",
            found=str(dtype),
        )
    if threads is not None and threads < 1:
        raise ArgumentError("threads out of range", where="threads", expected="1 or more", found=str(threads))
    if autotune and target == "portable":
        raise ArgumentError(
            "there is nothing to time for every runtime at once",
            where="autotune",
            expected="target cpu, cuda or tensorrt",
            found="portable",
        )
    if not path.parent.is_dir():
        raise ArgumentError("no such folder", where="path", found=str(path.parent), fix="Make it first.")


def _check_runnable(dtype: torch.dtype, target: targets.Target) -> None:
    if target.name == "cpu" and dtype == torch.bfloat16:
        raise ArgumentError(
            "onnxruntime's CPU provider has no convolutions in bf16",
            where="dtype",
            expected="fp32 or fp16 for target cpu",
            found="bf16",
            fix="For a GPU: target cuda or tensorrt.",
        )


def _checked_opset(opset: int | None, dtype: torch.dtype, target: targets.Target) -> int:
    least = 22 if dtype == torch.bfloat16 else 18
    # where the standard has no older form, the newest kernels are the only ones
    most = max(target.max_opset, least)
    if opset is None:
        return max(least, target.opset)
    if not least <= opset <= most:
        raise ArgumentError(
            "opset out of range",
            where="opset",
            expected=f"{least} to {most} for target {target.name} and {dtype}",
            found=str(opset),
        )
    return opset


def _checked_inputs(example: Tensor | Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
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


def _output_names(output: Any, taken: Sequence[str]) -> list[str]:
    """ "output" where there is one, keys of a dict, and "output_0", "output_1" of a tuple; none that is `taken`."""
    leaves = [(path, leaf) for path, leaf in torch.utils._pytree.tree_flatten_with_path(output)[0] if leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise ExportError(
            "the model's output is not made of tensors",
            where="forward",
            expected="a tensor, or tuples, lists and dicts of tensors",
            found=", ".join(sorted({type(leaf).__name__ for _, leaf in leaves})) or "nothing",
        )
    names = []
    for path, _ in leaves:
        keys = [str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", "")))) for entry in path]
        if not keys or keys[0].isdigit() or "_".join(keys) in taken:
            keys.insert(0, "output")
        names.append("_".join(keys))
    return names


def _translate(traced: _trace.Traced, input_names: list[str], output_names: list[str], opset: int) -> Any:
    """The `onnx_ir.Model` of a traced network, every GroupNorm of it one node."""
    try:
        with _trace.quiet():
            program = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=input_names,
                output_names=output_names,
                custom_translation_table=norm.translations() | same.translations(),
                verbose=False,
            )
    except Exception as error:  # the exporter wraps anything; its first line says which operator
        raise ExportError(
            "torch's exporter cannot write the network as ONNX",
            found=" ".join(str(error.__cause__ or error).split())[:400],
            fix="An operator without an ONNX form has to be replaced in the model; where the batch size enters an "
            "operator's settings (CondConv: its groups), dynamic_batch=False (--fixed-batch N) helps.",
        ) from error
    assert program is not None  # it is None only for the old exporter
    return program.model


def _target_notes(norms: tuple[NormExport, ...]) -> tuple[str, ...]:
    single = [one for one in norms if one.num_groups == 1 and one.lowering.startswith("instance_norm")]
    if not single:
        return ()
    return (
        f"{len(single)} layers have one group: TensorRT 10.16 computes these as instance norm "
        "(NVIDIA/TensorRT#4756); export for target tensorrt for use there",
    )


def _properties(model: nn.Module, target: str, versions: dict[str, str]) -> dict[str, str]:
    """What the file says about itself: where it comes from, and how its inputs have to be prepared."""
    properties = {f"gnswap.{name}": version for name, version in versions.items() if name != "gnswap"}
    properties |= {"gnswap.version": versions["gnswap"], "gnswap.target": target}
    if (record := _sites.applied(model)) is not None:
        properties["gnswap.fingerprint"] = record.plan.fingerprint
    if config := getattr(model, "pretrained_cfg", None):
        from timm.data.config import resolve_data_config

        resolve: Callable[..., dict[str, Any]] = resolve_data_config  # timm's function has no type hints
        properties["timm.preprocessing"] = json.dumps(resolve(pretrained_cfg=dict(config)), sort_keys=True)
    return dict(sorted(properties.items()))


def _endpoint(value: Any) -> Endpoint:
    import onnx

    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
    return Endpoint(value.name, shape, onnx.TensorProto.DataType.Name(tensor.elem_type))


def _versions(onnx: Any) -> dict[str, str]:
    import onnx_ir
    import onnxscript

    return {
        "gnswap": str(getattr(sys.modules["gnswap"], "__version__", "unknown")),
        "torch": str(torch.__version__),
        "onnx": onnx.__version__,
        "onnx-ir": onnx_ir.__version__,
        "onnxscript": onnxscript.__version__,
    }
