"""Products that are taken in float32 where the processor has no fast bfloat16 ones: equal results, on any machine."""

import sys

import pytest
import torch

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
