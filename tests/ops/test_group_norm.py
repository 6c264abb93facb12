"""What group_norm computes: values, gradients, layouts, dtypes and bits."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _cases import Case, full_case, laid_out
from _strategies import cases
from _tolerance import assert_as_good_as, max_error, max_size
from hypothesis import assume, given, settings
from torch import Tensor

from gnswap import ops
from gnswap.ops import _reference
from gnswap.ops._backend import Backend

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ["contiguous", "channels_last", "sliced"]


def gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    case, leaves = case.leaves()
    return dict(zip(leaves, torch.autograd.grad(case(), list(leaves.values()), dy), strict=True))


def exact_gradients(case: Case, dy: Tensor) -> dict[str, Tensor]:
    found = _reference.group_norm_backward(dy.double(), *case.map(Tensor.double).arguments)
    return {name: value for name, value in found._asdict().items() if value is not None}


def torch_norm(case: Case) -> Tensor:
    """The same function spelled with torch's own operations."""
    per_channel = (-1, *[1] * (case.x.ndim - 2))
    order = torch.arange(case.x.shape[1]) if case.channel_order is None else case.channel_order
    u = case.x
    if case.channel_scale is not None:
        u = u * case.channel_scale.view(per_channel)
    if case.channel_shift is not None:
        u = u + case.channel_shift.view(per_channel)
    weight, bias = (None if t is None else t[order] for t in (case.weight, case.bias))
    u = u[:, order].contiguous()
    # not F.group_norm, which refuses to train on one element a group
    sizes = (*u.shape[:2], math.prod(u.shape[2:]))
    y = torch.native_group_norm(u, weight, bias, *sizes, case.num_groups, case.eps)[0][:, order.argsort()]
    if case.residual is not None:
        y = y + case.residual
    return y if case.act is None else getattr(F, case.act)(y)


# ---------------------------------------------------------------- values


@given(cases())
def test_forward_is_as_accurate_as_torch(case: Case) -> None:
    exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
    kept = case.x.clone()
    assert_as_good_as(case(), exact, torch_norm(case))
    assert torch.equal(case.x, kept)


@given(cases())
def test_backward_is_as_accurate_as_torch(case: Case) -> None:
    # away from the kinks, where another rounding of the pre-activation would be another derivative
    if case.act in ("relu", "relu6", "leaky_relu", "hardswish"):
        case = replace(case, act="silu")
    # a group of nearly equal numbers has no digits to judge by: its gradient grows with rstd squared
    assume(_reference.group_norm(*case.arguments)[2].max() < 10)
    dy = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(1))
    exact = exact_gradients(case, dy)
    leaves = (tracked := case.leaves())[1]
    theirs = dict(zip(leaves, torch.autograd.grad(torch_norm(tracked[0]), list(leaves.values()), dy), strict=True))
    found = gradients(case, dy)
    assert set(found) == set(exact)
    size = max_size(*exact.values())
    for name, gradient in found.items():
        assert gradient.dtype == getattr(case, name).dtype
        assert_as_good_as(gradient, exact[name], theirs[name], size=size)


@pytest.mark.parametrize("act", [None, *ops.ACTIVATIONS])
def test_gradcheck_and_gradgradcheck(act: str | None) -> None:
    case, leaves = full_case((2, 6, 3), act=act, dtype=torch.float64).leaves()

    def function(*tensors: Tensor) -> Tensor:
        return replace(case, **dict(zip(leaves, tensors, strict=True)))()

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_gradients_only_where_asked() -> None:
    case = full_case()
    names = ("weight", "bias", "channel_scale", "channel_shift", "residual", "x")
    everything = gradients(case, dy := torch.randn_like(case.x))
    for name in names:
        leaf = getattr(case, name).clone().requires_grad_()
        replace(case, **{name: leaf})().backward(dy)
        assert torch.equal(leaf.grad, everything[name])


