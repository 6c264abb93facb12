"""The one table of tolerances: an error is judged against torch's own error on the same input, both against fp64."""

from __future__ import annotations

import torch
from torch import Tensor

# How many times torch's own error is allowed: the Triton kernels merge blocks, which is less lucky at mean/std 1000.
FACTOR = 4.0
# And what is always allowed, in units of the dtype's eps at the largest value: the rounding of the result (half a unit
# at most), and for the wider types, which do not hide it behind that, the arithmetic before it. The largest that
# the kernels and ATen showed here: 20 in fp64, measured against fp64, 9.7 in fp32 (17 Triton's split at mean/std 1000),
# 0.47 in the half types.
ULPS = {torch.float64: 32.0, torch.float32: 20.0, torch.float16: 0.55, torch.bfloat16: 0.55}


def max_error(result: Tensor, exact: Tensor) -> float:
    """Largest absolute deviation from the fp64 result."""
    assert result.shape == exact.shape
    return float((result.detach().double() - exact.detach()).abs().max()) if exact.numel() else 0.0


def assert_as_good_as(
    result: Tensor, exact: Tensor, torch_result: Tensor | None = None, *, size: float | None = None
) -> None:
    """Fail unless `result` is as near to `exact` (fp64) as the table allows, see above.

    `size` stands in for the largest value of `exact` where that is a sum of much bigger terms.
    """
    assert exact.dtype == torch.float64
    assert result.isfinite().all()
    if size is None:
        size = max_size(exact)
    allowed = ULPS[result.dtype] * torch.finfo(result.dtype).eps * max(size, 1.0)
    if torch_result is not None:
        allowed += FACTOR * max_error(torch_result, exact)
    error = max_error(result, exact)
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def max_size(*values: Tensor) -> float:
    """Largest absolute value among all elements."""
    return max(float(value.detach().abs().max()) if value.numel() else 0.0 for value in values)
