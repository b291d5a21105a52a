"""attention_with_kv_cache: caches that grow in place, against dense attention over what each sequence then has."""

import pytest
import torch
from attention_inputs import in_pages

import seqfuse
from seqfuse import dispatch
from seqfuse.ops import attention, attention_with_kv_cache, library
from seqfuse.testing import assert_accurate

NO_CPU = pytest.mark.skipif(not library.has_kernel("attention_decode", "CPU"), reason="this build has no CPU kernel")
KERNELS = [pytest.param("cpu", marks=NO_CPU), "reference"]
BACKENDS = [*KERNELS, "torch"]
LENGTHS = [0, 7, 33]
ROOM = 40
OPTIONS = {
    "plain": {},
    "not causal": {"causal": False},
    "window": {"window": (5, 0)},
    "window both ways": {"window": (9, 1), "causal": False},
    "softcap": {"softcap": 2.0},
    "ALiBi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])},
    "ALiBi of each": {"alibi_slopes": torch.rand(3, 4, generator=torch.Generator().manual_seed(1))},
    "all": {"window": (9, 0), "softcap": 2.0, "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.1]), "scale": 0.3},
}


def inputs(Tn=1, dtype=torch.float32, B=3, Hq=4, Hkv=2, D=24, Dv=16):
    """q, the whole sequences' k and v, and LENGTHS."""
    shapes = (B, Hq, Tn, D), (B, Hkv, ROOM, D), (B, Hkv, ROOM, Dv)
    return *(torch.randn(s).to(dtype) for s in shapes), torch.tensor(LENGTHS)


def part(t, lengths, Tn):
    """The Tn keys that each sequence gets now."""
    return torch.stack([t[b, :, n : n + Tn] for b, n in enumerate(lengths.tolist())])


def filled(t, lengths):
    """A cache that holds each sequence's first keys, and NaN as far as it is empty."""
    cache = torch.full_like(t, torch.nan)
    for b, n in enumerate(lengths.tolist()):
        cache[b, :, :n] = t[b, :, :n]
    return cache


def dense(q, k, v, lengths, dtype, **keywords):
    """(out, lse) of `attention` over each sequence's own keys, one after another, in `dtype`."""
    slopes = keywords.pop("alibi_slopes", None)
    results = []
    with seqfuse.backend("reference"):
        for b, n in enumerate(lengths.tolist()):
            own = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
            one = (q[b : b + 1], k[b : b + 1, :, :n], v[b : b + 1, :, :n])
            results.append(
                attention(
                    *(t.to(dtype) for t in one), alibi_slopes=own, return_lse=True, **{"causal": True, **keywords}
                )
            )
    return [torch.cat(r) for r in zip(*results, strict=True)]


def check(backend, Tn, keywords, dtype=torch.float32, page=None, lse=True):
    q, k, v, lengths = inputs(Tn, dtype)
    caches = [filled(t, lengths) for t in (k, v)]
    expected = [filled(t, lengths + Tn) for t in (k, v)]
    new, table = [part(t, lengths, Tn) for t in (k, v)], None
    if page:
        caches, table = in_pages(caches, page)
    with seqfuse.backend(backend):
        got = attention_with_kv_cache(
            q, *caches, *new, cache_lengths=lengths, block_table=table, return_lse=lse, **keywords
        )
    exact, theirs = (dense(q, k, v, lengths + Tn, d, **keywords) for d in (torch.float64, dtype))
    for name, a, b, c in zip(("out", "lse"), got if lse else [got], exact, theirs, strict=False):
        assert_accurate(a, b, c, dims=(0, 1, 2), what=name, dtype=dtype)
    for cache, want in zip(caches, expected, strict=True):  # appended in place, and nothing else was touched
        held = cache if table is None else cache[table].transpose(1, 2).flatten(2, 3)[:, :, :ROOM]
        assert torch.equal(held.nan_to_num(9.0), want.nan_to_num(9.0))
    assert lengths.tolist() == LENGTHS


@pytest.mark.parametrize("Tn", [1, 4])
@pytest.mark.parametrize("keywords", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_options(backend, keywords, Tn):
    check(backend, Tn, keywords)


@pytest.mark.parametrize("page", [None, 1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", KERNELS)
def test_pages_and_dtypes(backend, dtype, page):
    check(backend, 3, OPTIONS["all"], dtype, page)


@pytest.mark.parametrize("page", [None, 16])
@pytest.mark.parametrize("name", ["plain", "not causal", "window"])
def test_on_pytorchs_own_op(name, page):
    check("torch", 4, OPTIONS[name], page=page, lse=False)


@pytest.mark.parametrize("name", ["softcap", "ALiBi"])
def test_what_pytorch_cannot_express_it_says(name):
    with pytest.raises(RuntimeError, match=f"scaled_dot_product_attention has no {name}"):
        check("torch", 1, OPTIONS[name], lse=False)


def test_dtypes_without_a_kernel_here():
    check("auto", 2, {}, torch.float16, page=16, lse=False)
    check("auto", 2, {"softcap": 2.0}, torch.float64)


@pytest.mark.parametrize("page", [None, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_decoding_step_by_step_is_one_causal_call(backend, page):
    """A prompt of 6 tokens at once, then one token after another, from an empty cache."""
    q, k, v = (torch.randn(2, h, 21, 16) for h in (4, 2, 2))
    caches, table = [torch.full((2, 2, 24, 16), torch.nan) for _ in range(2)], None
    if page:
        caches, table = in_pages(caches, page)
    lengths, steps = torch.zeros(2, dtype=torch.int32), []
    for a, b in [(0, 6), *((i, i + 1) for i in range(6, 21))]:
        now = [t[:, :, a:b] for t in (q, k, v)]
        with seqfuse.backend(backend):
            steps.append(attention_with_kv_cache(now[0], *caches, *now[1:], cache_lengths=lengths, block_table=table))
        lengths = lengths + (b - a)
    with seqfuse.backend("reference"):
        exact = attention(*(t.double() for t in (q, k, v)), causal=True)
    assert_accurate(torch.cat(steps, 2), exact, attention(q, k, v, causal=True), dims=(0, 1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_new_keys_it_only_reads(backend):
    q, k, v, lengths = inputs(2)
    before = filled(k, lengths), filled(v, lengths)
    caches = [t.clone() for t in before]
    with seqfuse.backend(backend):
        out = attention_with_kv_cache(q, *caches, cache_lengths=lengths)
    assert (out[0] == 0).all()  # the first sequence has no key yet
    exact, theirs = (dense(q, k, v, lengths, d)[0] for d in (torch.float64, torch.float32))
    assert_accurate(out, exact, theirs, dims=(0, 1, 2))
    assert all(torch.equal(a.nan_to_num(9.0), b.nan_to_num(9.0)) for a, b in zip(caches, before, strict=True))


def test_a_call_that_is_known_is_not_checked_again_but_for_its_numbers(monkeypatch):
    q, k, v, lengths = inputs(2)
    caches = filled(k, lengths), filled(v, lengths)
    selected = []
    asked = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *a: selected.append(a) or asked(*a))
    first = attention_with_kv_cache(q, *caches, cache_lengths=lengths)
    selected.clear()
    assert torch.equal(attention_with_kv_cache(q, *caches, cache_lengths=lengths), first) and not selected
    with seqfuse.backend("reference"):
        attention_with_kv_cache(q, *caches, cache_lengths=lengths)
    assert len(selected) == 1
    with pytest.raises(ValueError, match="cache_lengths must be at least 0"):
        attention_with_kv_cache(q, *caches, cache_lengths=lengths - 100)
    with pytest.raises(ValueError, match="v_cache is float64"):
        attention_with_kv_cache(q, caches[0], caches[1].double(), cache_lengths=lengths)
    with pytest.raises(ValueError, match="has no gradient"):
        attention_with_kv_cache(q.requires_grad_(), *caches, cache_lengths=lengths)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_page_that_two_sequences_share(backend):
    """A common prompt lies in one page that both tables name."""
    pages = [torch.randn(3, 2, 8, w) for w in (24, 16)]
    table, lengths = torch.tensor([[2, 0], [2, 1]]), torch.tensor([11, 13])
    q = torch.randn(2, 4, 1, 24)
    with seqfuse.backend(backend):
        out = attention_with_kv_cache(q, *pages, cache_lengths=lengths, block_table=table)
    k, v = (p[table].transpose(1, 2).flatten(2, 3) for p in pages)
    assert_accurate(out, dense(q, k, v, lengths, torch.float64)[0], dims=(0, 1, 2))


Q, K, V, N = inputs(2)
NEW = K[:, :, :2], V[:, :, :2]
TABLE = torch.arange(3)[:, None]


@pytest.mark.parametrize(
    "args,given,error,text",
    [
        ((Q, K, V, NEW[0]), {}, ValueError, "k and v must be given both or neither, got k alone"),
        ((Q, K, V, None, NEW[1]), {}, ValueError, "k and v must be given both or neither, got v alone"),
        ((Q, K.double(), V), {}, ValueError, "k_cache is float64, but q is float32"),
        ((Q, K[:2], V), {}, ValueError, "k_cache must have q's batch of 3"),
        ((Q, K[..., :8], V), {}, ValueError, "k_cache must have q's last dimension 24"),
        ((Q[:, :3], K, V), {}, ValueError, "the heads of q must be a multiple of those of k_cache, got 3 and 2"),
        ((Q, K, V, NEW[0].double(), NEW[1]), {}, ValueError, "k is float64, but k_cache is float32"),
        ((Q, K, V, NEW[0], V[:, :, :3]), {}, ValueError, "v must have shape [3, 2, 2, 16]"),
        ((Q, K, V), {"cache_lengths": N.float()}, TypeError, "cache_lengths must be int32 or int64"),
        ((Q, K, V), {"cache_lengths": N[:2]}, ValueError, "cache_lengths must have shape [3]"),
        ((Q, K, V), {"cache_lengths": torch.tensor([0, 0, -1])}, ValueError, "cache_lengths must be at least 0"),
        ((Q, K, V, *NEW), {"cache_lengths": torch.tensor([0, 7, 39])}, ValueError, "room for 2 new keys in a cache of"),
        ((Q, K, V), {"block_table": N}, ValueError, "block_table must be [B, pages of each sequence]"),
        ((Q, K, V), {"block_table": TABLE[:2]}, ValueError, "block_table must have shape [3, 1]"),
        ((Q, K, V, *NEW), {"block_table": TABLE + 1}, ValueError, "block_table must name pages 0 to 2"),
        ((Q, K, V, *NEW), {"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ((Q, K, V, *NEW), {"window": 3}, ValueError, "window must be (left, right)"),
        ((Q, K, V, *NEW), {"alibi_slopes": torch.ones(2)}, ValueError, "alibi_slopes must have shape [4] or [3, 4]"),
        ((Q.clone().requires_grad_(), K, V, *NEW), {}, ValueError, "it has no gradient"),
    ],
)  # fmt: skip
def test_bad_input_gets_one_sentence_before_anything_is_written(args, given, error, text):
    before = [t.clone() for t in args[1:3]]
    with pytest.raises(error) as caught:
        attention_with_kv_cache(*args, **{"cache_lengths": N, **given})
    assert text in str(caught.value) and "\n" not in str(caught.value)
    assert all(map(torch.equal, args[1:3], before))


@pytest.mark.parametrize("way", ["door", "auto", "cpu", "reference"])
def test_autograd_hears_of_what_is_written(way):
    cache, new = torch.zeros(1, 2, 8, 16), torch.randn(1, 2, 1, 16)
    saved = torch.ones(1, requires_grad=True) * cache
    known = dict(cache_lengths=torch.zeros(1, dtype=torch.int64), scale=0.1 if way == "door" else None)
    with torch.no_grad(), seqfuse.backend("auto" if way == "door" else way):
        for _ in range(3 if way == "door" else 1):  # the door opens with the first call
            before = cache._version
            seqfuse.ops.attention_with_kv_cache(torch.randn(1, 2, 1, 16), cache, cache.clone(), new, new, **known)
            assert cache._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with torch.inference_mode():
        inside = torch.zeros(1, 2, 8, 16)
    with torch.no_grad():
        seqfuse.ops.attention_with_kv_cache(torch.randn(1, 2, 1, 16), inside, inside.clone(), new, new, **known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_entry_of_the_table_that_nobody_needs_may_be_any_number(dtype):
    cache, q = torch.zeros(4, 1, 4, 8, dtype=dtype), torch.ones(1, 1, 1, 8, dtype=dtype)
    outs = []
    for unused in (-1, 1_000_000, 0):
        table = torch.tensor([[2, unused]])
        known = dict(cache_lengths=torch.tensor([1]), block_table=table)
        outs.append(attention_with_kv_cache(q, cache.clone(), cache.clone(), q, q, **known))
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[2])