def test_third_derivative() -> None:
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)

    def second(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(ops.group_norm(x, 2, act="gelu").pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, (x,))


@pytest.mark.parametrize("shape", [(4, 12), (4, 12, 9), (4, 12, 5, 7), (4, 12, 3, 2, 5)])
def test_plain_call_on_aten_is_torch_group_norm_to_the_bit(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gnswap.ops._op.choose_backend", lambda *_: Backend("aten", "a test"))
    case = replace(full_case(shape, 3), residual=None, act=None, channel_scale=None, channel_shift=None)
    case = replace(case, channel_order=None)
    assert torch.equal(case(), F.group_norm(case.x, 3, case.weight, case.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_claim_1_one_group_is_layer_norm(dtype: torch.dtype) -> None:
    x = torch.randn(3, 6, 5, 7, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    exact_x = x.detach().double().requires_grad_()
    exact = F.layer_norm(exact_x, exact_x.shape[1:])
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    theirs = F.layer_norm(x, x.shape[1:])
    ours = ops.group_norm(x, 1)
    assert_as_good_as(ours, exact, theirs)
    assert_as_good_as(torch.autograd.grad(ours, x, dy)[0], exact_dx, torch.autograd.grad(theirs, x, dy)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_claim_1_as_many_groups_as_channels_is_instance_norm(dtype: torch.dtype) -> None:
    x = torch.randn(3, 6, 5, 7, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    exact_x = x.detach().double().requires_grad_()
    exact = F.instance_norm(exact_x)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    theirs = F.instance_norm(x)
    ours = ops.group_norm(x, 6)
    assert_as_good_as(ours, exact, theirs)
    assert_as_good_as(torch.autograd.grad(ours, x, dy)[0], exact_dx, torch.autograd.grad(theirs, x, dy)[0])


def test_an_order_is_a_permutation_before_and_after() -> None:
    case = replace(full_case(act="relu"), channel_order=None)
    order = torch.randperm(6)
    inverse = order.argsort()
    permuted = replace(
        case,
        x=case.x[:, order],
        residual=case.residual[:, order],
        **{name: getattr(case, name)[order] for name in ("weight", "bias", "channel_scale", "channel_shift")},
    )
    assert torch.equal(replace(case, channel_order=order)(), permuted()[:, inverse])


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("mean", [10.0, 1000.0])
class TestPitfall28LargeMean:
    """Mean over deviation 1000, where E[x²] - E[x]² has no digits left (and torch's channels_last kernel none)."""

    def test_forward_and_backward(self, layout: str, mean: float) -> None:
        rng = torch.Generator().manual_seed(0)
        x = laid_out(torch.randn(2, 8, 33, 32, generator=rng) + mean, layout)
        case = Case(x, 2, torch.randn(8, generator=rng), torch.randn(8, generator=rng))
        dy = torch.randn(x.shape, generator=rng)
        exact_dx = exact_gradients(case, dy)
        exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
        contiguous = replace(case, x=x.contiguous())
        leaves = contiguous.leaves()[1]
        y = F.group_norm(leaves["x"], 2, leaves["weight"], leaves["bias"])
        theirs = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))

        assert_as_good_as(case(), exact, y)
        for name, gradient in gradients(case, dy).items():
            assert_as_good_as(gradient, exact_dx[name], theirs[name])

    def test_the_reference_too(self, layout: str, mean: float) -> None:
        x = laid_out(torch.randn(2, 8, 33, 32, generator=torch.Generator().manual_seed(0)) + mean, layout)
        case = Case(x, 2)
        exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
        found = _reference.group_norm(*case.arguments)[0]
        assert_as_good_as(found, exact, F.group_norm(x.contiguous(), 2))


def test_pitfall_28_strides_that_only_look_like_channels_last() -> None:
    """`[N, C, 1, 1]` in channels_last is contiguous too, and ATen then takes its uncentred kernel."""
    x = (torch.randn(4, 16, 1, 1, generator=torch.Generator().manual_seed(0)) + 1000).to(
        memory_format=torch.channels_last
    )
    assert x.is_contiguous()
    exact = F.group_norm(x.double().reshape(4, 16), 2)[..., None, None]
    assert_as_good_as(ops.group_norm(x, 2), exact, F.group_norm(x.reshape(4, 16), 2)[..., None, None])


def test_the_table_refuses_the_uncentred_form() -> None:
    """torch's own channels_last kernel does not pass the tolerance that ours does."""
    x = torch.randn(2, 8, 33, 32, generator=torch.Generator().manual_seed(0)) + 1000
    exact = F.group_norm(x.double(), 2)
    uncentred = F.group_norm(x.to(memory_format=torch.channels_last), 2)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as(uncentred, exact, F.group_norm(x, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("param_dtype", [torch.float32, "same"])
def test_half_types_are_computed_in_fp32_and_rounded_once(dtype: torch.dtype, param_dtype: Any) -> None:
    case = full_case((3, 12, 5, 7), 3)
    case = replace(case.map(lambda t: t.to(param_dtype if param_dtype != "same" else dtype)), x=case.x.to(dtype))
    exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
    y = case()
    assert y.dtype == dtype
    in_fp32 = case.map(Tensor.float)()
    assert torch.equal(y, in_fp32.to(dtype))
    assert_as_good_as(y, exact)

    dy = torch.randn(y.shape).to(dtype)
    for name, gradient in gradients(case, dy).items():
        assert gradient.dtype == getattr(case, name).dtype
        assert_as_good_as(gradient, exact_gradients(case, dy)[name])


def test_fp16_values_whose_square_overflows() -> None:
    x = (torch.randn(2, 8, 6, 6) * 3000).half()
    assert x.abs().max() > 256
    exact = F.group_norm(x.double(), 2)
    assert_as_good_as(ops.group_norm(x, 2), exact)
    dx = gradients(Case(x, 2), dy := torch.randn(x.shape).half())["x"]
    assert_as_good_as(dx, exact_gradients(Case(x, 2), dy)["x"])


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_variance_gives_the_bias_and_a_bounded_gradient(dtype: torch.dtype) -> None:
    case = Case(torch.full((2, 4, 5), 0.1, dtype=dtype), 2, torch.ones(4), torch.arange(4.0))
    expected = torch.arange(4.0)[None, :, None].expand(2, 4, 5)
    # exact in our kernels; ATen's mean of many 0.1 may be a rounding away, which 1/sqrt(eps) makes larger
    torch.testing.assert_close(case().float(), expected, rtol=0, atol=1e-6)
    dx = gradients(case, torch.randn(2, 4, 5).to(dtype))["x"]
    assert dx.isfinite().all()
    assert dx.abs().max() < 4 / case.eps**0.5


@pytest.mark.parametrize("backend", ["cpp", "aten", "reference"])
def test_a_single_element_is_exactly_zero(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnswap.ops._op.choose_backend", lambda *_: Backend(backend, "a test"))
    x = 30 + torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.group_norm(x, 6, 3 * torch.rand(6)), torch.zeros(50, 6))


def test_groups_of_a_single_element_normalise_to_zero() -> None:
    """D*S = 1: torch's nn.GroupNorm raises for N = 1 here; variance 0 has a well-defined answer."""
    case = replace(full_case((3, 6), 6, "relu"), channel_scale=None, channel_shift=None)
    assert_as_good_as(case(), torch.relu(case.bias + case.residual).double(), torch_norm(case))
    assert torch.equal(gradients(case, torch.randn(3, 6))["x"], torch.zeros(3, 6))


@pytest.mark.parametrize("shape", [(3, 1), (3, 1, 4), (3, 1, 4, 5), (1, 1, 1, 1, 1)])
def test_one_channel(shape: tuple[int, ...]) -> None:
    case = full_case(shape, 1)
    assert_as_good_as(case(), _reference.group_norm(*case.map(Tensor.double).arguments)[0], torch_norm(case))


@pytest.mark.parametrize("shape", [(0, 6), (0, 6, 4, 4), (2, 6, 0, 4)])
def test_empty_input(shape: tuple[int, ...]) -> None:
    case = full_case(shape)
    assert case().shape == shape
    found = gradients(case, torch.empty(shape))
    assert found["x"].shape == shape
    for name in ("weight", "bias", "channel_scale", "channel_shift"):
        assert torch.equal(found[name], torch.zeros(6))


@pytest.mark.parametrize("channels", [1, 3, 17, 24, 144, 4096])
def test_channel_counts(channels: int) -> None:
    for num_groups in {1, channels}:
        case = full_case((2, channels, 3), num_groups)
        exact = _reference.group_norm(*case.map(Tensor.double).arguments)[0]
        assert_as_good_as(case(), exact, torch_norm(case))


def test_nan_stays_in_its_group_and_is_not_hidden() -> None:
    x = torch.randn(2, 4, 5)
    x[0, 0, 0] = torch.nan
    y = ops.group_norm(x, 2, act="relu")
    assert y[0, :2].isnan().all()
    assert y[0, 2:].isfinite().all()
    assert y[1].isfinite().all()


# ---------------------------------------------------------------- bits


@settings(max_examples=150)
@given(cases())
def test_claim_2_a_sample_has_the_same_bits_alone_and_in_a_batch(case: Case) -> None:
    y = case()
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    dx = gradients(case, dy)["x"]
    for n in range(len(y)):
        alone = case.sample(n)
        assert torch.equal(y[n : n + 1], alone())
        assert torch.equal(dx[n : n + 1], gradients(alone, dy[n : n + 1])["x"])


def test_claim_2_at_a_size_that_torch_splits_over_threads() -> None:
    case = full_case((3, 24, 61, 67), 4)
    y = case()
    for n in range(3):
        assert torch.equal(y[n : n + 1], case.sample(n)())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_bits_twice(layout: str) -> None:
    case = full_case((4, 12, 19, 23), 3)
    case = replace(case, x=laid_out(case.x, layout))
    dy = torch.randn_like(case.x)
    assert torch.equal(case(), case())
    first, second = gradients(case, dy), gradients(case, dy)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (2, 6, 3, 4, 5)])
def test_pitfall_31_layout_changes_nothing_and_channels_last_is_kept(shape: tuple[int, ...]) -> None:
    case = full_case(shape)
    y = case()
    assert y.is_contiguous()
    dy = torch.randn(shape)
    dx = gradients(case, dy)["x"]
    channels_last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    for layout in LAYOUTS:
        same = replace(case, x=laid_out(case.x, layout))
        same_dx = gradients(same, laid_out(dy, layout))["x"]
        # another layout is another order of summation
        torch.testing.assert_close(same(), y)
        torch.testing.assert_close(same_dx, dx)
        if layout == "channels_last":
            assert same().is_contiguous(memory_format=channels_last)
            assert same_dx.is_contiguous(memory_format=channels_last)


def test_a_slice_of_channels_last_gives_channels_last() -> None:
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)[:, :4, ::2]
    assert ops.group_norm(x, 2).is_contiguous(memory_format=torch.channels_last)


def test_an_expanded_input_and_gradient() -> None:
    x = torch.randn(2, 6, 1, 1).expand(2, 6, 4, 4)
    torch.testing.assert_close(ops.group_norm(x, 2), ops.group_norm(x.contiguous(), 2))
    leaf = torch.randn(2, 6, 4, 4, requires_grad=True)
    ops.group_norm(leaf, 2, act="silu").sum().backward()
    assert max_error(leaf.grad, exact_gradients(Case(leaf.detach(), 2, act="silu"), torch.ones(2, 6, 4, 4))["x"]) < 1e-5
