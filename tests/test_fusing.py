"""On a converted network fusing and re-parameterising are refused, and allowed again after revert."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gnswap
from gnswap._errors import ModelError
from tests._models import randomise_norms


class Residual(nn.Module):
    """A block as EfficientViM has it: `fuse` takes a norm that is no BatchNorm for none, and folds the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.fused = False

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.fused else x + self.layer(x)

    def fuse(self) -> nn.Module:
        if isinstance(self.layer[1], nn.BatchNorm2d):
            self.layer = nn.Sequential(nn.utils.fuse_conv_bn_eval(*self.layer))
        self.fused = True
        self.layer[0].weight.data += torch.eye(8)[:, :, None, None]
        return self


class Plain(nn.Conv2d):
    """Can be fused, and has no norm."""

    def fuse(self) -> nn.Module:
        return nn.Identity()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return randomise_norms(nn.Sequential(Residual(), Plain(8, 8, 1), Residual())).eval()


X = torch.ones(1, 8, 4, 4)


def test_fusing_is_refused() -> None:
    model = network()
    converted = gnswap.convert(model).model
    expected = converted(X)
    for block in (converted[0], converted[2]):
        with pytest.raises(ModelError, match="Fuse or re-parameterise before the conversion"):
            block.fuse()
    assert torch.equal(converted(X), expected)
    assert isinstance(converted[1].fuse(), nn.Identity)  # there is no norm in it
    fused = copy.deepcopy(model)
    fused[0].fuse()
    assert torch.allclose(fused(X), model(X), atol=1e-5)  # the original was left as it is


def test_copies_and_loaded_networks_refuse_as_well(tmp_path: Path) -> None:
    model = network()
    converted = gnswap.convert(model).model
    gnswap.save(converted, tmp_path / "saved")
    loaded = gnswap.load(tmp_path / "saved", model)
    for network_ in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), loaded):
        with pytest.raises(ModelError, match="a GroupNorm cannot be folded"):
            network_[0].fuse()


@pytest.mark.parametrize("inplace", [False, True])
def test_reverted_networks_fuse(inplace: bool) -> None:
    model = network()
    expected = model(X)
    reverted = gnswap.revert(gnswap.convert(model).model, inplace=inplace)
    assert not any("fuse" in vars(module) for module in reverted.modules())
    reverted[0].fuse()
    assert torch.allclose(reverted(X), expected, atol=1e-5)


def test_what_somebody_put_there_stays() -> None:
    model = network()
    model[0].fuse = len
    converted = gnswap.convert(model).model
    assert converted[0].fuse is len
    assert gnswap.revert(converted)[0].fuse is len
