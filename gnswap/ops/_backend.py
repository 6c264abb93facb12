"""Which code computes the norm: a pure function of what is known before any data is touched.

Why pure and not measured at run time: another kernel sums in another order, and the same input must give the same
bits every time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Dtypes the op takes.
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Backend(NamedTuple):
    """The chosen code and why, in words."""

    name: str
    reason: str


def choose_backend(device_type: str, dtype: torch.dtype) -> Backend:
    """Choose the code for tensors of one device type and dtype.

    Args:
        device_type: `tensor.device.type`.
        dtype: dtype of the input.

    Returns:
        `"aten"`: ATen's GroupNorm on a contiguous buffer, with the rest in place; `"reference"`: plain torch.

    Example:
        >>> choose_backend("cpu", torch.float32).name, choose_backend("mps", torch.float32).name
        ('aten', 'reference')
    """
    if device_type in ("cpu", "cuda") and dtype in DTYPES:
        return Backend("aten", f"ATen has a GroupNorm for {dtype} on {device_type}")
    return Backend("reference", f"no tested kernel for {dtype} on {device_type}; plain torch is always right")
