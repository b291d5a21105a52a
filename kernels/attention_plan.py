"""Block shapes of the attention kernels: one pure function, so that it can be read, printed and tested on paper.

A row of the table is for one kernel, kind of number and padded head dimension, best first; the plan takes the first
row whose operands fit into the architecture's shared memory. docs/attention.md says where the rows come from; none was
tuned on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import common

KERNELS = ("forward", "query", "key", "bias", "decode")
MAX_HEAD_DIM = {"forward": 512, "query": 256, "key": 256, "bias": 256, "decode": 512}


@dataclass(frozen=True)
class Tiles:
    """block_m queries and block_n keys at a time. stages: of the loop over full blocks."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"m{self.block_m} n{self.block_n} warps{self.warps} stages{self.stages}"


def kind(dtype: torch.dtype, tf32: bool) -> str:
    """What multiplies: "half" (16 bits, tensor cores), "tf32" (tensor cores) or "fp32" (plain arithmetic)."""
    return "half" if dtype != torch.float32 else "tf32" if tf32 else "fp32"


def padded(width: int) -> int:
    return max(16, common.next_power_of_2(width))


# (kernel, kind, whether for Hopper) -> padded head dimension -> rows, the first that fits. A head dimension takes the
# next larger one's rows. `_EXTRA` rows replace them where a bias, mask, softcap, slopes or dropout take registers too.
_HOPPER, _OTHER = True, False
_TABLE: dict[tuple[str, str, bool], dict[int, tuple[Tiles, ...]]] = {
    ("forward", "half", _HOPPER): {
        64: (Tiles(128, 128, 8, 3),),
        128: (Tiles(128, 128, 8, 2),),
        256: (Tiles(128, 64, 8, 2),),
        512: (Tiles(64, 32, 8, 2),),
    },
    ("forward", "half", _OTHER): {
        64: (Tiles(64, 64, 4, 3),),
        128: (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
        256: (Tiles(64, 32, 8, 2),),
        512: (Tiles(32, 32, 8, 2), Tiles(16, 32, 8, 1)),
    },
    ("query", "half", _HOPPER): {
        64: (Tiles(128, 64, 8, 3),),
        128: (Tiles(128, 64, 8, 2),),
        256: (Tiles(64, 32, 8, 2),),
    },
    ("query", "half", _OTHER): {
        64: (Tiles(64, 64, 4, 2),),
        128: (Tiles(64, 32, 4, 2),),
        256: (Tiles(32, 32, 4, 2), Tiles(32, 32, 4, 1)),
    },
    ("key", "half", _HOPPER): {
        64: (Tiles(64, 128, 8, 2),),
        128: (Tiles(32, 128, 8, 2),),
        256: (Tiles(32, 64, 8, 2),),
    },
    ("key", "half", _OTHER): {
        64: (Tiles(64, 64, 4, 2),),
        128: (Tiles(32, 64, 4, 2),),
        256: (Tiles(16, 64, 8, 2), Tiles(16, 32, 8, 1)),
    },
}
