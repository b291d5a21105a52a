"""The recurrent scan, step tier: one launch a time step; and the step body that the persistent tier shares. Any H.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.

    forward   a_t = h_{t-1} @ w_hh^T + b_hh, then the cell (rnn_cells.py) with its options (rnn_options.py)
    backward  dh_t = dy_t + da_{t+1} @ w_hh + what passes w_hh by, then the gates' gradients da_t; steps in opposite
              order

A program has one [BLOCK_B, BLOCK_H] tile of (batch rows, units of one head): it multiplies its rows with the w_hh rows
of all gates of its units in one dot, then does the gates. It may read per step G H^2 e bytes of w_hh over all programs
(from L2), and per unit G e of xg; it may write e of h twice, and when training 4 e of gates and 4 of the cell; plus
what the options cost. What is exchanged between programs is h as it enters the next product (reset and masked
already), in the compute dtype, and da, which is dxg itself. c, a GRU's h, accumulators and gradients carried past w_hh
are fp32.
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
def arrive(counter_ptr):
    """Say that this program's stores so far may be read by those that `wait_for` it."""
    tl.debug_barrier()  # of all threads, before the one that releases
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for(counter_ptr, arrivals):
    while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
        pass


@triton.jit
def split_gates(acc, G: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    """[BLOCK_B, BLOCK_H * 4], gate g of unit u in column 4 u + g, -> four [BLOCK_B, BLOCK_H]."""
    if G == 1:
        return acc, acc, acc, acc
    else:
        even, odd = tl.split(tl.reshape(acc, [BLOCK_B, BLOCK_H, 2, 2]))
        a0, a2 = tl.split(even)
        a1, a3 = tl.split(odd)
        return a0, a1, a2, a3


@triton.jit
def gate_rows(tile, H, W, start, G: tl.constexpr, BLOCK_H: tl.constexpr):
    """(rows of w_hh for the columns that split_gates splits, which of them exist) of unit tile `tile` of a head."""
    GP: tl.constexpr = 1 if G == 1 else 4
    cols = tl.arange(0, BLOCK_H * GP)
    gate = cols % GP
    lane = tile * BLOCK_H + cols // GP
    exists = (gate < G) & (lane < W)
    return tl.where(exists, gate * H + start + lane, 0), exists


@triton.jit
def forward_body(
    CELL: tl.constexpr, G: tl.constexpr, o, acc, b, x, h, state, keep, zones, live, next_keep,
    h_out_ptr, y_ptr, y_offs, gates_ptr, cells_ptr, counter_ptr, first_row, row, units, H, own, mask, p, hidden_mask,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What follows a step's product. The exchange goes out first: with a counter, others wait for it.

    Returns (h, state) after the step."""
    a0, a1, a2, a3 = split_gates(acc, G, BLOCK_B, BLOCK_H)
    a = a0 + b[0], a1 + b[1], a2 + b[2], a3 + b[3]
    h, state, y, cell, s = forward_gates(CELL, o, x, a, h, state, keep, zones, live, p)
    h = h.to(y_ptr.dtype.element_ty)
    tl.store(h_out_ptr + own, into_product(o, h, next_keep, hidden_mask), mask)
    if counter_ptr is not None:
        arrive(counter_ptr)
    forward_store(G, y, cell, s, y_ptr, y_offs, gates_ptr, cells_ptr, first_row, row, units, H, mask, live)
    return h, state


@triton.jit(do_not_specialize=["t", "T"])
def forward_step_kernel(
    xg_ptr, w_ptr, b_ptr, h0_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr, o,
    t, T, B, H, W, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Step t, on program (unit tile, batch tile, head). h_in, h_out [B, H]: the exchange. CARRY: the step needs the h
    before it besides the product (lengths, zoneout)."""
    H, W, xg_t, xg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(xg_t, ALIGN), aligned(xg_b, ALIGN)
    y_t, y_b = aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    GP: tl.constexpr = 1 if G == 1 else 4
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    lane = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(2), H, W, HEADS)
    inside = lane < W
    rows = row < B
    mask = rows[:, None] & inside[None, :]
    own = row[:, None] * H + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    step = t.to(tl.int64)

    # Early, because it comes from far away.
    ends = load_ends(o, row, rows)
    here = running(o, rows, step, ends)
    live = here[:, None] & inside[None, :]
    x = load4(xg_ptr, step * xg_t + row[:, None] * xg_b + units[None, :], H, live, G)
    keep = load_keep(o, step * B + row, here)
    zones = load_zones(CELL, o, step * B, own, H, live)
    if REVERSE:
        next_keep = load_keep(o, (step - 1) * B + row, only(running(o, rows, step - 1, ends), t))
    else:
        next_keep = load_keep(o, (step + 1) * B + row, only(running(o, rows, step + 1, ends), T - 1 - t))

    w_row, exists = gate_rows(tl.program_id(0), H, W, start, G, BLOCK_H)
    acc = tl.zeros([BLOCK_B, BLOCK_H * GP], tl.float32)
    for k0 in tl.range(0, W, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        h = tl.load(h_in_ptr + row[:, None] * H + (start + k)[None, :], rows[:, None] & (k < W)[None, :], other=0.0)
        w = tl.load(w_ptr + w_row[None, :] * W + k[:, None], exists[None, :] & (k < W)[:, None], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")

    b = load_bias(b_ptr, units, H, inside, G)
    p = load_peephole(o, units, H, inside)
    state = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if state_ptr is not None:
        state = tl.load(state_ptr + own, mask, other=0.0)
    before = state
    if CARRY and CELL != "gru":
        before = load_before(o, y_ptr, step, T, y_t, y_own, h0_ptr, own, ends, mask, REVERSE).to(tl.float32)
    hidden_mask = load_hidden_mask(o, own, state, mask)
    _, state = forward_body(
        CELL, G, o, acc, b, x, before, state, keep, zones, live, next_keep,
        h_out_ptr, y_ptr, step * y_t + y_own, gates_ptr, cells_ptr, None, step * B, row, units, H, own, mask, p,
        hidden_mask, BLOCK_B, BLOCK_H,
    )  # fmt: skip
    if state_ptr is not None:
        tl.store(state_ptr + own, state, mask)


@triton.jit
def _da_dot_w(acc, da_ptr, da_row, w_ptr, K, W, rows, lane, BLOCK_K: tl.constexpr, STAGES: tl.constexpr):
    """acc + da[rows, :K] @ w[:K, lane]; da_row: offset of each row, w: [K, W]."""
    for k0 in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = k0 + tl.arange(0, BLOCK_K)
        da = tl.load(da_ptr + da_row[:, None] + k[None, :], rows[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(w_ptr + k[:, None] * W + lane[None, :], (k < K)[:, None] & (lane < W)[None, :], other=0.0)
        acc = tl.dot(da, w, acc, input_precision="ieee")
    return acc


@triton.jit
def backward_body(
    CELL: tl.constexpr, G: tl.constexpr, o, dy, dcell, s, now, before, dh, dc, keep, zones, live, p,
    dxg_ptr, dxg_offs, dan_ptr, gates_ptr, counter_ptr, first_row, own, H, mask,
):  # fmt: skip
    """What follows the product that gives dh: gradients of one step, and their stores, which are the exchange.

    dy, dcell: what reaches this step from outside, [rows, units]. Returns (dh, dc) for the step before, but for the
    product."""
    d, dan, dh, dc = backward_gates(
        CELL, o, gates_ptr, s, now, before, dh + dy, dc + dcell, keep, zones, live, p, dxg_ptr.dtype.element_ty
    )
    store4(dxg_ptr, dxg_offs, H, mask, d, G)
    if CELL == "gru":
        tl.store(dan_ptr + first_row * H + own, dan, mask)
    if counter_ptr is not None:
        arrive(counter_ptr)
    return dh, dc


@triton.jit
def load_gradients(dy_ptr, dcells_ptr, dy_start, dy_offs, first_row, own, H, live):
    """(dy, dcells) of one step, fp32, 0 where nothing comes from outside."""
    dy = tl.zeros(live.shape, tl.float32)
    dcell = dy
    if dy_ptr is not None:
        dy = tl.load(dy_ptr + dy_start + dy_offs, live, other=0.0).to(tl.float32)
    if dcells_ptr is not None:
        dcell = tl.load(dcells_ptr + first_row * H + own, live, other=0.0)
    return dy, dcell


@triton.jit(do_not_specialize=["t", "t_after", "T"])
def backward_step_kernel(
    dy_ptr, dcells_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr, o,
    t, t_after, T, B, H, W, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr, CARRY: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Step t, on program (unit tile, batch tile, head). t_after: the step walked before this one, negative at the
    start. LAST: there is no step t, only the gradient of the initial state.

    y: what the scan carried, h or an LSTM's cells, and `first` [B, H] what it started from. dh, dc [B, H] fp32: what is
    carried past w_hh. CARRY: dh is (a GRU, lengths, zoneout), not only from the last step."""
    H, W, dxg_t, dxg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(dxg_t, ALIGN), aligned(dxg_b, ALIGN)
    dy_t, dy_b, y_t, y_b = aligned(dy_t, ALIGN), aligned(dy_b, ALIGN), aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    row = (tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    lane = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(2), H, W, HEADS)
    inside = lane < W
    rows = row < B
    mask = rows[:, None] & inside[None, :]
    own = row[:, None] * H + units[None, :]
    step = t.to(tl.int64)
    after = t_after.to(tl.int64)
    ends = load_ends(o, row, rows)
    if not LAST:  # asked for before the product, which hides their latency
        here = running(o, rows, step, ends)
        live = here[:, None] & inside[None, :]
        s = load_saved(gates_ptr, step * B, row, units, H, live, G)
        y_own = row[:, None] * y_b + units[None, :]
        now = tl.load(y_ptr + step * y_t + y_own, live, other=0.0)
        before = now
        if G >= 3:
            before = load_before(o, y_ptr, step, T, y_t, y_own, first_ptr, own, ends, mask, REVERSE)
        keep = load_keep(o, step * B + row, here)
        zones = load_zones(CELL, o, step * B, own, H, live)
        dy_own = row[:, None] * dy_b + units[None, :]
        dy, dcell = load_gradients(dy_ptr, dcells_ptr, step * dy_t, dy_own, step * B, own, H, live)

    acc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for g in tl.static_range(G):  # gates that lie side by side in da and in w_hh are one loop
        if (HEADS or g == 0) or (CELL == "gru" and g == 2):
            gates = 1 if HEADS else (G if CELL != "gru" else 2 - g // 2)
            if CELL == "gru" and g == 2:  # a_n has a gradient of its own
                da_ptr = dan_ptr + start
                da_row = (after * B + row) * H
            else:
                da_ptr = dxg_ptr + (g * H + start)
                da_row = after * dxg_t + row * dxg_b
            K = tl.where(t_after >= 0, gates * W, 0)
            acc = _da_dot_w(acc, da_ptr, da_row, w_ptr + (g * H + start) * W, K, W, rows, lane, BLOCK_K, STAGES)
    hidden_mask = load_hidden_mask(o, own, acc, mask)
    after_keep = load_keep(o, after * B + row, only(running(o, rows, after, ends), t_after + 1))
    acc = out_of_product(o, acc, after_keep, hidden_mask)
    if CARRY:
        dh = acc + tl.load(dh_ptr + own, mask, other=0.0)
    else:
        dh = acc + tl.load(dh_ptr + own, only(mask, -t_after), other=0.0)

    if not LAST:
        p = load_peephole(o, units, H, inside)
        dc = tl.zeros_like(dh)
        if CELL == "lstm":
            dc = tl.load(dc_ptr + own, mask, other=0.0)
        dxg_offs = step * dxg_t + row[:, None] * dxg_b + units[None, :]
        dh, dc = backward_body(
            CELL, G, o, dy, dcell, s, now, before, dh, dc, keep, zones, live, p,
            dxg_ptr, dxg_offs, dan_ptr, gates_ptr, None, step * B, own, H, mask,
        )  # fmt: skip
        if CELL == "lstm":
            tl.store(dc_ptr + own, dc, mask)
    if CARRY or LAST:
        tl.store(dh_ptr + own, dh, mask)
