"""The recurrent scan of one layer and direction (LSTM, GRU, RNN): forward and backward, one launch plan.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

The contract, with the mathematics of the cells, is csrc/include/seqfuse/rnn.h. Two of its tiers are here:

    step   one launch a time step over a grid of (unit tiles, batch tiles). A program multiplies its batch rows of
           h_{t-1} with the w_hh rows of all gates of its units in one dot, then does the gates. It may read per step
           G H^2 e bytes of w_hh (from L2), and per unit G e of xg; it may write e of h twice, and when training
           4 e of gates and 4 of the cell. Any H.
    tile   one program a batch tile holds h, c and w_hh on chip for the whole scan: no program waits for another.
           w_hh is read once; per step only xg, h and what backward needs move. Small H.

Backward walks the steps in the opposite order: dh_t = dy_t + da_{t+1} @ w_hh (+ z_{t+1} dh_{t+1} for the GRU), then
the gates' gradients da_t. Everything that is a sum over the whole sequence (dw_hh, db_hh) comes after the loop.
Cell state, the GRU's blend of h, and accumulators are fp32; h and da enter the products in the compute dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import common
from .rnn_plan import GATES, LaunchPlan, plan

__all__ = ["LaunchPlan", "plan", "rnn_scan_bwd", "rnn_scan_fwd"]


@triton.jit
def _tanh(x):
    # libdevice's tanh has no interpreter. exp alone would lose small x to cancellation, hence the polynomial
    # (least squares on |x| < 0.6, 1.4 ulp).
    z = x * x
    small = x + x * z * (
        -0.3333333134651184
        + z * (0.13332924246788025 + z * (-0.053875137120485306 + z * (0.021116215735673904 - z * 0.006276389118283987)))
    )
    e = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.36, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _forward_cell(CELL: tl.constexpr, x0, x1, x2, x3, a0, a1, a2, a3, state):
    """Gates of one step in torch.nn's order; returns (h, state, four values for backward). Unused ones are copies."""
    if CELL == "lstm":
        s0 = tl.sigmoid(x0 + a0)
        s1 = tl.sigmoid(x1 + a1)
        s2 = _tanh(x2 + a2)
        s3 = tl.sigmoid(x3 + a3)
        state = s1 * state + s0 * s2
        h = s3 * _tanh(state)
    elif CELL == "gru":
        s0 = tl.sigmoid(x0 + a0)
        s1 = tl.sigmoid(x1 + a1)
        s2 = _tanh(x2 + s0 * a2)
        s3 = a2
        h = s2 + s1 * (state - s2)
        state = h
    else:
        a = x0 + a0
        if CELL == "rnn_relu":
            h = tl.where(a <= 0.0, 0.0, a)  # NaN stays NaN
        else:
            h = _tanh(a)
        s0 = h
        s1 = h
        s2 = h
        s3 = h
    return h, state, s0, s1, s2, s3


@triton.jit
def _backward_cell(CELL: tl.constexpr, s0, s1, s2, s3, now, before, dh, dc):
    """Gradients of one step. now, before: c_t and c_{t-1} (LSTM), h_t and h_{t-1} (others).

    Returns (da of the four gates, dan, what reaches h_{t-1} past w_hh, dc_{t-1})."""
    if CELL == "lstm":
        tc = _tanh(now)
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
def _load4(ptr, offs, H, mask, N: tl.constexpr):
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
def _store4(ptr, offs, H, mask, v0, v1, v2, v3, N: tl.constexpr):
    dtype: tl.constexpr = ptr.dtype.element_ty
    tl.store(ptr + offs, v0.to(dtype), mask)
    if N >= 3:
        tl.store(ptr + offs + H, v1.to(dtype), mask)
        tl.store(ptr + offs + 2 * H, v2.to(dtype), mask)
    if N == 4:
        tl.store(ptr + offs + 3 * H, v3.to(dtype), mask)


@triton.jit
def _load_bias(b_ptr, units, H, G: tl.constexpr, HAS_BIAS: tl.constexpr):
    zero = tl.zeros(units.shape, tl.float32)
    b0, b1, b2, b3 = zero, zero, zero, zero
    if HAS_BIAS:
        b0, b1, b2, b3 = _load4(b_ptr, units, H, units < H, G)
    return b0.to(tl.float32), b1.to(tl.float32), b2.to(tl.float32), b3.to(tl.float32)


