"""A GroupNorm as one node of an ONNX graph, between torch's exporter and the lowerings.

Why a node of our own: what torch's exporter writes for a GroupNorm is already one form of it, from which the others can
only be guessed back. The node exists in memory only; a file with one in it does not pass the checks.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gnswap._onnx.edit import Array, array_of, constant

DOMAIN, OP_TYPE = "gnswap", "GroupNorm"
SCOPES = "pkg.torch.onnx.name_scopes"

_VECTORS = ("weight", "bias", "scale", "shift", "order")


@dataclasses.dataclass
class Norm:
    """One norm of a graph: `y = norm(scale * x + shift)[groups of order] * weight + bias`, as in `FusedGroupNorm`.

    The passes change it: they take away what they have put into the neighbours.

    Attributes:
        node: its node; input 0 and output 0 are `x` and `y`, `[N, C, ...]`.
        path: of the module it comes from.
        num_groups, channels, epsilon: G, C, and what is added to the variance.
        weight, bias, scale, shift: `[C]` in fp64, or None.
        order: int64 `[C]`, or None.
        folded: name of the layer that took scale and shift; None where nobody did.
        behind: name of the layer that took weight and bias; None where nobody did.
        ordered: whether there was an order.
        gather_before, gather_behind: indices by which channels are moved at run time, before and behind the
            statistics, or None.
        layout: the natural channel that is stored at each place of y, where that is not the natural order.
        example_row: how many numbers a group had in the example input; None where nobody said.
    """

    node: Any
    path: str
    num_groups: int
    channels: int
    epsilon: float
    weight: Array | None
    bias: Array | None
    scale: Array | None
    shift: Array | None
    order: Array | None
    folded: str | None = None
    behind: str | None = None
    ordered: bool = False
    gather_before: Array | None = None
    gather_behind: Array | None = None
    layout: Array | None = None
    example_row: int | None = None

    @property
    def x(self) -> Any:
        """The `onnx_ir.Value` that is normalised."""
        return self.node.inputs[0]

    @property
    def y(self) -> Any:
        """The `onnx_ir.Value` that comes out."""
        return self.node.outputs[0]

    @property
    def dtype(self) -> Any:
        """`onnx_ir.DataType` of x and y."""
        return self.x.dtype

    @property
    def rank(self) -> int:
        """Number of axes of x."""
        return len(self.x.shape)

    @property
    def sizes(self) -> tuple[int | str, ...]:
        """The axes after C: numbers, or the name of a dynamic axis."""
        return tuple(size if isinstance(size, int) else str(size.value) for size in self.x.shape[2:])

    @property
    def positions(self) -> int | None:
        """S, or None where an axis is dynamic."""
        total = 1
        for size in self.sizes:
            if not isinstance(size, int):
                return None
            total *= size
        return total

    @property
    def gathers(self) -> int:
        """How many times the channels are moved at run time."""
        return (self.gather_before is not None) + (self.gather_behind is not None)

    @property
    def rows(self) -> int:
        """How many groups a run normalises at least: N * G, with one sample where the batch is dynamic."""
        batch = self.x.shape[0]
        return self.num_groups * (batch if isinstance(batch, int) else 1)

    @property
    def row_length(self) -> int | None:
        """How many numbers a group has: D * S; where an axis is dynamic, in the example input."""
        return self.example_row if self.positions is None else self.channels_per_group * self.positions

    @property
    def channel_length(self) -> int | None:
        """S, how many numbers a channel has; where an axis is dynamic, in the example input."""
        return None if self.row_length is None else self.row_length // self.channels_per_group

    @property
    def is_half(self) -> bool:
        """Whether x is fp16 or bf16."""
        import onnx_ir as ir

        return self.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

    @property
    def channels_per_group(self) -> int:
        """D = C/G."""
        return self.channels // self.num_groups


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The `custom_translation_table` for `torch.onnx.export` that leaves every GroupNorm whole."""
    op = _op()

    # the exporter reads from the annotations what is an attribute
    def of_ours(
        x: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        act: str | None = None,
        residual: Any = None,
        channel_scale: Any = None,
        channel_shift: Any = None,
        channel_order: Any = None,
    ) -> Any:
        assert act is None  # `plain.PlainGroupNorm` leaves both to torch
        assert residual is None
        vectors = (weight, bias, channel_scale, channel_shift, channel_order)
        return op(x, *vectors, num_groups=num_groups, epsilon=eps)

    def of_torchs(
        x: Any,
        num_groups: int,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,  # noqa: ARG001
    ) -> Any:
        return op(x, weight, bias, num_groups=num_groups, epsilon=eps)[0]

    return {
        torch.ops.gnswap.group_norm.default: of_ours,
        torch.ops.aten.group_norm.default: of_torchs,
    }


