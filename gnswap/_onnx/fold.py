"""Gives a norm's standardisation to the layer in front of it.

`scale * (W x + b) + shift = (scale W) x + (scale b + shift)` per output channel, which costs nothing at run time. It
holds whatever the layer's padding: zeros are padded on its input side, and the map acts on its output. Where another
node reads the same tensor, or the layer in front is of another kind, the standardisation stays in the norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gnswap._onnx.edit import Array, array_of, only_reader, replace_constant
from gnswap._onnx.norm import Norm, module_path


def fold(graph: Any, norms: Iterable[Norm], exact: Mapping[str, Array]) -> None:
    """Fold what can be folded; `scale` and `shift` of these norms become None and `folded` says where they went.

    Args:
        graph: an `onnx_ir.Graph`, changed in place.
        norms: of the graph.
        exact: initializers by name, as they were before a cast to a half type.
    """
    for norm in norms:
        layer = norm.x.producer()
        if (norm.scale is None and norm.shift is None) or layer is None or not only_reader(norm.x, norm.node):
            continue
        axis = _output_axis(layer)
        weight = _exact(layer.inputs[1], exact) if axis is not None else None
        has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
        bias = _exact(layer.inputs[2], exact) if has_bias else None
        if axis is None or weight is None or (has_bias and (bias is None or bias.shape != (norm.channels,))):
            continue
        scale = np.ones(norm.channels) if norm.scale is None else norm.scale
        shift = np.zeros(norm.channels) if norm.shift is None else norm.shift
        along = [1] * weight.ndim
        along[axis] = -1
        new_weight = weight.astype(np.float64) * scale.reshape(along)
        new_bias = shift if bias is None else bias.astype(np.float64) * scale + shift
        if not (_fits(new_weight, norm.dtype.numpy()) and _fits(new_bias, norm.dtype.numpy())):
            continue
        replace_constant(graph, layer, 1, new_weight)
        if norm.shift is not None or has_bias:
            replace_constant(graph, layer, 2, new_bias, like=1)
        norm.scale = norm.shift = None
        norm.folded = module_path(layer) or layer.name


def _exact(value: Any, exact: Mapping[str, Array]) -> Array | None:
    found = array_of(value)
    if found is None or value.name not in exact or exact[value.name].shape != found.shape:
        return found
    # a name may belong to another tensor of equal numbers, which the exporter has merged with this one
    return exact[value.name]


def _output_axis(layer: Any) -> int | None:
    """The axis of the weight that is the output's axis 1; None for a layer that cannot take a map of it."""
    if layer.domain or len(layer.inputs) < 2:
        return None
    if layer.op_type == "Conv":
        return 0
    if layer.op_type != "Gemm":
        return None
    attributes = layer.attributes
    unscaled = all(name not in attributes or attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    transposed = "transB" in attributes and attributes["transB"].as_int() == 1
    return (0 if transposed else 1) if unscaled else None


def _fits(values: Array, dtype: Any) -> bool:
    """Whether the numbers keep their digits in a dtype: no overflow, nothing that counts lost below the smallest."""
    rounded = values.astype(dtype).astype(np.float64)
    scale = np.abs(values).max(initial=0.0)
    return bool(np.isfinite(rounded).all()) and float(np.abs(rounded - values).max(initial=0.0)) <= scale * 2.0**-8
