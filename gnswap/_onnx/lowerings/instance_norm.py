r"""InstanceNormalization over the groups, then Mul and Add: what torch's exporter writes too.

.. math:: y = \gamma \frac{x - m_g}{\sqrt{v_g + \epsilon}} + \beta

Each group of `[N, C, H, W]` seen as `[N, G, D*H, W]` is one channel of an instance norm with scale 1 and bias 0.

Exactness: the mean is taken first and the squares of the differences then (onnxruntime's CPU kernel; cuDNN's likewise):
2e-5 of the output's spread at a mean of 30 standard deviations.
Half types: the standard says nothing about the statistics' dtype, so the node stands between two Casts to fp32.

Chosen for `portable`, `cuda` and `tensorrt`: kernels for it are the oldest and are everywhere, TensorRT has a layer of
its own for it, and it needs no node that reads sizes. On the CPU its kernel uses one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gnswap._onnx.lowering import Lowering, multiply_add, side_by_side
from gnswap._onnx.norm import Writer


def statistics(writer: Writer, view: Any) -> tuple[Any, None]:
    """`view` `[N, G, ...]`, normalised over all axes after G."""
    import onnx_ir as ir

    norm, single = writer.norm, ir.DataType.FLOAT
    dtype = single if norm.is_half else norm.dtype
    if norm.is_half:
        view = writer.op("Cast", view, to=single, dtype=single, shape=view.shape)
    scale = writer.shared("ones", np.ones(norm.num_groups), dtype)
    bias = writer.shared("zeros", np.zeros(norm.num_groups), dtype)
    view = writer.op("InstanceNormalization", view, scale, bias, epsilon=norm.epsilon, dtype=dtype, shape=view.shape)
    return (writer.op("Cast", view, to=norm.dtype, shape=view.shape) if norm.is_half else view), None


FORM = side_by_side(statistics)
INSTANCE_NORM = Lowering("instance_norm", FORM, multiply_add, half_casts=True)
