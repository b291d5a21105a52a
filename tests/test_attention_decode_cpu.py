"""Decoding on the CPU: attention over a cache, dense or in pages, and appending to it, through the registered ops."""

import pytest
import torch
from attention_inputs import in_pages
from hypothesis import given, settings
from hypothesis import strategies as st

from seqfuse import native
from seqfuse.ops import attention_op  # noqa: F401 (registers the fakes)
from seqfuse.reference import AttentionOptions, attention_decode
from seqfuse.testing import assert_accurate

if native.missing():
    pytest.skip(native.missing(), allow_module_level=True)

decode, append = torch.ops.seqfuse.attention_decode, torch.ops.seqfuse.kv_cache_append
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = ("slopes", "slopes_of_each", "left", "right", "softcap", "negative_scale")


def cache(B=3, Hq=4, Hkv=2, Tq=1, T=150, D=40, Dv=24, dtype=torch.float32):
    """q, k_cache, v_cache."""
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in ((B, Hq, Tq, D), (B, Hkv, T, D), (B, Hkv, T, Dv))]


def make_options(names, B, Hq):
    """alibi_slopes, scale, window_left, window_right, softcap."""
    slopes = torch.rand(Hq) * 0.1 if "slopes" in names else None
    slopes = torch.rand(B, Hq) * 0.1 if "slopes_of_each" in names else slopes
    scale = -0.2 if "negative_scale" in names else 0.2
    return slopes, scale, 37 if "left" in names else -1, 0 if "right" in names else -1, 3.0 * ("softcap" in names)


def check(q, k, v, lengths, options, page=None):
    exact = attention_decode(q.double(), k.double(), v.double(), lengths, None, *options)
    theirs = attention_decode(q, k, v, lengths, None, *options)
    for b, n in enumerate(lengths.tolist()):  # what lies behind is not read
        k[b, :, max(n, 0) :], v[b, :, max(n, 0) :] = torch.nan, torch.nan
    if page:
        (k, v), table = in_pages((k, v), page)
        got = decode(q, k, v, lengths, table.int(), *options)
    else:
        got = decode(q, k, v, lengths, None, *options)
    for name, a, b, c in zip(("out", "lse"), got, exact, theirs, strict=True):
        assert_accurate(a, b, c, dims=(0, 1, 2), what=name)


@pytest.mark.parametrize("page", [None, 16, 7])
@pytest.mark.parametrize("names", [(), *((n,) for n in OPTIONS), OPTIONS], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_options(isa, dtype, names, page):
    check(*cache(dtype=dtype), torch.tensor([150, 1, 97]), make_options(names, 3, 4), page)


@pytest.mark.parametrize("Tq", [2, 5])
@pytest.mark.parametrize("page", [None, 32])
def test_several_queries(isa, Tq, page):
    """The first ones of a sequence shorter than Tq stand before its first key."""
    check(*cache(Tq=Tq), torch.tensor([150, 3, 0]), make_options(("right",), 3, 4), page)


SIZES = [  # B, Hq, Hkv, Tq, T, D, Dv
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 1, 5, 7, 9),
    (1, 8, 1, 1, 700, 64, 64),
    (1, 6, 2, 3, 2000, 33, 130),
    (2, 2, 2, 1, 300, 256, 256),
    (1, 2, 1, 2, 100, 512, 512),
]


@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_sizes(isa, size, dtype):
    B, T = size[0], size[4]
    check(*cache(*size, dtype=dtype), torch.full((B,), T), make_options(("right",), B, size[1]))


