"""Clean-up and checks of an ONNX graph: constant reshapes, readable names, nothing of the exporting machine in it.

Why on the finished protobuf and not inside the exporter: it works for every GroupNorm, ours and the network's own,
and depends on no private interface of torch's exporter.
"""

from __future__ import annotations

import ast
import collections
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gnswap._errors import ExportError, MissingDependencyError

_SCOPES = "pkg.torch.onnx.name_scopes"


def require_onnx() -> Any:
    """The `onnx` module.

    Raises:
        MissingDependencyError: onnx or onnxscript (which torch's exporter needs) is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "exporting needs onnx and onnxscript", found=str(error), fix="Run: pip install 'gnswap[onnx]'"
        ) from error
    return onnx


def nodes(graph: Any) -> Iterator[Any]:
    """Every node of a graph, those inside If, Loop and Scan included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            yield from nodes(attribute.g)
            for subgraph in attribute.graphs:
                yield from nodes(subgraph)


def histogram(graph: Any) -> dict[str, int]:
    """How often each operator occurs, most frequent first."""
    return dict(collections.Counter(node.op_type for node in nodes(graph)).most_common())


def make_reshapes_constant(graph: Any) -> int:
    """Give the reshapes around each InstanceNormalization constant target shapes, for any batch and any size.

    torch's exporter asks for the input's shape at run time and feeds it into the second reshape. That node costs a
    launch, and a strict session on CUDA refuses it when it lands on the CPU. ONNX's Reshape copies the axis of the
    same index where the target says 0, so `[0, G, -1, 0]` and back `[0, C, -1, 0]` serve every N, H and W.

    Args:
        graph: an `onnx.GraphProto`, changed in place; the channels of each normalised tensor must be known.

    Returns:
        the number of reshape pairs that were made constant.
    """
    import onnx

    producer = {name: node for node in graph.node for name in node.output}
    consumers = collections.defaultdict(list)
    for node in graph.node:
        for name in node.input:
            consumers[name].append(node)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in (*graph.input, *graph.value_info, *graph.output)
    }
    changed, shape_nodes = 0, []
    for node in graph.node:
        before = producer.get(node.input[0]) if node.op_type == "InstanceNormalization" else None
        followers = consumers[node.output[0]] if before is not None else []
        if before is None or before.op_type != "Reshape" or [one.op_type for one in followers] != ["Reshape"]:
            continue
        after, source = followers[0], before.input[0]
        shape_node = producer.get(after.input[1])
        grouped = constants.get(before.input[1])
        dims = shapes.get(source, ())
        if (
            shape_node is None
            or shape_node.op_type != "Shape"
            or shape_node.input[0] != source
            or grouped is None
            or len(dims) < 2
            or not dims[1].dim_value
        ):
            continue
        num_groups = int(onnx.numpy_helper.to_array(grouped)[1])
        tail = [0] * (len(dims) - 3)
        targets = ([0, num_groups, -1, *tail], [0, dims[1].dim_value, *([-1] if len(dims) > 2 else []), *tail])
        for reshape, target in zip((before, after), targets, strict=True):
            name = "shape_" + "_".join(map(str, target)).replace("-", "m")
            if name not in constants:
                tensor = onnx.numpy_helper.from_array(np.array(target, np.int64), name)
                graph.initializer.append(tensor)
                constants[name] = tensor
            reshape.input[1] = name
        shape_nodes.append(shape_node)
        changed += 1
    used = {name for node in graph.node for name in node.input}
    for node in shape_nodes:
        if not used & set(node.output) and node in graph.node:
            graph.node.remove(node)
    _drop_unused_constants(graph)
    return changed


def _drop_unused_constants(graph: Any) -> None:
    used = {name for node in nodes(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)


def name_after_modules(graph: Any, parameters: Iterable[str]) -> None:
    """Name every node `module.path/Operator`, and every folded constant after the node that reads it.

    Args:
        graph: an `onnx.GraphProto`, changed in place.
        parameters: initializer names that already say what they are.
    """
    taken: collections.Counter[str] = collections.Counter()
    for node in graph.node:
        scopes = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]")
        path = next((scope for scope in reversed(ast.literal_eval(scopes)[:-1]) if scope), "")
        name = f"{path}/{node.op_type}"
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"
    keep = {*parameters, *(tensor.name for tensor in graph.initializer if tensor.name.startswith("shape_"))}
    renamed: dict[str, str] = {}
    loose = {tensor.name for tensor in graph.initializer} - keep
    for node in graph.node:
        for slot, name in enumerate(node.input):
            if name in loose:
                renamed.setdefault(name, f"{node.name}:{slot}")
    for tensor in graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in nodes(graph):
        for slot, name in enumerate(node.input):
            node.input[slot] = renamed.get(name, name)


def name_axes(graph: Any, axes: list[dict[int, str]]) -> None:
    """Call the dynamic axes of the inputs by our names, and by the same names wherever else they occur.

    Args:
        graph: an `onnx.GraphProto`, changed in place.
        axes: for each input, axis number to name.

    Raises:
        ExportError: an axis that should be dynamic is fixed in the graph.
    """
    symbols: dict[str, str] = {}
    for value, wanted in zip(graph.input, axes, strict=True):
        for axis, name in wanted.items():
            dim = value.type.tensor_type.shape.dim[axis]
            if not dim.dim_param:
                raise ExportError(
                    f"the {name} axis was fixed by the exporter",
                    where=value.name,
                    expected="a symbol",
                    found=str(dim.dim_value),
                )
            symbols.setdefault(dim.dim_param, name)
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols) or r"(?!)")
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = pattern.sub(lambda found: symbols[found.group()], dim.dim_param)


def strip_traces(model: Any) -> None:
    """Remove stack traces, file paths and intermediate shapes: they differ between machines and are of no use."""
    graph = model.graph
    for holder in (*nodes(graph), *graph.input, *graph.output, *graph.initializer, graph):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del graph.value_info[:]


def check(model: Any, opset: int) -> Any:
    """Hold a finished model against what every runtime needs.

    Returns:
        the model with inferred intermediate shapes.

    Raises:
        ExportError: another opset than asked for, a node outside the standard operators, a GroupNormalization, or
            anything that onnx's checker or strict shape inference refuses.
    """
    import onnx

    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    foreign = sorted({f"{node.domain}::{node.op_type}" for node in nodes(model.graph) if node.domain})
    if foreign or model.functions:
        raise ExportError(
            "operators that only their author's runtime knows",
            expected="standard ONNX operators",
            found=", ".join(foreign or [function.name for function in model.functions]),
            fix="Replace the module that makes them by plain torch operators before the export.",
        )
    if found != {"ai.onnx": opset}:
        raise ExportError("wrong opset", expected=str(opset), found=str(found))
    if unsafe := [node.name for node in nodes(model.graph) if node.op_type == "GroupNormalization"]:
        raise ExportError(
            "GroupNormalization in the file: onnxruntime computes it as E[x²]-E[x]², which loses all digits",
            where=", ".join(unsafe[:5]),
            fix="Export with opset 18.",
        )
    try:
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise ExportError("onnx's own checker refuses the file", found=str(error)[:500]) from error
