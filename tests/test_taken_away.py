"""What a GroupNorm takes away: told exactly, and only of layers that nothing but the norm reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gnswap
from gnswap._layer import FusedGroupNorm
from gnswap._running import flat
from gnswap._taken_away import equivalent, norms_behind
from tests._models import ZOO, build


def layer_with(**more: Any) -> FusedGroupNorm:
    """A norm of 12 channels with all that a conversion may give it."""
    generator = torch.Generator().manual_seed(3)
    norm = FusedGroupNorm(3, 12, eps=0.0, **more)
    norm.channel_order = torch.randperm(12, generator=generator)
    signs = torch.where(torch.rand(12, generator=generator) < 0.5, -1.0, 1.0)
    norm.channel_scale = signs * (0.5 + torch.rand(12, generator=generator))
    norm.channel_shift = torch.randn(12, generator=generator)
    return norm.double()


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
@torch.no_grad()
def test_the_norm_gives_the_same_of_both(rank: int) -> None:
    """Means and sizes are those of `reached`, photo by photo, and behind the norm there is no difference."""
    torch.manual_seed(0)
    shape = (4, 12, *(5, 3, 2)[:rank])
    y, reached = torch.randn(shape).double(), 3 * torch.randn(shape).double() + 2
    norm = layer_with()
    found = equivalent(norm, y, reached)
    torch.testing.assert_close(norm(found), norm(y), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(found, y, rtol=0.1)

    def groups(x: Tensor) -> tuple[Tensor, Tensor]:
        assert norm.channel_scale is not None
        assert norm.channel_shift is not None
        per_channel = (1, -1, *(1,) * rank)
        z = x * norm.channel_scale.view(per_channel) + norm.channel_shift.view(per_channel)
        return torch.var_mean(z[:, norm.channel_order].reshape(4, 3, -1), 2)

    for ours, theirs in zip(groups(found), groups(reached), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(equivalent(norm, y, y), y)


@torch.no_grad()
def test_softness_leaves_sizes_alone() -> None:
    """A frozen BatchNorm takes no size away, and a silent channel has nothing to be moved."""
    torch.manual_seed(0)
    y, reached = torch.randn(4, 12, 6).double(), 3 * torch.randn(4, 12, 6).double()
    norm = layer_with(softness=1e8)
    found = equivalent(norm, y, reached)
    moved = found - y
    torch.testing.assert_close(moved, moved[:, :, :1].expand_as(moved), rtol=0, atol=1e-5)
    assert norm.channel_scale is not None
    norm.channel_scale[5] = 0
    assert torch.equal(equivalent(norm, y, reached)[:, 5], y[:, 5])


class Readers(nn.Module):
    """Layers read by their norm alone, by something else as well, behind an activation in place, by no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.shared, self.activated, self.summed, self.last = (nn.Conv2d(8, 8, 1) for _ in range(5))
        self.alone_norm, self.shared_norm, self.activated_norm, self.summed_norm = (nn.BatchNorm2d(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.alone_norm(self.alone(x)).relu_()
        shared = self.shared(x)
        x = self.shared_norm(shared) + shared
        x = self.activated_norm(self.activated(x).relu_())
        x = self.summed_norm(self.summed(x) + x)
        if x.isnan().any():
            raise ValueError("no numbers")
        y: Tensor = self.last(x)
        return y.mean((2, 3))


@torch.no_grad()
def test_only_what_the_norm_alone_reads() -> None:
    torch.manual_seed(0)
    converted = gnswap.convert(Readers().eval(), groups=2).model
    names = [name for name, module in converted.named_modules() if isinstance(module, nn.Conv2d)]
    found = norms_behind(converted, names, torch.randn(1, 8, 5, 5))
    assert found == {"alone": converted.alone_norm}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in converted.modules())


@pytest.mark.parametrize("name", ["plain", "pre-activation", "1-D", "3-D", "aliased"])
@torch.no_grad()
def test_in_any_network_the_answers_stay(name: str) -> None:
    """The proof of it: layers whose output is replaced by an equivalent one leave the network's answers as they are."""
    torch.manual_seed(0)
    original, _ = build(name)
    converted = gnswap.convert(original.double(), softness=0).model.eval()
    x = torch.randn(2, *ZOO[name][1]).double()
    calls: list[str] = []
    convs = {n: m for n, m in converted.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)}
    hooks = [m.register_forward_hook(lambda _m, _x, _y, n=n: calls.append(n)) for n, m in convs.items()]
    expected = converted(x)
    for hook in hooks:
        hook.remove()
    found = norms_behind(converted, [n for n in convs if calls.count(n) == 1], x[:1])
    for path, norm in found.items():
        convs[path].register_forward_hook(lambda _m, _x, y, norm=norm: equivalent(norm, y, 2 * y + 1))
    assert found
    torch.testing.assert_close(flat(converted(x)), flat(expected), rtol=1e-2, atol=1e-3)
