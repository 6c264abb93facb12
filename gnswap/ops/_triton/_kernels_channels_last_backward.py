"""Backward of channels_last_split: sums of each channel over a chunk, their means over a group, then dx."""

# Triton compiles this source, and its language has no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gnswap.ops._triton._kernels_channels_last import _slab, _statistic
from gnswap.ops._triton._kernels_shared import (
    activate_backward,
    at_sample,
    gradient,
    load_fp32,
    per_channel,
    pre_activation,
    standardise,
)


@triton.jit(do_not_specialize=["S"])
def slab_backward_sums(
    dy,
    x,
    mean_in,
    rstd_in,
    dweight_parts,
    dbias_parts,
    weight,
    bias,
    residual,
    scale,
    shift,
    group_of,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each channel's sums of dz * xhat and dz over a chunk of positions, `[N, chunks, C]`."""
    n, p, chunks, channel, begin, end = _slab(tl.program_id(0), S, G * D, CHUNK, BLOCK_C)
    known = channel < G * D
    statistic = _statistic(n, channel, known, group_of, G, D)
    mean, rstd = per_channel(mean_in, statistic, known), per_channel(rstd_in, statistic, known)
    sample = n.to(tl.int64) * S * (G * D)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    dweight = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    dbias = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = known & (s < S)
        offset = (s.to(tl.int64) if WIDE else s) * (G * D) + channel
        u = standardise(load_fp32(x + sample, offset, inside), a, t)
        xhat = tl.where(inside, (u - mean) * rstd, 0.0)
        dz = load_fp32(dy + sample, offset, inside)
        if ACT is not None:
            z = pre_activation(xhat, w, b, load_fp32(at_sample(residual, sample), offset, inside))
            dz = activate_backward(dz, z, ACT)
        dweight += dz * xhat
        dbias += dz
    out = (n * chunks + p).to(tl.int64) * (G * D) + channel
    tl.store(dweight_parts + out, tl.sum(dweight, 0)[None, :], mask=known)
    tl.store(dbias_parts + out, tl.sum(dbias, 0)[None, :], mask=known)


@triton.jit(do_not_specialize=["S"])
def slab_backward_means(
    dweight_parts,
    dbias_parts,
    mean_dxhat,
    mean_dxhat_xhat,
    weight,
    order,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Means of dxhat and dxhat * xhat over a group, `[N, G]`; grid (N * G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    chunks = tl.cdiv(S, CHUNK)
    p = tl.arange(0, BLOCK_P)[None, :]
    row = (n * chunks + p).to(tl.int64) * (G * D)
    dxhat = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
    dxhat_xhat = tl.zeros([BLOCK_D, BLOCK_P], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[:, None]
        channel = g * D + d
        if order is not None:
            channel = tl.load(order + channel, mask=d < D, other=0).to(tl.int32)
        inside = (d < D) & (p < chunks)
        dbias = load_fp32(dbias_parts, row + channel, inside)
        dweight = load_fp32(dweight_parts, row + channel, inside)
        w = per_channel(weight, channel, d < D)
        if w is not None:
            dbias, dweight = dbias * w, dweight * w
        dxhat += dbias
        dxhat_xhat += dweight
    count = S.to(tl.float32) * D
    tl.store(mean_dxhat + n * G + g, tl.sum(dxhat) / count)
    tl.store(mean_dxhat_xhat + n * G + g, tl.sum(dxhat_xhat) / count)


@triton.jit(do_not_specialize=["S"])
def slab_backward_apply(
    dy,
    x,
    mean_in,
    rstd_in,
    mean_dxhat,
    mean_dxhat_xhat,
    dx,
    dresidual,
    weight,
    bias,
    residual,
    scale,
    shift,
    group_of,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dx, and dresidual (or None)."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, _, _, channel, begin, end = _slab(pid, S, G * D, CHUNK, BLOCK_C)
    known = channel < G * D
    statistic = _statistic(n, channel, known, group_of, G, D)
    mean, rstd = per_channel(mean_in, statistic, known), per_channel(rstd_in, statistic, known)
    dxhat_mean = per_channel(mean_dxhat, statistic, known)
    dxhat_xhat_mean = per_channel(mean_dxhat_xhat, statistic, known)
    sample = n.to(tl.int64) * S * (G * D)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = known & (s < S)
        offset = (s.to(tl.int64) if WIDE else s) * (G * D) + channel
        u = standardise(load_fp32(x + sample, offset, inside), a, t)
        xhat = (u - mean) * rstd
        dz = load_fp32(dy + sample, offset, inside)
        if ACT is not None:
            z = pre_activation(xhat, w, b, load_fp32(at_sample(residual, sample), offset, inside))
            dz = activate_backward(dz, z, ACT)
        if dresidual is not None:
            tl.store(dresidual + sample + offset, dz.to(dresidual.dtype.element_ty), mask=inside)
        du = gradient(xhat, dz, rstd, dxhat_mean, dxhat_xhat_mean, w, a)
        tl.store(dx + sample + offset, du.to(dx.dtype.element_ty), mask=inside)
