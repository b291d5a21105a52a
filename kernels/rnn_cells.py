"""The recurrent cells' pointwise mathematics, forward and backward, and loads and stores of their gates.

The counterpart in C++ is csrc/common/gates.h; the mathematics is in csrc/include/seqfuse/rnn.h.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def forward_cell(CELL: tl.constexpr, x0, x1, x2, x3, a0, a1, a2, a3, state):
    """Gates of one step in torch.nn's order; returns (h, state, four values for backward). Unused ones are copies."""
    if CELL == "lstm":
        s0 = tl.sigmoid(x0 + a0)
        s1 = tl.sigmoid(x1 + a1)
        s2 = tanh(x2 + a2)
        s3 = tl.sigmoid(x3 + a3)
        state = s1 * state + s0 * s2
        h = s3 * tanh(state)
    elif CELL == "gru":
        s0 = tl.sigmoid(x0 + a0)
        s1 = tl.sigmoid(x1 + a1)
        s2 = tanh(x2 + s0 * a2)
        s3 = a2
        h = s2 + s1 * (state - s2)
        state = h
    else:
        a = x0 + a0
        if CELL == "rnn_relu":
            h = tl.where(a <= 0.0, 0.0, a)  # NaN stays NaN
        else:
            h = tanh(a)
        s0 = h
        s1 = h
        s2 = h
        s3 = h
    return h, state, s0, s1, s2, s3


@triton.jit
def backward_cell(CELL: tl.constexpr, s0, s1, s2, s3, now, before, dh, dc):
    """Gradients of one step. now, before: c_t and c_{t-1} (LSTM), h_t and h_{t-1} (others).

    Returns (da of the four gates, dan, what reaches h_{t-1} past w_hh, dc_{t-1})."""
    if CELL == "lstm":
        tc = tanh(now)
        dc += dh * s3 * (1.0 - tc * tc)
        d0 = dc * s2 * s0 * (1.0 - s0)
        d1 = dc * before * s1 * (1.0 - s1)
        d2 = dc * s0 * (1.0 - s2 * s2)
        d3 = dh * tc * s3 * (1.0 - s3)
        dan = d3
        dc *= s1
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
        d1 = d0
        d2 = d0
        d3 = d0
        dan = d0
        dh = tl.zeros_like(dh)
    return d0, d1, d2, d3, dan, dh, dc


@triton.jit
def load4(ptr, offs, H, mask, N: tl.constexpr):
    """The first N of four neighbouring [.., H] blocks, in the memory's dtype; the rest repeat the first."""
    v0 = tl.load(ptr + offs, mask, other=0.0)
    v1 = v0
    v2 = v0
    v3 = v0
    if N >= 3:
        v1 = tl.load(ptr + offs + H, mask, other=0.0)
        v2 = tl.load(ptr + offs + 2 * H, mask, other=0.0)
    if N == 4:
        v3 = tl.load(ptr + offs + 3 * H, mask, other=0.0)
    return v0, v1, v2, v3


@triton.jit
def store4(ptr, offs, H, mask, v0, v1, v2, v3, N: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + offs, v0.to(dtype), mask)
    if N >= 3:
        tl.store(ptr + offs + H, v1.to(dtype), mask)
        tl.store(ptr + offs + 2 * H, v2.to(dtype), mask)
    if N == 4:
        tl.store(ptr + offs + 3 * H, v3.to(dtype), mask)


@triton.jit
def load_bias(b_ptr, units, H, G: tl.constexpr, HAS_BIAS: tl.constexpr):
    zero = tl.zeros(units.shape, tl.float32)
    b0, b1, b2, b3 = zero, zero, zero, zero
    if HAS_BIAS:
        b0, b1, b2, b3 = load4(b_ptr, units, H, units < H, G)
    return b0.to(tl.float32), b1.to(tl.float32), b2.to(tl.float32), b3.to(tl.float32)


@triton.jit
def load_w(w_ptr, H, g, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w_hh of gate g as a [BLOCK_H, BLOCK_H] tile: [k, unit] when TRANSPOSED (forward), else [unit, k] (backward)."""
    i = tl.arange(0, BLOCK_H)
    mask = (i < H)[:, None] & (i < H)[None, :]
    if TRANSPOSED:
        return tl.load(w_ptr + (g * H + i)[None, :] * H + i[:, None], mask, other=0.0)
    else:
        return tl.load(w_ptr + (g * H + i)[:, None] * H + i[None, :], mask, other=0.0)
