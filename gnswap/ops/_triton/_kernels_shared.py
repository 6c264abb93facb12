"""What all kernels share: activations, the two ways to address a group, and moments that can be merged."""

# Triton compiles this source, and its language has no Python types.
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, ACT: tl.constexpr):
    """`ACT(z)`; comparisons are written so that NaN passes through, as it does in torch."""
    if ACT == "relu":
        z = tl.where(z <= 0.0, 0.0, z)
    elif ACT == "relu6":
        z = tl.where(z <= 0.0, 0.0, tl.where(z >= 6.0, 6.0, z))
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "hardswish":
        gate = z + 3.0
        gate = tl.where(gate <= 0.0, 0.0, tl.where(gate >= 6.0, 6.0, gate))
        z = z * gate * (1.0 / 6.0)
    elif ACT == "leaky_relu":
        z = tl.where(z > 0.0, z, z * 0.01)
    return z


@triton.jit
def activate_backward(dy, z, ACT: tl.constexpr):
    """`dy * ACT'(z)`; at a kink the value that torch takes."""
    if ACT == "relu":
        dy = tl.where(z > 0.0, dy, 0.0)
    elif ACT == "relu6":
        dy = tl.where((z > 0.0) & (z < 6.0), dy, 0.0)
    elif ACT == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * sigmoid * (1.0 + z * (1.0 - sigmoid))
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        dy = dy * (cdf + z * tl.exp(-0.5 * z * z) * 0.3989422804014327)
    elif ACT == "hardswish":
        dy = tl.where(z <= -3.0, 0.0, tl.where(z >= 3.0, dy, dy * (z * (1.0 / 3.0) + 0.5)))
    elif ACT == "leaky_relu":
        dy = tl.where(z > 0.0, dy, dy * 0.01)
    return dy


@triton.jit
def locate(g, rows, columns, order, row_length, D: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Channel, whether it exists, offset in the sample, and whether the element exists, for a block of a group.

    Rows are the channels of the group, in `order`, and columns their positions. FLAT: one row, the whole group, of
    which `columns` are consecutive elements. That keeps vector loads where a channel's length does not allow them.
    """
    if FLAT:
        inside = columns < row_length
        known = inside
        channel = g * D + columns // (row_length // D)
        start = g
    else:
        known = rows < D
        inside = known & (columns < row_length)
        channel = g * D + rows
        if order is not None:
            channel = tl.load(order + channel, mask=known, other=0).to(tl.int32)
        start = channel
    if WIDE:
        start = start.to(tl.int64)
    return channel, known, start * row_length + columns, inside


@triton.jit
def per_channel(vector, channel, known):
    """The entries of a `[C]` argument in fp32; None where there is no such argument."""
    # one expression, because triton compiles what follows a return too
    return None if vector is None else tl.load(vector + channel, mask=known, other=0.0).to(tl.float32)


@triton.jit
def load_fp32(pointer, offset, inside):
    """Elements in fp32, 0 outside; None where there is no such argument."""
    return None if pointer is None else tl.load(pointer + offset, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def standardise(x, scale, shift):
    """`scale * x + shift`, each factor or None. Elements outside are not zero where there is a shift."""
    if scale is not None:
        x = x * scale
    if shift is not None:
        x = x + shift
    return x


@triton.jit
def pre_activation(xhat, weight, bias, residual):
    """`xhat * weight + bias + residual`, each or None."""
    if weight is not None:
        xhat = xhat * weight
    if bias is not None:
        xhat = xhat + bias
    if residual is not None:
        xhat = xhat + residual
    return xhat


@triton.jit
def gradient(xhat, dz, rstd, mean_dxhat, mean_dxhat_xhat, weight, scale):
    """dx from dz and the two means over the group."""
    if weight is not None:
        dz = dz * weight
    dx = rstd * (dz - mean_dxhat - xhat * mean_dxhat_xhat)
    if scale is not None:
        dx = dx * scale
    return dx


@triton.jit
def at_sample(pointer, sample):
    """The pointer moved to a sample, or None."""
    return None if pointer is None else pointer + sample


@triton.jit
def reciprocal_deviation(variance, eps):
    """`1 / sqrt(variance + eps)`, both roundings to nearest: it is one number a group and scales all of it."""
    return tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def accumulate(u, inside, origin, count, total, square):
    """Add a block to each lane's own sums about `origin`, the lane's first element.

    Sums about a value of the data lose nothing where the mean is far from zero, and cost two operations an
    element where Welford's update needs a division.
    """
    distance = tl.where(inside, u - origin, 0.0)
    return count + inside.to(tl.float32), total + distance, square + distance * distance


@triton.jit
def lane_moments(origin, count, total, square):
    """Mean and centred second moment of each lane; 0 for a lane that saw nothing."""
    mean = total / tl.maximum(count, 1.0)
    return tl.where(count > 0.0, origin + mean, 0.0), tl.maximum(square - total * mean, 0.0)


@triton.jit
def merge(count, mean, moment, AXIS: tl.constexpr):
    """Moments of a union along an axis (Chan, Golub & LeVeque, 1983): count, mean, centred second moment."""
    n = tl.sum(count, AXIS)
    centre = tl.sum(count * mean, AXIS) / tl.maximum(n, 1.0)
    distance = mean - tl.expand_dims(centre, AXIS)
    return n, centre, tl.sum(moment + count * distance * distance, AXIS)
