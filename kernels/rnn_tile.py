"""The recurrent scan, tile tier: one program runs the whole time loop of one batch tile (and head). Small H.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    forward   a_t = h_{t-1} @ w_hh^T + b_hh, then the cell (rnn_cells.py) with its options (rnn_options.py)
    backward  dh_t = dy_t + da_{t+1} @ w_hh + what passes w_hh by, then the gates' gradients da_t; steps in opposite
              order

h, c and w_hh stay on chip: w_hh is read once, and per step only xg, y and what backward needs move, plus a byte for
each unit under a zoneout mask. No program waits for another one. What is a sum over the whole sequence (dw_hh, db_hh)
comes after the loop. c, a GRU's h and accumulators are fp32; h and da enter the products in the compute dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rnn_cells import aligned, load4, load_bias, only, store4
from .rnn_options import (
    backward_gates,
    forward_gates,
    forward_store,
    head_of,
    into_product,
    load_before,
    load_ends,
    load_hidden_mask,
    load_keep,
    load_peephole,
    load_saved,
    load_zones,
    out_of_product,
    running,
)


@triton.jit
def _load_w(w_ptr, H, W, start, g, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    """w_hh of gate g, for the W units from `start`, as a [BLOCK_H, BLOCK_H] tile: [k, unit] when TRANSPOSED (forward),
    else [unit, k] (backward)."""
    i = tl.arange(0, BLOCK_H)
    mask = (i < W)[:, None] & (i < W)[None, :]
    if TRANSPOSED:
        return tl.load(w_ptr + (g * H + start + i)[None, :] * W + i[:, None], mask, other=0.0)
    else:
        return tl.load(w_ptr + (g * H + start + i)[:, None] * W + i[None, :], mask, other=0.0)


@triton.jit
def _load_gates_w(w_ptr, H, W, start, G: tl.constexpr, BLOCK_H: tl.constexpr, TRANSPOSED: tl.constexpr):
    w0 = _load_w(w_ptr, H, W, start, 0, BLOCK_H, TRANSPOSED)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = _load_w(w_ptr, H, W, start, 1, BLOCK_H, TRANSPOSED)
        w2 = _load_w(w_ptr, H, W, start, 2, BLOCK_H, TRANSPOSED)
    if G == 4:
        w3 = _load_w(w_ptr, H, W, start, 3, BLOCK_H, TRANSPOSED)
    return w0, w1, w2, w3


@triton.jit(do_not_specialize=["T"])
def forward_tile_kernel(
    xg_ptr, w_ptr, b_ptr, h0_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr, o,
    T, B, H, W, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """On program (batch tile, head). state [B, H] fp32: c (LSTM; in and out) or h (GRU) or null."""
    H, W, xg_t, xg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(xg_t, ALIGN), aligned(xg_b, ALIGN)
    y_t, y_b = aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    # Pointers move by 64-bit scalars; offsets inside a tile fit in 32 bits (the launcher sees to it).
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    lane = tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(1), H, W, HEADS)
    inside = lane < W
    rows = first + row < B
    mask = rows[:, None] & inside[None, :]
    own = row[:, None] * H + units[None, :]
    xg_ptr += first * xg_b
    y_ptr += first * y_b
    h0_ptr += first * H
    xg_own = row[:, None] * xg_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]

    w0, w1, w2, w3 = _load_gates_w(w_ptr, H, W, start, G, BLOCK_H, True)
    b0, b1, b2, b3 = load_bias(b_ptr, units, H, inside, G)
    ends = load_ends(o, first + row, rows)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    h = tl.load(h0_ptr + own, mask, other=0.0)
    state = zero
    if state_ptr is not None:
        state_ptr += first * H
        state = tl.load(state_ptr + own, mask, other=0.0)

    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if REVERSE:
        t += T - 1
        ahead = -ahead
    x0, x1, x2, x3 = load4(xg_ptr + t * xg_t, xg_own, H, mask & running(o, rows, t, ends)[:, None], G)
    keep = load_keep(o, t * B + first + row, running(o, rows, t, ends))
    # hidden_mask and peephole come from the L1 at every step: the largest tiles have no registers to keep them.
    into = into_product(o, h, keep, load_hidden_mask(o, first * H + own, h, mask))
    for step in tl.range(0, T, num_stages=1):  # what is worth asking for early is, by hand
        live = running(o, rows, t, ends)[:, None] & inside[None, :]
        zones = load_zones(CELL, o, t * B + first, own, H, live)
        # The next step's inputs are asked for before this step's products: their latency is hidden.
        more = only(running(o, rows, t + ahead, ends), T - 1 - step)
        n0, n1, n2, n3 = load4(xg_ptr + (t + ahead) * xg_t, xg_own, H, more[:, None] & inside[None, :], G)
        next_keep = load_keep(o, (t + ahead) * B + first + row, more)
        a0 = tl.dot(into, w0, zero + b0, input_precision="ieee")
        a1, a2, a3 = a0, a0, a0
        if G >= 3:
            a1 = tl.dot(into, w1, zero + b1, input_precision="ieee")
            a2 = tl.dot(into, w2, zero + b2, input_precision="ieee")
        if G == 4:
            a3 = tl.dot(into, w3, zero + b3, input_precision="ieee")
        before = h.to(tl.float32)
        p = load_peephole(o, units, H, inside)
        new, state, y, cell, s = forward_gates(
            CELL, o, (x0, x1, x2, x3), (a0, a1, a2, a3), before, state, keep, zones, live, p
        )
        h = new.to(h.dtype)
        into = into_product(o, h, next_keep, load_hidden_mask(o, first * H + own, h, mask))
        keep = next_keep
        forward_store(
            G, y, cell, s, y_ptr + t * y_t, y_own, gates_ptr, cells_ptr, t * B + first, row, units, H, mask, live
        )
        x0, x1, x2, x3 = n0, n1, n2, n3
        t += ahead
    if CELL == "lstm":
        tl.store(state_ptr + own, state, mask)


@triton.jit(do_not_specialize=["T"])
def backward_tile_kernel(
    dy_ptr, dcells_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr, o,
    T, B, H, W, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """On program (batch tile, head). y: what the scan carried, h or an LSTM's cells, and `first` [B, H] what it started
    from. dh, dc [B, H] fp32: the gradients of the last state, then of the first one."""
    H, W, dxg_t, dxg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(dxg_t, ALIGN), aligned(dxg_b, ALIGN)
    dy_t, dy_b, y_t, y_b = aligned(dy_t, ALIGN), aligned(dy_b, ALIGN), aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    dtype: tl.constexpr = dxg_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_B  # as in forward_tile_kernel
    row = tl.arange(0, BLOCK_B)
    lane = tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(1), H, W, HEADS)
    inside = lane < W
    rows = first + row < B
    mask = rows[:, None] & inside[None, :]
    own = row[:, None] * H + units[None, :]
    y_ptr += first * y_b
    first_ptr += first * H
    dxg_ptr += first * dxg_b
    dh_ptr += first * H
    if CELL == "lstm":
        dc_ptr += first * H
    if dy_ptr is not None:
        dy_ptr += first * dy_b
    dy_own = row[:, None] * dy_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    dxg_own = row[:, None] * dxg_b + units[None, :]

    w0, w1, w2, w3 = _load_gates_w(w_ptr, H, W, start, G, BLOCK_H, False)
    ends = load_ends(o, first + row, rows)
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
    live = mask & running(o, rows, t, ends)[:, None]
    s0, s1, s2, s3 = load_saved(gates_ptr, t * B + first, row, units, H, live, G)
    now = tl.load((y_ptr + t * y_t) + y_own, live, other=0.0)
    before = load_before(o, y_ptr, t, T, y_t, y_own, first_ptr, own, ends, mask, REVERSE)
    dy = dh
    if dy_ptr is not None:
        dy = tl.load((dy_ptr + t * dy_t) + dy_own, live, other=0.0)
    for step in tl.range(0, T, num_stages=1):
        here = running(o, rows, t, ends)
        live = here[:, None] & inside[None, :]
        keep = load_keep(o, t * B + first + row, here)
        zones = load_zones(CELL, o, t * B + first, own, H, live)
        if dcells_ptr is not None:
            dc += tl.load(dcells_ptr + (t * B + first) * H + own, live, other=0.0)
        # What the next step reads is asked for before this step's products.
        next_t = t + ahead
        exists = only(mask, T - 1 - step)
        more = exists & running(o, rows, next_t, ends)[:, None]
        n0, n1, n2, n3 = load_saved(gates_ptr, next_t * B + first, row, units, H, more, G)
        n_before = load_before(o, y_ptr, next_t, T, y_t, y_own, first_ptr, own, ends, exists, REVERSE)
        n_dy = dy
        if dy_ptr is not None:
            n_dy = tl.load((dy_ptr + next_t * dy_t) + dy_own, more, other=0.0)
            dh += dy.to(tl.float32)
        p = load_peephole(o, units, H, inside)
        d, dan, dh, dc = backward_gates(
            CELL, o, gates_ptr, (s0, s1, s2, s3), now, before, dh, dc, keep, zones, live, p, dtype
        )
        store4(dxg_ptr + t * dxg_t, dxg_own, H, mask, d, G)
        d0, d1, d2, d3 = d
        if CELL == "gru":  # a_n has a gradient of its own
            d2 = dan
            tl.store(dan_ptr + (t * B + first) * H + own, dan, mask)
        past = dh
        if o.resets is not None or o.hidden_mask is not None:
            dh = tl.zeros_like(dh)
        dh = tl.dot(d0, w0, dh, input_precision="ieee")
        if G >= 3:
            dh = tl.dot(d1, w1, dh, input_precision="ieee")
            dh = tl.dot(d2, w2, dh, input_precision="ieee")
        if G == 4:
            dh = tl.dot(d3, w3, dh, input_precision="ieee")
        if o.resets is not None or o.hidden_mask is not None:
            dh = past + out_of_product(o, dh, keep, load_hidden_mask(o, first * H + own, dh, mask))
        s0, s1, s2, s3 = n0, n1, n2, n3
        now = before
        before = n_before
        dy = n_dy
        t = next_t
    tl.store(dh_ptr + own, dh, mask)
    if CELL == "lstm":
        tl.store(dc_ptr + own, dc, mask)
