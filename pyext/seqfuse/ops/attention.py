"""Attention, dense and over packed sequences, and PyTorch's scaled_dot_product_attention on the same kernels."""

import math

import torch
from torch.compiler import is_dynamo_compiling

from seqfuse.native import door
from seqfuse.ops import attention_checks as check
from seqfuse.ops.attention_function import attend, autocast, shortcuts
from seqfuse.reference import AttentionOptions


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    bias=None,
    mask=None,
    key_lengths=None,
    dropout_p=0.0,
    return_lse=False,
    deterministic=False,
):
    """softmax(scores) v without a matrix of Tq x Tk in memory; every option goes with every other.

        score(i, j) = softcap(scale * q_i . k_j) - slope * |p_i - j| + bias(i, j), then what hides keys
        p_i = i + Tk - Tq: the last query stands at the last key

    With `causal` a query sees the keys up to where it stands, so the last one sees all of them (bottom-right, which is
    what a KV cache needs; torch's scaled_dot_product_attention aligns top-left). For 2 queries, 4 keys:

        attention           scaled_dot_product_attention
          keys 0 1 2 3        keys 0 1 2 3
        q0     x x x .      q0     x . . .
        q1     x x x x      q1     x x . .

    q: [B, Hq, Tq, D]; k: [B, Hkv, Tk, D]; v: [B, Hkv, Tk, Dv]; float32, bfloat16, float16 or float64, of one dtype, any
        strides. Hq must be a multiple of Hkv: query head h reads key head h // (Hq / Hkv).
    causal: hides the keys after p_i. window: (left, right), both inclusive: only keys p_i - left .. p_i + right are
        seen; -1 is no limit on that side. With causal the right side is 0.
    scale: factor of q . k, by default D ** -0.5.
    softcap: scores become softcap * tanh(scores / softcap), > 0 (Gemma 2, arXiv:2408.00118).
    alibi_slopes: [Hq] or [B, Hq], constants (Press et al. 2022, arXiv:2108.12409).
    bias: broadcasts to [B, Hq, Tq, Tk], of q's dtype or float32; gets a gradient of its own shape. -inf hides a key.
    mask: bool, broadcasts to [B, Hq, Tq, Tk]. False hides a key.
    key_lengths: int32 or int64 [B]; keys from key_lengths[b] on are hidden. Does not move the queries.
    dropout_p: probability with which a weight is dropped, 0 to 1. Which ones is a function of a seed (drawn from
        torch's generator of the device), b, h, i and j: the same on every backend (reference.dropout_keep).
    deterministic: a backward pass whose bits repeat, also where that is slower (torch.use_deterministic_algorithms
        asks for it too).
    Returns out [B, Hq, Tq, Dv] of q's dtype; with return_lse (out, lse), lse [B, Hq, Tq] the log of the sum of exp of a
    row's scores, float32 (float64 of float64), differentiable too. A row that sees no key gives out 0, lse -inf and no
    gradient.

    Scores and sums are float32 for 16-bit inputs. Under autocast q, k and v are converted to its dtype. Differentiable
    twice. Raises TypeError or ValueError on bad arguments, before any kernel runs.
    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; Dao et al. 2022 (arXiv:2205.14135).
    """
    key = None
    bare = window is mask is key_lengths is softcap is bias is alibi_slopes is None
    if bare and not (dropout_p or return_lse or deterministic):
        if not is_dynamo_compiling():
            out = door.attention(q, k, v, causal, False, scale, True)
            if out is not None:
                return out
        key = shortcuts.key(q, k, v, "causal" if causal else "dense", scale)
        out = shortcuts.follow(key, q, k, v)
        if out is not None:
            return out
    check.qkv("attention", q, k, v)
    q, k, v = autocast(q, k, v)
    options = _options("attention", q, causal, scale, window, softcap, dropout_p)
    options = options._replace(
        alibi_slopes=check.slopes("attention", alibi_slopes, q, q.shape[0]),
        bias=check.bias("attention", "bias", bias, q, k),
        mask=check.mask("attention", "mask", mask, q, k),
        key_lengths=check.lengths("attention", "key_lengths", key_lengths, q, k.shape[2]),
    )
    out, lse = attend(q, k, v, options, return_lse, deterministic, key)
    return (out, lse) if return_lse else out


