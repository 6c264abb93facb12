r"""InstanceNormalization over the groups, then a depthwise 1x1 Conv with gamma as weight and beta as bias.

.. math:: y = \mathrm{Conv}_{1 \times 1, \gamma, \beta}\!\left(\frac{x - m_g}{\sqrt{v_g + \epsilon}}\right)

The statistics of `instance_norm` with the affine map of `layer_norm_conv`. Exactness: that of `instance_norm`, and one
rounding less.

Chosen for `cpu` where only one thread would work on the statistics anyway: with one thread, and with one group, which
is a single row. onnxruntime's CPU kernel for it takes 0.75 to 0.85 of the layer norm's time on one thread (measured on
16 shapes of mobilenetv2 and resnet50); two threads on two rows or more turn that round.
"""

from __future__ import annotations

from gnswap._onnx.lowering import Lowering, depthwise_conv
from gnswap._onnx.lowerings.instance_norm import FORM

INSTANCE_NORM_CONV = Lowering("instance_norm_conv", FORM, depthwise_conv, half_casts=True, ranks=(4,))
