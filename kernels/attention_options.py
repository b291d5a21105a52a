"""What an attention may do besides softmax(q k^T) v (reference/attention.py: AttentionOptions), as the kernels see it.

Every kernel takes one `Options`. What is not given is None, a constant of the compiled kernel: plain attention contains
no trace of it. Scores are kept times log2(e), so that exp2 (one instruction) is the exponential:

    s(i, j) = log2(e) * (softcap(scale * q_i . k_j) - slope * |i + shift - j| + bias(i, j)), -inf where j is hidden

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import dropout
from .rnn_cells import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(-3.4028234663852886e38)
_STARTS = tl.constexpr(256)  # entries of cu_seqlens that a program reads at a time


class Rows(NamedTuple):
    """A tensor [B, H, T, D] whose last stride is 1."""

    data: torch.Tensor
    b: int
    h: int
    t: int


class Plane(NamedTuple):
    """A tensor that broadcasts to [B, H, Tq, Tk], by its strides."""

    data: torch.Tensor
    b: int
    h: int
    i: int
    j: int
    width: int  # Tk


class Options(NamedTuple):
    bias: Plane | None = None
    mask: Plane | None = None  # uint8
    slopes: torch.Tensor | None = None  # float32 [Hq] or [B, Hq]
    slopes_b: int | None = None
    key_lengths: torch.Tensor | None = None  # [B]
    starts_q: torch.Tensor | None = None  # [S + 1]
    starts_k: torch.Tensor | None = None
    sequences: int | None = None  # S
    query_start: torch.Tensor | None = None  # [B]
    seed: torch.Tensor | None = None  # int64 [1]; given: there is dropout
    drop_below: int | None = None  # a word of the generator up to this one (as a signed number) drops its weight
    keep_scale: float | None = None
    scale: float = 1.0
    softcap: float | None = None
    window_left: int | None = None
    window_right: int | None = None
    top_left: int | None = None


@triton.jit
def locate(o, program, tiles, H, Tq, Tk, TILE_OF: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program works: (memory batch, head, sequence b, first row of its tile, first_q, queries, first_k, keys,
    shift). The tile is of BLOCK queries or keys (TILE_OF "q" or "k") and counts inside its sequence, which owns the
    rows first_q ... first_q + queries of q and first_k ... first_k + keys of k; p_i = i + shift.

    Later tiles come first: under a causal mask they see more, and what is long should not start last.
    """
    slot = tiles - 1 - program % tiles
    rest = program // tiles
    if o.starts_q is not None:
        # Sequence s may use the slots from starts[s] // BLOCK + s up to the next one's first, which are enough for
        # its tiles: no prefix sum over tiles is needed. The rows after the last sequence are the sequence S.
        S = o.sequences
        starts = o.starts_q
        if TILE_OF == "k":
            starts = o.starts_k
        count = tl.zeros([], tl.int32)
        for first in range(0, S + 1, _STARTS):
            r = first + tl.arange(0, _STARTS)
            begin = tl.load(starts + r, r <= S, other=0).to(tl.int32)
            count += tl.sum(((begin // BLOCK + r <= slot) & (r <= S)).to(tl.int32), axis=0)
        s = tl.maximum(count - 1, 0)
        tile = slot - tl.load(starts + s).to(tl.int32) // BLOCK - s
        following = tl.minimum(s + 1, S)
        first_q, first_k = tl.load(o.starts_q + s).to(tl.int32), tl.load(o.starts_k + s).to(tl.int32)
        queries = tl.where(s < S, tl.load(o.starts_q + following).to(tl.int32), Tq) - first_q
        keys = tl.where(s < S, tl.load(o.starts_k + following).to(tl.int32), Tk) - first_k
        shift = keys - queries
        if TILE_OF == "k":
            queries = tl.where(s < S, queries, 0)
        else:
            keys = tl.where(s < S, keys, 0)
        b, memory_b, h = s, tl.zeros([], tl.int64), rest
        if o.top_left is not None:
            shift = tl.zeros([], tl.int32)
    else:
        tile, h, b = slot, rest % H, rest // H
        memory_b = b.to(tl.int64)
        first_q, first_k = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
        queries, keys, shift = first_q + Tq, first_k + Tk, first_q + (Tk - Tq)
        if o.top_left is not None:
            shift = tl.zeros([], tl.int32)
        if o.query_start is not None:
            shift = tl.load(o.query_start + b).to(tl.int32)
        if o.key_lengths is not None:
            keys = tl.minimum(keys, tl.maximum(tl.load(o.key_lengths + b).to(tl.int32), 0))
    return memory_b, h, b, tile * BLOCK, first_q, queries, first_k, keys, shift


@triton.jit
def _blocks(first, end, full_first, full_end, BLOCK: tl.constexpr):
    """(first block, first and end of the full ones, end) of the blocks that hold anything of first ... end; a block is
    full if it lies in full_first ... full_end."""
    end = tl.maximum(end, first)
    b0, b3 = first // BLOCK, tl.cdiv(end, BLOCK)
    b3 = tl.where(end > first, b3, b0)
    b1 = tl.minimum(tl.maximum(tl.cdiv(full_first, BLOCK), b0), b3)
    b2 = tl.maximum(tl.minimum(tl.maximum(full_end, 0) // BLOCK, b3), b1)
    return b0, b1, b2, b3


@triton.jit
def key_blocks(o, i0, i1, shift, keys, BLOCK: tl.constexpr):
    """The blocks of keys that the queries i0 ... i1 see, as _blocks gives them."""
    first, end, full_first, full_end = tl.zeros([], tl.int32), keys, tl.zeros([], tl.int32), keys
    if o.window_left is not None:
        first = tl.maximum(i0 + shift - o.window_left, 0)
        full_first = tl.maximum(i1 + shift - o.window_left, 0)
    if o.window_right is not None:
        end = tl.minimum(i1 + shift + o.window_right + 1, keys)
        full_end = tl.minimum(i0 + shift + o.window_right + 1, keys)
    return _blocks(first, end, full_first, full_end, BLOCK)


@triton.jit
def query_blocks(o, j0, j1, shift, queries, BLOCK: tl.constexpr):
    """The blocks of queries that see the keys j0 ... j1."""
    first, end, full_first, full_end = tl.zeros([], tl.int32), queries, tl.zeros([], tl.int32), queries
    if o.window_right is not None:
        first = tl.maximum(j0 - o.window_right - shift, 0)
        full_first = tl.maximum(j1 - o.window_right - shift, 0)
    if o.window_left is not None:
        end = tl.minimum(j1 + o.window_left - shift + 1, queries)
        full_end = tl.minimum(j0 + o.window_left - shift + 1, queries)
    return _blocks(first, end, full_first, full_end, BLOCK)


@triton.jit
def edge_block(trip, b0, b1, b2):
    """The edge blocks b0 ... b1 and b2 ... b3 in one loop of b1 - b0 + b3 - b2 trips."""
    return tl.where(trip < b1 - b0, b0 + trip, b2 + trip - (b1 - b0))


@triton.jit
def load_tile(base, stride, first, rows, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              INSIDE: tl.constexpr):  # fmt: skip
    """Rows first ... first + BLOCK of [rows, D] as [BLOCK, BLOCK_D], 0 outside. INSIDE: none of them is outside."""
    r, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = base + (tl.zeros([], tl.int64) + first) * stride + (r[:, None] * stride + c[None, :])
    if INSIDE and D == BLOCK_D:
        return tl.load(at)
    elif INSIDE:
        return tl.load(at, (c < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(at, (first + r < rows)[:, None], other=0.0)
    else:
        return tl.load(at, (first + r < rows)[:, None] & (c < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, stride, first, rows, value, BLOCK: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    r, c = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = base + (tl.zeros([], tl.int64) + first) * stride + (r[:, None] * stride + c[None, :])
    tl.store(at, value.to(base.dtype.element_ty), (first + r < rows)[:, None] & (c < D)[None, :])


@triton.jit
def load_plane(plane, b, h, i, j, EDGE: tl.constexpr):
    """Its values at the index tensors i and j, which broadcast to a tile; i must exist, j unless EDGE."""
    at = plane.data + (tl.zeros([], tl.int64) + b) * plane.b + (tl.zeros([], tl.int64) + h) * plane.h
    at = at + i.to(tl.int64) * plane.i + j * plane.j
    if EDGE:  # a mask, for a j cut off at the end would hide from the compiler that neighbours lie side by side
        return tl.load(at, (j < plane.width) & (i >= 0), other=0)
    else:
        return tl.load(at)


@triton.jit
def scores(qk, o, b, h, i, j, queries, keys, shift, EDGE: tl.constexpr):
    """(s, d softcap(x) / dx) of the products qk, a tile over the index tensors i and j ([n, 1] and [1, m] or the other
    way round). EDGE: keys of the tile may be hidden by a window or not exist."""
    slope = 1.0
    if o.softcap is not None:
        t = tanh(qk * (o.scale / o.softcap))
        slope = 1.0 - t * t
        s = t * (o.softcap * LOG2E)
    else:
        s = qk * (o.scale * LOG2E)
    if o.slopes is not None:
        alibi = tl.load(o.slopes + b * o.slopes_b + h) * LOG2E
        s -= alibi * tl.abs(i + shift - j).to(tl.float32)
    i_there = tl.minimum(i, queries - 1)
    if o.bias is not None:
        bias = load_plane(o.bias, b, h, i_there, j, EDGE).to(tl.float32)
        # a finite bias stays finite: the lowest float hides what others do not, but is no -inf
        s += tl.where(bias == float("-inf"), bias, tl.maximum(bias * LOG2E, _LOWEST))
    if EDGE:
        seen = (j < keys) & (i < queries)
        if o.window_left is not None:
            seen = seen & (j >= i + shift - o.window_left)
        if o.window_right is not None:
            seen = seen & (j <= i + shift + o.window_right)
        s = tl.where(seen, s, float("-inf"))
    if o.mask is not None:
        s = tl.where(load_plane(o.mask, b, h, i_there, j, EDGE) != 0, s, float("-inf"))
    return s, slope


@triton.jit
def kept(o, b, h, i0, j0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which weights dropout keeps, as int8 [BLOCK_M, BLOCK_N]: reference/attention.py, dropout_keep. j0 % 4 == 0."""
    i = (i0 + tl.arange(0, BLOCK_M))[:, None]
    j4 = (j0 // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    return dropout.kept(o.seed, o.drop_below, j4, i, h, b, BLOCK_M, BLOCK_N)
