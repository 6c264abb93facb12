"""The host side: chooses the cut, allocates results and launches the kernels.

Nothing here reads a value back from the device, so a call can be captured in a CUDA graph. Who compiles kernels
without a GPU passes its own `run` and tensors without data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gnswap.ops._reference import Gradients, memory_format
from gnswap.ops._triton import _kernels_channels_last as last
from gnswap.ops._triton import _kernels_channels_last_backward as last_backward
from gnswap.ops._triton import _kernels_split as split
from gnswap.ops._triton import _kernels_tile as tile
from gnswap.ops._triton._config import Config, Machine, Problem, choose_config, power_of_two

# Offsets in a sample are 32-bit below this many elements.
_FIRST_WIDE = 2**31
# Partial results that a merging program loads at once: of a group, and of a block of channels.
_MERGED_AT_ONCE, _SUMMED_AT_ONCE = 4096, 32

#: (kernel, programs, arguments, num_warps, num_ctas) -> launches it
Run = Callable[[Any, int, dict[str, Any], int, int], None]


def launch(kernel: Any, programs: int, arguments: dict[str, Any], num_warps: int, num_ctas: int) -> None:
    """Launch on the current stream of the current device."""
    kernel[(programs,)](**arguments, num_warps=num_warps, num_ctas=num_ctas)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The GPU that a tensor is on."""
    properties = torch.cuda.get_device_properties(device)
    return Machine(properties.multi_processor_count, properties.major * 10 + properties.minor)


