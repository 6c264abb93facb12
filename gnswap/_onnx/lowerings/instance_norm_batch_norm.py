r"""InstanceNormalization over the groups, then a BatchNormalization with constant statistics.

.. math:: y = \mathrm{BN}_{\gamma, \beta, 0, 1}\!\left(\frac{x - m_g}{\sqrt{v_g + \epsilon}}\right)

One pass over the channels where Mul and Add take two. Exactness: that of `instance_norm`, and one rounding less.

Chosen for `cpu` with one thread where x has not four axes, for which `instance_norm_conv` is made (onnxruntime 1.31,
one op with ReLU, time against Mul and Add: 0.74 at batch 1, 0.79 at batch 8). With SiLU behind it both take the same.
"""

from __future__ import annotations

from gnswap._onnx.lowering import Lowering, batch_norm
from gnswap._onnx.lowerings.instance_norm import FORM

INSTANCE_NORM_BATCH_NORM = Lowering("instance_norm_batch_norm", FORM, batch_norm, half_casts=True)
