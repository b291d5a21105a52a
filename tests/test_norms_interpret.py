"""What the Triton norms have besides layer_norm (test_triton_interpret.py), interpreted, by test_rms_norm.py's checks.

rms_norm, dropout with the mask that every backend draws, a weight around zero; rows in registers and in chunks.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import test_rms_norm as checks

import seqfuse
from seqfuse.kernels import common, layer_norm

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
