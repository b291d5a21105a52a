"""Which recurrent kernel runs, and with which tiles: one pure function, so that it can be read and tested on paper.

tile        one program a (batch tile, head) for the whole scan; no program waits for another
persistent  one launch for the whole scan; the programs of a (batch tile, head) wait for each other at every step
step        one launch a time step
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import common

GATES = {"rnn_tanh": 1, "rnn_relu": 1, "gru": 3, "lstm": 4}

# Largest H (padded to a power of two) of the tile tier that compiles without a spill: gates -> (16-bit, fp32).
_TILE_MAX_H = {1: (256, 128), 3: (128, 64), 4: (128, 64)}
_TILE_ROWS = 16  # the smallest batch tile that fills a tensor core's rows
_PERSISTENT_MAX_WIDTH = 1024

# Architectures (90 for sm_90) on which the persistent kernels have run, without a hang, and won. Only there does a plan
# choose them by itself: a kernel that waits for other programs is not to be tried out on a user's machine. Empty: they
# have never run on hardware.
PROVED: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Tiles:
    """What one program computes of a step. block_k and stages are the step tier's loop over h; in the persistent tier
    block_k is all of h and split among the warps; 0 in the tile tier.

    registers: the limit a thread is given, 0: ptxas decides.
    """

    block_b: int
    block_h: int
    block_k: int
    warps: int
    stages: int
    registers: int = 0

    def __str__(self) -> str:
        loop = f" k{self.block_k}" if self.block_k else ""
        loop += f" stages{self.stages}" if self.stages else ""
        return f"b{self.block_b} h{self.block_h}{loop} warps{self.warps}"


@dataclass(frozen=True)
class LaunchPlan:
    tier: str  # "tile", "persistent" or "step"
    forward: Tiles
    backward: Tiles
    programs: int  # of one forward launch
    reason: str

    def __str__(self) -> str:
        tiles = f"fwd [{self.forward}] bwd [{self.backward}]"
        return f"{self.tier}: {tiles}, {self.programs} programs ({self.reason})"


def _tile_tiles(gates: int, wide: bool, width: int, capability: tuple[int, int], options: int) -> Tiles | None:
    """Tiles of the tile tier, or None where w_hh does not fit on one multiprocessor."""
    block_h = max(16, common.next_power_of_2(width))
    itemsize = 4 if wide else 2
    on_chip = gates * block_h * block_h * itemsize + _TILE_ROWS * block_h * 4  # w_hh, and a scratch tile for layouts
    largest = _TILE_MAX_H[gates][wide]
    if block_h > largest or on_chip > common.shared_memory(capability):
        return None
    if block_h == largest and width * itemsize % 16:  # narrow loads need addresses, and the largest tile has no
        return None  # registers left for them: it spills 40 to 160 bytes a thread
    if block_h == largest and gates == 4 and options > 2 and (wide or common.arch(capability) < 90):
        return None  # likewise, 8 to 40 bytes
    # Eight columns are a tensor core's narrowest, so more warps than that would repeat each other's work. Fewer than
    # four spill: every thread then holds too much of the gates.
    warps = min(8, max(4, block_h // 8))
    # Left alone, ptxas spills a few bytes to make room for a second program on a multiprocessor. Only the largest
    # tiles, an LSTM's, and an RNN's with options, come out worse when told that they may use every register.
    greedy = block_h == 128 if gates == 4 else block_h == 256 and options > 0
    registers = 0 if greedy else common.max_registers(warps)
    return Tiles(_TILE_ROWS, block_h, 0, warps, 0, registers)


def _step_tiles(columns: int, wide: bool, batch: int, width: int, heads: int, sm_count: int) -> Tiles:
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
        if width % 2:  # rows of w_hh at odd addresses: no asynchronous copies, so a chunk waits in registers
            block_k = 32
    others = common.cdiv(batch, block_b) * heads
    narrowest = 8 if columns > 1 else 16
    widest = 32
    block_h = narrowest
    while block_h < widest and common.cdiv(width, block_h) * others > sm_count:
        block_h *= 2
    if wide:
        warps = 8 if block_b * columns * block_h >= 4096 else 4
    else:
        warps = 4 if block_b > 16 else min(4, columns * block_h // 8)
    return Tiles(block_b, block_h, block_k, warps, stages)


def persistent_shared(gates: int, tiles: Tiles, backward: bool) -> int:
    """Bytes of shared memory of a persistent kernel: its w_hh, and h (backward: two gates of da) or the warps' sums."""
    if backward:
        columns, product = gates * tiles.block_h, tiles.block_h
        exchanged = min(gates, 2) * tiles.block_b * tiles.block_k * 2
    else:
        columns = product = (1 if gates == 1 else 4) * tiles.block_h
        exchanged = tiles.block_b * tiles.block_k * 2
    return tiles.block_k * columns * 2 + max(exchanged, tiles.warps * tiles.block_b * product * 4)


