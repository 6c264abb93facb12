"""Which axes are dynamic, and what is said where they cannot be."""

from __future__ import annotations

import pytest
import timm
import torch
from _models import small_cnn
from torch import Tensor, nn

from gnswap import _export, _trace
from gnswap._errors import ExportError


class FixedHead(nn.Module):
    """A classifier that only fits one height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.GroupNorm(2, 4), nn.Linear(4 * 8 * 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x).flatten(1))


class Branching(nn.Module):
    """Python decides by the size, so one traced graph is wrong for the other side of the decision."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[2] > 20 else x


def test_a_fixed_head_falls_back_to_a_dynamic_batch_and_says_why() -> None:
    traced = _trace.trace(FixedHead().eval(), [torch.randn(2, 4, 8, 8)], dynamic_batch=True, dynamic_size=True)
    assert traced.axes == [{0: "batch"}]
    assert "height and width are fixed at 8x8" in traced.notes[0]


def test_a_branch_on_the_size_is_found_by_running_other_sizes() -> None:
    traced = _trace.trace(Branching().eval(), [torch.randn(2, 4, 19, 19)], dynamic_batch=True, dynamic_size=True)
    assert traced.axes == [{0: "batch"}]
    assert "height and width are fixed at 19x19" in traced.notes[0]


def test_same_padding_is_known_to_be_hopeless() -> None:
    model = timm.layers.Conv2dSame(3, 4, 3, stride=2).eval()
    traced = _trace.trace(nn.Sequential(model), [torch.randn(2, 3, 9, 9)], dynamic_batch=True, dynamic_size=True)
    assert traced.axes == [{0: "batch"}]
    assert "0 is a Conv2dSame" in traced.notes[0]


def test_sizes_are_left_alone_where_nobody_asks() -> None:
    traced = _trace.trace(small_cnn().eval(), [torch.randn(1, 3, 8, 8)], dynamic_batch=False, dynamic_size=False)
    assert traced.axes == [{}]
    assert traced.notes == ()


def test_a_batch_size_in_the_code_is_an_error() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, -1)

    with pytest.raises(ExportError, match=r"cannot trace.*batch size written into"):
        _trace.trace(Fixed(), [torch.randn(2, 3, 4)], dynamic_batch=True, dynamic_size=False)


def test_variadic_inputs_are_traced() -> None:
    class Summed(nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return values[0] + values[1]

    traced = _trace.trace(Summed(), [torch.randn(2, 3, 4)] * 2, dynamic_batch=True, dynamic_size=True)
    assert traced.axes == [{0: "batch", 2: "length"}] * 2
    assert _export._input_names(Summed(), 2) == ["values_0", "values_1"]
