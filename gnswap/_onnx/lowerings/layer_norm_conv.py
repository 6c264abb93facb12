r"""LayerNormalization over each group, then a depthwise 1x1 Conv with gamma as weight and beta as bias.

.. math:: y = \mathrm{Conv}_{1 \times 1, \gamma, \beta}(\mathrm{LN}_{D \cdot S}(x)_g)

onnxruntime's CPU provider runs convs in a blocked layout. Mul and Add with `[C, 1, 1]` are not known there, so they run
in the plain layout and the activation after them too; the depthwise Conv is known, takes the activation and the
residual addition behind it into its own loop, and leaves its result in the layout that the next conv wants.
Exactness: that of `layer_norm`, and one rounding less.

Chosen for `cpu` with several threads (onnxruntime 1.31, 2 threads, time against `instance_norm`: resnet50 0.90 at
batch 1 and 0.92 at batch 8, mobilenetv2 0.80 and 0.82). On GPUs a depthwise conv is a poor way to multiply.
"""

from __future__ import annotations

from gnswap._onnx.lowering import Lowering, depthwise_conv
from gnswap._onnx.lowerings.layer_norm import FORM

LAYER_NORM_CONV = Lowering("layer_norm_conv", FORM, depthwise_conv, shape_nodes=True, ranks=(4,))
