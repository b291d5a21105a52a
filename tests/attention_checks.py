"""Checks of attention that the interpreter tests and the GPU tests share: launchers against the float64 reference.

Memory that nobody wrote holds NaN (tests/conftest.py); keys beyond key_lengths, and a cache beyond its lengths, too.
"""

import torch

from seqfuse import reference
from seqfuse.kernels import attention, attention_decode
from seqfuse.kernels.attention_plan import KERNELS, Tiles
from seqfuse.reference import AttentionOptions
from seqfuse.reference.attention import Positions
from seqfuse.testing import assert_accurate

# the smallest tiles there are, so that small tensors already take several of them
SMALL = {kernel: Tiles(16, 16, 1, 1) for kernel in KERNELS}

# option -> what may be drawn for it together with others; packed sequences exclude some
OPTIONS = ("causal", "window", "top_left", "softcap", "alibi", "bias", "mask", "key_lengths", "query_start", "dropout",
           "packed")  # fmt: skip
NOT_PACKED = ("bias", "mask", "key_lengths", "query_start")


def composes(names) -> bool:
    return not ("packed" in names and any(name in NOT_PACKED for name in names))


def make_options(names, B, H, Tq, Tk, D, dtype, device, generator) -> AttentionOptions:
    """The options of these names with random values; every other option off."""

    def rand(*shape, kind=torch.float32):
        return torch.randn(*shape, generator=generator).to(device, kind)

    def whole(*values, kind=torch.int32):
        return torch.tensor(values, dtype=kind, device=device)

    def starts(total):  # four sequences, one of them empty, and rows after the last
        inner = torch.randint(0, total, (2,), generator=generator).sort().values.tolist()
        return whole(0, inner[0], inner[0], inner[1], max(inner[1], total - 3))

    o = {"scale": D**-0.5}
    if "causal" in names:
        o["window_right"] = 0
    if "window" in names:
        o |= {"window_left": max(1, Tk // 4), "window_right": o.get("window_right", 2)}
    if "top_left" in names:
        o["top_left"] = True
    if "softcap" in names:
        o["softcap"] = 1.5
    if "alibi" in names:
        o["alibi_slopes"] = rand(*((4 if "packed" in names else B, H) if "causal" in names else (H,))).abs()
    if "bias" in names:
        b, h = (1, H) if "causal" in names else (B, 1)
        o["bias"] = rand(b, h, Tq, Tk, kind=torch.float32 if "mask" in names else dtype)
    if "mask" in names:
        keep = torch.rand(B, 1, 1 if "bias" in names else Tq, Tk, generator=generator) < 0.7
        o["mask"] = keep.to(device)
    if "key_lengths" in names:
        o["key_lengths"] = whole(*[max(0, Tk - 5 - 7 * b) if b else Tk // 2 for b in range(B)], kind=torch.int64)
    if "query_start" in names:
        o["query_start"] = whole(*[3 - 5 * b for b in range(B)])
    if "dropout" in names:
        o |= {"dropout_p": 0.3, "seed": whole(-(2**40) + 12345, kind=torch.int64)}
    if "packed" in names:
        o |= {"cu_seqlens_q": starts(Tq), "cu_seqlens_k": starts(Tk).long()}
    return AttentionOptions(**o)


def attend(names=(), B=2, H=2, Hkv=1, Tq=21, Tk=37, D=16, DV=None, dtype=torch.float32, device="cpu", *, tiles=SMALL,
           deterministic=True, dlse=True, heads_inside=False, want_dbias=True, seed=0, repeat=False,
           scale=None):  # fmt: skip
    """Forward and backward of one call with the options of these names, by the error rule."""
    generator = torch.Generator().manual_seed(seed)
    B = 1 if "packed" in names else B

    def rand(heads, T, width):
        x = torch.randn(B, T, heads, width, generator=generator).to(device, dtype).transpose(1, 2)
        return x if heads_inside else x.contiguous()

    q, k, v, dout = rand(H, Tq, D), rand(Hkv, Tk, D), rand(Hkv, Tk, DV or D), rand(H, Tq, DV or D)
    o = make_options(names, B, H, Tq, Tk, D, dtype, device, generator)
    o = o if scale is None else o._replace(scale=scale)
    dl = torch.randn(B, H, Tq, generator=generator).to(device) if dlse else None

    def expected(to):
        moved = [None if x is None else x.detach().cpu() for x in (q, k, v, dout, dl, o.bias)]
        leaves = [x.to(to).requires_grad_() for x in moved[:3]]
        bias = None if o.bias is None else moved[5].to(to).requires_grad_()
        others = o._replace(**{n: x.cpu() for n, x in o._asdict().items() if isinstance(x, torch.Tensor)})
        out, lse = reference.attention(*leaves, others._replace(bias=bias))
        wanted = leaves + ([bias] if bias is not None else [])
        outputs, grads = [out], [moved[3].to(to)]
        if dlse:
            outputs.append(torch.where(lse == -torch.inf, 0.0, lse))
            grads.append(moved[4].to(lse.dtype))
        return [out, lse, *torch.autograd.grad(outputs, wanted, grads)]

    truth, pytorch = expected(torch.float64), expected(dtype)
    if o.key_lengths is not None:  # what does not exist is not read
        absent = torch.arange(Tk, device=device) >= o.key_lengths[:, None]
        k, v = (x.masked_fill(absent[:, None, :, None], torch.nan) for x in (k, v))
    want_dbias = want_dbias and o.bias is not None

    def run():
        out, lse = attention.attention_fwd(q, k, v, *o, tiles=tiles)
        return (
            out,
            lse,
            *attention.attention_bwd(dout, dl, q, k, v, out, lse, *o, want_dbias, deterministic, tiles=tiles),
        )

    results = run()
    if repeat:
        for one, other in zip(results, run(), strict=True):
            assert torch.equal(one, other), "two calls with the same inputs differ"
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    # Scores' gradients cancel where a query sees few keys (with one they are 0), and a flash backward rounds
    # sum(dout * out) on its own, where softmax's takes it from the numbers that cancel. In PyTorch's own ops the flash
    # formula had 4 times the error of softmax's in a row of two keys (1.5e-6, 3.7e-7). Such rows are judged within
    # their head and tensor.
    on_cpu = o._replace(**{n: x.cpu() for n, x in o._asdict().items() if isinstance(x, torch.Tensor)})
    visible = Positions(q.cpu(), k.cpu(), on_cpu).visible().expand(B, H, Tq, Tk)
    several = (visible.sum(-1) >= 4).flatten(0, 1).all(0)
    for name, got, t, p in zip(names, results, truth, pytorch, strict=False):
        if name == "lse":
            assert torch.equal(got.cpu() == -torch.inf, t == -torch.inf)
        kind, by_row = None if name == "lse" else dtype, name not in ("dq", "dbias")
        assert_accurate(got, t, p, dims=(0, 1, 2) if by_row else (0, 1), what=name, dtype=kind)
        if not by_row and got.numel():
            rows = (x.cpu()[:, :, several] for x in (got, t, p))
            assert_accurate(*rows, dims=(2,), what=f"{name} by row", dtype=kind)
    assert want_dbias or results[-1].numel() == 0
    hidden = (truth[1] == -torch.inf)[..., None]
    for got in (results[0], results[2]):  # rows that see nothing: exactly zero
        assert (got.cpu().masked_select(hidden) == 0).all()


def decode(lengths, Tq=1, H=4, Hkv=2, T=60, D=16, DV=None, dtype=torch.float32, device="cpu", *, page=0, alibi=False,
           window=(-1, 0), softcap=0.0, tiles=SMALL["decode"], splits=None, append=0, seed=0,
           repeat=False):  # fmt: skip
    """Decoding (after an append of so many positions) by the error rule; a page table in random order where page."""
    generator = torch.Generator().manual_seed(seed)
    B = len(lengths)

    def rand(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q, k, v = rand(B, H, Tq, D), rand(B, Hkv, T, D), rand(B, Hkv, T, DV or D)
    ends = torch.tensor(lengths, dtype=torch.int64 if page else torch.int32, device=device)
    slopes = torch.rand(B, H, generator=generator).to(device) if alibi else None
    settings = (D**-0.5, *window, softcap)

    def expected(to):
        q_, k_, v_ = (x.cpu().to(to) for x in (q, k, v))
        return reference.attention_decode(q_, k_, v_, ends.cpu(), None, None if slopes is None else slopes.cpu(),
                                          *settings)  # fmt: skip

    truth, pytorch = expected(torch.float64), expected(dtype)
    absent = (torch.arange(T, device=device) >= ends[:, None])[:, None, :, None]
    caches = [x.masked_fill(absent, torch.nan) for x in (k, v)]
    table = None
    if page:
        order = torch.randperm(B * (T // page), generator=generator).to(device)
        table = order.argsort().view(B, T // page).int()
        caches = [x.unflatten(2, (T // page, page)).transpose(1, 2).flatten(0, 1)[order] for x in caches]
    if append:
        before = (ends - append).clamp_min(0)
        at = (before[:, None] + torch.arange(append, device=device))[:, None, :, None]
        new = [x.gather(2, at.expand(-1, Hkv, -1, x.shape[3])) for x in (k, v)]
        full = [x.clone() for x in caches]
        for cache, spoil in zip(caches, full, strict=True):  # the appended positions are not there yet
            where = (torch.arange(T, device=device) >= before[:, None])[:, None, :, None].expand(B, Hkv, T, 1)
            if page:
                where = where.unflatten(2, (T // page, page)).transpose(1, 2).flatten(0, 1)[order]
            cache.copy_(spoil.masked_fill(where, torch.nan))
        attention_decode.kv_cache_append(*caches, *new, before, table)
        for cache, wanted in zip(caches, full, strict=True):
            assert torch.equal(cache.nan_to_num(7.0), wanted.nan_to_num(7.0)), "appended to the wrong place"

    def run():
        return attention_decode.attention_decode(q, *caches, ends, table, slopes, *settings, tiles=tiles, splits=splits)

    results = run()
    if repeat:
        for one, other in zip(results, run(), strict=True):
            assert torch.equal(one, other), "two calls with the same inputs differ"
    for name, got, t, p in zip(("out", "lse"), results, truth, pytorch, strict=True):
        assert_accurate(got, t, p, dims=(0, 1, 2), what=name, dtype=None if name == "lse" else dtype)
