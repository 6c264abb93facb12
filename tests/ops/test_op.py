"""The op inside torch's systems: opcheck, fake and meta tensors, compile, export, autocast, torch.func, errors."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from _cases import Case, full_case, laid_out
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from gnswap import ops
from gnswap._errors import ArgumentError
from gnswap.ops import _reference
from gnswap.ops._backend import Backend
from gnswap.ops._op import group_norm_backward_op, group_norm_op

OP = torch.ops.gnswap.group_norm.default
BACKWARD_OP = torch.ops.gnswap.group_norm_backward.default


class Norm(nn.Module):
    """A convolution and a norm that uses every argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.case = full_case()
        for name in ("weight", "bias", "channel_scale", "channel_shift"):
            self.register_parameter(name, nn.Parameter(getattr(self.case, name)))
        self.register_buffer("channel_order", self.case.channel_order)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        names = ("channel_scale", "channel_shift", "channel_order")
        keywords = {name: getattr(self, name) for name in names}
        return ops.group_norm(x, 2, self.weight, self.bias, act="silu", residual=2 * x, **keywords)


# ---------------------------------------------------------------- registration


# opcheck clones its arguments and then looks at .grad of the clones
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        Case(torch.randn(2, 4, 3), 2),
        full_case(),
        full_case().leaves()[0],
        replace(full_case(), x=laid_out(full_case().x, "channels_last")).leaves()[0],
        full_case((2, 6, 2, 3, 2)).map(Tensor.bfloat16),
    ],
    ids=["plain", "full", "full with gradients", "channels_last with gradients", "5-D bf16"],
)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(group_norm_op, case.arguments)


@pytest.mark.parametrize("mask", [[True] * 6, [False, True, False, True, False, False]])
def test_opcheck_of_the_backward(mask: list[bool]) -> None:
    case = full_case()
    _, mean, rstd = group_norm_op(*case.arguments)
    x, *rest = case.arguments
    torch.library.opcheck(group_norm_backward_op, (torch.randn_like(x), x, mean, rstd, *rest, mask))


def test_statistics_of_the_op() -> None:
    case = full_case().map(Tensor.half)
    _, mean, rstd = OP(*case.arguments)
    _, exact_mean, exact_rstd = _reference.group_norm(*case.map(Tensor.double).arguments)
    assert mean.dtype == rstd.dtype == torch.float32
    torch.testing.assert_close(mean.double(), exact_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-5, atol=0)
    y, mean, rstd = OP(*full_case().leaves()[0].arguments)
    assert y.requires_grad
    assert not mean.requires_grad
    assert not rstd.requires_grad


def test_the_reference_serves_where_aten_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    case = full_case()
    y, dy = case(), torch.randn(2, 6, 3, 5)
    monkeypatch.setattr("gnswap.ops._op.choose_backend", lambda *_: Backend("reference", "a test"))
    monkeypatch.setattr("gnswap.ops._op._aten.group_norm", lambda *_: pytest.fail("ATen was called"))
    monkeypatch.setattr("gnswap.ops._op._aten.group_norm_backward", lambda *_: pytest.fail("ATen was called"))
    case, leaves = case.leaves()
    found = case()
    torch.testing.assert_close(found, y)
    expected = _reference.group_norm_backward(dy, *case.arguments)._asdict()
    for name, gradient in zip(leaves, torch.autograd.grad(found, list(leaves.values()), dy), strict=True):
        torch.testing.assert_close(gradient, expected[name])


# ---------------------------------------------------------------- without data


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_and_meta_tensors_have_the_real_strides(layout: str, dtype: torch.dtype) -> None:
    case = full_case().map(lambda t: t.to(dtype))
    case = replace(case, x=laid_out(case.x, layout))
    y = case()
    with FakeTensorMode() as mode:
        fake = replace(case.map(mode.from_tensor), channel_order=mode.from_tensor(case.channel_order))()
    meta = replace(case.map(lambda t: t.to("meta")), channel_order=case.channel_order.to("meta"))()
    for other in (fake, meta):
        assert other.shape == y.shape
        assert other.dtype == y.dtype
        assert other.stride() == y.stride()


