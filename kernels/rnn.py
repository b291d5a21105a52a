"""Launchers of the recurrent scan: one layer, one direction, of an LSTM, GRU or RNN, forward and backward.

What the kernels compute, and the memory traffic they are allowed, is at the head of rnn_kernels.py; which of them runs,
and with which tiles, is decided in rnn_plan.py. Interpreted and compiled; never yet run on a GPU.
"""

from __future__ import annotations

import math

import torch

from . import common
from .rnn_kernels import backward_step_kernel, backward_tile_kernel, forward_step_kernel, forward_tile_kernel
from .rnn_plan import GATES, LaunchPlan, plan

__all__ = ["LaunchPlan", "plan", "rnn_scan_bwd", "rnn_scan_fwd"]


def _sequence(like: torch.Tensor, width: int) -> torch.Tensor:
    """An empty [T, B, width] in the memory layout (time-major or batch-major) of the sequence `like`."""
    t, b = like.shape[:2]
    if like.stride(1) > like.stride(0):
        return like.new_empty(b, t, width).transpose(0, 1)
    return like.new_empty(t, b, width)


def _strides(sequence: torch.Tensor) -> tuple[int, int]:
    return sequence.stride(0), sequence.stride(1)


def _align(h: int, *sequences: torch.Tensor | None) -> int:
    """The largest power of two, up to 16, that divides H and the strides of the sequences: how wide loads may be."""
    strides = [n for s in sequences if s is not None for n in _strides(s)]
    return math.gcd(16, h, *strides)


def _launch_plan(cell: str, h: int, *sequences: torch.Tensor | None) -> LaunchPlan:
    first = sequences[0]
    device = first.device
    reach = max(s.stride(1) for s in sequences if s is not None) + 4 * h  # and the gates' width
    return plan(cell, first.dtype, first.shape[1], h, common.capability(device), common.sm_count(device), reach)


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
    y = _sequence(xg, h)
    p = launch_plan or _launch_plan(cell, h, xg, y)
    # Outputs never share memory, empty ones neither: a registered op may not return aliases.
    gates = xg.new_empty((steps, batch, 4 * h) if save and g > 1 else 0)
    cells = xg.new_empty((steps, batch, h) if save and cell == "lstm" else 0, dtype=torch.float32)
    h_io = xg.new_empty(2, batch, h)  # the hidden state in flight: one buffer is read, the other one written
    h_io[0].copy_(h0)
    first = c0 if cell == "lstm" else h0
    state = torch.empty(batch, h, dtype=torch.float32, device=xg.device).copy_(first)
    sizes = (batch, h, *_strides(xg), *_strides(y))
    flags = {"CELL": cell, "G": g, "SAVE": save, "HAS_BIAS": b_hh is not None, "ALIGN": _align(h, xg, y)}
    tiles = p.forward
    blocks = {"BLOCK_B": tiles.block_b, "BLOCK_H": tiles.block_h}
    batch_tiles = common.cdiv(batch, tiles.block_b)
    saved = (gates if gates.numel() else None, cells if cells.numel() else None)
    with common.on_device(xg):
        if p.tier == "tile":
            flags |= {"REVERSE": reverse, "num_warps": tiles.warps, "maxnreg": tiles.registers or None}
            args = (xg, w_hh, b_hh, h_io[0], h_io[1], state, y, *saved, steps, *sizes)
            common.launch(forward_tile_kernel, (batch_tiles,), *args, **flags, **blocks)
            h_n = h_io[1]
        else:
            grid = (common.cdiv(h, tiles.block_h), batch_tiles)
            flags |= {"BLOCK_K": tiles.block_k, "STAGES": tiles.stages, "num_warps": tiles.warps}
            buffers = h_io[0], h_io[1]
            for step in range(steps):
                t = steps - 1 - step if reverse else step
                args = (xg, w_hh, b_hh, *buffers, state, y, *saved, t, *sizes)
                common.launch(forward_step_kernel, grid, *args, **flags, **blocks)
                buffers = buffers[1], buffers[0]
            h_n = buffers[0]
    c_n = state.to(xg.dtype) if cell == "lstm" else xg.new_empty(0)
    return y, h_n.clone(), c_n, gates, cells


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
    dxg = _sequence(y, g * h)
    p = launch_plan or _launch_plan(cell, h, y, dxg, dy)
    dan = y.new_empty((steps, batch, h) if cell == "gru" else 0)
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
    flags = {"CELL": cell, "G": g, "HAS_DY": dy is not None, "ALIGN": _align(h, carried, dxg, dy)}
    tiles = p.backward
    blocks = {"BLOCK_B": tiles.block_b, "BLOCK_H": tiles.block_h}
    batch_tiles = common.cdiv(batch, tiles.block_b)
    with common.on_device(y):
        if p.tier == "tile":
            flags |= {"REVERSE": reverse, "num_warps": tiles.warps, "maxnreg": tiles.registers or None}
            common.launch(backward_tile_kernel, (batch_tiles,), *ptrs, steps, *sizes, **flags, **blocks)
        else:
            grid = (common.cdiv(h, tiles.block_h), batch_tiles)
            flags |= {"BLOCK_K": tiles.block_k, "STAGES": tiles.stages, "num_warps": tiles.warps}
            walk = range(steps) if reverse else range(steps - 1, -1, -1)
            after = -1
            for i, t in enumerate(walk):
                before = walk[i + 1] if i + 1 < steps else -1
                times = (t, after, before)
                common.launch(backward_step_kernel, grid, *ptrs, *times, *sizes, **flags, **blocks, LAST=False)
                after = t
            common.launch(backward_step_kernel, grid, *ptrs, 0, after, -1, *sizes, **flags, **blocks, LAST=True)
    db = dxg.sum((0, 1), dtype=torch.float32)
    if cell == "gru":
        db[2 * h :] = dan.sum((0, 1), dtype=torch.float32)
    dc0 = y.new_empty(0) if dc is None else dc.to(y.dtype)
    return dxg, dan, dh.to(y.dtype), dc0, db