class Call:
    """What both directions need to know of `x`, and the launching of one kernel after another."""

    def __init__(
        self,
        x: Tensor,
        num_groups: int,
        act: str | None,
        residual: bool,
        ordered: bool,
        backward: bool,
        machine: Machine | None,
        config: Config | None,
        run: Run,
    ) -> None:
        self.format = memory_format(x)
        self.x = x.contiguous(memory_format=self.format)
        self.n, self.c, self.g = x.shape[0], x.shape[1], num_groups
        self.d, self.s = self.c // num_groups, math.prod(x.shape[2:])
        self.problem = Problem(
            num_groups,
            self.d,
            self.s,
            x.element_size(),
            channels_last=self.format != torch.contiguous_format,
            ordered=ordered,
            backward=backward,
            act=act,
            residual=residual,
        )
        self.config = config or choose_config(self.problem, machine or machine_of(x.device))
        self.run = run
        wide = self.c * self.s >= _FIRST_WIDE
        self.sizes: dict[str, Any] = {"G": num_groups, "D": self.d, "WIDE": wide}
        if self.problem.channels_last:
            self.sizes["S"] = self.s
        else:
            # A row is handed over as units * ALIGN, because the compiler sees the alignment of constants only.
            row = self.d * self.s if self.config.regime == "flat" else self.s
            align = math.gcd(row, 16)
            self.sizes |= {"row_units": row // align, "ALIGN": align}

    @property
    def parts(self) -> tuple[int, int]:
        """Chunks of a group (or, in channels_last, of a sample) down its channels and along its positions."""
        across = math.ceil(self.s / self.config.chunk)
        down = 1 if self.problem.channels_last else math.ceil(self.d / self.config.rows)
        return down, across

    def launch(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Launch one kernel with the warps of the configuration."""
        self.run(kernel, programs, arguments, self.config.num_warps, self.config.num_ctas)

    def small(self, kernel: Any, programs: int, **arguments: Any) -> None:
        """Launch one of the kernels that only merge partial results."""
        self.run(kernel, programs, arguments, 4, 1)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Device memory, not initialised."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)

    def like_x(self, t: Tensor | None) -> Tensor | None:
        """`t` in the memory format of `x`."""
        return None if t is None else t.contiguous(memory_format=self.format)

    def group_of(self, order: Tensor | None) -> Tensor | None:
        """The group of each channel, or None for the natural order."""
        if order is None:
            return None
        group_of = self.new(self.c, dtype=torch.int32)
        programs = math.ceil(self.c / 1024)
        self.small(last.group_of_channel, programs, order=order, group_of=group_of, C=self.c, D=self.d, BLOCK=1024)
        return group_of


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
    *,
    machine: Machine | None = None,
    config: Config | None = None,
    run: Run = launch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward; arguments and results as in `_reference.group_norm`. `x` must not be empty.

    Args:
        machine: the GPU to cut the work for; that of `x` where None.
        config: a cut to use instead of the chosen one.
        run: what launches a kernel.
    """
    call = Call(x, num_groups, act, residual is not None, channel_order is not None, False, machine, config, run)
    weight, bias, channel_scale, channel_shift, channel_order = map(
        _dense, (weight, bias, channel_scale, channel_shift, channel_order)
    )
    y = torch.empty_like(call.x)
    mean, rstd = call.new(call.n, call.g), call.new(call.n, call.g)
    standard = {"scale": channel_scale, "shift": channel_shift}
    affine = {"weight": weight, "bias": bias, "residual": call.like_x(residual), **standard, "ACT": act}
    statistics = {"mean_out": mean, "rstd_out": rstd}
    config, sizes = call.config, call.sizes
    down, across = call.parts if config.chunk else (1, 1)
    groups = call.n * call.g

    if config.regime == "channels_last_tile":
        k = max(1, config.columns // call.d)
        blocks = {"BLOCK_S": config.rows, "K": k, "LANES": config.columns // k}
        programs = call.n * math.ceil(call.g / k)
        call.launch(
            last.channels_last_forward, programs, x=call.x, y=y, eps=eps, **statistics, **affine, **sizes, **blocks
        )
    elif config.regime == "channels_last_split":
        slab = {"BLOCK_S": config.rows, "BLOCK_C": config.columns, "CHUNK": config.chunk}
        programs = call.n * across * math.ceil(call.c / config.columns)
        of_parts = {name: call.new(call.n, across, call.c) for name in ("mean_parts", "moment_parts")}
        call.launch(
            last.slab_moments,
            programs,
            x=call.x,
            S=call.s,
            C=call.c,
            WIDE=sizes["WIDE"],
            **of_parts,
            **standard,
            **slab,
        )
        merged = _merge_blocks(call, across)
        call.small(last.slab_statistics, groups, order=channel_order, eps=eps, **of_parts, **statistics, **merged)
        group_of = call.group_of(channel_order)
        call.launch(
            last.slab_apply,
            programs,
            x=call.x,
            y=y,
            mean_in=mean,
            rstd_in=rstd,
            group_of=group_of,
            **affine,
            **sizes,
            **slab,
        )
    elif config.regime == "split":
        blocks = {"BLOCK_D": config.rows, "BLOCK_S": config.columns, "CHUNK": config.chunk}
        programs = groups * down * across
        parts = call.new(programs, 4)
        shared = {"x": call.x, "parts": parts, "order": channel_order, **sizes, **blocks}
        call.launch(split.split_moments, programs, **shared, **standard)
        call.launch(
            split.split_apply,
            programs,
            y=y,
            eps=eps,
            BLOCK_P=power_of_two(down * across),
            **shared,
            **statistics,
            **affine,
        )
    else:
        blocks = {"BLOCK_D": config.rows, "BLOCK_S": config.columns, "FLAT": config.regime == "flat"}
        call.launch(
            tile.tile_forward,
            groups,
            x=call.x,
            y=y,
            order=channel_order,
            eps=eps,
            **statistics,
            **affine,
            **sizes,
            **blocks,
        )
    return y, mean, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    act: str | None,
    residual: Tensor | None,
    channel_scale: Tensor | None,
    channel_shift: Tensor | None,
    channel_order: Tensor | None,
    mask: list[bool],
    *,
    machine: Machine | None = None,
    config: Config | None = None,
    run: Run = launch,
) -> Gradients:
    """Backward from saved statistics; `machine`, `config` and `run` as in `forward`. `x` must not be empty.

    `mask` says which of the six gradients are wanted. Those of `channel_scale` and `channel_shift` are not computed
    here: they are constants of a conversion, so `_aten` has to do for whoever trains them.
    """
    call = Call(x, num_groups, act, residual is not None, channel_order is not None, True, machine, config, run)
    weight, bias, channel_scale, channel_shift, channel_order = map(
        _dense, (weight, bias, channel_scale, channel_shift, channel_order)
    )
    _, need_weight, need_bias, need_residual, _, _ = mask
    config, sizes = call.config, call.sizes
    down, across = call.parts if config.chunk else (1, 1)
    dx = torch.empty_like(call.x)
    like = call.like_x(residual)
    dresidual = torch.empty_like(like) if need_residual and like is not None else None
    splits = call.n * across
    needs_parts = need_weight or need_bias or config.regime == "channels_last_split"
    parts = {name: call.new(splits, call.c) if needs_parts else None for name in ("dweight_parts", "dbias_parts")}
    inputs = {"dy": call.like_x(dy), "x": call.x, "mean_in": mean, "rstd_in": rstd}
    affine = {"weight": weight, "bias": bias, "residual": like, "scale": channel_scale, "shift": channel_shift}
    shared = {**inputs, **affine, **sizes, "ACT": act}
    results = {"dx": dx, "dresidual": dresidual}
    groups = call.n * call.g

    if config.regime == "channels_last_tile":
        k = max(1, config.columns // call.d)
        blocks = {"BLOCK_S": config.rows, "K": k, "LANES": config.columns // k}
        programs = call.n * math.ceil(call.g / k)
        call.launch(last.channels_last_backward, programs, **shared, **results, **parts, **blocks)
    elif config.regime == "channels_last_split":
        shared |= {"BLOCK_S": config.rows, "BLOCK_C": config.columns, "CHUNK": config.chunk}
        shared["group_of"] = call.group_of(channel_order)
        programs = call.n * across * math.ceil(call.c / config.columns)
        means = {name: call.new(call.n, call.g) for name in ("mean_dxhat", "mean_dxhat_xhat")}
        call.launch(last_backward.slab_backward_sums, programs, **shared, **parts)
        merged = _merge_blocks(call, across)
        call.small(
            last_backward.slab_backward_means, groups, weight=weight, order=channel_order, **parts, **means, **merged
        )
        call.launch(last_backward.slab_backward_apply, programs, **shared, **results, **means)
    elif config.regime == "split":
        shared |= {"BLOCK_D": config.rows, "BLOCK_S": config.columns, "CHUNK": config.chunk, "order": channel_order}
        programs = groups * down * across
        shared["parts"] = call.new(programs, 2)
        call.launch(split.split_backward_sums, programs, **shared, **parts)
        most = power_of_two(down * across)
        call.launch(split.split_backward_apply, programs, **shared, **results, BLOCK_P=most)
    else:
        blocks = {"BLOCK_D": config.rows, "BLOCK_S": config.columns, "FLAT": config.regime == "flat"}
        call.launch(tile.tile_backward, groups, order=channel_order, **shared, **results, **parts, **blocks)

    dweight = torch.empty_like(weight) if need_weight and weight is not None else None
    dbias = torch.empty_like(bias) if need_bias and bias is not None else None
    if dweight is not None or dbias is not None:
        totals = {"dweight": dweight, "dbias": dbias, "count": splits, "C": call.c}
        call.small(split.sum_parts, math.ceil(call.c / 32), **parts, **totals, BLOCK_P=_SUMMED_AT_ONCE, BLOCK_C=32)
    if dresidual is not None and residual is not None:
        dresidual = dresidual.contiguous(memory_format=memory_format(residual))
    return Gradients(dx, dweight, dbias, dresidual, None, None)


def _merge_blocks(call: Call, across: int) -> dict[str, Any]:
    """Block sizes of the kernels that merge channels and chunks of a group."""
    most = power_of_two(across)
    rows = min(power_of_two(call.d), max(1, _MERGED_AT_ONCE // most))
    return {"S": call.s, "G": call.g, "D": call.d, "CHUNK": call.config.chunk, "BLOCK_P": most, "BLOCK_D": rows}


def _dense(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()
