"""The Triton attention kernels in the interpreter, against the float64 reference by the error rule.

As tests/test_triton_interpret.py: needs TRITON_INTERPRET=1 in a process of its own, and never uses bf16.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import attention_checks as checks

from seqfuse import reference
from seqfuse.kernels import attention, attention_decode, common
from seqfuse.ops import attention_op  # noqa: F401  (registers the ops)

pytestmark = pytest.mark.interpret

FP16, FP32 = torch.float16, torch.float32
PAIRS = [pair for pair in itertools.combinations(checks.OPTIONS, 2) if checks.composes(pair)]


def test_interpreting():
    assert common.interpreting()


@pytest.mark.parametrize("deterministic", (True, False), ids=("two-kernels", "atomics"))
@pytest.mark.parametrize("option", ("plain", *checks.OPTIONS))
def test_option(option, deterministic):
    checks.attend(() if option == "plain" else (option,), dtype=FP16, deterministic=deterministic)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_pair_of_options(pair):
    B = 2 if {"bias", "key_lengths", "query_start"} & set(pair) else 1
    checks.attend(pair, B=B, H=1, Tq=19, Tk=21, seed=len("-".join(pair)))


@pytest.mark.parametrize("deterministic", (True, False), ids=("two-kernels", "atomics"))
@pytest.mark.parametrize("packed", (True, False), ids=("packed", "padded"))
def test_all_options(packed, deterministic):
    names = [n for n in checks.OPTIONS if (n != "packed" if not packed else n not in checks.NOT_PACKED)]
    checks.attend(names, H=4, Hkv=2, Tq=33, Tk=20, D=24, DV=9, deterministic=deterministic, heads_inside=True)


@pytest.mark.parametrize(
    "B,H,Hkv,Tq,Tk,D,DV",
    [(1, 1, 1, 1, 1, 1, 1), (1, 3, 3, 5, 40, 7, 20), (1, 2, 1, 40, 3, 33, 33), (1, 1, 1, 17, 17, 256, 200)],
    ids=str,
)
def test_shape(B, H, Hkv, Tq, Tk, D, DV):
    checks.attend(("causal",), B, H, Hkv, Tq, Tk, D, DV, dtype=FP16, dlse=False)


def test_forward_of_the_widest_head():
    q, k, v = (torch.randn(1, 1, n, 500) for n in (3, 18, 18))
    o = reference.AttentionOptions(scale=0.04)
    out, _ = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    truth, _ = reference.attention(q.double(), k.double(), v.double(), o)
    checks.assert_accurate(out, truth, reference.attention(q, k, v, o)[0], dims=(2,))


@pytest.mark.parametrize("scale", (0.0, -0.3), ids=str)
def test_scale(scale):
    checks.attend(("causal",), B=1, scale=scale)


@pytest.mark.parametrize("p", (1.0, 2.0**-40), ids=("everything", "nothing"))
def test_dropout_at_its_ends(p):
    q, k, v = (torch.randn(1, 1, n, 8) for n in (5, 9, 9))
    o = reference.AttentionOptions(scale=0.3, dropout_p=p, seed=torch.tensor([3]))
    out, lse = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    truth, lse_truth = reference.attention(q.double(), k.double(), v.double(), o)
    checks.assert_accurate(out, truth, reference.attention(q, k, v, o)[0])
    checks.assert_accurate(lse, lse_truth)


@pytest.mark.parametrize("seed", (0, -1, 2**40 + 17), ids=str)
def test_dropout_mask_is_the_references(seed):
    """Of equal scores and values that are the unit vectors, out shows which keys were kept: exactly, not nearly."""
    B, H, Tq, Tk, p = 2, 2, 18, 32, 0.4
    q, k = torch.zeros(B, H, Tq, 16), torch.zeros(B, H, Tk, 16)
    v = torch.eye(Tk).expand(B, H, Tk, Tk)
    o = reference.AttentionOptions(dropout_p=p, seed=torch.tensor([seed]))
    out, _ = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    b, h, i, j = (torch.arange(n) for n in (B, H, Tq, Tk))
    wanted = reference.dropout_keep(o.seed, b[:, None, None, None], h[:, None, None], i[:, None], j, p)
    assert torch.equal(out != 0, wanted)
    assert wanted.any() and not wanted.all()


def test_nan_propagates():
    q, k, v = (torch.randn(1, 1, n, 16) for n in (20, 20, 20))
    q[0, 0, 3, 0] = torch.nan
    out, lse = attention.attention_fwd(q, k, v, *reference.AttentionOptions(window_right=0), tiles=checks.SMALL)
    assert torch.equal(out.isnan().any(-1), q.isnan().any(-1))
    assert torch.equal(lse.isnan(), q.isnan().any(-1))


def test_bias_of_the_lowest_float():
    """How model libraries hide keys: a row hidden all over is the mean of its values, its gradient finite."""
    q, k, v = (torch.randn(1, 1, 5, 8) for _ in range(3))
    bias = torch.zeros(1, 1, 5, 5)
    bias[..., 3:] = bias[:, :, 2] = torch.finfo(torch.float32).min
    o = reference.AttentionOptions(bias=bias)
    out, lse = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    checks.assert_accurate(out, reference.attention(q.double(), k.double(), v.double(), o)[0], dims=(2,))
    dout = torch.randn(1, 1, 5, 8)
    dout[:, :, 2] = 0.0
    grads = attention.attention_bwd(dout, None, q, k, v, out, lse, *o, True, True, tiles=checks.SMALL)
    assert all(g.isfinite().all() for g in grads)


def test_broadcast_bias_and_strided_mask():
    """dbias is whole although the bias was expanded; a mask may have any strides."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (18, 20, 20))
    row = torch.randn(1, 2, 1, 20)
    mask = (torch.rand(20, 18) < 0.7).T[None, None]
    o = reference.AttentionOptions(scale=0.3, bias=row.expand(1, 2, 18, 20), mask=mask)
    out, lse = attention.attention_fwd(q, k, v, *o, tiles=checks.SMALL)
    dout = torch.randn_like(out)
    dbias = attention.attention_bwd(dout, None, q, k, v, out, lse, *o, True, True, tiles=checks.SMALL)[3]

    def expected(to):
        bias = row.to(to).expand(1, 2, 18, 20).clone().requires_grad_()
        y = reference.attention(q.to(to), k.to(to), v.to(to), o._replace(bias=bias))[0]
        return torch.autograd.grad(y, bias, dout.to(to))[0]

    checks.assert_accurate(dbias, expected(torch.float64), expected(FP32), dims=(1, 2))