def test_backward_on_the_meta_device() -> None:
    x = torch.empty(2, 6, 3, device="meta", requires_grad=True)
    ops.group_norm(x, 2, act="relu").sum().backward()
    assert x.grad.shape == x.shape


# ---------------------------------------------------------------- compile, export, autocast


class Recorder:
    """An aot_eager that keeps the names of the operators of every graph."""

    def __init__(self) -> None:
        self.targets: list[Any] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def keep(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
            self.targets += [node.target for node in graph.graph.nodes]
            return make_boxed_func(graph.forward)

        return aot_autograd(fw_compiler=keep, bw_compiler=keep)(graph, inputs)


def test_compile_captures_both_ops_whole() -> None:
    torch.manual_seed(0)
    model, x = Norm(), torch.randn(2, 3, 7, 8)
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    recorder = Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder, dynamic=False)
    y = compiled(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    assert recorder.targets.count(OP) == 1
    assert recorder.targets.count(BACKWARD_OP) == 1


def test_compile_with_changing_sizes_and_channels_last() -> None:
    model = Norm().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for shape in ((2, 3, 7, 8), (5, 3, 9, 6)):
            x = torch.randn(shape).to(memory_format=torch.channels_last)
            torch.testing.assert_close(compiled(x), model(x))


def test_export_with_dynamic_sizes_keeps_the_op() -> None:
    model = Norm().eval()
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (torch.randn(2, 3, 7, 8),), dynamic_shapes=(sizes,))
    program = program.run_decompositions()
    assert [node.target for node in program.graph.nodes].count(OP) == 1
    x = torch.randn(5, 3, 11, 6)
    assert torch.equal(program.module()(x), model(x))


def test_autocast_keeps_the_dtype_of_the_input() -> None:
    model, x = Norm(), torch.randn(2, 3, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        convolved = model.conv(x)
        y = model(x)
        y.float().sum().backward()
        case = replace(full_case(), x=convolved.detach(), residual=2 * convolved.detach())
    assert convolved.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, case())
    assert model.weight.grad.dtype == torch.float32


# ---------------------------------------------------------------- torch.func and other modes


# torch's own forward-mode formulas are built with its deprecated torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
class TestTransforms:
    """Right everywhere, because a custom op inside torch.func is not: see `gnswap.ops._op.run`."""

    case = full_case((2, 6, 5), dtype=torch.float64)

    def norm(self, x: Tensor, residual: Tensor) -> Tensor:
        return replace(self.case, x=x, residual=residual)()

    def test_vmap(self) -> None:
        xs, residuals = torch.randn(2, 3, 2, 6, 5, dtype=torch.float64)
        found = torch.vmap(self.norm)(xs, residuals)
        expected = torch.stack([self.norm(x, r) for x, r in zip(xs, residuals, strict=True)])
        torch.testing.assert_close(found, expected)

    def test_vmap_of_channels_last(self) -> None:
        xs = torch.randn(3, 2, 5, 5, 4).permute(0, 1, 4, 2, 3)
        torch.testing.assert_close(
            torch.vmap(lambda x: ops.group_norm(x, 2))(xs), torch.stack([ops.group_norm(x, 2) for x in xs])
        )

    def test_gradients_per_sample(self) -> None:
        def loss(weight: Tensor, x: Tensor) -> Tensor:
            return ops.group_norm(x[None], 2, weight, act="gelu").square().sum()

        x = self.case.x
        found = torch.vmap(torch.func.grad(loss), (None, 0))(self.case.weight, x)
        for row, sample in zip(found, x, strict=True):
            weight = self.case.weight.clone().requires_grad_()
            loss(weight, sample).backward()
            torch.testing.assert_close(row, weight.grad)

    def test_forward_mode_is_not_silently_zero(self) -> None:
        x, tangent = self.case.x, torch.randn_like(self.case.x)
        step = 1e-6
        difference = (self.norm(x + step * tangent, x) - self.norm(x - step * tangent, x)) / (2 * step)
        _, jvp = torch.func.jvp(lambda x: self.norm(x, self.case.x), (x,), (tangent,))
        torch.testing.assert_close(jvp, difference, rtol=1e-6, atol=1e-8)
        with forward_ad.dual_level():
            dual = self.norm(forward_ad.make_dual(x, tangent), self.case.x)
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, jvp)

    def test_batched_gradients(self) -> None:
        case, leaves = self.case.leaves()
        y = case()
        dys = torch.randn(3, *y.shape, dtype=torch.float64)
        inputs = list(leaves.values())
        found = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
        for n, dy in enumerate(dys):
            one = torch.autograd.grad(y, inputs, dy, retain_graph=True)
            assert all(torch.equal(many[n], single) for many, single in zip(found, one, strict=True))

    def test_hessian(self) -> None:
        x = self.case.x[:1]
        by_func = torch.func.hessian(lambda x: ops.group_norm(x, 2, act="silu").square().sum())(x)
        by_autograd = torch.autograd.functional.hessian(lambda x: ops.group_norm(x, 2, act="silu").square().sum(), x)
        torch.testing.assert_close(by_func, by_autograd)


