"""Channels next to each other in memory, `[N, S, C]`: tiles are positions by channels.

channels_last_tile: one program holds K whole groups and reads once. channels_last_split: moments of each channel over
a chunk of positions, a tiny kernel that merges channels and chunks of a group (in any `order`), then an elementwise
pass. Neighbouring lanes always hold neighbouring channels, so the order of the groups costs no bandwidth.
"""

# Triton compiles this source, and its language has no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gnswap.ops._triton._kernels_shared import (
    accumulate,
    activate,
    activate_backward,
    at_sample,
    gradient,
    lane_moments,
    load_fp32,
    merge,
    per_channel,
    pre_activation,
    reciprocal_deviation,
    standardise,
)


@triton.jit
def _sum_groups(of_channel, K: tl.constexpr, LANES: tl.constexpr):
    """For each lane of `[K * LANES]` the sum over its group."""
    sums = tl.sum(tl.reshape(of_channel, [K, LANES]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [K, LANES]), [K * LANES])


@triton.jit
def _one_per_group(of_channel, K: tl.constexpr, LANES: tl.constexpr):
    return tl.max(tl.reshape(of_channel, [K, LANES]), 1)


@triton.jit
def _block(pid, S, G: tl.constexpr, D: tl.constexpr, K: tl.constexpr, LANES: tl.constexpr):
    """n, first group, channels `[1, K * LANES]` and which exist, and the offset of the sample."""
    blocks: tl.constexpr = (G + K - 1) // K
    n, first = pid // blocks, (pid % blocks) * K
    lane = tl.arange(0, K * LANES)[None, :]
    channel = first * D + lane
    # K > 1 only where LANES = D, so lanes beyond the last channel are the only ones that may not exist
    return n, first, channel, (lane < K * D) & (channel < G * D), n.to(tl.int64) * S * (G * D)


