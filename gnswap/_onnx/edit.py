"""Small edits of a graph that several passes need."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def array_of(value: Any) -> Array | None:
    """The numbers of a constant; None where the value is computed."""
    if value is None or value.const_value is None:
        return None
    array: Array = value.const_value.numpy()
    return array


def only_reader(value: Any, node: Any) -> bool:
    """Whether nothing but this node sees the value."""
    return not value.is_graph_output() and all(user is node for user, _ in value.uses())


def constant(graph: Any, name: str, values: Any, dtype: Any) -> Any:
    """A new initializer; a number is appended to a name that is taken."""
    import onnx_ir as ir

    unique, number = name, 1
    while unique in graph.initializers:
        number += 1
        unique = f"{name}_{number}"
    array = np.ascontiguousarray(np.asarray(values).astype(dtype.numpy()))
    value = ir.Value(
        name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=ir.tensor(array, name=unique)
    )
    graph.register_initializer(value)
    return value


def replace_constant(graph: Any, node: Any, slot: int, values: Array, *, like: int | None = None) -> None:
    """Give a node another constant in one of its input slots; other readers of the old one keep that.

    Args:
        graph: of the node.
        node: whose input is replaced.
        slot: which input; one that is missing is added.
        values: the numbers, cast to the dtype of the old constant.
        like: the slot with the dtype to use where there is no old constant.
    """
    old = node.inputs[slot] if slot < len(node.inputs) else None
    source = old if old is not None else node.inputs[slot if like is None else like]
    if old is not None:
        name = old.name
        node.replace_input_with(slot, None)
        if not old.uses() and not old.is_graph_output():
            del graph.initializers[old.name]
    else:
        name = source.name.removesuffix(".weight") + ".bias"
        if slot >= len(node.inputs):
            node.resize_inputs(slot + 1)
    node.replace_input_with(slot, constant(graph, name, values, source.dtype))


def remove_unused(graph: Any) -> None:
    """Drop the initializers that nothing reads."""
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def gather(graph: Any, node: Any, x: Any, indices: Array, name: str, *, behind: bool = False) -> Any:
    """`x[:, indices]`: in front of a node, or behind it and in the place of its output `x`; returns the new value."""
    import onnx_ir as ir

    order = constant(graph, f"{name}.channel_order" if name else "channel_order", indices, ir.DataType.INT64)
    output = ir.Value(name=f"{x.name}.{order.name}", type=x.type, shape=x.shape)
    if behind:
        if x.is_graph_output():  # the name of an output is what users know it by
            x.name, output.name = output.name, x.name
        x.replace_all_uses_with(output, replace_graph_outputs=True)
    mover = ir.node("Gather", [x, order], {"axis": 1}, outputs=[output], metadata_props=dict(node.metadata_props))
    (graph.insert_after if behind else graph.insert_before)(node, mover)
    return output
