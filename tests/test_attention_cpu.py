"""The CPU kernels of attention against the reference in float64, through the registered ops."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import rounding_of_delta
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from seqfuse import native
from seqfuse.ops import attention_op  # noqa: F401 (registers the fakes)
from seqfuse.reference import AttentionOptions, attention, dropout_keep
from seqfuse.reference.attention import Positions
from seqfuse.testing import assert_accurate

if native.missing():
    pytest.skip(native.missing(), allow_module_level=True)

fwd, bwd = torch.ops.seqfuse.attention_fwd, torch.ops.seqfuse.attention_bwd
DTYPES = [torch.float32, torch.bfloat16]
OPTIONS = ("causal", "window", "top_left", "softcap", "alibi", "bias", "mask", "key_lengths", "query_start", "dropout",
           "packed")  # fmt: skip
NOT_PACKED = {"bias", "mask", "key_lengths", "query_start"}
COMBINATIONS = [
    names
    for n in (0, 1, 2)
    for names in itertools.combinations(OPTIONS, n)
    if not ("packed" in names and NOT_PACKED & set(names))
]


def tensors(B=2, Hq=4, Hkv=2, Tq=67, Tk=141, D=20, Dv=36, dtype=torch.float32):
    """q, k, v and gradients of out and lse."""
    shapes = (B, Hq, Tq, D), (B, Hkv, Tk, D), (B, Hkv, Tk, Dv), (B, Hq, Tq, Dv)
    return [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes] + [torch.randn(B, Hq, Tq)]


def cuts(total, sequences):
    """Starts of packed sequences of random lengths, some of them empty, that need not fill the rows."""
    return torch.cat([torch.zeros(1), torch.randint(0, total + 1, (sequences,)).sort().values]).int()


def make_options(names, q, k, *, bias_shape=(True, True), bias_dtype=None, sequences=3):
    """Options of these names for q and k. bias_shape: whether the bias has the batch, and the heads."""
    (B, Hq, Tq, D), Tk = q.shape, k.shape[2]
    o = {"scale": D**-0.5}
    if "causal" in names:
        o["window_right"] = 0
    if "window" in names:
        o |= {"window_left": Tk // 3, "window_right": o.get("window_right", Tk // 5)}
    if "packed" in names:
        o |= {"cu_seqlens_q": cuts(Tq, sequences), "cu_seqlens_k": cuts(Tk, sequences)}
    if "alibi" in names:
        o["alibi_slopes"] = torch.rand(sequences if "packed" in names else B, Hq) * 0.1
    if "bias" in names:
        sizes = [n if wanted else 1 for n, wanted in zip((B, Hq), bias_shape, strict=True)]
        o["bias"] = torch.randn(*sizes, Tq, Tk).to(bias_dtype or q.dtype)
    if "mask" in names:
        o["mask"] = torch.rand(B, 1, Tq, Tk) < 0.6
    if "key_lengths" in names:
        o["key_lengths"] = torch.randint(0, Tk + 1, (B,))
    if "query_start" in names:
        o["query_start"] = torch.randint(-Tq, Tk, (B,)).int()
    if "dropout" in names:
        o |= {"dropout_p": 0.3, "seed": torch.tensor([0x123456789ABCDEF])}
    return AttentionOptions(top_left="top_left" in names, softcap=2.0 if "softcap" in names else 0.0, **o)


def by_reference(q, k, v, dout, dlse, options, dtype):
    """out, lse, dq, dk, dv and, with a bias, dbias: all computed in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    if options.bias is not None:
        wide = dtype if dtype == torch.float64 else options.bias.dtype
        leaves.append(options.bias.detach().to(wide).requires_grad_())
        options = options._replace(bias=leaves[-1])
    out, lse = attention(*leaves[:3], options)
    finite = torch.where(lse == -torch.inf, 0.0, lse)
    grads = torch.autograd.grad((out, finite), leaves, (dout.to(out.dtype), dlse.to(lse.dtype)))
    return [out, lse, *grads]


def by_kernel(q, k, v, dout, dlse, options):
    out, lse = fwd(q, k, v, *options)
    wanted = options.bias is not None
    dq, dk, dv, dbias = bwd(dout, dlse, q, k, v, out, lse, *options, wanted, True)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    return [out, lse, dq, dk, dv] + ([dbias] if wanted else [])


