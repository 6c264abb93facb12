"""Random arguments of `group_norm`; without pytest and hypothesis, for the checks on a GPU have neither."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from gnswap import ops


@dataclass(frozen=True)
class Case:
    """One call of `group_norm`; the tensors are None where the argument is left out."""

    x: Tensor
    num_groups: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-5
    act: str | None = None
    residual: Tensor | None = None
    channel_scale: Tensor | None = None
    channel_shift: Tensor | None = None
    channel_order: Tensor | None = None

    def __call__(self) -> Tensor:
        keywords = {field.name: getattr(self, field.name) for field in fields(self)[5:]}
        return ops.group_norm(self.x, self.num_groups, self.weight, self.bias, self.eps, **keywords)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All arguments by position, as the registered op takes them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def sample(self, n: int) -> Case:
        """The same call on one sample of the batch."""
        residual = None if self.residual is None else self.residual[n : n + 1]
        return replace(self, x=self.x[n : n + 1], residual=residual)

    def map(self, function: Any) -> Case:
        """The same call with `function` applied to every floating point tensor."""
        changed = {
            field.name: function(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor) and value.is_floating_point()
        }
        return replace(self, **changed)

    def leaves(self) -> tuple[Case, dict[str, Tensor]]:
        """The same call on leaves that require gradients, and these leaves by name."""
        case = self.map(lambda t: t.detach().clone().requires_grad_())
        names = [field.name for field in fields(case)]
        tensors = {name: getattr(case, name) for name in names}
        return case, {k: v for k, v in tensors.items() if isinstance(v, Tensor) and v.requires_grad}


def full_case(
    shape: tuple[int, ...] = (2, 6, 3, 5),
    num_groups: int = 2,
    act: str | None = "silu",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """A call that uses every argument, with gains of both signs."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype)

    c = shape[1]
    return Case(
        x=randn(*shape),
        num_groups=num_groups,
        weight=randn(c),
        bias=randn(c),
        act=act,
        residual=randn(*shape),
        # both signs, away from zero: a channel without variance is a test of its own
        channel_scale=randn(c).sign() * (0.5 + torch.rand(c, generator=rng, dtype=torch.float64).to(dtype)),
        channel_shift=randn(c),
        channel_order=torch.randperm(c, generator=rng),
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in another layout: contiguous, channels_last (4-D, 5-D) or a slice of something bigger."""
    if layout == "channels_last" and x.ndim >= 4:
        return x.to(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)
    if layout == "sliced":
        bigger = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype)
        bigger[..., ::2] = x
        return bigger[..., ::2]
    return x
