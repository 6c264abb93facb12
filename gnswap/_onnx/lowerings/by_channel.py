r"""LayerNormalization over each channel, whose mean and spread give those of the groups, then one more affine map.

.. math:: \hat x_c = \frac{x_c - m_c}{\sigma_c}, \quad \sigma_c^2 = v_c + \epsilon, \quad
          m_g = \mathrm{mean}_c(m_c), \quad \sigma_g^2 = \mathrm{mean}_c\big(\sigma_c^2 + (m_c - m_g)^2\big), \quad
          y = \gamma \frac{\sigma_c}{\sigma_g} \hat x_c + \gamma \frac{m_c - m_g}{\sigma_g} + \beta

m_c and 1/sigma_c are the optional outputs of LayerNormalization, and the mean over the channels of a group is that over
all its numbers, since all channels have as many. What follows from them is computed on `[N, C]` numbers.

Exactness, largest error over largest output, 32 channels at 112x112, by the mean in standard deviations, and where
three quarters of every channel are one number, as behind an object on black (torch's own CPU GroupNorm is at 1e-7
throughout):

    mean               0        30      1000     3/4 flat
    by_channel   1.1e-07   1.6e-07   9.9e-07      2.5e-07
    two_step     1.9e-07   5.8e-06   1.4e-04      3.5e-07
    layer_norm   2.8e-06   2.8e-06   3.7e-06      8.8e-06

onnxruntime's CPU kernels add a row up from its first number to its last, and what is rounded away grows with the row;
here a row is one channel. What it gets wrong about a channel is in the numbers that it hands out too, so it cancels in
y, but for sigma_g, where the channels' errors average out. On flat images they all have the same sign: 8 channels at
362x362, 3/4 flat, are off by 1.3e-05, where two_step stays at 4e-07 and layer_norm is at 3e-04.

The last map is Mul and Add, which use all threads, or a BatchNormalization of N*C channels with statistics 0 and 1:
one pass, on one thread.

Chosen on the CPU for groups of over 2^17 numbers (where sizes are dynamic, in the example input), up to as many in a
channel. Time of whole networks with mean and variance axis by axis from 2^18 on (`two_step` and a depthwise conv), over
that with this form, batch 1 / 8: EfficientNet-Lite0 1.06 / 1.13, mobilenetv2 1.07 / 1.16, resnet50 1.02 / 1.06,
mobilenetv3 1.03 / 1.07 with two threads; EfficientNet-Lite0 1.07 / 1.12 with one. For shorter groups it is faster than
`layer_norm_conv` at batch 8 too (maps of 56x56: 1.03) and slower at batch 1 (0.97), where a dozen small nodes cost more
than they save: from 2^17 on in place of 2^18 it costs networks of the MobileNet kind 1 % at batch 1 and nothing at 8,
from 2^16 on 5 % and 4 %. EfficientNet-Lite0's worst error on flat images is 2e-04, 3e-05 and 8e-06 then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from gnswap._onnx.lowering import (
    Affine,
    Form,
    Lowering,
    batch_norm,
    gathered,
    multiply_add,
    working_order,
    working_weight,
)
from gnswap._onnx.lowerings.layer_norm import unit_scale
from gnswap._onnx.norm import Writer


def form(finish: Callable[[Writer, Any, Any, Any], Any]) -> Form:
    """The form with `finish(writer, x, factor, term)` as its last map: factor and term are `[N, C, 1, 1]`."""

    def write(writer: Writer, x: Any, _affine: Affine) -> Any:
        norm = writer.norm
        x = gathered(writer, x, norm.gather_before)
        channels = [x.shape[0], norm.channels, *[1] * (norm.rank - 2)]
        scale = unit_scale(writer, x, 1)
        shapes = [x.shape, channels, channels]
        x, mean, inverse = writer.several("LayerNormalization", x, scale, axis=2, epsilon=norm.epsilon, shapes=shapes)
        factor, term = _map_of(writer, _grouped(writer, mean), _grouped(writer, inverse))
        back = writer.shape(0, *channels[1:])
        factor, term = (writer.op("Reshape", value, back, shape=channels) for value in (factor, term))
        return gathered(writer, finish(writer, x, factor, term), norm.gather_behind)

    return write


def _grouped(writer: Writer, value: Any) -> Any:
    """`[N, C, 1, 1]` as `[N, G, D]`."""
    norm = writer.norm
    groups = (norm.num_groups, norm.channels_per_group)
    return writer.op("Reshape", value, writer.shape(0, *groups), shape=[value.shape[0], *groups])


def _map_of(writer: Writer, mean: Any, inverse: Any) -> tuple[Any, Any]:
    """What the channels' means and 1/sigma_c, `[N, G, D]`, say: factor and term of the last map, of the same shape."""
    norm, op, shape = writer.norm, writer.op, mean.shape

    def over_group(value: Any) -> Any:
        return op("ReduceMean", value, writer.axes(2), keepdims=1, shape=[*shape[:2], 1])

    offset = op("Sub", mean, over_group(mean), shape=shape)
    sigma = op("Reciprocal", inverse, shape=shape)
    squares = [op("Mul", value, value, shape=shape) for value in (sigma, offset)]
    variance = over_group(op("Add", *squares, shape=shape))
    weight = working_weight(norm).reshape(1, *shape[1:])
    spread = op("Sqrt", variance, shape=variance.shape)
    gain = op("Div", writer.constant("affine.weight", weight), spread, shape=shape)
    term = op("Mul", gain, offset, shape=shape)
    if norm.bias is not None:
        bias = working_order(norm, norm.bias).reshape(1, *shape[1:])
        term = op("Add", term, writer.constant("affine.bias", bias), shape=shape)
    return op("Mul", gain, sigma, shape=shape), term


def _by_mul_and_add(writer: Writer, x: Any, factor: Any, term: Any) -> Any:
    return writer.op("Add", writer.op("Mul", x, factor), term)


def _by_batch_norm(writer: Writer, x: Any, factor: Any, term: Any) -> Any:
    norm = writer.norm
    sizes = [0] * (norm.rank - 2)
    factor, term = (writer.op("Reshape", value, writer.shape(-1), shape=[None]) for value in (factor, term))
    zero = writer.op("Sub", factor, factor, shape=[None])
    one = writer.op("Add", zero, writer.shared("ones", np.ones(1), norm.dtype), shape=[None])
    view = writer.op("Reshape", x, writer.shape(1, -1, *sizes), shape=[1, None, *x.shape[2:]])
    view = writer.op("BatchNormalization", view, factor, term, zero, one, epsilon=0.0, shape=view.shape)
    return writer.op("Reshape", view, writer.shape(-1, norm.channels, *sizes))


BY_CHANNEL = Lowering("by_channel", form(_by_mul_and_add), multiply_add, shape_nodes=True, ranks=(3, 4, 5))
BY_CHANNEL_BATCH_NORM = Lowering(
    "by_channel_batch_norm", form(_by_batch_norm), batch_norm, shape_nodes=True, ranks=(3, 4, 5)
)
