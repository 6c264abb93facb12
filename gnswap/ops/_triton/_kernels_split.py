"""Several programs share a group, without waiting for each other: partial results, then a second pass merges them.

A group is cut into chunks of BLOCK_D channels by CHUNK positions. The chunks depend on the sizes of a sample and on
the machine, never on the batch. CHUNK is a multiple of BLOCK_S, so the end of the row is the only bound to check,
and its known alignment keeps vector loads. The second pass walks the programs backwards, so that it starts with what
the first one read last and is still in the L2 cache.
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
    locate,
    merge,
    per_channel,
    pre_activation,
    reciprocal_deviation,
    standardise,
)


@triton.jit
def _chunk(pid, row_length, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr):
    """n, g, chunk number, chunks of a group, channel rows `[BLOCK_D, 1]`, first and end column of a program."""
    across = tl.cdiv(row_length, CHUNK)
    chunks = tl.cdiv(D, BLOCK_D) * across
    part, group = pid % chunks, pid // chunks
    rows = (part // across) * BLOCK_D + tl.arange(0, BLOCK_D)[:, None]
    begin = (part % across) * CHUNK
    return group // G, group % G, part, chunks, rows, begin, tl.minimum(begin + CHUNK, row_length)


@triton.jit(do_not_specialize=["row_units"])
def split_moments(
    x,
    parts,
    scale,
    shift,
    order,
    row_units,
    G: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """First pass of the forward: (count, mean, centred second moment) of a chunk into `parts` `[N*G*chunks, 4]`."""
    row_length = row_units * ALIGN
    n, g, _, _, rows, begin, end = _chunk(tl.program_id(0), row_length, G, D, BLOCK_D, CHUNK)
    base = x + n.to(tl.int64) * G * D * row_length
    lanes = begin + tl.arange(0, BLOCK_S)[None, :]

    channel, known, offset, inside = locate(g, rows, lanes, order, row_length, D, False, WIDE)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    origin = standardise(load_fp32(base, offset, inside), a, t)
    count = inside.to(tl.float32)
    total = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    square = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    for step in range(BLOCK_S, end - begin, BLOCK_S):
        inside = known & (step + lanes < row_length)
        u = standardise(load_fp32(base, offset + step, inside), a, t)
        count, total, square = accumulate(u, inside, origin, count, total, square)

    mean, moment = lane_moments(origin, count, total, square)
    all_lanes: tl.constexpr = [BLOCK_D * BLOCK_S]
    count, mean, moment = merge(
        tl.reshape(count, all_lanes), tl.reshape(mean, all_lanes), tl.reshape(moment, all_lanes), 0
    )
    out = parts + tl.program_id(0).to(tl.int64) * 4
    tl.store(out, count)
    tl.store(out + 1, mean)
    tl.store(out + 2, moment)


@triton.jit(do_not_specialize=["row_units"])
def split_apply(
    x,
    parts,
    y,
    mean_out,
    rstd_out,
    weight,
    bias,
    residual,
    scale,
    shift,
    order,
    row_units,
    eps,
    G: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Second pass of the forward: each program merges its group's parts itself, in the same order, and applies."""
    row_length = row_units * ALIGN
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, g, part, chunks, rows, begin, end = _chunk(pid, row_length, G, D, BLOCK_D, CHUNK)
    sample = n.to(tl.int64) * G * D * row_length

    p = tl.arange(0, BLOCK_P)
    of_group = ((n * G + g).to(tl.int64) * chunks + p) * 4
    _, mean, moment = merge(
        load_fp32(parts, of_group, p < chunks),
        load_fp32(parts, of_group + 1, p < chunks),
        load_fp32(parts, of_group + 2, p < chunks),
        0,
    )
    rstd = reciprocal_deviation(moment / (row_length.to(tl.float32) * D), eps)
    if part == 0:
        tl.store(mean_out + n * G + g, mean)
        tl.store(rstd_out + n * G + g, rstd)

    lanes = begin + tl.arange(0, BLOCK_S)[None, :]
    channel, known, offset, _ = locate(g, rows, lanes, order, row_length, D, False, WIDE)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    for step in range(0, end - begin, BLOCK_S):
        inside = known & (step + lanes < row_length)
        u = standardise(load_fp32(x + sample, offset + step, inside), a, t)
        r = load_fp32(at_sample(residual, sample), offset + step, inside)
        z = pre_activation((u - mean) * rstd, w, b, r)
        tl.store(y + sample + (offset + step), activate(z, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["row_units"])
def split_backward_sums(
    dy,
    x,
    mean_in,
    rstd_in,
    parts,
    dweight_parts,
    dbias_parts,
    weight,
    bias,
    residual,
    scale,
    shift,
    order,
    row_units,
    G: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """First pass of the backward: sums of dxhat and dxhat * xhat into `parts` `[N*G*chunks, 2]`, and of each
    channel of the chunk into `dweight_parts` and `dbias_parts` `[N * chunks across, C]` (or None)."""
    row_length = row_units * ALIGN
    n, g, part, _, rows, begin, end = _chunk(tl.program_id(0), row_length, G, D, BLOCK_D, CHUNK)
    sample = n.to(tl.int64) * G * D * row_length
    mean, rstd = tl.load(mean_in + n * G + g), tl.load(rstd_in + n * G + g)
    lanes = begin + tl.arange(0, BLOCK_S)[None, :]
    channel, known, offset, _ = locate(g, rows, lanes, order, row_length, D, False, WIDE)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    dweight = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    dbias = tl.zeros([BLOCK_D, BLOCK_S], tl.float32)
    for step in range(0, end - begin, BLOCK_S):
        inside = known & (step + lanes < row_length)
        u = standardise(load_fp32(x + sample, offset + step, inside), a, t)
        xhat = tl.where(inside, (u - mean) * rstd, 0.0)
        dz = load_fp32(dy + sample, offset + step, inside)
        if ACT is not None:
            r = load_fp32(at_sample(residual, sample), offset + step, inside)
            dz = activate_backward(dz, pre_activation(xhat, w, b, r), ACT)
        dweight += dz * xhat
        dbias += dz

    dweight_rows, dbias_rows = tl.sum(dweight, 1)[:, None], tl.sum(dbias, 1)[:, None]
    if dweight_parts is not None:
        across = tl.cdiv(row_length, CHUNK)
        target = (n * across + part % across).to(tl.int64) * (G * D) + channel
        tl.store(dweight_parts + target, dweight_rows, mask=known)
        tl.store(dbias_parts + target, dbias_rows, mask=known)
    if w is not None:
        dweight_rows, dbias_rows = dweight_rows * w, dbias_rows * w
    out = parts + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum(dbias_rows))
    tl.store(out + 1, tl.sum(dweight_rows))


@triton.jit(do_not_specialize=["row_units"])
def split_backward_apply(
    dy,
    x,
    mean_in,
    rstd_in,
    parts,
    dx,
    dresidual,
    weight,
    bias,
    residual,
    scale,
    shift,
    order,
    row_units,
    G: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Second pass of the backward: dx, and dresidual (or None)."""
    row_length = row_units * ALIGN
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    n, g, _, chunks, rows, begin, end = _chunk(pid, row_length, G, D, BLOCK_D, CHUNK)
    sample = n.to(tl.int64) * G * D * row_length
    mean, rstd = tl.load(mean_in + n * G + g), tl.load(rstd_in + n * G + g)
    p = tl.arange(0, BLOCK_P)
    of_group = ((n * G + g).to(tl.int64) * chunks + p) * 2
    count = row_length.to(tl.float32) * D
    mean_dxhat = tl.sum(load_fp32(parts, of_group, p < chunks)) / count
    mean_dxhat_xhat = tl.sum(load_fp32(parts, of_group + 1, p < chunks)) / count

    lanes = begin + tl.arange(0, BLOCK_S)[None, :]
    channel, known, offset, _ = locate(g, rows, lanes, order, row_length, D, False, WIDE)
    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a, t = per_channel(scale, channel, known), per_channel(shift, channel, known)
    for step in range(0, end - begin, BLOCK_S):
        inside = known & (step + lanes < row_length)
        xhat = (standardise(load_fp32(x + sample, offset + step, inside), a, t) - mean) * rstd
        dz = load_fp32(dy + sample, offset + step, inside)
        if ACT is not None:
            r = load_fp32(at_sample(residual, sample), offset + step, inside)
            dz = activate_backward(dz, pre_activation(xhat, w, b, r), ACT)
        if dresidual is not None:
            tl.store(dresidual + sample + (offset + step), dz.to(dresidual.dtype.element_ty), mask=inside)
        du = gradient(xhat, dz, rstd, mean_dxhat, mean_dxhat_xhat, w, a)
        tl.store(dx + sample + (offset + step), du.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def sum_parts(dweight_parts, dbias_parts, dweight, dbias, count, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """dweight and dbias `[C]` (each or None) from `[count, C]`, always in the same order; grid (C / BLOCK_C)."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    dweight_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    dbias_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, count, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        inside = (p < count) & (channel < C)
        offset = p.to(tl.int64) * C + channel
        dweight_sum += tl.load(dweight_parts + offset, mask=inside, other=0.0)
        dbias_sum += tl.load(dbias_parts + offset, mask=inside, other=0.0)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(dweight_sum, 0).to(dweight.dtype.element_ty), mask=channel < C)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(dbias_sum, 0).to(dbias.dtype.element_ty), mask=channel < C)
