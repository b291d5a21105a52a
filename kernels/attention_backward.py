"""Attention, backward (FlashAttention-2: Dao 2023, arXiv:2307.08691, algorithm 2).

    p = 2^(s - log2(e) lse)       delta_i = out_i . dout_i - dlse_i        dp = dropout(dout v^T)
    ds = p (dp - delta)  (dbias)  dx = ds * softcap'(x)
    dq = scale * dx k             dk = scale * dx^T q                      dv = dropout(p)^T dout

Traffic allowed: row_kernel reads out and dout once. key_kernel (one program a tile of keys) reads k and v once, and q,
dout, lse and delta once for each tile of keys that sees them; all query heads of a key head are one program's loop, so
dk and dv are summed in registers in one order. dq either comes from query_kernel (one program a tile of queries, the
mirror image: seven matrix products in all), or is added up by key_kernel in fp32 with atomics (five products; the order
of additions, and so the last bits, change from run to run). bias_kernel sums over the batches and heads that share a
bias inside its program. No [Tq, Tk] matrix but the bias's own gradient.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_options import (
    LOG2E, kept, key_blocks, load_tile, locate, query_blocks, scores, store_tile,
)  # fmt: skip


@triton.jit
def row_kernel(
    out, dout, dlse, lse_ptr, delta_ptr, H, Tq, tiles,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """delta [B, Hq, Tq], 0 where a query sees no key; dlse likewise, or None."""
    i0 = tl.program_id(0) % tiles * BLOCK_M
    bh = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = bh // H, bh % H
    out_tile = load_tile(out.data + b * out.b + h * out.h, out.t, i0, Tq, BLOCK_M, DV, BLOCK_DV, False)
    dout_tile = load_tile(dout.data + b * dout.b + h * dout.h, dout.t, i0, Tq, BLOCK_M, DV, BLOCK_DV, False)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    i = i0 + tl.arange(0, BLOCK_M)
    if dlse is not None:
        delta -= tl.load(dlse + bh * Tq + i, i < Tq, other=0.0)
    lse = tl.load(lse_ptr + bh * Tq + i, i < Tq, other=0.0)
    tl.store(delta_ptr + bh * Tq + i, tl.where(lse == float("-inf"), 0.0, delta), i < Tq)


@triton.jit
def _load_lse(lse, first, i0, queries, BLOCK_M: tl.constexpr, INSIDE: tl.constexpr):
    """log2(e) * lse of a tile's queries; infinity for those that see nothing, so that 2^(s - lse) is 0."""
    i = i0 + tl.arange(0, BLOCK_M)
    if INSIDE:
        row = tl.load(lse + first + i)
    else:
        row = tl.load(lse + first + i, i < queries, other=float("-inf"))
    return tl.where(row == float("-inf"), float("inf"), row * LOG2E)


@triton.jit
def _load_delta(delta, first, i0, queries, BLOCK_M: tl.constexpr, INSIDE: tl.constexpr):
    i = i0 + tl.arange(0, BLOCK_M)
    if INSIDE:
        return tl.load(delta + first + i)
    else:
        return tl.load(delta + first + i, i < queries, other=0.0)


