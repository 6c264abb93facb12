"""What follows a norm may work in place on its output, as `nn.ReLU(inplace=True)` does in most networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gnswap import FusedGroupNorm


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [0, 2])
def test_an_inplace_activation_after_the_layer(ordered: bool, memory_format: torch.memory_format, batch: int) -> None:
    norm = FusedGroupNorm(2, 8)
    if ordered:
        norm.channel_order = torch.randperm(8)
    x = torch.randn(batch, 8, 5, 7).to(memory_format=memory_format)
    gradients = []
    for inplace in (True, False):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        nn.ReLU(inplace=inplace)(norm(leaf)).square().sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
