"""The recurrent cells' pointwise mathematics, forward and backward, and loads and stores of their gates.

The counterpart in C++ is csrc/common/gates.h; the mathematics is in csrc/include/seqfuse/rnn.h. The four gates travel
as a tuple, in torch.nn's order; a cell with fewer repeats one of its own. p: the three peephole rows, if there are any.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def aligned(n, ALIGN: tl.constexpr):
    """n, a multiple of ALIGN, said so that the compiler knows: it sees multiples of 16 by itself, and no others."""
    if ALIGN > 1 and ALIGN < 16:
        n = n // ALIGN * ALIGN
    return n


@triton.jit
def tanh(x):
    # libdevice's tanh has no interpreter. exp alone would lose small x to cancellation, hence the polynomial
    # (least squares on |x| < 0.6, 1.4 ulp).
    z = x * x
    p = 0.021116215735673904 - z * 0.006276389118283987
    p = 0.13332924246788025 + z * (-0.053875137120485306 + z * p)
    small = x + x * z * (-0.3333333134651184 + z * p)
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.36, small, tl.where(x < 0.0, -large, large))


@triton.jit
def only(mask, n):
    """mask where the scalar n > 0, else nothing. (The interpreter cannot broadcast a scalar truth value.)"""
    return mask & (tl.zeros(mask.shape, tl.int32) + n > 0)


@triton.jit
def forward_cell(CELL: tl.constexpr, PEEPHOLE: tl.constexpr, x, a, state, p):
    """Gates of one step from the input's part x and the hidden state's part a; state: c (LSTM) or h (GRU) before.

    Returns (h, c or h, the four values for backward)."""
    if CELL == "lstm":
        i, f, o = x[0] + a[0], x[1] + a[1], x[3] + a[3]
        if PEEPHOLE:
            i += p[0] * state
            f += p[1] * state
        s0 = tl.sigmoid(i)
        s1 = tl.sigmoid(f)
        s2 = tanh(x[2] + a[2])
        state = s1 * state + s0 * s2
        if PEEPHOLE:
            o += p[2] * state
        s3 = tl.sigmoid(o)
        h = s3 * tanh(state)
    elif CELL == "gru":
        s0 = tl.sigmoid(x[0] + a[0])
        s1 = tl.sigmoid(x[1] + a[1])
        s2 = tanh(x[2] + s0 * a[2])
        s3 = a[2]
        h = s2 + s1 * (state - s2)
        state = h
    else:
        pre = x[0] + a[0]
        if CELL == "rnn_relu":
            h = tl.where(pre <= 0.0, 0.0, pre)  # NaN stays NaN
        else:
            h = tanh(pre)
        s0, s1, s2, s3 = h, h, h, h
    return h, state, (s0, s1, s2, s3)


@triton.jit
def backward_cell(CELL: tl.constexpr, PEEPHOLE: tl.constexpr, s, now, before, dh, dc, p):
    """Gradients of one step. now, before: the cell's own c_t and c_{t-1} (LSTM), h_t and h_{t-1} (others).

    Returns (da of the four gates, dan, what reaches h_{t-1} past w_hh, dc_{t-1})."""
    s0, s1, s2, s3 = s
    if CELL == "lstm":
        tc = tanh(now)
        d3 = dh * tc * s3 * (1.0 - s3)
        dc += dh * s3 * (1.0 - tc * tc)
        if PEEPHOLE:
            dc += p[2] * d3
        d0 = dc * s2 * s0 * (1.0 - s0)
        d1 = dc * before * s1 * (1.0 - s1)
        d2 = dc * s0 * (1.0 - s2 * s2)
        dan = d3
        dc *= s1
        if PEEPHOLE:
            dc += p[0] * d0 + p[1] * d1
        dh = tl.zeros_like(dh)
    elif CELL == "gru":
        d2 = dh * (1.0 - s1) * (1.0 - s2 * s2)
        d1 = dh * (before - s2) * s1 * (1.0 - s1)
        d0 = d2 * s3 * s0 * (1.0 - s0)
        d3 = d2
        dan = d2 * s0
        dh *= s1
    else:
        if CELL == "rnn_relu":
            d0 = tl.where(now <= 0.0, 0.0, dh)
        else:
            d0 = dh * (1.0 - now * now)
        d1, d2, d3, dan = d0, d0, d0, d0
        dh = tl.zeros_like(dh)
    return (d0, d1, d2, d3), dan, dh, dc


@triton.jit
def load4(ptr, offs, H, mask, N: tl.constexpr):
    """The first N of four neighbouring [.., H] blocks, in the memory's dtype; the rest repeat the first."""
    v0 = tl.load(ptr + offs, mask, other=0.0)
    v1, v2, v3 = v0, v0, v0
    if N >= 3:
        v1 = tl.load(ptr + offs + H, mask, other=0.0)
        v2 = tl.load(ptr + offs + 2 * H, mask, other=0.0)
    if N == 4:
        v3 = tl.load(ptr + offs + 3 * H, mask, other=0.0)
    return v0, v1, v2, v3


@triton.jit
def store4(ptr, offs, H, mask, v, N: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + offs, v[0].to(dtype), mask)
    if N >= 3:
        tl.store(ptr + offs + H, v[1].to(dtype), mask)
        tl.store(ptr + offs + 2 * H, v[2].to(dtype), mask)
    if N == 4:
        tl.store(ptr + offs + 3 * H, v[3].to(dtype), mask)


@triton.jit
def fp32(v):
    f32: tl.constexpr = tl.float32
    return v[0].to(f32), v[1].to(f32), v[2].to(f32), v[3].to(f32)


@triton.jit
def load_bias(b_ptr, units, H, mask, G: tl.constexpr):
    """The rows of b_hh [G*H] as [1, units], fp32; zeros without a bias."""
    zero = tl.zeros(units.shape, tl.float32)[None, :]
    b0, b1, b2, b3 = zero, zero, zero, zero
    if b_ptr is not None:
        b0, b1, b2, b3 = load4(b_ptr, units[None, :], H, mask[None, :], G)
    return fp32((b0, b1, b2, b3))
