"""Gives a norm's standardisation to the layer in front of it, and its gamma and beta to the layer behind.

In front: `scale * (W x + b) + shift = (scale W) x + (scale b + shift)` per output channel, which costs nothing at run
time. It holds whatever the layer's padding: zeros are padded on its input side, and the map acts on its output.
Behind: `W (gamma x + beta) + b = (W gamma) x + (W beta + b)` per input channel. It holds where nothing stands between
(no activation, no sum) and the layer pads nothing: a padded zero is not gamma * 0 + beta.

Where another node reads the same tensor, or the layer is of another kind, all stays in the norm.
Behind, it spares convnext-style networks a pass over x in every block; elsewhere it is one norm in twenty. What that
gains is small: convnext_atto at batch 8, 2 threads: 98.5 ms with it and 99.2 ms without (medians of 11 rounds in turn;
the fastest runs 85.6 and 89.7), which is within the noise of the machine; batch 1: nothing to see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from gnswap._onnx.edit import Array, array_of, only_reader, replace_constant
from gnswap._onnx.norm import Norm, module_path

Exact = dict[str, Array]
"""Initializers by name, as they were before a cast to a half type; the folds keep it up to date."""


def fold(graph: Any, norms: Iterable[Norm], exact: Exact) -> None:
    """Fold what can be folded; what went away is None in the norm, and `folded` and `behind` say where it went.

    Args:
        graph: an `onnx_ir.Graph`, changed in place.
        norms: of the graph.
        exact: the numbers that are folded into; of a network without half types, nothing.
    """
    for norm in norms:
        layer = norm.x.producer()
        if (norm.scale is not None or norm.shift is not None) and layer is not None:
            _into_front(graph, norm, layer, exact)
        readers = {user for user, _ in norm.y.uses()}
        if (norm.weight is not None or norm.bias is not None) and len(readers) == 1:
            _into_behind(graph, norm, readers.pop(), exact)


def _into_front(graph: Any, norm: Norm, layer: Any, exact: Exact) -> None:
    axis = _output_axis(layer)
    if axis is None or not only_reader(norm.x, norm.node):
        return
    numbers = _numbers(layer, norm.channels, exact)
    if numbers is None:
        return
    weight, bias = numbers
    scale, shift = _map(norm.scale, norm.shift, norm.channels)
    along = [1] * weight.ndim
    along[axis] = -1
    new_bias = shift if bias is None else bias * scale + shift
    if _replaced(graph, norm, layer, weight * scale.reshape(along), new_bias, exact):
        norm.scale = norm.shift = None
        norm.folded = module_path(layer) or layer.name


def _into_behind(graph: Any, norm: Norm, layer: Any, exact: Exact) -> None:
    axis = _output_axis(layer)
    if axis is None or layer.inputs[0] is not norm.y or not only_reader(norm.y, layer) or not _takes_whole(layer):
        return
    shape = layer.inputs[1].shape
    numbers = _numbers(layer, int(shape[axis]), exact)
    if numbers is None:
        return
    weight, bias = numbers
    rows = weight if axis == 0 else weight.T
    gamma, beta = _map(norm.weight, norm.bias, norm.channels)
    groups = norm.channels // rows.shape[1]
    # input channels of each output channel, with ones for the kernel's axes
    each = (len(rows), -1, *[1] * (rows.ndim - 2))
    gamma, beta = (np.repeat(one.reshape(groups, -1), len(rows) // groups, 0).reshape(each) for one in (gamma, beta))
    term = (rows * beta).reshape(len(rows), -1).sum(1)
    new = rows * gamma
    if _replaced(graph, norm, layer, new if axis == 0 else new.T, term if bias is None else bias + term, exact):
        norm.weight = norm.bias = None
        norm.behind = module_path(layer) or layer.name


def _map(factor: Array | None, term: Array | None, channels: int) -> tuple[Array, Array]:
    return (np.ones(channels) if factor is None else factor, np.zeros(channels) if term is None else term)


def _numbers(layer: Any, channels: int, exact: Exact) -> tuple[Array, Array | None] | None:
    """Weight and bias (None: it has none) in fp64; None where they are computed, or of an unusual shape."""
    weight, bias = _exact(layer.inputs[1], exact), None
    if len(layer.inputs) > 2 and layer.inputs[2] is not None:
        bias = _exact(layer.inputs[2], exact)
        if bias is None or bias.shape != (channels,):
            return None
    if weight is None:
        return None
    return weight.astype(np.float64), None if bias is None else bias.astype(np.float64)


def _exact(value: Any, exact: Exact) -> Array | None:
    found = array_of(value)
    if found is None or value.name not in exact or exact[value.name].shape != found.shape:
        return found
    # a name may belong to another tensor of equal numbers, which the exporter has merged with this one
    return exact[value.name]


def _replaced(graph: Any, norm: Norm, layer: Any, weight: Array, bias: Array, exact: Exact) -> bool:
    """Give the layer other numbers, where the file's dtype holds them; a bias that it lacks only where it needs one."""
    dtype = norm.dtype.numpy()
    if not (_fits(weight, dtype) and _fits(bias, dtype)):
        return False
    has_bias = len(layer.inputs) > 2 and layer.inputs[2] is not None
    for slot, values in ((1, weight), (2, bias)):
        if slot == 1 or has_bias or values.any():
            known = slot < len(layer.inputs) and layer.inputs[slot] is not None and layer.inputs[slot].name in exact
            replace_constant(graph, layer, slot, values, like=1)
            if known:
                exact[layer.inputs[slot].name] = values
    return True


def _output_axis(layer: Any) -> int | None:
    """The axis of the weight that is the output's axis 1; None for a layer that cannot take a map of it."""
    if layer.domain or len(layer.inputs) < 2 or layer.inputs[1] is None or layer.inputs[1].shape is None:
        return None
    if layer.op_type == "Conv":
        return 0
    if layer.op_type != "Gemm":
        return None
    attributes = layer.attributes
    unscaled = all(name not in attributes or attributes[name].as_float() == 1.0 for name in ("alpha", "beta"))
    transposed = "transB" in attributes and attributes["transB"].as_int() == 1
    return (0 if transposed else 1) if unscaled else None


def _takes_whole(layer: Any) -> bool:
    """Whether every number that the layer reads is one of its input: it pads nothing, and transposes nothing."""
    attributes = layer.attributes
    if layer.op_type == "Gemm":
        return "transA" not in attributes or attributes["transA"].as_int() == 0
    pads = "pads" in attributes and any(attributes["pads"].as_ints())
    return not pads and ("auto_pad" not in attributes or attributes["auto_pad"].as_string() in ("NOTSET", "VALID"))


def _fits(values: Array, dtype: Any) -> bool:
    """Whether the numbers keep their digits in a dtype: no overflow, nothing that counts lost below the smallest."""
    rounded = values.astype(dtype).astype(np.float64)
    scale = np.abs(values).max(initial=0.0)
    return bool(np.isfinite(rounded).all()) and float(np.abs(rounded - values).max(initial=0.0)) <= scale * 2.0**-8
