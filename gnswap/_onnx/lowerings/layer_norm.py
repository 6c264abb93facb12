r"""LayerNormalization over each group, then Mul and Add.

.. math:: y = \gamma \, \mathrm{LN}_{D \cdot S}(x)_g + \beta

Each group of `[N, C, H, W]` seen as `[N, G, D*H, W]` is one row of a layer norm over the last two axes. Its scale must
have exactly the row's shape (onnxruntime's fast path on the CPU; on CUDA a broadcast scale is computed wrongly,
onnxruntime#28971), so it is a tensor of ones: made by one ConstantOfShape for all norms of a size, which runtimes fold
when they load the file, and which reads the shape only where height or width is dynamic.

Exactness: 2e-6 of the output's spread at a mean of 30 standard deviations, the best of all forms.
Half types: the standard keeps mean and variance in fp32 (`stash_type` 1), so no Cast is needed.

Chosen for `cpu` with several threads where a depthwise Conv does not pay (the kernel uses all threads), and for
`tensorrt` with one group, which it takes for an instance norm in the other forms (NVIDIA/TensorRT#4756).
"""

from __future__ import annotations

from typing import Any

from gnswap._onnx.lowering import Lowering, multiply_add, side_by_side
from gnswap._onnx.norm import Writer


def statistics(writer: Writer, view: Any) -> tuple[Any, None]:
    """`view` `[N, G, ...]`, normalised over all axes after G."""
    norm = writer.norm
    ones = unit_scale(writer, view, norm.channels_per_group)
    return writer.op("LayerNormalization", view, ones, axis=2, epsilon=norm.epsilon, shape=view.shape), None


def unit_scale(writer: Writer, view: Any, channels: int) -> Any:
    """A tensor of ones in the shape of the axes after the second of a view, of which so many channels are a row."""
    import onnx_ir as ir

    norm = writer.norm
    row = tuple(size if isinstance(size, int) else str(size) for size in view.shape[2:])
    key = ("ones", *norm.sizes, channels, norm.dtype)
    if (ones := writer.cache.get(key)) is None:
        if all(isinstance(size, int) for size in row):
            shape = writer.shape(*map(int, row))
        else:
            shape = writer.op("Shape", view, start=2, dtype=ir.DataType.INT64, shape=[len(row)])
        one = ir.tensor([1.0], dtype=norm.dtype)
        ones = writer.cache[key] = writer.op("ConstantOfShape", shape, value=one, shape=view.shape[2:])
    return ones


FORM = side_by_side(statistics)
LAYER_NORM = Lowering("layer_norm", FORM, multiply_add, shape_nodes=True)
