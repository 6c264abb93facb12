"""The choice of code is a pure function with a reason."""

from __future__ import annotations

import pytest
import torch

from gnswap.ops._backend import DTYPES, choose_backend


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_kernel_for_every_dtype(device_type: str, dtype: torch.dtype) -> None:
    assert choose_backend(device_type, dtype).name in ("aten", "cpp", "triton")


def test_the_reference_everywhere_else() -> None:
    name, reason = choose_backend("mps", torch.float16)
    assert name == "reference"
    assert "float16 on mps" in reason