@triton.jit(do_not_specialize=["S"])
def channels_last_forward(
    x,
    y,
    mean_out,
    rstd_out,
    weight,
    bias,
    residual,
    scale,
    shift,
    S,
    eps,
    G: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
):
    """y, mean and rstd of K consecutive groups; grid (N * ceil(G / K))."""
    n, first, channel, known, sample = _block(tl.program_id(0), S, G, D, K, LANES)
    s = tl.arange(0, BLOCK_S)[:, None]
    inside = known & (s < S)
    offset = (s.to(tl.int64) if WIDE else s) * (G * D) + channel

    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    u = standardise(load_fp32(x + sample, offset, inside), a, t)
    count = S.to(tl.float32) * D
    mean = _sum_groups(tl.sum(tl.where(inside, u, 0.0), 0), K, LANES) / count
    centred = tl.where(inside, u - mean[None, :], 0.0)
    variance = _sum_groups(tl.sum(centred * centred, 0), K, LANES) / count
    rstd = reciprocal_deviation(variance, eps)
    group = first + tl.arange(0, K)
    tl.store(mean_out + n * G + group, _one_per_group(mean, K, LANES), mask=group < G)
    tl.store(rstd_out + n * G + group, _one_per_group(rstd, K, LANES), mask=group < G)

    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    z = pre_activation(centred * rstd[None, :], w, b, load_fp32(at_sample(residual, sample), offset, inside))
    tl.store(y + sample + offset, activate(z, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def channels_last_backward(
    dy,
    x,
    mean_in,
    rstd_in,
    dx,
    dresidual,
    dweight_parts,
    dbias_parts,
    weight,
    bias,
    residual,
    scale,
    shift,
    S,
    G: tl.constexpr,
    D: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
):
    """dx, dresidual (or None) and each sample's dweight and dbias `[N, C]` (or None); grid as the forward's."""
    n, _, channel, known, sample = _block(tl.program_id(0), S, G, D, K, LANES)
    s = tl.arange(0, BLOCK_S)[:, None]
    inside = known & (s < S)
    offset = (s.to(tl.int64) if WIDE else s) * (G * D) + channel
    statistic = n * G + channel // D
    mean, rstd = per_channel(mean_in, statistic, known), per_channel(rstd_in, statistic, known)

    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    u = standardise(load_fp32(x + sample, offset, inside), a, t)
    xhat = tl.where(inside, (u - mean) * rstd, 0.0)
    dz = load_fp32(dy + sample, offset, inside)
    if ACT is not None:
        z = pre_activation(xhat, w, b, load_fp32(at_sample(residual, sample), offset, inside))
        dz = activate_backward(dz, z, ACT)
    if dresidual is not None:
        tl.store(dresidual + sample + offset, dz.to(dresidual.dtype.element_ty), mask=inside)

    dweight, dbias = tl.sum(dz * xhat, 0), tl.sum(dz, 0)
    if dweight_parts is not None:
        parts = n * (G * D) + channel
        tl.store(dweight_parts + parts, dweight[None, :], mask=known)
        tl.store(dbias_parts + parts, dbias[None, :], mask=known)
    if w is not None:
        dweight, dbias = dweight * tl.reshape(w, [K * LANES]), dbias * tl.reshape(w, [K * LANES])
    count = S.to(tl.float32) * D
    mean_dxhat = _sum_groups(dbias, K, LANES)[None, :] / count
    mean_dxhat_xhat = _sum_groups(dweight, K, LANES)[None, :] / count
    du = gradient(xhat, dz, rstd, mean_dxhat, mean_dxhat_xhat, w, a)
    tl.store(dx + sample + offset, du.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def group_of_channel(order, group_of, C, D: tl.constexpr, BLOCK: tl.constexpr):
    """The group of each channel, int32 `[C]`: the inverse of `order`, divided by D."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.load(order + place, mask=place < C, other=0)
    tl.store(group_of + channel, place // D, mask=place < C)


@triton.jit
def _slab(pid, S, C: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr):
    """n, chunk number, chunks of a sample, channels `[1, BLOCK_C]`, first and end position."""
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    chunks = tl.cdiv(S, CHUNK)
    p = (pid // blocks) % chunks
    channel = (pid % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return pid // blocks // chunks, p, chunks, channel, p * CHUNK, tl.minimum(p * CHUNK + CHUNK, S)


@triton.jit(do_not_specialize=["S"])
def slab_moments(
    x,
    mean_parts,
    moment_parts,
    scale,
    shift,
    S,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Mean and centred second moment of each channel over a chunk of positions, `[N, chunks, C]`."""
    n, p, chunks, channel, begin, end = _slab(tl.program_id(0), S, C, CHUNK, BLOCK_C)
    known = channel < C
    base = x + n.to(tl.int64) * S * C
    lane = tl.arange(0, BLOCK_S)[:, None]
    s = begin + lane
    inside = known & (s < S)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    origin = standardise(load_fp32(base, (s.to(tl.int64) if WIDE else s) * C + channel, inside), a, t)
    count = inside.to(tl.float32)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(begin + BLOCK_S, end, BLOCK_S):
        s = start + lane
        inside = known & (s < S)
        u = standardise(load_fp32(base, (s.to(tl.int64) if WIDE else s) * C + channel, inside), a, t)
        count, total, square = accumulate(u, inside, origin, count, total, square)
    mean, moment = lane_moments(origin, count, total, square)
    _, mean, moment = merge(count, mean, moment, 0)
    out = (n * chunks + p).to(tl.int64) * C + channel
    tl.store(mean_parts + out, mean[None, :], mask=known)
    tl.store(moment_parts + out, moment[None, :], mask=known)


@triton.jit(do_not_specialize=["S"])
def slab_statistics(
    mean_parts,
    moment_parts,
    mean_out,
    rstd_out,
    order,
    S,
    eps,
    G: tl.constexpr,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """mean and rstd of a group from the moments of its channels and chunks; grid (N * G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    chunks = tl.cdiv(S, CHUNK)
    p = tl.arange(0, BLOCK_P)[None, :]
    row = (n * chunks + p).to(tl.int64) * (G * D)
    positions = tl.minimum(S - p * CHUNK, CHUNK).to(tl.float32)
    count, mean, moment = 0.0, 0.0, 0.0
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[:, None]
        channel = g * D + d
        if order is not None:
            channel = tl.load(order + channel, mask=d < D, other=0).to(tl.int32)
        inside = (d < D) & (p < chunks)
        of_lane = tl.where(inside, positions, 0.0)
        n_block, mean_block, moment_block = merge(
            tl.reshape(of_lane, [BLOCK_D * BLOCK_P]),
            tl.reshape(load_fp32(mean_parts, row + channel, inside), [BLOCK_D * BLOCK_P]),
            tl.reshape(load_fp32(moment_parts, row + channel, inside), [BLOCK_D * BLOCK_P]),
            0,
        )
        both = count + n_block
        distance = mean_block - mean
        mean += distance * (n_block / both)
        moment += moment_block + distance * distance * (count * n_block / both)
        count = both
    tl.store(mean_out + n * G + g, mean)
    tl.store(rstd_out + n * G + g, reciprocal_deviation(moment / count, eps))


@triton.jit
def _statistic(n, channel, known, group_of, G: tl.constexpr, D: tl.constexpr):
    """Where in `[N, G]` a channel's statistics stand."""
    if group_of is not None:
        return n * G + tl.load(group_of + channel, mask=known, other=0)
    return n * G + channel // D


@triton.jit(do_not_specialize=["S"])
def slab_apply(
    x,
    y,
    mean_in,
    rstd_in,
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
    """y from the statistics; backwards, so that it starts with what is still in the L2 cache."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, _, _, channel, begin, end = _slab(pid, S, G * D, CHUNK, BLOCK_C)
    known = channel < G * D
    statistic = _statistic(n, channel, known, group_of, G, D)
    mean, rstd = per_channel(mean_in, statistic, known), per_channel(rstd_in, statistic, known)
    sample = n.to(tl.int64) * S * (G * D)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    for start in range(begin, end, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = known & (s < S)
        offset = (s.to(tl.int64) if WIDE else s) * (G * D) + channel
        u = standardise(load_fp32(x + sample, offset, inside), a, t)
        z = pre_activation((u - mean) * rstd, w, b, load_fp32(at_sample(residual, sample), offset, inside))
        tl.store(y + sample + offset, activate(z, ACT).to(y.dtype.element_ty), mask=inside)
