"""Which recurrent kernel runs, and with which tiles: one pure function, so that it can be read and tested on paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import common

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}

# Largest H (padded to a power of two) of the tile tier that compiles without a spill: gates -> (16-bit, fp32).
_TILE_MAX_H = {1: (256, 128), 3: (128, 64), 4: (128, 64)}
_TILE_ROWS = 16  # the smallest batch tile that fills a tensor core's rows


@dataclass(frozen=True)
class Tiles:
    """What one program computes of a step. block_k and stages are the step tier's loop over h; 0 in the tile tier.

    registers: the limit a thread is given, 0: ptxas decides.
    """

    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0

    def __str__(self) -> str:
        loop = f" k{self.block_k} stages{self.stages}" if self.block_k else ""
        return f"b{self.block_b} h{self.block_h}{loop} warps{self.warps}"


@dataclass(frozen=True)
class LaunchPlan:
    tier: str  # "tile": one program a batch tile for the whole scan; "step": one launch a time step
    forward: Tiles
    backward: Tiles
    programs: int  # of one forward launch
    reason: str

    def __str__(self) -> str:
        tiles = f"fwd [{self.forward}] bwd [{self.backward}]"
        return f"{self.tier}: {tiles}, {self.programs} programs ({self.reason})"


def _tile_tiles(gates: int, wide: bool, hidden: int, shared: int) -> Tiles | None:
    """Tiles of the tile tier, or None where w_hh does not fit on one multiprocessor."""
    block_h = max(16, common.next_power_of_2(hidden))
    itemsize = 4 if wide else 2
    on_chip = gates * block_h * block_h * itemsize + _TILE_ROWS * block_h * 4  # w_hh, and a scratch tile for layouts
    largest = _TILE_MAX_H[gates][wide]
    if block_h > largest or on_chip > shared:
        return None
    if block_h == largest and hidden * itemsize % 16:  # narrow loads need addresses, and the largest tile has no
        return None  # registers left for them: it spills 40 to 160 bytes a thread
    # Eight columns are a tensor core's narrowest, so more warps than that would repeat each other's work. Fewer than
    # four spill: every thread then holds too much of the gates.
    warps = min(8, max(4, block_h // 8))
    # Left alone, ptxas spills a few bytes to make room for a second program on a multiprocessor. Only the largest tile,
    # an LSTM's, comes out worse when told that it may use every register.
    registers = 0 if gates == 4 and block_h == 128 else common.max_registers(warps)
    return Tiles(_TILE_ROWS, block_h, 0, warps, 0, registers)


def _step_tiles(columns: int, wide: bool, batch: int, hidden: int, sm_count: int) -> Tiles:
    """Tiles of a step kernel whose program multiplies by `columns` columns for each of its units.

    The narrowest unit tile that still fits into one wave: a step is bound by the latency of reading w_hh, which more
    multiprocessors share out.
    """
    if wide:
        block_b = min(32, common.next_power_of_2(batch))
        block_k, stages = 32, 2
    else:
        block_b = min(64, max(16, common.next_power_of_2(batch)))
        block_k, stages = 128 if block_b == 16 else 64, 4
        if hidden % 2:  # rows of w_hh at odd addresses: no asynchronous copies, so a chunk waits in registers
            block_k = 32
    batch_tiles = common.cdiv(batch, block_b)
    narrowest = 8 if columns > 1 else 16
    widest = 32
    block_h = narrowest
    while block_h < widest and common.cdiv(hidden, block_h) * batch_tiles > sm_count:
        block_h *= 2
    if wide:
        warps = 8 if block_b * columns * block_h >= 4096 else 4
    else:
        warps = 4 if block_b > 16 else min(4, columns * block_h // 8)
    return Tiles(block_b, block_h, block_k, warps, stages)


def plan(
    cell: str,
    dtype: torch.dtype,
    batch: int,
    hidden: int,
    capability: tuple[int, int],
    sm_count: int,
    reach: int = 0,
) -> LaunchPlan:
    """The launch plan of a scan of `batch` sequences and `hidden` units (both >= 1) on a GPU with these facts.

    reach: elements of memory between two neighbouring sequences of the batch, at most; the tile tier's offsets
    inside a tile have 32 bits.
    """
    gates = GATES[cell]
    wide = dtype == torch.float32
    shared = common.shared_memory(capability)
    tiles = _tile_tiles(gates, wide, hidden, shared)
    name = str(dtype).removeprefix("torch.")
    if tiles is not None and reach * tiles.block_b < 2**31:
        reason = f"w_hh of {gates} x {hidden} x {hidden} {name} stays on one multiprocessor"
        return LaunchPlan("tile", tiles, tiles, common.cdiv(batch, tiles.block_b), reason)
    forward = _step_tiles(1 if gates == 1 else 4, wide, batch, hidden, sm_count)
    backward = _step_tiles(1, wide, batch, hidden, sm_count)
    programs = common.cdiv(hidden, forward.block_h) * common.cdiv(batch, forward.block_b)
    reason = f"w_hh of {gates} x {hidden} x {hidden} {name} does not fit on one multiprocessor without a spill"
    if tiles is not None:
        reason = f"sequences lie {reach} elements apart in memory, too far for 32-bit offsets in a tile"
    return LaunchPlan("step", forward, backward, programs, reason)
