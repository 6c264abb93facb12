"""One program holds a whole group in its registers: each element is read once.

The program of (n, g) sees its group as a tile: channels by positions, each channel's row found through `order`, or
FLAT (see `_kernels_shared.locate`). With several CTAs the same kernels are the cluster regime: Triton spreads the
tile over the cluster and reduces through distributed shared memory.
"""

# Triton compiles this source, and its language has no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from gnswap.ops._triton._kernels_shared import (
    activate,
    activate_backward,
    at_sample,
    gradient,
    load_fp32,
    locate,
    per_channel,
    pre_activation,
    reciprocal_deviation,
    standardise,
)


@triton.jit(do_not_specialize=["row_units"])
def tile_forward(
    x,
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
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """y, mean and rstd; grid (N * G). A row has `row_units * ALIGN` elements, so that its alignment is known."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    row_length = row_units * ALIGN
    group_size = row_length if FLAT else row_length * D
    sample = n.to(tl.int64) * G * group_size
    rows, columns = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_S)[None, :]
    channel, known, offset, inside = locate(g, rows, columns, order, row_length, D, FLAT, WIDE)

    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a = per_channel(scale, channel, known)
    u = standardise(load_fp32(x + sample, offset, inside), a, per_channel(shift, channel, known))
    count = group_size.to(tl.float32)
    mean = tl.sum(tl.where(inside, u, 0.0)) / count
    centred = tl.where(inside, u - mean, 0.0)
    rstd = reciprocal_deviation(tl.sum(centred * centred) / count, eps)
    tl.store(mean_out + n * G + g, mean)
    tl.store(rstd_out + n * G + g, rstd)

    z = pre_activation(centred * rstd, w, b, load_fp32(at_sample(residual, sample), offset, inside))
    tl.store(y + sample + offset, activate(z, ACT).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _add_in_segment(dweight_a, dbias_a, starts_a, dweight_b, dbias_b, starts_b):
    fresh = starts_b != 0
    dweight = tl.where(fresh, dweight_b, dweight_a + dweight_b)
    return dweight, tl.where(fresh, dbias_b, dbias_a + dbias_b), starts_a | starts_b


@triton.jit(do_not_specialize=["row_units"])
def tile_backward(
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
    order,
    row_units,
    G: tl.constexpr,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    ACT: tl.constexpr,
    FLAT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """dx, dresidual (or None) and each sample's own dweight and dbias `[N, C]` (or None); grid (N * G)."""
    n, g = tl.program_id(0) // G, tl.program_id(0) % G
    row_length = row_units * ALIGN
    group_size = row_length if FLAT else row_length * D
    sample = n.to(tl.int64) * G * group_size
    rows, columns = tl.arange(0, BLOCK_D)[:, None], tl.arange(0, BLOCK_S)[None, :]
    channel, known, offset, inside = locate(g, rows, columns, order, row_length, D, FLAT, WIDE)
    mean, rstd = tl.load(mean_in + n * G + g), tl.load(rstd_in + n * G + g)

    w, b = per_channel(weight, channel, known), per_channel(bias, channel, known)
    a = per_channel(scale, channel, known)
    u = standardise(load_fp32(x + sample, offset, inside), a, per_channel(shift, channel, known))
    xhat = tl.where(inside, (u - mean) * rstd, 0.0)
    dz = load_fp32(dy + sample, offset, inside)
    if ACT is not None:
        z = pre_activation(xhat, w, b, load_fp32(at_sample(residual, sample), offset, inside))
        dz = activate_backward(dz, z, ACT)
    if dresidual is not None:
        tl.store(dresidual + sample + offset, dz.to(dresidual.dtype.element_ty), mask=inside)

    dxhat = dz
    if w is not None:
        dxhat = dz * w
    count = group_size.to(tl.float32)
    mean_dxhat = tl.sum(dxhat) / count
    mean_dxhat_xhat = tl.sum(dxhat * xhat) / count
    du = gradient(xhat, dz, rstd, mean_dxhat, mean_dxhat_xhat, w, a)
    tl.store(dx + sample + offset, du.to(dx.dtype.element_ty), mask=inside)

    if dweight_parts is not None:
        parts = n * (G * D) + channel
        if FLAT:
            # a channel's sum is complete at its last element
            positions = row_length // D
            starts = (columns % positions == 0).to(tl.int32)
            dweight, dbias, _ = tl.associative_scan((dz * xhat, dz, starts), 1, _add_in_segment)
            last = inside & (columns % positions == positions - 1)
            tl.store(dweight_parts + parts, dweight, mask=last)
            tl.store(dbias_parts + parts, dbias, mask=last)
        else:
            tl.store(dweight_parts + parts, tl.sum(dz * xhat, 1)[:, None], mask=known)
            tl.store(dbias_parts + parts, tl.sum(dz, 1)[:, None], mask=known)
