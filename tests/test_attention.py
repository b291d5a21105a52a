"""attention, varlen_attention and scaled_dot_product_attention: every option with every other, on every backend."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import NAMES, check, gradients, options, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import dispatch, reference
from seqfuse.benchmarks.harness import Contender, peak_memory
from seqfuse.ops import attention, library, scaled_dot_product_attention, varlen_attention
from seqfuse.reference import AttentionOptions, dropout_keep
from seqfuse.testing import assert_accurate

NO_CPU = pytest.mark.skipif(not library.has_kernel("attention_fwd", "CPU"), reason="this build has no CPU kernel")
KERNELS = [pytest.param("cpu", marks=NO_CPU), "reference"]
BACKENDS = [*KERNELS, "torch"]
BEYOND_SDPA = {"softcap", "alibi_slopes", "dropout_p"}
ALONE = [(n,) for n in NAMES]
PAIRS = list(itertools.combinations(NAMES, 2))


@NO_CPU
@pytest.mark.parametrize("names", [(), *ALONE, *PAIRS], ids="-".join)
def test_every_pair_of_options(names):
    check(*qkv(), *options(names), "cpu")


@pytest.mark.parametrize("names", [*ALONE, NAMES], ids="-".join)
def test_options_on_the_reference(names):
    check(*qkv(), *options(names), "reference")


@pytest.mark.parametrize("names", [n for n in ALONE + PAIRS if not BEYOND_SDPA & set(n)], ids="-".join)
def test_what_pytorch_can_express_runs_on_it(names):
    check(*qkv(), *options(names), "torch", lse=False)


@pytest.mark.parametrize("name", sorted(BEYOND_SDPA))
def test_what_pytorch_cannot_express_it_says(name):
    with seqfuse.backend("torch"), pytest.raises(RuntimeError, match="scaled_dot_product_attention (has|draws)"):
        attention(*qkv(), **options((name,))[0])


@st.composite
def random_sizes(draw):
    """Four heads of the batch or more, and so many rows that 64 of them see two keys under every option at once: of a
    few rows with a few keys, one in which almost all cancels may be most of the sums that the error rule compares."""
    B, Hkv, group = draw(st.sampled_from([n for n in itertools.product((1, 2, 3), repeat=3) if math.prod(n) >= 4]))
    least = max(8, -(-160 // (B * Hkv * group)))
    lengths = {name: draw(st.integers(least, most)) for name, most in (("Tq", 80), ("Tk", 140))}
    return dict(B=B, Hq=Hkv * group, Hkv=Hkv, D=draw(st.integers(8, 70)), Dv=draw(st.integers(8, 70)), **lengths)


def random_options(names, sizes):
    """`options`, with key_lengths that leave half the keys, and half the queries a key within any window."""
    keywords, fields = options(names, sizes)
    if "key_lengths" in names:
        Tq, Tk = sizes["Tq"], sizes["Tk"]
        lengths = torch.randint(Tk - min(Tq, Tk) // 2, Tk + 1, (sizes["B"],))
        keywords["key_lengths"] = fields["key_lengths"] = lengths
    return keywords, fields


@NO_CPU
@settings(max_examples=20)
@given(
    sizes=random_sizes(),
    names=st.sets(st.sampled_from(NAMES)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_random_configurations(sizes, names, dtype, seed):
    torch.manual_seed(seed)
    check(*qkv(**sizes, dtype=dtype), *random_options(names, sizes), "cpu")


@NO_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [1, 80, 256])
def test_head_dimensions(D, dtype):
    check(*qkv(D=D, Dv=D, Tq=40, Tk=50, dtype=dtype), {"causal": True}, {"window_right": 0, "scale": D**-0.5}, "cpu")


@NO_CPU
def test_wide_heads_have_a_forward_and_say_where_gradients_come_from():
    q, k, v = qkv(D=512, Dv=512)
    exact = attention(*(t.double() for t in (q, k, v)), causal=True)
    with seqfuse.backend("cpu"):
        assert_accurate(attention(q, k, v, causal=True), exact, dims=(0, 1, 2))
        with pytest.raises(RuntimeError, match="head dimensions up to 256 with gradients"):
            attention(q.requires_grad_(), k, v)
    attention(q, k, v, causal=True, softcap=2.0).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=["fp16", "fp64"])
def test_dtypes_without_a_kernel_here(dtype):
    check(*qkv(dtype=dtype), *options(("causal", "softcap")), "auto")
    check(*qkv(dtype=dtype), *options(("causal",)), "auto", lse=False)


@NO_CPU
def test_any_strides():
    q, k, v = qkv(Tk=9)
    with seqfuse.backend("cpu"):
        plain = attention(q, k, v, causal=True)
        inside = attention(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), causal=True)
        sparse = attention(*(torch.stack([t, t], -1)[..., 0] for t in (q, k, v)), causal=True)
        expanded = attention(q, k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1))
        one_head = attention(q, k[:, :1], v[:, :1])
    assert inside.transpose(1, 2).is_contiguous()
    assert torch.equal(plain, inside) and torch.equal(plain, sparse) and torch.equal(expanded, one_head)


@NO_CPU
def test_deterministic_repeats_its_bits():
    tensors, grads = qkv(Tq=200, Tk=200), [torch.randn(2, 4, 200, 8)]

    def run():
        return gradients(lambda q, k, v: (attention(q, k, v, causal=True, deterministic=True),), tensors, grads)

    with seqfuse.backend("cpu"):
        assert all(map(torch.equal, run(), run()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("empty", [{"B": 0}, {"Tq": 0}, {"Tk": 0}])
def test_empty(backend, empty):
    q, k, v = (t.requires_grad_() for t in qkv(**empty))
    with seqfuse.backend(backend):
        out, lse = attention(q, k, v, causal=True, return_lse=True)
    out.sum().backward()
    assert out.shape == (*q.shape[:3], 8) and (out == 0).all() and (lse == -torch.inf).all()
    assert all((t.grad == 0).all() for t in (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_see_nothing_give_zero_and_no_gradient(backend):
    q, k, v = (t.requires_grad_() for t in qkv())
    with seqfuse.backend(backend):
        out = attention(q, k, v, key_lengths=torch.tensor([0, 13]))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert (out[0] == 0).all() and (out[1] != 0).all()
    assert all((g[0] == 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_rows(backend):
    q, k, v = qkv()
    q[0, 1, 3, 2] = float("nan")
    with seqfuse.backend(backend):
        rows = attention(q, k, v, causal=True).isnan().all(-1).nonzero().tolist()
    assert rows == [[0, 1, 3]]


def test_a_mask_over_keys_and_a_bias_that_broadcasts():
    q, k, v = qkv()
    bias = torch.randn(4, 1, 13, requires_grad=True)
    mask = torch.rand(2, 1, 1, 13) < 0.7
    out = attention(q, k, v, bias=bias, mask=mask)
    (got,) = torch.autograd.grad(out.sum(), bias)
    wide = bias.detach().double().expand(1, 4, 9, 13).clone().requires_grad_()
    exact = attention(q.double(), k.double(), v.double(), bias=wide, mask=mask)
    truth = torch.autograd.grad(exact.sum(), wide)[0].sum(2)[0, :, None]
    assert got.shape == bias.shape
    assert_accurate(out, exact)
    assert_accurate(got, truth, dims=(0,))


class TestDropout:
    """test_every_pair_of_options holds results and gradients under dropout against the reference's mask too."""

    @pytest.mark.parametrize("backend", KERNELS)
    def test_mask_is_the_references_bit_by_bit(self, backend):
        """With q = 0 every weight is 1 / Tk, and with the unit matrix for v out is the mask."""
        q, k, v = torch.zeros(2, 4, 33, 8), torch.randn(2, 2, 70, 8), torch.eye(70).expand(2, 2, 70, 70)
        torch.manual_seed(5)
        with seqfuse.backend(backend):
            out = attention(q, k, v, dropout_p=0.4)
        torch.manual_seed(5)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        index = torch.meshgrid(*(torch.arange(n) for n in (2, 4, 33, 70)), indexing="ij")
        kept = dropout_keep(seed, *index, 0.4)
        assert torch.equal(out != 0, kept) and 0.57 < kept.float().mean() < 0.63
        assert_accurate(out, kept / (70 * 0.6))

    def test_follows_the_generator_and_p_of_one_drops_all(self):
        q, k, v = (t.requires_grad_() for t in qkv())
        torch.manual_seed(1)
        first = attention(q, k, v, dropout_p=0.5)
        assert not torch.equal(first, attention(q, k, v, dropout_p=0.5))
        torch.manual_seed(1)
        assert torch.equal(first, attention(q, k, v, dropout_p=0.5))
        out, lse = attention(q, k, v, dropout_p=1.0, return_lse=True)
        assert (out == 0).all() and lse.isfinite().all()
        assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


