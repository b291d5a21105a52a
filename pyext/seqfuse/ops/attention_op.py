"""Attention as registered ops, one pair for each backend.

Meaning: reference/attention.py, whose AttentionOptions are the ops' options in their order; contract of the CPU and
CUDA kernels: csrc/include/seqfuse/attention.h; Triton launchers: kernels/attention.py and attention_decode.py.
"""

import torch

from seqfuse.ops import library


def _heads_inside(x):
    """Whether x [B, H, T, D] is a view of [B, T, H, D] memory: then what is made like it is one too."""
    return x.shape[2] > 1 and x.stride(1) < x.stride(2)


def empty_like(x, width=None):
    """[B, H, T, width or D], uninitialised, in x's order of dimensions."""
    B, H, T, D = x.shape
    width = D if width is None else width
    if _heads_inside(x):
        return x.new_empty(B, T, H, width).transpose(1, 2)
    return x.new_empty(B, H, T, width)


def _fake_fwd(q, k, v, *options):
    return empty_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_bwd(dout, dlse, q, k, v, out, lse, bias, *rest):
    want_dbias = rest[-2]
    dbias = bias.new_empty(bias.shape) if want_dbias else q.new_empty(0)
    return empty_like(q), empty_like(k), empty_like(v), dbias


def _fake_decode(q, k_cache, v_cache, *rest):
    return empty_like(q, v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _fake_append(k_cache, v_cache, k, v, lengths, block_table):
    return None


_OPTIONS = (
    "Tensor? bias, Tensor? mask, Tensor? alibi_slopes, Tensor? key_lengths, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k,"
    " Tensor? query_start, Tensor? seed, float scale, int window_left, int window_right, bool top_left, float softcap,"
    " float dropout_p"
)

library.register_op(
    "attention_fwd",
    f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
    _fake_fwd,
    library.launcher("attention", "attention_fwd"),
)
library.register_op(
    "attention_bwd",
    "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    f" {_OPTIONS}, bool want_dbias, bool deterministic) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
    library.launcher("attention", "attention_bwd"),
)
library.register_op(
    "attention_decode",
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor? block_table, Tensor? alibi_slopes, float scale,"
    " int window_left, int window_right, float softcap) -> (Tensor, Tensor)",
    _fake_decode,
    library.launcher("attention_decode", "attention_decode"),
)
library.register_op(
    "kv_cache_append",
    "(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor lengths, Tensor? block_table) -> ()",
    _fake_append,
    library.launcher("attention_decode", "kv_cache_append"),
)
