"""Decoding: a few queries a sequence against a long cache, dense or in pages, and appending to it.

The cache is read once and bounds the time, so two things matter: enough programs to keep every multiprocessor reading,
and one read for all query heads of a key head. decode_kernel takes the Tq * Hq / Hkv rows of a key head together and
splits the keys of each sequence evenly (Flash-Decoding: Dao et al. 2023), by its own length, which only the device
knows; merge_kernel adds the splits up:

    lse = log2 sum_s 2^lse_s        out = sum_s 2^(lse_s - lse) out_s

Traffic: k and v up to each sequence's length once (a window: only what it shows); splits * (Dv + 1) * 4 bytes a row
written and read again. Appending: what is appended, once.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import attention, attention_plan, common
from .attention_options import LN2, LOG2E
from .rnn_cells import tanh

_APPENDED = 16  # rows a program appends


class Cache(NamedTuple):
    """Keys or values [B, Hkv, T, D], or pages [P, Hkv, page, D]: data and strides of b (or of a page), h, t, d."""

    data: torch.Tensor
    b: int
    h: int
    t: int
    d: int


class Past(NamedTuple):
    """What decoding knows besides q, k and v; what is not given is None."""

    lengths: torch.Tensor  # [B]
    table: torch.Tensor | None  # [B, M]
    table_b: int | None
    slopes: torch.Tensor | None
    slopes_b: int | None
    scale: float
    softcap: float | None
    window_left: int | None
    window_right: int | None


@triton.jit
def cache_rows(cache, table, table_b, b, h, j, inside, PAGE: tl.constexpr):
    """(addresses of the rows j [n] of sequence b, which of them exist)."""
    h64 = h.to(tl.int64)
    if table is not None:
        page = tl.load(table + b * table_b + j // PAGE, inside, other=0).to(tl.int64)
        inside = inside & (page >= 0)
        return cache.data + page * cache.b + h64 * cache.h + (j % PAGE) * cache.t, inside
    else:
        return cache.data + b.to(tl.int64) * cache.b + h64 * cache.h + j.to(tl.int64) * cache.t, inside


@triton.jit
def decode_kernel(
    q, k, v, out, lse_ptr, past, H, GROUP, B, Tq, T, tiles, splits,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out [splits, B, H * GROUP, Tq, DV], by its strides of the last four (splits follow each other in memory), lse
    [splits, B, H * GROUP, Tq], in natural logarithms. H: heads of the cache."""
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    h = program // splits // tiles % H
    b = program // splits // tiles // H
    # Row r is query r // GROUP of head r % GROUP of the group: a tile of rows is a span of queries.
    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    i, g = r // GROUP, r % GROUP
    there = i < Tq
    length = tl.load(past.lengths + b).to(tl.int32)
    shift = length - Tq
    length = tl.minimum(length, T)
    first, end = tl.zeros([], tl.int32), tl.maximum(length, 0)
    if past.window_right is not None:
        last_i = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, Tq - 1)
        end = tl.maximum(tl.minimum(end, last_i + shift + past.window_right + 1), 0)
    if past.window_left is not None:
        first = tl.minimum(tl.maximum(tile * BLOCK_M // GROUP + shift - past.window_left, 0), end)
    blocks = tl.cdiv(end, BLOCK_N) - first // BLOCK_N
    share = tl.cdiv(blocks, splits)
    begin = first // BLOCK_N + split * share
    stop = tl.minimum(begin + share, tl.cdiv(end, BLOCK_N))
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    head = h.to(tl.int64) * GROUP + g
    q_at = q.data + b.to(tl.int64) * q.b + head * q.h + i.to(tl.int64) * q.t
    q_tile = tl.load(q_at[:, None] + c[None, :], there[:, None] & (c < D)[None, :], other=0.0)
    if past.slopes is not None:
        slope = tl.load(past.slopes + b * past.slopes_b + head, there, other=0.0) * LOG2E
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for block in tl.range(begin, stop, num_stages=STAGES):
        j = block * BLOCK_N + tl.arange(0, BLOCK_N)
        k_at, exists = cache_rows(k, past.table, past.table_b, b, h, j, j < length, PAGE)
        k_tile = tl.load(k_at[:, None] + c[None, :] * k.d, exists[:, None] & (c < D)[None, :], other=0.0)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        if past.softcap is not None:
            s = tanh(s * (past.scale / past.softcap)) * (past.softcap * LOG2E)
        else:
            s = s * (past.scale * LOG2E)
        p = (i + shift)[:, None]
        if past.slopes is not None:
            s -= slope[:, None] * tl.abs(p - j[None, :]).to(tl.float32)
        seen = (j < length)[None, :] & there[:, None]
        if past.window_left is not None:
            seen = seen & (j[None, :] >= p - past.window_left)
        if past.window_right is not None:
            seen = seen & (j[None, :] <= p + past.window_right)
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m - finite)
        total = total * shrink + tl.sum(weight, 1)
        m = top
        v_at, exists = cache_rows(v, past.table, past.table_b, b, h, j, j < length, PAGE)
        v_tile = tl.load(v_at[:, None] + cv[None, :] * v.d, exists[:, None] & (cv < DV)[None, :], other=0.0)
        acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    got = total > 0.0
    inverse = tl.where(total != total, total, tl.where(got, 1.0 / tl.where(got, total, 1.0), 0.0))
    lse = tl.where(total != total, total, tl.where(got, LN2 * (m + tl.log2(tl.where(got, total, 1.0))), float("-inf")))
    part = (tl.zeros([], tl.int64) + split) * B + b
    tl.store(lse_ptr + (part * H * GROUP + head) * Tq + i, lse, there)
    out_at = out.data + part * out.b + head * out.h + i.to(tl.int64) * out.t
    value = (acc * inverse[:, None]).to(out.data.dtype.element_ty)
    tl.store(out_at[:, None] + cv[None, :], value, there[:, None] & (cv < DV)[None, :])


@triton.jit
def merge_kernel(
    part_ptr, part_lse_ptr, out, lse_ptr, N, H, Tq, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """part [splits, N, DV] and part_lse [splits, N] of N = B * H * Tq rows -> out, lse [N]."""
    n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_DV)
    there = n < N
    n64 = n.to(tl.int64)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    wide = tl.zeros([], tl.int64)
    for split in range(0, splits):
        row = (wide + split) * N + n64
        lse = tl.load(part_lse_ptr + row, there, other=float("-inf")) * LOG2E
        part = tl.load(part_ptr + row[:, None] * DV + c[None, :], there[:, None] & (c < DV)[None, :], other=0.0)
        top = tl.maximum(m, lse)
        finite = tl.where(top == float("-inf"), 0.0, top)
        weight, shrink = tl.exp2(lse - finite), tl.exp2(m - finite)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        m = top
    got = total > 0.0
    inverse = tl.where(total != total, total, tl.where(got, 1.0 / tl.where(got, total, 1.0), 0.0))
    lse = tl.where(total != total, total, tl.where(got, LN2 * (m + tl.log2(tl.where(got, total, 1.0))), float("-inf")))
    tl.store(lse_ptr + n, lse, there)
    i, h, b = n64 % Tq, n64 // Tq % H, n64 // Tq // H
    at = out.data + b * out.b + h * out.h + i * out.t
    value = (acc * inverse[:, None]).to(out.data.dtype.element_ty)
    tl.store(at[:, None] + c[None, :], value, there[:, None] & (c < DV)[None, :])


@triton.jit
def append_kernel(
    k_cache, v_cache, k, v, lengths, table, table_b, H, Tn, T, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rows that would lie beyond the cache (T positions a sequence) are dropped."""
    t = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    h = tl.program_id(0) // tiles % H
    b = tl.program_id(0) // tiles // H
    j = tl.load(lengths + b).to(tl.int32) + t
    inside = (t < Tn) & (j >= 0) & (j < T)
    c, cv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b64, h64 = b.to(tl.int64), h.to(tl.int64)
    k_at = k.data + b64 * k.b + h64 * k.h + t.to(tl.int64) * k.t
    v_at = v.data + b64 * v.b + h64 * v.h + t.to(tl.int64) * v.t
    k_to, exists = cache_rows(k_cache, table, table_b, b, h, j, inside, PAGE)
    v_to, _ = cache_rows(v_cache, table, table_b, b, h, j, inside, PAGE)
    k_mask, v_mask = exists[:, None] & (c < D)[None, :], exists[:, None] & (cv < DV)[None, :]
    tl.store(k_to[:, None] + c[None, :] * k_cache.d, tl.load(k_at[:, None] + c[None, :], k_mask), k_mask)
    tl.store(v_to[:, None] + cv[None, :] * v_cache.d, tl.load(v_at[:, None] + cv[None, :], v_mask), v_mask)


def _capacity(cache: torch.Tensor, table: torch.Tensor | None) -> tuple[int, int]:
    """(positions of a sequence, positions of a page; without pages 1)."""
    return (cache.shape[2], 1) if table is None else (table.shape[1] * cache.shape[2], cache.shape[2])


def attention_decode(
    q, k_cache, v_cache, lengths, block_table, alibi_slopes, scale, window_left, window_right, softcap, *,
    tiles=None, splits=None,
):  # fmt: skip
    """reference.attention_decode: q [B, Hq, Tq, D] against a cache [B, Hkv, T, D] or pages [P, Hkv, page, D].

    Returns (out [B, Hq, Tq, Dv], lse float32 [B, Hq, Tq]). tiles, splits: a test's own instead of the plan's.
    """
    B, Hq, Tq, D = q.shape
    DV, Hkv = v_cache.shape[3], k_cache.shape[1]
    out = attention.output_like(q, DV)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    T, page = _capacity(k_cache, block_table)
    if out.numel() == 0 or T == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    tf32 = attention.tf32(q.dtype)
    rows = Hq // Hkv * Tq
    if tiles is None:
        tiles = attention_plan.decode_plan(
            rows, attention_plan.kind(q.dtype, tf32), max(D, DV), common.capability(q.device)
        )
    row_tiles = common.cdiv(rows, tiles.block_m)
    if splits is None:
        splits = attention_plan.splits(B * Hkv * row_tiles, T, tiles.block_n, common.sm_count(q.device))
    slopes, slopes_b = attention.slopes_of(alibi_slopes)
    table = None if block_table is None else block_table.contiguous()
    past = Past(
        lengths.contiguous(), table, None if table is None else table.shape[1], slopes, slopes_b,
        float(scale), float(softcap) or None, attention.window(window_left), attention.window(window_right),
    )  # fmt: skip
    widths = {"DV": DV, "BLOCK_DV": attention_plan.padded(DV)}
    parts, part_lse = out, lse
    if splits > 1:
        parts = q.new_empty((splits * B, Hq, Tq, DV), dtype=torch.float32)
        part_lse = q.new_empty((splits, B, Hq, Tq), dtype=torch.float32)
    with common.on_device(q):
        common.launch(
            decode_kernel, (splits * row_tiles * Hkv * B,), attention.strided(attention.rows(q)),
            Cache(k_cache, *k_cache.stride()), Cache(v_cache, *v_cache.stride()), attention.strided(parts), part_lse,
            past, Hkv, Hq // Hkv, B, Tq, T, row_tiles, splits, D=D, BLOCK_D=attention_plan.padded(D),
            BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, STAGES=tiles.stages, PAGE=page,
            PRECISION="tf32" if tf32 else "ieee", num_warps=tiles.warps, **widths,
        )  # fmt: skip
        if splits > 1:
            n = B * Hq * Tq
            block = max(1, min(16, 2048 // widths["BLOCK_DV"]))
            common.launch(
                merge_kernel, (common.cdiv(n, block),), parts, part_lse, attention.strided(out), lse, n, Hq, Tq, splits,
                BLOCK_M=block, num_warps=4, **widths,
            )  # fmt: skip
    return out, lse


def kv_cache_append(k_cache, v_cache, k, v, lengths, block_table):
    """Write k, v [B, Hkv, Tn, D] at the positions lengths[b] ... lengths[b] + Tn - 1 of sequence b, in place."""
    B, H, Tn, D = k.shape
    DV = v.shape[3]
    T, page = _capacity(k_cache, block_table)
    if k.numel() == 0 or T == 0:
        return
    k, v = attention.rows(k), attention.rows(v)
    table = None if block_table is None else block_table.contiguous()
    tiles = common.cdiv(Tn, _APPENDED)
    with common.on_device(k):
        common.launch(
            append_kernel, (tiles * H * B,), Cache(k_cache, *k_cache.stride()), Cache(v_cache, *v_cache.stride()),
            attention.strided(k), attention.strided(v), lengths.contiguous(), table,
            None if table is None else table.shape[1], H, Tn, T, tiles,
            D=D, DV=DV, BLOCK_D=attention_plan.padded(D), BLOCK_DV=attention_plan.padded(DV), BLOCK_M=_APPENDED,
            PAGE=page, num_warps=4,
        )  # fmt: skip
