"""Which node of an ONNX file belongs to which module of the torch model, and how to look at values inside the file.

Why by names: `export_onnx` names every node `module.path/Operator`, and torch's own exporter leaves the module path in
a node's metadata. Passes of runtimes and optimisers keep either, or the names of values.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gnswap._errors import MissingDependencyError, ValidationError

_METADATA = "pkg.torch.onnx.name_scopes"
_PRECISIONS = ("bfloat16", "float16", "float32", "float64")  # the narrowest in a file is what it computes in


def load(path: str | os.PathLike[str], *, weights: bool = False) -> Any:
    """The `onnx.ModelProto` of a file; `weights` also reads the data that it keeps in other files.

    Raises:
        MissingDependencyError: onnx is not installed.
        ValidationError: this is no ONNX file.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            "looking into an ONNX file needs onnx", found=str(error), fix="Run: pip install 'gnswap[onnx]'"
        ) from error
    try:
        return onnx.load(os.fspath(path), load_external_data=weights)
    except Exception as error:  # protobuf's own, and OSError for the files beside it
        raise ValidationError("the file cannot be read as ONNX", where=str(path), found=str(error)[:200]) from error


def precision_of(proto: Any) -> torch.dtype:
    """The narrowest floating type among the file's weights and inputs; fp32 where there are none."""
    import onnx

    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in proto.graph.input}
    names = {onnx.TensorProto.DataType.Name(kind) for kind in kinds}
    onnx_names = {"float32": "FLOAT", "float64": "DOUBLE"}
    found = next((name for name in _PRECISIONS if onnx_names.get(name, name.upper()) in names), "float32")
    return getattr(torch, found)  # type: ignore[no-any-return]


def scope_of(node: Any) -> str | None:
    """Path of the module that a node comes from ("" is the root); None where the file does not say."""
    path, slash, _ = node.name.rpartition("/")
    if slash and not node.name.startswith("/"):
        return str(path)
    text = next((prop.value for prop in node.metadata_props if prop.key == _METADATA), None)
    if text is None:
        return "" if slash else None
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return None
    return next((str(scope) for scope in reversed(scopes[:-1]) if scope), "")


def inside(scope: str | None, path: str) -> bool:
    """Whether a node of that scope belongs to the module at `path`.

    Example:
        >>> inside("layer1.0.bn1.act", "layer1.0.bn1"), inside("layer1.0.bn10", "layer1.0.bn1")
        (True, False)
    """
    return scope is not None and (not path or scope == path or scope.startswith(f"{path}."))


def results(graph: Any, modules: Mapping[str, Iterable[str]]) -> dict[str, tuple[str, ...]]:
    """The values that modules hand to the rest of the network, in the order in which they are computed.

    Args:
        graph: an `onnx.GraphProto`.
        modules: for each module all its paths.

    Returns:
        for each module the names of its results: one a call, none where the file has no node of it.
    """
    scopes = [scope_of(node) for node in graph.node]
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers.setdefault(name, []).append(index)
    last, data = {value.name for value in graph.output}, {value.name for value in graph.input}
    for node in graph.node:
        # what is made of constants and sizes alone may be shared by many modules
        if node.op_type not in ("Shape", "Size") and data.intersection(node.input):
            data.update(node.output)
    found: dict[str, tuple[str, ...]] = {}
    for module, paths in modules.items():
        own = {index for index, scope in enumerate(scopes) if any(inside(scope, path) for path in paths)}
        found[module] = tuple(
            name
            for index in sorted(own)
            for name in graph.node[index].output
            if name in data and (name in last or any(reader not in own for reader in readers.get(name, ())))
        )
    return found


def layouts(proto: Any) -> dict[str, list[list[int] | None]]:
    """For norms whose results the file stores in another order: per call, the torch channel that is at each place.

    An export gives a norm's channel order to the weights before and behind it, which spares moving the channels.

    Returns:
        by module path; modules in natural order are not there, single calls in natural order are None.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == "gnswap.channel_layouts"), "{}")
    found: dict[str, list[list[int] | None]] = json.loads(text)
    return found


def affine_behind(proto: Any) -> dict[str, list[bool]]:
    """Norms whose gamma and beta the export has put into the next layer's weights: by module path, for each call.

    Their result in the file is the bare normalised tensor; a wrong factor shows in the layers after.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == "gnswap.affine_behind"), "{}")
    found: dict[str, list[bool]] = json.loads(text)
    return found


def with_outputs(path: str | os.PathLike[str], names: Iterable[str], folder: Path) -> Path:
    """A copy of the file, in `folder`, that also gives these inner values, after its own outputs."""
    import onnx

    proto = load(path, weights=True)
    known = {value.name for value in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    copy = folder / "layers.onnx"
    too_large = proto.ByteSize() >= onnx.checker.MAXIMUM_PROTOBUF
    onnx.save(proto, copy, save_as_external_data=too_large, location="layers.data" if too_large else None)
    return copy