@triton.jit
def _forward_finish(
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr,
    x0, x1, x2, x3, a0, a1, a2, a3, state, y_ptr, y_offs, gates_ptr, cells_ptr, saved_row, units, H, mask,
):  # fmt: skip
    """Gates, and the stores every tier does: y, and with SAVE what backward needs. Returns (h, state)."""
    f32: tl.constexpr = tl.float32
    h, state, s0, s1, s2, s3 = _forward_cell(
        CELL, x0.to(f32), x1.to(f32), x2.to(f32), x3.to(f32), a0, a1, a2, a3, state
    )
    h = h.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_offs, h, mask)
    if SAVE and G >= 3:
        _store4(gates_ptr, saved_row[:, None] * (4 * H) + units[None, :], H, mask, s0, s1, s2, s3, 4)
        if CELL == "lstm":
            tl.store(cells_ptr + saved_row[:, None] * H + units[None, :], state, mask)
    return h, state


@triton.jit
def _forward_step(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    t, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The step body: one [BLOCK_B, BLOCK_H] tile of one step, on program (unit tile, batch tile)."""
    GP: tl.constexpr = 1 if G == 1 else 4  # gates padded: column u * GP + g of the product is gate g of unit u
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    step = t.to(tl.int64)
    x0, x1, x2, x3 = _load4(xg_ptr, step * xg_t + row[:, None] * xg_b + units[None, :], H, mask, G)  # early: far away

    cols = tl.arange(0, BLOCK_H * GP)
    gate = cols % GP
    unit = tl.program_id(0) * BLOCK_H + cols // GP
    w_row = tl.where((gate < G) & (unit < H), gate * H + unit, 0)
    w_mask = (gate < G) & (unit < H)
    acc = tl.zeros([BLOCK_B, BLOCK_H * GP], tl.float32)
    for start in tl.range(0, H, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_in_ptr + row[:, None] * H + k[None, :], (rows < B)[:, None] & (k < H)[None, :], other=0.0)
        w = tl.load(w_ptr + w_row[None, :] * H + k[:, None], w_mask[None, :] & (k < H)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    if GP == 1:
        a0, a1, a2, a3 = acc, acc, acc, acc
    else:
        even, odd = tl.split(tl.reshape(acc, [BLOCK_B, BLOCK_H, 2, 2]))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
    b0, b1, b2, b3 = _load_bias(b_ptr, units, H, G, HAS_BIAS)
    a0 += b0[None, :]
    a1 += b1[None, :]
    a2 += b2[None, :]
    a3 += b3[None, :]

    own = row[:, None] * H + units[None, :]
    state = tl.load(state_ptr + own, mask, other=0.0)
    h, state = _forward_finish(
        CELL, G, SAVE, x0, x1, x2, x3, a0, a1, a2, a3, state,
        y_ptr, step * y_t + row[:, None] * y_b + units[None, :], gates_ptr, cells_ptr, step * B + row, units, H, mask,
    )  # fmt: skip
    tl.store(h_out_ptr + own, h, mask)
    if G >= 3:
        tl.store(state_ptr + own, state, mask)


@triton.jit(do_not_specialize=["t"])
def _forward_step_kernel(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    t, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _forward_step(
        xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
        t, B, H, xg_t, xg_b, y_t, y_b, CELL, G, SAVE, HAS_BIAS, BLOCK_B, BLOCK_H, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit
def _load_w(w_ptr, H, g, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w_hh of gate g as a [BLOCK_H, BLOCK_H] tile: [k, unit] when TRANSPOSED (forward), else [unit, k] (backward)."""
    i = tl.arange(0, BLOCK_H)
    mask = (i < H)[:, None] & (i < H)[None, :]
    if TRANSPOSED:
        return tl.load(w_ptr + (g * H + i)[None, :] * H + i[:, None], mask, other=0.0)
    else:
        return tl.load(w_ptr + (g * H + i)[:, None] * H + i[None, :], mask, other=0.0)


@triton.jit(do_not_specialize=["T"])
def _forward_tile_kernel(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    T, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    own = row[:, None] * H + units[None, :]
    xg_own = row[:, None] * xg_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]

    w0 = _load_w(w_ptr, H, 0, BLOCK_H, True)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = _load_w(w_ptr, H, 1, BLOCK_H, True)
        w2 = _load_w(w_ptr, H, 2, BLOCK_H, True)
    if G == 4:
        w3 = _load_w(w_ptr, H, 3, BLOCK_H, True)
    b0, b1, b2, b3 = _load_bias(b_ptr, units, H, G, HAS_BIAS)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)

    h = tl.load(h_in_ptr + own, mask, other=0.0)
    state = tl.load(state_ptr + own, mask, other=0.0)
    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if REVERSE:
        t += T - 1
        ahead = -ahead
    x0, x1, x2, x3 = _load4(xg_ptr, t * xg_t + xg_own, H, mask, G)
    for step in range(T):
        # The next step's inputs are asked for before this step's products: their latency is hidden.
        more = mask & (step + 1 < T)
        n0, n1, n2, n3 = _load4(xg_ptr, (t + ahead) * xg_t + xg_own, H, more, G)
        a0 = tl.dot(h, w0, zero + b0[None, :], input_precision="ieee")
        a1, a2, a3 = a0, a0, a0
        if G >= 3:
            a1 = tl.dot(h, w1, zero + b1[None, :], input_precision="ieee")
            a2 = tl.dot(h, w2, zero + b2[None, :], input_precision="ieee")
        if G == 4:
            a3 = tl.dot(h, w3, zero + b3[None, :], input_precision="ieee")
        h, state = _forward_finish(
            CELL, G, SAVE, x0, x1, x2, x3, a0, a1, a2, a3, state,
            y_ptr, t * y_t + y_own, gates_ptr, cells_ptr, t * B + row, units, H, mask,
        )  # fmt: skip
        x0, x1, x2, x3 = n0, n1, n2, n3
        t += ahead
    tl.store(h_out_ptr + own, h, mask)
    if G >= 3:
        tl.store(state_ptr + own, state, mask)


