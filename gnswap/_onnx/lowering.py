"""What a lowering is, and the pieces that several of them are made of.

A lowering is a form (which operators compute (x-m)/sqrt(v+eps) over the groups) and an affine map of the channels
(which operator multiplies by gamma and adds beta, and does the same for a standardisation that no neighbour took).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from gnswap._onnx.edit import Array
from gnswap._onnx.norm import Norm, Writer

Statistics = Callable[[Writer, Any], tuple[Any, Any]]
Affine = Callable[[Writer, Any, Array, Array, str], Any]
Form = Callable[[Writer, Any, Affine], Any]


@dataclasses.dataclass(frozen=True)
class Lowering:
    """One way to write a norm whose groups lie side by side.

    Attributes:
        name: in reports.
        form: `(writer, x, affine) -> y`, for a standardised x.
        affine: `(writer, x, factor, term, name) -> y`, per channel.
        shape_nodes: whether it reads sizes at run time where height or width is dynamic.
        half_casts: whether it casts half types to fp32 and back.
        ranks: numbers of axes of x that it can be used for.
    """

    name: str
    form: Form
    affine: Affine
    shape_nodes: bool = False
    half_casts: bool = False
    ranks: tuple[int, ...] = (2, 3, 4, 5)

    def write(self, writer: Writer, x: Any) -> Any:
        """Write the nodes; returns `y`, of the shape of x."""
        norm = writer.norm
        return self.form(writer, mapped(self.affine, writer, x, norm.scale, norm.shift, "standardisation"), self.affine)


def side_by_side(statistics: Statistics) -> Form:
    """The form that normalises a view of x whose groups are one axis.

    Args:
        statistics: `(writer, view) -> (view, spread)`, normalises `[N, G, D*H, W]` over all axes after G. The spread,
            `[N, G, 1, 1]`, is what the view is still to be divided by; None where nothing is left to do.
    """

    def form(writer: Writer, x: Any, affine: Affine) -> Any:
        norm = writer.norm
        x = gathered(writer, x, norm.gather_before)
        view, spread = statistics(writer, _grouped(writer, x))
        normalised = gathered(writer, _ungrouped(writer, view), norm.gather_behind)
        if spread is None:
            return mapped(affine, writer, normalised, norm.weight, norm.bias, "affine")
        y = writer.op("Mul", normalised, _gain(writer, spread))
        return mapped(affine, writer, y, None, norm.bias, "affine")

    return form


def gathered(writer: Writer, x: Any, indices: Array | None) -> Any:
    """x with its channels at other places; x itself where there are no indices."""
    import onnx_ir as ir

    if indices is None:
        return x
    return writer.op("Gather", x, writer.constant("channel_order", indices, ir.DataType.INT64), axis=1)


def _grouped(writer: Writer, x: Any) -> Any:
    """`[N, C, H, W]` as `[N, G, D*H, W]`: a 0 copies the axis, so one constant target serves every N, H and W."""
    norm = writer.norm
    height = x.shape[2] if norm.rank > 2 else 1
    depth = norm.channels_per_group * height if isinstance(height, int) else None
    shape = [x.shape[0], norm.num_groups, depth, *x.shape[3:]]
    return writer.op("Reshape", x, writer.shape(0, norm.num_groups, -1, *[0] * (norm.rank - 3)), shape=shape)


def _ungrouped(writer: Writer, view: Any) -> Any:
    norm = writer.norm
    tail = [-1, *[0] * (norm.rank - 3)] if norm.rank > 2 else []
    return writer.op("Reshape", view, writer.shape(0, norm.channels, *tail))


def _gain(writer: Writer, spread: Any) -> Any:
    """`gamma / spread` of every channel, `[N, C, 1, 1]`, in the order of y: the division then costs no pass over x."""
    norm = writer.norm
    weight = working_weight(norm)
    grouped = [norm.num_groups, norm.channels_per_group, *[1] * (len(spread.shape) - 3)]
    gain = writer.op("Div", writer.constant("affine.weight", weight.reshape(grouped)), spread, shape=[None, *grouped])
    channels = [norm.channels, *[1] * (norm.rank - 2)]
    gain = writer.op("Reshape", gain, writer.shape(0, *channels), shape=[None, *channels])
    return gathered(writer, gain, norm.gather_behind)


def working_weight(norm: Norm) -> Array:
    """gamma in the order of the statistics, 1 where there is none."""
    return working_order(norm, np.ones(norm.channels) if norm.weight is None else norm.weight)


def working_order(norm: Norm, vector: Array) -> Array:
    """A `[C]` vector in the order of y, in that of the statistics."""
    return vector if norm.gather_behind is None else vector[np.argsort(norm.gather_behind)]


def mapped(affine: Affine, writer: Writer, x: Any, factor: Array | None, term: Array | None, name: str) -> Any:
    """`factor * x + term`; x itself where that changes nothing."""
    channels = writer.norm.channels
    factor = np.ones(channels) if factor is None else factor
    term = np.zeros(channels) if term is None else term
    return x if (factor == 1).all() and not term.any() else affine(writer, x, factor, term, name)


def multiply_add(writer: Writer, x: Any, factor: Array, term: Array, name: str) -> Any:
    """Mul and Add with `[C, 1, 1]`: every runtime has them, for every dtype and rank."""
    per_channel = (-1, *[1] * (writer.norm.rank - 2))
    if not (factor == 1).all():
        x = writer.op("Mul", x, writer.constant(f"{name}.weight", factor.reshape(per_channel)))
    if term.any():
        x = writer.op("Add", x, writer.constant(f"{name}.bias", term.reshape(per_channel)))
    return x


def batch_norm(writer: Writer, x: Any, factor: Array, term: Array, name: str) -> Any:
    """A BatchNormalization with mean 0, variance 1 and epsilon 0: one pass over x in place of two."""
    vectors = {"weight": factor, "bias": term, "mean": np.zeros_like(term), "var": np.ones_like(term)}
    constants = [writer.constant(f"{name}.{key}", vector) for key, vector in vectors.items()]
    return writer.op("BatchNormalization", x, *constants, epsilon=0.0)


def depthwise_conv(writer: Writer, x: Any, factor: Array, term: Array, name: str) -> Any:
    """A depthwise 1x1 Conv: onnxruntime's CPU provider runs it in the convs' blocked layout and fuses what follows."""
    norm = writer.norm
    ones = [1] * (norm.rank - 2)
    weight = writer.constant(f"{name}.weight", factor.reshape(-1, 1, *ones))
    bias = writer.constant(f"{name}.bias", term)
    return writer.op("Conv", x, weight, bias, group=norm.channels, kernel_shape=ones)
