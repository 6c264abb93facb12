"""What a GPU has to show before anything is timed on it: plain functions, so that they run without pytest too.

`test_gpu.py` runs them under pytest, `examples/benchmarks/gpu.py` before its first measurement.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.nn.functional as F
from _cases import Case, full_case
from _tolerance import assert_as_good_as
from torch import Tensor

from gnswap import FusedGroupNorm, ops
from gnswap.ops import _reference
from gnswap.ops._backend import choose_backend


@dataclass(frozen=True)
class Setting:
    """One call on the GPU; the sizes are chosen so that every regime is met on sm_80 and on sm_90."""

    shape: tuple[int, ...]
    num_groups: int
    channels_last: bool = False
    ordered: bool = False

    def case(self, dtype: torch.dtype, act: str | None = "relu", mean: float = 0.0) -> Case:
        case = full_case(self.shape, self.num_groups, act, dtype=dtype)
        case = replace(case, x=case.x + mean, channel_order=case.channel_order if self.ordered else None)
        case = case.map(lambda t: t.to(DEVICE))
        if case.channel_order is not None:
            case = replace(case, channel_order=case.channel_order.to(DEVICE))
        if self.channels_last:
            format = torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d
            case = replace(case, x=case.x.to(memory_format=format))
        return case


SETTINGS = {
    "tile": Setting((2, 64, 28, 28), 8),
    "tile, largest": Setting((1, 256, 56, 56), 32),
    "tile, ordered": Setting((2, 64, 14, 14), 4, ordered=True),
    "tile, odd sizes, ordered": Setting((2, 30, 13, 17), 3, ordered=True),
    "flat, 7x7": Setting((2, 256, 7, 7), 4),
    "flat, 14x14": Setting((2, 128, 14, 14), 4),
    "flat, two dimensions": Setting((5, 96), 6),
    "cluster of 2": Setting((1, 64, 64, 64), 4),
    "cluster of 8": Setting((1, 64, 128, 128), 4),
    "split": Setting((1, 64, 200, 304), 4),
    "split, ordered": Setting((2, 36, 160, 160), 3, ordered=True),
    "split, odd sizes": Setting((1, 34, 181, 77), 2),
    "split, one group of many channels": Setting((2, 2048, 7, 7), 1),
    "channels_last tile": Setting((2, 256, 14, 14), 32, channels_last=True),
    "channels_last tile, odd D": Setting((2, 144, 7, 7), 4, channels_last=True),
    "channels_last split": Setting((1, 256, 56, 56), 32, channels_last=True),
    "channels_last split, ordered": Setting((2, 96, 28, 28), 8, channels_last=True, ordered=True),
    "channels_last split, odd sizes": Setting((2, 30, 33, 47), 3, channels_last=True),
    "five dimensions": Setting((2, 32, 5, 12, 12), 8, channels_last=True),
}
# Only the test of these checks themselves sets another one.
DEVICE = "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _leaves(case: Case) -> tuple[Case, dict[str, Tensor]]:
    """The call with all gradients that Triton computes; if these two asked for theirs, all would come from ATen."""
    case, leaves = case.leaves()
    for name in ("channel_scale", "channel_shift"):
        leaves.pop(name).requires_grad_(False)
    return case, leaves


def _gradients(case: Case, dy: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    case, leaves = _leaves(case)
    y = case()
    return y.detach(), dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def triton_is_used() -> None:
    """In both directions."""
    from gnswap.ops._triton import _launch

    for dtype in DTYPES:
        assert choose_backend("cuda", dtype).name == "triton", choose_backend("cuda", dtype).reason
        case = SETTINGS["flat, 7x7"].case(dtype)
        with mock.patch.object(_launch, "backward", wraps=_launch.backward) as backward:
            _gradients(case, torch.ones_like(case.x))
        assert backward.call_count == 1


def is_accurate(setting: Setting, dtype: torch.dtype, act: str | None = "relu", mean: float = 0.0) -> None:
    """Forward and backward against fp64, judged by torch's own arithmetic in the same dtype."""
    case = setting.case(dtype, act, mean)
    dy = torch.randn(setting.shape, device=DEVICE).to(dtype)
    exact, plain = case.map(Tensor.double), case.arguments
    y, gradients = _gradients(case, dy)
    assert_as_good_as(y, _reference.group_norm(*exact.arguments)[0], _reference.group_norm(*plain)[0])
    assert y.stride() == torch.empty_like(case.x).stride()
    truths = _reference.group_norm_backward(dy.double(), *exact.arguments)._asdict()
    plains = _reference.group_norm_backward(dy, *plain)._asdict()
    for name, gradient in gradients.items():
        assert_as_good_as(gradient, truths[name], plains[name])


