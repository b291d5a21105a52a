"""Decoding: attention over a KV cache, dense or in pages, that grows in place."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.compiler import is_dynamo_compiling

from seqfuse import dispatch, explanation, reference
from seqfuse.native import door
from seqfuse.ops import attention_checks as check
from seqfuse.ops import attention_rules as rules
from seqfuse.ops import checks, library
from seqfuse.ops.attention_function import without_autocast
from seqfuse.ops.autograd import requires_gradient, told_of_change, traced
from seqfuse.reference import AttentionOptions
from seqfuse.reference.attention import Positions, gather_pages, written

_OP = "attention_with_kv_cache"


def attention_with_kv_cache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    *,
    cache_lengths,
    block_table=None,
    causal=True,
    scale=None,
    window=None,
    softcap=None,
    alibi_slopes=None,
    return_lse=False,
):
    """Writes the new keys and values into the cache, in place, and attends over all that each sequence then has.

    q: [B, Hq, Tq, D]. The last query of sequence b stands at its last key, so that with `causal` (bottom-right)
    2 queries over 4 keys see

          keys 0 1 2 3
        q0     x x x .
        q1     x x x x

    k_cache: [B, Hkv, T, D], v_cache: [B, Hkv, T, Dv]: room for T keys each, which may be uninitialised; of
        q's dtype. Or pages, with block_table.
    k, v: [B, Hkv, Tn, D] and [B, Hkv, Tn, Dv], written at cache_lengths[b] .. cache_lengths[b] + Tn - 1;
        both or neither.
    cache_lengths: int32 or int64 [B], the keys that each sequence had before this call. Not changed: add Tn yourself.
    block_table: int32 or int64 [B, M]: then k_cache is [pages, Hkv, page, D], v_cache likewise, and sequence b has the
        pages block_table[b, 0], block_table[b, 1] and so on.
    scale, window, softcap, alibi_slopes, return_lse: as in `attention`.
    Returns out [B, Hq, Tq, Dv]; with return_lse (out, lse [B, Hq, Tq]). A query that sees no key gives 0.

    For inference: it has no gradient, and raises if one is asked for. Raises TypeError or ValueError on bad arguments
    before anything is written; lengths and page numbers are looked at on a CPU only, where that waits for no device.
    Source: split-KV decoding as in Dao et al., "Flash-Decoding", 2023; pages as in Kwon et al. 2023 (arXiv:2309.06180).
    """
    bare = block_table is window is softcap is alibi_slopes is None and not return_lse
    if bare and not is_dynamo_compiling():
        out = door.attention_with_kv_cache(q, k_cache, v_cache, k, v, cache_lengths, causal, scale)
        if out is not None:
            explanation.told(_CHOICE)
            return out
    key = _key(q, k_cache, v_cache, k, v, cache_lengths, block_table, causal, scale, window, softcap, alibi_slopes,
               return_lse)  # fmt: skip
    call = _known.get(key)
    if call is None:
        _check(q, k_cache, v_cache, k, v, cache_lengths, block_table)
        left, right = check.window(_OP, window)
        right = 0 if causal else right
        scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else check.number(_OP, "scale", scale)
        softcap = check.softcap(_OP, softcap)
        slopes = check.slopes(_OP, alibi_slopes, q, q.shape[0])
        case = _case(q, k_cache, v_cache, left, right, softcap, slopes, block_table, return_lse)
        call = _Call(case, scale, left, right, softcap, slopes)
    new = 0 if k is None else k.shape[2]
    _check_numbers(cache_lengths, new, call.case.Tk, block_table, k_cache)
    if call.choice is not None:
        dispatch.tell(call.choice, call.case)
        backend = call.choice.backend
    elif 0 in q.shape or not call.case.Tk:
        backend = "reference"
    else:
        choice = dispatch.select("attention_decode", call.case)
        backend = choice.backend
        _remember(key, call._replace(choice=choice))
    if new:
        _APPEND[backend](k_cache, v_cache, k, v, cache_lengths, block_table)
        if backend in ("cpu", "triton"):
            told_of_change(k_cache, v_cache)
        cache_lengths = cache_lengths + new
    decode = dispatch.get("attention_decode", backend).fwd
    out, lse = without_autocast(
        decode, q, k_cache, v_cache, cache_lengths, block_table, call.slopes, call.scale, call.left, call.right,
        call.softcap,
    )  # fmt: skip
    return (out, lse) if return_lse else out


_CHOICE = dispatch.Choice("attention_decode", "cpu", "the first that fits")  # of all that goes through the door


class _Call(NamedTuple):
    """What is settled about a call but for the numbers in its tensors: it was checked, and where it runs was chosen."""

    case: rules.AttentionCase
    scale: float
    left: int
    right: int
    softcap: float
    slopes: torch.Tensor | None
    choice: dispatch.Choice | None = None


_known: dict[tuple, _Call] = {}


def _key(q, k_cache, v_cache, k, v, cache_lengths, block_table, causal, scale, window, softcap, slopes, return_lse):
    """All that the checks and the choice look at but the numbers in tensors. None for a call that is looked at closely
    each time."""
    plain = scale is None or type(scale) is float
    if slopes is not None or softcap is not None or window is not None or not plain or traced():
        return None
    tensors = q, k_cache, v_cache, k, v, cache_lengths, block_table
    if not all([t is None or type(t) is torch.Tensor for t in tensors]) or requires_gradient(*tensors[:5]):
        return None
    facts = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
    return (*facts, bool(causal), scale, bool(return_lse), dispatch.epoch(), torch.get_num_threads())


def _remember(key, call):
    if key is None:
        return
    if len(_known) >= 1024:  # ever-changing shapes must not fill the memory
        _known.clear()
    _known[key] = call


def _capacity(k_cache, block_table):
    return k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[2]


def _check(q, k_cache, v_cache, k, v, cache_lengths, block_table):
    names = "q", "k_cache", "v_cache"
    if block_table is None:
        check.qkv(_OP, q, k_cache, v_cache, names)
    else:
        check.tensors(_OP, names, (q, k_cache, v_cache))
        for name, value in zip(names, (q, k_cache, v_cache), strict=True):
            checks.tensor(_OP, name, value, (4,))
        if not isinstance(block_table, torch.Tensor) or block_table.dim() != 2:
            raise ValueError(
                f"{_OP}: block_table must be [B, pages of each sequence], got {checks.describe(block_table)}"
            )
        check.integers(_OP, "block_table", block_table, q, (q.shape[0], block_table.shape[1]))
        # the batch of pages is not q's, everything else must agree
        check.agree(_OP, names, (q[:1], k_cache[:1], v_cache[:1]), heads=1)
    check.integers(_OP, "cache_lengths", cache_lengths, q, (q.shape[0],))
    if requires_gradient(q, k_cache, v_cache, k, v):
        raise ValueError(
            f"{_OP}: it has no gradient, but one of its tensors requires one: call it under torch.no_grad()"
        )
    if (k is None) != (v is None):
        raise ValueError(f"{_OP}: k and v must be given both or neither, got {'v' if k is None else 'k'} alone")
    if k is None:
        return
    for name, value, cache in (("k", k, k_cache), ("v", v, v_cache)):
        checks.tensor(_OP, name, value, (4,))
        checks.same_device(_OP, name, value, "q", q)
        checks.same_dtype(_OP, name, value, f"{name}_cache", cache)
        checks.shape(_OP, name, value, (q.shape[0], cache.shape[1], k.shape[2], cache.shape[3]))


def _check_numbers(cache_lengths, new, capacity, block_table, k_cache):
    """What the numbers in lengths and tables must be, where looking at them does not wait for a device."""
    if not cache_lengths.is_cpu or traced() or not cache_lengths.numel():
        return
    numbers = cache_lengths.tolist()
    least, most = min(numbers), max(numbers)
    if least < 0 or most + new > capacity:
        raise ValueError(
            f"{_OP}: cache_lengths must be at least 0 and leave room for {new} new keys in a cache of {capacity}, "
            f"got {least} to {most}"
        )
    if block_table is None or not block_table.numel():
        return
    page = k_cache.shape[2]
    used = torch.arange(block_table.shape[1]) * page < (cache_lengths.long() + new)[:, None]
    numbers = block_table[used]
    if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= k_cache.shape[0]):
        raise ValueError(
            f"{_OP}: block_table must name pages 0 to {k_cache.shape[0] - 1} where a sequence has keys, "
            f"got {int(numbers.min())} to {int(numbers.max())}"
        )


def _case(q, k_cache, v_cache, left, right, softcap, slopes, block_table, return_lse):
    given = {
        "window": left >= 0 or right > 0,
        "causal": right == 0,
        "softcap": softcap,
        "ALiBi": slopes is not None,
        "pages": block_table is not None,
        "return_lse": return_lse,
    }
    (B, Hq, Tq, D), Hkv, capacity = q.shape, k_cache.shape[1], _capacity(k_cache, block_table)
    options = tuple(name for name, there in given.items() if there)
    return rules.AttentionCase(q.device.type, q.dtype, B, Hq, Hkv, Tq, capacity, D, v_cache.shape[3], False, options)


def _torch_decode(q, k_cache, v_cache, lengths, block_table, slopes, scale, left, right, softcap):
    """scaled_dot_product_attention over the whole room of the cache, under a mask. (out, None)."""
    if block_table is not None:
        k_cache, v_cache = (gather_pages(c, block_table) for c in (k_cache, v_cache))
    k_cache, v_cache = (written(c, lengths) for c in (k_cache, v_cache))
    start = lengths - q.shape[2]
    options = AttentionOptions(key_lengths=lengths, query_start=start, window_left=left, window_right=right)
    mask = Positions(q, k_cache, options).visible()
    gqa = q.shape[1] != k_cache.shape[1]
    return F.scaled_dot_product_attention(q, k_cache, v_cache, mask, scale=scale, enable_gqa=gqa), None


_APPEND = {
    "cpu": library.kernel("kv_cache_append"),
    "triton": library.kernel("kv_cache_append", "seqfuse_triton"),
    "torch": reference.kv_cache_append,
    "reference": reference.kv_cache_append,
}

dispatch.register(
    "attention_decode",
    dispatch.Backend("cpu", library.kernel("attention_decode"), None, rules.cpu_decode_refusal),
    dispatch.Backend("triton", library.kernel("attention_decode", "seqfuse_triton"), None, rules.triton_refusal,
                     rules.triton_prefers, note=library.NOT_RUN_ON_GPU),
    dispatch.Backend("torch", _torch_decode, None, rules.torch_refusal, note="PyTorch's own op under a mask"),
    dispatch.Backend("reference", reference.attention_decode, None),
    least=lambda: (rules.WIDEST[False] + 1,),
)  # fmt: skip
