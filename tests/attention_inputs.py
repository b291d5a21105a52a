"""Inputs of attention for the tests of its public functions, and the error rule over outputs and all gradients."""

import torch

import seqfuse
from seqfuse import reference
from seqfuse.ops import attention
from seqfuse.reference import AttentionOptions
from seqfuse.reference.attention import Positions
from seqfuse.testing import assert_accurate

SIZES = dict(B=2, Hq=4, Hkv=2, Tq=9, Tk=13, D=8, Dv=8)
NAMES = ["causal", "window", "softcap", "scale", "alibi_slopes", "bias", "mask", "key_lengths", "dropout_p"]


def qkv(B=2, Hq=4, Hkv=2, Tq=9, Tk=13, D=8, Dv=8, dtype=torch.float32):
    shapes = (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv)
    return [torch.randn(s).to(dtype) for s in shapes]


def options(names, sizes=SIZES):
    """Keyword arguments of attention for these names, and the fields of AttentionOptions that mean the same (but for
    the seed of dropout: see `check`)."""
    B, Hq, Tq, Tk = (sizes[n] for n in ("B", "Hq", "Tq", "Tk"))
    values = {
        "causal": (True, {"window_right": 0}),
        "window": ((4, 2), {"window_left": 4, "window_right": 0 if "causal" in names else 2}),
        "softcap": (2.0, {"softcap": 2.0}),
        "scale": (0.7, {"scale": 0.7}),
        "alibi_slopes": (torch.rand(B, Hq), None),
        "bias": (torch.randn(1, Hq, Tq, Tk), None),
        "mask": (torch.rand(B, 1, Tq, Tk) < 0.7, None),
        "key_lengths": (torch.randint(0, Tk + 1, (B,)), None),
        "dropout_p": (0.3, {"dropout_p": 0.3}),
    }
    keywords, fields = {}, {"scale": sizes["D"] ** -0.5}
    for name in names:
        keywords[name], said = values[name]
        fields.update({name: keywords[name]} if said is None else said)
    return keywords, fields


def in_pages(tensors, page):
    """Caches [B, H, T, D] as shuffled pages [P, H, page, D] with a table [B, M]; unused pages hold NaN."""
    B, _, T, _ = tensors[0].shape
    M = -(-T // page)
    table = torch.randperm(B * M + 2)[: B * M].view(B, M)
    paged = []
    for t in tensors:
        padded = torch.cat([t, t.new_full((*t.shape[:2], M * page - T, t.shape[3]), torch.nan)], 2)
        pages = padded.unflatten(2, (M, page)).transpose(1, 2).flatten(0, 1)
        new = t.new_full((B * M + 2, *pages.shape[1:]), torch.nan)
        new[table.flatten()] = pages
        paged.append(new)
    return paged, table


def gradients(call, tensors, grads):
    """Outputs and the gradients of all tensors."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = call(*leaves)
    arriving = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, arriving, materialize_grads=True)]


def rounding_of_delta(dout, out, exact):
    """By how much sum(dout * out), taken in float32 from the out that was given out, misses the sum over `exact`."""
    return (dout.float() * out.float()).sum(-1) - (dout.double() * exact).sum(-1)


def check(q, k, v, keywords, fields, backend, lse=True):
    """Outputs and every gradient of a backend against the float64 reference, over batches, heads and rows too.

    Rows of dq, dk and dbias count one by one only where every query sees two keys or none: with a single key its weight
    is 1 whatever q is, the gradient is a difference of equals, and what a kernel leaves is the rounding of either.

    A flash backward, PyTorch's own too, takes sum(dout * out) from the rounded out that was given out, where softmax's
    takes it from the numbers that cancel against it. In the gradients that is another gradient of lse: PyTorch's error
    is that of its own ops with it.
    """
    tensors = [q, k, v] + ([keywords["bias"].to(q.dtype)] if "bias" in keywords else [])

    def ours(q, k, v, *bias):
        given = {**keywords, **({"bias": bias[0]} if bias else {})}
        torch.manual_seed(3)
        out = attention(q, k, v, return_lse=lse, **given)
        return (out[0], out[1].masked_fill(out[1] == -torch.inf, 0.0)) if lse else (out,)

    def truth(q, k, v, *bias):
        torch.manual_seed(3)
        drawn = {"seed": torch.randint(-(2**63), 2**63 - 1, (1,))} if "dropout_p" in fields else {}
        o = AttentionOptions(**{**fields, **drawn, **({"bias": bias[0]} if bias else {})})
        out, sums = reference.attention(q, k, v, o)
        return out, sums.masked_fill(sums == -torch.inf, 0.0)

    grads = [torch.randn(*q.shape[:3], v.shape[3])] + [torch.randn(q.shape[:3])] * lse
    with seqfuse.backend(backend):
        got = gradients(ours, tensors, grads)
    dout, dlse = grads if lse else (*grads, torch.zeros(q.shape[:3]))
    exact = gradients(truth, [t.double() for t in tensors], [dout.double(), dlse.double()])
    theirs = gradients(truth, tensors, [dout, dlse])
    dout = dout.to(q.dtype)
    rounding = rounding_of_delta(dout, theirs[0], exact[0])
    theirs[2:] = gradients(truth, tensors, [dout, dlse - rounding])[2:]
    if not lse:
        del exact[1], theirs[1]
    names = ["out", *["lse"] * lse, "dq", "dk", "dv", "dbias"]
    seen = Positions(q, k, AttentionOptions(**fields)).visible().expand(*q.shape[:3], k.shape[2]).sum(-1)
    rows = {"dq", "dk", "dbias"} if (seen == 1).any() else set()
    for name, a, b, c in zip(names, got, exact, theirs, strict=False):
        # the error of a slice of a few numbers is luck: PyTorch's may be none
        dims = [d for d in ((0, 1) if name in rows else (0, 1, 2)) if a.numel() // a.shape[d] >= 8]
        assert_accurate(a, b, c, dims=dims, what=name, dtype=None if name == "lse" else q.dtype)
