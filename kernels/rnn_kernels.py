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

import triton
import triton.language as tl

from .rnn_cells import backward_cell, forward_cell, load4, load_bias, load_w, only, store4


@triton.jit
def _aligned(n, ALIGN: tl.constexpr):
    """n, a multiple of ALIGN, said so that the compiler knows: it sees multiples of 16 by itself, and no others."""
    if ALIGN > 1 and ALIGN < 16:
        n = n // ALIGN * ALIGN
    return n


@triton.jit
def _forward_finish(
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr,
    x0, x1, x2, x3, a0, a1, a2, a3, state, y_ptr, y_offs, gates_ptr, cells_ptr, first_row, row, units, H, mask,
):  # fmt: skip
    """Gates, and the stores every tier does: y, and with SAVE what backward needs. Returns (h, state).

    first_row + row: rows of the saved tensors, seen as [T * B, ..]; the scalar part is 64-bit, the tile's need not be.
    """
    f32: tl.constexpr = tl.float32
    h, state, s0, s1, s2, s3 = forward_cell(CELL, x0.to(f32), x1.to(f32), x2.to(f32), x3.to(f32), a0, a1, a2, a3, state)
    h = h.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + y_offs, h, mask)
    if SAVE and G >= 3:
        offs = row[:, None] * (4 * H) + units[None, :]
        store4(gates_ptr + first_row * (4 * H), offs, H, mask, s0, s1, s2, s3, 4)
        if CELL == "lstm":
            tl.store(cells_ptr + first_row * H + (row[:, None] * H + units[None, :]), state, mask)
    return h, state


