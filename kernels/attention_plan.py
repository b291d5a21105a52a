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
# Wider than that, the key kernel has no registers left to make dq as well: dq gets its own kernel.
MAX_ATOMIC_HEAD_DIM = 128
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


# (kernel, kind) -> architecture (None: those without rows of their own) -> largest padded head dimension -> tiles.
# Every row was compiled; docs/attention.md has its registers and shared memory. No row was timed.
_TABLE: dict[tuple[str, str], dict[int | None, dict[int, Tiles]]] = {
    ("forward", "half"): {
        90: {
            64: Tiles(128, 128, 8, 3),
            128: Tiles(128, 128, 8, 2),
            256: Tiles(128, 64, 8, 2),
            512: Tiles(32, 32, 8, 2),
        },
        None: {64: Tiles(64, 64, 4, 3), 128: Tiles(64, 64, 8, 3), 256: Tiles(64, 32, 8, 2), 512: Tiles(32, 32, 8, 2)},
    },
    ("query", "half"): {
        90: {64: Tiles(128, 64, 8, 3), 128: Tiles(128, 64, 8, 2), 256: Tiles(64, 32, 8, 2)},
        None: {64: Tiles(64, 64, 8, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 2)},
    },
    ("key", "half"): {
        90: {64: Tiles(64, 128, 8, 2), 128: Tiles(32, 128, 8, 2), 256: Tiles(16, 64, 8, 2)},
        None: {64: Tiles(32, 64, 4, 2), 128: Tiles(64, 64, 8, 2), 256: Tiles(16, 32, 8, 2)},
    },
    ("bias", "half"): {None: {128: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 8, 1)}},
    ("decode", "half"): {None: {128: Tiles(16, 64, 4, 2), 256: Tiles(16, 32, 4, 2), 512: Tiles(16, 16, 4, 2)}},
    ("forward", "tf32"): {None: {64: Tiles(32, 32, 4, 2), 256: Tiles(32, 32, 4, 1), 512: Tiles(16, 16, 8, 1)}},
    ("forward", "fp32"): {None: {128: Tiles(32, 32, 8, 1), 512: Tiles(16, 16, 4, 1)}},
}
# Instead of the rows above, under a window or causal mask: (kernel, kind, architecture), likewise.
_CAUSAL = {("forward", "half", 90): {128: Tiles(128, 64, 8, 3)}}
# Instead of both, where a bias, mask, softcap, slopes or dropout take registers too.
_EXTRAS = {
    ("forward", "half", 90): {128: Tiles(128, 32, 8, 2), 256: Tiles(64, 32, 8, 2), 512: Tiles(16, 32, 8, 1)},
    ("forward", "half", None): {128: Tiles(64, 32, 8, 2), 256: Tiles(32, 32, 8, 1), 512: Tiles(16, 32, 8, 1)},
    ("query", "half", None): {128: Tiles(32, 32, 8, 2), 256: Tiles(32, 32, 8, 1)},
    ("key", "half", None): {128: Tiles(16, 64, 8, 2), 256: Tiles(16, 32, 8, 1)},
    ("key", "half", 90): {128: Tiles(16, 64, 8, 2), 256: Tiles(16, 32, 8, 1)},
}
_FALLBACK = {
    "tf32": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 512: Tiles(16, 16, 8, 1)},
    "fp32": {128: Tiles(16, 32, 8, 1), 512: Tiles(16, 16, 8, 1)},
}


def plan(
    kernel: str, kind: str, width: int, capability: tuple[int, int], causal: bool = False, extras: bool = False
) -> Tiles:
    """The tiles of a kernel for head dimensions up to `width` on a GPU of this capability.

    causal: a window bounds the keys of a query. extras: a bias, mask, softcap, slopes or dropout need registers too.
    """
    arch, width = common.arch(capability), padded(width)
    if width > MAX_HEAD_DIM[kernel]:
        raise ValueError(f"the {kernel} kernel of attention takes head dimensions up to {MAX_HEAD_DIM[kernel]}")
    general = _TABLE.get((kernel, kind), {})
    found = [
        _EXTRAS.get((kernel, kind, arch), _EXTRAS.get((kernel, kind, None))) if extras else None,
        _CAUSAL.get((kernel, kind, arch)) if causal else None,
        general.get(arch),
        general.get(None),
        _FALLBACK.get(kind),
    ]
    for rows in found:
        for largest, tiles in (rows or {}).items():
            if width <= largest and shared_bytes(kernel, kind, width, tiles, arch) <= common.shared_memory(capability):
                return tiles
    raise ValueError(f"no tiles of the {kernel} kernel of attention fit on sm_{arch} at head dimension {width}")


def shared_bytes(kernel: str, kind: str, width: int, tiles: Tiles, arch: int) -> int:
    """About how much shared memory a program takes: what it keeps, what its loop has in flight, and scratch."""
    item = 2 if kind == "half" else 4
    buffers = tiles.stages if arch == 90 else max(1, tiles.stages - 1)  # elsewhere the last copy waits in registers
    m, n = tiles.block_m * width * item, tiles.block_n * width * item
    scratch = tiles.block_m * tiles.block_n * item
    if kernel in ("forward", "decode"):
        return m + buffers * 2 * n + scratch
    if kernel == "query":
        return 2 * m + buffers * 2 * n + scratch
    if kernel == "key":
        return 2 * n + buffers * 2 * (m + 4 * tiles.block_m) + scratch
    return buffers * 2 * (m + n) + scratch


def table() -> str:
    """All plans, one a line, for people."""
    lines = []
    for kernel in KERNELS:
        for kind_ in ("half", "tf32", "fp32"):
            for arch in (80, 89, 90, 120):
                for width in (64, 128, 256, 512):
                    if width > MAX_HEAD_DIM[kernel]:
                        continue
                    plans = [plan(kernel, kind_, width, divmod(arch, 10), *flags) for flags in
                             ((False, False), (True, False), (True, True))]  # fmt: skip
                    lines.append(f"{kernel} {kind_} sm_{arch} D{width}: " + " | ".join(map(str, plans)))
    return "\n".join(lines)


def decode_plan(rows: int, kind: str, width: int, capability: tuple[int, int]) -> Tiles:
    """Tiles for `rows` = Tq * Hq / Hkv rows that share a head of the cache."""
    tiles = plan("decode", kind, width, capability)
    wide = rows > 16 and kind == "half" and padded(width) <= 128
    return Tiles(64, tiles.block_n, tiles.warps, tiles.stages) if wide else tiles


def splits(programs: int, positions: int, block: int, sm_count: int) -> int:
    """Into how many parts decoding splits the keys: enough to give each multiprocessor two programs, none shorter than
    four blocks of a full cache; at most 64, for the merge is not free."""
    return max(1, min(common.cdiv(2 * sm_count, programs), positions // (4 * block), 64))
