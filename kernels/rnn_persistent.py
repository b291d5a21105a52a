"""The recurrent scan, persistent tier: one cooperative launch for the whole scan, w_hh resident on chip. Middle H.

Interpreted (one program a group) and compiled for sm_80 ... sm_120; never yet run on a GPU.

The mathematics, the tiles and the step body are those of rnn_step.py. A group is the programs of one (batch tile,
head): they exchange h (backward: da) through global memory at every step, and wait for each other there and nowhere
else:

    arrive    bar.sync, then one thread adds 1 to the group's counter with release semantics
    wait_for  one thread adds 0 with acquire semantics until all programs of the group have arrived at this step,
              bar.sync

h has two buffers: a program that writes one has waited for all to have read it, the step before. da is dxg itself, new
memory at every step. All programs must be resident at once, or those that wait would keep the others out: the plan
counts them (rnn_plan.py), and the cooperative launch makes the driver refuse instead of hanging.

w_hh is read once. Per step a program may read BLOCK_B W e of h (backward G BLOCK_B W e of da) from L2, and what the
step tier moves besides w_hh. c, a GRU's h, and what passes w_hh by stay in registers, in fp32.

A product is split over k among SPLIT warps, whose sums meet in shared memory: a tile of 16 rows has too few columns for
them, and one warp's chain of dependent tensor-core instructions would be SPLIT times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .rnn_cells import aligned, load4, load_bias, only
from .rnn_options import (
    head_of,
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
from .rnn_step import backward_body, forward_body, gate_rows, load_gradients, wait_for


@triton.jit
def _split_k(BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """0 .. BLOCK_K as [SPLIT, BLOCK_K / SPLIT]."""
    PART: tl.constexpr = BLOCK_K // SPLIT
    return tl.arange(0, SPLIT)[:, None] * PART + tl.arange(0, PART)[None, :]


@triton.jit
def _load_exchange(ptr, row_offs, k, rows, W):
    """[SPLIT, rows, BLOCK_K / SPLIT] of what the group wrote; past the L1, where it is of no further use."""
    mask = rows[None, :, None] & (k < W)[:, None, :]
    return tl.load(ptr + row_offs[None, :, None] + k[:, None, :], mask, other=0.0, cache_modifier=".cg")


@triton.jit(do_not_specialize=["T"])
def forward_persistent_kernel(
    xg_ptr, w_ptr, b_ptr, h0_ptr, h_io_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr, counter_ptr, o,
    T, B, H, W, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr, CARRY: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """On program (unit tile, batch tile, head). h_io [2, B, H]: the exchange, its first half as the first step needs
    it. counter: zero, 32 apart. BLOCK_K >= W. The rest as in forward_step_kernel."""
    H, W, xg_t, xg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(xg_t, ALIGN), aligned(xg_b, ALIGN)
    y_t, y_b = aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    first = tl.program_id(1).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    lane = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(2), H, W, HEADS)
    inside = lane < W
    rows = first + row < B
    mask = rows[:, None] & inside[None, :]
    own = row[:, None] * H + units[None, :]
    xg_ptr += first * xg_b
    y_ptr += first * y_b
    h0_ptr += first * H
    h_io_ptr += first * H
    counter_ptr += (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * 32
    xg_own = row[:, None] * xg_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    k = _split_k(BLOCK_K, SPLIT)

    w_row, exists = gate_rows(tl.program_id(0), H, W, start, G, BLOCK_H)
    w_mask = exists[None, None, :] & (k < W)[:, :, None]
    w = tl.load(w_ptr + w_row[None, None, :] * W + k[:, :, None], w_mask, other=0.0)
    b = load_bias(b_ptr, units, H, inside, G)
    p = load_peephole(o, units, H, inside)
    ends = load_ends(o, first + row, rows)
    state = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if state_ptr is not None:
        state_ptr += first * H
        state = tl.load(state_ptr + own, mask, other=0.0)
    h = state
    if CARRY and CELL != "gru":
        h = tl.load(h0_ptr + own, mask, other=0.0).to(tl.float32)
    hidden_mask = load_hidden_mask(o, first * H + own, h, mask)

    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if REVERSE:
        t += T - 1
        ahead = -ahead
    turn = tl.zeros([], tl.int64)  # which half of the exchange is read
    for step in tl.range(0, T, num_stages=1):  # never pipelined: a load of h must not move above its wait
        here = running(o, rows, t, ends)
        live = here[:, None] & inside[None, :]
        x = load4(xg_ptr + t * xg_t, xg_own, H, live, G)
        keep = load_keep(o, t * B + first + row, here)
        zones = load_zones(CELL, o, t * B + first, own, H, live)
        next_keep = load_keep(o, (t + ahead) * B + first + row, only(running(o, rows, t + ahead, ends), T - 1 - step))
        wait_for(counter_ptr, step * tl.num_programs(0))
        into = _load_exchange(h_io_ptr + turn * (B * H), row * H + start, k, rows, W)
        acc = tl.sum(tl.dot(into, w, input_precision="ieee"), 0)
        turn = 1 - turn
        new, state = forward_body(
            CELL, G, o, acc, b, x, h, state, keep, zones, live, next_keep,
            h_io_ptr + turn * (B * H), y_ptr + t * y_t, y_own, gates_ptr, cells_ptr, counter_ptr, t * B + first, row,
            units, H, own, mask, p, hidden_mask, BLOCK_B, BLOCK_H,
        )  # fmt: skip
        if CARRY:
            h = state if CELL == "gru" else new.to(tl.float32)
        t += ahead
    if CELL == "lstm":
        tl.store(state_ptr + own, state, mask)


@triton.jit
def _load_gate_w(w_ptr, k, lane, H, W, start, g: tl.constexpr):
    """w_hh of gate g as [SPLIT, BLOCK_K / SPLIT, units]."""
    mask = (k < W)[:, :, None] & (lane < W)[None, None, :]
    return tl.load(w_ptr + (g * H + start + k)[:, :, None] * W + lane[None, None, :], mask, other=0.0)


@triton.jit
def _da_dot_resident(
    CELL: tl.constexpr, G: tl.constexpr, w, dxg_ptr, dan_ptr, dxg_row, dan_row, start, k, rows, H, W,
):  # fmt: skip
    """da_after @ w_hh for this program's units."""
    # Two gates at a time are on their way from L2.
    d0 = _load_exchange(dxg_ptr + start, dxg_row, k, rows, W)
    if G == 1:
        acc = tl.dot(d0, w[0], input_precision="ieee")
    else:
        d1 = _load_exchange(dxg_ptr + (H + start), dxg_row, k, rows, W)
        acc = tl.dot(d0, w[0], input_precision="ieee")
        if CELL == "gru":
            d2 = _load_exchange(dan_ptr + start, dan_row, k, rows, W)
        else:
            d2 = _load_exchange(dxg_ptr + (2 * H + start), dxg_row, k, rows, W)
        acc = tl.dot(d1, w[1], acc, input_precision="ieee")
        if G == 4:
            d3 = _load_exchange(dxg_ptr + (3 * H + start), dxg_row, k, rows, W)
        acc = tl.dot(d2, w[2], acc, input_precision="ieee")
        if G == 4:
            acc = tl.dot(d3, w[3], acc, input_precision="ieee")
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["T"])
def backward_persistent_kernel(
    dy_ptr, dcells_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr, counter_ptr, o,
    T, B, H, W, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HEADS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """On program (unit tile, batch tile, head). dh, dc: the gradients of the last state, then of the first one; the
    rest as in backward_step_kernel."""
    H, W, dxg_t, dxg_b = aligned(H, ALIGN), aligned(W, ALIGN), aligned(dxg_t, ALIGN), aligned(dxg_b, ALIGN)
    dy_t, dy_b, y_t, y_b = aligned(dy_t, ALIGN), aligned(dy_b, ALIGN), aligned(y_t, ALIGN), aligned(y_b, ALIGN)
    first = tl.program_id(1).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    lane = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    units, start, W = head_of(lane, tl.program_id(2), H, W, HEADS)
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
    counter_ptr += (tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)) * 32
    dy_own = row[:, None] * dy_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    dxg_own = row[:, None] * dxg_b + units[None, :]
    k = _split_k(BLOCK_K, SPLIT)

    w0 = _load_gate_w(w_ptr, k, lane, H, W, start, 0)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = _load_gate_w(w_ptr, k, lane, H, W, start, 1)
        w2 = _load_gate_w(w_ptr, k, lane, H, W, start, 2)
    if G == 4:
        w3 = _load_gate_w(w_ptr, k, lane, H, W, start, 3)
    p = load_peephole(o, units, H, inside)
    ends = load_ends(o, first + row, rows)
    dh = tl.load(dh_ptr + own, mask, other=0.0)
    hidden_mask = load_hidden_mask(o, first * H + own, dh, mask)
    dc = tl.zeros_like(dh)
    if CELL == "lstm":
        dc = tl.load(dc_ptr + own, mask, other=0.0)
    # The walk starts at the step the forward scan took last.
    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if not REVERSE:
        t += T - 1
        ahead = -ahead
    keep = rows[:, None]
    # One trip more than steps, for the gradient of the initial state. Never pipelined: a load of da must not move above
    # its wait.
    for step in tl.range(0, T + 1, num_stages=1):
        here = only(running(o, rows, t, ends), T - step)
        live = here[:, None] & inside[None, :]
        stores = only(mask, T - step)
        s = load_saved(gates_ptr, t * B + first, row, units, H, live, G)
        now = tl.load((y_ptr + t * y_t) + y_own, live, other=0.0)
        before = now
        if G >= 3:
            before = load_before(o, y_ptr, t, T, y_t, y_own, first_ptr, own, ends, stores, REVERSE)
        dy, dcell = load_gradients(dy_ptr, dcells_ptr, t * dy_t, dy_own, t * B + first, own, H, live)
        zones = load_zones(CELL, o, t * B + first, own, H, live)
        after_keep = keep
        keep = load_keep(o, t * B + first + row, here)
        wait_for(counter_ptr, step * tl.num_programs(0))
        after = t - ahead
        acc = _da_dot_resident(
            CELL, G, (w0, w1, w2, w3), dxg_ptr + after * dxg_t, dan_ptr, row * dxg_b, (after * B + first + row) * H,
            start, k, only(rows, step), H, W,
        )  # fmt: skip
        dh += out_of_product(o, acc, after_keep, hidden_mask)
        ready = only(mask, step + 1 - T)
        tl.store(dh_ptr + own, dh, ready)
        if CELL == "lstm":
            tl.store(dc_ptr + own, dc, ready)
        dh, dc = backward_body(
            CELL, G, o, dy, dcell, s, now, before, dh, dc, keep, zones, live, p,
            dxg_ptr + t * dxg_t, dxg_own, dan_ptr, gates_ptr, counter_ptr, t * B + first, own, H, stores,
        )  # fmt: skip
        t += ahead
