"""Products that ATen is slow at on some processor, taken in another way there: equal results, on any machine."""

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import seqfuse
from seqfuse.ops import products
from seqfuse.testing import assert_accurate


@pytest.fixture(params=[False, True], ids=["as-they-are", "widened"])
def slow(request, monkeypatch):
    monkeypatch.setattr(products, "WIDEN_FROM", 0 if request.param else sys.maxsize)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_keep_the_error_rule(slow, dtype):
    a, b, c, bias = (torch.randn(s).to(dtype) for s in ((33, 20), (20, 17), (33, 17), (17,)))
    wide = [t.double() for t in (a, b, c, bias)]
    assert products.widened(a) == (slow and dtype == torch.bfloat16)
    for got, exact, theirs in (
        (products.matmul(a, b), wide[0] @ wide[1], a @ b),
        (products.addmm(c, a, b), wide[2] + wide[0] @ wide[1], torch.addmm(c, a, b)),
        (products.linear(a, b.t(), bias), wide[0] @ wide[1] + wide[3], torch.nn.functional.linear(a, b.t(), bias)),
        (products.linear(a, b.t()), wide[0] @ wide[1], torch.nn.functional.linear(a, b.t())),
    ):
        assert got.dtype == dtype
        assert_accurate(got, exact, theirs, dims=(0,))


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_auto_keeps_bf16_where_pytorch_would_multiply_in_a_loop(kind, monkeypatch):
    monkeypatch.setattr("seqfuse.ops.rnn_rules.SLOW_BF16", True)
    monkeypatch.setattr(products, "WIDEN_FROM", 0)
    seqfuse.dispatch.forget()
    module, x = seqfuse.fuse(kind(4, 6)).bfloat16(), torch.randn(3, 2, 4).bfloat16()
    with torch.no_grad():
        module(x)
    assert seqfuse.explain(module)[0].backend == "cpu"
    seqfuse.dispatch.forget()


@pytest.mark.parametrize("rows", [11, 12, 40, 65])
def test_many_rows_without_a_gradient(rows):
    """In inference, and inside an autograd function, those that our kernel was measured faster with take it."""
    x, w, b = torch.randn(rows, 130), torch.randn(200, 130), torch.randn(200)
    exact = x.double() @ w.double().t() + b.double()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            got = products.linear(x, w, b)
        assert_accurate(got, exact, torch.nn.functional.linear(x, w, b), dims=(0, 1))


side = st.one_of(st.integers(1, 40), st.sampled_from([95, 191, 192, 193, 255, 256, 257, 300, 385, 500]))
ways = st.sampled_from(["rows", "columns", "neither"])


@given(M=side, K=side, N=side, a=ways, b=ways, added=st.sampled_from(["", "matrix", "row"]), wide=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 99))  # fmt: skip
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_matrix_product(isa, M, K, N, a, b, added, wide, dtype, seed):
    """Any strides of a and b, rows of c and out that lie apart; nothing beside out is written; c may be out."""
    if not seqfuse.native.isa_has(isa):
        pytest.skip(f"this processor has no {isa}")
    torch.manual_seed(seed)

    def matrix(rows, cols, way="rows"):
        if way == "columns":
            return matrix(cols, rows).t()
        if way == "neither":
            return torch.randn(rows, 2 * cols).to(dtype)[:, ::2]
        return torch.randn(rows, cols + 3 * wide).to(dtype)[:, :cols]

    a, b, out = matrix(M, K, a), matrix(K, N, b), torch.full((M, N + 3), 7.0).to(dtype)
    c = matrix(M, N) if added == "matrix" else torch.randn(N).to(dtype) if added else None
    with seqfuse.native.isa_limit(isa):
        torch.ops.seqfuse.matrix_product(a, b, c, out[:, :N])
        again = None if c is None else c.expand(M, N).clone()
        if c is not None:
            torch.ops.seqfuse.matrix_product(a, b, again, again)
    exact, plain = a.double() @ b.double(), a.float() @ b.float()
    if c is not None:
        exact, plain = exact + c.double(), plain + c.float()
        assert torch.equal(again, out[:, :N])
    assert_accurate(out[:, :N], exact, plain.to(dtype), dims=(0, 1) if min(M, N) >= 8 else ())
    assert (out[:, N:] == 7).all()


def test_matrix_product_gives_the_same_on_any_number_of_threads():
    a, b = torch.randn(500, 300), torch.randn(300, 700)
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(torch.empty(500, 700))
        torch.ops.seqfuse.matrix_product(a, b, None, found[-1])
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_matrix_product_of_nothing_nan_and_bad_input():
    mm, none = torch.ops.seqfuse.matrix_product, torch.zeros(0, 3)
    out = torch.full((2, 3), math.nan)
    mm(torch.zeros(2, 0), none, None, out)
    assert (out == 0).all()
    mm(none, torch.zeros(3, 3), None, none)
    a = torch.ones(14, 20)
    a[3, 5] = math.nan
    out = torch.empty(14, 40)
    mm(a, torch.ones(20, 40), None, out)
    assert out[3].isnan().all() and out.isnan().sum() == 40
    a = torch.zeros(2, 2)
    for args, message in (
        ((a, a[:1], None, a), r"b must be \[2, 2\]"),
        ((a, a, a[:1], a), r"c must be \[2, 2\]"),
        ((a, a, torch.zeros(3), a), r"c must be \[2, 2\] or \[2\]"),
        ((a, a, torch.zeros(2).bfloat16(), a), "c must have the dtype of a"),
        ((a, a, None, a[:1]), r"out must be \[2, 2\]"),
        ((a, a, None, a.t().contiguous().t()), "out: the numbers of a row must lie together"),
        ((a, a.bfloat16(), None, a), "b must have the dtype of a"),
        ((a.half(), a.half(), None, a.half()), "a: the CPU kernel takes float32 and bfloat16"),
        ((a[0], a, None, a), "a and b must be matrices"),
    ):
        with pytest.raises(RuntimeError, match=message):
            mm(*args)


def test_own_floats(narrow, monkeypatch):
    """Large enough products of float32 without a gradient are our kernel's; all others ATen's."""
    monkeypatch.setattr(products, "_LEAST_WORK", 0)
    calls = []
    ours = products._own
    monkeypatch.setattr(products, "_own", lambda *args: calls.append(args) or ours(*args))
    a, b, c, bias = (torch.randn(s) for s in ((150, 40), (40, 50), (150, 50), (50,)))
    wide = [t.double() for t in (a, b, c, bias)]
    with torch.no_grad():
        for got, exact, theirs in (
            (products.matmul(a, b), wide[0] @ wide[1], a @ b),
            (products.addmm(c, a, b), wide[2] + wide[0] @ wide[1], torch.addmm(c, a, b)),
            (products.addmm(bias, a, b), wide[3] + wide[0] @ wide[1], torch.addmm(bias, a, b)),
            (products.linear(a, b.t(), bias), wide[0] @ wide[1] + wide[3], torch.nn.functional.linear(a, b.t(), bias)),
            (products.linear(a, b.t().contiguous()), wide[0] @ wide[1], a @ b),
        ):
            assert_accurate(got, exact, theirs, dims=(0, 1))
        assert len(calls) == 5
        assert products.addmm(c, a, b, c) is c
        calls.clear()
        products.matmul(a[:31], b), products.matmul(a.double(), b.double()), products.matmul(a.bfloat16(), b.bfloat16())
        torch.func.vmap(lambda x: products.matmul(x, b))(a[None])
    products.matmul(a, b)
    assert not calls