@triton.jit
def _weights(
    qk, lse, o, b, h, i0, j0, queries, keys, shift,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KEYS_FIRST: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(p, keep, softcap') from the products q k^T: [BLOCK_M, BLOCK_N], or transposed: KEYS_FIRST."""
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    if KEYS_FIRST:
        i, j, lse = i[None, :], j[:, None], lse[None, :]
    else:
        i, j, lse = i[:, None], j[None, :], lse[:, None]
    s, slope = scores(qk, o, b, h, i, j, queries, keys, shift, EDGE)
    exponent = s - lse
    if o.bias is not None:
        exponent = tl.minimum(exponent, 0.0)  # a bias near the lowest float rounds to more than the lse it is part of
    keep = qk  # nothing
    if o.seed is not None:
        keep = kept(o, b, h, i0, j0, BLOCK_M, BLOCK_N)
        if KEYS_FIRST:
            keep = tl.trans(keep)
    return tl.exp2(exponent), keep, slope


@triton.jit
def _dropped(o, x, keep):
    if o.seed is not None:
        x = tl.where(keep != 0, x * o.keep_scale, 0.0)
    return x


@triton.jit
def _query_step(
    acc, q, dout, lse, delta, k, k_stride, v, v_stride, o, at, block,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, b, i0, queries, keys, shift = at
    j0 = block * BLOCK_N
    k_tile = load_tile(k, k_stride, j0, keys, BLOCK_N, D, BLOCK_D, not EDGE)
    v_tile = load_tile(v, v_stride, j0, keys, BLOCK_N, DV, BLOCK_DV, not EDGE)
    qk = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
    dp = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
    p, keep, slope = _weights(qk, lse, o, b, h, i0, j0, queries, keys, shift, BLOCK_M, BLOCK_N, False, EDGE)
    dx = p * (_dropped(o, dp, keep) - delta[:, None]) * slope
    return tl.dot(dx.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)


@triton.jit
def query_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dq, o, H, GROUP, Tq, Tk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    memory_b, h, b, i0, first_q, queries, first_k, keys, shift = locate(
        o, tl.program_id(0), tiles, H, Tq, Tk, "q", BLOCK_M
    )
    if o.starts_q is not None:
        if i0 >= queries:
            return
    h64 = h.to(tl.int64)
    kv_h = h64 // GROUP
    row = first_q.to(tl.int64)
    k_base = k.data + memory_b * k.b + kv_h * k.h + first_k.to(tl.int64) * k.t
    v_base = v.data + memory_b * v.b + kv_h * v.h + first_k.to(tl.int64) * v.t
    q_tile = load_tile(q.data + memory_b * q.b + h64 * q.h + row * q.t, q.t, i0, queries, BLOCK_M, D, BLOCK_D, False)
    dout_tile = load_tile(
        dout.data + memory_b * dout.b + h64 * dout.h + row * dout.t, dout.t, i0, queries, BLOCK_M, DV, BLOCK_DV, False
    )
    row += (memory_b * H + h64) * Tq
    lse, delta = _load_lse(lse_ptr, row, i0, queries, BLOCK_M, not EDGE), _load_delta(delta_ptr, row, i0, queries, BLOCK_M, not EDGE)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = (h, b, i0, queries, keys, shift)
    b0, _, _, b3 = key_blocks(o, i0, tl.minimum(i0 + BLOCK_M, queries) - 1, shift, keys, BLOCK_N)
    for block in tl.range(b0, b3, num_stages=STAGES):
        acc = _query_step(acc, q_tile, dout_tile, lse, delta, k_base, k.t, v_base, v.t, o, at, block,
                          D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE, PRECISION)  # fmt: skip
    dq_base = dq.data + memory_b * dq.b + h64 * dq.h + first_q.to(tl.int64) * dq.t
    store_tile(dq_base, dq.t, i0, queries, acc * o.scale, BLOCK_M, D, BLOCK_D)


@triton.jit
def _key_step(
    dk, dv, k, v, q, dout, lse_ptr, delta_ptr, dq_ptr, o, at, H, Tq, g, block,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, b, memory_b, first_q, j0, queries, keys, shift = at
    h += g
    h64 = h.to(tl.int64)
    row = (memory_b * H + h64) * Tq + first_q
    q_base = q.data + memory_b * q.b + h64 * q.h + first_q.to(tl.int64) * q.t
    dout_base = dout.data + memory_b * dout.b + h64 * dout.h + first_q.to(tl.int64) * dout.t
    i0 = block * BLOCK_M
    q_tile = load_tile(q_base, q.t, i0, queries, BLOCK_M, D, BLOCK_D, not EDGE)
    dout_tile = load_tile(dout_base, dout.t, i0, queries, BLOCK_M, DV, BLOCK_DV, not EDGE)
    qk = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
    lse = _load_lse(lse_ptr, row, i0, queries, BLOCK_M, not EDGE)
    p, keep, slope = _weights(qk, lse, o, b, h, i0, j0, queries, keys, shift, BLOCK_M, BLOCK_N, True, EDGE)
    dv = tl.dot(_dropped(o, p, keep).to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)  # only now: the registers of qk are free again
    delta = _load_delta(delta_ptr, row, i0, queries, BLOCK_M, not EDGE)
    dx = (p * (_dropped(o, dp, keep) - delta[None, :]) * slope).to(q_tile.dtype)
    dk = tl.dot(dx, q_tile, dk, input_precision=PRECISION)
    if dq_ptr is not None:
        part = tl.dot(tl.trans(dx), k, input_precision=PRECISION)
        r, c = i0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        at = dq_ptr + (row + r.to(tl.int64))[:, None] * D + c[None, :]
        tl.atomic_add(at, part * o.scale, (r < queries)[:, None] & (c < D)[None, :], sem="relaxed")
    return dk, dv


@triton.jit
def key_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dq_ptr, dk, dv, o, H, GROUP, Tq, Tk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_ptr: float32 [B, Hq, Tq, D], zero at the start, or None. H: heads of the keys here."""
    memory_b, kv_h, b, j0, first_q, queries, first_k, keys, shift = locate(
        o, tl.program_id(0), tiles, H, Tq, Tk, "k", BLOCK_N
    )
    there = first_k * 0 + Tk  # keys of the sequence that exist in memory, beyond key_lengths too: they get zeros
    if o.starts_q is not None:
        there = keys
        if j0 >= keys:
            return
    kv_h64 = kv_h.to(tl.int64)
    column = first_k.to(tl.int64)
    k_tile = load_tile(k.data + memory_b * k.b + kv_h64 * k.h + column * k.t, k.t, j0, keys, BLOCK_N, D, BLOCK_D, False)
    v_tile = load_tile(
        v.data + memory_b * v.b + kv_h64 * v.h + column * v.t, v.t, j0, keys, BLOCK_N, DV, BLOCK_DV, False
    )
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    b0, _, _, b3 = query_blocks(o, j0, tl.minimum(j0 + BLOCK_N, keys) - 1, shift, queries, BLOCK_M)
    if o.key_lengths is not None:
        b3 = tl.where(j0 < keys, b3, b0)
    trips = b3 - b0
    at = (kv_h * GROUP, b, memory_b, first_q, j0, queries, keys, shift)
    for trip in tl.range(0, trips * GROUP, num_stages=STAGES):  # one loop, so that heads follow each other unbroken
        dk_tile, dv_tile = _key_step(
            dk_tile, dv_tile, k_tile, v_tile, q, dout, lse_ptr, delta_ptr, dq_ptr, o, at, H * GROUP, Tq,
            trip // trips, b0 + trip % trips,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, EDGE, PRECISION,
        )  # fmt: skip
    exists = (j0 + tl.arange(0, BLOCK_N) < keys)[:, None]
    dk_base = dk.data + memory_b * dk.b + kv_h64 * dk.h + column * dk.t
    dv_base = dv.data + memory_b * dv.b + kv_h64 * dv.h + column * dv.t
    store_tile(dk_base, dk.t, j0, there, tl.where(exists, dk_tile * o.scale, 0.0), BLOCK_N, D, BLOCK_D)
    store_tile(dv_base, dv.t, j0, there, tl.where(exists, dv_tile, 0.0), BLOCK_N, DV, BLOCK_DV)


@triton.jit
def bias_kernel(
    q, k, v, dout, lse_ptr, delta_ptr, dbias_ptr, o, B, H, GROUP, Tq, Tk, BIAS_B, BIAS_H,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias [BIAS_B, BIAS_H, Tq, Tk], each 1 or B, H. One program a tile; those that share q and k are neighbours."""
    program = tl.program_id(0)
    columns = tl.cdiv(Tk, BLOCK_N)
    j0 = program % columns * BLOCK_N
    rest = program // columns
    i0 = rest % tl.cdiv(Tq, BLOCK_M) * BLOCK_M
    plane = rest // tl.cdiv(Tq, BLOCK_M)
    shared_b, shared_h = B // BIAS_B, H // BIAS_H  # how many batches and heads add up: all or one
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    pairs = shared_b * shared_h
    if o.query_start is None:  # the same keys are hidden in every batch
        shift = plane * 0 + (Tk - Tq)
        if o.top_left is not None:
            shift = plane * 0
        if o.window_right is not None:
            pairs = tl.where(j0 > i0 + BLOCK_M - 1 + shift + o.window_right, 0, pairs)
        if o.window_left is not None:
            pairs = tl.where(j0 + BLOCK_N - 1 < i0 + shift - o.window_left, 0, pairs)
    for pair in tl.range(0, pairs, num_stages=STAGES):
        b = plane // BIAS_H + pair // shared_h
        h = plane % BIAS_H + pair % shared_h
        shift = b * 0 + (Tk - Tq)
        keys = b * 0 + Tk
        if o.top_left is not None:
            shift = b * 0
        if o.query_start is not None:
            shift = tl.load(o.query_start + b).to(tl.int32)
        if o.key_lengths is not None:
            keys = tl.minimum(keys, tl.maximum(tl.load(o.key_lengths + b).to(tl.int32), 0))
        b64, h64 = b.to(tl.int64), h.to(tl.int64)
        kv_h = h64 // GROUP
        q_tile = load_tile(q.data + b64 * q.b + h64 * q.h, q.t, i0, Tq, BLOCK_M, D, BLOCK_D, False)
        k_tile = load_tile(k.data + b64 * k.b + kv_h * k.h, k.t, j0, keys, BLOCK_N, D, BLOCK_D, False)
        v_tile = load_tile(v.data + b64 * v.b + kv_h * v.h, v.t, j0, keys, BLOCK_N, DV, BLOCK_DV, False)
        dout_tile = load_tile(dout.data + b64 * dout.b + h64 * dout.h, dout.t, i0, Tq, BLOCK_M, DV, BLOCK_DV, False)
        row = (b64 * H + h64) * Tq
        lse, delta = _load_lse(lse_ptr, row, i0, Tq, BLOCK_M, False), _load_delta(delta_ptr, row, i0, Tq, BLOCK_M, False)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision=PRECISION)
        p, keep, _ = _weights(qk, lse, o, b, h, i0, j0, Tq, keys, shift, BLOCK_M, BLOCK_N, False, True)
        acc += p * (_dropped(o, dp, keep) - delta[:, None])
    i, j = i0 + tl.arange(0, BLOCK_M), j0 + tl.arange(0, BLOCK_N)
    at = dbias_ptr + (plane.to(tl.int64) * Tq + i.to(tl.int64)[:, None]) * Tk + j[None, :]
    tl.store(at, acc.to(dbias_ptr.dtype.element_ty), (i < Tq)[:, None] & (j < Tk)[None, :])
