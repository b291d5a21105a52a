"""Which recurrent kernel runs, and with which tiles: one pure function, so that it can be read and tested on paper."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import common

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}

# Largest H whose w_hh one program holds on chip without a spill, as compiled: (16-bit, fp32), per cell.
_TILE_MAX_H = {"rnn_tanh": (128, 64), "rnn_relu": (128, 64), "gru": (128, 64), "lstm": (128, 64)}


@dataclass(frozen=True)
class Tiles:
    """What one program computes of a step. block_k and stages are the step tier's loop over h; 0 in the tile tier."""

    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int

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


def plan(
    cell: str, dtype: torch.dtype, batch: int, hidden: int, capability: tuple[int, int], sm_count: int
) -> LaunchPlan:
    wide = dtype == torch.float32
    if hidden <= _TILE_MAX_H[cell][wide]:
        block_h = max(16, common.next_power_of_2(hidden))
        tiles = Tiles(16, block_h, 0, 4 if block_h < 64 else 8, 0)
        programs = common.cdiv(batch, 16)
        return LaunchPlan("tile", tiles, tiles, programs, f"w_hh of H={hidden} fits on one multiprocessor")
    bb = 16
    f = Tiles(bb, 16, 64, 4, 3)
    b = Tiles(bb, 32, 64, 4, 3)
    if wide:
        f = Tiles(bb, 16, 32, 4, 2)
        b = Tiles(bb, 32, 32, 4, 2)
    return LaunchPlan("step", f, b, common.cdiv(hidden, f.block_h) * common.cdiv(batch, bb), "no")
