r"""LayerNormalization over each group, then a BatchNormalization with constant statistics.

.. math:: y = \mathrm{BN}_{\gamma, \beta, 0, 1}(\mathrm{LN}_{D \cdot S}(x)_g)

One pass over the channels where Mul and Add take two. Exactness: that of `layer_norm`, and one rounding less.
"""

from __future__ import annotations

from gnswap._onnx.lowering import Lowering, batch_norm
from gnswap._onnx.lowerings.layer_norm import FORM

LAYER_NORM_BATCH_NORM = Lowering("layer_norm_batch_norm", FORM, batch_norm, shape_nodes=True)
