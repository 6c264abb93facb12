r"""Mean and variance axis by axis, each by ReduceMean, then the affine map: exact for rows of any length.

.. math:: m_g = \mathrm{mean}_{DH}(\mathrm{mean}_W(x)), \quad
          v_g = \mathrm{mean}_{DH}(\mathrm{mean}_W((x - m_g)^2)), \quad
          y = \gamma \frac{x - m_g}{\sqrt{v_g + \epsilon}} + \beta

Why: onnxruntime's CPU kernels for InstanceNormalization and LayerNormalization add a row up from its first number to
its last in fp32, and what is rounded away grows with the row: 5e-6 of the output's spread for 400,000 numbers, 2e-5 for
1,200,000 (one group of 96 channels at 112x112), and an image of 1000 pixels has twenty times as many. Sums of W
numbers, and then of their means, stay under 1e-6 (Higham, The Accuracy of Floating Point Summation, 1993).

Exactness: 1e-5 of the largest output at a mean of 30 standard deviations, or better: the differences are squared, not
the numbers.

Half types: the view is cast to fp32 first, what is handed out is cast back.

The division goes into gamma, so that x is passed over as often as in the other forms.

Chosen for `portable` for rows over 2^17 numbers (where sizes are dynamic, in the example input), as it takes twice the
time of a layer norm: 1.26 against 0.65 ns a number, batch 1, 2 threads; for `cpu` where a single channel is as long,
since `by_channel` is faster and more exact up to there; for `tensorrt` with one group and dynamic sizes, where the
other forms are taken for an instance norm or read sizes at run time. EfficientNet-Lite0 with its trained weights,
largest error over 6 photos, by the number of norms (of 49) that have this form:

    rows over          2^17     2^18     2^19     none
    such norms            8        4        1        0
    error           1.1e-06  2.3e-06  1.4e-05  1.8e-05
"""

from __future__ import annotations

from typing import Any

from gnswap._onnx.lowering import Lowering, multiply_add, side_by_side
from gnswap._onnx.norm import Writer


def centred(writer: Writer, view: Any) -> tuple[Any, Any]:
    """`view` `[N, G, ...]` without its mean over the axes after G, and what it is still to be divided by."""
    import onnx_ir as ir

    norm, single = writer.norm, ir.DataType.FLOAT
    dtype = single if norm.is_half else norm.dtype
    if norm.is_half:
        view = writer.op("Cast", view, to=single, dtype=single, shape=view.shape)
    if norm.rank == 3:  # a row is one axis there, [N, G, D*L]
        depth = norm.channels_per_group
        shape = [*view.shape[:2], depth, norm.x.shape[2]]
        view = writer.op("Reshape", view, writer.shape(0, 0, depth, -1), dtype=dtype, shape=shape)
    offset = writer.op("Sub", view, _mean(writer, view), dtype=dtype, shape=view.shape)
    variance = _mean(writer, writer.op("Mul", offset, offset, dtype=dtype, shape=view.shape))
    epsilon = writer.constant("epsilon", norm.epsilon, dtype)
    softened = writer.op("Add", variance, epsilon, dtype=dtype, shape=variance.shape)
    spread = writer.op("Sqrt", softened, dtype=dtype, shape=variance.shape)
    if norm.is_half:
        offset, spread = (writer.op("Cast", one, to=norm.dtype, shape=one.shape) for one in (offset, spread))
    return offset, spread


def _mean(writer: Writer, value: Any) -> Any:
    """The mean over all axes after G, one after the other from the last."""
    sizes = list(value.shape)
    for axis in reversed(range(2, len(sizes))):
        sizes[axis] = 1
        value = writer.op("ReduceMean", value, writer.axes(axis), keepdims=1, dtype=value.dtype, shape=list(sizes))
    return value


TWO_STEP = Lowering("two_step", side_by_side(centred), multiply_add, half_casts=True, ranks=(3, 4, 5))
