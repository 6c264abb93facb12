"""Channel orders without moving channels: the neighbours' weights are permuted instead.

A norm whose groups are `order[gD : (g+1)D]` needs these channels side by side. What lies before and after a layer with
its own weights (a Conv, a Gemm) may be stored in any order: its rows and columns are permuted once, here. Everything
that treats channels one by one (activations, depthwise convs, pooling, additions, concatenations) passes an order on.

Values that must have one order are one *segment*. Each norm in turn gives its order to the segments before and behind
it where these are free; where they are not (a graph's output, an operator that is not known here, a residual sum that
an earlier norm has given its order), one Gather moves the channels, at the side where it is needed and next to the
statistics, so that what runtimes fuse before and behind the norm stays together.
Why no form that takes statistics of any channels: its small nodes take longer than a Gather, 7 microseconds for 384
channels at 7x7 (`_onnx.lowerings.by_channel`), and moments mixed by two MatMuls lose digits where a mean is large (5e-4
at 30 standard deviations).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gnswap._onnx.edit import Array, array_of, gather_behind, replace_constant
from gnswap._onnx.norm import Norm

_ONE_BY_ONE = frozenset(
    {"Abs", "AveragePool", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "GlobalAveragePool", "GlobalMaxPool"}
    | {"HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "MaxPool", "Mish", "Neg", "Reciprocal", "Relu"}
    | {"Round", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Tanh"}
)
_PAIRWISE = frozenset({"Add", "Div", "Max", "Min", "Mul", "Pow", "Sub"})
_REDUCTIONS = frozenset({"ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"})


class _Segments:
    """Values that share one order of channels: a union-find, with the order of each segment once it has one.

    An order is an int64 array: entry i is the natural channel stored at place i.
    """

    def __init__(self) -> None:
        self._parent: dict[Any, Any] = {}
        self._order: dict[Any, Array | None] = {}

    def root(self, value: Any) -> Any:
        self._parent.setdefault(value, value)
        while self._parent[value] is not value:
            value = self._parent[value]
        return value

    def join(self, *values: Any) -> None:
        first = self.root(values[0])
        for value in values[1:]:
            if (other := self.root(value)) is not first:
                self._parent[other] = first
                if other in self._order:  # whatever is pinned stays pinned
                    self._order[first] = self._order.pop(other)

    def pin(self, value: Any) -> None:
        """Keep the natural order."""
        self._order[self.root(value)] = None

    def free(self, value: Any) -> bool:
        return self.root(value) not in self._order

    def give(self, value: Any, order: Array | None) -> None:
        self._order[self.root(value)] = order

    def order(self, value: Any, channels: int) -> Array:
        order = self._order.get(self.root(value))
        return np.arange(channels) if order is None else order


def settle(graph: Any, norms: Iterable[Norm]) -> None:
    """Bring every norm's groups side by side: `order` is None afterwards; what is left at run time
    stands in `gather_before` and `gather_behind`."""
    norms = list(norms)
    if all(norm.order is None for norm in norms):
        return
    segments, by_node = _Segments(), {norm.node: norm for norm in norms}
    for node in graph:
        if node not in by_node:
            _connect(segments, node)
    for value in (*graph.inputs, *graph.outputs, *_read_in_subgraphs(graph)):
        segments.pin(value)
    movers: set[Any] = set()  # what they read and write has its order already
    for node in list(graph):
        if node in by_node:
            _settle_norm(segments, by_node[node])
        elif _is_channel_concat(node):
            movers.add(_settle_concat(graph, segments, node))
    for node in list(graph):
        if node not in by_node and node not in movers:
            _permute(graph, segments, node)


# which values share an order


def _read_in_subgraphs(graph: Any) -> Iterator[Any]:
    for node in graph:
        for value in node.outputs:
            if any(user.graph is not graph for user in value.consumers()):
                yield value


def _connect(segments: _Segments, node: Any) -> None:
    values = [value for value in (*node.inputs, *node.outputs) if _has_channels(value)]
    if not node.domain and node.op_type == "Shape":
        return  # the number of channels is the same in any order
    if _takes_any_order(node):
        return
    if _passes_on(node):
        if values:
            segments.join(*values)
        return
    for value in values:
        segments.pin(value)


def _takes_any_order(node: Any) -> bool:
    """Layers with weights of their own, and concatenations, which put orders one behind the other."""
    if node.domain:
        return False
    if node.op_type == "Conv":
        constant = array_of(node.inputs[1]) is not None
        return (
            constant and _groups(node) == 1 and all(array_of(b) is not None for b in node.inputs[2:] if b is not None)
        )
    if node.op_type == "Gemm":
        plain = "transA" not in node.attributes or node.attributes["transA"].as_int() == 0
        constants = [array_of(value) for value in node.inputs[1:] if value is not None]
        return plain and all(one is not None and (one.ndim == 1 or one is constants[0]) for one in constants)
    return _is_channel_concat(node)


def _is_channel_concat(node: Any) -> bool:
    return (
        not node.domain
        and node.op_type == "Concat"
        and node.attributes["axis"].as_int() == 1
        and all(_has_channels(value) for value in node.inputs)
    )


def _passes_on(node: Any) -> bool:
    """Whether channel c of the output depends on channel c of the inputs only, with constants we can permute."""
    if node.domain or (len(node.outputs) != 1 and node.op_type != "MaxPool"):
        return False
    y, x = node.outputs[0], node.inputs[0]
    kind = node.op_type
    if any(value is not None and value.shape is None for value in (*node.inputs, y)):
        return False  # what is behind it would not know of the order
    if kind in _ONE_BY_ONE:
        # Clip and the like have further inputs, which are single numbers
        return _has_channels(x) and all(_is_number(value) for value in node.inputs[1:] if value is not None)
    if kind in _PAIRWISE:
        tensors = [value for value in node.inputs if not _is_number(value)]
        return _has_channels(y) and all(
            _channel_axis(value, y) is not None or _is_spread(value, y) for value in tensors
        )
    if kind in _REDUCTIONS:
        axes = array_of(node.inputs[1]) if len(node.inputs) > 1 else None
        rank = len(x.shape) if _has_channels(x) else 0
        return axes is not None and rank > 2 and all(axis % rank > 1 for axis in axes.tolist())
    if kind in ("Flatten", "Reshape", "Squeeze"):
        return (
            _has_channels(x)
            and _has_channels(y)
            and len(y.shape) == 2
            and y.shape[1] == x.shape[1]
            and all(size == 1 for size in x.shape[2:])
            and (kind != "Flatten" or "axis" not in node.attributes or node.attributes["axis"].as_int() == 1)
        )
    if kind == "Pad":
        pads = array_of(node.inputs[1])
        # in front of all axes, then behind all: the first two of each half are N and C
        return pads is not None and len(node.inputs) < 4 and not pads.reshape(2, -1)[:, :2].any()
    if kind == "BatchNormalization":
        return all(array_of(value) is not None for value in node.inputs[1:])
    return kind == "Conv" and _is_depthwise(node)


def _is_depthwise(node: Any) -> bool:
    weight = array_of(node.inputs[1])
    biases = [array_of(value) for value in node.inputs[2:] if value is not None]
    # as many groups as outputs may still read several inputs each
    one_each = weight is not None and weight.shape[1] == 1 and _groups(node) == weight.shape[0]
    return one_each and all(bias is not None for bias in biases)


def _groups(node: Any) -> int:
    return node.attributes["group"].as_int() if "group" in node.attributes else 1


def _has_channels(value: Any) -> bool:
    """A computed tensor with a known number of channels on axis 1."""
    return (
        value is not None
        and value.const_value is None
        and value.shape is not None
        and len(value.shape) >= 2
        and isinstance(value.shape[1], int)
    )


def _is_number(value: Any) -> bool:
    return value.const_value is not None and value.const_value.size == 1


def _channel_axis(value: Any, y: Any) -> int | None:
    """The axis of an operand that lies along the channels of the result; None where it has none."""
    if value.shape is None:
        return None
    axis = len(value.shape) - (len(y.shape) - 1)
    if value.const_value is None and axis != 1:
        return None
    return axis if axis >= 0 and value.shape[axis] == y.shape[1] else None


def _is_spread(value: Any, y: Any) -> bool:
    """A constant with one number for all channels, such as `[1, 1, 1]` or one for each position."""
    axis = len(value.shape) - (len(y.shape) - 1)
    return value.const_value is not None and (axis < 0 or value.shape[axis] == 1)


# which order each segment gets


def _settle_norm(segments: _Segments, norm: Norm) -> None:
    channels, size = norm.channels, norm.channels_per_group
    wanted = np.arange(channels) if norm.order is None else np.asarray(norm.order, np.int64)
    if segments.free(norm.x):
        behind = segments.order(norm.y, channels)
        keeps = not segments.free(norm.y) and _same_groups(wanted, behind, size)
        segments.give(norm.x, behind if keeps else wanted)
    stored = working = segments.order(norm.x, channels)
    if not _same_groups(wanted, stored, size):
        working = wanted
    if segments.free(norm.y):
        segments.give(norm.y, working)
    given = segments.order(norm.y, channels)
    norm.gather_before, norm.gather_behind = _moves(stored, working), _moves(working, given)
    norm.layout = None if (given == np.arange(channels)).all() else given
    for names, place in ((("scale", "shift"), stored), (("weight", "bias"), given)):
        for name in names:
            if (vector := getattr(norm, name)) is not None:
                setattr(norm, name, vector[place])
    norm.order = None


def _moves(stored: Array, wanted: Array) -> Array | None:
    """Indices that bring channels from one order to another; None where they are the same."""
    moves: Array = np.argsort(stored)[wanted]
    return None if (stored == wanted).all() else moves


def _settle_concat(graph: Any, segments: _Segments, node: Any) -> Any:
    """Put the inputs' orders one behind the other; returns the Gather that is needed where readers want another one."""
    parts, start = [], 0
    for value in node.inputs:
        channels = value.shape[1]
        if segments.free(value):
            segments.pin(value)
        parts.append(segments.order(value, channels) + start)
        start += channels
    working, y = np.concatenate(parts), node.outputs[0]
    if segments.free(y):
        segments.give(y, working)
    moves = _moves(working, segments.order(y, start))
    if moves is None:
        return None
    moved = gather_behind(graph, node, moves)
    segments.join(y, moved)
    return moved.producer()


