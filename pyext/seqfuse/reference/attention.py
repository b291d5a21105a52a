"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) with everything that our kernels fold in.

    score(i, j) = softcap(scale * q_i . k_j) - slope * |p_i - j| + bias(i, j), and -inf where key j is not visible to i
    out_i = sum_j dropout(softmax_j(score(i, j))) v_j,  lse_i = log sum_j exp(score(i, j))

p_i is where query i stands on the axis of the keys. A row that sees no key gives out = 0, lse = -inf, and no gradient.
"""

from typing import NamedTuple

import torch


class AttentionOptions(NamedTuple):
    """What a call may do besides softmax(q k^T) v. The defaults do nothing, but scale is always given.

    bias: [1 or B, 1 or Hq, Tq, Tk], added to the scores; -inf hides a key.
    mask: bool, of the same shapes (Tq may be 1). False hides a key.
    alibi_slopes: float32 [Hq] or [B, Hq] (Press et al. 2022, arXiv:2108.12409). Constants: they get no gradient.
    key_lengths: integer [B]. Keys from key_lengths[b] on do not exist; the alignment of queries does not change.
    cu_seqlens_q, cu_seqlens_k: integer [S + 1], both or neither. Then B is 1 and S sequences stand one after another:
        sequence s has the queries cu_seqlens_q[s] : cu_seqlens_q[s + 1] and the keys likewise, and sees only its own.
        i and j count inside the sequence, "b" is s. Rows after the last sequence give 0. Not with bias, mask,
        key_lengths or query_start.
    query_start: integer [B], p of the first query. Without it p_i = i + Tk - Tq (the last query stands at the last
        key), of the sequence's own Tq and Tk where they are packed.
    seed: int64 [1], of dropout; see dropout_keep.
    scale: factor of q k^T, usually D ** -0.5.
    window_left, window_right: keys p_i - window_left .. p_i + window_right are visible; -1: no limit on that side.
        Causal is window_right = 0.
    top_left: p_i = i instead.
    softcap: scores become softcap * tanh(scores / softcap) (Gemma 2, arXiv:2408.00118); 0: they don't.
    dropout_p: probability with which a weight is zeroed; the others are divided by 1 - dropout_p.
    """

    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    key_lengths: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    query_start: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    scale: float = 1.0
    window_left: int = -1
    window_right: int = -1
    top_left: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0


def attention(q, k, v, options):
    """q: [B, Hq, Tq, D]; k: [B, Hkv, Tk, D]; v: [B, Hkv, Tk, Dv]; query head h reads key head h // (Hq / Hkv).

    Returns (out [B, Hq, Tq, Dv] in q's dtype, lse [B, Hq, Tq]); in at least float32 until out is rounded.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    if options.key_lengths is not None:
        k, v = (written(t, options.key_lengths) for t in (k, v))
    group = q.shape[1] // max(k.shape[1], 1)
    keys, values = (t.to(wide).repeat_interleave(group, 1) for t in (k, v))
    where = Positions(q, k, options)
    score = q.to(wide) @ keys.mT * options.scale  # (B, Hq, Tq, Tk)
    if options.softcap:
        score = options.softcap * (score / options.softcap).tanh()
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.to(wide)
        slopes = slopes[None] if slopes.dim() == 1 else slopes
        score = score - where.per_sequence(slopes) * (where.p - where.j).abs()
    if options.bias is not None:
        score = score + options.bias
    score = score.masked_fill(~where.visible(), -torch.inf)
    top = score.detach().amax(-1, keepdim=True) if score.shape[-1] else score.new_zeros(*score.shape[:-1], 1)
    top = torch.where(top == -torch.inf, 0.0, top)
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True)
    seen = total > 0
    lse = torch.where(seen, top + torch.where(seen, total, 1.0).log(), -torch.inf).squeeze(-1)
    weight = weight / torch.where(seen, total, 1.0)
    if options.dropout_p:
        kept = dropout_keep(options.seed, where.b, torch.arange(q.shape[1], device=q.device)[:, None, None], where.i,
                            where.j, options.dropout_p)  # fmt: skip
        weight = weight * kept / (1.0 - options.dropout_p) if options.dropout_p < 1.0 else weight * 0.0
    return (weight @ values).to(q.dtype), lse