@pytest.mark.parametrize("nothing", ("keys", "queries", "batch"))
def test_empty(nothing):
    B, Tq, Tk = {"keys": (1, 3, 0), "queries": (1, 0, 3), "batch": (0, 3, 3)}[nothing]
    q, k, v = (torch.randn(B, 2, n, 8) for n in (Tq, Tk, Tk))
    o = reference.AttentionOptions()
    out, lse = attention.attention_fwd(q, k, v, *o)
    assert (out == 0).all() and (lse == -torch.inf).all()
    grads = attention.attention_bwd(out, None, q, k, v, out, lse, *o, False, True)
    assert all((g == 0).all() and g.shape == x.shape for g, x in zip(grads, (q, k, v), strict=False))


def test_registered_ops_with_the_planned_tiles():
    """Through torch.ops, as the package calls them."""
    q, k, v = (torch.randn(1, 2, n, 24) for n in (20, 30, 30))
    o = reference.AttentionOptions(scale=0.2, window_right=0)
    ops = torch.ops.seqfuse_triton
    out, lse = ops.attention_fwd(q, k, v, *o)
    checks.assert_accurate(out, reference.attention(q.double(), k.double(), v.double(), o)[0], dims=(1, 2))
    grads = ops.attention_bwd(out, None, q, k, v, out, lse, *o, False, False)
    assert [g.shape for g in grads[:3]] == [q.shape, k.shape, v.shape]
    lengths = torch.tensor([30])
    decoded, _ = ops.attention_decode(q, k, v, lengths, None, None, 0.2, -1, 0, 0.0)
    checks.assert_accurate(decoded, out.double(), dims=(1, 2))


@pytest.mark.parametrize("splits", (1, 3, 7), ids=str)
@pytest.mark.parametrize("page", (0, 4, 20), ids=("dense", "page4", "page20"))
def test_decode(page, splits):
    checks.decode((60, 1, 37), page=page, splits=splits, append=1)


@pytest.mark.parametrize("page", (0, 12), ids=("dense", "paged"))
@pytest.mark.parametrize(
    "case",
    [
        {"Tq": 3, "alibi": True, "window": (9, 0)},
        {"Tq": 9, "H": 6, "softcap": 2.0, "D": 20, "DV": 7},
        {"window": (5, -1), "dtype": FP16},
        {"Tq": 2, "window": (-1, -1), "append": 2},
    ],
    ids=("window", "softcap", "left", "open"),
)
def test_decode_options(case, page):
    checks.decode((5, 48), T=48, page=page, splits=2, **case)


def test_decode_shorter_than_the_queries():
    """Queries before the first key see nothing."""
    checks.decode((2, 0), Tq=4, T=16, splits=2)


def test_append_drops_what_does_not_fit():
    cache = torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2)
    new = torch.ones(1, 1, 3, 2)
    attention_decode.kv_cache_append(*cache, new, 2 * new, torch.tensor([2]), None)
    assert cache[0][0, 0, :, 0].tolist() == [0, 0, 1, 1]
    assert cache[1][0, 0, :, 1].tolist() == [0, 0, 2, 2]
