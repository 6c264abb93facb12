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


def take_over(old: Any, new: Any) -> None:
    """Let everything that reads one value read another one; a graph's output keeps the name that users know it by."""
    if old.is_graph_output():
        old.name, new.name = new.name, old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def gather_behind(graph: Any, node: Any, indices: Array) -> Any:
    """`y[:, indices]` in the place of a node's output `y`; returns the new value."""
    import onnx_ir as ir

    y = node.outputs[0]
    order = constant(graph, f"{y.name}.channel_order", indices, ir.DataType.INT64)
    output = ir.Value(name=f"{y.name}.ordered", type=y.type, shape=y.shape)
    take_over(y, output)
    graph.insert_after(
        node, ir.node("Gather", [y, order], {"axis": 1}, outputs=[output], metadata_props=dict(node.metadata_props))
    )
    return output