class TestVarlen:
    STARTS = {"an empty sequence": ([0, 4, 4, 9], [0, 5, 6, 12]), "one": ([0, 9], [0, 12]),
              "no keys": ([0, 5, 9], [0, 0, 12]), "rows behind the last": ([0, 2, 7], [0, 4, 10])}  # fmt: skip

    @pytest.mark.parametrize("names", [(), ("causal",), ("window", "softcap"), ("alibi_slopes",), ("dropout_p",)],
                             ids="-".join)  # fmt: skip
    @pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
    @pytest.mark.parametrize("backend", KERNELS)
    def test_equals_the_padded_loop(self, backend, starts, names):
        """Outputs and gradients, one sequence after another through `attention`, in float64."""
        tensors = torch.randn(9, 4, 8), torch.randn(12, 2, 8), torch.randn(12, 2, 6)
        grads = [torch.randn(9, 4, 6)]
        S = len(starts[0]) - 1
        keywords, fields = options(names, dict(B=S, Hq=4, Tq=9, Tk=12, D=8))
        cu = torch.tensor(starts[0], dtype=torch.int32), torch.tensor(starts[1], dtype=torch.int64)

        def packed(q, k, v):
            torch.manual_seed(3)
            out, lse = varlen_attention(q, k, v, *cu, max_seqlen_q=torch.tensor(5), return_lse=True, **keywords)
            assert lse.shape == (4, 9)
            return (out,)

        def loop(q, k, v):
            out = [q.new_zeros(0, 4, 6)]
            for s, ((a, b), (c, d)) in enumerate(zip(*map(itertools.pairwise, starts), strict=True)):
                o = AttentionOptions(**fields)
                if o.alibi_slopes is not None:
                    o = o._replace(alibi_slopes=o.alibi_slopes[s])
                if o.dropout_p:  # the mask counts sequences as a batch does: as many before this one, all hidden
                    o = o._replace(seed=seed, key_lengths=torch.tensor([0] * s + [d - c]))
                one = [t.transpose(0, 1)[None].expand(s + 1, -1, -1, -1) for t in (q[a:b], k[c:d], v[c:d])]
                out.append(reference.attention(*one, o)[0][s].transpose(0, 1))
            return (torch.cat([*out, q.new_zeros(9 - starts[0][-1], 4, 6)]),)

        torch.manual_seed(3)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        with seqfuse.backend(backend):
            got = gradients(packed, tensors, grads)
        truth = gradients(loop, [t.double() for t in tensors], grads)
        theirs = gradients(loop, tensors, grads)
        for name, a, b, c in zip(("out", "dq", "dk", "dv"), got, truth, theirs, strict=True):
            assert_accurate(a, b, c, dims=(0, 1), what=name)
        assert (got[0][starts[0][-1] :] == 0).all()

    def test_pytorch_says_that_it_takes_none(self):
        with seqfuse.backend("torch"), pytest.raises(RuntimeError, match="takes no packed sequences"):
            varlen_attention(*(torch.randn(4, 2, 8) for _ in range(3)), torch.tensor([0, 4]), torch.tensor([0, 4]))


