"""Clean-up and checks of an ONNX graph: readable names, nothing of the exporting machine in it, nothing unsafe.

Why on the finished graph and not inside the exporter: it holds for every operator in it, ours and the network's own,
and depends on no private interface of torch's exporter.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from gnswap._errors import ExportError, MissingDependencyError
from gnswap._onnx.norm import module_path


def require_onnx() -> Any:
    """The `onnx` module.

    Raises:
        MissingDependencyError: onnx, onnx-ir or onnxscript (which torch's exporter needs) is not installed.
    """
    try:
        import onnx
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "exporting needs onnx, onnx-ir and onnxscript", found=str(error), fix="Run: pip install 'gnswap[onnx]'"
        ) from error
    return onnx


def histogram(graph: Any) -> dict[str, int]:
    """How often each operator occurs in an `onnx_ir.Graph`, those inside If, Loop and Scan too, most frequent first."""
    return dict(collections.Counter(node.op_type for node in graph.all_nodes()).most_common())


def name_after_modules(graph: Any, parameters: Iterable[str]) -> None:
    """Name every node `module.path/Operator`, and every folded constant after the node that reads it.

    Args:
        graph: an `onnx_ir.Graph`, changed in place.
        parameters: initializer names that already say what they are.
    """
    taken: collections.Counter[str] = collections.Counter()
    keep = set(parameters)
    for node in graph:
        name = f"{module_path(node)}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
        for slot, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.name not in keep:
                value.name = f"{node.name}:{slot}"
                keep.add(value.name)


def name_axes(graph: Any, axes: list[dict[int, str]]) -> None:
    """Call the dynamic axes of the inputs by our names, and by the same names wherever else they occur.

    Args:
        graph: an `onnx_ir.Graph`, changed in place.
        axes: for each input, axis number to name.

    Raises:
        ExportError: an axis that should be dynamic is fixed in the graph.
    """
    import onnx_ir as ir

    symbols: dict[str, str] = {}
    for value, wanted in zip(graph.inputs, axes, strict=True):
        for axis, name in wanted.items():
            size = value.shape[axis]
            if isinstance(size, int):
                raise ExportError(
                    f"the {name} axis was fixed by the exporter",
                    where=value.name,
                    expected="a symbol",
                    found=str(size),
                )
            symbols.setdefault(str(size.value), name)
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols) or r"(?!)")
    for value in (*graph.inputs, *graph.outputs):
        value.shape = ir.Shape(
            size if isinstance(size, int) else pattern.sub(lambda found: symbols[found.group()], str(size.value))
            for size in value.shape
        )


def strip_traces(graph: Any) -> None:
    """Remove stack traces, file paths and intermediate shapes: they differ between machines and are of no use."""
    ends = {*graph.inputs, *graph.outputs}
    graph.metadata_props.clear()
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            if value not in ends:
                value.type = value.shape = None
    for value in (
        *ends,
        *graph.initializers.values(),
        *(value for node in graph.all_nodes() for value in node.outputs),
    ):
        value.metadata_props.clear()
        value.doc_string = None


def check(model: Any, opset: int, path: Path | None = None) -> Any:
    """Hold a finished `onnx.ModelProto` against what every runtime needs.

    Args:
        model: the graph.
        opset: that it should have.
        path: of the file, where weights lie in another file beside it.

    Returns:
        the model with inferred intermediate shapes.

    Raises:
        ExportError: another opset than asked for, a node outside the standard operators, a GroupNormalization, or
            anything that onnx's checker or strict shape inference refuses.
    """
    import onnx

    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in _nodes(model.graph) if node.domain})
    if foreign or model.functions:
        raise ExportError(
            "operators that only their author's runtime knows",
            expected="standard ONNX operators",
            found=", ".join(foreign or [function.name for function in model.functions]),
            fix="Replace the module that makes them by plain torch operators before the export.",
        )
    if found != {"ai.onnx": opset}:
        raise ExportError("wrong opset", expected=str(opset), found=str(found))
    if unsafe := [node.name for node in _nodes(model.graph) if node.op_type == "GroupNormalization"]:
        raise ExportError(
            "GroupNormalization in the file: onnxruntime computes it as E[x²]-E[x]², which loses all digits",
            where=", ".join(unsafe[:5]),
            fix="Export with opset 18.",
        )
    try:
        onnx.checker.check_model(model if path is None else str(path), full_check=True)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError("onnx's own checker refuses the file", found=str(error)[:500]) from error


def _nodes(graph: Any) -> Iterator[Any]:
    """Every node of an `onnx.GraphProto`, those inside If, Loop and Scan included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from _nodes(attribute.g)
            for subgraph in attribute.graphs:
                yield from _nodes(subgraph)
