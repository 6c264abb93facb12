"""The reference is the definition: checked against torch's own norms and against autograd, in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from _cases import Case, full_case
from _strategies import cases
from hypothesis import given

from gnswap import ops
from gnswap.ops import _reference


@given(cases())
def test_backward_is_the_derivative_of_forward(case: Case) -> None:
    case, leaves = case.map(torch.Tensor.double).leaves()
    y, _, _ = _reference.group_norm(*case.arguments)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    expected = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    found = _reference.group_norm_backward(dy, *case.arguments)._asdict()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-7)
    assert {name for name, gradient in found.items() if gradient is not None} == set(leaves)


def test_forward_follows_the_formula_in_a_plain_loop() -> None:
    case = full_case(dtype=torch.float64)
    y, mean, rstd = _reference.group_norm(*case.arguments)
    u = case.x * case.channel_scale[:, None, None] + case.channel_shift[:, None, None]
    for n in range(2):
        for g, channels in enumerate(case.channel_order.split(3)):
            group = u[n, channels]
            m, v = group.mean(), group.var(correction=0)
            assert mean[n, g] == pytest.approx(m)
            assert rstd[n, g] == pytest.approx(1 / (v + case.eps).sqrt())
            for c in channels:
                z = (u[n, c] - m) / (v + case.eps).sqrt() * case.weight[c] + case.bias[c] + case.residual[n, c]
                torch.testing.assert_close(y[n, c], F.silu(z))


@pytest.mark.parametrize("shape", [(3, 12), (3, 12, 5), (3, 12, 5, 7), (3, 12, 2, 3, 4)])
def test_plain_equals_torch(shape: tuple[int, ...]) -> None:
    case = replace(full_case(shape, 4, dtype=torch.float64), act=None, residual=None)
    case = replace(case, channel_scale=None, channel_shift=None, channel_order=None)
    expected = F.group_norm(case.x, 4, case.weight, case.bias)
    torch.testing.assert_close(_reference.group_norm(*case.arguments)[0], expected)


@pytest.mark.parametrize("act", ops.ACTIVATIONS)
def test_any_order_of_derivative(act: str) -> None:
    case, leaves = full_case(act=act, dtype=torch.float64).leaves()

    def gradients(dy: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_reference.group_norm_backward(dy, *case.arguments))

    dy = torch.randn_like(case.x).requires_grad_()
    assert torch.autograd.gradcheck(gradients, (dy, *leaves.values()), fast_mode=True)