class TestSdpa:
    SHAPES = {
        "2-D": ((5, 8), (7, 8), (7, 6), (5, 7)),
        "3-D": ((3, 5, 8), (3, 7, 8), (3, 7, 6), (3, 5, 7)),
        "4-D": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (2, 1, 5, 7)),
        "broadcast": ((2, 3, 5, 8), (1, 3, 7, 8), (2, 1, 7, 6), (5, 7)),
        "5-D": ((2, 2, 3, 5, 8), (2, 2, 3, 7, 8), (2, 2, 3, 7, 6), (2, 1, 3, 5, 7)),
        "keys only": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 6), (2, 1, 1, 7)),
    }

    @pytest.mark.parametrize("kind", ["plain", "causal", "bool", "float", "scale"])
    @pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
    def test_is_torchs(self, shapes, kind):
        q, k, v, mask = (torch.randn(s) for s in shapes)
        call = {"causal": {"is_causal": True}, "scale": {"scale": 0.3}, "bool": {"attn_mask": mask > -0.5}}.get(
            kind, {}
        )
        tensors = [q, k, v, mask] if kind == "float" else [q, k, v]
        shape = F.scaled_dot_product_attention(q, k, v).shape
        dy = [torch.randn(shape)]
        got = gradients(lambda *t: (scaled_dot_product_attention(*t, **call),), tensors, dy)
        wide = [t.double() for t in tensors], [dy[0].double()]
        truth = gradients(lambda *t: (F.scaled_dot_product_attention(*t, **call),), *wide)
        theirs = gradients(lambda *t: (F.scaled_dot_product_attention(*t, **call),), tensors, dy)
        for a, b, c in zip(got, truth, theirs, strict=True):
            assert_accurate(a, b, c)

    def test_grouped_queries(self):
        q, k, v = qkv(Tk=9)
        expected = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), is_causal=True, enable_gqa=True)
        assert_accurate(scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), expected)
        with pytest.raises(ValueError, match="must broadcast"):
            scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_sdpas(backend):
    """The inputs are rounded to bfloat16 and nothing else is; gradients come back in float32."""
    tensors, grads = qkv(), [torch.randn(2, 4, 9, 8).bfloat16()]

    def under_autocast(*t):
        with torch.autocast("cpu", torch.bfloat16):
            out = attention(*t, causal=True)
        assert out.dtype == torch.bfloat16
        return (out,)

    with seqfuse.backend(backend):
        got = gradients(under_autocast, tensors, grads)
    rounded = [t.bfloat16() for t in tensors]
    truth = gradients(lambda *t: (attention(*t, causal=True),), [t.double() for t in rounded], grads)
    theirs = gradients(lambda *t: (attention(*t, causal=True),), rounded, grads)
    for a, b, c in zip(got, truth, theirs, strict=True):
        assert_accurate(a, b, c, dims=(0, 1, 2), dtype=torch.bfloat16)
    assert [t.dtype for t in got[1:]] == [torch.float32] * 3