def varlen_attention(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    max_seqlen_q=None,
    max_seqlen_k=None,
    causal=False,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    dropout_p=0.0,
    return_lse=False,
    deterministic=False,
):
    """Attention over sequences that stand one after another without padding; each sees only itself.

    q: [total_q, Hq, D]; k: [total_k, Hkv, D]; v: [total_k, Hkv, Dv].
    cu_seqlens_q, cu_seqlens_k: int32 or int64 [S + 1] on q's device, growing from 0: sequence s has the queries
        cu_seqlens_q[s] : cu_seqlens_q[s + 1], and the keys likewise. Rows after the last sequence give 0.
    max_seqlen_q, max_seqlen_k: taken (numbers or tensors) so that calls written for FlashAttention fit; not needed, and
        never read: the kernels find the sequences on the device.
    alibi_slopes: [Hq] or [S, Hq]. The other options as in `attention`; causal is bottom-right within each sequence.
        For 2 queries, 4 keys:

          keys 0 1 2 3
        q0     x x x .
        q1     x x x x

    Returns out [total_q, Hq, Dv]; with return_lse (out, lse [Hq, total_q]).
    Raises TypeError or ValueError on bad arguments; the numbers in cu_seqlens are looked at on a CPU only.
    """
    check.packed("varlen_attention", q, k, v)
    starts = [
        check.starts("varlen_attention", name, given, q, total.shape[0])
        for name, given, total in (("cu_seqlens_q", cu_seqlens_q, q), ("cu_seqlens_k", cu_seqlens_k, k))
    ]
    if starts[0].shape != starts[1].shape:
        raise ValueError(
            f"varlen_attention: cu_seqlens_q and cu_seqlens_k must tell of as many sequences, got shapes "
            f"{list(starts[0].shape)} and {list(starts[1].shape)}"
        )
    q, k, v = (t.transpose(0, 1)[None] for t in autocast(q, k, v))
    options = _options("varlen_attention", q, causal, scale, window, softcap, dropout_p)
    slopes = check.slopes("varlen_attention", alibi_slopes, q, starts[0].shape[0] - 1)
    options = options._replace(cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], alibi_slopes=slopes)
    out, lse = attend(q, k, v, options, return_lse, deterministic)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_lse else out


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
):
    """torch.nn.functional.scaled_dot_product_attention: its signature, shapes and alignment, on our kernels.

    query: [..., Hq, L, E]; key: [..., H, S, E]; value: [..., H, S, Ev]; two dimensions or more; those before the last
        two broadcast against each other.
    attn_mask: broadcasts to [..., Hq, L, S]; bool (True: takes part) or, added to the scores, of query's dtype or
        float32. A floating-point mask gets its gradient.
    dropout_p: always applied. Which weights it drops is our own function of the seed: see `attention`.
    is_causal: query i sees the keys up to i (top-left; `attention` aligns bottom-right). Not with attn_mask.
        For 2 queries, 4 keys:

          keys 0 1 2 3
        q0     x . . .
        q1     x x . .

    scale: by default E ** -0.5. enable_gqa: Hq may be a multiple of H.
    Returns [..., Hq, L, Ev]. A row that sees no key gives 0, as in torch.
    """
    op = "scaled_dot_product_attention"
    names = ("query", "key", "value")
    plain = None
    if attn_mask is None and not dropout_p:
        if not is_dynamo_compiling():
            out = door.attention(query, key, value, is_causal, True, scale, enable_gqa)
            if out is not None:
                return out
        kind = "top-left" if is_causal else "dense"
        plain = shortcuts.key(query, key, value, kind, scale, enable_gqa)
        out = shortcuts.follow(plain, query, key, value)
        if out is not None:
            return out
    check.tensors(op, names, (query, key, value))
    if attn_mask is not None and is_causal:
        raise ValueError(f"{op}: attn_mask and is_causal=True exclude each other, got both")
    query, key, value = autocast(query, key, value)
    q, k, v, batch = check.as_batch(op, query, key, value, enable_gqa)
    options = _options(op, q, False, scale, None, None, dropout_p)
    if is_causal:
        options = options._replace(window_right=0, top_left=True)
    if attn_mask is not None:
        flat = check.as_scores(op, attn_mask, batch, q, k)
        if flat.dtype == torch.bool:
            options = options._replace(mask=check.mask(op, "attn_mask", flat, q, k))
        else:
            options = options._replace(bias=check.bias(op, "attn_mask", flat, q, k))
    out, _ = attend(q, k, v, options, False, False, plain if query.dim() == 4 else None)
    return out.reshape(*batch, *out.shape[-2:])


def attend_masked(q, k, v, mask, bias, top_left, dropout_p, scale=None, softcap=None, sinks=None):
    """out of [B, H, T, D] tensors as modules have them: a mask and a bias together, top-left if causal.

    sinks: [Hq] or None, a score in every row's softmax that belongs to no value (Xiao et al. 2023, arXiv:2309.17453).
    """
    q, k, v = autocast(q, k, v)
    check.qkv("MultiheadAttention", q, k, v)
    options = _options("MultiheadAttention", q, False, scale, None, softcap, dropout_p)
    options = options._replace(
        window_right=0 if top_left else -1,
        top_left=top_left,
        mask=check.mask("MultiheadAttention", "attn_mask", mask, q, k),
        bias=check.bias("MultiheadAttention", "attn_mask", bias, q, k),
    )
    if sinks is None:
        return attend(q, k, v, options, False, False)[0]
    out, lse = attend(q, k, v, options, True, False)
    return out * torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])[..., None].to(out.dtype)


def _options(op, q, causal, scale, window, softcap, dropout_p):
    left, right = check.window(op, window)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else check.number(op, "scale", scale)
    return AttentionOptions(
        scale=scale,
        window_left=left,
        window_right=0 if causal else right,
        softcap=check.softcap(op, softcap),
        dropout_p=check.probability(op, "dropout_p", dropout_p),
    )