def batch_does_not_matter(setting: Setting) -> None:
    """The bits of a sample alone and in a batch, and those of two calls."""
    batch = replace(setting, shape=(3, *setting.shape[1:]))
    case = batch.case(torch.float16)
    dy = torch.randn_like(case.x)
    y, gradients = _gradients(case, dy)
    again, gradients_again = _gradients(case, dy)
    assert torch.equal(y, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    y_alone, gradients_alone = _gradients(case.sample(1), dy[1:2])
    assert torch.equal(y[1:2], y_alone)
    assert torch.equal(gradients["x"][1:2], gradients_alone["x"])


def graph_capture(setting: Setting) -> None:
    """A training step captured once and replayed on other data."""
    case = setting.case(torch.float16)
    dy = torch.randn_like(case.x)
    static, leaves = _leaves(case)
    inputs = [leaves["x"], leaves["weight"], leaves["bias"]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            torch.autograd.grad(static(), inputs, dy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = static()
        captured = torch.autograd.grad(y, inputs, dy)
    fresh = torch.randn_like(case.x)
    with torch.no_grad():
        leaves["x"].copy_(fresh)
    graph.replay()
    torch.cuda.synchronize()
    expected_y, expected = _gradients(replace(case, x=fresh), dy)
    assert torch.equal(y, expected_y)
    for found, name in zip(captured, ("x", "weight", "bias"), strict=True):
        assert torch.equal(found, expected[name])


def compiled_step() -> None:
    """torch.compile(fullgraph=True) of a layer between convolutions, forward and backward."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 32, 3), FusedGroupNorm(8, 32, act="silu"), torch.nn.Conv2d(32, 4, 1)]
    model = torch.nn.Sequential(*layers).cuda().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 30, 30, device="cuda").to(memory_format=torch.channels_last)
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().mean(), list(model.parameters()))
    y = torch.compile(model, fullgraph=True)(x)
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    for found, truth in zip(torch.autograd.grad(y.square().mean(), list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-2, atol=1e-4)


def autocast_keeps_the_dtype() -> None:
    layer, x = FusedGroupNorm(8, 32, act="relu").cuda(), torch.randn(2, 32, 9, 9, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def opcheck() -> None:
    torch.library.opcheck(torch.ops.gnswap.group_norm.default, SETTINGS["tile"].case(torch.float32).arguments)


def a_batch_beyond_32_bits() -> None:
    """More than 2**31 elements in a batch, and then in a sample; needs 20 GiB."""
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        return
    x = torch.randn(1, 64, 512, 1024, device="cuda", dtype=torch.float16).repeat(65, 1, 1, 1)
    y = ops.group_norm(x, 32, act="relu")
    assert x.numel() > 2**31
    assert torch.equal(y[-1:], ops.group_norm(x[-1:], 32, act="relu"))
    wide = x.view(1, 65 * 64, 512, 1024)
    y = ops.group_norm(wide, 65 * 2)
    torch.testing.assert_close(y[:, -32:], F.group_norm(wide[:, -32:], 1), rtol=1e-2, atol=1e-2)


def all_checks() -> dict[str, Callable[[], None]]:
    """Every check by name."""
    checks: dict[str, Callable[[], None]] = {"triton is used": triton_is_used}
    for name, setting in SETTINGS.items():
        for dtype in DTYPES:
            checks[f"{name}: accurate in {dtype}"] = functools.partial(is_accurate, setting, dtype)
        checks[f"{name}: batch does not matter"] = functools.partial(batch_does_not_matter, setting)
    for act in (None, *ops.ACTIVATIONS):
        checks[f"accurate with {act}"] = functools.partial(is_accurate, SETTINGS["tile"], torch.float32, act)
    for name in ("tile", "flat, 7x7", "split", "channels_last tile", "channels_last split"):
        far = functools.partial(is_accurate, SETTINGS[name], torch.float32, mean=1000.0)
        checks[f"{name}: accurate at mean/std 1000"] = far
    for name in ("tile", "cluster of 2", "split", "channels_last tile", "channels_last split, ordered"):
        checks[f"{name}: CUDA graph"] = functools.partial(graph_capture, SETTINGS[name])
    for check in (compiled_step, autocast_keeps_the_dtype, opcheck, a_batch_beyond_32_bits):
        checks[check.__name__] = check
    return checks