@pytest.mark.parametrize("names", [("causal", "softcap"), ("bias", "dropout_p"), ("mask", "alibi_slopes")],
                         ids="-".join)  # fmt: skip
def test_double_backward(names):
    keywords, _ = options(names)
    tensors = [*qkv(), *([keywords.pop("bias")] if "bias" in keywords else [])]

    def second(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors]
        torch.manual_seed(1)
        out = attention(*leaves[:3], bias=leaves[3] if len(leaves) > 3 else None, **keywords)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with seqfuse.backend("reference"):
        truth, theirs = second(torch.float64), second(torch.float32)
    for a, b, c in zip(second(torch.float32), truth, theirs, strict=True):
        assert_accurate(a, b, c)


@NO_CPU
def test_memory_is_linear_at_32k():
    """Forward and backward. A float32 matrix of 32k x 32k would be 4 GiB for each head; what the kernel takes from
    malloc itself is in test_attention_cpu.py's measurement of the whole process."""

    def peak(T):
        q, k, v = (torch.randn(1, 1, T, 16, requires_grad=True) for _ in range(3))
        keys, slopes = torch.tensor([T - 5]), torch.ones(1)

        def call(_):
            out = attention(q, k, v, window=(256, 256), softcap=9.0, alibi_slopes=slopes, key_lengths=keys)
            return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

        with seqfuse.backend("cpu"):
            return peak_memory(Contender("ours", call), "cpu") / (q.numel() * q.element_size())

    tensors = peak(32768)  # in units of one input
    assert tensors < 8 and tensors < 1.05 * peak(8192)


@NO_CPU
def test_explain_of_a_choice():
    choices = []
    with dispatch.listening(lambda choice, case: choices.append((choice, case))):
        attention(*qkv(), causal=True, softcap=1.0)
        attention(*qkv(dtype=torch.float16), causal=True)
    (first, case), (second, _) = choices
    assert case.options == ("causal", "softcap") and "float32" in case.shape_class()
    assert (first.backend, first.refused) == ("cpu", ()) and "flash on the CPU" in first.reason
    assert second.backend == "torch" and "SDPA with a mask of Tq x Tk" in second.reason
    refused = dict(second.refused)
    assert refused.keys() == {"cpu", "cuda", "triton"}
    assert refused["cpu"] == "the CPU kernels take float32 and bfloat16, not float16"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_backend_asked_for_by_name_says_why_it_cannot(name):
    if torch.cuda.is_available() or library.interpreting():
        pytest.skip("it can")
    with seqfuse.backend(name), pytest.raises(RuntimeError, match="no CUDA device is available|Triton is not"):
        attention(*qkv())


