"""What the Triton norms have besides layer_norm (test_triton_interpret.py), interpreted, by test_rms_norm.py's checks.

rms_norm, dropout with the mask that every backend draws, a weight around zero; rows in registers and in chunks.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import test_rms_norm as checks

import seqfuse
from seqfuse.kernels import common, layer_norm
from seqfuse.testing import assert_accurate

pytestmark = pytest.mark.interpret


@pytest.fixture(params=["in-registers", "chunked"])
def way(request, monkeypatch):
    if request.param == "chunked":  # the kernels for rows that do not fit in registers, on a row of several chunks
        monkeypatch.setattr(common, "blocks", lambda *_: None)
        monkeypatch.setattr(layer_norm, "_CHUNK", 64)
        monkeypatch.setattr(layer_norm, "_COLUMN_TILE", (2, 64))


@pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("cols", [3, 70, 257])
def test_dropout_and_zero_centred_weight(way, cols, dtype, residual, rms):
    checks.check(13, cols, dtype, rms=rms, residual=residual, p=0.3, zero_centered=True, backend="triton")


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("weight", [False, True], ids=["bare", "weight"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (9, 200)], ids=str)
def test_rms_norm(way, shape, weight, residual):
    checks.check(*shape, torch.float32, residual=residual, weight=weight, backend="triton")
    checks.check(*shape, torch.float16, residual=residual, weight=weight, wide_weight=weight, backend="triton")


@pytest.mark.parametrize("p", [0.4, 0.9, 1.0])
def test_the_mask_is_the_same_as_on_the_cpu(way, p):
    x, residual = torch.randn(6, 150), torch.zeros(6, 150)

    def dropped(backend):
        torch.manual_seed(3)
        with seqfuse.backend(backend):
            return seqfuse.ops.rms_norm(x, residual=residual, dropout_p=p)[1] == 0

    here = dropped("triton")
    assert torch.equal(here, dropped("reference")) and (here.all() if p == 1.0 else here.any())


def _gradients(norm, x, weight, bias):
    """y and gradients of a call whose dy is a part of a larger tensor, and of one whose dy is one element, expanded."""
    found = []
    for after in (lambda y: torch.cat([y, y * 2], -1).mul(torch.arange(y.numel() * 2).view(*y.shape[:-1], -1)).sum(),
                  torch.sum):  # fmt: skip
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = norm(*leaves)
        found += [y.detach(), *torch.autograd.grad(after(y), leaves)]
    return found


LAYOUTS = {
    "first": lambda n: torch.randn(5, 7, n)[:, 0],
    "part": lambda n: torch.randn(4, 3, 3 * n)[..., :n],
    "transposed": lambda n: torch.randn(n, 6).t(),
    "permuted": lambda n: torch.randn(3, n, 4).permute(2, 0, 1),
    "expanded": lambda n: torch.randn(1, n).expand(5, n),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(way, layout):
    """Of x, of the parameters and of what comes back in the backward pass."""
    x, weight = LAYOUTS[layout](70), torch.randn(70, 2)[:, 0]
    bias = torch.randn(1).expand(70)
    with seqfuse.backend("triton"):
        ours = _gradients(lambda *args: seqfuse.ops.layer_norm(*args), x, weight, bias)
    plain = torch.nn.functional.layer_norm
    theirs = _gradients(lambda x, w, b: plain(x, (70,), w, b), x, weight, bias)
    truth = _gradients(lambda x, w, b: plain(x, (70,), w, b), x.double(), weight.double(), bias.double())
    for got, wanted, same in zip(ours, truth, theirs, strict=True):
        assert_accurate(got, wanted, same)


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,), (2, 0, 8)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_empty(way, shape, p):
    x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[-1], requires_grad=True)
    with seqfuse.backend("triton"):
        y, s = seqfuse.ops.rms_norm(x, weight, residual=residual, dropout_p=p)
        (y.sum() + s.sum()).backward()
    assert y.shape == s.shape == x.grad.shape == residual.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(shape[-1]))


def test_a_large_mean_in_chunks(way):
    x = torch.randn(3, 150) * 1e15 + 1e20
    with seqfuse.backend("triton"):
        y = seqfuse.ops.layer_norm(x)
    plain = torch.nn.functional.layer_norm
    assert_accurate(y, plain(x.double(), (150,)), plain(x, (150,)), dims=(0,))
