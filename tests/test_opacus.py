"""Opacus on converted networks: every sample's gradient for itself, and training that is differentially private."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gnswap
from tests._models import PreActivation, mlp, randomise_norms, small_cnn


def resnet() -> nn.Module:
    """Adds its shortcuts in place, which PyTorch forbids on the output of a module with a backward hook."""
    return timm.create_model("test_resnet", num_classes=5)


def efficientnet() -> nn.Module:
    """Its norms are fused with their activations."""
    return timm.create_model("test_efficientnet", num_classes=5)


def converted(make: Callable[[], nn.Module], shape: tuple[int, ...], *, photos: bool) -> nn.Module:
    net = randomise_norms(make()).eval()
    calibration = [torch.randn(12, *shape)] if photos else None
    return gnswap.convert(net, softness=0.5, calibration=calibration).model.train()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("photos", [False, True])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(resnet, (3, 32, 32)), (efficientnet, (3, 32, 32)), (PreActivation, (3, 8, 8)), (mlp, (6,))],
)
def test_gradients_of_every_sample(make: Callable[[], nn.Module], shape: tuple[int, ...], photos: bool) -> None:
    """The truth is the gradient of a batch of one; channel orders, signs and corrections come from the photos."""
    model = converted(make, shape, photos=photos)
    x, y = torch.randn(3, *shape), torch.tensor([0, 1, 2])
    alone = [
        torch.autograd.grad(loss_of(model, x[i : i + 1], y[i : i + 1]), list(model.parameters())) for i in range(3)
    ]
    loss_of(gnswap.grad_sample_module(model), x, y).backward()
    for parameter, *expected in zip(model.parameters(), *alone, strict=True):
        scale = float(max(one.abs().max() for one in expected)) + 1e-6
        torch.testing.assert_close(parameter.grad_sample, torch.stack(expected), rtol=1e-4, atol=1e-4 * scale)


def test_residual_before_the_activation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = gnswap.FusedGroupNorm(2, 8, act="silu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x, x.flip(-1))

    model, x = Net(), torch.randn(3, 8, 5)
    model(x[1:2]).square().mean().backward()
    expected = model.norm.weight.grad
    model.zero_grad()
    gnswap.grad_sample_module(model, loss_reduction="sum")(x).square().mean((1, 2)).sum().backward()
    torch.testing.assert_close(model.norm.weight.grad_sample[1], expected)


@pytest.mark.filterwarnings("ignore:Secure RNG turned off", "ignore:Optimal order is:UserWarning")
def test_a_private_step() -> None:
    """The whole of Opacus on top: clipping, noise, and an account of the privacy spent."""
    import opacus

    model = converted(small_cnn, (3, 8, 8), photos=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.randint(5, (16,))), batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = opacus.PrivacyEngine(accountant="rdp")
    private, optimizer, data = engine.make_private(
        module=gnswap.grad_sample_module(model), optimizer=optimizer, data_loader=data, noise_multiplier=1.0,
        max_grad_norm=1.0,
    )  # fmt: skip
    for x, y in data:
        optimizer.zero_grad()
        loss_of(private, x, y).backward()
        optimizer.step()
    after = private.to_standard_module().state_dict()
    constants = {name for name in before if ".channel_" in name}
    assert constants
    assert all(torch.equal(before[name], after[name]) == (name in constants) for name in before)
    assert 0 < engine.get_epsilon(delta=1e-5) < 100


def test_the_hooks_come_off_again() -> None:
    model, x = converted(resnet, (3, 32, 32), photos=False), torch.randn(2, 3, 32, 32)
    expected = model(x)
    private = gnswap.grad_sample_module(model)
    assert torch.equal(private(x), expected)
    assert private.to_standard_module() is model
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    model(x).sum().backward()  # no capture
    assert not [parameter for parameter in model.parameters() if getattr(parameter, "grad_sample", None) is not None]


def test_other_buffers_are_still_refused() -> None:
    model = nn.Sequential(small_cnn(), gnswap.FusedGroupNorm(1, 5))
    with pytest.raises(gnswap.ModelError, match=r"no trainable layer with buffers \(at 0.1\): found BatchNorm2d with"):
        gnswap.grad_sample_module(model.train())


def test_an_activation_that_trains_is_refused() -> None:
    model = nn.Sequential(gnswap.FusedGroupNorm(1, 8, act=nn.PReLU()))
    with pytest.raises(gnswap.ModelError, match=r"an activation without parameters.*found PReLU"):
        gnswap.grad_sample_module(model)


def test_dropout_inside_is_refused() -> None:
    model = nn.Sequential(gnswap.FusedGroupNorm(1, 8, act="relu"))
    model[0].drop = nn.Dropout(0.5)
    with pytest.raises(gnswap.ModelError, match=r"cannot be had from the norm's output \(at 0\)"):
        gnswap.grad_sample_module(model)


def test_without_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(gnswap.MissingDependencyError, match=r"Run: pip install 'gnswap\[private\]'"):
        gnswap.grad_sample_module(small_cnn())