@triton.jit
def _da_dot_w(acc, da_ptr, da_row, w_ptr, K, B, H, rows, units, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """acc + da[rows, :K] @ w[:K, units]; da_row: offset of each row, w: [K, H]."""
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        da = tl.load(da_ptr + da_row[:, None] + k[None, :], (rows < B)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * H + units[None, :], (k < K)[:, None] & (units < H)[None, :], other=0.0)
        acc = tl.dot(da, w, acc, input_precision="ieee")
    return acc


@triton.jit
def _backward_finish(
    CELL: tl.constexpr, G: tl.constexpr, s0, s1, s2, s3, now, before, dh, dc,
    dxg_ptr, dxg_offs, dan_ptr, saved_row, units, H, mask,
):  # fmt: skip
    """Gate gradients of one step, and the stores every tier does. Returns (da of four gates as stored, dh, dc)."""
    f32: tl.constexpr = tl.float32
    dtype: tl.constexpr = dxg_ptr.dtype.element_ty
    d0, d1, d2, d3, dan, dh, dc = _backward_cell(
        CELL, s0.to(f32), s1.to(f32), s2.to(f32), s3.to(f32), now.to(f32), before.to(f32), dh, dc
    )
    _store4(dxg_ptr, dxg_offs, H, mask, d0, d1, d2, d3, G)
    if CELL == "gru":
        d2 = dan
        tl.store(dan_ptr + saved_row[:, None] * H + units[None, :], dan.to(dtype), mask)
    return d0.to(dtype), d1.to(dtype), d2.to(dtype), d3.to(dtype), dh, dc


@triton.jit
def _load_saved(gates_ptr, saved_row, units, H, mask, G: tl.constexpr):
    if G >= 3:
        s0, s1, s2, s3 = _load4(gates_ptr, saved_row[:, None] * (4 * H) + units[None, :], H, mask, 4)
    else:
        s0 = tl.zeros(mask.shape, tl.float32)
        s1, s2, s3 = s0, s0, s0
    return s0, s1, s2, s3


@triton.jit
def _load_before(y_ptr, y_offs, first_ptr, own, inside, mask):
    """The state before a step: of the neighbouring step where that is `inside` the sequence, else the initial one."""
    y = tl.load(y_ptr + y_offs, mask & inside, other=0.0)
    return y + tl.load(first_ptr + own, mask & (inside == 0), other=0.0)


@triton.jit
def _backward_step(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, LAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The backward step body, one [BLOCK_B, BLOCK_H] tile of one step, on program (unit tile, batch tile).

    t_after: the step walked before this one, negative at the start. t_before: the step whose state entered t,
    negative where that is the initial state `first`. LAST: there is no step t, only the gradient of h0.
    y: what the scan carried: h, or an LSTM's cells. dh, dc [B, H] fp32: what is carried past w_hh."""
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    own = row[:, None] * H + units[None, :]
    after = t_after.to(tl.int64)
    step = t.to(tl.int64)
    before = t_before.to(tl.int64)
    saved_row = step * B + row
    if not LAST:  # asked for before the product, which hides their latency
        s0, s1, s2, s3 = _load_saved(gates_ptr, saved_row, units, H, mask, G)
        y_own = row[:, None] * y_b + units[None, :]
        y_now = tl.load(y_ptr + step * y_t + y_own, mask, other=0.0)
        y_before = y_now
        if G >= 3:
            y_before = _load_before(y_ptr, before * y_t + y_own, first_ptr, own, t_before >= 0, mask)

    acc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    da_row = after * dxg_t + row * dxg_b
    if CELL == "gru":  # a_n has a gradient of its own
        K = tl.where(t_after >= 0, 2 * H, 0)
        acc = _da_dot_w(acc, dxg_ptr, da_row, w_ptr, K, B, H, rows, units, BLOCK_K, STAGES)
        K = tl.where(t_after >= 0, H, 0)
        da_row = (after * B + row) * H
        acc = _da_dot_w(acc, dan_ptr, da_row, w_ptr + 2 * H * H, K, B, H, rows, units, BLOCK_K, STAGES)
        dh = acc + tl.load(dh_ptr + own, mask, other=0.0)
    else:
        K = tl.where(t_after >= 0, G * H, 0)
        acc = _da_dot_w(acc, dxg_ptr, da_row, w_ptr, K, B, H, rows, units, BLOCK_K, STAGES)
        dh = acc + tl.load(dh_ptr + own, mask & (t_after < 0), other=0.0)

    if LAST:
        tl.store(dh_ptr + own, dh, mask)
    else:
        if HAS_DY:
            dh += tl.load(dy_ptr + step * dy_t + row[:, None] * dy_b + units[None, :], mask, other=0.0).to(tl.float32)
        dc = tl.zeros_like(dh)
        if CELL == "lstm":
            dc = tl.load(dc_ptr + own, mask, other=0.0)
        dxg_offs = step * dxg_t + row[:, None] * dxg_b + units[None, :]
        _, _, _, _, dh, dc = _backward_finish(
            CELL, G, s0, s1, s2, s3, y_now, y_before, dh, dc, dxg_ptr, dxg_offs, dan_ptr, saved_row, units, H, mask
        )
        if CELL == "gru":
            tl.store(dh_ptr + own, dh, mask)
        if CELL == "lstm":
            tl.store(dc_ptr + own, dc, mask)


@triton.jit(do_not_specialize=["t", "t_after", "t_before"])
def _backward_step_kernel(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, LAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    _backward_step(
        dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
        t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
        CELL, G, HAS_DY, LAST, BLOCK_B, BLOCK_H, BLOCK_K, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _backward_tile_kernel(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    T, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    own = row[:, None] * H + units[None, :]
    dy_own = row[:, None] * dy_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    dxg_own = row[:, None] * dxg_b + units[None, :]

    w0 = _load_w(w_ptr, H, 0, BLOCK_H, False)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = _load_w(w_ptr, H, 1, BLOCK_H, False)
        w2 = _load_w(w_ptr, H, 2, BLOCK_H, False)
    if G == 4:
        w3 = _load_w(w_ptr, H, 3, BLOCK_H, False)

    dh = tl.load(dh_ptr + own, mask, other=0.0)
    dc = tl.zeros_like(dh)
    if CELL == "lstm":
        dc = tl.load(dc_ptr + own, mask, other=0.0)
    # The walk starts at the step the forward scan took last.
    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if not REVERSE:
        t += T - 1
        ahead = -ahead
    s0, s1, s2, s3 = _load_saved(gates_ptr, t * B + row, units, H, mask, G)
    now = tl.load(y_ptr + t * y_t + y_own, mask, other=0.0)
    before = _load_before(y_ptr, (t + ahead) * y_t + y_own, first_ptr, own, T > 1, mask)
    dy = dh
    if HAS_DY:
        dy = tl.load(dy_ptr + t * dy_t + dy_own, mask, other=0.0)
    for step in range(T):
        # What the next step reads is asked for before this step's products.
        more = mask & (step + 1 < T)
        next_t = t + ahead
        n0, n1, n2, n3 = _load_saved(gates_ptr, next_t * B + row, units, H, more, G)
        n_before = _load_before(y_ptr, (next_t + ahead) * y_t + y_own, first_ptr, own, step + 2 < T, more)
        n_dy = dy
        if HAS_DY:
            n_dy = tl.load(dy_ptr + next_t * dy_t + dy_own, more, other=0.0)
            dh += dy.to(tl.float32)
        d0, d1, d2, d3, dh, dc = _backward_finish(
            CELL, G, s0, s1, s2, s3, now, before, dh, dc,
            dxg_ptr, t * dxg_t + dxg_own, dan_ptr, t * B + row, units, H, mask,
        )  # fmt: skip
        dh = tl.dot(d0, w0, dh, input_precision="ieee")
        if G >= 3:
            dh = tl.dot(d1, w1, dh, input_precision="ieee")
            dh = tl.dot(d2, w2, dh, input_precision="ieee")
        if G == 4:
            dh = tl.dot(d3, w3, dh, input_precision="ieee")
        s0, s1, s2, s3 = n0, n1, n2, n3
        now = before
        before = n_before
        dy = n_dy
        t = next_t
    tl.store(dh_ptr + own, dh, mask)
    if CELL == "lstm":
        tl.store(dc_ptr + own, dc, mask)


def _sequence(like: torch.Tensor, width: int) -> torch.Tensor:
    """An empty [T, B, width] in the memory layout (time-major or batch-major) of the sequence `like`."""
    t, b = like.shape[:2]
    if like.stride(1) > like.stride(0):
        return like.new_empty(b, t, width).transpose(0, 1)
    return like.new_empty(t, b, width)


def _strides(sequence: torch.Tensor) -> tuple[int, int]:
    return sequence.stride(0), sequence.stride(1)


def _launch_plan(cell: str, like: torch.Tensor, h: int) -> LaunchPlan:
    device = like.device
    return plan(cell, like.dtype, like.shape[1], h, common.capability(device), common.sm_count(device))


def rnn_scan_fwd(
    cell: str,
    xg: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_hh: torch.Tensor | None,
    reverse: bool,
    save: bool,
    launch_plan: LaunchPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer and direction over a whole sequence; fp32, bf16 or fp16, all tensors of one dtype.

    xg [T, B, G*H] (any strides over T and B), h0, c0 [B, H], w_hh [G*H, H], b_hh [G*H].
    Returns (y [T, B, H], h_n [B, H], c_n [B, H], gates [T, B, 4H], cells [T, B, H] fp32); what the cell or
    save=False leaves out is empty [0]. `launch_plan` overrides the plan (tests, tuning).
    """
    g = GATES[cell]
    steps, batch, h = xg.shape[0], xg.shape[1], w_hh.shape[1]
    xg = xg if xg.stride(2) == 1 else xg.contiguous()
    w_hh = w_hh.contiguous()
    p = launch_plan or _launch_plan(cell, xg, h)
    y = _sequence(xg, h)
    empty = xg.new_empty(0)
    gates = xg.new_empty(steps, batch, 4 * h) if save and g > 1 else empty
    cells = torch.empty(steps, batch, h, dtype=torch.float32, device=xg.device) if save and cell == "lstm" else None
    h_io = xg.new_empty(2, batch, h)  # the hidden state in flight: one buffer is read, the other one written
    h_io[0].copy_(h0)
    first = c0 if cell == "lstm" else h0
    state = torch.empty(batch, h, dtype=torch.float32, device=xg.device).copy_(first)
    sizes = (batch, h, *_strides(xg), *_strides(y))
    flags = {"CELL": cell, "G": g, "SAVE": save, "HAS_BIAS": b_hh is not None}
    tiles = p.forward
    blocks = {"BLOCK_B": tiles.block_b, "BLOCK_H": tiles.block_h}
    batch_tiles = common.cdiv(batch, tiles.block_b)
    saved = (gates if save and g > 1 else None, cells)
    with common.on_device(xg):
        if p.tier == "tile":
            flags |= {"REVERSE": reverse, "num_warps": tiles.warps}
            args = (xg, w_hh, b_hh, h_io[0], h_io[1], state, y, *saved, steps, *sizes)
            common.launch(_forward_tile_kernel, (batch_tiles,), *args, **flags, **blocks)
            h_n = h_io[1]
        else:
            grid = (common.cdiv(h, tiles.block_h), batch_tiles)
            flags |= {"BLOCK_K": tiles.block_k, "STAGES": tiles.stages, "num_warps": tiles.warps}
            buffers = h_io[0], h_io[1]
            for step in range(steps):
                t = steps - 1 - step if reverse else step
                args = (xg, w_hh, b_hh, *buffers, state, y, *saved, t, *sizes)
                common.launch(_forward_step_kernel, grid, *args, **flags, **blocks)
                buffers = buffers[1], buffers[0]
            h_n = buffers[0]
    c_n = state.to(xg.dtype) if cell == "lstm" else empty
    return y, h_n.clone(), c_n, gates, empty.float() if cells is None else cells


def rnn_scan_bwd(
    cell: str,
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    y: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor | None,
    w_hh: torch.Tensor,
    reverse: bool,
    launch_plan: LaunchPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `rnn_scan_fwd` from what it returned with save=True; dy [T, B, H] may have any strides over T, B.

    Returns (dxg [T, B, G*H] in y's layout, dan [T, B, H] GRU only, dh0 [B, H], dc0 [B, H] LSTM only, db_hh [G*H] fp32).
    """
    g = GATES[cell]
    steps, batch, h = y.shape
    if dy is not None and dy.stride(2) != 1:
        dy = dy.contiguous()
    w_hh = w_hh.contiguous()
    p = launch_plan or _launch_plan(cell, y, h)
    dxg = _sequence(y, g * h)
    empty = y.new_empty(0)
    dan = y.new_empty(steps, batch, h) if cell == "gru" else empty
    dh = torch.zeros(batch, h, dtype=torch.float32, device=y.device)
    dc = torch.zeros_like(dh) if cell == "lstm" else None
    if dh_n is not None:
        dh.copy_(dh_n)
    if dc is not None and dc_n is not None:
        dc.copy_(dc_n)
    # What the scan carried from step to step, and what it started from.
    carried, first = (cells, c0.float()) if cell == "lstm" else (y, h0.contiguous())
    ptrs = (dy, carried, gates if g > 1 else None, first, w_hh, dxg, dan if cell == "gru" else None, dh, dc)
    sizes = (batch, h, *((0, 0) if dy is None else _strides(dy)), *_strides(carried), *_strides(dxg))
    flags = {"CELL": cell, "G": g, "HAS_DY": dy is not None}
    tiles = p.backward
    blocks = {"BLOCK_B": tiles.block_b, "BLOCK_H": tiles.block_h}
    batch_tiles = common.cdiv(batch, tiles.block_b)
    with common.on_device(y):
        if p.tier == "tile":
            flags |= {"REVERSE": reverse, "num_warps": tiles.warps}
            common.launch(_backward_tile_kernel, (batch_tiles,), *ptrs, steps, *sizes, **flags, **blocks)
        else:
            grid = (common.cdiv(h, tiles.block_h), batch_tiles)
            flags |= {"BLOCK_K": tiles.block_k, "STAGES": tiles.stages, "num_warps": tiles.warps}
            walk = range(steps) if reverse else range(steps - 1, -1, -1)
            after = -1
            for i, t in enumerate(walk):
                before = walk[i + 1] if i + 1 < steps else -1
                times = (t, after, before)
                common.launch(_backward_step_kernel, grid, *ptrs, *times, *sizes, **flags, **blocks, LAST=False)
                after = t
            common.launch(_backward_step_kernel, grid, *ptrs, 0, after, -1, *sizes, **flags, **blocks, LAST=True)
    db = dxg.sum((0, 1), dtype=torch.float32)
    if cell == "gru":
        db[2 * h :] = dan.sum((0, 1), dtype=torch.float32)
    dc0 = empty if dc is None else dc.to(y.dtype)
    return dxg, dan, dh.to(y.dtype), dc0, db