def test_inference_mode() -> None:
    case = full_case()
    with torch.inference_mode():
        assert torch.equal(case(), full_case()())


def test_activation_checkpointing() -> None:
    case, leaves = full_case().leaves()
    plain = torch.autograd.grad(case().sum(), list(leaves.values()))
    again = torch.autograd.grad(checkpoint(case, use_reentrant=False).sum(), list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(6)}, r"number of dimensions .*expected 2 to 5.*found shape \(6,\)"),
        ({"x": torch.randn(1, 6, 1, 1, 1, 1)}, "number of dimensions"),
        ({"x": torch.ones(2, 6, 3, 5, dtype=torch.int64)}, r"x has a dtype .*found torch\.int64"),
        ({"x": torch.ones(2, 6, 3, 5, dtype=torch.complex64)}, r"x has a dtype .*found torch\.complex64"),
        ({"num_groups": 4}, "num_groups must divide .*expected a divisor of 6, found 4"),
        ({"num_groups": 0}, "num_groups must divide"),
        ({"x": torch.empty(2, 0, 3)}, "num_groups must divide"),
        ({"eps": -1e-5}, "eps is negative"),
        ({"eps": float("nan")}, "eps is negative"),
        ({"act": "tanh"}, "unknown activation .*expected one of relu, .*found 'tanh'"),
        ({"residual": torch.randn(2, 6, 3, 1)}, r"residual and x differ .*\(2, 6, 3, 5\), found \(2, 6, 3, 1\)"),
        ({"residual": torch.ones(2, 6, 3, 5, dtype=torch.int64)}, "residual has the wrong dtype"),
        ({"weight": torch.ones(2)}, r"weight does not fit .*expected shape \(6,\), found \(2,\)"),
        ({"bias": torch.ones(6, 1)}, "bias does not fit"),
        ({"channel_scale": torch.ones(5)}, "channel_scale does not fit"),
        ({"channel_shift": torch.ones(7)}, "channel_shift does not fit"),
        ({"weight": torch.ones(6, dtype=torch.int32)}, "weight has the wrong dtype"),
        ({"channel_order": torch.arange(5)}, "channel_order does not fit"),
        ({"channel_order": torch.arange(6, dtype=torch.int32)}, r"channel_order has the wrong dtype .*torch\.int64"),
        ({"channel_order": torch.tensor([0, 1, 2, 3, 4, 4])}, r"not a permutation .*found \[0, 1, 2, 3, 4, 4\]"),
        ({"bias": torch.ones(6, device="meta")}, "bias is on another device .*expected cpu, found meta"),
    ],
)
def test_arguments_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        replace(full_case(), **changes)()


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case, leaves = full_case().leaves()
        torch.autograd.grad(case().sum(), list(leaves.values()), create_graph=True)[0].sum().backward()
