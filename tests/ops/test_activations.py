"""One table of activations: functions, derivatives, and the modules recognised as one of them."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import activations, activations_me
from torch import Tensor, nn

from gnswap.ops import ACTIVATIONS, _activations, activation_name

MODULES = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "leaky_relu": nn.LeakyReLU(),
}
POINTS = torch.cat([torch.linspace(-12, 12, 481, dtype=torch.float64), torch.tensor([-1e3, 1e3])])
# torch's hardswish takes another one-sided value at exactly 3; away from kinks everything must agree
SMOOTH_POINTS = POINTS[(POINTS.abs() != 3) & (POINTS != 6)]


def test_the_table_is_what_the_modules_are() -> None:
    assert set(ACTIVATIONS) == set(MODULES)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_function_derivative_and_backward_agree_with_the_module(act: str) -> None:
    z = SMOOTH_POINTS.clone().requires_grad_()
    y = MODULES[act](z)
    (derivative,) = torch.autograd.grad(y.sum(), z)
    torch.testing.assert_close(_activations.activate(z, act), y, rtol=0, atol=0)
    torch.testing.assert_close(_activations.derivative(z, act), derivative)

    rows = z.detach().repeat(3, 1)
    torch.testing.assert_close(_activations.activate_(rows.clone(), act)[1], y.detach())
    dy = torch.randn_like(rows)
    backward = _activations.activate_backward_(dy, rows.clone(), act)
    torch.testing.assert_close(backward, dy * derivative)


def test_none_is_the_identity() -> None:
    z = torch.randn(2, 3)
    assert _activations.activate(z, None) is z
    assert _activations.activate_(z, None) is z


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(inplace=True), "relu6"),
        (nn.SiLU(inplace=True), "silu"),
        (nn.GELU("tanh"), None),
        (nn.LeakyReLU(0.2), None),
        (nn.Hardtanh(), None),
        (nn.Identity(), None),
        (nn.PReLU(), None),
        (nn.Mish(), None),
        (activations.Swish(), "silu"),
        (activations_me.SwishMe(), "silu"),
        (activations.HardSwish(), "hardswish"),
        (activations_me.HardSwishMe(), "hardswish"),
        (activations.GELU(), "gelu"),
        (activations.GELUTanh(), None),
        (activations.QuickGELU(), None),
        (activations.PReLU(), None),
        (activations.HardSigmoid(), None),
    ],
    ids=lambda value: type(value).__module__ + "." + str(value) if isinstance(value, nn.Module) else str(value),
)
def test_activation_name(module: nn.Module, name: str | None) -> None:
    assert activation_name(module) == name
    if name is not None:
        torch.testing.assert_close(module(POINTS.clone()), _activations.activate(POINTS, name))


@pytest.mark.parametrize("name", ["relu", "relu6", "silu", "swish", "gelu", "hard_swish", "leaky_relu"])
def test_what_timm_builds_under_a_known_name_is_recognised(name: str) -> None:
    found = activation_name(timm.layers.create_act_layer(name))
    assert found == {"swish": "silu", "hard_swish": "hardswish"}.get(name, name)


def test_a_subclass_or_a_patched_forward_is_not_recognised() -> None:
    class Twice(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * F.relu(x)

    patched = nn.ReLU()
    patched.forward = lambda x: 3 * x
    assert activation_name(Twice()) is None
    assert activation_name(patched) is None


class TestPitfallScalarTail:
    """ATen's own silu gives an element other bits in a batch than alone; the helper must not."""

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_bits_do_not_depend_on_the_batch(self, act: str) -> None:
        z = torch.randn(5, 315, generator=torch.Generator().manual_seed(0))
        dy = torch.randn_like(z)
        together = _activations.activate_(z.clone(), act)
        gradient = _activations.activate_backward_(dy, z.clone(), act)
        for n in range(5):
            one = slice(n, n + 1)
            assert torch.equal(together[one], _activations.activate_(z[one].clone(), act))
            assert torch.equal(gradient[one], _activations.activate_backward_(dy[one], z[one].clone(), act))
