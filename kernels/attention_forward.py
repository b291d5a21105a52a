"""Attention, forward: one program a tile of queries of one head, keys and values streamed past it (FlashAttention:
Dao et al. 2022, arXiv:2205.14135; its online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867).

    m' = max(m, max_j s_j)     l = l * 2^(m - m') + sum_j 2^(s_j - m')     acc = acc * 2^(m - m') + sum_j 2^(s_j - m') v_j
    out = acc / l              lse = ln(2) * (m + log2(l))

s is what attention_options.scores gives. Traffic allowed: q, out and lse once; k and v once for each tile of queries
that sees them (from L2, whose heads' tiles run next to each other); bias and mask once a query head. No [Tq, Tk]
matrix. Blocks of keys that are hidden from a whole tile are not visited; those seen by all of it need no comparison.

Interpreted and compiled for sm_80 ... sm_120; never yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_options import LN2, LOG2E, edge_block, kept, key_blocks, load_tile, locate, scores, store_tile


@triton.jit
def _step(
    acc, m, l, q, k, k_stride, v, v_stride, o, at, block,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, b, i0, queries, keys, shift = at
    j0 = block * BLOCK_N
    k_tile = load_tile(k, k_stride, j0, keys, BLOCK_N, D, BLOCK_D, not EDGE)
    qk = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
    if FOLD and not EDGE:
        factor = o.scale * LOG2E  # not negative, so the largest product is the largest score
        top = tl.maximum(m, tl.max(qk, 1) * factor)
        weight = tl.exp2(qk * factor - top[:, None])
        shrink = tl.exp2(m - top)
    else:
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        s, _ = scores(qk, o, b, h, i[:, None], j[None, :], queries, keys, shift, EDGE)
        top = tl.maximum(m, tl.max(s, 1))
        finite = tl.where(top == float("-inf"), 0.0, top)  # of a row that has not seen a key yet
        weight = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(m - finite)
    l = l * shrink + tl.sum(weight, 1)
    if o.seed is not None:
        weight = tl.where(kept(o, b, h, i0, j0, BLOCK_M, BLOCK_N) != 0, weight, 0.0)
    v_tile = load_tile(v, v_stride, j0, keys, BLOCK_N, DV, BLOCK_DV, not EDGE)
    acc = tl.dot(weight.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, l


@triton.jit
def forward_kernel(
    q, k, v, out, lse_ptr, o, H, GROUP, Tq, Tk, tiles,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    memory_b, h, b, i0, first_q, queries, first_k, keys, shift = locate(
        o, tl.program_id(0), tiles, H, Tq, Tk, "q", BLOCK_M
    )
    if o.starts_q is not None:
        if i0 >= queries:
            return
    h64 = h.to(tl.int64)
    kv_h = h64 // GROUP
    q_base = q.data + memory_b * q.b + h64 * q.h + first_q.to(tl.int64) * q.t
    k_base = k.data + memory_b * k.b + kv_h * k.h + first_k.to(tl.int64) * k.t
    v_base = v.data + memory_b * v.b + kv_h * v.h + first_k.to(tl.int64) * v.t
    q_tile = load_tile(q_base, q.t, i0, queries, BLOCK_M, D, BLOCK_D, False)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    at = (h, b, i0, queries, keys, shift)
    b0, b1, b2, b3 = key_blocks(o, i0, tl.minimum(i0 + BLOCK_M, queries) - 1, shift, keys, BLOCK_N)
    for block in tl.range(b1, b2, num_stages=STAGES):
        acc, m, l = _step(acc, m, l, q_tile, k_base, k.t, v_base, v.t, o, at, block,
                          D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FOLD, False, PRECISION)  # fmt: skip
    for trip in tl.range(0, b1 - b0 + b3 - b2, num_stages=1):
        acc, m, l = _step(acc, m, l, q_tile, k_base, k.t, v_base, v.t, o, at, edge_block(trip, b0, b1, b2),
                          D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, FOLD, True, PRECISION)  # fmt: skip
    seen = l > 0.0
    inverse = tl.where(seen, 1.0 / tl.where(seen, l, 1.0), 0.0)
    inverse = tl.where(l != l, l, inverse)  # a NaN is nobody's zero
    if o.seed is not None:
        inverse *= o.keep_scale
    out_base = out.data + memory_b * out.b + h64 * out.h + first_q.to(tl.int64) * out.t
    store_tile(out_base, out.t, i0, queries, acc * inverse[:, None], BLOCK_M, DV, BLOCK_DV)
    i = i0 + tl.arange(0, BLOCK_M)
    lse = tl.where(seen, LN2 * (m + tl.log2(tl.where(seen, l, 1.0))), tl.where(l != l, l, float("-inf")))
    tl.store(lse_ptr + (memory_b * H + h64) * Tq + first_q + i, lse, i < queries)