def check(q, k, v, dout, dlse, options, least_keys=1):
    """Each op against float64. Backward is a function of the out it is given, in delta_i = dout_i . out_i - dlse_i.

    Its truth is that function, so the rounding of out is part of the input and no error of the op may hide behind it:
    in the float64 reference, whose out is not rounded, the same delta comes of another dlse. What the rounding costs
    from end to end is compared with PyTorch's flash attention below. A flash backward, PyTorch's own too, takes delta
    from a float32 sum over Dv, where softmax's backward takes it from the numbers that cancel against it: PyTorch's
    error here is the reference's at the kernel's dtype with PyTorch's own float32 sum for delta.

    Where numbers cancel, what is left of one order of summation is luck, PyTorch's as much as ours: a result that is
    too far off by its error in one order is judged by its error in others.

    least_keys: rows of dq and dbias whose query sees fewer keys are judged in the whole tensor and head only.
    """
    got = by_kernel(q, k, v, dout, dlse, options)
    unrounded, _ = attention(q.double(), k.double(), v.double(), options)
    given = dlse - (dout.double() * (got[0].double() - unrounded)).sum(-1)
    exact = by_reference(q, k, v, dout, given, options, torch.float64)
    for name, a, b, *several in zip(
        ("out", "lse", "dq", "dk", "dv", "dbias"),
        got,
        exact,
        *(in_another_order(n, q, k, v, dout, given, got[0], options) for n in range(ORDERS)),
        strict=False,
    ):
        for n, theirs in enumerate(several):
            try:
                judge(name, a, b, theirs, q, k, options, least_keys)
                break
            except AssertionError:
                if n == ORDERS - 1:
                    raise
    return got


ORDERS = 4


def in_another_order(n, q, k, v, dout, given, out, options):
    """What PyTorch computes with the columns of q and k, and those of v, in the n-th of some orders; undone after."""
    generator = torch.Generator().manual_seed(n)
    D, Dv = (torch.randperm(t.shape[-1], generator=generator) if n else slice(None) for t in (q, v))
    rounding = rounding_of_delta(dout[..., Dv], out[..., Dv], out[..., Dv].double())
    results = by_reference(q[..., D], k[..., D], v[..., Dv], dout[..., Dv], given - rounding, options, q.dtype)
    for i, order in ((0, Dv), (2, D), (3, D), (4, Dv)):
        if n:
            results[i] = results[i][..., order.argsort()]
    return results