def resident(gates: int, tiles: Tiles, backward: bool, capability: tuple[int, int]) -> int:
    """Programs of a persistent kernel that one multiprocessor holds for certain, with 256 registers a thread."""
    kept_by_driver = 1024  # of each program, and of a multiprocessor's memory beyond what one program may have
    memory = (common.shared_memory(capability) + kept_by_driver) // (
        persistent_shared(gates, tiles, backward) + kept_by_driver
    )
    return min(memory, 65536 // (256 * 32 * tiles.warps))


def _persistent(
    gates: int, wide: bool, batch: int, width: int, heads: int, capability: tuple[int, int], sm_count: int
) -> tuple[Tiles, int] | str:
    """(tiles, programs) that are all resident at once, the narrowest that are, or why there are none."""
    if wide:
        return "the persistent tier holds 16-bit weights only"
    if width > _PERSISTENT_MAX_WIDTH:
        return f"the persistent tier ends at {_PERSISTENT_MAX_WIDTH} units"
    block_k = max(128, common.next_power_of_2(width))
    warps = 8 if block_k == 1024 else 4
    narrowest = 16 if gates == 1 else 8
    for block_h in (narrowest, 2 * narrowest):
        tiles = Tiles(_TILE_ROWS, block_h, block_k, warps, 0)
        programs = common.cdiv(width, block_h) * common.cdiv(batch, tiles.block_b) * heads
        room = min(resident(gates, tiles, backward, capability) for backward in (False, True)) * sm_count
        if programs <= room:
            return tiles, programs
    return f"{programs} programs that wait for each other need more than {sm_count} multiprocessors"


def plan(
    cell: str,
    dtype: torch.dtype,
    batch: int,
    hidden: int,
    capability: tuple[int, int],
    sm_count: int,
    reach: int = 0,
    heads: int = 1,
    options: int = 0,
    persistent: bool | None = None,
) -> LaunchPlan:
    """The launch plan of a scan of `batch` sequences and `hidden` units (both >= 1) on a GPU with these facts.

    reach: elements of memory between two neighbouring sequences of the batch, at most; offsets inside a tile of the
    tile and persistent tiers have 32 bits. heads: blocks of a block-diagonal w_hh. options: how many a scan has.
    persistent: whether programs may wait for each other; None: where PROVED says so.
    """
    gates, width = GATES[cell], hidden // heads
    wide = dtype == torch.float32
    tiles = _tile_tiles(gates, wide, width, capability, options)
    name = str(dtype).removeprefix("torch.")
    w_hh = f"w_hh of {gates} x {width} x {width} {name}"
    near = reach * _TILE_ROWS < 2**31
    if tiles is not None and near:
        programs = common.cdiv(batch, tiles.block_b) * heads
        return LaunchPlan("tile", tiles, tiles, programs, f"{w_hh} stays on one multiprocessor")
    reason = f"{w_hh} does not fit on one multiprocessor without a spill"
    if not near:
        reason = f"sequences lie {reach} elements apart in memory, too far for 32-bit offsets in a tile"
    else:
        found = _persistent(gates, wide, batch, width, heads, capability, sm_count)
        arch = common.arch(capability)
        if isinstance(found, str):
            reason += f"; {found}"
        elif persistent or (persistent is None and arch in PROVED):
            return LaunchPlan("persistent", found[0], found[0], found[1], f"{w_hh} stays on all programs at once")
        elif persistent is None:
            reason += f"; the persistent tier would take {found[1]} programs, and has not been proved on sm_{arch}"
    forward = _step_tiles(1 if gates == 1 else 4, wide, batch, width, heads, sm_count)
    backward = _step_tiles(1, wide, batch, width, heads, sm_count)
    programs = common.cdiv(width, forward.block_h) * common.cdiv(batch, forward.block_b) * heads
    return LaunchPlan("step", forward, backward, programs, reason)


def refusal(*, packed: bool = False, norm: bool = False) -> str | None:
    """Why no kernel here takes a scan with these properties, or None. Every other option runs in every tier."""
    if packed:
        return "the Triton kernels take sequences as [T, B, X] with lengths, not packed ones"
    if norm:
        return "the Triton kernels have no layer normalisation inside the scan"
    return None
