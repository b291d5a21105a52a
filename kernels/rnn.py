"""Launchers of the recurrent scan: one layer, one direction, of an LSTM, GRU or RNN, forward and backward.

What the kernels compute, and the memory traffic they are allowed, is at the heads of rnn_tile.py, rnn_step.py and
rnn_persistent.py; which of them runs, and with which tiles, is decided in rnn_plan.py; what the options mean is in
rnn_options.py. Interpreted and compiled; never yet run on a GPU.

The arguments are those of the torch ops rnn_scan_fwd and rnn_scan_bwd, with the cell by its name. Nothing here waits
for the GPU: lengths are read on the device only.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

from . import common
from .rnn_options import Options
from .rnn_persistent import backward_persistent_kernel, forward_persistent_kernel
from .rnn_plan import GATES, LaunchPlan, Tiles, plan, refusal
from .rnn_step import backward_step_kernel, forward_step_kernel
from .rnn_tile import backward_tile_kernel, forward_tile_kernel

__all__ = ["LaunchPlan", "Options", "plan", "refusal", "rnn_scan_bwd", "rnn_scan_fwd"]

_COUNTER_STRIDE = 32  # int32 between two groups' counters: a cache line each


def _sequence(like: torch.Tensor, width: int) -> torch.Tensor:
    """An empty [T, B, width] in the memory layout (time-major or batch-major) of the sequence `like`."""
    t, b = like.shape[:2]
    if like.stride(1) > like.stride(0):
        return like.new_empty(b, t, width).transpose(0, 1)
    return like.new_empty(t, b, width)


def _strides(sequence: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if sequence is None else (sequence.stride(0), sequence.stride(1))


def _bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _options(device, lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c) -> Options:
    if lengths is not None and lengths.device != device:
        raise ValueError(
            f"lengths are on {lengths.device}, the sequences on {device}; the Triton kernels read them there"
        )
    rows = [None if v is None else v.contiguous() for v in (lengths, hidden_mask, peephole)]
    return Options(
        rows[0], _bytes(resets), rows[1], rows[2], _bytes(zone_h), _bytes(zone_c), zoneout_h or None, zoneout_c or None
    )


@dataclass(frozen=True)
class _Scan:
    """What forward and backward of one call share."""

    cell: str
    steps: int
    batch: int
    hidden: int
    width: int  # of a head
    reverse: bool
    options: Options

    @classmethod
    def of(cls, cell: str, sequence: torch.Tensor, w_hh: torch.Tensor, reverse: bool, options: tuple) -> _Scan:
        if sequence.dim() != 3:
            raise ValueError(refusal(packed=True))
        hidden = w_hh.shape[0] // GATES[cell]
        return cls(cell, *sequence.shape[:2], hidden, w_hh.shape[1], reverse, _options(sequence.device, *options))

    @property
    def heads(self) -> int:
        return self.hidden // self.width

    @property
    def carries(self) -> bool:
        """Whether h, or its gradient, passes from step to step besides the product (a GRU's blend apart)."""
        return self.options.zones_h or self.options.lengths is not None

    def plan(self, *sequences: torch.Tensor | None, persistent: bool | None = None) -> LaunchPlan:
        first = sequences[0]
        reach = max(s.stride(1) for s in sequences if s is not None) + 4 * self.hidden  # and the gates' width
        facts = common.capability(first.device), common.sm_count(first.device)
        return plan(
            self.cell, first.dtype, self.batch, self.hidden, *facts, reach, self.heads, self.options.given, persistent
        )

    def constants(self, tiles: Tiles, *sequences: torch.Tensor | None) -> dict:
        """The compile-time arguments of every kernel. ALIGN: how wide loads may be, the largest power of two up to 16
        that divides the width and the strides of the sequences."""
        strides = [n for s in sequences for n in _strides(s)]
        return {
            "CELL": self.cell,
            "G": GATES[self.cell],
            "HEADS": self.heads > 1,
            "REVERSE": self.reverse,
            "BLOCK_B": tiles.block_b,
            "BLOCK_H": tiles.block_h,
            "ALIGN": math.gcd(16, self.width, *strides),
            "num_warps": tiles.warps,
            "maxnreg": tiles.registers or None,
        }

    def grid(self, tiles: Tiles) -> tuple[int, int, int]:
        """(unit tiles of a head, batch tiles, heads)."""
        return common.cdiv(self.width, tiles.block_h), common.cdiv(self.batch, tiles.block_b), self.heads

    def counters(self, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
        return torch.zeros(grid[1] * grid[2] * _COUNTER_STRIDE, dtype=torch.int32, device=device)


def _refused(error: RuntimeError, launch_plan: LaunchPlan) -> None:
    """The driver may know that less fits than the plan counted: then, and only then, the step tier takes over."""
    if "cooperative launch" not in str(error):
        raise error
    warnings.warn(f"the GPU cannot hold this plan, one launch a step runs instead: {launch_plan}", stacklevel=3)


def _last_state(y: torch.Tensor, h0: torch.Tensor, lengths: torch.Tensor | None, reverse: bool) -> torch.Tensor:
    """h after the last step of each sequence, from y; a sequence of no steps leaves h0."""
    if y.shape[0] == 0:
        return h0.clone()
    if lengths is None:
        return y[0 if reverse else -1].clone(memory_format=torch.contiguous_format)
    batch = torch.arange(y.shape[1], device=y.device)
    last = y[0] if reverse else y[(lengths - 1).clamp_min(0), batch]
    return torch.where((lengths > 0)[:, None], last, h0)


def _exchange(h0: torch.Tensor, options: Options, first: int) -> torch.Tensor:
    """[2, B, H]: h on its way into the product. One half is read while the other one is written; the first step,
    `first`, reads the first half."""
    h = h0
    if options.resets is not None:
        h = h.masked_fill(options.resets[first].bool()[:, None], 0.0)
    if options.hidden_mask is not None:
        h = h * options.hidden_mask
    h_io = h0.new_empty(2, *h0.shape)
    h_io[0].copy_(h)
    return h_io


def rnn_scan_fwd(
    cell: str,
    xg: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor | None,
    w_hh: torch.Tensor,
    b_hh: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    hidden_mask: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
    zone_h: torch.Tensor | None = None,
    zone_c: torch.Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
    save: bool = False,
    want_cells: bool = False,
    launch_plan: LaunchPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One layer and direction over a whole sequence; fp32, bf16 or fp16, all tensors of one dtype.

    xg [T, B, G*H] (any strides over T and B), h0, c0 [B, H], w_hh [G*H, H] or [G*H, H/heads], b_hh [G*H]; the options
    are those of seqfuse.reference.ScanOptions, lengths on the device of xg.
    Returns (y [T, B, H], h_n [B, H], c_n [B, H], gates [T, B, S*H], cells [T, B, H] fp32); what the cell, save=False or
    want_cells=False leaves out is empty [0]. S is 4, for an RNN 1 with zoneout and else 0. `launch_plan` overrides the
    plan (tests, tuning).
    """
    options = (lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c)
    scan = _Scan.of(cell, xg, w_hh, reverse, options)
    o, steps, batch, hidden = scan.options, scan.steps, scan.batch, scan.hidden
    xg = xg if xg.stride(2) == 1 else xg.contiguous()
    h0, w_hh, b_hh = h0.contiguous(), w_hh.contiguous(), None if b_hh is None else b_hh.contiguous()
    y = _sequence(xg, hidden)
    # Outputs never share memory, empty ones neither: a registered op may not return aliases.
    lstm, saved = cell == "lstm", 4 if GATES[cell] > 1 else int(o.zones_h)
    gates = xg.new_empty((steps, batch, saved * hidden) if save and saved else 0)
    cells = xg.new_empty((steps, batch, hidden) if lstm and (save or want_cells) else 0, dtype=torch.float32)
    state = None
    if GATES[cell] > 1:
        state = torch.empty(batch, hidden, dtype=torch.float32, device=xg.device).copy_(c0 if lstm else h0)
    outputs = (state, y, gates if gates.numel() else None, cells if cells.numel() else None)
    sizes = (batch, hidden, scan.width, *_strides(xg), *_strides(y))
    walk = range(steps - 1, -1, -1) if reverse else range(steps)
    p = launch_plan or scan.plan(xg, y)
    with common.on_device(xg):
        if p.tier == "persistent":
            h_io, grid = _exchange(h0, o, walk[0]), scan.grid(p.forward)
            args = (xg, w_hh, b_hh, h0, h_io, *outputs, scan.counters(grid, xg.device), o, steps, *sizes)
            flags = scan.constants(p.forward, xg, y) | {"CARRY": scan.carries}
            flags |= {"BLOCK_K": p.forward.block_k, "SPLIT": p.forward.warps, "cooperative": True}
            try:
                common.launch(forward_persistent_kernel, grid, *args, **flags)
            except RuntimeError as error:
                _refused(error, p)
                p = scan.plan(xg, y, persistent=False)
        flags = scan.constants(p.forward, xg, y)
        if p.tier == "tile":
            grid = scan.grid(p.forward)[1:]
            common.launch(forward_tile_kernel, grid, xg, w_hh, b_hh, h0, *outputs, o, steps, *sizes, **flags)
        elif p.tier == "step":
            h_in, h_out = _exchange(h0, o, walk[0])
            flags |= {"CARRY": scan.carries, "BLOCK_K": p.forward.block_k, "STAGES": p.forward.stages}
            for t in walk:
                args = (xg, w_hh, b_hh, h0, h_in, h_out, *outputs, o, t, steps, *sizes)
                common.launch(forward_step_kernel, scan.grid(p.forward), *args, **flags)
                h_in, h_out = h_out, h_in
    c_n = state.to(xg.dtype) if lstm else xg.new_empty(0)
    return y, _last_state(y, h0, lengths, reverse), c_n, gates, cells


def rnn_scan_bwd(
    cell: str,
    dy: torch.Tensor | None,
    dh_n: torch.Tensor | None,
    dc_n: torch.Tensor | None,
    dcells: torch.Tensor | None,
    y: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor | None,
    w_hh: torch.Tensor,
    lengths: torch.Tensor | None = None,
    resets: torch.Tensor | None = None,
    hidden_mask: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
    zone_h: torch.Tensor | None = None,
    zone_c: torch.Tensor | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    reverse: bool = False,
    launch_plan: LaunchPlan | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `rnn_scan_fwd` from what it returned with save=True; dy [T, B, H] may have any strides over T, B.

    dcells [T, B, H] fp32: the gradient that reaches c_t from outside, at every step.
    Returns (dxg [T, B, G*H] in y's layout, dan [T, B, H] GRU only, dh0 [B, H], dc0 [B, H] LSTM only, db_hh [G*H] fp32).
    """
    options = (lengths, resets, hidden_mask, peephole, zone_h, zone_c, zoneout_h, zoneout_c)
    scan = _Scan.of(cell, y, w_hh, reverse, options)
    o, steps, batch, hidden = scan.options, scan.steps, scan.batch, scan.hidden
    if dy is not None and dy.stride(2) != 1:
        dy = dy.contiguous()
    dcells = None if dcells is None else dcells.contiguous()
    h0, w_hh = h0.contiguous(), w_hh.contiguous()
    lstm, gru = cell == "lstm", cell == "gru"
    dxg = _sequence(y, GATES[cell] * hidden)
    dan = y.new_empty((steps, batch, hidden) if gru else 0)
    dh = torch.zeros(batch, hidden, dtype=torch.float32, device=y.device)
    dc = torch.zeros_like(dh) if lstm else None
    if dh_n is not None:
        dh.copy_(dh_n)
    if dc is not None and dc_n is not None:
        dc.copy_(dc_n)
    # What the scan carried from step to step, and what it started from.
    carried, first = (cells, c0.float().contiguous()) if lstm else (y, h0)
    saved = gates if gates.numel() else None
    ptrs = (dy, dcells, carried, saved, first, w_hh, dxg, dan if gru else None, dh, dc)
    sizes = (batch, hidden, scan.width, *_strides(dy), *_strides(carried), *_strides(dxg))
    carry = {"CARRY": gru or scan.carries}
    p = launch_plan or scan.plan(y, dxg, dy)
    with common.on_device(y):
        if p.tier == "persistent":
            grid = scan.grid(p.backward)
            args = (*ptrs, scan.counters(grid, y.device), o, steps, *sizes)
            flags = scan.constants(p.backward, carried, dxg, dy)
            flags |= {"BLOCK_K": p.backward.block_k, "SPLIT": p.backward.warps, "cooperative": True}
            try:
                common.launch(backward_persistent_kernel, grid, *args, **flags)
            except RuntimeError as error:
                _refused(error, p)
                p = scan.plan(y, dxg, dy, persistent=False)
        flags = scan.constants(p.backward, carried, dxg, dy)
        if p.tier == "tile":
            common.launch(backward_tile_kernel, scan.grid(p.backward)[1:], *ptrs, o, steps, *sizes, **flags)
        elif p.tier == "step":
            flags |= carry | {"BLOCK_K": p.backward.block_k, "STAGES": p.backward.stages}
            after = -1
            for t in range(steps) if reverse else range(steps - 1, -1, -1):
                args = (*ptrs, o, t, after, steps, *sizes)
                common.launch(backward_step_kernel, scan.grid(p.backward), *args, **flags, LAST=False)
                after = t
            args = (*ptrs, o, 0, after, steps, *sizes)
            common.launch(backward_step_kernel, scan.grid(p.backward), *args, **flags, LAST=True)
    db = dxg.sum((0, 1), dtype=torch.float32)
    if gru:
        db[2 * hidden :] = dan.sum((0, 1), dtype=torch.float32)
    dc0 = y.new_empty(0) if dc is None else dc.to(y.dtype)
    return dxg, dan, dh.to(y.dtype), dc0, db