@triton.jit
def _forward_step(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    t, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The step body: one [BLOCK_B, BLOCK_H] tile of one step, on program (unit tile, batch tile)."""
    H, xg_t, xg_b = _aligned(H, ALIGN), _aligned(xg_t, ALIGN), _aligned(xg_b, ALIGN)
    y_t, y_b = _aligned(y_t, ALIGN), _aligned(y_b, ALIGN)
    GP: tl.constexpr = 1 if G == 1 else 4  # gates padded: column u * GP + g of the product is gate g of unit u
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    step = t.to(tl.int64)
    x0, x1, x2, x3 = load4(xg_ptr, step * xg_t + row[:, None] * xg_b + units[None, :], H, mask, G)  # early: far away

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
    b0, b1, b2, b3 = load_bias(b_ptr, units, H, G, HAS_BIAS)
    a0 += b0[None, :]
    a1 += b1[None, :]
    a2 += b2[None, :]
    a3 += b3[None, :]

    own = row[:, None] * H + units[None, :]
    state = tl.load(state_ptr + own, mask, other=0.0)
    h, state = _forward_finish(
        CELL, G, SAVE, x0, x1, x2, x3, a0, a1, a2, a3, state,
        y_ptr, step * y_t + row[:, None] * y_b + units[None, :], gates_ptr, cells_ptr, step * B, row, units, H, mask,
    )  # fmt: skip
    tl.store(h_out_ptr + own, h, mask)
    if G >= 3:
        tl.store(state_ptr + own, state, mask)


@triton.jit(do_not_specialize=["t"])
def forward_step_kernel(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    t, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    _forward_step(
        xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
        t, B, H, xg_t, xg_b, y_t, y_b, CELL, G, SAVE, HAS_BIAS, BLOCK_B, BLOCK_H, BLOCK_K, STAGES, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def forward_tile_kernel(
    xg_ptr, w_ptr, b_ptr, h_in_ptr, h_out_ptr, state_ptr, y_ptr, gates_ptr, cells_ptr,
    T, B, H, xg_t, xg_b, y_t, y_b,
    CELL: tl.constexpr, G: tl.constexpr, SAVE: tl.constexpr, HAS_BIAS: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    H, xg_t, xg_b = _aligned(H, ALIGN), _aligned(xg_t, ALIGN), _aligned(xg_b, ALIGN)
    y_t, y_b = _aligned(y_t, ALIGN), _aligned(y_b, ALIGN)
    # Pointers move by 64-bit scalars; offsets inside a tile fit in 32 bits (the launcher sees to it).
    first = tl.program_id(0).to(tl.int64) * BLOCK_B
    row = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    mask = (first + row < B)[:, None] & (units < H)[None, :]
    own = row[:, None] * H + units[None, :]
    xg_ptr += first * xg_b
    y_ptr += first * y_b
    h_in_ptr += first * H
    h_out_ptr += first * H
    state_ptr += first * H
    xg_own = row[:, None] * xg_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]

    w0 = load_w(w_ptr, H, 0, BLOCK_H, True)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = load_w(w_ptr, H, 1, BLOCK_H, True)
        w2 = load_w(w_ptr, H, 2, BLOCK_H, True)
    if G == 4:
        w3 = load_w(w_ptr, H, 3, BLOCK_H, True)
    b0, b1, b2, b3 = load_bias(b_ptr, units, H, G, HAS_BIAS)
    zero = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)

    h = tl.load(h_in_ptr + own, mask, other=0.0)
    state = tl.load(state_ptr + own, mask, other=0.0)
    t = tl.zeros([], tl.int64)
    ahead = tl.full([], 1, tl.int64)
    if REVERSE:
        t += T - 1
        ahead = -ahead
    x0, x1, x2, x3 = load4(xg_ptr + t * xg_t, xg_own, H, mask, G)
    for step in range(T):
        # The next step's inputs are asked for before this step's products: their latency is hidden.
        more = only(mask, T - 1 - step)
        n0, n1, n2, n3 = load4(xg_ptr + (t + ahead) * xg_t, xg_own, H, more, G)
        a0 = tl.dot(h, w0, zero + b0[None, :], input_precision="ieee")
        a1, a2, a3 = a0, a0, a0
        if G >= 3:
            a1 = tl.dot(h, w1, zero + b1[None, :], input_precision="ieee")
            a2 = tl.dot(h, w2, zero + b2[None, :], input_precision="ieee")
        if G == 4:
            a3 = tl.dot(h, w3, zero + b3[None, :], input_precision="ieee")
        h, state = _forward_finish(
            CELL, G, SAVE, x0, x1, x2, x3, a0, a1, a2, a3, state,
            y_ptr + t * y_t, y_own, gates_ptr, cells_ptr, t * B + first, row, units, H, mask,
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
    dxg_ptr, dxg_offs, dan_ptr, first_row, row, units, H, mask,
):  # fmt: skip
    """Gate gradients of one step, and the stores every tier does. Returns (da of four gates as stored, dh, dc)."""
    f32: tl.constexpr = tl.float32
    dtype: tl.constexpr = dxg_ptr.dtype.element_ty
    d0, d1, d2, d3, dan, dh, dc = backward_cell(
        CELL, s0.to(f32), s1.to(f32), s2.to(f32), s3.to(f32), now.to(f32), before.to(f32), dh, dc
    )
    store4(dxg_ptr, dxg_offs, H, mask, d0, d1, d2, d3, G)
    if CELL == "gru":
        d2 = dan
        tl.store(dan_ptr + first_row * H + (row[:, None] * H + units[None, :]), dan.to(dtype), mask)
    return d0.to(dtype), d1.to(dtype), d2.to(dtype), d3.to(dtype), dh, dc


@triton.jit
def _load_saved(gates_ptr, first_row, row, units, H, mask, G: tl.constexpr):
    if G >= 3:
        offs = row[:, None] * (4 * H) + units[None, :]
        s0, s1, s2, s3 = load4(gates_ptr + first_row * (4 * H), offs, H, mask, 4)
    else:
        s0 = tl.zeros(mask.shape, tl.float32)
        s1, s2, s3 = s0, s0, s0
    return s0, s1, s2, s3


@triton.jit
def _load_before(y_ptr, y_offs, first_ptr, own, n, mask):
    """The state before a step: of the neighbouring step if n > 0 steps remain, else the initial one."""
    y = tl.load(y_ptr + y_offs, only(mask, n), other=0.0)
    return y + tl.load(first_ptr + own, only(mask, 1 - n), other=0.0)


@triton.jit
def _backward_step(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, LAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The backward step body, one [BLOCK_B, BLOCK_H] tile of one step, on program (unit tile, batch tile).

    t_after: the step walked before this one, negative at the start. t_before: the step whose state entered t,
    negative where that is the initial state `first`. LAST: there is no step t, only the gradient of h0.
    y: what the scan carried: h, or an LSTM's cells. dh, dc [B, H] fp32: what is carried past w_hh."""
    H, dxg_t, dxg_b = _aligned(H, ALIGN), _aligned(dxg_t, ALIGN), _aligned(dxg_b, ALIGN)
    dy_t, dy_b, y_t, y_b = _aligned(dy_t, ALIGN), _aligned(dy_b, ALIGN), _aligned(y_t, ALIGN), _aligned(y_b, ALIGN)
    rows = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    units = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = (rows < B)[:, None] & (units < H)[None, :]
    row = rows.to(tl.int64)
    own = row[:, None] * H + units[None, :]
    after = t_after.to(tl.int64)
    step = t.to(tl.int64)
    before = t_before.to(tl.int64)
    if not LAST:  # asked for before the product, which hides their latency
        s0, s1, s2, s3 = _load_saved(gates_ptr, step * B, row, units, H, mask, G)
        y_own = row[:, None] * y_b + units[None, :]
        y_now = tl.load(y_ptr + step * y_t + y_own, mask, other=0.0)
        y_before = y_now
        if G >= 3:
            y_before = _load_before(y_ptr, before * y_t + y_own, first_ptr, own, t_before + 1, mask)

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
        dh = acc + tl.load(dh_ptr + own, only(mask, -t_after), other=0.0)

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
            CELL, G, s0, s1, s2, s3, y_now, y_before, dh, dc,
            dxg_ptr, dxg_offs, dan_ptr, step * B, row, units, H, mask,
        )  # fmt: skip
        if CELL == "gru":
            tl.store(dh_ptr + own, dh, mask)
        if CELL == "lstm":
            tl.store(dc_ptr + own, dc, mask)


