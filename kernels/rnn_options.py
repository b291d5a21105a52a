"""What a scan may do besides its cell (reference/rnn.py: ScanOptions), as the kernels see it.

Every kernel takes one `Options`. An option that is not given is None, which is a constant of the compiled kernel: the
plain scan contains no trace of it. All of them are elementwise:

    lengths      the rows that have ended leave their state as it is; nothing of theirs is read, and 0 is written
    resets       the state before a step counts as 0; its gradient ends there
    hidden_mask  h enters the product with w_hh multiplied by it, and the product's gradient leaves so
    peephole     c enters the gates i, f and (the new c) o
    zone, zoneout    the new h or c is replaced by, or blended with, the one of the step before

They may cost, per step and unit, one byte of each zone mask, and per step and row one byte of resets; lengths,
hidden_mask and peephole are read once by kernels that hold them on chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .rnn_cells import backward_cell, forward_cell, fp32, load4, only, store4


class Options(NamedTuple):
    """The fields of ScanOptions that kernels have; truth values are bytes, and a weight of 0 is None."""

    lengths: torch.Tensor | None = None  # [B] int64
    resets: torch.Tensor | None = None  # [T, B] uint8
    hidden_mask: torch.Tensor | None = None  # [B, H]
    peephole: torch.Tensor | None = None  # [3, H]
    zone_h: torch.Tensor | None = None  # [T, B, H] uint8
    zone_c: torch.Tensor | None = None  # [T, B, H] uint8
    zoneout_h: float | None = None
    zoneout_c: float | None = None

    @property
    def zones_h(self) -> bool:
        return self.zone_h is not None or self.zoneout_h is not None

    @property
    def given(self) -> int:
        """How many are given."""
        return sum(value is not None for value in self)


@triton.jit
def head_of(lane, pid, H, W, HEADS: tl.constexpr):
    """(the units `lane` of head `pid`, the head's first unit, its width); without heads there is one of width H."""
    if HEADS:
        return pid * W + lane, pid * W, W
    else:
        return lane, 0, H


@triton.jit
def load_ends(o, row, in_batch):
    """The number of steps of each row, [rows]."""
    if o.lengths is not None:
        return tl.load(o.lengths + row, in_batch, other=0).to(tl.int32)
    else:
        return row


@triton.jit
def running(o, rows, t, ends):
    """Of the rows [rows], those whose sequence has a step t."""
    if o.lengths is not None:
        rows = rows & (t < ends)
    return rows


@triton.jit
def load_keep(o, row, rows):
    """[rows, 1]: false where a reset makes the state before the step 0. row: index into resets seen as [T * B]."""
    if o.resets is not None:
        return tl.load(o.resets + row[:, None], rows[:, None], other=0) == 0
    else:
        return rows[:, None]


@triton.jit
def load_zones(CELL: tl.constexpr, o, first_row, offs, H, live):
    """The masks of zoneout of one step. first_row + offs: index into [T * B, H], the scalar part 64-bit."""
    zone_h, zone_c = live, live
    if o.zone_h is not None:
        zone_h = tl.load(o.zone_h + first_row * H + offs, live, other=0) != 0
    if CELL == "lstm" and o.zone_c is not None:
        zone_c = tl.load(o.zone_c + first_row * H + offs, live, other=0) != 0
    return zone_h, zone_c


@triton.jit
def load_peephole(o, units, H, mask):
    """Its rows as [1, units], fp32."""
    zero = tl.zeros(units.shape, tl.float32)[None, :]
    p0, p1, p2 = zero, zero, zero
    if o.peephole is not None:
        p0 = tl.load(o.peephole + units[None, :], mask[None, :], other=0.0).to(tl.float32)
        p1 = tl.load(o.peephole + H + units[None, :], mask[None, :], other=0.0).to(tl.float32)
        p2 = tl.load(o.peephole + 2 * H + units[None, :], mask[None, :], other=0.0).to(tl.float32)
    return p0, p1, p2


@triton.jit
def load_hidden_mask(o, offs, like, mask):
    if o.hidden_mask is not None:
        return tl.load(o.hidden_mask + offs, mask, other=0.0)
    else:
        return like


@triton.jit
def into_product(o, h, keep, hidden_mask):
    """h as it enters the product with w_hh."""
    if o.resets is not None:
        h = tl.where(keep, h, 0.0).to(h.dtype)
    if o.hidden_mask is not None:
        h = h * hidden_mask
    return h


@triton.jit
def out_of_product(o, product, keep, hidden_mask):
    """The gradient of h, from that of what entered the product."""
    if o.hidden_mask is not None:
        product = product * hidden_mask.to(tl.float32)
    if o.resets is not None:
        product = tl.where(keep, product, 0.0)
    return product


@triton.jit
def _zoneout(zone_ptr, weight, zone, new, old):
    if zone_ptr is not None:
        new = tl.where(zone, old, new)
    elif weight is not None:
        new = weight * old + (1.0 - weight) * new
    return new


@triton.jit
def _of_new(zone_ptr, weight, zone, d):
    """The share of the gradient d that goes to the new value."""
    if zone_ptr is not None:
        d = tl.where(zone, 0.0, d)
    elif weight is not None:
        d = (1.0 - weight) * d
    return d


@triton.jit
def _of_old(zone_ptr, weight, zone, d, through):
    """`through`, and the share of the gradient d that goes to the value of the step before."""
    if zone_ptr is not None:
        through += tl.where(zone, d, 0.0)
    elif weight is not None:
        through += weight * d
    return through


@triton.jit
def load_before(o, ptr, t, T, stride_t, offs, first_ptr, own, ends, mask, REVERSE: tl.constexpr):
    """The state that entered step t: what the step before left at `ptr`, or, for a sequence's first step, `first`."""
    if REVERSE:
        if o.lengths is not None:
            old = mask & (t + 1 < ends)[:, None]
        else:
            old = only(mask, T - 1 - t)
        ptr += (t + 1) * stride_t
    else:
        old = only(mask, t)
        ptr += (t - 1) * stride_t
    return tl.load(ptr + offs, old, other=0.0) + tl.load(first_ptr + own, mask ^ old, other=0.0)


@triton.jit
def forward_gates(CELL: tl.constexpr, o, x, a, h, state, keep, zones, live, p):
    """One step of all cells. h, state: fp32, before the step; h counts only with lengths or zoneout, and for a GRU it
    is the state. Returns (h and state after it, what y and cells show of them, four values for backward)."""
    h_left, state_left = h, state
    if o.resets is not None:
        h = tl.where(keep, h, 0.0)
        state = tl.where(keep, state, 0.0)
    new, c, s = forward_cell(CELL, o.peephole is not None, fp32(x), a, state, p)
    if CELL == "gru":
        h = state
    new = _zoneout(o.zone_h, o.zoneout_h, zones[0], new, h)
    if CELL == "gru":
        c = new
    if CELL == "lstm":
        c = _zoneout(o.zone_c, o.zoneout_c, zones[1], c, state)
    y, cell = new, c
    if o.lengths is not None:
        y = tl.where(live, new, 0.0)
        cell = tl.where(live, c, 0.0)
        new = tl.where(live, new, h_left)
        c = tl.where(live, c, state_left)
    return new, c, y, cell, s


@triton.jit
def forward_store(
    G: tl.constexpr, y, cell, s, y_ptr, y_offs, gates_ptr, cells_ptr, first_row, row, units, H, mask, live
):  # fmt: skip
    """The stores of every tier. first_row + row: rows of gates and cells seen as [T * B, ..], the scalar part
    64-bit."""
    tl.store(y_ptr + y_offs, y.to(y_ptr.dtype.element_ty), mask)
    if gates_ptr is not None:
        S: tl.constexpr = 1 if G == 1 else 4
        store4(gates_ptr + first_row * (S * H), row[:, None] * (S * H) + units[None, :], H, live, s, S)
    if cells_ptr is not None:
        tl.store(cells_ptr + first_row * H + (row[:, None] * H + units[None, :]), cell, mask)


@triton.jit
def backward_gates(CELL: tl.constexpr, o, gates_ptr, s, now, before, dh, dc, keep, zones, live, p, dtype: tl.constexpr):
    """Gradients of one step; dh, dc: all that reaches the state after it, before: the state before it.

    Returns (da of the four gates and dan, in `dtype`, and what reaches the state before, but for the product)."""
    s, now, before = fp32(s), now.to(tl.float32), before.to(tl.float32)
    dh_in, dc_in = dh, dc
    if o.resets is not None:
        before = tl.where(keep, before, 0.0)
    if CELL == "lstm":
        if o.zone_c is not None or o.zoneout_c is not None:  # cells hold c after zoneout
            now = s[1] * before + s[0] * s[2]
    elif CELL != "gru":
        if gates_ptr is not None:  # h before zoneout
            now = s[0]
    dh = _of_new(o.zone_h, o.zoneout_h, zones[0], dh_in)
    if CELL == "lstm":
        dc = _of_new(o.zone_c, o.zoneout_c, zones[1], dc_in)
    d, dan, dh, dc = backward_cell(CELL, o.peephole is not None, s, now, before, dh, dc, p)
    dh = _of_old(o.zone_h, o.zoneout_h, zones[0], dh_in, dh)
    if CELL == "lstm":
        dc = _of_old(o.zone_c, o.zoneout_c, zones[1], dc_in, dc)
    if o.resets is not None:
        dh = tl.where(keep, dh, 0.0)
        dc = tl.where(keep, dc, 0.0)
    d0, d1, d2, d3 = d
    if o.lengths is not None:
        d0, d1 = tl.where(live, d0, 0.0), tl.where(live, d1, 0.0)
        d2, d3 = tl.where(live, d2, 0.0), tl.where(live, d3, 0.0)
        dan = tl.where(live, dan, 0.0)
        dh = tl.where(live, dh, dh_in)
        dc = tl.where(live, dc, dc_in)
    return (d0.to(dtype), d1.to(dtype), d2.to(dtype), d3.to(dtype)), dan.to(dtype), dh, dc


@triton.jit
def load_saved(gates_ptr, first_row, row, units, H, live, G: tl.constexpr):
    """What forward_store kept in `gates`; zeros where it kept nothing."""
    if gates_ptr is not None:
        S: tl.constexpr = 1 if G == 1 else 4
        return load4(gates_ptr + first_row * (S * H), row[:, None] * (S * H) + units[None, :], H, live, S)
    else:
        v = tl.zeros(live.shape, tl.float32)
        return v, v, v, v
