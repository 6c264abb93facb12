"""GroupNorm + ReLU as everybody computes it, as calls without arguments that `gpu.py` can time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gnswap import ops
from gnswap.ops._triton._config import Config
from gnswap.ops._triton._config import Problem as Cut

Norm = Callable[..., Tensor]


class Skip(Exception):  # noqa: N818 (it is no error)
    """A contender does not take a problem; says why."""


@dataclass(frozen=True)
class Problem:
    """One input."""

    batch: int
    channels: int
    height: int
    width: int
    groups: int = 32
    channels_last: bool = False
    dtype: torch.dtype = torch.float16
    ordered: bool = False

    def __str__(self) -> str:
        layout = "NHWC" if self.channels_last else "NCHW"
        dtype = str(self.dtype).removeprefix("torch.float")
        order = " ordered" * self.ordered
        return f"N{self.batch} C{self.channels} {self.height}x{self.width} G{self.groups} {layout} fp{dtype}{order}"

    @property
    def bytes(self) -> int:
        """Of the input."""
        return self.batch * self.channels * self.height * self.width * self.dtype.itemsize

    def cut(self, *, backward: bool) -> Cut:
        """What the choice of the kernels sees."""
        per_group = self.channels // self.groups
        sizes = (self.groups, per_group, self.height * self.width, self.dtype.itemsize)
        return Cut(*sizes, channels_last=self.channels_last, ordered=self.ordered, backward=backward, act="relu")

    def order(self, device: str) -> Tensor | None:
        """A channel order, where this problem has one."""
        if not self.ordered:
            return None
        return torch.randperm(self.channels, generator=torch.Generator().manual_seed(0)).to(device)

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight, bias and the gradient of the output; the same every time."""
        rng = torch.Generator(device).manual_seed(0)
        shape = (self.batch, self.channels, self.height, self.width)
        x, dy = (torch.randn(shape, device=device, generator=rng).to(self.dtype) for _ in range(2))
        if self.channels_last:
            x, dy = (t.to(memory_format=torch.channels_last) for t in (x, dy))
        weight, bias = (torch.randn(self.channels, device=device, generator=rng).to(self.dtype) for _ in range(2))
        return x, weight, bias, dy


def gnswap(x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Ours."""
    return ops.group_norm(x, groups, weight, bias, act="relu", channel_order=order)


def gnswap_kernels(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None, *, config: Config
) -> Tensor:
    """Our kernels in a given cut, forward only."""
    from gnswap.ops._triton import _launch

    return _launch.forward(x, groups, weight, bias, 1e-5, "relu", None, None, None, order, config=config)[0]


def eager(x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Torch, with the in-place ReLU, which is the faster one; an order is a gather on each side."""
    if order is None:
        return F.relu(F.group_norm(x, groups, weight, bias), inplace=True)
    y = F.relu(F.group_norm(x[:, order], groups, weight[order], bias[order]), inplace=True)
    return y[:, order.argsort()]


_compiled: Norm = torch.compile(eager, dynamic=False)


def compile(x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """torch.compile of the eager form, for each shape its own."""
    return _compiled(x, groups, weight, bias, order)


def apex(x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """NVIDIA Apex, which takes channels_last and some channel counts, and has no ReLU."""
    if importlib.util.find_spec("apex") is None:
        raise Skip("not installed")
    if order is not None:
        raise Skip("has no channel order")
    if not x.is_contiguous(memory_format=torch.channels_last):
        raise Skip("takes channels_last only")
    from apex.contrib.group_norm import GroupNorm

    module = GroupNorm(groups, x.shape[1], device=x.device, dtype=weight.dtype)
    if x.shape[1] not in module.SUPPORTED_CHANNELS or groups not in module.SUPPORTED_GROUPS:
        raise Skip("has no kernel for these channels")
    module.weight, module.bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
    return F.relu(module(x), inplace=True)


def liger(x: Tensor, groups: int, weight: Tensor, bias: Tensor, order: Tensor | None) -> Tensor:
    """Liger, which copies channels_last."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise Skip("not installed")
    if order is not None:
        raise Skip("has no channel order")
    from liger_kernel.ops.group_norm import LigerGroupNormFunction

    y: Tensor = LigerGroupNormFunction.apply(x, weight, bias, x.shape[1], groups, 1e-5)
    return F.relu(y, inplace=True)


CONTENDERS: dict[str, Norm] = {
    "gnswap": gnswap,
    "gnswap kernels": gnswap_kernels,
    "eager": eager,
    "apex": apex,
    "liger": liger,
    "compile": compile,
}


def step(problem: Problem, norm: Norm, device: str, *, backward: bool, **more: Any) -> Callable[[], tuple[Tensor, ...]]:
    """A call that computes y, or with `backward` y and the gradients of x, weight and bias."""
    x, weight, bias, dy = problem.tensors(device)
    order = problem.order(device)
    if not backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (norm(x, problem.groups, weight, bias, order, **more),)

        return forward
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def forward_and_backward() -> tuple[Tensor, ...]:
        y = norm(x, problem.groups, weight, bias, order, **more)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    return forward_and_backward


def copy(problem: Problem, device: str) -> Callable[[], Tensor]:
    """A call that copies the input on the device: one read and one write."""
    x = problem.tensors(device)[0]
    target = torch.empty_like(x)
    return lambda: target.copy_(x)


def agrees(call: Callable[[], tuple[Tensor, ...]], problem: Problem, device: str, *, backward: bool) -> None:
    """Fail unless a call's results are those of torch in fp32, within what half precision allows."""
    wide = Problem(**{**problem.__dict__, "dtype": torch.float32})
    x, weight, bias, dy = (t.to(problem.dtype).float() for t in wide.tensors(device))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = eager(x, problem.groups, weight, bias, problem.order(device))
    truths = (y.detach(), *torch.autograd.grad(y, leaves, dy)) if backward else (y.detach(),)
    for found, truth in zip(call(), truths, strict=True):
        error = float((found.float() - truth).norm() / truth.norm().clamp_min(1e-30))
        if not error < 2e-2:  # a ReLU's mask flips where the rounded y is at zero
            raise AssertionError(f"{problem}: relative error {error:.2g}")


def cuts(problem: Problem, device: str) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    """The forward in other cuts of the work: one program a group, clusters, chunks of several sizes."""
    rows = 1 << (problem.channels // problem.groups - 1).bit_length()
    columns = 1 << (problem.height * problem.width - 1).bit_length()
    tried = [Config("tile", rows, columns, num_warps=w) for w in (4, 8, 16) if rows * columns // (32 * w) <= 64]
    if torch.cuda.get_device_capability() >= (9, 0):
        sizes = [n for n in (2, 4, 8) if 8192 <= rows * columns <= 32768 * n]
        tried += [Config("cluster", rows, columns, num_warps=8, num_ctas=n) for n in sizes]
    tried += [Config("split", 1, 2048, chunk) for chunk in (2048, 4096, 8192, 16384) if chunk <= columns]
    for config in tried:
        parts = [f"{config.num_warps} warps"]
        parts += [f"{config.num_ctas} CTAs"] if config.num_ctas > 1 else []
        parts += [f"chunks of {config.chunk}"] if config.chunk else []
        call = step(problem, CONTENDERS["gnswap kernels"], device, backward=False, config=config)
        yield f"{config.regime}, {', '.join(parts)}", call