@triton.jit(do_not_specialize=["t", "t_after", "t_before"])
def backward_step_kernel(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, LAST: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    _backward_step(
        dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
        t, t_after, t_before, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
        CELL, G, HAS_DY, LAST, BLOCK_B, BLOCK_H, BLOCK_K, STAGES, ALIGN,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def backward_tile_kernel(
    dy_ptr, y_ptr, gates_ptr, first_ptr, w_ptr, dxg_ptr, dan_ptr, dh_ptr, dc_ptr,
    T, B, H, dy_t, dy_b, y_t, y_b, dxg_t, dxg_b,
    CELL: tl.constexpr, G: tl.constexpr, HAS_DY: tl.constexpr, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    H, dxg_t, dxg_b = _aligned(H, ALIGN), _aligned(dxg_t, ALIGN), _aligned(dxg_b, ALIGN)
    dy_t, dy_b, y_t, y_b = _aligned(dy_t, ALIGN), _aligned(dy_b, ALIGN), _aligned(y_t, ALIGN), _aligned(y_b, ALIGN)
    first = tl.program_id(0).to(tl.int64) * BLOCK_B  # as in forward_tile_kernel
    row = tl.arange(0, BLOCK_B)
    units = tl.arange(0, BLOCK_H)
    mask = (first + row < B)[:, None] & (units < H)[None, :]
    own = row[:, None] * H + units[None, :]
    y_ptr += first * y_b
    first_ptr += first * H
    dxg_ptr += first * dxg_b
    dh_ptr += first * H
    if CELL == "lstm":
        dc_ptr += first * H
    if HAS_DY:
        dy_ptr += first * dy_b
    dy_own = row[:, None] * dy_b + units[None, :]
    y_own = row[:, None] * y_b + units[None, :]
    dxg_own = row[:, None] * dxg_b + units[None, :]

    w0 = load_w(w_ptr, H, 0, BLOCK_H, False)
    w1, w2, w3 = w0, w0, w0
    if G >= 3:
        w1 = load_w(w_ptr, H, 1, BLOCK_H, False)
        w2 = load_w(w_ptr, H, 2, BLOCK_H, False)
    if G == 4:
        w3 = load_w(w_ptr, H, 3, BLOCK_H, False)

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
    s0, s1, s2, s3 = _load_saved(gates_ptr, t * B + first, row, units, H, mask, G)
    now = tl.load((y_ptr + t * y_t) + y_own, mask, other=0.0)
    before = _load_before(y_ptr + (t + ahead) * y_t, y_own, first_ptr, own, T - 1, mask)
    dy = dh
    if HAS_DY:
        dy = tl.load((dy_ptr + t * dy_t) + dy_own, mask, other=0.0)
    for step in range(T):
        # What the next step reads is asked for before this step's products.
        more = only(mask, T - 1 - step)
        next_t = t + ahead
        n0, n1, n2, n3 = _load_saved(gates_ptr, next_t * B + first, row, units, H, more, G)
        n_before = _load_before(y_ptr + (next_t + ahead) * y_t, y_own, first_ptr, own, T - 2 - step, more)
        n_dy = dy
        if HAS_DY:
            n_dy = tl.load((dy_ptr + next_t * dy_t) + dy_own, more, other=0.0)
            dh += dy.to(tl.float32)
        d0, d1, d2, d3, dh, dc = _backward_finish(
            CELL, G, s0, s1, s2, s3, now, before, dh, dc,
            dxg_ptr + t * dxg_t, dxg_own, dan_ptr, t * B + first, row, units, H, mask,
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
