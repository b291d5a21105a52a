"""Argument checks of the attention functions, and the forms in which the backends want the arguments."""

import math

import torch

from seqfuse.ops import checks
from seqfuse.ops.autograd import traced


def tensors(op, names, values):
    """Floating-point tensors of one device and one dtype."""
    for name, value in zip(names, values, strict=True):
        checks.tensor(op, name, value)
    for name, value in zip(names[1:], values[1:], strict=True):
        checks.same_device(op, name, value, names[0], values[0])
        checks.same_dtype(op, name, value, names[0], values[0])


def qkv(op, q, k, v, names=("q", "k", "v")):
    """q [B, Hq, Tq, D], k [B, Hkv, Tk, D], v [B, Hkv, Tk, Dv]."""
    tensors(op, names, (q, k, v))
    for name, value in zip(names, (q, k, v), strict=True):
        checks.tensor(op, name, value, (4,))
    agree(op, names, (q, k, v), heads=1)


def packed(op, q, k, v):
    """q [total_q, Hq, D], k [total_k, Hkv, D], v [total_k, Hkv, Dv]."""
    names = "q", "k", "v"
    tensors(op, names, (q, k, v))
    for name, value in zip(names, (q, k, v), strict=True):
        checks.tensor(op, name, value, (3,))
    agree(op, names, (q, k, v), heads=1)


def agree(op, names, values, heads):
    (q, k, v), (nq, nk, nv) = values, names
    if q.dim() == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{op}: {nk} must have {nq}'s batch of {q.shape[0]}, got {checks.describe(k)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"{op}: {nv} must have {nk}'s shape but for the last dimension, got {checks.describe(v)} with "
                         f"{checks.describe(k)}")  # fmt: skip
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{op}: {nk} must have {nq}'s last dimension {q.shape[-1]}, got {checks.describe(k)}")
    if q.shape[-1] == 0:
        raise ValueError(f"{op}: the last dimension of {nq} must be at least 1, got {checks.describe(q)}")
    many, few = q.shape[heads], k.shape[heads]
    if (few == 0 and many != 0) or (few != 0 and many % few):
        raise ValueError(f"{op}: the heads of {nq} must be a multiple of those of {nk}, got {many} and {few}")


def number(op, name, value):
    if isinstance(value, torch.Tensor) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {checks.describe(value)}")
    if not -math.inf < value < math.inf:  # math.isfinite breaks the graph of torch.compile on a symbolic number
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


def probability(op, name, value):
    value = number(op, name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} must be between 0 and 1, got {value}")
    return value


def softcap(op, value):
    """0.0 for None."""
    if value is None:
        return 0.0
    value = number(op, "softcap", value)
    if value < 0.0:
        raise ValueError(f"{op}: softcap must be above 0 (or None), got {value}")
    return value


def window(op, value):
    """(left, right), -1 for no limit."""
    if value is None:
        return -1, -1
    good = isinstance(value, (tuple, list)) and len(value) == 2
    if not good or not all(isinstance(n, int) and not isinstance(n, bool) and n >= -1 for n in value):
        raise ValueError(f"{op}: window must be (left, right), two integers >= -1 (-1: no limit), got {value!r}")
    return tuple(value)


def _on(op, name, value, q):
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {checks.describe(value)}")
    checks.same_device(op, name, value, "q", q)


def integers(op, name, value, q, shape):
    """int32 or int64 of this shape on q's device."""
    _on(op, name, value, q)
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be int32 or int64, got {checks.describe(value)}")
    checks.shape(op, name, value, shape)
    return value


def lengths(op, name, value, q, most):
    """How many of `most` keys each sequence has. The numbers are looked at where that does not wait for a device."""
    if value is None:
        return None
    integers(op, name, value, q, (q.shape[0],))
    if value.is_cpu and not traced():
        wrong = [n for n in value.tolist() if not 0 <= n <= most]
        if wrong:
            raise ValueError(f"{op}: {name} must lie between 0 and {most}, the keys that there are, got {wrong[0]}")
    return value


def slopes(op, value, q, sequences):
    """[Hq] or [sequences, Hq] in float32, for q [B, Hq, Tq, D]."""
    if value is None:
        return None
    _on(op, "alibi_slopes", value, q)
    checks.tensor(op, "alibi_slopes", value)
    wanted = ([q.shape[1]], [sequences, q.shape[1]])
    if not any(_is_shape(value, shape) for shape in wanted):
        raise ValueError(f"{op}: alibi_slopes must have shape {wanted[0]} or {wanted[1]}, got {checks.describe(value)}")
    if value.requires_grad:
        raise ValueError(f"{op}: alibi_slopes are constants and get no gradient, but they require one: detach them")
    return value if value.dtype == torch.float64 == q.dtype else value.float()