Q, K, V = qkv()


def packed(starts_q, starts_k):
    tensors = (t[0].transpose(0, 1) for t in (Q, K, V))
    return varlen_attention(*tensors, torch.tensor(starts_q), torch.tensor(starts_k))


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: attention([1], K, V), TypeError, "q must be a tensor"),
        (lambda: attention(Q[0], K, V), ValueError, "q must be 4-D"),
        (lambda: attention(Q.long(), K, V), TypeError, "q must be a floating-point tensor"),
        (lambda: attention(Q, K.double(), V), ValueError, "k is float64, but q is float32"),
        (lambda: attention(Q, K, V.to("meta")), ValueError, "v is on meta"),
        (lambda: attention(Q, K[:1], V), ValueError, "k must have q's batch of 2"),
        (lambda: attention(Q, K, V[:, :, :5]), ValueError, "v must have k's shape"),
        (lambda: attention(Q, K[..., :4], V), ValueError, "k must have q's last dimension 8"),
        (lambda: attention(Q[:, :3], K, V), ValueError, "multiple of those of k, got 3 and 2"),
        (lambda: attention(Q[..., :0], K[..., :0], V), ValueError, "at least 1"),
        (lambda: attention(Q, K, V, window=3), ValueError, "window must be (left, right)"),
        (lambda: attention(Q, K, V, window=(-2, 0)), ValueError, "window must be (left, right)"),
        (lambda: attention(Q, K, V, softcap=-1.0), ValueError, "softcap must be above 0"),
        (lambda: attention(Q, K, V, scale=float("nan")), ValueError, "scale must be finite"),
        (lambda: attention(Q, K, V, scale="1"), TypeError, "scale must be a number"),
        (lambda: attention(Q, K, V, dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1"),
        (lambda: attention(Q, K, V, bias=torch.randn(9, 12)), ValueError, "bias must broadcast to [2, 4, 9, 13]"),
        (lambda: attention(Q, K, V, bias=torch.randn(9, 13).double()), ValueError, "dtype float32 or float32, got"),
        (lambda: attention(Q, K, V, mask=torch.randn(9, 13)), TypeError, "mask must be bool"),
        (lambda: attention(Q, K, V, mask=torch.ones(3, 4, 9, 13).bool()), ValueError, "mask must broadcast"),
        (lambda: attention(Q, K, V, key_lengths=torch.ones(2)), TypeError, "key_lengths must be int32 or int64"),
        (lambda: attention(Q, K, V, key_lengths=torch.ones(3).long()), ValueError, "key_lengths must have shape [2]"),
        (lambda: attention(Q, K, V, alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes must have shape [4] or"),
        (lambda: attention(Q, K, V, alibi_slopes=torch.ones(4).requires_grad_()), ValueError, "get no gradient"),
        (lambda: varlen_attention(Q, K, V, K, K), ValueError, "q must be 3-D"),
        (lambda: packed([0, 10], [0, 2]), ValueError, "cu_seqlens_q must grow from 0 to at most 9, the rows that"),
        (lambda: packed([0, 9], [0, 3, 2]), ValueError, "cu_seqlens_k must grow from 0"),
        (lambda: packed([1, 9], [0, 2]), ValueError, "cu_seqlens_q must grow from 0"),
        (lambda: packed([0, 9], [0, 1, 2]), ValueError, "as many sequences"),
        (lambda: packed([0.0, 9.0], [0, 2]), TypeError, "cu_seqlens_q must be int32 or int64"),
        (lambda: packed([[0, 9]], [0, 2]), ValueError, "cu_seqlens_q must be [sequences + 1]"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, Q[..., 0], is_causal=True), ValueError, "exclude each other"),
        (lambda: scaled_dot_product_attention(Q[0, 0, 0], Q, Q), ValueError, "at least 2 dimensions"),
        (lambda: scaled_dot_product_attention(Q, Q, Q, torch.randn(8, 8)), ValueError, "attn_mask must broadcast"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)


def told(call):
    """(result, the backends that the dispatcher's listeners hear of)"""
    heard = []
    dispatch.add_listener(record := lambda choice, case: heard.append(choice.backend))
    try:
        return call(), heard
    finally:
        dispatch._listeners.remove(record)


@NO_CPU
def test_a_small_call_that_is_known_goes_straight_to_pytorch(monkeypatch):
    """... with the same result, also where the door is shut, because somebody listens who hears of it; anything that is
    different is looked at again."""
    q, k, v = qkv(Tq=9, Tk=9)
    calls = [
        lambda q, k, v, **more: attention(q, k, v, causal=True, **more),
        lambda q, k, v, **more: attention(q, k, v, **more),
        lambda q, k, v, **more: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, **more),
    ]
    selected = []
    asked = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *a: selected.append(a) or asked(*a))
    for call in calls:
        expected, _ = told(lambda call=call: call(q, k, v))
        selected.clear()
        again, heard = told(lambda call=call: call(q, k, v))
        assert torch.equal(again, expected) and heard == ["torch"] and not selected
        assert_accurate(again, call(q.double(), k.double(), v.double()))
        with seqfuse.backend("cpu"):
            assert told(lambda call=call: call(q, k, v))[1] == ["cpu"]
        wants = q.detach().requires_grad_()
        call(wants, k, v, scale=0.1).sum().backward()
        assert wants.grad.abs().sum() > 0
        with pytest.raises(ValueError, match="is float64"):
            call(q, k.double(), v)
    with seqfuse.backend("auto"), torch.autocast("cpu", torch.bfloat16):
        assert calls[0](q, k, v).dtype == torch.bfloat16


@NO_CPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_call_that_is_known_goes_straight_to_our_kernels(monkeypatch, dtype):
    """... with the same bits and gradients; another shape, dtype or wish for gradients is looked at again."""
    q, k, v = (t.to(dtype) for t in qkv(Tq=9, Tk=9))
    selected = []
    asked = dispatch.select
    monkeypatch.setattr(dispatch, "select", lambda *a: selected.append(a) or asked(*a))

    def results(leaves):
        out = attention(*leaves, causal=True)
        return [out, *torch.autograd.grad(out.sum(), leaves)] if leaves[0].requires_grad else [out]

    with seqfuse.backend("cpu"):
        for grad in (False, True):
            leaves = [t.detach().requires_grad_(grad) for t in (q, k, v)]
            selected.clear()
            first = results(leaves)
            assert selected
            selected.clear()
            again, heard = told(lambda leaves=leaves: results(leaves))
            assert heard == ["cpu"] and not selected
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        fewer = told(lambda: attention(q[:, :, 4:], k, v, causal=True))
        assert fewer[1] == ["cpu"] and len(selected) == 1
        assert torch.equal(fewer[0], attention(q, k, v, causal=True)[:, :, 4:])  # bottom-right: the last five queries
        with pytest.raises(ValueError, match="k is float64"):
            attention(q, k.double(), v, causal=True)


@NO_CPU
def test_causal_calls_with_fewer_queries_are_not_taken_for_pytorchs():
    """Its is_causal is top-left: PyTorch's op needs a mask there, each time."""
    q, k, v = qkv(Tq=3, Tk=9)
    for _ in range(2):
        got, heard = told(lambda: attention(q, k, v, causal=True))
        assert heard == ["torch"]
        assert_accurate(got, attention(*(t.double() for t in (q, k, v)), causal=True))


@pytest.mark.parametrize("lengths", [[-1, 3], [8, 3]])
def test_key_lengths_that_no_keys_are_for(lengths):
    x = torch.randn(2, 2, 7, 8)
    with pytest.raises(ValueError, match="key_lengths must lie between 0 and 7, the keys that there are, got"):
        seqfuse.ops.attention(x, x, x, key_lengths=torch.tensor(lengths))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
def test_keys_that_do_not_exist_may_hold_anything(backend):
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 7, 7))
    with seqfuse.backend(backend):
        wanted = seqfuse.ops.attention(q, k[:, :, :5], v[:, :, :5])
        k[:, :, 5:], v[:, :, 5:] = float("nan"), float("inf")
        got = seqfuse.ops.attention(q, k, v, key_lengths=torch.tensor([5]))
    torch.testing.assert_close(got, wanted)
