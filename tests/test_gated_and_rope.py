"""swiglu, geglu and rope against the float64 reference: the CPU kernels at every instruction set, and the ops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import seqfuse
from seqfuse import native, reference
from seqfuse.testing import assert_accurate

DTYPES = [torch.float32, torch.bfloat16]
CALLS = [
    lambda gate, up: seqfuse.ops.swiglu(gate, up),
    lambda gate, up: seqfuse.ops.geglu(gate, up),
    lambda gate, up: seqfuse.ops.geglu(gate, up, approximate="tanh"),
]
NAMES = ["swiglu", "geglu", "geglu-tanh"]


def run(call, tensors, upstream, dtype=None):
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]
    y = call(*leaves)
    y.backward(upstream.to(y.dtype))
    return [y.detach(), *(t.grad for t in leaves)]


def pytorch(activation):
    if activation == 0:
        return lambda gate, up: F.silu(gate) * up
    return lambda gate, up: F.gelu(gate, approximate=("none", "tanh")[activation - 1]) * up


def check_gated(activation, gate, up, upstream, backend="cpu"):
    with seqfuse.backend(backend):
        got = run(CALLS[activation], (gate, up), upstream)
    exact = run(lambda *a: reference.gated(*a, activation), (gate, up), upstream, torch.float64)
    theirs = run(pytorch(activation), (gate, up), upstream)
    for name, a, b, c in zip(("y", "dgate", "dup"), got, exact, theirs, strict=True):
        assert_accurate(a, b, c, dims=(0,), what=name)


@pytest.mark.parametrize("activation", range(3), ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 64), (9, 257)], ids=str)
def test_gated(isa, shape, dtype, activation):
    check_gated(activation, *(torch.randn(shape).mul(2).to(dtype) for _ in range(3)))


@pytest.mark.parametrize("activation", range(3), ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("cols", [1024, 257])
def test_large_results_of_gated_go_past_the_caches(isa, cols, dtype, activation):
    """By stores of their own, where rows fill whole vectors."""
    with native.cached_bytes(0):
        check_gated(activation, *(torch.randn(40, cols).mul(2).to(dtype) for _ in range(3)))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 30),
    cols=st.integers(20, 200),  # at scale 30 a single number may be 1e-38, or what float32 makes of less
    dtype=st.sampled_from(DTYPES),
    activation=st.integers(0, 2),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_random_gated(rows, cols, dtype, activation, scale, seed):
    torch.manual_seed(seed)
    gate, up, dy = (torch.randn(rows, cols) for _ in range(3))
    with seqfuse.backend("cpu"):
        got = run(CALLS[activation], ((gate * scale).to(dtype), up.to(dtype)), dy.to(dtype))
    tensors = (gate * scale).to(dtype), up.to(dtype)
    exact = run(lambda *a: reference.gated(*a, activation), tensors, dy.to(dtype), torch.float64)
    theirs = run(pytorch(activation), tensors, dy.to(dtype))
    for a, b, c in zip(got, exact, theirs, strict=True):
        assert_accurate(a, b, c)


@pytest.mark.parametrize("activation", range(3), ids=NAMES)
def test_halves_of_one_projection_and_more_dimensions(activation):
    both = torch.randn(2, 5, 66, requires_grad=True)

    def call(both):
        with seqfuse.backend("cpu"):
            return CALLS[activation](*both.chunk(2, -1))

    dy = torch.randn(2, 5, 33)
    truth = run(lambda b: reference.gated(*b.chunk(2, -1), activation), (both,), dy, torch.float64)
    for a, b, c in zip(run(call, (both,), dy), truth, run(lambda b: pytorch(activation)(*b.chunk(2, -1)), (both,), dy),
                       strict=True):  # fmt: skip
        assert_accurate(a, b, c)


@pytest.mark.parametrize("activation", range(3), ids=NAMES)
def test_gated_twice_differentiable_compiled_and_registered(activation):
    gate, up, dy = (torch.randn(3, 10) for _ in range(3))

    def second(call, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (gate, up)]
        first = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    def ours(gate, up):
        with seqfuse.backend("cpu"):
            return CALLS[activation](gate, up)

    exact = second(pytorch(activation), torch.float64)
    for a, b, c in zip(second(ours, torch.float32), exact, second(pytorch(activation), torch.float32), strict=True):
        assert_accurate(a, b, c)
    compiled = run(torch.compile(CALLS[activation], fullgraph=True), (gate, up), dy)
    exact = run(pytorch(activation), (gate, up), dy, torch.float64)
    for a, b, c in zip(compiled, exact, run(pytorch(activation), (gate, up), dy), strict=True):
        assert_accurate(a, b, c)
    torch.library.opcheck(torch.ops.seqfuse.gated_fwd.default, (gate, up, activation))
    torch.library.opcheck(torch.ops.seqfuse.gated_bwd.default, (dy, gate, up, activation))


def tables(positions, half):
    angles = torch.arange(positions)[:, None] * 10000.0 ** (-torch.arange(half) / half)
    return angles.cos(), angles.sin()


def check_rope(x, cos, sin, backend="cpu", **options):
    def call(x):
        with seqfuse.backend(backend):
            return seqfuse.ops.rope(x, cos, sin, **options)

    def plain(x):
        args = options.get("positions"), options.get("offset", 0), options.get("interleaved", False), False
        return reference.rope(x, cos.to(torch.promote_types(x.dtype, torch.float32)), sin, *args)

    dy = torch.randn(x.shape).to(x.dtype)
    every = zip(run(call, (x,), dy), run(plain, (x,), dy, torch.float64), run(plain, (x,), dy), strict=True)
    for a, b, c in every:
        assert_accurate(a, b, c, dims=(1, 2))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("dim,half", [(2, 1), (64, 32), (20, 7), (34, 17)], ids=str)
def test_rope(isa, dim, half, dtype, interleaved):
    cos, sin = tables(9, half)
    x = torch.randn(2, 3, 5, dim).to(dtype)
    check_rope(x, cos, sin, interleaved=interleaved, offset=4)
    transposed = torch.randn(2, 5, 3, dim).to(dtype).transpose(1, 2)
    check_rope(transposed, cos, sin, interleaved=interleaved, positions=torch.randint(0, 9, (2, 5)))
    check_rope(transposed, cos, sin, interleaved=interleaved, positions=torch.randint(0, 9, (5,)))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_rope_of_gpt_neox_and_gpt_j_by_complex_numbers(interleaved):
    """The definition: a pair is a complex number, turned by the angle of its position."""
    cos, sin = tables(6, 4)
    x = torch.randn(1, 2, 6, 10)
    pairs = x[..., :8].double().unflatten(-1, (4, 2) if interleaved else (2, 4))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.complex(a, b) * torch.complex(cos.double(), sin.double())
    truth = torch.stack([turned.real, turned.imag], -1 if interleaved else -2).flatten(-2)
    with seqfuse.backend("cpu"):
        y = seqfuse.ops.rope(x, cos, sin, interleaved=interleaved)
    assert_accurate(y[..., :8], truth)
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_rope_in_place_pairs_and_derivatives():
    cos, sin = tables(7, 8)
    q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)
    with seqfuse.backend("cpu"):
        turned = seqfuse.ops.rope((q, k), cos, sin)
        copies = q.clone(), k.clone()
        in_place = seqfuse.ops.rope(copies, cos, sin, inplace=True)
        for new, old, copy in zip(turned, in_place, copies, strict=True):
            assert torch.equal(new, old) and old is copy
        with pytest.raises(ValueError, match="inplace=True needs inference"):
            seqfuse.ops.rope(q.clone().requires_grad_(), cos, sin, inplace=True)
        x = q[:1, :1].double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: seqfuse.ops.rope(x, cos.double(), sin.double()).square(), x)
    x = q.clone().requires_grad_()
    with seqfuse.backend("cpu"):
        first = torch.autograd.grad(seqfuse.ops.rope(x, cos, sin).pow(3).sum(), x, create_graph=True)[0]
        second = torch.autograd.grad(first.square().sum(), x)[0]
    wide = q.double().requires_grad_()
    first = torch.autograd.grad(
        reference.rope(wide, cos, sin, None, 0, False, False).pow(3).sum(), wide, create_graph=True
    )
    exact = torch.autograd.grad(first[0].square().sum(), wide)[0]
    assert_accurate(second, exact)


def test_rope_compiled_and_registered():
    cos, sin = tables(7, 8)
    x, dy = torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 16)
    got = run(torch.compile(lambda x: seqfuse.ops.rope(x, cos, sin), fullgraph=True), (x,), dy)
    exact = run(lambda x: reference.rope(x, cos, sin, None, 0, False, False), (x,), dy, torch.float64)
    for a, b in zip(got, exact, strict=True):
        assert_accurate(a, b)
    torch.library.opcheck(torch.ops.seqfuse_composed.rope.default, (x, cos, sin, None, 0, False, False))


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: seqfuse.ops.swiglu(torch.randn(3), torch.randn(4)), ValueError, "up must have shape [3]"),
        (lambda: seqfuse.ops.geglu(torch.randn(3), torch.randn(3).double()), ValueError, "up is float64"),
        (lambda: seqfuse.ops.geglu(torch.randn(3), torch.randn(3), approximate="x"), ValueError, "approximate must be"),
        (lambda: seqfuse.ops.rope(torch.randn(3, 4), *tables(4, 2)), ValueError, "x must be 4-D"),
        (lambda: seqfuse.ops.rope(torch.randn(1, 1, 3, 4), *tables(2, 2)), ValueError, "do not fit into tables"),
        (lambda: seqfuse.ops.rope(torch.randn(1, 1, 3, 4), *tables(4, 3)), ValueError, "cos has 3 columns"),
        (
            lambda: seqfuse.ops.rope(
                torch.randn(1, 1, 3, 4), *tables(4, 2), positions=torch.zeros(2, dtype=torch.int64)
            ),
            ValueError,
            "positions must have shape",
        ),
        (
            lambda: seqfuse.ops.rope(torch.randn(1, 1, 3, 4), *(t.double() for t in tables(4, 2))),
            ValueError,
            "cos must have x's dtype or be float32",
        ),
        (lambda: seqfuse.ops.rope(torch.randn(1, 1, 3, 4), *tables(4, 2), offset=0.5), TypeError, "must be an integer"),
        (lambda: seqfuse.ops.swiglu(torch.randn(3).to_sparse(), torch.randn(3)), TypeError, "gate must be a dense"),
    ],
)
def test_bad_input_gets_one_sentence(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_position_outside_of_the_tables_raises():
    with seqfuse.backend("cpu"), pytest.raises(RuntimeError, match="position 9 is outside of the tables"):
        seqfuse.ops.rope(torch.randn(1, 1, 1, 4), *tables(4, 2), positions=torch.tensor([9]))
    for position in (4, -1):
        with pytest.raises(IndexError, match=f"position {position} is outside of tables of 4 rows"):
            seqfuse.ops.rope(torch.randn(1, 1, 1, 4), *tables(4, 2), positions=torch.tensor([position]))


@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_rope_in_place_is_a_change_that_autograd_hears_of(backend):
    x = torch.randn(1, 2, 8, 4, requires_grad=True)
    h = x * 1
    loss = h.square().sum()
    with torch.no_grad(), seqfuse.backend(backend):
        seqfuse.ops.rope(h, *tables(8, 2), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode(), seqfuse.backend(backend):
        seqfuse.ops.rope(torch.randn(1, 2, 8, 4), *tables(8, 2), inplace=True)
    heads = torch.randn(1, 1, 8, 4).expand(1, 2, 8, 4)
    with seqfuse.backend(backend), pytest.raises(RuntimeError, match="more than one element"):
        seqfuse.ops.rope(heads, *tables(8, 2), inplace=True)


def test_gated_without_columns():
    nothing = torch.randn(9, 0)
    with seqfuse.backend("cpu"):
        assert seqfuse.ops.swiglu(nothing, nothing).shape == (9, 0)