def judge(name, a, b, c, q, k, options, least_keys):
    # the error of a slice of a few numbers is luck: PyTorch's may be none
    dims = [d for d in range(3) if a.shape[d] and a.numel() // a.shape[d] >= 8]
    dtype = q.dtype if name == "dbias" else None
    if name in ("dq", "dbias") and least_keys > 1:
        visible = Positions(q, k, options).visible().expand(*q.shape[:3], k.shape[2])
        rows = (visible.sum(-1) >= least_keys).flatten(0, 1).all(0)
        by_row = [d for d in dims if d == 2]
        assert_accurate(*(t[:, :, rows] for t in (a, b, c)), dims=by_row, what=f"{name} by row", dtype=dtype)
        dims = [d for d in dims if d != 2]
    assert_accurate(a, b, c, dims=dims, what=name, dtype=dtype)


@pytest.mark.parametrize("names", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_every_pair_of_options(isa, names, dtype):
    data = tensors(B=1 if "packed" in names else 2, dtype=dtype)
    check(*data, make_options(names, *data[:2]))


SIZES = [  # B, Hq, Hkv, Tq, Tk, D, Dv
    (1, 1, 1, 1, 2, 1, 1),
    (2, 3, 3, 5, 3, 7, 9),
    (1, 2, 1, 49, 97, 16, 8),
    (1, 4, 4, 96, 96, 64, 64),
    (2, 6, 2, 100, 33, 65, 40),
    (1, 5, 1, 200, 289, 128, 33),
    (1, 1, 1, 50, 60, 256, 256),
    (3, 2, 2, 13, 200, 72, 200),
]


@pytest.mark.parametrize("causal", [False, True], ids=["dense", "causal"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_sizes(isa, size, dtype, causal):
    data = tensors(*size, dtype=dtype)
    check(*data, make_options(("causal",) if causal else (), *data[:2]))


def test_wide_heads(isa):
    data = tensors(B=1, Tq=30, Tk=110, D=512, Dv=512)
    check(*data, make_options(("causal",), *data[:2]))


@pytest.mark.parametrize("bias_dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_bias_gradients_are_summed_over_what_they_are_broadcast_over(isa, threads, shape, bias_dtype):
    data = tensors(B=3, Tq=130, Tk=110, dtype=bias_dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = check(*data, make_options(("bias", "causal"), *data[:2], bias_shape=shape), least_keys=2)
    finally:
        torch.set_num_threads(before)
    assert got[-1].shape[:2] == (3 if shape[0] else 1, 4 if shape[1] else 1)


def test_float32_bias_with_bf16_input(isa):
    data = tensors(dtype=torch.bfloat16)
    got = check(*data, make_options(("bias",), *data[:2], bias_dtype=torch.float32, bias_shape=(False, True)))
    assert got[-1].dtype == torch.float32


def test_expanded_and_transposed_biases_and_masks(isa):
    data = tensors()
    B, Hq, Tq, Tk = 2, 4, 67, 141
    biases = [torch.randn(1, 1, 1, Tk).expand(B, Hq, Tq, Tk), torch.randn(B, Hq, Tq, 1).expand(B, Hq, Tq, Tk),
              torch.randn(B, Hq, Tk, Tq).mT]  # fmt: skip
    for bias in biases:
        check(*data, AttentionOptions(bias=bias, scale=0.2))
    for mask in (torch.rand(1, 1, 1, Tk) < 0.5, (torch.rand(B, Hq, Tk, Tq) < 0.5).mT, torch.rand(B, Hq, 1, Tk) < 0.5):
        check(*data, AttentionOptions(mask=mask, scale=0.2))


def test_a_bias_of_minus_infinity_hides_keys(isa):
    data = tensors()
    bias = torch.randn(2, 4, 67, 141).masked_fill(torch.rand(2, 4, 67, 141) < 0.5, -torch.inf)
    bias[0, :, 5] = -torch.inf
    got = check(*data, AttentionOptions(bias=bias, scale=0.2))
    assert (got[0][0, :, 5] == 0).all() and (got[1][0, :, 5] == -torch.inf).all()
    assert (got[5][bias == -torch.inf] == 0).all() and (got[2][0, :, 5] == 0).all()


def check_against_pytorch(dtype, scale):
    """out and gradients from end to end; PyTorch's flash attention also keeps nothing but out, rounded, and lse."""
    q, k, v, dout, _ = tensors(Hkv=4, Tq=141, Dv=20, dtype=dtype)
    got = by_kernel(q, k, v, dout, None, AttentionOptions(scale=scale, window_right=0))

    def pytorch(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    results = (got[0], *got[2:]), pytorch(torch.float64), pytorch(dtype)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_accurate(a, b, c, dims=(0, 1, 2), what=name)


@pytest.mark.parametrize("scale", [20**-0.5, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_from_end_to_end(isa, dtype, scale):
    """At scale 30 the rounding of lse is most of the error in float32."""
    check_against_pytorch(dtype, scale)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(isa, scale):  # PyTorch's own flash attention gives NaN where it is causal
    check(*tensors(), AttentionOptions(scale=scale, window_right=0))


@settings(max_examples=60)
@given(
    names=st.sets(st.sampled_from(OPTIONS)),
    B=st.integers(1, 3),
    Hkv=st.integers(1, 3),
    group=st.integers(1, 3),
    Tq=st.integers(1, 220),
    Tk=st.integers(1, 220),
    D=st.integers(1, 80),
    Dv=st.integers(1, 80),
    dtype=st.sampled_from(DTYPES),
    bias_shape=st.tuples(st.booleans(), st.booleans()),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
def test_random_configurations(names, B, Hkv, group, Tq, Tk, D, Dv, dtype, bias_shape, threads, seed):
    torch.manual_seed(seed)
    if "packed" in names:
        names, B = names - NOT_PACKED, 1
    data = tensors(B, Hkv * group, Hkv, Tq, Tk, D, Dv, dtype)
    options = make_options(names, *data[:2], bias_shape=bias_shape)
    # where a query sees one key its dq is zero, and what a float32 kernel finds is the rounding of what cancels; of a
    # few keys most of it cancels still, and of a few such rows the error is luck, PyTorch's too
    assume((Positions(*data[:2], options).visible().sum(-1) > 1).sum() >= 8)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*data, options, least_keys=8)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("packed_heads", [False, True], ids=["qkv", "separate"])
def test_layouts(isa, packed_heads):
    """[B, T, H, D] memory, slices of one projection, and a last dimension that is not dense give the same bits."""
    q, k, v, dout, dlse = tensors(D=36)
    q, k, v = (t[:, :2] for t in (q, k, v))
    dout, dlse = dout[:, :2], dlse[:, :2]
    k, v = k[:, :, :67], v[:, :, :67]
    options = make_options(("causal",), q, k)
    plain = by_kernel(*(t.contiguous() for t in (q, k, v, dout, dlse)), options)
    if packed_heads:
        views = torch.stack([t.transpose(1, 2) for t in (q, k, v)], 2).unbind(2)
        views = [t.transpose(1, 2) for t in views]
    else:
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    got = by_kernel(*views, dout.transpose(2, 3).contiguous().transpose(2, 3), dlse, options)
    assert got[0].transpose(1, 2).is_contiguous() and got[2].transpose(1, 2).is_contiguous()
    strided = [torch.stack([t, t], -1)[..., 0] for t in (q, k, v)]
    for a, b, c in zip(plain, got, by_kernel(*strided, dout, dlse, options), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("nothing", ["B", "Tq", "Tk", "Hq", "Dv"])
def test_nothing(nothing):
    sizes = {nothing: 0} | ({"Hkv": 0} if nothing == "Hq" else {})
    q, k, v, dout, dlse = tensors(**sizes)
    for bias in (None, torch.zeros(1, q.shape[1], q.shape[2], k.shape[2])):
        options = AttentionOptions(scale=0.5, bias=bias)
        got = by_kernel(q, k, v, dout, dlse, options)
        assert got[0].shape == dout.shape and got[1].shape == dlse.shape
        assert (got[0] == 0).all()
        if nothing == "Tk":
            assert (got[1] == -torch.inf).all()
        if nothing != "Dv":
            assert all((t == 0).all() for t in got[2:])


def test_packed_sequences_equal_a_padded_batch(isa):
    lengths = torch.tensor([31, 0, 120, 1, 77])
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    q, k, v, dout, dlse = tensors(B=1, Tq=240, Tk=240, D=32, Dv=32)
    slopes = torch.rand(5, 4) * 0.1
    seed = torch.tensor([77])
    common = {"scale": 0.2, "window_right": 0, "window_left": 50, "alibi_slopes": slopes, "dropout_p": 0.2,
              "seed": seed}  # fmt: skip
    got = by_kernel(q, k, v, dout, dlse, AttentionOptions(cu_seqlens_q=starts, cu_seqlens_k=starts.long(), **common))
    longest = int(lengths.max())
    padded = [t.new_zeros(5, t.shape[1], longest, *t.shape[3:]) for t in (q, k, v, dout, dlse)]
    for s, n in enumerate(lengths.tolist()):
        for to, source in zip(padded, (q, k, v, dout, dlse), strict=True):
            to[s, :, :n] = source[0, :, starts[s] : starts[s] + n]
    options = AttentionOptions(key_lengths=lengths, query_start=torch.zeros(5, dtype=torch.int32), **common)
    for a, b in zip(got, by_kernel(*padded, options), strict=True):
        assert (a[:, :, starts[-1] :] == (-torch.inf if a.dim() == 3 else 0)).all()
        for s, n in enumerate(lengths.tolist()):
            assert_accurate(a[0, :, starts[s] : starts[s] + n], b[s, :, :n].double(), dims=(0, 1))


def test_dropout_is_the_references_mask(isa):
    """With q = 0 every weight is 1 / Tk, and with v = 1 for one key each, out is the mask."""
    B, Hq, Tq, Tk, p = 2, 4, 53, 211, 0.37
    seed = torch.tensor([-123456789123456789])
    q, k, v = torch.zeros(B, Hq, Tq, 8), torch.randn(B, 2, Tk, 8), torch.eye(Tk).expand(B, 2, Tk, Tk)
    out, _ = fwd(q, k, v, *AttentionOptions(scale=1.0, dropout_p=p, seed=seed))
    index = torch.meshgrid(*(torch.arange(n) for n in (B, Hq, Tq, Tk)), indexing="ij")
    kept = dropout_keep(seed, *index, p)
    assert torch.equal(out != 0, kept)
    assert_accurate(out, kept.double() / Tk / (1 - p))
    nothing, lse = fwd(q, k, v, *AttentionOptions(scale=1.0, dropout_p=1.0, seed=seed))
    assert (nothing == 0).all() and lse.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_repeats_are_bit_identical(threads):
    data = tensors(B=1, Hq=6, Hkv=3, Tq=400, Tk=400, D=32, Dv=32)
    options = make_options(("causal", "bias", "dropout"), *data[:2])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = by_kernel(*data, options)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, by_kernel(*data, options), strict=True))
    finally:
        torch.set_num_threads(before)
    # a row of out and of dq is computed by one thread, whichever
    single = by_kernel(*data, options)
    assert all(torch.equal(a, b) for a, b in zip(first[:3], single[:3], strict=True))


@pytest.mark.skipif(not native.isa_has("amx"), reason="needs a tile unit")
def test_onednns_tiles_and_ours_do_not_disturb_each_other():
    """Both set the tile registers up in their own way, in the same threads."""
    data = tensors(B=2, Hq=4, Hkv=4, Tq=300, Tk=300, D=64, Dv=64, dtype=torch.bfloat16)
    options = make_options(("causal",), *data[:2])
    x, weight = torch.randn(500, 700).bfloat16(), torch.randn(300, 700).bfloat16()
    product, ours = F.linear(x, weight), by_kernel(*data, options)
    theirs = F.scaled_dot_product_attention(*data[:3], is_causal=True)
    for _ in range(3):
        assert torch.equal(F.linear(x, weight), product)
        assert all(torch.equal(a, b) for a, b in zip(by_kernel(*data, options), ours, strict=True))
        assert torch.equal(F.scaled_dot_product_attention(*data[:3], is_causal=True), theirs)


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (3, 3)], ids=str)
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_that_workers_share(heads, threads, dtype):
    data = tensors(1, *heads, 900, 900, 32, 32, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(*data, make_options(("causal",), *data[:2]))
    finally:
        torch.set_num_threads(before)


def test_keys_that_do_not_exist_are_not_read(isa):
    q, k, v, dout, dlse = tensors()
    lengths = torch.tensor([100, 7])
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    got = by_kernel(q, k, v, dout, dlse, AttentionOptions(scale=0.2, key_lengths=lengths))
    assert all(t.isfinite().all() for t in got)
    assert all((t[b, :, n:] == 0).all() for t in got[3:] for b, n in enumerate(lengths.tolist()))


def test_nan_reaches_what_it_touches(isa):
    q, k, v, _, _ = tensors()
    q[1, 2, 3, 4] = torch.nan
    out, _ = fwd(q, k, v, *AttentionOptions(scale=0.2))
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[1, 2, 3]]))


_LONG = """
import resource, torch
from seqfuse.reference import AttentionOptions
import seqfuse
fwd, bwd = torch.ops.seqfuse.attention_fwd, torch.ops.seqfuse.attention_bwd
def run(T):
    q, k, v, g = (torch.randn(1, 1, T, 16) for _ in range(4))
    options = AttentionOptions(scale=0.25, window_right=0)
    out, lse = fwd(q, k, v, *options)
    return bwd(g, None, q, k, v, out, lse, *options, False, False)
run(300)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
grads = run(32768)
assert all(t.isfinite().all() for t in grads)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_a_sequence_of_32768_needs_memory_linear_in_it():
    """Inputs, results and scratch: a T x T matrix would be 4 GiB."""
    run = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    tensor = 32768 * 16 * 4
    assert int(run.stdout) < 32 * tensor


@pytest.mark.parametrize("names", [(), ("bias", "dropout", "alibi", "mask"), ("packed", "causal")], ids="-".join)
def test_opcheck(names):
    q, k, v, dout, dlse = tensors(B=1, Tq=9, Tk=11)
    for heads_inside in (False, True):
        if heads_inside:
            q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
        options = make_options(names, q, k)
        torch.library.opcheck(fwd.default, (q, k, v, *options))
        out, lse = fwd(q, k, v, *options)
        torch.library.opcheck(bwd.default, (dout, dlse, q, k, v, out, lse, *options, "bias" in names, False))


def test_bad_input_is_refused():
    q, k, v, _, _ = tensors()
    ok = AttentionOptions(scale=1.0)
    cases = [
        ((q.half(), k.half(), v.half()), ok, "float32 and bfloat16"),
        ((q, k.bfloat16(), v), ok, "k must have the dtype of q"),
        ((q[:, :3], k, v), ok, "multiple"),
        ((q, k[:, :, :5], v), ok, "v has the wrong shape"),
        ((q[0], k, v), ok, "four dimensions"),
        ((q, k, v), ok._replace(bias=torch.zeros(1, 4, 67, 7)), "bias must be broadcastable"),
        ((q, k, v), ok._replace(mask=torch.zeros(1, 1, 1, 141)), "mask must be bool"),
        ((q, k, v), ok._replace(key_lengths=torch.zeros(3, dtype=torch.int32)), "key_lengths must have 2 elements"),
        ((q, k, v), ok._replace(key_lengths=torch.zeros(2)), "int32 or int64"),
        ((q, k, v), ok._replace(alibi_slopes=torch.zeros(3)), "alibi_slopes must be"),
        ((q, k, v), ok._replace(dropout_p=0.5), "needs a seed"),
        ((q, k, v), ok._replace(cu_seqlens_q=torch.tensor([0, 1])), "go together"),
    ]
    for args, options, message in cases:
        with pytest.raises(RuntimeError, match=message):
            fwd(*args, *options)