class Positions:
    """b, i, p, j of every (query, key), as integer tensors that broadcast to [B, Hq, Tq, Tk]."""

    def __init__(self, q, k, options):
        (B, _, Tq, _), Tk, device = q.shape, k.shape[2], q.device
        self.options = options
        self.i, self.j = torch.arange(Tq, device=device)[:, None], torch.arange(Tk, device=device)
        if options.cu_seqlens_q is None:
            self.b = torch.arange(B, device=device)[:, None, None, None]
            shift = 0 if options.top_left else Tk - Tq
            if options.query_start is not None:
                shift = options.query_start.long()[:, None, None, None]
            self.same = torch.ones((), dtype=torch.bool, device=device)
        else:
            starts = [t.long() for t in (options.cu_seqlens_q, options.cu_seqlens_k)]
            b, c = (torch.searchsorted(s, r.flatten(), right=True) - 1
                    for s, r in zip(starts, (self.i, self.j), strict=True))  # fmt: skip
            S = starts[0].shape[0] - 1
            self.same = (b[:, None] == c) & (b[:, None] < S)
            self.b, c = b.clamp(0, max(S - 1, 0))[:, None], c.clamp(0, max(S - 1, 0))
            self.i, self.j = self.i - starts[0][self.b], self.j - starts[1][c]
            lengths = [s.diff() for s in starts]
            shift = 0 if options.top_left else (lengths[1] - lengths[0])[self.b]
        self.p = self.i + shift

    def per_sequence(self, values):
        """[1 or B, Hq] -> [1 or B, Hq, 1 or Tq, 1], the value of each query's sequence."""
        if self.options.cu_seqlens_q is None or values.shape[0] == 1:
            return values[:, :, None, None]
        return values[self.b[:, 0]].mT[None, :, :, None]

    def visible(self):
        o = self.options
        seen = self.same
        if o.window_left >= 0:
            seen = seen & (self.j >= self.p - o.window_left)
        if o.window_right >= 0:
            seen = seen & (self.j <= self.p + o.window_right)
        if o.key_lengths is not None:
            seen = seen & (self.j < o.key_lengths.long()[:, None, None, None])
        return seen if o.mask is None else seen & o.mask


def dropout_keep(seed, b, h, i, j, p):
    """Whether the weight of key j for query i in head h of sequence b stays: bool, of the indices' broadcast shape.

    Philox4x32-10 (Salmon et al. 2011, doi:10.1145/2063384.2063405) with the key (low, high half of seed) and the
    counter (j // 4, i, h, b); of its four words j % 4 counts. The weight stays where that word >= floor(p * 2^32).
    """
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    c = list(torch.broadcast_tensors(j // 4, i, h, b))
    for _ in range(10):
        (hi0, lo0), (hi1, lo1) = _multiply(0xD2511F53, c[0]), _multiply(0xCD9E8D57, c[2])
        c = [hi1 ^ c[1] ^ k0, lo1, hi0 ^ c[3] ^ k1, lo0]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack(c, -1).gather(-1, torch.broadcast_to(j % 4, c[0].shape)[..., None]).squeeze(-1)
    return word >= int(p * 2**32)


def _multiply(m, x):
    """High and low 32 bits of m * x, both below 2^32, in int64."""
    return (m * (x >> 16) + (m * (x & 0xFFFF) >> 16)) >> 16, (m * x) & 0xFFFFFFFF


def attention_decode(
    q, k_cache, v_cache, lengths, block_table, alibi_slopes, scale, window_left, window_right, softcap
):
    """Attention over a cache: the last of the Tq queries of sequence b stands at key lengths[b] - 1.

    q: [B, Hq, Tq, D]. k_cache: [B, Hkv, T, D], v_cache: [B, Hkv, T, Dv]; or, with block_table (integer [B, M]), pages
    [P, Hkv, page, D] of which sequence b has block_table[b, 0], block_table[b, 1] and so on. lengths: integer [B].
    Returns (out [B, Hq, Tq, Dv], lse [B, Hq, Tq]).
    """
    if block_table is not None:
        k_cache, v_cache = (gather_pages(c, block_table) for c in (k_cache, v_cache))
    options = AttentionOptions(
        alibi_slopes=alibi_slopes, key_lengths=lengths, query_start=lengths - q.shape[2], scale=scale,
        window_left=window_left, window_right=window_right, softcap=softcap,
    )  # fmt: skip
    return attention(q, k_cache, v_cache, options)


def gather_pages(cache, block_table):
    pages = cache[block_table.long().clamp(0, cache.shape[0] - 1)]  # (B, M, Hkv, page, D); unused entries may be any
    return pages.transpose(1, 2).flatten(2, 3)


def written(cache, lengths):
    """Keys or values [B, H, T, D] with zeros behind the lengths: NaN may lie there, and 0 * NaN is NaN."""
    there = torch.arange(cache.shape[2], device=cache.device) < lengths.long()[:, None]
    return cache.masked_fill(~there[:, None, :, None], 0.0)


def kv_cache_append(k_cache, v_cache, k, v, lengths, block_table):
    """Writes k [B, Hkv, Tn, D] and v [B, Hkv, Tn, Dv] into the caches, at the positions lengths[b] .. of sequence b.

    Caches, block_table and lengths as in attention_decode, but lengths are those before.
    """
    positions = lengths.long()[:, None] + torch.arange(k.shape[2], device=k.device)  # (B, Tn)
    if block_table is None:
        place = torch.arange(k.shape[0], device=k.device)[:, None], slice(None), positions
    else:
        page = k_cache.shape[2]
        place = block_table.long().gather(1, positions // page), slice(None), positions % page
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache[place] = new.transpose(1, 2)