def _is_shape(value, shape) -> bool:
    """Number by number: `in` of lists makes no guard of torch.compile where a size is symbolic."""
    if value.dim() != len(shape):
        return False
    for n, w in zip(value.shape, shape, strict=True):
        if n != w:
            return False
    return True


def _broadcasts(view, whole) -> bool:
    for n, w in zip(view.shape, whole, strict=True):
        if n != 1 and n != w:  # see _is_shape
            return False
    return True


def _over_scores(op, name, value, q, k, broadcast_queries):
    """A view [1 or B, 1 or Hq, Tq (or 1 if it may broadcast), Tk]."""
    whole = (*q.shape[:3], k.shape[2])
    view = value
    while view.dim() < 4:
        view = view[None]
    if view.dim() > 4 or not _broadcasts(view, whole):
        raise ValueError(f"{op}: {name} must broadcast to {list(whole)}, got {checks.describe(value)}")
    queries = view.shape[2] if broadcast_queries else whole[2]
    return view.expand(view.shape[0], view.shape[1], queries, whole[3])


def bias(op, name, value, q, k):
    if value is None:
        return None
    _on(op, name, value, q)
    checks.tensor(op, name, value)
    if value.dtype not in (q.dtype, torch.float32):
        kind = str(q.dtype).removeprefix("torch.")
        raise ValueError(f"{op}: {name} must have the queries' dtype {kind} or float32, got {checks.describe(value)}")
    return _over_scores(op, name, value, q, k, False)


def mask(op, name, value, q, k):
    if value is None:
        return None
    _on(op, name, value, q)
    if value.dtype != torch.bool:
        raise TypeError(f"{op}: {name} must be bool, got {checks.describe(value)}")
    return _over_scores(op, name, value, q, k, True)


def starts(op, name, value, q, total):
    """cu_seqlens of `total` rows. The numbers are looked at where that does not wait for a device."""
    _on(op, name, value, q)
    if value.dim() != 1 or value.shape[0] == 0:
        raise ValueError(f"{op}: {name} must be [sequences + 1], got {checks.describe(value)}")
    integers(op, name, value, q, value.shape)
    if value.is_cpu and not traced():
        steps = value.tolist()
        if steps[0] != 0 or steps[-1] > total or any(a > b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"{op}: {name} must grow from 0 to at most {total}, the rows that there are, got {steps}")
    return value


def as_batch(op, q, k, v, gqa):
    """Tensors of torch's scaled_dot_product_attention as [B, H, T, D], and the dimensions that B and H stand for."""
    names = "query", "key", "value"
    for name, value in zip(names, (q, k, v), strict=True):
        if value.dim() < 2:
            raise ValueError(f"{op}: {name} must have at least 2 dimensions, got {checks.describe(value)}")
    if gqa:
        for name, value in zip(names, (q, k, v), strict=True):
            if value.dim() < 3:
                raise ValueError(f"{op}: {name} must have a dimension of heads with enable_gqa, got "
                                 f"{checks.describe(value)}")  # fmt: skip
        if v.shape[-3] != k.shape[-3]:  # torch allows each its own number of heads
            most = max(k.shape[-3], v.shape[-3])
            k, v = (t if t.shape[-3] == most else t.repeat_interleave(most // t.shape[-3], -3) for t in (k, v))
    heads = 3 if gqa else 2  # the last dimensions that do not broadcast
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-heads] for t in (q, k, v)))
    except RuntimeError:
        got = ", ".join(checks.describe(t) for t in (q, k, v))
        raise ValueError(
            f"{op}: query, key and value must broadcast but for their last {heads} dimensions, got {got}"
        ) from None
    q, k, v = (t.expand(*batch, *t.shape[-heads:]) for t in (q, k, v))
    batch = q.shape[:-2]
    q, k, v = (_four(t) for t in (q, k, v))
    qkv(op, q, k, v, names)
    return q, k, v, batch


def _four(t):
    while t.dim() < 4:
        t = t[None]
    return t.flatten(0, -4)


def as_scores(op, mask, batch, q, k):
    """torch's attn_mask for queries of the dimensions `batch`, as something that broadcasts to [B, Hq, Tq, Tk]."""
    _on(op, "attn_mask", mask, q)
    whole = (*batch, q.shape[2], k.shape[2])
    if len(batch) <= 2 or mask.dim() <= 3:
        return mask
    padded = mask[(None,) * (len(whole) - mask.dim())] if mask.dim() < len(whole) else mask
    if padded.dim() > len(whole) or not _broadcasts(padded, whole):
        raise ValueError(f"{op}: attn_mask must broadcast to {list(whole)}, got {checks.describe(mask)}")
    if all(n == 1 for n in padded.shape[:-3]):
        return padded.flatten(0, -4)
    return padded.expand(*whole[:-3], *padded.shape[-3:]).flatten(0, -4)