@settings(max_examples=40)
@given(
    names=st.sets(st.sampled_from(OPTIONS)),
    B=st.integers(1, 4),
    Hkv=st.integers(1, 3),
    group=st.integers(1, 4),
    Tq=st.integers(1, 4),
    T=st.integers(1, 3000),
    D=st.integers(1, 70),
    Dv=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    page=st.sampled_from([None, 1, 16, 64, 100]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_random_configurations(names, B, Hkv, group, Tq, T, D, Dv, dtype, page, threads, seed):
    torch.manual_seed(seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors = cache(B, Hkv * group, Hkv, Tq, T, D, Dv, dtype)
        check(*tensors, torch.randint(0, T + 1, (B,)), make_options(names, B, Hkv * group), page)
    finally:
        torch.set_num_threads(before)


def test_a_long_cache_is_split_and_repeats_are_bit_identical(isa):
    tensors = cache(B=1, Hq=2, Hkv=1, T=20000, D=16, Dv=16)
    options = make_options(("right",), 1, 2)
    first = decode(*tensors, torch.tensor([20000]), None, *options)
    for _ in range(3):
        again = decode(*tensors, torch.tensor([20000]), None, *options)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check(*tensors, torch.tensor([20000]), options)


def test_decoding_is_the_dense_result(isa):
    q, k, v = cache(Tq=5)
    lengths = torch.tensor([150, 20, 77])
    out, lse = decode(q, k, v, lengths, None, None, 0.2, -1, 0, 0.0)
    options = AttentionOptions(scale=0.2, key_lengths=lengths, query_start=lengths - 5, window_right=0)
    dense, dense_lse = torch.ops.seqfuse.attention_fwd(q, k, v, *options)
    assert_accurate(out, dense.double(), dims=(0, 1, 2))
    assert_accurate(lse, dense_lse.double(), dims=(0, 1, 2))


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("page", [None, 16])
def test_append_and_decode(isa, page, heads_inside):
    """Token by token and several at once, the caches hold what was appended, and nothing else changes."""
    _, k, v = cache(B=2, T=64)
    lengths = torch.tensor([3, 40])
    caches = [torch.full_like(t, 7.0) for t in (k, v)]
    if heads_inside:
        caches = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in caches]
    table = None
    if page:
        caches, table = in_pages(caches, page)
    expected = [torch.full_like(t, 7.0) for t in (k, v)]
    for new in (1, 9, 1):
        pieces = [torch.stack([t[b, :, n : n + new] for b, n in enumerate(lengths.tolist())]) for t in (k, v)]
        append(*caches, *pieces, lengths, table)
        for b, n in enumerate(lengths.tolist()):
            for e, t in zip(expected, (k, v), strict=True):
                e[b, :, n : n + new] = t[b, :, n : n + new]
        lengths = lengths + new
    for got, want in zip(caches, expected, strict=True):
        dense = got if table is None else got[table].transpose(1, 2).flatten(2, 3)
        assert torch.equal(dense, want)
    with pytest.raises(RuntimeError, match="sequence 1 has 51 keys and gets 20 more, but its cache holds 64"):
        append(*caches, *(t[:, :, :20] for t in (k, v)), lengths, table)


@pytest.mark.parametrize("page", [None, 16])
def test_opcheck(page):
    q, k, v = cache(B=2, T=32)
    table = None
    if page:
        (k, v), table = in_pages((k, v), page)
    lengths = torch.tensor([30, 7])
    torch.library.opcheck(decode.default, (q, k, v, lengths, table, torch.rand(4), 0.2, -1, 0, 0.0))
    new = [torch.randn(2, 2, 1, t.shape[3]) for t in (k, v)]
    torch.library.opcheck(append.default, (k, v, *new, lengths, table))


def test_nothing():
    q, k, v = cache(B=2, T=10)
    out, lse = decode(q, k, v, torch.tensor([0, 4]), None, None, 0.2, -1, -1, 0.0)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and out[1].isfinite().all()
    for empty in (q[:, :, :0], q[:0]):
        B = empty.shape[0]
        out, lse = decode(empty, k[:B], v[:B], torch.tensor([0, 4])[:B], None, None, 0.2, -1, -1, 0.0)
        assert out.shape == (*empty.shape[:3], 24) and lse.shape == empty.shape[:3]
    append(k[:0], v[:0], k[:0], v[:0], torch.zeros(0, dtype=torch.int64), None)


def test_bad_input_is_refused():
    q, k, v = cache()
    lengths, options = torch.tensor([1, 2, 3]), (None, 0.2, -1, 0, 0.0)
    cases = [
        ((q, k, v.bfloat16(), lengths, None), "v_cache must have the dtype of q"),
        ((q, k[:2], v[:2], lengths, None), "batch of q, or a block_table"),
        ((q, k, v, lengths[:2], None), "lengths must have 3 elements"),
        ((q, k, v, lengths.float(), None), "int32 or int64"),
        ((q, k, v, lengths, torch.zeros(2, 2, dtype=torch.int32)), "block_table must be"),
        ((q[..., :8], k, v, lengths, None), "one head dimension"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError, match=message):
            decode(*args, *options)