def _same_groups(wanted: Array, stored: Array, size: int) -> bool:
    """Whether every group of D channels in a row is the same set in both orders, whatever their order in it."""
    if size == len(wanted):
        return True
    groups = np.empty(len(wanted), np.int64)
    groups[wanted] = np.arange(len(wanted)) // size
    rows = groups[stored].reshape(-1, size)
    return bool((rows == rows[:, :1]).all())


# the weights that follow


def _permute(graph: Any, segments: _Segments, node: Any) -> None:
    for slot, axis, order in _wanted(segments, node):
        values = array_of(node.inputs[slot])
        if values is not None and not (order == np.arange(len(order))).all():
            replace_constant(graph, node, slot, np.take(values, order, axis))


def _wanted(segments: _Segments, node: Any) -> Iterator[tuple[int, int, Array]]:
    """(slot, axis, order) of every constant that has to follow."""
    y = node.outputs[0]
    if not _has_channels(y):
        return
    outputs = segments.order(y, y.shape[1])
    kind = node.op_type
    if kind in ("Conv", "Gemm") and _takes_any_order(node):
        transposed = kind == "Gemm" and not ("transB" in node.attributes and node.attributes["transB"].as_int())
        x = node.inputs[0]
        yield 1, 1 if transposed else 0, outputs
        yield 1, 0 if transposed else 1, segments.order(x, x.shape[1])
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            yield 2, 0, outputs
    elif not _passes_on(node):
        return
    elif kind in _PAIRWISE:
        for slot, value in enumerate(node.inputs):
            axis = _channel_axis(value, y) if value.const_value is not None and not _is_number(value) else None
            if axis is not None:
                yield slot, axis, outputs
    elif kind in ("Conv", "BatchNormalization"):
        for slot in range(1, len(node.inputs)):
            if node.inputs[slot] is not None:
                yield slot, 0, outputs