@functools.cache
def _op() -> Any:
    import onnx
    from onnxscript import values

    kind = onnx.defs.OpSchema
    optional = kind.FormalParameterOption.Optional
    schema = kind(
        OP_TYPE,
        DOMAIN,
        1,
        inputs=[
            kind.FormalParameter("x", "T"),
            *(kind.FormalParameter(name, "T", param_option=optional) for name in _VECTORS[:-1]),
            kind.FormalParameter("order", "tensor(int64)", param_option=optional),
        ],
        outputs=[
            kind.FormalParameter("y", "T"),
            *(kind.FormalParameter(name, "U", param_option=optional) for name in ("mean", "rstd")),
        ],
        type_constraints=[
            (name, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "") for name in "TU"
        ],
        attributes=[
            kind.Attribute("num_groups", kind.AttrType.INT, required=True),
            kind.Attribute("epsilon", kind.AttrType.FLOAT, required=True),
        ],
    )
    return values.Op(values.Opset(DOMAIN, 1), OP_TYPE, schema)


def find(graph: Any) -> list[Norm]:
    """The norms of an `onnx_ir.Graph`, in the order in which they run."""
    return [_read(node) for node in graph if node.domain == DOMAIN and node.op_type == OP_TYPE]


def example_rows(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How many numbers a group has in the example input: by module path, the most of a module that runs twice."""
    kinds = (torch.ops.gnswap.group_norm.default, torch.ops.aten.group_norm.default)
    rows: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.target in kinds:
            stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
            path = stack[-1] if stack else ""
            rows[path] = max(_numbers(node.args[0].meta["val"]) // int(node.args[1]), rows.get(path, 0))
    return rows


def _numbers(x: torch.Tensor) -> int:
    """Of one sample; a dynamic size counts as in the example."""
    numbers = 1
    for size in x.shape[1:]:
        symbol: Any = getattr(size, "node", None)
        numbers *= size if symbol is None else symbol.hint
    return numbers


def _read(node: Any) -> Norm:
    vectors: dict[str, Array | None] = dict.fromkeys(_VECTORS)
    for name, value in zip(_VECTORS, node.inputs[1:], strict=False):
        if value is not None:
            vectors[name] = np.asarray(array_of(value), np.int64 if name == "order" else np.float64)
    return Norm(
        node=node,
        path=module_path(node),
        num_groups=node.attributes["num_groups"].as_int(),
        channels=int(node.inputs[0].shape[1]),
        epsilon=node.attributes["epsilon"].as_float(),
        weight=vectors["weight"],
        bias=vectors["bias"],
        scale=vectors["scale"],
        shift=vectors["shift"],
        order=vectors["order"],
        ordered=vectors["order"] is not None,
    )


def module_path(node: Any) -> str:
    """Path of the innermost module that a node comes from; "" for the root."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    return next((scope for scope in reversed(scopes[:-1]) if scope), "")


class Writer:
    """Writes the nodes that take a norm's place, in front of it.

    Args:
        graph: the `onnx_ir.Graph`.
        norm: whose place is taken; the nodes carry its module path.
        cache: values that the norms of a graph share, by a key that says what they are.
    """

    def __init__(self, graph: Any, norm: Norm, cache: dict[Any, Any]) -> None:
        self.graph, self.norm, self.cache, self._count = graph, norm, cache, 0

    def op(
        self, op_type: str, *inputs: Any, shape: Sequence[Any] | None = None, dtype: Any = None, **attributes: Any
    ) -> Any:
        """One node; returns its output. `shape` and `dtype` are those of x where they are not given."""
        return self.several(op_type, *inputs, shapes=[shape], dtype=dtype, **attributes)[0]

    def several(
        self, op_type: str, *inputs: Any, shapes: Sequence[Sequence[Any] | None], dtype: Any = None, **attributes: Any
    ) -> list[Any]:
        """One node with as many outputs as there are shapes."""
        import onnx_ir as ir

        x = self.norm.x
        outputs = [
            ir.Value(
                type=ir.TensorType(dtype or x.dtype),
                shape=x.shape if shape is None else ir.Shape(shape),
                name=f"{self.norm.y.name}.{self._count + index}",
            )
            for index, shape in enumerate(shapes)
        ]
        self._count += len(outputs)
        node = ir.node(
            op_type, list(inputs), attributes, outputs=outputs, metadata_props=dict(self.norm.node.metadata_props)
        )
        self.graph.insert_before(self.norm.node, node)
        return outputs

    def constant(self, name: str, values: Any, dtype: Any = None) -> Any:
        """An initializer `PATH.name` in the dtype of x, or another one."""
        path = self.norm.path
        return constant(self.graph, f"{path}.{name}" if path else name, values, dtype or self.norm.dtype)

    def shared(self, name: str, values: Any, dtype: Any) -> Any:
        """An initializer that other norms may use as well; `name` and the number of entries say what is in it."""
        import onnx_ir as ir

        key = (name, len(values), dtype)
        if key not in self.cache:
            label = f"{name}_{len(values)}" + ("" if dtype == ir.DataType.FLOAT else f"_{dtype.name.lower()}")
            self.cache[key] = constant(self.graph, label, values, dtype)
        return self.cache[key]

    def axes(self, axis: int) -> Any:
        """One axis, as a reduction takes it."""
        import onnx_ir as ir

        return self.shared(f"axis_{axis}", np.array([axis]), ir.DataType.INT64)

    def shape(self, *sizes: int) -> Any:
        """The target of a Reshape."""
        import onnx_ir as ir

        if sizes not in self.cache:
            name = "shape_" + "_".join(map(str, sizes)).replace("-", "m")
            self.cache[sizes] = constant(self.graph, name, sizes, ir.DataType.INT64)
        return self.cache[sizes]
