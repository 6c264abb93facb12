"""The closed forms: exact where the derivation says exact, in the dtype and on the device of the statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gnswap._algebra import standardise

C, G = 12, 3


def statistics(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(C, generator=generator, dtype=torch.float64) * 3
    var = torch.exp(torch.randn(C, generator=generator, dtype=torch.float64))
    var[::5] = 1e-9  # dead channels
    return mean, var


def group_norm_with(constants, x, gamma, beta, eps, *, order=None):
    z = x * constants.scale[:, None] + constants.shift[:, None]
    order = torch.arange(C) if order is None else order
    y = torch.empty_like(z)
    y[:, order] = F.group_norm(z[:, order], G, eps=eps)
    weight = gamma * constants.gain if constants.quieter is None else gamma * constants.gain * constants.quieter
    bias = beta if constants.constant is None else beta - gamma * constants.constant
    return y * weight[:, None] + bias[:, None]


def nominal_sample(mean: torch.Tensor, var: torch.Tensor, positions: int = 64) -> torch.Tensor:
    """One sample `[1, C, S]` whose channels have exactly the running mean and (biased) variance."""
    noise = torch.randn(1, C, positions, dtype=torch.float64)
    noise = (noise - noise.mean(2, keepdim=True)) / noise.std(2, correction=0, keepdim=True)
    return noise * var.sqrt()[:, None] + mean[:, None]


@pytest.mark.parametrize("softness", [0.0, 0.3, 4.0])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_a_sample_with_nominal_statistics_gets_exactly_batchnorms_output(
    softness: float, shuffled: bool, balanced: bool
) -> None:
    torch.manual_seed(0)
    mean, var = statistics()
    eps = 1e-3
    gamma, beta = torch.randn(2, C, dtype=torch.float64)
    order = torch.randperm(C) if shuffled else None
    signs = torch.tensor([1, -1] * (C // 2)) if shuffled else None
    loudness = torch.rand(C, dtype=torch.float64) + 0.5 if balanced else None
    centre = torch.randn(C, dtype=torch.float64) if balanced else None
    constants = standardise(
        mean, var, eps, G, softness=softness, channel_order=order, signs=signs, loudness=loudness, centre=centre
    )
    x = nominal_sample(mean, var)
    expected = F.batch_norm(x, mean, var, gamma, beta, eps=eps)
    found = group_norm_with(constants, x, gamma, beta, eps + softness, order=order)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_the_gain_it_would_not_be_exact() -> None:
    torch.manual_seed(0)
    mean, var = statistics()
    constants = standardise(mean, var, 1e-3, G)
    x, one = nominal_sample(mean, var), torch.ones(C, dtype=torch.float64)
    expected = F.batch_norm(x, mean, var, eps=1e-3)
    found = group_norm_with(constants, x, one / constants.gain, one * 0, 1e-3)
    assert not torch.allclose(found, expected, rtol=1e-2)


def test_the_gain_counts_dead_channels_of_the_group_only() -> None:
    var = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)

    def nominal(order: torch.Tensor | None = None) -> list[float]:
        gain = standardise(torch.zeros_like(var), var, 1e-9, 3, channel_order=order).gain
        found: list[float] = gain.square().tolist()
        return found

    assert nominal() == pytest.approx([0, 0, 1, 1, 1, 1], abs=1e-8)
    assert nominal(torch.tensor([0, 2, 1, 3, 4, 5])) == pytest.approx([0.5] * 4 + [1, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_of_the_statistics(dtype: torch.dtype) -> None:
    mean, var = (t.to(dtype) for t in statistics())
    constants = standardise(mean, var, 1e-3, G)
    assert {constants.scale.dtype, constants.shift.dtype, constants.gain.dtype} == {dtype}
    # computed in fp64, then rounded once
    exact = (var.double() + 1e-3).rsqrt()
    assert torch.equal(constants.scale, exact.to(dtype))
    assert torch.equal(constants.shift, (-mean.double() * exact).to(dtype))


def test_meta_device() -> None:
    meta = torch.empty(C, device="meta")
    assert standardise(meta, meta, 1e-5, G, channel_order=torch.arange(C, device="meta")).gain.is_meta
